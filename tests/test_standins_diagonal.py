"""Diagonal and quasi-diagonal stand-ins against their dense twins."""

from __future__ import annotations

import pytest
import torch
from cases_more import MORE_CASES
from fisher_checks import KINDS, QUIET, case, error, in_float32
from standin_checks import check_split, check_standin, units_and_biases
from test_fisher_streamed import of_path
from torch import nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.approximations import BlockDiagonal
from fisherlens.scores.base import LayerScores
from fisherlens.scores.conv import ConvScores
from fisherlens.scores.dense import DenseScores

pytestmark = pytest.mark.filterwarnings(QUIET)
NAMES = [
    *(
        "softmax_regression",
        "mlp_tanh",
        "mlp_no_bias",
        "frozen_first_layer",
        "dense_on_positions",
        "gaussian_three_outputs",
    ),
    *(
        "conv_stride",
        "conv_groups",
        "conv_depthwise",
        "conv_everything",
        "conv_one_position",
        "conv_1d",
        "conv_3d",
        "lenet",
    ),
    *("segmentation", "batchnorm_2d", "layer_norm", "group_norm", "residual", "module_used_twice", "conv_used_twice"),
    *("root_parameter", "tied_weights", "lstm"),
]
KEPT_AS_FACTORS = ["conv_stride", "conv_groups", "conv_1d", "conv_3d", "conv_same", "conv_circular"]


def quasi(F: fl.Fisher, T: torch.Tensor) -> torch.Tensor:
    return reference.quasi_diagonal(T, *units_and_biases(F))


@pytest.mark.parametrize(
    "name", ["mlp_tanh", "frozen_first_layer", "lenet", "conv_groups", "batchnorm_2d", "root_parameter"]
)
def test_diagonal(name, unchanged):
    c = case(name)
    F = c.fisher()
    with unchanged(c.model):
        check_standin(fl.Diagonal(F), c.matrix, torch.diag(c.matrix.diagonal()), c.vectors())


@pytest.mark.parametrize("name", NAMES)
def test_quasi_diagonal(name, unchanged):
    c = case(name)
    F = c.fisher()
    with unchanged(c.model):
        check_standin(fl.QuasiDiagonal(F), c.matrix, quasi(F, c.matrix), c.vectors())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp_tanh", "lenet", "batchnorm_2d", "segmentation"])
def test_every_kind(name, kind):
    c = case(name, kind)
    F = c.fisher()
    check_standin(fl.QuasiDiagonal(F), c.matrix, quasi(F, c.matrix), c.vectors(), layers=False)
    check_standin(fl.Diagonal(F), c.matrix, torch.diag(c.matrix.diagonal()), c.vectors(), layers=False)


@pytest.mark.parametrize("name", KEPT_AS_FACTORS)
def test_convolutions_that_are_kept_as_inputs_and_scores(name, monkeypatch):
    monkeypatch.setattr("fisherlens.scores.plan._Candidate.work", property(lambda self: float(self.storage == "rows")))
    c = case(name)
    F = c.fisher()
    assert isinstance(F.scores["0"], ConvScores | DenseScores)
    check_standin(fl.QuasiDiagonal(F), c.matrix, quasi(F, c.matrix), c.vectors(), layers=False)


@pytest.mark.parametrize("path", ["streamed", "linearised"])
@pytest.mark.parametrize("name", ["mlp_tanh", "conv_groups", "batchnorm_2d", "root_parameter"])
def test_scores_that_are_not_kept(name, path):
    c = case(name)
    F = of_path(c, path)
    check_standin(fl.QuasiDiagonal(F), c.matrix, quasi(F, c.matrix), c.vectors(), layers=False)
    check_standin(fl.Diagonal(F), c.matrix, torch.diag(c.matrix.diagonal()), c.vectors(), layers=False)


