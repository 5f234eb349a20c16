"""The page on results names every node, variable, dim and root attribute of a real report, and no node that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fisherlens as fl
from fisherlens.report import figures

PAGE = (Path(__file__).parents[1] / "docs" / "schema.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## The tree of a report")[2].partition("\n## ")[0]
NODES = re.findall(r"^\| (`[^|]*) \|", SECTION, re.MULTILINE)
NAMES = set(re.findall(r"`([^`\n]+)`", PAGE))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 1, 5, 5, generator=generator), torch.arange(24) % 3

    def factory():
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 2), nn.Flatten(), nn.Linear(8, 3))

    problem = fl.Problem("tiny", "Noise.", factory, (x, y), (x, y), "categorical")
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw_all", lambda tree: {})  # this is about the data
        return fl.report(problem, folder, num_examples=10, num_steps=2, num_seeds=1, num_null=5, progress=False)


def documented(name: str) -> bool:
    """Whether a name stands on the page, as it is or as a pattern such as ``decrease_<scheme>``."""
    patterns = [re.escape(known) for known in NAMES]
    return any(re.fullmatch(re.sub(r"<[a-z]+>", ".+", pattern), name) for pattern in patterns)


def nodes(tree) -> dict[str, object]:
    return {node.path.strip("/"): node.to_dataset() for node in tree.subtree if node.path != "/"}


def test_every_node_is_listed_and_every_listed_node_exists(tree):
    listed = {name for cell in NODES for name in re.findall(r"`([^`]+)`", cell)}
    found = {re.sub(r"^segments(/.+)?$", "segments/<layer>", path) for path in nodes(tree)}
    assert found == listed


def test_every_variable_dim_and_coordinate_is_named(tree):
    for path, result in nodes(tree).items():
        for name in (*result.variables, *result.dims):
            assert documented(str(name)), f"{name} of {path}"


def test_every_attribute_of_the_root_is_named(tree):
    assert [name for name in tree.attrs if not documented(name)] == []


def test_stages_are_outermost_and_said_where_they_are_absent(tree):
    without = set(
        re.findall(r"^\| `(\w+)` \|[^\n]*no `stage`", SECTION.partition("Variables of the nodes")[0], re.MULTILINE)
    )
    assert without == {"training", "segment_training", "verify", "log"}
    for path, result in nodes(tree).items():
        if result.sizes:
            assert ("stage" in result.dims) == (path not in without), path
    assert list(tree["spectrum"].stage.values) == ["start", "middle", "end"]
