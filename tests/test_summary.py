"""Functions of a spectrum and summaries of it, from operators and from results, exact and estimated, with calibrated errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from fisher_checks import case, in_float32
from test_traces import MATRICES, bounds

import fisherlens as fl
from fisherlens import reference
from fisherlens.errors import InputError, MemoryBudgetError, NumericalWarning
from fisherlens.linalg.probes import Probes
from fisherlens.spectrum import sources
from fisherlens.spectrum.moments import integrate
from fisherlens.spectrum.rules import Quadrature

NAMES = ["trace", "squared_norm", "largest_eigenvalue", "participation_ratio", "stable_rank"]
FUNCTIONS = (fl.effective_dimension, fl.log_determinant)
EXACT = {fl.effective_dimension: reference.effective_dimension, fl.log_determinant: reference.log_determinant}


def operator(matrix, psd=True):
    return fl.Operator(lambda v: matrix @ v, len(matrix), matrix.dtype, block=True, psd=psd)


def truth_of(values, grid):
    """All quantities from a complete spectrum."""
    lam = np.array(grid)[:, None]
    return {
        "trace": values.sum(),
        "squared_norm": (values**2).sum(),
        "largest_eigenvalue": np.abs(values).max(),
        "participation_ratio": values.sum() ** 2 / (values**2).sum(),
        "stable_rank": (values**2).sum() / np.abs(values).max() ** 2,
        "effective_dimension": (values / (values + lam)).sum(1),
        "log_determinant": np.log1p(values / lam).sum(1),
    }


# --- effective dimension and log-determinant -------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
def test_of_operators_and_approximations(function, unchanged):
    c = case("mlp_tanh")
    F, grid = c.fisher(), [1e-3, 0.1]
    exact = [EXACT[function](c.matrix, lam) for lam in grid]
    for source in (F, operator(c.matrix), fl.spectrum(F), fl.spectral_density(F)):
        with unchanged(c.model):
            found = function(source, grid)
        assert found.values == pytest.approx(exact, rel=1e-9)
        assert "sem" not in found.coords
        assert "exact" in found.attrs["method"]
    blocks = fl.BlockDiagonal(F, "layer")
    found = function(blocks, grid)
    assert found.values == pytest.approx([EXACT[function](blocks.dense(), lam) for lam in grid], rel=1e-9)
    assert "by the BlockDiagonal itself" in found.attrs["method"]
    wide = in_float32("mlp_tanh")
    assert function(wide, grid).values == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("deflate", [0, 5])
def test_estimates_of_what_is_too_large(function, deflate):
    """More parameters than products: probes, with both rules around the value."""
    A, grid = MATRICES["falling"], [1e-3, 0.1, 10.0]
    options = {"num_probes": 4, "num_matvecs": 25, "deflate": deflate, "seed": 3}
    found = function(operator(A), grid, **options)
    exact = np.array([EXACT[function](A, lam) for lam in grid])
    assert found.dims == found["sem"].dims == ("damping",)
    assert (np.abs(found.values - exact) <= 5 * found["sem"].values + found["truncation"].values).all()
    assert (found["low"].values < found.values).all()
    assert (found.values < found["high"].values).all()
    assert (found["truncation"].values >= 0).all()
    assert "4 probes x 25 steps" in found.attrs["method"]
    assert ("5 leading eigenvalues deflated" in found.attrs["method"]) == (deflate > 0)
    one = function(operator(A), 0.1, **options)
    assert one.ndim == one["sem"].ndim == 0
    assert one.item() == pytest.approx(found.sel(damping=0.1).item(), rel=1e-12)
    assert one.identical(function(operator(A), 0.1, **options))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_fisher_over_its_budget_is_estimated(function, monkeypatch):
    c = case("lenet")
    F = c.fisher()
    monkeypatch.setattr(sources, "fits", lambda F: False)
    found = function(F, [1e-3, 0.1], num_probes=8, num_matvecs=15)
    exact = np.array([EXACT[function](c.matrix, lam) for lam in (1e-3, 0.1)])
    assert (np.abs(found.values - exact) <= 4 * found["sem"].values + 1e-9).all()
    assert (found["sem"].values < 0.05 * exact).all()
    assert "Lanczos quadrature" in found.attrs["method"]


def test_truncation_is_bounded_from_both_sides():
    """With few steps and a small damping the rules are far apart, and the truth lies between them."""
    A, lam = MATRICES["falling"], 1e-4
    exact = reference.log_determinant(A, lam)
    gap = []
    for steps in (3, 6, 12, 40):
        found = fl.log_determinant(operator(A), lam, num_probes=40 // 20 * 2, num_matvecs=steps, deflate=0)
        if "truncation" in found.coords:
            gap.append(float(found["truncation"]))
            assert found["low"] <= exact <= found["high"]
    assert gap == sorted(gap, reverse=True)
    assert gap[0] > 30 * gap[-1]


def test_results_of_a_density():
    A = MATRICES["falling"]
    ds = fl.spectral_density(operator(A), num_probes=8, num_matvecs=30, deflate=None)
    for function in FUNCTIONS:
        found = function(ds, [1e-2, 1.0])
        exact = [EXACT[function](A, lam) for lam in (1e-2, 1.0)]
        assert (found["low"].values <= exact).all()
        assert (exact <= found["high"].values).all()
        assert (found["sem"].values > 0).all()


def test_results_of_some_eigenvalues():
    """The largest eigenvalues and the trace bound what is missing from both sides."""
    c = case("mlp_tanh")
    F = c.fisher()
    top = fl.top_eigenvalues(F, 4)
    grid = [1e-3, 1e-1, 10.0]
    for function in FUNCTIONS:
        found = function(top, grid)
        exact = [EXACT[function](c.matrix, lam) for lam in grid]
        assert (found["low"].values <= exact).all()
        assert (exact <= found["high"].values).all()
        assert (found["low"].values > 0).all()
        assert found.attrs["method"].startswith("bounds from 4 eigenvalues and the trace")
        more = function(fl.top_eigenvalues(F, 10), grid)
        assert (more["high"] - more["low"] < found["high"] - found["low"]).all()
        width = (found["high"] - found["low"]).values / found.values
        assert width[-1] < 0.05  # large dampings ask for little more than the trace
    with pytest.raises(InputError, match=r"holds 4 eigenvalues and not the trace.*Pass the operator itself"):
        fl.effective_dimension(top.drop_vars("trace"), 0.1)
    with pytest.raises(InputError, match="Some eigenvalues of the result have not converged"):
        fl.effective_dimension(top.assign(converged=top["converged"] & False), 0.1)
    with pytest.raises(InputError, match="holds eigenvalues of which='smallest'"):
        fl.effective_dimension(top.assign_attrs(which="smallest"), 0.1)


def test_what_functions_refuse():
    c = case("mlp_tanh")
    H = fl.Fisher(c.model, c.data, likelihood=c.likelihood, kind="hessian")
    for source in (H, fl.spectrum(H)):
        with pytest.raises(InputError, match="are of a positive semi-definite F, but this is a Hessian"):
            fl.effective_dimension(source, 0.1)
    with pytest.raises(InputError, match=r"this is an operator, whose eigenvalues may be negative.*psd=True"):
        fl.log_determinant(operator(c.matrix, psd=False), 0.1)
    with pytest.raises(
        TypeError, match=r"Expected a Fisher or the Dataset of fl\.spectrum.*got a Dataset with coupling"
    ):
        fl.log_determinant(fl.coupling(c.fisher(), num_null=0), 0.1)
    for name, bad in (("num_probes", 0), ("num_matvecs", 1), ("deflate", -1), ("seed", -1)):
        with pytest.raises(InputError, match=f"{name} must be an integer >="):
            fl.effective_dimension(c.fisher(), 0.1, **{name: bad})
    with pytest.raises(InputError, match="confidence must be a number between 0 and 1"):
        fl.effective_dimension(c.fisher(), 0.1, confidence=2)
    with pytest.warns(NumericalWarning, match="num_probes=2 is too few for a standard error, which is NaN"):
        found = fl.effective_dimension(operator(MATRICES["falling"]), 0.1, num_probes=2, num_matvecs=20)
    assert np.isnan(found["sem"].item())


# --- the summary -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp_tanh", "lenet", "fewer_parameters_than_examples", "one_class", "segmentation"])
def test_summary_is_exact_where_it_can_be(name, unchanged):
    c, grid = case(name), [1e-3, 0.1]
    F = c.fisher()
    with unchanged(c.model):
        ds = fl.spectral_summary(F, damping=grid)
    truth = truth_of(reference.spectrum(c.matrix).clamp(min=0).numpy(), grid) if c.matrix.any() else None
    for key in [*NAMES, *EXACT_NAMES]:
        value = np.zeros_like(ds[key].values) if truth is None else truth[key]
        assert ds[key].values == pytest.approx(value, rel=1e-9, abs=1e-12)
        assert (ds[f"{key}_sem"].values == 0).all()
        assert (ds[f"{key}_low"].values == ds[f"{key}_high"].values).all()
        assert ds["how"].sel(quantity=key).item().startswith("exact")
    assert ds.attrs["num_matvecs"] == 0
    assert json.loads(ds.attrs["settings"])["method"] == "auto"
    one = fl.spectral_summary(F, damping=0.1)
    assert one["log_determinant"].ndim == 0
    assert one.attrs["damping"] == 0.1
    assert "log_determinant" not in fl.spectral_summary(F, damping=None)


EXACT_NAMES = ["effective_dimension", "log_determinant"]


@pytest.mark.parametrize("deflate", [0, 6])
def test_summary_from_probes(deflate):
    A, grid = MATRICES["falling"], [1e-3, 0.1]
    ds = fl.spectral_summary(
        operator(A), damping=grid, method="quadrature", num_probes=8, num_matvecs=30, deflate=deflate
    )
    truth = truth_of(torch.linalg.eigvalsh(A).numpy(), grid)
    for key, value in truth.items():
        sem = np.nan_to_num(ds[f"{key}_sem"].values)
        assert (
            np.abs(ds[key].values - value) <= 5 * sem + ds[f"{key}_truncation"].fillna(0).values + 1e-9 * value
        ).all(), key
        if key == "largest_eigenvalue":
            assert ds["how"].sel(quantity=key).item().startswith("Ritz value, a lower bound")
            assert np.isnan(ds[f"{key}_high"]) if deflate == 0 else ds[f"{key}_high"] >= value * (1 - 1e-12)
            continue
        assert ds["how"].sel(quantity=key).item().startswith("estimated: Lanczos quadrature")
        assert (sem > 0).all()
        assert (ds[f"{key}_low"].values < ds[key].values).all()
    assert 240 <= ds.attrs["num_matvecs"] <= 360
    again = fl.spectral_summary(
        operator(A), damping=grid, method="quadrature", num_probes=8, num_matvecs=30, deflate=deflate
    )
    assert again.drop_attrs().identical(ds.drop_attrs())


def test_deflation_makes_ratios_sharp():
    A = MATRICES["geometric"]
    loose, sharp = (
        fl.spectral_summary(operator(A), method="quadrature", num_probes=5, num_matvecs=30, deflate=d) for d in (0, 20)
    )
    for key in ("squared_norm", "participation_ratio", "stable_rank"):
        assert sharp[f"{key}_sem"] < 0.05 * loose[f"{key}_sem"]


def test_trace_of_a_fisher_is_exact_even_if_the_rest_is_not():
    F = case("lenet").fisher()
    ds = fl.spectral_summary(F, method="quadrature", num_matvecs=15)
    assert ds["trace"].item() == F.trace()
    assert ds["trace_sem"].item() == 0
    assert ds["how"].sel(quantity="trace").item() == "exact: sum over the captured scores"
    assert ds["squared_norm"].item() == pytest.approx(F.frobenius_norm() ** 2, rel=0.2)


@pytest.mark.parametrize("by", ["layer", "unit"])
@pytest.mark.parametrize("method", ["exact", "quadrature"])
def test_summary_by_block(by, method):
    c = case("mlp_tanh")
    F, parts = c.fisher(), fl.partition(c.fisher(), by)
    ds = fl.spectral_summary(F, by=by, damping=0.01, method=method, num_probes=6, num_matvecs=30)
    dim = "layer" if by == "layer" else "block"
    assert list(ds[dim].values) == ([*F.layout.layer_names, "all"] if by == "layer" else list(parts.labels))
    for place, index in enumerate(parts.blocks):
        values = torch.linalg.eigvalsh(c.matrix[index][:, index]).clamp(min=0).numpy()
        for key, value in truth_of(values, [0.01]).items():
            row = {name: ds[f"{key}{name}"][place].item() for name in ("", "_sem", "_truncation")}
            slack = 6 * row["_sem"] + np.nan_to_num(row["_truncation"]) + 1e-9 * np.ravel(value)[0] + 1e-12
            assert abs(row[""] - np.ravel(value)[0]) <= slack, (key, place)
            assert method != "exact" or row["_sem"] == 0
    if by == "layer":
        assert ds["trace"].sel(layer="all").item() == pytest.approx(F.trace())


def test_summary_of_a_hessian_and_of_approximations():
    c = case("mlp_tanh")
    H = fl.Fisher(c.model, c.data, likelihood=c.likelihood, kind="hessian")
    ds = fl.spectral_summary(H, damping=None)
    values = torch.linalg.eigvalsh(H.matrix()).numpy()
    for key, value in truth_of(values, [1e9]).items():
        if key in NAMES:
            assert ds[key].item() == pytest.approx(value, rel=1e-8), key
    with pytest.raises(InputError, match="this is a Hessian, whose eigenvalues may be negative"):
        fl.spectral_summary(H)
    rough = fl.spectral_summary(H, damping=None, method="quadrature", num_matvecs=30)
    assert abs(rough["trace"] - ds["trace"]) <= 5 * rough["trace_sem"]
    assert rough["largest_eigenvalue"].item() == pytest.approx(ds["largest_eigenvalue"].item(), rel=1e-6)
    blocks = fl.BlockDiagonal(c.fisher(), "unit")
    assert fl.spectral_summary(blocks)["squared_norm"].item() == pytest.approx(blocks.squared_norm(), rel=1e-9)


def test_what_a_summary_refuses(monkeypatch):
    F = case("mlp_tanh").fisher()
    with pytest.raises(InputError, match=r"Unknown method 'lanczos'.*'auto', 'exact', 'quadrature'"):
        fl.spectral_summary(F, method="lanczos")
    for name, bad in (("num_probes", 0), ("num_matvecs", 1), ("deflate", 1.5), ("seed", -1), ("bootstrap", -1)):
        with pytest.raises(InputError, match=f"{name} must be an integer >="):
            fl.spectral_summary(F, **{name: bad})
    with pytest.raises(InputError, match="damping must be a finite number > 0"):
        fl.spectral_summary(F, damping=[0.1, -1])
    with pytest.raises(InputError, match=r"by= cuts named parameters into blocks, but Operator has no layout"):
        fl.spectral_summary(operator(MATRICES["flat"]), by="layer")
    with pytest.raises(TypeError, match=r"Expected a fisherlens\.Fisher"):
        fl.spectral_summary(3)
    big = fl.Operator(lambda v: v, 20_000, psd=True)
    with pytest.raises(MemoryBudgetError):
        fl.spectral_summary(big, method="exact")


def test_saved_and_loaded(tmp_path):
    ds = fl.spectral_summary(case("mlp_tanh").fisher(), by="layer", bootstrap=20)
    fl.save(ds, tmp_path / "summary.nc")
    assert fl.load(tmp_path / "summary.nc").identical(ds)


def test_the_page_on_choosing_an_estimator(capsys):
    page = Path(__file__).resolve().parents[1] / "docs/howto/choosing_an_estimator.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    scope: dict[str, object] = {}
    for block in blocks:
        exec(block, scope)  # noqa: S102 - our own page
    assert "exact: eigenvalues of the Gram matrix" in capsys.readouterr().out
    rough, exact = scope["rough"], scope["exact"]
    assert (
        np.abs(rough["log_determinant"] - exact["log_determinant"])
        <= 5 * rough["log_determinant_sem"] + rough["log_determinant_truncation"]
    ).all()


# --- calibration -----------------------------------------------------------------------------------------------------


def sampled(values, probes, deflated, seed):
    """What exact quadrature of probes on the sphere gives, in the eigenbasis: no Lanczos run is needed."""
    rest = values[deflated:]
    x = Probes(len(rest), torch.float64, torch.device("cpu"), seed).sphere(probes).T.numpy()
    nodes = np.broadcast_to(rest, x.shape)
    return Quadrature(nodes, x**2, values[:deflated], 0, len(values), 0.0, len(values), 0.0)


@pytest.mark.parametrize("name", ["rank one", "rank four", "falling", "geometric", "flat"])
@pytest.mark.parametrize(("probes", "deflated"), [(4, 0), (10, 0), (10, 5)])
def test_the_pooled_error_is_calibrated(name, probes, deflated):
    """Intervals of trace, norm, effective dimension and log-determinant hold the truth in 93 to 97 % of 1,000 seeds."""
    from scipy.special import stdtrit

    values = torch.linalg.eigvalsh(MATRICES[name]).clamp(min=0).flip(0).numpy().copy()
    values[values < 1e-12] = 0
    if not values[deflated:].any():
        return  # all is known
    functions = [lambda x: x, lambda x: x**2]
    functions += [lambda x, lam=lam: x / (x + lam) for lam in (1e-2, 1.0)] + [lambda x: np.log1p(x / 0.1)]
    exact = np.array([f(values).sum() for f in functions])
    hits = []
    for seed in range(1000):
        found = integrate(sampled(values, probes, deflated, seed), functions)
        hits.append(np.abs(found.value - exact) <= stdtrit(found.dof, 0.975) * found.sem + 1e-12)
    share = np.mean(hits, axis=0)
    low, high = bounds(1000)  # of chance, for 95 %; 93 to 97 % is what it comes to
    assert low > 0.925
    assert high < 0.972
    allowed = (low, high) if probes == 10 else (low - 0.015, high + 0.01)
    assert (share >= allowed[0]).all()
    assert (share <= allowed[1]).all()


def test_the_covariance_is_that_of_the_estimates():
    values = torch.linalg.eigvalsh(MATRICES["falling"]).numpy()
    functions = [lambda x: x, lambda x: x**2, lambda x: x / (x + 0.1)]
    found = [integrate(sampled(values, 6, 0, seed), functions) for seed in range(2000)]
    measured = np.cov(np.array([one.value for one in found]).T)
    claimed = np.mean([one.covariance for one in found], axis=0)
    assert claimed == pytest.approx(measured, rel=0.12)
    # the first function exactly, from the formula
    n, t = len(values), values.sum()
    assert claimed[0, 0] == pytest.approx(2 * n / (n + 2) * ((values**2).sum() - t**2 / n) / 6, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["falling", "geometric", "flat"])
@pytest.mark.parametrize(("deflate", "seeds"), [(0, 1000), (5, 300)])
def test_intervals_of_the_summary_hold_the_truth(name, deflate, seeds):
    """The whole way through Lanczos runs: 93 to 97 % of 1,000 seeds, more only where the rules are apart or the interval is of a ratio."""
    A, grid = MATRICES[name], [1e-2, 1.0]
    truth = truth_of(torch.linalg.eigvalsh(A).numpy(), grid)
    hits = {key: [] for key in truth if key != "largest_eigenvalue"}
    options = {"method": "quadrature", "num_probes": 10, "num_matvecs": 25, "deflate": deflate}
    for seed in range(seeds):
        ds = fl.spectral_summary(operator(A), damping=grid, seed=seed, **options)
        for key in hits:
            hits[key].append((ds[f"{key}_low"].values <= truth[key]) & (truth[key] <= ds[f"{key}_high"].values))
    low, high = (0.93, 0.972) if seeds == 1000 else bounds(seeds)
    for key in hits:
        share = np.mean(hits[key], axis=0)
        assert (share >= low).all(), (key, share)
        assert (share <= (0.998 if key in ("participation_ratio", "stable_rank") else high)).all(), (key, share)


def test_deflation_knows_nothing_of_the_probes():
    """Eigenvectors found for a repeated eigenvalue are parts of Lanczos' start: were the probes the same numbers, nothing would be left of them."""
    values = torch.cat([torch.ones(50, dtype=torch.float64), torch.zeros(25, dtype=torch.float64)])
    q = torch.linalg.qr(torch.randn(75, 75, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0]
    A = fl.Operator(lambda v: q @ (values[:, None] * (q.T @ v)), 75, block=True, psd=True)
    found = [fl.effective_dimension(A, 1.0, num_probes=4, num_matvecs=12, deflate=2, seed=seed) for seed in range(20)]
    mean, sem = np.mean([float(one) for one in found]), np.mean([float(one.sem) for one in found]) / 20**0.5
    assert abs(mean - 25) < 4 * sem


def test_probes_are_not_the_numbers_that_a_user_draws_from_the_same_seed():
    """With rows of the data as probes, the trace of a linear network's Fisher would come out as P/N too large."""
    x = torch.randn(30, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A = fl.Operator(lambda v: x.T @ (x @ v) / 30, 40, block=True, psd=True)
    found = fl.spectral_summary(A, damping=None, method="quadrature", num_probes=10, deflate=0, seed=0)
    assert float(found["trace_low"]) < x.square().sum().item() / 30 < float(found["trace_high"])
    assert float(found["trace"]) < 1.3 * x.square().sum().item() / 30
