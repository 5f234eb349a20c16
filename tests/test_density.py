"""Spectral densities: mass, moments, zeros, errors over probes, deflation, blocks, and every refusal."""

from __future__ import annotations

import re

import numpy as np
import pytest
import scipy.stats
import torch
from cases import make_case
from fisher_checks import QUIET, case, in_float32
from test_quadrature import rotated
from torch import nn

import fisherlens as fl
from fisherlens.errors import InputError, NumericalWarning
from fisherlens.spectrum import quadrature_of

pytestmark = pytest.mark.filterwarnings(QUIET)
NAMES = ["fewer_parameters_than_examples", "mlp_tanh", "lenet", "segmentation", "module_used_twice", "lstm"]
# zero eigenvalues, three decades of a bulk, two outliers
VALUES = np.concatenate([np.zeros(60), np.geomspace(1e-3, 1, 138), [8.0, 20.0]])


def operator(values=VALUES, seed=0, psd=True, dtype=torch.float64):
    matrix = rotated(values, seed, dtype)
    return fl.Operator(lambda v: matrix @ v, len(values), dtype, block=True, psd=psd)


def mass(ds):
    return (ds["density"].integrate("grid") + ds["zero_fraction"] + ds["outside_fraction"]).values


def full(message):
    return "^" + re.escape(message) + "$"


