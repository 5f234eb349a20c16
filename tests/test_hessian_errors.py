"""What the Hessian refuses, and how it says so."""

from __future__ import annotations

import pytest
import torch
from cases import ALL_CASES
from fisher_checks import error
from hessian_checks import hessian, truth_of, vectors
from torch import nn

import fisherlens as fl
from fisherlens.errors import (
    InputError,
    MemoryBudgetError,
    NonFiniteError,
    UnsupportedModuleError,
)
from fisherlens.likelihoods import ElementwiseLikelihood, Gaussian


def test_analyses_of_score_rows_name_the_kind():
    model, data, likelihood = ALL_CASES["mlp_tanh"]()
    H = hessian(model, data, likelihood)
    for analysis in (
        H.gram,
        lambda: H.scores,
        lambda: H.solver,
        lambda: H.n_rows,
        lambda: H.single_sample(0),
        lambda: fl.coupling(H),
        lambda: fl.independence(H),
        lambda: fl.information(H),
        lambda: fl.BlockDiagonal(H, "layer"),
    ):
        with pytest.raises(
            InputError, match=r"needs score rows.*kind='hessian'.*Use kind='exact', 'mc' or 'empirical'"
        ):
            analysis()
    assert fl.partition(H, "unit").num_blocks > 3


def test_caps():
    model, data, likelihood = ALL_CASES["lenet"]()
    H = hessian(model, data, likelihood)
    for name in ("dense", "diagonal", "trace", "frobenius_norm"):
        with pytest.raises(
            MemoryBudgetError, match=rf"{name}\(\) of kind='hessian' takes 200 products.*cap is 199.*H @ v, H.block"
        ):
            getattr(H, name)(max_params=199)
    with pytest.raises(MemoryBudgetError, match=r"block \['0', '3'\] takes 142 products.*cap is 100"):
        H.block(["0", "3"], max_params=100)
    large = hessian(nn.Linear(1250, 4), (torch.zeros(2, 1250), torch.tensor([0, 1])))
    with pytest.raises(
        MemoryBudgetError, match=r"The complete spectrum of kind='hessian' takes 5004 products.*cap is 5000"
    ):
        fl.spectrum(large)
    with pytest.raises(MemoryBudgetError, match="Hessian needs the matrix itself, 5004 x 5004"):
        fl.spectrum(hessian(nn.Linear(1250, 4), (torch.zeros(2, 1250), torch.tensor([0, 1])), memory="50MiB"))


def test_wrong_inputs(unchanged):
    model, (x, y), likelihood = ALL_CASES["mlp_tanh"]()
    with unchanged(model):
        with pytest.raises(InputError, match=r"Hessian of the loss needs observed labels.*kind='exact'"):
            hessian(model, (x, None), likelihood)
        with pytest.raises(InputError, match=r"Every term has weight 0.*Hessian"):
            hessian(model, (x, torch.full_like(y, -100)), likelihood)
        with pytest.raises(InputError, match=r"Unknown kind 'hesian'. Did you mean 'hessian'"):
            fl.Fisher(model, (x, y), likelihood=likelihood, kind="hesian")
        with pytest.raises(InputError, match="Label 7 in the data"):
            hessian(model, (x, torch.full_like(y, 7)), likelihood)
        with pytest.raises(InputError, match=r"rows='example' goes with kind='empirical'.*got kind='hessian'"):
            hessian(model, (x, y), likelihood, rows="example")
        with pytest.raises(InputError, match="params is a dict of tensors"):
            hessian(model, (x, y), likelihood, params={"w": x})
        with pytest.raises(NonFiniteError, match="holds NaN or infinity"):
            hessian(model, (x, y), likelihood) @ torch.full((79,), torch.nan, dtype=torch.float64)
    with pytest.raises(InputError, match=r"Call model\.eval\(\)"):
        hessian(nn.Sequential(model, nn.Dropout()), (x, y), likelihood)


