"""Spectral densities: grids, sides, and every refusal."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from cases import make_case
from fisher_checks import QUIET, case
from test_density import VALUES, full, mass, operator
from test_quadrature import rotated
from torch import nn

import fisherlens as fl
from fisherlens.errors import ConvergenceWarning, InputError, MemoryBudgetError, NonFiniteError, NumericalWarning
from fisherlens.spectrum import side_for
from fisherlens.spectrum.operators import as_symmetric

pytestmark = pytest.mark.filterwarnings(QUIET)


# --- grids --------------------------------------------------------------------------------------------------------


def test_a_grid_of_ones_own():
    A = operator()
    points = np.geomspace(1e-2, 5, 50)
    ds = fl.spectral_density(A, grid=points, num_matvecs=100)
    np.testing.assert_array_equal(ds["grid"], points)
    assert ds.attrs["grid_scale"] == "log"
    assert ds["outside_fraction"].item() > 0.2
    assert mass(ds) == pytest.approx(1, abs=1e-9)
    linear = fl.spectral_density(A, grid=list(np.linspace(0, 25, 30)), num_matvecs=100)
    assert linear.attrs["grid_scale"] == "linear"
    assert linear["width"].attrs["units"] == "nat"
    assert mass(linear) == pytest.approx(1, abs=1e-9)
    assert linear["outside_fraction"].item() == pytest.approx(0, abs=1e-12)


def test_negative_eigenvalues_need_a_linear_grid():
    A = operator([-3.0, -1.0, *np.linspace(0.5, 4, 48)], psd=False)
    ds = fl.spectral_density(A, grid="linear", num_matvecs=30)
    assert ds["grid"].values[0] < -3
    assert mass(ds) == pytest.approx(1)
    left = ds["density"].sel(grid=slice(None, 0)).integrate("grid").item()
    assert left == pytest.approx(2 / 50, abs=0.03)
    remedy = "Use grid='linear', which covers both sides of zero, or an array of your own."
    message = (
        r"^A logarithmic grid has no place for negative eigenvalues\. The smallest found here is -3\. "
        + re.escape(remedy)
    )
    with pytest.raises(InputError, match=message):
        fl.spectral_density(A)
    c = case("mlp_tanh")
    H = fl.Fisher(c.model, c.data, likelihood=c.likelihood, kind="hessian")
    with pytest.raises(
        InputError,
        match=r"^A logarithmic grid has no place .+\. This is a Hessian, whose eigenvalues may be negative\.",
    ):
        fl.spectral_density(H)
    positive = fl.spectral_density(operator(psd=False))  # nothing negative is found, so the default grid is fine
    assert mass(positive) == pytest.approx(1)


@pytest.mark.parametrize("deflate", ["auto", None])
def test_hessian_density_covers_both_sides(deflate):
    c = case("mlp_tanh")
    H = fl.Fisher(c.model, c.data, likelihood=c.likelihood, kind="hessian")
    ds = fl.spectral_density(H, grid="linear", deflate=deflate)
    true = torch.linalg.eigvalsh(H.dense()).numpy()
    assert true[0] < 0
    assert ds["grid"].values[0] < true[0]
    assert ds["grid"].values[-1] > true[-1]
    assert abs(ds["trace"] - true.sum()) <= 6 * ds["trace_sem"]
    assert mass(ds) == pytest.approx(1)
    assert "radau_nodes" not in ds


def test_kpm_warns_on_a_logarithmic_grid():
    with pytest.warns(
        NumericalWarning,
        match=r"^Chebyshev moments resolve .+ on a logarithmic grid, nothing below that has a meaning\.",
    ):
        ds = fl.spectral_density(operator(), method="kpm")
    assert mass(ds) == pytest.approx(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fl.spectral_density(operator(), method="kpm", grid="linear")


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_probes": 0}, "num_probes must be an integer >= 1; got 0."),
        ({"num_matvecs": 2.5}, "num_matvecs must be an integer >= 1; got 2.5."),
        ({"seed": -1}, "seed must be an integer >= 0; got -1."),
        ({"method": "slk"}, "Unknown method 'slk'. Did you mean 'slq'? Known: 'slq', 'kpm'."),
        (
            {"grid": "logg"},
            "Unknown grid 'logg'. Did you mean 'log'? Known: 'linear', 'log'. An increasing array of eigenvalues serves too.",
        ),
        ({"num_points": 3}, "num_points must be an integer >= 10, the points of the grid; got 3."),
        (
            {"width": 0},
            "width must be a number > 0, the standard deviation of the kernel in λ (linear grid) or in decades (logarithmic); got 0. "
            "None chooses one from the range.",
        ),
        (
            {"grid": [1.0, 1.0]},
            "grid must be 'linear', 'log' or a strictly increasing one-dimensional array of finite eigenvalues; got list of shape (2,). "
            "np.linspace and np.geomspace make such arrays.",
        ),
        (
            {"deflate": -1},
            "deflate must be 'auto', None, a number >= 0 of leading eigenpairs, or the Dataset of fl.spectrum or fl.top_eigenvalues; got -1.",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_options_are_checked(options, message):
    with pytest.raises(InputError, match=full(message)):
        fl.spectral_density(operator(), **options)


def test_wrong_types_and_non_finite_products():
    with pytest.raises(TypeError, match=r"^Expected a fisherlens\.Fisher, one of its approximations, or fl\.Operator"):
        fl.spectral_density(torch.eye(3))
    A = fl.Operator(lambda v: v / 0, 20, torch.float64, block=True)
    with pytest.raises(NonFiniteError, match=r"^The callable of the operator gave NaN or infinity\."):
        fl.spectral_density(A)


def test_lanczos_vectors_over_the_budget_are_refused():
    model, data, likelihood = make_case("budget", lambda: nn.Linear(90, 60), (90,), n=100)
    F = fl.Fisher(model, data, likelihood=likelihood, kind="exact", memory=6e6)
    F.memory = 1e6
    message = r"^80 Lanczos vectors of length \d+ take .+ for one probe, over the budget of 976\.6 KiB\. Use fewer num_matvecs, method='kpm'"
    with pytest.raises(MemoryBudgetError, match=message):
        fl.spectral_density(F, deflate=None)


def interrupted(after, values=VALUES):
    matrix = rotated(values)
    calls = []

    def product(v):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(1)
        return matrix @ v

    return fl.Operator(product, len(values), torch.float64, block=True, psd=True)


def test_interrupt_returns_the_finished_steps():
    with pytest.warns(
        ConvergenceWarning, match=r"^Interrupted after 120 of up to 800 products; the result is of the finished"
    ):
        ds = fl.spectral_density(interrupted(12))
    assert ds["interrupted"].item() is True
    assert ds.sizes["node"] == 12
    assert mass(ds) == pytest.approx(1)
    same = fl.spectral_density(operator(), num_matvecs=12)
    np.testing.assert_allclose(ds["nodes"], same["nodes"], rtol=1e-12, atol=1e-15)
    with pytest.warns(ConvergenceWarning, match="Interrupted after 220 of up to 800 products"):
        kpm = fl.spectral_density(interrupted(40), method="kpm", grid="linear")
    assert mass(kpm) == pytest.approx(1)
    with pytest.raises(KeyboardInterrupt):
        fl.spectral_density(interrupted(0))


def test_interrupt_between_blocks_leaves_the_others_nan(monkeypatch):
    F = case("mlp_tanh").fisher()
    names = F.layout.layer_names
    real = fl.Fisher.restrict

    def restrict(self, name):
        if name == names[1]:
            raise KeyboardInterrupt
        return real(self, name)

    monkeypatch.setattr(fl.Fisher, "restrict", restrict)
    with pytest.warns(ConvergenceWarning, match=rf"of 1 of {len(names) + 1} blocks, the others are NaN\.$"):
        ds = fl.spectral_density(F, by="layer")
    assert np.isfinite(ds["density"][0]).all()
    assert np.isnan(ds["density"][1:]).all()


# --- sides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "memory"),
    [("fewer_parameters_than_examples", "2GiB"), ("mlp_tanh", "2GiB"), ("lenet", "2GiB"), ("lenet", 5e3)],
)
def test_every_form_has_the_spectrum_of_the_operator(name, memory):
    from fisherlens.spectrum import side

    c = case(name)
    F = c.fisher(memory=memory)
    view = as_symmetric(F)
    true = np.linalg.eigvalsh(F.dense().numpy())
    for form in side._forms(F, view, 800, 10):
        chosen = side._make(F, view, form)
        matrix = chosen.product(torch.eye(chosen.order, dtype=F.dtype)).numpy()
        found = np.linalg.eigvalsh((matrix + matrix.T) / 2)
        padded = np.sort(np.concatenate([found, np.zeros(max(0, F.n_params - chosen.order))]))[-F.n_params :]
        np.testing.assert_allclose(padded, true, atol=1e-12 * true[-1])
        assert chosen.n == F.n_params
        values, vectors = np.linalg.eigh(F.dense().numpy())
        top = chosen.to_side(torch.from_numpy(vectors[:, -1:].copy()))
        np.testing.assert_allclose(chosen.product(top), values[-1] * top, atol=1e-10 * values[-1] * top.norm())


def test_the_cheapest_form_is_chosen():
    """Many products of a network with few rows: the Gram matrix; with few parameters: F itself; of others only what they are."""
    F = case("lenet").fisher()
    assert F.n_rows < F.n_params
    assert side_for(F, 10**6).words == "the Gram matrix, formed once"
    assert side_for(F, 1, prefer_matrix=True).matrix is not None
    few = case("fewer_parameters_than_examples").fisher()
    assert side_for(few, 10**6).words == "the matrix of F, formed once"
    assert side_for(operator(), 10**6).words == "products with the operator"
    c = case("mlp_tanh")
    H = fl.Fisher(c.model, c.data, likelihood=c.likelihood, kind="hessian")
    assert side_for(H, H.n_params - 1).matrix is None
    assert side_for(H, H.n_params).words == "the matrix of the Hessian, formed once"


def test_streamed_scores_give_the_same_density():
    c = case("lenet")
    F = c.fisher()
    streamed = c.fisher(memory=5e3)
    assert streamed.plan.streamed or streamed.plan.linearised
    for options in ({}, {"deflate": None, "num_matvecs": 30}):
        one, two = fl.spectral_density(F, **options), fl.spectral_density(streamed, **options)
        assert abs(two["trace"] - F.trace()) <= 6 * two["trace_sem"]
        assert two["zero_fraction"].item() >= 1 - F.rank_bound / F.n_params - 1e-9
        assert one["zero_fraction"].item() == pytest.approx(two["zero_fraction"].item(), abs=0.05)


def test_a_single_negative_eigenvalue_beside_zeros():
    """The linear grid reaches from it to zero, not from it to itself."""
    d = torch.tensor([-3.0, *[0.0] * 20], dtype=torch.float64)
    A = fl.Operator(lambda v: d[:, None] * v, 21, block=True)
    found = fl.spectral_density(A, num_probes=4, num_matvecs=5, grid="linear", deflate=None)
    assert np.isfinite(found["density"]).all()
    mass = found["density"].integrate("grid") + found["zero_fraction"] + found["outside_fraction"]
    assert float(mass) == pytest.approx(1.0, abs=1e-12)
    assert found["grid"][0] < -3
    assert found["grid"][-1] >= 0