# --- what the density is ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", ["log", "linear"])
@pytest.mark.parametrize("options", [{}, {"deflate": None}, {"deflate": 3}, {"deflate": None, "width": 0.01}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_density_and_zero_fraction_make_one(name, options, grid, unchanged):
    c = case(name)
    F = c.fisher()
    with unchanged(c.model):
        ds = fl.spectral_density(F, grid=grid, **options)
    assert mass(ds) == pytest.approx(1, abs=1e-9)
    assert (ds["density"].values >= 0).all()
    assert (np.diff(ds["cumulative"].values) >= 0).all()
    assert ds["cumulative"].values[-1] == pytest.approx(1, abs=1e-9)
    assert ds["outside_fraction"].item() == 0
    assert abs(ds["trace"].item() - F.trace()) <= 6 * ds["trace_sem"].item()
    assert abs(ds["squared_norm"].item() - F.frobenius_norm() ** 2) <= 6 * ds["squared_norm_sem"].item()
    assert ds["density"].dims == ds["density_sem"].dims == ds["cumulative"].dims == ("grid",)
    assert ds["zero_fraction"].item() >= 1 - F.rank_bound / F.n_params - 1e-12
    assert ds["density"].attrs["units"] == "1/nat"
    if "width" in options:
        assert ds["width"].item() == 0.01


@pytest.mark.parametrize("grid", ["log", "linear"])
@pytest.mark.parametrize("method", ["slq", "kpm"])
@pytest.mark.filterwarnings("ignore:Chebyshev moments resolve")
def test_mass_of_an_operator(method, grid):
    ds = fl.spectral_density(operator(), grid=grid, method=method, num_matvecs=40)
    assert mass(ds) == pytest.approx(1, abs=1e-9)
    assert ds.attrs["grid_scale"] == grid
    assert ds.attrs["num_matvecs"] == (400 if method == "slq" else 420)


def test_exact_density_is_the_smoothed_spectrum():
    """Where the Gram matrix is small: every eigenvalue, no probes, and a kernel of the recorded width."""
    F = case("mlp_tanh").fisher()
    ds = fl.spectral_density(F)
    true = fl.spectrum(F)
    real = true["eigenvalue"].values[true["above_noise"].values]
    assert ds.attrs["method"] == "exact: all eigenvalues of the Gram matrix, formed once"
    assert ds.attrs["num_matvecs"] == 0
    assert ds["exact"].item() is True
    assert "probe" not in ds.dims
    np.testing.assert_allclose(ds["deflated_eigenvalue"], true["eigenvalue"], atol=1e-12 * real[0])
    assert ds["zero_fraction"].item() == pytest.approx(1 - len(real) / F.n_params, abs=1e-12)
    x, width = ds["grid"].values, ds["width"].item()
    kernel = scipy.stats.norm.pdf(np.log10(x)[:, None], np.log10(real), width).sum(1) / (x * np.log(10)) / F.n_params
    big = kernel > 1e-3 * kernel.max()
    np.testing.assert_allclose(ds["density"].values[big], kernel[big], rtol=0.02)
    below = np.array([(real <= at).mean() for at in x]) * len(real) / F.n_params + ds["zero_fraction"].item()
    np.testing.assert_allclose(ds["cumulative"], below, atol=1e-12)
    assert ds["trace"].item() == pytest.approx(F.trace(), rel=1e-12)
    assert 0 < ds["trace_sem"].item() < 1e-12 * F.trace()


def test_linear_kernel_is_folded_at_zero():
    F = case("mlp_tanh").fisher()
    ds = fl.spectral_density(F, grid="linear", num_points=2000)
    true = fl.spectrum(F)
    real = true["eigenvalue"].values[true["above_noise"].values]
    x, width = ds["grid"].values, ds["width"].item()
    assert x[0] == 0
    kernel = (scipy.stats.norm.pdf(x[:, None], real, width) + scipy.stats.norm.pdf(x[:, None], -real, width)).sum(1)
    np.testing.assert_allclose(ds["density"], kernel / F.n_params, rtol=0.02, atol=1e-3 * kernel.max() / F.n_params)


@pytest.mark.parametrize("seed", range(3))
def test_quadrature_is_near_the_true_distribution(seed):
    """Wasserstein distance on a linear scale, relative to the largest eigenvalue; both methods, independently."""
    A = operator(seed=seed)
    x = np.linspace(0, 21, 4000)
    true = np.array([(x[i] >= VALUES).mean() for i in range(len(x))])
    # undeflated, the share of each outlier has the error of a few probes
    for method, deflate, limit in (("slq", 2, 1e-3), ("kpm", 2, 5e-3), ("slq", None, 1e-2), ("kpm", None, 1e-2)):
        ds = fl.spectral_density(A, grid=x, method=method, num_matvecs=40, seed=seed, deflate=deflate)
        distance = np.trapezoid(np.abs(ds["cumulative"].values - true), x)
        assert distance / 20 < limit


def test_cumulative_tells_the_bulk_within_its_errors():
    ds = fl.spectral_density(operator(), grid=np.array([0.0, 0.01, 0.1, 0.5, 2.0, 10.0, 30.0]), num_matvecs=120)
    true = np.array([(at >= VALUES - 1e-9).mean() for at in ds["grid"].values])
    assert (np.abs(ds["cumulative"] - true) <= 5 * ds["cumulative_sem"] + 1.5 / len(VALUES)).all()


def test_moments_of_the_kept_rules():
    """Traps, case 25: mass 1, and probe means of the first two moments meet the matrix within their errors."""
    A = operator()
    ds = fl.spectral_density(A, num_matvecs=15)
    assert ds["nodes"].dims == ds["weights"].dims == ("probe", "node")
    np.testing.assert_allclose(ds["weights"].sum("node"), 1, rtol=1e-12)
    np.testing.assert_allclose(ds["probe_norm"], np.sqrt(200), rtol=1e-12)
    each = 200 * (ds["weights"] * ds["nodes"]).sum("node").values
    assert ds["trace"].item() == pytest.approx(each.mean())
    assert ds["trace_sem"].item() == pytest.approx(each.std(ddof=1) / np.sqrt(10))
    assert abs(ds["trace"].item() - VALUES.sum()) <= 5 * ds["trace_sem"].item()
    assert abs(ds["squared_norm"].item() - (VALUES**2).sum()) <= 5 * ds["squared_norm_sem"].item()


def test_same_seed_same_answer_and_another_seed_another():
    a, b = (fl.spectral_density(operator(), seed=4, num_matvecs=20) for _ in range(2))
    assert a.equals(b)
    assert not a.equals(fl.spectral_density(operator(), seed=5, num_matvecs=20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_low_rank_zero_and_identity(dtype):
    """Traps, case 26."""
    low = fl.spectral_density(operator([5.0, 3.0, 2.0, 1.0, *np.zeros(196)], dtype=dtype), num_matvecs=60)
    assert abs(low["zero_fraction"] - 0.98) <= 5 * low["zero_fraction_sem"] + 1e-6
    assert low["unresolved_fraction"] == 0
    zero = fl.spectral_density(operator(np.zeros(30), dtype=dtype))
    assert zero["zero_fraction"].item() == 1
    assert (zero["density"] == 0).all()
    assert zero["trace"].item() == 0
    linear = fl.spectral_density(operator(np.zeros(30), dtype=dtype), grid="linear")
    assert mass(linear) == pytest.approx(1)
    one = fl.spectral_density(operator(np.ones(30), dtype=dtype))
    assert one["zero_fraction"].item() == 0
    assert abs(one["trace"] - 30) <= 5 * one["trace_sem"]
    assert mass(one) == pytest.approx(1)


def test_float32_network():
    F = in_float32("mlp_tanh")
    for deflate in ("auto", None):
        ds = fl.spectral_density(F, deflate=deflate)
        assert abs(ds["trace"] - F.trace()) <= 6 * ds["trace_sem"]
        assert mass(ds) == pytest.approx(1)


def test_examples_without_weight_count_as_zeros_only():
    model, (x, y), _ = make_case("w", lambda: nn.Linear(4, 3), (4,), n=5)
    y[0] = -100
    F = fl.Fisher(model, (x, y), likelihood=fl.Categorical(ignore_index=-100))
    assert F.scores.kept is not None
    for options in ({}, {"deflate": None}):
        ds = fl.spectral_density(F, **options)
        assert ds["zero_fraction"].item() == pytest.approx(1 - 8 / 15)
        assert abs(ds["trace"] - F.trace()) <= 6 * ds["trace_sem"]


# --- errors over probes -------------------------------------------------------------------------------------------


def covered(seeds, quantity, truth):
    """Share of seeds whose 95 % interval, t quantile, holds the truth."""
    A = operator(np.geomspace(1e-2, 1, 120))
    hits = 0
    for seed in seeds:
        ds = fl.spectral_density(A, num_matvecs=5, num_points=10, seed=seed)
        hits += abs(ds[quantity].item() - truth) <= scipy.stats.t.ppf(0.975, 9) * ds[f"{quantity}_sem"].item()
    return hits / len(seeds)


@pytest.mark.parametrize("quantity", ["trace", "squared_norm"])
def test_intervals_cover_the_truth(quantity):
    values = np.geomspace(1e-2, 1, 120)
    truth = {"trace": values.sum(), "squared_norm": (values**2).sum()}[quantity]
    # 60 seeds at 95 %: at least 52 with probability 0.995
    assert covered(range(60), quantity, truth) >= 52 / 60


@pytest.mark.slow
@pytest.mark.parametrize("quantity", ["trace", "squared_norm"])
def test_intervals_cover_the_truth_for_93_to_97_percent_of_1000_seeds(quantity):
    values = np.geomspace(1e-2, 1, 120)
    truth = {"trace": values.sum(), "squared_norm": (values**2).sum()}[quantity]
    assert 0.93 <= covered(range(1000), quantity, truth) <= 0.97


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_than_three_probes_have_no_error(count):
    message = (
        f"A standard error needs at least 3 probes; with num_probes={count} every _sem is NaN. Raise num_probes: their products run as one block, "
        "so further probes are cheap."
    )
    for A in (operator(), case("mlp_tanh").fisher()):
        with pytest.warns(NumericalWarning, match=full(message)):
            ds = fl.spectral_density(A, num_probes=count, num_matvecs=20)
        for name in ("density", "cumulative", "trace", "squared_norm", "zero_fraction"):
            assert np.isnan(ds[f"{name}_sem"]).all()
            assert np.isfinite(ds[name]).all()


def test_functions_integrate_from_the_kept_rules():
    A = operator()
    ds = fl.spectral_density(A, num_matvecs=60, deflate=2)
    rule = quadrature_of(ds)
    for lam in (1e-2, 1.0):
        for f in (lambda x, lam=lam: np.log1p(x / lam), lambda x, lam=lam: x / (x + lam)):
            value, sem = rule.integrate(f)
            assert abs(value - f(VALUES).sum()) <= 5 * sem
            assert rule.integrate(f, lower=True)[0] <= value * (1 + 1e-12)
    value, sem = rule.integrate(lambda x: np.exp(-x), at_zero=1.0)
    assert abs(value - np.exp(-VALUES).sum()) <= 5 * sem
    exact = quadrature_of(fl.spectral_density(case("mlp_tanh").fisher()))
    assert exact.exact
    assert exact.integrate(lambda x: x)[0] == pytest.approx(case("mlp_tanh").fisher().trace())
    kpm = quadrature_of(fl.spectral_density(A, method="kpm", grid="linear", num_matvecs=30))
    assert abs(kpm.integrate(lambda x: x)[0] - VALUES.sum()) <= 5 * kpm.integrate(lambda x: x)[1]
    with pytest.raises(InputError, match=r"^This result has no Gauss-Radau rule: it belongs to method='slq'"):
        kpm.integrate(lambda x: x, lower=True)


def test_rules_survive_a_file(tmp_path):
    ds = fl.spectral_density(case("mlp_tanh").fisher(), by="layer", deflate=None, num_matvecs=8)
    fl.save(ds, tmp_path / "density.nc")
    read = fl.load(tmp_path / "density.nc")
    assert read.identical(ds)
    assert quadrature_of(read.sel(layer="all")).integrate(np.log1p) == quadrature_of(ds.sel(layer="all")).integrate(
        np.log1p
    )


def test_quadrature_of_refuses_other_results():
    F = case("mlp_tanh").fisher()
    with pytest.raises(TypeError, match=full("Expected the Dataset of fl.spectral_density; got Fisher.")):
        quadrature_of(F)
    with pytest.raises(
        InputError, match=r"^Expected a result of fl\.spectral_density, which keeps its quadrature rules; "
    ):
        quadrature_of(fl.spectrum(F))
    with pytest.raises(
        InputError, match=full("The result holds one density per layer; choose one, such as result.sel(layer='all').")
    ):
        quadrature_of(fl.spectral_density(F, by="layer"))


# --- what is known exactly ----------------------------------------------------------------------------------------


def test_deflation_by_a_number_narrows_the_error():
    A = operator()
    plain = fl.spectral_density(A, num_matvecs=30, seed=2)
    ds = fl.spectral_density(A, num_matvecs=30, seed=2, deflate=2)
    np.testing.assert_allclose(ds["deflated_eigenvalue"], [20, 8], rtol=1e-6)
    assert ds["trace_sem"] < plain["trace_sem"] / 3
    assert abs(ds["trace"] - VALUES.sum()) <= 5 * ds["trace_sem"]
    assert ds["nodes"].max() < 1 + 1e-6
    assert ds.attrs["method"].endswith("; 2 eigenvalues deflated")
    assert ds.attrs["num_matvecs"] > 300
    assert mass(ds) == pytest.approx(1)
    kpm = fl.spectral_density(A, num_matvecs=30, seed=2, deflate=2, method="kpm", grid="linear")
    assert kpm["trace_sem"] < plain["trace_sem"] / 3
    assert mass(kpm) == pytest.approx(1)


def test_deflation_by_eigenvectors_of_a_dataset():
    F = case("lenet").fisher()
    some = fl.spectrum(F, vectors=True).isel(rank=slice(0, 3))
    ds = fl.spectral_density(F, deflate=some)
    np.testing.assert_allclose(np.sort(ds["deflated_eigenvalue"])[::-1], some["eigenvalue"], rtol=1e-10)
    assert abs(ds["trace"] - F.trace()) <= 6 * ds["trace_sem"]
    layers = fl.spectrum(F, by="layer", vectors=True).isel(rank=slice(0, 3))
    by = fl.spectral_density(F, deflate=layers, by="layer")
    assert (abs(by["trace"] - layers["trace"]) <= 6 * by["trace_sem"]).all()
    np.testing.assert_allclose(by["deflated_eigenvalue"].max("deflated"), layers["eigenvalue"].max("rank"), rtol=1e-10)


def test_a_complete_spectrum_leaves_nothing_to_estimate():
    F = case("mlp_tanh").fisher()
    ds = fl.spectral_density(F, deflate=fl.spectrum(F))
    assert ds.attrs["method"] == "exact: the eigenvalues of the spectrum that was passed"
    xr_auto = fl.spectral_density(F)
    np.testing.assert_allclose(ds["density"], xr_auto["density"], rtol=1e-9)


def test_deflation_of_another_operator_is_refused():
    F, other = case("mlp_tanh").fisher(), case("mlp_tanh", "empirical").fisher()
    with pytest.raises(
        InputError, match=r"^deflate= is a complete spectrum with the sum .+, but the trace of this operator is"
    ):
        fl.spectral_density(F, deflate=fl.spectrum(F).assign(eigenvalue=2 * fl.spectrum(F)["eigenvalue"]))
    with pytest.raises(InputError, match=r"^deflate= holds eigenpairs with .+ They are probably of another operator"):
        fl.spectral_density(F, deflate=fl.spectrum(other, vectors=True).isel(rank=slice(0, 2)))
    with pytest.raises(InputError, match=r"^deflate= is of an operator of \d+ parameters; this one has \d+\."):
        fl.spectral_density(F, deflate=fl.spectrum(case("lenet").fisher()))
    with pytest.raises(
        InputError,
        match=r"^deflate= holds 2 of up to \d+ eigenvalues and no eigenvectors, .+ Compute it with vectors=True\.$",
    ):
        fl.spectral_density(F, deflate=fl.spectrum(F).isel(rank=slice(0, 2)))
    with pytest.raises(
        InputError,
        match=r"^deflate= takes a result of fl\.spectrum or fl\.top_eigenvalues, with the variable 'eigenvalue'",
    ):
        fl.spectral_density(F, deflate=fl.spectral_density(F))
    with pytest.raises(InputError, match=r"^deflate= is of the whole, but by= asks for blocks\."):
        fl.spectral_density(F, deflate=fl.spectrum(F), by="layer")


# --- blocks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"deflate": None}, {"method": "kpm", "grid": "linear"}], ids=str)
def test_by_layer(options):
    F = case("lenet").fisher()
    ds = fl.spectral_density(F, by="layer", **options)
    assert list(ds["layer"].values) == [*F.layout.layer_names, "all"]
    assert ds["density"].dims == ("layer", "grid")
    np.testing.assert_allclose(mass(ds), 1, atol=1e-9)
    true = [F.restrict(name).trace() for name in F.layout.layer_names] + [F.trace()]
    assert (np.abs(ds["trace"] - true) <= 6 * ds["trace_sem"]).all()
    assert ds["size"].values.tolist() == [layer.size for layer in F.layout.layers] + [F.n_params]
    whole = fl.spectral_density(F, **options)
    np.testing.assert_allclose(ds["trace"].sel(layer="all"), whole["trace"], rtol=1e-12)


@pytest.mark.parametrize("kind", ["exact", "hessian"])
@pytest.mark.parametrize("deflate", ["auto", None])
def test_by_a_partition(deflate, kind):
    model, data, likelihood = case("mlp_tanh").model, case("mlp_tanh").data, case("mlp_tanh").likelihood
    F = fl.Fisher(model, data, likelihood=likelihood, kind=kind)
    blocks = fl.partition(F, "unit")
    ds = fl.spectral_density(F, by="unit", deflate=deflate, grid="linear", num_matvecs=20)
    assert list(ds["block"].values) == list(blocks.labels)
    matrix = F.dense()
    true = np.array([matrix[index][:, index].trace().item() for index in blocks.blocks])
    assert (np.abs(ds["trace"] - true) <= 6 * ds["trace_sem"] + 1e-12).all()
    np.testing.assert_allclose(mass(ds), 1, atol=1e-9)


def test_by_of_an_approximation_and_of_a_bare_callable():
    F = case("mlp_tanh").fisher()
    B = fl.BlockDiagonal(F, "layer")
    ds = fl.spectral_density(B, by="layer", num_matvecs=30)
    true = [F.restrict(name).trace() for name in F.layout.layer_names] + [F.trace()]
    assert (np.abs(ds["trace"] - true) <= 6 * ds["trace_sem"]).all()
    with pytest.raises(
        InputError,
        match=r"^by='layer' needs an operator that knows its parameters, a Fisher or an approximation; got Operator\.",
    ):
        fl.spectral_density(operator(), by="layer")


def test_too_many_blocks_are_refused():
    model, data, likelihood = make_case("wide", lambda: nn.Linear(50, 50), (50,), n=3)
    F = fl.Fisher(model, data, likelihood=likelihood)
    message = "Partition 'diagonal' has 2550 blocks; the limit is 2048 densities. Look at one layer with F.restrict(name), or choose a coarser partition."
    with pytest.raises(InputError, match=full(message)):
        fl.spectral_density(F, by="diagonal")
