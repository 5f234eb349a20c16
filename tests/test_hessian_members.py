"""The members of the Hessian: facts, blocks, views, solves and its spectrum."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from cases import ALL_CASES, cast
from fisher_checks import error
from hessian_checks import hessian, streamed, truth_of, vectors
from torch import Tensor, nn

import fisherlens as fl
from fisherlens.errors import (
    ConvergenceWarning,
    InputError,
    NonFiniteError,
)


def test_facts_and_small_answers():
    model, data, likelihood = ALL_CASES["mlp_tanh"]()
    H, truth = hessian(model, data, likelihood), truth_of(model, data, likelihood)
    assert (H.kind, H.n_params, H.n_data, H.n_columns, H.rank_bound) == ("hessian", 79, 7, 0, 79)
    assert H.shape == (79, 79)
    assert H.dtype == torch.float64
    assert re.fullmatch(
        r"Fisher\(kind='hessian', likelihood='categorical', P=79, N=7, indefinite, float64, cpu, linearised, [\d.]+ KiB\)",
        repr(H),
    )
    assert H.plan.product_cost == pytest.approx(2)
    assert H.plan.nbytes > 7 * 8 * (5 + 6 + 4 + 3)
    assert "the graph of the gradient is kept" in repr(H.plan)
    assert error(H.diagonal(), truth.diagonal()) < 1e-12
    assert H.diagonal().min() < 0
    assert H.trace() == pytest.approx(truth.trace().item(), rel=1e-12)
    assert H.frobenius_norm() == pytest.approx(truth.norm().item(), rel=1e-12)
    for fresh in (H, hessian(model, data, likelihood)):  # from the kept matrix, and from products
        assert error(fresh.block("2"), truth[36:64, 36:64]) < 1e-12
        index = fresh.layout.index_of(["*.bias"])
        assert error(fresh.block(["*.bias"]), truth[index][:, index]) < 1e-12
    assert error(H.damped(0.5).dense(), truth + 0.5 * torch.eye(79, dtype=torch.float64)) < 1e-12
    v = vectors(79, 2)
    assert error(H.damped(0.5) @ v, truth @ v + 0.5 * v) < 1e-12
    operator = H.to_scipy()
    assert operator.dtype == np.float64
    np.testing.assert_allclose(operator @ v.numpy(), (truth @ v).numpy(), atol=1e-12)
    np.testing.assert_allclose(operator.rmatvec(v[:, 0].numpy()), (truth @ v[:, 0]).numpy(), atol=1e-12)
    assert (H @ v[:, :0]).shape == (79, 0)


def test_answers_are_copies():
    model, data, likelihood = ALL_CASES["mlp_tanh"]()
    H = hessian(model, data, likelihood)
    before = H.dense()
    for answer in (H.dense(), H.diagonal(), H.gradient(), H.block("2"), H.damped(1.0).dense()):
        answer.zero_()
    assert torch.equal(H.dense(), before)
    assert H.gradient().norm() > 0


@pytest.mark.parametrize("build", [hessian, streamed])
def test_linear_symmetric_and_repeatable(build):
    model, data, likelihood = ALL_CASES["lenet"]()
    H = build(model, data, likelihood)
    u, v = vectors(H.n_params, 2).unbind(1)
    first = H @ v
    H.diagonal()
    assert torch.equal(H @ v, first)  # also after the matrix is known
    assert torch.equal(build(model, data, likelihood) @ v, first)
    assert error(H @ (u + 2 * v), H @ u + 2 * first) < 1e-12
    assert (u @ first - v @ (H @ u)).abs() < 1e-12 * u.norm() * first.norm()


@pytest.mark.parametrize("build", [hessian, streamed])
def test_later_changes_of_model_and_settings_do_not_reach_it(build):
    model, (x, y), likelihood = ALL_CASES["batchnorm_1d"]()
    v = vectors(69, 1)[:, 0]
    H = build(model, (x, y), likelihood)
    before = H @ v
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    model[1].running_mean.add_(1)
    model.train()
    for module in (model, model[0]):
        module.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(H @ v, before)
    with torch.inference_mode():
        assert torch.equal(H @ v, before)
        anew = build(model.eval().requires_grad_(), (x, y), likelihood)
    assert error(anew @ v, before) > 1e-2
    assert error(anew.dense(), truth_of(model, (x, y), likelihood)) < 1e-12


def test_later_changes_of_the_data():
    model, (x, y), likelihood = ALL_CASES["mlp_tanh"]()
    kept, passes = hessian(model, (x, y), likelihood), streamed(model, (x, y), likelihood)
    v = vectors(79, 1)[:, 0]
    before = kept @ v
    x.mul_(2)
    assert torch.equal(kept @ v, before)  # a kept graph has its own copy
    with pytest.raises(InputError, match="differs from what it was in an earlier pass"):
        passes @ v


def test_restrict_is_a_diagonal_block_and_nests():
    model, data, likelihood = ALL_CASES["mlp_tanh"]()
    truth = truth_of(model, data, likelihood)
    index = torch.cat([torch.arange(36), torch.arange(64, 79)])
    for build in (hessian, streamed):
        H = build(model, data, likelihood)
        part = H.restrict(["4", "0"])
        assert part.layout.layer_names == ("0", "4")
        assert (part.n_params, part.rank_bound, part.origins) == (51, 51, (0, 64))
        v = vectors(51, 2)
        assert error(part @ v, truth[index][:, index] @ v) < 1e-12
        assert error(part.dense(), truth[index][:, index]) < 1e-12
        assert error(part.block("4"), truth[64:, 64:]) < 1e-12
        assert error(part.restrict("4").dense(), truth[64:, 64:]) < 1e-12
        assert error(part.gradient(), H.gradient()[index]) == 0
        assert error(part.parameters, H.parameters[index]) == 0
        H.trace()  # now the matrix is kept, and parts share it
        assert error(H.restrict("2").dense(), truth[36:64, 36:64]) < 1e-12
        assert [entry.layer for entry in part.plan] == ["0", "4"]
    with pytest.raises(InputError, match="at least one layer name"):
        H.restrict([])


class Plain:
    """The preconditioner that does nothing, with which solves iterate."""

    def solve(self, v: Tensor, damping: float) -> Tensor:
        return v


@pytest.mark.parametrize(("build", "dampings"), [(hessian, (1e-2, 0.3)), (streamed, (10.0,))])
def test_solves(build, dampings):
    model, data, likelihood = ALL_CASES["mlp_tanh"]()
    truth = truth_of(model, data, likelihood)
    v = vectors(79, 3)
    for damping in dampings:
        wanted = torch.linalg.solve(truth + damping * torch.eye(79, dtype=torch.float64), v)
        H = build(model, data, likelihood)
        iterated, info = H.solve(v, damping, preconditioner=Plain(), return_info=True)
        assert info["method"] == "minres"
        assert info["converged"]
        assert 0 < info["steps"] < 1000
        assert info["residual"].max() <= 1e-9
        assert error(iterated, wanted) < 1e-6
        dense, info = H.solve(v, damping, return_info=True)
        assert info["method"] == "dense"
        assert info["residual"].shape == (3,)
        assert error(dense, wanted) < 1e-10
    as_dict = H.solve(H.layout.unflatten(v[:, 0]), damping)
    assert error(H.layout.flatten(as_dict), wanted[:, 0]) < 1e-10
    newton = torch.linalg.solve(truth + damping * torch.eye(79, dtype=torch.float64), H.gradient())
    assert error(H.natural_gradient(damping), newton) < 1e-10
    assert error(H.damped(0.7 * damping).damped(0.3 * damping).solve(v), wanted) < 1e-10


def test_solve_iterates_where_the_matrix_costs_more(monkeypatch):
    model, data, likelihood = ALL_CASES["mlp_tanh"]()
    v = vectors(79, 2)
    H = hessian(model, data, likelihood)
    wanted = torch.linalg.solve(truth_of(model, data, likelihood) + 2 * torch.eye(79, dtype=torch.float64), v)
    found, info = H.solve(v, 2.0, max_steps=39, tol=1e-6, return_info=True)  # 78 products at most, against 79
    assert info["method"] == "minres"
    assert error(found, wanted) < 1e-4
    assert H.solve(v, 2.0, max_steps=40, return_info=True)[1]["method"] == "dense"
    # once the matrix is known it serves; above the limit of dense matrices it is not formed
    assert H.solve(v, 2.0, max_steps=39, return_info=True)[1]["method"] == "dense"
    monkeypatch.setattr("fisherlens.fisher.hessian.DENSE_LIMIT", 78)
    assert hessian(model, data, likelihood).solve(v, 2.0, return_info=True)[1]["method"] == "minres"


def test_solve_with_a_preconditioner():
    model, data, likelihood = ALL_CASES["mlp_tanh"]()
    H, F = hessian(model, data, likelihood), fl.Fisher(model, data, likelihood=likelihood)
    v = torch.cat([vectors(79, 2), torch.zeros(79, 1, dtype=torch.float64)], dim=1)
    wanted = torch.linalg.solve(H.dense() + 0.3 * torch.eye(79, dtype=torch.float64), v)
    found, info = H.solve(v, 0.3, preconditioner=F, return_info=True)
    _, plain = H.solve(v, 0.3, preconditioner=Plain(), return_info=True)
    assert error(found, wanted) < 1e-8
    assert torch.equal(found[:, 2], v[:, 2])
    assert info["steps"] < plain["steps"]


def test_solve_in_float32():
    model, data, likelihood = cast(ALL_CASES["mlp_tanh"](), torch.float32)
    H = hessian(model, data, likelihood)
    v = vectors(79, 2).float()
    wanted = torch.linalg.solve(H.dense().double() + 0.3 * torch.eye(79, dtype=torch.float64), v.double())
    for found in (H.solve(v, 0.3), H.solve(v, 0.3, preconditioner=Plain())):
        assert found.dtype == torch.float32
        assert error(found, wanted) < 1e-3


def test_solves_that_fail_say_so():
    model, data, likelihood = ALL_CASES["mlp_tanh"]()
    H = hessian(model, data, likelihood)
    v = vectors(79, 1)[:, 0]
    with pytest.warns(ConvergenceWarning, match=r"minres, 3 steps.*wanted 1e-10.*close to singular") as caught:
        H.solve(v, 1e-3, max_steps=3)
    assert caught[0].filename == __file__
    with pytest.raises(InputError, match="damping must be"):
        H.solve(v, 0.0)

    class Saddle(nn.Module):
        """f = a b with a label 1 below the output: H has eigenvalues ±1 where the residual is 1 and a = b = 0."""

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(1).double()), nn.Parameter(torch.zeros(1).double())

        def forward(self, x):
            return (self.a * self.b * x[:, 0])[:, None]

    saddle = hessian(Saddle(), (torch.ones(2, 1).double(), -torch.ones(2, 1).double()), "gaussian")
    assert torch.equal(saddle.dense(), torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64))
    with pytest.raises(NonFiniteError, match=r"H \+ 1 I is singular: -1 is an eigenvalue"):
        saddle.solve(torch.ones(2, dtype=torch.float64), 1.0)


def test_spectrum_keeps_negative_eigenvalues():
    model, data, likelihood = ALL_CASES["mlp_tanh"]()
    truth = truth_of(model, data, likelihood)
    H = hessian(model, data, likelihood)
    found = fl.spectrum(H, vectors=True)
    wanted = torch.linalg.eigvalsh(truth).flip(0).numpy()
    np.testing.assert_allclose(found["eigenvalue"].values, wanted, atol=1e-12)
    assert found["eigenvalue"].values[-1] < -1e-2
    assert np.array_equal(found["above_noise"], np.abs(wanted) > found["noise_floor"].item())
    assert found["above_noise"].values[-1]
    assert found["residual_norm"].max() < 1e-12
    assert found.attrs["kind"] == "hessian"
    assert found.attrs["method"].startswith("exact: eigenvalues of the dense matrix")
    assert found["trace"].item() == pytest.approx(truth.trace().item(), rel=1e-12)
    good = found["above_noise"].values
    v = found["eigenvector"].values[good]
    np.testing.assert_allclose(v @ v.T, np.eye(good.sum()), atol=1e-10)
    np.testing.assert_allclose(truth.numpy() @ v.T, v.T * wanted[good], atol=1e-10)
    layers = fl.spectrum(hessian(model, data, likelihood), by="layer")
    block = torch.linalg.eigvalsh(truth[36:64, 36:64]).flip(0).numpy()
    np.testing.assert_allclose(layers["eigenvalue"].sel(layer="2").dropna("rank"), block, atol=1e-12)
    np.testing.assert_allclose(layers["eigenvalue"].sel(layer="all"), wanted, atol=1e-12)
    for source in (H, found):
        for function in (fl.effective_dimension, fl.log_determinant):
            with pytest.raises(InputError, match="positive semi-definite F, but this is a Hessian"):
                function(source, 1e-3)
