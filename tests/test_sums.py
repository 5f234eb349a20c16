"""Sums over examples: taken in parts that are added in float64, with the same answers and bounded buffers."""

from __future__ import annotations

import pytest
import torch
from cases import fill
from fisher_checks import QUIET, case, error
from torch import nn

import fisherlens as fl
from fisherlens import reference

pytestmark = pytest.mark.filterwarnings(QUIET)
NAMES = [
    *("mlp_tanh", "frozen_first_layer", "dense_on_positions", "conv_everything", "conv_groups", "conv_1d", "lenet"),
    *("batchnorm_2d", "module_used_twice", "root_parameter", "segmentation"),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", [1, 2, 4])
def test_parts_change_nothing(name, part, monkeypatch):
    monkeypatch.setattr("fisherlens.scores.base.PART", part)
    monkeypatch.setattr("fisherlens.scores.matrix.PART", part)
    c = case(name)
    F, T, V = c.fisher(), c.matrix, c.vectors(4)
    assert F.n_data > part
    assert error(F @ V, T @ V) < 1e-10
    assert error(F @ V[:, 0], T @ V[:, 0]) < 1e-10
    assert error(F.diagonal(), T.diagonal()) < 1e-10
    assert F.trace() == pytest.approx(T.trace().item(), rel=1e-10)
    assert error(F.dense(), T) < 1e-10
    assert (
        error(fl.BlockDiagonal(F, "unit").dense(), reference.block_diagonal(T, fl.partition(F, "unit").blocks)) < 1e-10
    )


def test_parts_of_an_embedding(monkeypatch):
    monkeypatch.setattr("fisherlens.scores.base.PART", 2)
    generator = torch.Generator().manual_seed(2)
    model = fill(nn.Sequential(nn.Embedding(7, 3, padding_idx=0), nn.Flatten(), nn.Linear(12, 3)).double(), generator)
    data = (torch.randint(7, (9, 4), generator=generator), torch.randint(3, (9,), generator=generator))
    F, T = fl.Fisher(model, data, likelihood="categorical"), reference.fisher(model, data, "categorical")
    V = torch.randn(F.n_params, 3, generator=generator, dtype=torch.float64)
    assert F.plan["0"].storage == "look-ups"
    assert error(F @ V, T @ V) < 1e-10
    assert error(F.diagonal(), T.diagonal()) < 1e-10


def test_buffers_of_a_block_product_are_bounded(monkeypatch):
    monkeypatch.setattr(
        "fisherlens.scores.base._PART_BYTES", 8 * 6 * 3 * 2
    )  # two examples of six units and three vectors
    c = case("mlp_tanh")
    F = c.fisher()
    layer = F.scores.layers[0]
    assert next(rows.stop - rows.start for rows, _ in layer._parts(3)) == 2 * F.n_columns
    assert error(F @ c.vectors(3), c.matrix @ c.vectors(3)) < 1e-10


@pytest.mark.parametrize("bias", [True, False])
def test_float32_over_many_examples(bias):
    """A linear network, whose F is XᵀX/N: float32 sums over 400,000 examples keep their digits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400_000, 6, generator=generator) + 3  # a mean far from zero, so that nothing cancels
    model = nn.Linear(6, 1, bias=bias)
    F = fl.Fisher(model, (x, None), likelihood="gaussian", memory="100MB")
    X = torch.cat([x, torch.ones(len(x), 1)], dim=1).double() if bias else x.double()
    truth = X.T @ X / len(x)
    v = torch.randn(F.n_params, 5, generator=generator)
    assert error((F @ v).double(), truth @ v.double()) < 5e-7
    assert error(F.diagonal().double(), truth.diagonal()) < 5e-7
    assert error(F.dense().double(), truth) < 5e-7
    assert F.trace() == pytest.approx(truth.trace().item(), rel=5e-7)
