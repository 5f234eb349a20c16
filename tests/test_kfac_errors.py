"""What KFAC and EKFAC do with layers that have no factors, and with bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases_more import MORE_CASES
from fisher_checks import QUIET, ZOO, case, error
from torch import Tensor, nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.errors import InputError, MemoryBudgetError, UnsupportedModuleError
from fisherlens.layout import ROOT

pytestmark = pytest.mark.filterwarnings(QUIET)
TOLERANCE = 1e-10


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- layers without factors ------------------------------------------------------------------------------------------


def test_other_layers_get_their_diagonal_or_their_block():
    c = case("residual")
    F = c.fisher()
    norm = F.layout.layer("inner.1")
    at = slice(norm.start, norm.stop)
    for others in ("diagonal", "block"):
        K = fl.KFAC(F, others=others)
        T = c.matrix[at, at]
        kept = T.diagonal().diag() if others == "diagonal" else T
        assert error(K.dense()[at, at], kept) < TOLERANCE
        gap = (T - kept).square().sum().item()
        assert K.within_block_errors()["inner.1"] == pytest.approx(gap, rel=1e-6, abs=1e-12)
        dense = K.dense()
        V = c.vectors()
        assert error(K @ V, dense @ V) < TOLERANCE
        assert error(K.solve(V, 0.1), reference.solve(dense, V, 0.1)) < TOLERANCE
        assert error(K.damped_product(V, 0.1), dense @ V + 0.1 * V) < TOLERANCE
        assert K.log_determinant(0.1) == pytest.approx(reference.log_determinant(dense, 0.1), rel=1e-9)
        assert error(K.diagonal(), dense.diagonal()) < TOLERANCE
        assert K.squared_norm() == pytest.approx(dense.square().sum().item(), rel=1e-9)
        assert "inner.1" not in K.factor_a
        assert set(K.factor_g) == {"stem", "inner.0", "shortcut", "head"}


def test_a_network_without_any_factors():
    c = case("batchnorm_first")
    F = c.fisher(params=["0", "2"])
    K = fl.KFAC(F, others="block")
    assert error(K.dense(), fl.BlockDiagonal(F, "layer").dense()) < TOLERANCE
    assert K.within_block_error() == 0


@pytest.mark.parametrize(
    ("name", "layer", "type_name"),
    [
        ("batchnorm_2d", "1", "BatchNorm2d"),
        ("layer_norm", "1", "LayerNorm"),
        ("root_parameter", ROOT, "RootParameter"),
        ("tied_weights", "encode", "Linear"),
        ("lstm", "lstm", "LSTM"),
        ("transposed conv2d", "0", "ConvTranspose2d"),
        ("embedding on a plane", "0", "Embedding"),
        ("attention", None, "MultiheadAttention|NonDynamicallyQuantizableLinear"),
    ],
)
def test_traps_10_and_17_what_has_no_factors_is_named(name, layer, type_name, unchanged):
    model, data, likelihood = (ZOO | MORE_CASES)[name]()
    F = fl.Fisher(model, data, likelihood=likelihood)
    label = rf"'{layer}'" if layer else ".*"
    label = label.replace("(", r"\(").replace(")", r"\)")
    for make in (fl.KFAC, fl.EKFAC):
        message = rf"{make.__name__} has no Kronecker factors for layer {label} \(({type_name})\).*Supported are torch.nn.Linear, Conv1d.*others='diagonal'"
        with unchanged(model), pytest.raises(UnsupportedModuleError, match=message):
            make(F)
        K = make(F, others="diagonal")
        assert K.n_params == F.n_params
        assert np.isfinite(K.within_block_error())


def test_trap_17_look_alikes_are_not_taken_for_what_they_resemble():
    class Linear(nn.Linear):
        """Stores its weight transposed."""

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight + self.bias

    model = nn.Sequential(Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x = torch.randn(5, 3, generator=rng(), dtype=torch.float64)
    F = fl.Fisher(model, (x, torch.tensor([0, 1, 2, 0, 1])), likelihood="categorical")
    with pytest.raises(UnsupportedModuleError, match=r"layer '0' \(Linear\).*by exact type"):
        fl.KFAC(F)
    truth = F.block("0")
    assert error(fl.KFAC(F, others="block").dense()[:12, :12], truth) < TOLERANCE


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [fl.KFAC, fl.EKFAC])
def test_bad_options(make):
    F = case("mlp_tanh").fisher()
    with pytest.raises(InputError, match=r"Unknown form 'expanded'. Did you mean 'expand'"):
        make(F, form="expanded")
    with pytest.raises(InputError, match=r"Unknown value of others 'diag'. Did you mean 'diagonal'"):
        make(F, others="diag")
    with pytest.raises(TypeError, match=r"takes a fisherlens.Fisher; got Sequential"):
        make(case("mlp_tanh").model)
    with pytest.raises(InputError, match="This needs score rows"):
        make(hessian())
    K = make(F)
    v = torch.ones(F.n_params, dtype=torch.float64)
    for bad in (0.0, -1.0, float("nan"), float("inf"), "much", None):
        for call in (lambda lam: K.solve(v, lam), K.log_determinant):
            with pytest.raises(InputError, match="damping must be a finite number > 0"):
                call(bad)
    with pytest.raises(InputError, match=r"takes v of shape"):
        K @ v[:-1]
    with pytest.raises(InputError, match="dtype"):
        K @ v.float()
    with pytest.raises(MemoryBudgetError, match="raise max_params"):
        K.dense(max_params=3)


def hessian() -> fl.Fisher:
    c = case("mlp_tanh")
    return fl.Fisher(c.model, c.data, likelihood=c.likelihood, kind="hessian")


def test_bad_options_of_kfac():
    F = case("mlp_tanh").fisher()
    with pytest.raises(InputError, match=r"Unknown value of factors 'best'"):
        fl.KFAC(F, factors="best")
    with pytest.raises(InputError, match="Unknown way of damping 'pi'"):
        fl.KFAC(F, damping="pi")
    with pytest.raises(
        InputError, match=r"damping of KFAC is how solves are damped.* got 0.001.*solve\(v, damping=1e-3\)"
    ):
        fl.KFAC(F, damping=1e-3)


@pytest.mark.parametrize("make", [fl.KFAC, fl.EKFAC])
def test_factors_over_the_budget(make):
    F = case("mlp_tanh").fisher()
    F.memory = 500
    with pytest.raises(
        MemoryBudgetError,
        match=rf"factors of {make.__name__} take .* over the budget of 500 B; the largest are those of layer '0'",
    ):
        make(F)