class _Cube(torch.autograd.Function):
    """x³ with a backward of its own, which is right."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class _Rolled(_Cube):
    """A backward that is not the derivative, so that the second one is not symmetric."""

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0].roll(1, dims=1) ** 2 * g


class _Detached(_Cube):
    """The right derivative, which hides what it depends on."""

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0].detach() ** 2 * g


class _Once(_Cube):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Apply(nn.Module):
    """A function of one's own between two dense layers, or after one."""

    def __init__(self, function, last: bool = True):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(3, 4).double(), nn.Linear(4, 2).double() if last else nn.Identity()
        self.function = function
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))

    def forward(self, x):
        return self.second(self.function(self.first(x)))


@pytest.mark.parametrize("last", [True, False])
def test_functions_of_ones_own(last):
    """torch leaves out what a backward hides; that is found, also where the wrong matrix is symmetric."""
    x, y = vectors(5, 3), torch.tensor([0, 1, 0, 1, 1])
    cube = Apply(lambda a: a**3, last)
    assert error(hessian(Apply(_Cube.apply, last), (x, y)).dense(), truth_of(cube, (x, y), "categorical")) < 1e-12
    single = hessian(Apply(_Cube.apply, last).float(), (x.float(), y))
    assert error(single.dense(), truth_of(cube, (x, y), "categorical")) < 1e-4
    with pytest.raises(InputError, match=r"not symmetric.*autograd\.Function|not the change of its gradient"):
        hessian(Apply(_Rolled.apply, last), (x, y))
    for dtype in (torch.float64, torch.float32):
        with pytest.raises(InputError, match=r"not symmetric.*autograd\.Function|not the change of its gradient"):
            hessian(Apply(_Detached.apply, last).to(dtype), (x.to(dtype), y))
    with pytest.raises(UnsupportedModuleError, match=r"marked once_differentiable.*kind='exact'"):
        hessian(Apply(_Once.apply, last), (x, y))


def test_models_without_second_derivatives():
    x, y = vectors(5, 3), torch.tensor([0, 1, 0, 1, 1])
    points = vectors(4, 4, seed=6)
    distances = Apply(lambda a: torch.cdist(a, points, compute_mode="donot_use_mm_for_euclid_dist"))
    with pytest.raises(UnsupportedModuleError, match=r"cannot be differentiated again: .*cdist.*kind='exact'"):
        hessian(distances, (x, y))
    root = nn.Sequential(nn.Linear(3, 3, bias=False).double(), _Root(), nn.Linear(3, 2).double())
    with pytest.raises(NonFiniteError, match="a derivative overflowed"):
        hessian(root, (torch.zeros(2, 3).double(), torch.tensor([0, 1])))


def test_sparse_gradients():
    words = torch.tensor([[0, 2], [1, 1], [3, 0]])
    y = torch.tensor([0, 1, 1])
    models = []
    for sparse in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            models.append(nn.Sequential(nn.Embedding(4, 3, sparse=sparse), nn.Flatten(), nn.Linear(6, 2)).double())
    truth = truth_of(models[0], (words, y), "categorical")
    assert error(hessian(models[0], (words, y)).dense(), truth) < 1e-12
    assert error(hessian(models[1], (words, y)).dense(), truth) < 1e-12


class _Root(nn.Module):
    def forward(self, x):
        return x.abs().sqrt()


def test_scores_that_leave_torch():
    class Own(ElementwiseLikelihood):
        def fisher_root(self, outputs):
            return torch.ones_like(outputs)

        def score(self, outputs, targets):
            return outputs.detach().sinh() - targets

        def sample(self, outputs, uniforms):
            raise NotImplementedError

    class Other(fl.Gaussian.__mro__[1]):
        def bind(self, outputs, targets, where="the data", at=None):
            return Gaussian().bind(outputs, targets, where, at)

    model, (x, y), _ = ALL_CASES["gaussian_linear"]()
    with pytest.raises(InputError, match=r"torch sees of Own.score is not that of its values.*without detach"):
        hessian(model, (x, y), Own())
    with pytest.raises(InputError, match=r"knows for its own likelihoods and for an ElementwiseLikelihood.*got Other"):
        hessian(model, (x, y), Other())