@pytest.mark.parametrize("name", ["embedding with padding", "embedding on a plane"])
def test_embeddings_are_diagonal(name):
    model, data, likelihood = MORE_CASES[name]()
    T, F = reference.fisher(model, data, likelihood), fl.Fisher(model, data, likelihood=likelihood)
    V = torch.randn(len(T), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    Q = fl.QuasiDiagonal(F)
    check_standin(Q, T, quasi(F, T), V)
    table = next(layer for layer in F.layout.layers if layer.kind == "embedding")
    assert error(Q.on_layer(table.name).dense(), torch.diag(F.restrict(table.name).diagonal())) == 0


@pytest.mark.parametrize("name", ["mlp_tanh", "lenet", "batchnorm_2d", "conv_groups"])
def test_float32(name):
    c = case(name)
    F = in_float32(name)
    check_standin(fl.QuasiDiagonal(F), c.matrix, quasi(F, c.matrix), c.vectors(), tol=1e-5, split=1e-4, layers=False)
    check_standin(
        fl.Diagonal(F), c.matrix, torch.diag(c.matrix.diagonal()), c.vectors(), tol=1e-5, split=1e-4, layers=False
    )


def test_many_examples_are_summed_in_parts(monkeypatch):
    c = case("mlp_tanh")
    whole = fl.QuasiDiagonal(c.fisher()).dense()
    monkeypatch.setattr("fisherlens.scores.base.PART", 2)
    F = c.fisher()
    assert error(fl.QuasiDiagonal(F).dense(), whole) < 1e-14
    check_split(fl.QuasiDiagonal(F), c.matrix, whole, 1e-10)


def test_small_chunks(monkeypatch):
    for name in ("dense_on_positions", "batchnorm_2d", "conv_groups", "mlp_tanh"):
        c = case(name)
        F = c.fisher()
        for module in ("base", "conv"):
            monkeypatch.setattr(f"fisherlens.scores.{module}.CHUNK_BYTES", 300, raising=False)
        for module in ("pieces", "units"):
            monkeypatch.setattr(f"fisherlens.approximations.{module}.CHUNK_BYTES", 300)
        Q = fl.QuasiDiagonal(F)
        assert error(Q.dense(), quasi(F, c.matrix)) < 1e-10
        check_split(Q, c.matrix, quasi(F, c.matrix), 1e-10)


def test_a_silent_bias_leaves_its_unit_diagonal():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(x) * torch.tensor([1.0, 0.0]).to(x)  # nothing is known of the second unit

    model = Gated().double()
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    F = fl.Fisher(model, (x, torch.zeros(6, 2).double()), likelihood="gaussian")
    Q = fl.QuasiDiagonal(F)
    assert not Q.dense()[3:6].any()
    assert error(Q.dense(), quasi(F, F.dense())) < 1e-12
    v = torch.ones(8, dtype=torch.float64)
    assert Q.solve(v, 0.5)[3:6].tolist() == [2.0, 2.0, 2.0]


def test_norm_layers_are_exact():
    F = case("batchnorm_1d").fisher()
    for name in [layer.name for layer in F.layout.layers if layer.kind == "norm"]:
        block = BlockDiagonal(F.restrict(name), "unit").dense()
        assert error(fl.QuasiDiagonal(F).on_layer(name).dense(), block) < 1e-12


def test_the_step_as_the_damping_goes_to_zero():
    """p_i = (g_i - g_0 F_0i/F_00)/(F_ii - F_0i²/F_00), p_0 = g_0/F_00 - Σ (F_0i/F_00) p_i."""
    c = case("softmax_regression")
    F = c.fisher()
    g, T = F.gradient(), c.matrix
    p = fl.QuasiDiagonal(F).solve(g, 1e-13)
    for unit, bias in zip(*units_and_biases(F), strict=True):
        row, weights = T[bias] / T[bias, bias], [i for i in unit.tolist() if i != bias]
        own = torch.stack([(g[i] - g[bias] * row[i]) / (T[i, i] - T[bias, i] * row[i]) for i in weights])
        assert error(p[weights], own) < 1e-9
        assert abs(p[bias] - (g[bias] / T[bias, bias] - row[weights] @ own)) < 1e-9


def test_small_damping_in_float32():
    """The bias has no entry of its own in D: a solve that divides by λ there and subtracts afterwards loses all digits."""
    c = case("mlp_tanh")
    F = in_float32("mlp_tanh")
    Q = fl.QuasiDiagonal(F)
    exact = reference.solve(Q.dense().double(), c.vectors(), 1e-6)
    assert error(Q.solve(c.vectors().float(), 1e-6), exact) < 1e-3


def test_a_wide_layer_needs_no_rows(monkeypatch):
    model = nn.Linear(3000, 40)
    x = torch.randn(8, 3000, generator=torch.Generator().manual_seed(0))
    F = fl.Fisher(model, (x, torch.arange(8)), likelihood="categorical")

    def refuse(*_):
        raise AssertionError("explicit columns")

    monkeypatch.setattr(DenseScores, "columns", refuse)
    monkeypatch.setattr(LayerScores, "block_rows", refuse)
    monkeypatch.setattr(DenseScores, "block_rows", refuse)
    Q = fl.QuasiDiagonal(F)
    assert 0 < Q.within_block_error() < F.frobenius_norm() ** 2
    assert torch.isfinite(Q.solve(F.gradient(), 1e-3)).all()


def test_a_million_parameters_need_no_labels():
    F = fl.Fisher(nn.Linear(1000, 1000), (torch.ones(2, 1000), torch.tensor([0, 1])), likelihood="categorical")
    D = fl.Diagonal(F)
    assert torch.equal(D @ torch.ones(F.n_params), F.diagonal())
    assert D.storage_bytes == 4 * F.n_params
    assert not {"labels", "blocks", "layers"} & set(vars(D.partition))
