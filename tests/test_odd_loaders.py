"""Data sources and models that a joined, checked or repeated pass could get wrong without a word."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import fill
from fisher_checks import error
from torch import Tensor, nn

import fisherlens as fl
from fisherlens.errors import InputError

DTYPE = torch.float64
STREAMED = {"likelihood": "categorical", "memory": 1200}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def network(width: int = 6) -> nn.Module:
    layers = nn.Sequential(nn.Linear(width, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return fill(layers, torch.Generator().manual_seed(0))


class Refilled:
    """A loader that writes every batch into the same memory."""

    def __init__(self, x: Tensor, y: Tensor, size: int):
        self.data, self.size = (x, y), size
        self.buffers = torch.empty_like(x[:size]), torch.empty_like(y[:size])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.data[0]), self.size):
            for buffer, values in zip(self.buffers, self.data, strict=True):
                buffer.copy_(values[start : start + self.size])
            yield self.buffers


@pytest.mark.parametrize("size", [1, 4, 6])
@pytest.mark.parametrize("path", ["streamed", "linearised"])
def test_a_loader_that_fills_the_same_memory_again(size, path, monkeypatch):
    """Small batches are joined, and so held while the next is read; a kept graph holds them for good."""
    monkeypatch.setattr("fisherlens.scores.plan._GRAPHS", 1e-9 if path == "linearised" else 1e9)
    monkeypatch.setattr("fisherlens.scores.collector._JOINED", 4)
    x, y = draw(12, 6), torch.arange(12) % 3
    model, v = network(), draw(53, 2, seed=1)
    truth = fl.Fisher(model, (x, y), likelihood="categorical") @ v
    F = fl.Fisher(model, Refilled(x, y, size), **STREAMED)
    assert {entry.path for entry in F.plan} == {path}
    assert error(F @ v, truth) < 1e-12
    assert error(F @ v[:, :1], truth[:, :1]) < 1e-12
    assert error(fl.Fisher(model, Refilled(x, y, size), likelihood="categorical") @ v, truth) < 1e-12


@pytest.mark.parametrize("change", ["flipped", "reordered", "negative zero"])
def test_signs_are_part_of_what_a_second_pass_must_repeat(change):
    """The sign is the highest bit of a word: a sum modulo 2^64 would see whether an odd number of them changed, and no more."""
    x = torch.where(draw(64, 64) > 0, 1.0, -1.0).to(DTYPE) if change == "reordered" else draw(64, 64)
    x = torch.zeros_like(x) if change == "negative zero" else x
    other = x[torch.randperm(64, generator=torch.Generator().manual_seed(1))] if change == "reordered" else -x
    passes = iter([x, other, x])

    class Loader:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            yield next(passes), torch.zeros(64, dtype=torch.long)

    with pytest.raises(InputError, match="batch 0 differs from what it was in an earlier pass"):
        fl.Fisher(network(64), Loader(), likelihood="categorical")


class WholeNorm(nn.Module):
    """Scales by the norm of all it was given: a function of each example only where batches hold one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x).tanh()
        return self.head(h / h.norm())


class OneByOne(nn.Module):
    """Drops the axis of the batch, and puts it back."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x[0]).tanh())[None]


class OneTable(nn.Module):
    """A layer that reads one row of a table, which is as long as a batch of one example; and one without forward mode."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.read, self.cell = nn.Parameter(torch.ones(1, 4)), nn.Linear(4, 3), nn.GRU(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.table) + self.cell(x[None])[0][0]


@pytest.mark.parametrize("build", [WholeNorm, OneByOne, OneTable])
@pytest.mark.parametrize("labelled", [True, False])
def test_models_of_one_example_at_a_time_are_given_one_at_a_time(build, labelled, unchanged, monkeypatch):
    monkeypatch.setattr("fisherlens.scores.plan._GRAPHS", 1e9)  # no graph is kept
    x, y = draw(12, 6), torch.arange(12) % 3
    ones = [(x[i : i + 1], y[i : i + 1] if labelled else None) for i in range(12)]
    model = fill(build().double(), torch.Generator().manual_seed(0))
    kept = fl.Fisher(model, ones, likelihood="categorical")
    with unchanged(model):
        F = fl.Fisher(model, ones, likelihood="categorical", memory=kept.plan.nbytes // 4)
        assert F.plan.streamed
        assert not F.scores.collector.joins
        v = draw(F.n_params, 2, seed=1)
        assert error(F @ v, kept @ v) < 1e-10
        assert error(F @ v[:, :1], kept @ v[:, :1]) < 1e-10
        assert error(F.diagonal(), kept.diagonal()) < 1e-10
    assert fl.Fisher(network(), ones, **STREAMED).scores.collector.joins


@pytest.mark.parametrize("memory", ["2GiB", 1200])
@pytest.mark.parametrize("kind", ["exact", "mc", "hessian"])
def test_inference_mode_around_everything(kind, memory):
    """Also data that were made under it, as by a loader that is read there."""
    x, y = draw(12, 6), torch.arange(12) % 3
    model, v = network(), draw(53, 2, seed=1)
    options = {"likelihood": "categorical", "kind": kind, "memory": memory}
    truth = fl.Fisher(model, (x, y), **options) @ v
    with torch.inference_mode():
        made = [(x[i : i + 4] + 0, y[i : i + 4] + 0) for i in range(0, 12, 4)]
        assert made[0][0].is_inference()
        assert error(fl.Fisher(model, (x, y), **options) @ v, truth) < 1e-12
        inside = fl.Fisher(model, made, **options)
        assert error(inside @ v, truth) < 1e-12
    assert error(inside @ v, truth) < 1e-12


def test_a_model_made_under_inference_mode():
    with torch.inference_mode():
        model = network()
    for kind in ("exact", "hessian"):
        with pytest.raises(InputError, match=r"Parameter '0\.weight' was made under torch\.inference_mode\(\)"):
            fl.Fisher(model, (draw(4, 6), torch.zeros(4).long()), likelihood="categorical", kind=kind)
