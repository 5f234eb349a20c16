"""The how-to for a model of one's own: its code runs in order, and the plans and errors are those that its text tells of."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fisherlens as fl

HOWTO = Path(__file__).parents[1] / "docs" / "howto" / "own_model.md"


def cells_of(page: Path) -> list[str]:
    """The code cells of a page, without the lines of options at their beginning."""
    cells = re.findall(r"```\{code-cell\} python3\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [re.sub(r"^(:.*\n)+", "", cell) for cell in cells]


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The names that the how-to's code defines, and under ``printed`` what each cell printed."""
    printed: list[str] = []
    names: dict[str, Any] = {"__name__": "page"}
    names["print"] = lambda *words: printed.__setitem__(-1, printed[-1] + " ".join(map(str, words)) + "\n")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("error")
        for cell in cells_of(HOWTO):
            printed.append("")
            exec(compile(cell, str(HOWTO), "exec"), names)  # noqa: S102 - the page's own code is what is tested
    return names | {"printed": printed}


def test_the_plan_of_the_mixed_model_is_what_the_text_says(page):
    F = fl.Fisher(page["model"], (page["x"], page["y"]), likelihood="categorical")
    reasons = {layer.layer: layer.reason for layer in F.plan}
    assert set(reasons) == {"(root)", "conv", "norm", "swish", "inner", "outer"}
    for layer in ("(root)", "swish", "inner"):
        assert reasons[layer].startswith("no layer rule")
    assert not any("no layer rule" in reasons[layer] for layer in ("conv", "norm", "outer"))
    assert "outer.weight" not in F.layout.names  # it is inner.weight
    assert str(F.plan) in page["printed"][0]


def test_selections_are_what_the_page_prints(page):
    assert page["head"].layout.names == ("temperature", "inner.weight", "inner.bias")
    assert all(name.endswith("bias") for name in page["patterns"].layout.names)


def test_the_function_of_parameters_is_the_jacobian_squared(page):
    t, (h, a) = page["times"][:, 0], page["start"].values()
    J = torch.stack([*torch.exp(-t[:, None] * a).T, *(-t[:, None] * h * torch.exp(-t[:, None] * a)).T], dim=1)
    truth = J.T @ J / len(t) / 0.01
    assert torch.allclose(page["curve"].dense(), truth, rtol=1e-10, atol=1e-10)


def test_dictionaries_leave_their_labels_to_the_likelihood(page):
    exact, sampled = (
        fl.Fisher(page["tagger"], page["batches"], likelihood=fl.Categorical(class_axis=-1), **options)
        for options in ({}, {"kind": "mc", "mc_samples": 2})
    )
    assert (exact.n_columns, sampled.n_columns) == (24, 2)
    kept = sum(int((batch["labels"] != -100).sum()) for batch in page["batches"])
    assert exact.total_weight == kept


def test_memory_paths_are_those_of_the_text(page):
    paths = re.findall(r"(?:GiB|MiB|KiB): (\w+),", page["printed"][-2])
    assert paths == ["factors", "linearised", "streamed"]


def test_what_is_refused_is_said(page):
    said = page["printed"][-1].strip().split("\n\n")
    expected = [
        "InputError: Module '1' (Dropout) is in training mode",
        "InputError: batch 0 differs from what it was in an earlier pass",
        "InputError: data is a one-shot generator",
        "InputError: The model must return one tensor of outputs",
        "TypeError: likelihood must be a name or a fisherlens likelihood; got CrossEntropyLoss",
    ]
    assert len(said) == len(expected)
    for message, start in zip(said, expected, strict=True):
        assert message.startswith(start)
