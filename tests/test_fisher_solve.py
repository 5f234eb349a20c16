"""Damped solves by every route, F + λI, scipy, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from cases import make_case
from fisher_checks import KINDS, case, error
from torch import nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.errors import ConvergenceWarning, InputError, NumericalWarning

TOLERANCE = 1e-10


class Wrong:
    """A preconditioner that is none: it returns its input, and counts its calls."""

    def __init__(self):
        self.calls = 0

    def solve(self, v, damping):
        self.calls += 1
        return v


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["fewer_parameters_than_examples", "mlp_tanh", "conv_groups", "gaussian_linear"])
@pytest.mark.parametrize("damping", [1e-4, 0.1, 10.0])
def test_direct_solves_on_both_sides(name, kind, damping):
    c = case(name, kind)
    F, V = c.fisher(), c.vectors()
    truth = reference.solve(c.matrix, V, damping)
    found, info = F.solve(V, damping, return_info=True)
    assert error(found, truth) < TOLERANCE
    assert info["method"] == ("dense" if F.n_params <= F.scores.rows else "woodbury")
    assert info["steps"] == 0
    assert info["converged"] is True
    assert info["residual"].shape == (4,)
    assert info["residual"].max() < 1e-10
    one, info = F.solve(V[:, 0], damping, return_info=True)
    assert error(one, truth[:, 0]) < TOLERANCE
    assert info["residual"].shape == (1,)
    named = F.solve(F.layout.unflatten(V[:, 0]), damping)
    assert error(F.layout.flatten(named), truth[:, 0]) < TOLERANCE
    assert error(F.solve(V, damping), truth) < TOLERANCE
    assert error(F.natural_gradient(damping), reference.solve(c.matrix, c.gradient, damping)) < TOLERANCE


def test_both_sides_are_reached():
    methods = {
        case(name).fisher().solve(case(name).vectors(), 0.1, return_info=True)[1]["method"]
        for name in ("fewer_parameters_than_examples", "mlp_tanh")
    }
    assert methods == {"dense", "woodbury"}


def test_zero_vector_is_solved_by_zero():
    F = case("mlp_tanh").fisher()
    zero = torch.zeros(79, dtype=torch.float64)
    for preconditioner in (None, fl.BlockDiagonal(F, "layer")):
        found, info = F.solve(zero, 0.1, preconditioner=preconditioner, return_info=True)
        assert torch.equal(found, zero)
        assert info["converged"]
        assert info["residual"].tolist() == [0]


@pytest.mark.parametrize("scheme", ["layer", "unit", "diagonal"])
@pytest.mark.parametrize("name", ["mlp_tanh", "conv_groups", "residual"])
def test_conjugate_gradients_with_a_preconditioner(name, scheme):
    c = case(name)
    F, V = c.fisher(), c.vectors()
    truth = reference.solve(c.matrix, V, 0.01)
    preconditioner = fl.BlockDiagonal(F, scheme)
    found, info = F.solve(V, 0.01, preconditioner=preconditioner, return_info=True)
    assert (info["method"], info["converged"]) == ("cg", True)
    assert 1 < info["steps"] <= 2 * F.n_params
    assert info["residual"].max() < 1e-9
    assert error(found, truth) < 1e-7
    named = F.solve(F.layout.unflatten(V[:, 0]), 0.01, preconditioner=preconditioner)
    assert error(F.layout.flatten(named), truth[:, 0]) < 1e-7


def test_a_better_preconditioner_takes_fewer_steps():
    """Inputs of very different sizes: the diagonal takes them away, the whole matrix takes everything away."""
    model, (x, y), likelihood = make_case("scales", lambda: nn.Linear(8, 3), (8,), "gaussian", n=60)
    F = fl.Fisher(model, (x * torch.logspace(-2, 2, 8, dtype=x.dtype), y), likelihood=likelihood)
    V = torch.randn(27, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = [
        F.solve(V, 1e-4, preconditioner=p, return_info=True)[1]["steps"]
        for p in (fl.BlockDiagonal(F, {"all": range(27)}), fl.BlockDiagonal(F, "diagonal"), Wrong())
    ]
    assert steps[0] <= 2
    assert steps[0] < steps[1] < steps[2]


def test_conjugate_gradients_where_no_side_is_small(monkeypatch):
    monkeypatch.setattr("fisherlens.fisher.solve.DIRECT_LIMIT", 5)
    c = case("mlp_tanh")
    F, V = c.fisher(), c.vectors()
    found, info = F.solve(V, 0.1, return_info=True)
    assert info["method"] == "cg"
    assert error(found, reference.solve(c.matrix, V, 0.1)) < 1e-8
    assert error(F.natural_gradient(0.1), reference.solve(c.matrix, c.gradient, 0.1)) < 1e-8


def test_too_few_steps_return_what_there_is_with_a_warning():
    c = case("residual")
    F, V = c.fisher(), c.vectors()
    with pytest.warns(
        ConvergenceWarning, match=r"ended after 3 steps with relative residual .* \(wanted 1e-10\)"
    ) as caught:
        found, info = F.solve(V, 1e-4, preconditioner=Wrong(), max_steps=3, return_info=True)
    assert caught[0].filename == __file__
    assert (info["converged"], info["steps"]) == (False, 3)
    residual = (F @ found + 1e-4 * found - V).norm(dim=0) / V.norm(dim=0)
    assert error(info["residual"], residual) < 1e-6
    assert residual.max() > 1e-9


def test_tolerance_is_that_of_the_residual():
    c = case("residual")
    F, V = c.fisher(), c.vectors()
    coarse, info = F.solve(V, 1e-3, preconditioner=Wrong(), tol=1e-2, return_info=True)
    assert 1e-4 < info["residual"].max() < 1e-1
    exact = reference.solve(c.matrix, V, 1e-3)
    assert 1e-6 < error(coarse, exact) < 1


def test_natural_gradient_keeps_its_digits_at_small_damping():
    """Woodbury subtracts two large vectors; the row-space form does not."""
    model, (x, y), likelihood = make_case(
        "digits", lambda: nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 4)), (8,)
    )
    exact = reference.fisher(model, (x, y), likelihood)
    g = reference.gradient(model, (x, y), likelihood)
    F = fl.Fisher(model.float(), (x.float(), y), likelihood=likelihood)
    damping = 1e-6 * reference.spectrum(exact)[0].item()
    truth = reference.solve(exact, g, damping)
    ours = error(F.natural_gradient(damping), truth)
    assert ours < 1e-3
    assert ours < 0.2 * error(F.solve(F.gradient(), damping), truth)


def test_damping_below_rounding_is_named():
    F = case("mlp_tanh").fisher()
    with pytest.warns(
        NumericalWarning, match="damping 1e-30 is below the rounding error of torch.float64 scores"
    ) as caught:
        F.solve(torch.ones(79, dtype=torch.float64), 1e-30)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("damping", [0, -1.0, float("nan"), float("inf"), "a", None, [1e-3]])
def test_bad_damping(damping):
    F = case("mlp_tanh").fisher()
    v = torch.ones(79, dtype=torch.float64)
    for act in (
        lambda d: F.solve(v, d),
        F.damped,
        F.natural_gradient,
        lambda d: fl.BlockDiagonal(F, "layer").solve(v, d),
    ):
        with pytest.raises(InputError, match="damping must be a finite number > 0; got"):
            act(damping)


# --- F + λI ----------------------------------------------------------------------------------------------------------


def test_damped_is_lazy_and_adds_up():
    c = case("mlp_tanh")
    F, V = c.fisher(), c.vectors()
    before = F @ V
    D = F.damped(0.1)
    identity = torch.eye(79, dtype=torch.float64)
    matrix = c.matrix + 0.1 * identity
    assert error(D @ V, matrix @ V) < TOLERANCE
    assert error(D @ V[:, 0], matrix @ V[:, 0]) < TOLERANCE
    named = D @ F.layout.unflatten(V)
    assert error(F.layout.flatten(named), matrix @ V) < TOLERANCE
    assert error(D.dense(), matrix) < TOLERANCE
    assert error(D.diagonal(), matrix.diagonal()) < TOLERANCE
    assert error(D.solve(V), torch.linalg.solve(matrix, V)) < TOLERANCE
    assert (D.shape, D.dtype, D.damping) == ((79, 79), torch.float64, 0.1)
    twice = D.damped(0.25)
    assert torch.equal(twice @ V, F.damped(0.35) @ V)
    assert error(twice.solve(V), torch.linalg.solve(matrix + 0.25 * identity, V)) < TOLERANCE
    assert repr(twice).endswith("+ 0.35 I")
    assert torch.equal(F @ V, before)
    assert error(F.dense(), c.matrix) < TOLERANCE
    assert error(D.dense(), matrix) < TOLERANCE


def test_solves_at_several_dampings_do_not_mix():
    c = case("conv_groups")
    F, V = c.fisher(), c.vectors()
    for damping in (0.1, 3.0, 0.1, 1e-3):
        assert error(F.solve(V, damping), reference.solve(c.matrix, V, damping)) < TOLERANCE


# --- scipy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp_tanh", "fewer_parameters_than_examples", "conv_groups"])
def test_scipy_finds_the_same_eigenvalues(name):
    c = case(name)
    F = c.fisher()
    k = min(3, F.n_params - 1)
    start = np.random.default_rng(0).standard_normal(F.n_params)
    values, vectors = scipy.sparse.linalg.eigsh(F.to_scipy(), k=k, v0=start)
    truth = reference.spectrum(c.matrix)[:k].numpy()
    assert np.allclose(values[::-1], truth, rtol=1e-10)
    assert np.allclose(F.dense().numpy() @ vectors, vectors * values, atol=1e-9 * truth[0])
    shifted = scipy.sparse.linalg.eigsh(F.damped(2.0).to_scipy(), k=k, v0=start, return_eigenvectors=False)
    assert np.allclose(np.sort(shifted), np.sort(values) + 2)


def test_scipy_vectors_of_every_form():
    c = case("mlp_tanh")
    operator, T = c.fisher().to_scipy(), c.matrix.numpy()
    assert (operator.shape, operator.dtype) == ((79, 79), np.float64)
    rng = np.random.default_rng(0)
    V = rng.standard_normal((79, 3))
    frozen = V[:, 0].copy()
    frozen.setflags(write=False)
    for v in (
        V[:, 0],
        V[:, :1],
        V,
        np.asfortranarray(V),
        V[::-1],
        frozen,
        V.astype(np.float32),
        np.ones(79, dtype=int),
    ):
        assert np.allclose(operator @ v, T @ v, rtol=1e-6 if v.dtype == np.float32 else 1e-10)
        assert (operator @ v).shape == v.shape
    assert np.allclose(operator @ (V[:, 0] + 1j * V[:, 1]), T @ (V[:, 0] + 1j * V[:, 1]))
    assert np.allclose(operator.rmatvec(V[:, 0]), T @ V[:, 0])
    assert np.allclose(operator.T @ V[:, 0], T @ V[:, 0])
    solution, code = scipy.sparse.linalg.cg(c.fisher().damped(0.1).to_scipy(), V[:, 0], rtol=1e-12)
    assert code == 0
    assert np.allclose(solution, np.linalg.solve(T + 0.1 * np.eye(79), V[:, 0]))


def test_scipy_in_float32():
    model, (x, y), likelihood = make_case("single", lambda: nn.Linear(3, 2), (3,))
    F = fl.Fisher(model.float(), (x.float(), y), likelihood=likelihood)
    assert F.to_scipy().dtype == np.float32
    assert np.allclose(F.to_scipy() @ np.ones(8), (F @ torch.ones(8)).numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"tol": -1.0},
            InputError,
            r"tol must be a number between 0 and 1, the relative residual, or None; got -1\.0\.",
        ),
        ({"tol": float("nan")}, InputError, r"tol must be a number between 0 and 1.*got nan"),
        ({"tol": "small"}, InputError, r"tol must be a number between 0 and 1.*got 'small'"),
        (
            {"max_steps": 0},
            InputError,
            r"max_steps must be an integer >= 1, the most steps of conjugate gradients; got 0\.",
        ),
        ({"max_steps": 2.5}, InputError, r"max_steps must be an integer >= 1.*got 2\.5"),
        (
            {"preconditioner": 3},
            TypeError,
            r"preconditioner must have solve\(v, damping\), as fl\.BlockDiagonal.*; got int\.",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["exact", "hessian"])
def test_options_are_checked_also_where_the_solve_is_direct(options, error, text, kind):
    F = case("mlp_tanh").fisher(kind=kind)
    with pytest.raises(error, match=text):
        F.solve(torch.ones(F.n_params, dtype=torch.float64), 0.1, **options)
