"""Kinds of Fisher and the Hessian beside each other, against dense matrices and repeated draws."""

from __future__ import annotations

import copy
import importlib
import itertools

import matplotlib as mpl
import numpy as np
import pytest
import torch
from cases import ALL_CASES, cast
from torch import nn

import fisherlens as fl
from fisherlens.errors import InputError, MemoryBudgetError, NumericalWarning

mpl.use("Agg")

import matplotlib.pyplot as plt

# The Gram side, the dense side, several terms per example, shared weights of the mean, and outputs without classes.
CASES = ("mlp_tanh", "lenet", "fewer_parameters_than_examples", "segmentation", "gaussian_image", "bernoulli_image")


def matrices(case, kinds, layer=None, seed=0, mc_samples=1, likelihood=None):
    """Every kind as its own Fisher's dense matrix."""
    model, data, name = case
    found = {}
    for kind in kinds:
        samples = mc_samples if kind == "mc" else 1
        F = fl.Fisher(model, data, likelihood=likelihood or name, kind=kind, seed=seed, mc_samples=samples)
        found[kind] = (F if layer is None else F.restrict(layer)).dense()
    gradient = F.gradient() if layer is None else F.restrict(layer).gradient()
    return found, gradient


def check(found, dense, gradient, k, damping, tol=1e-10):
    """All variables of pairs and singles straight from their definitions."""
    pairs = {name: {} for name in ("distance", "cosine", "scale", "scaled_distance", "trace_ratio", "overlap")}
    pairs["natural_gradient_cosine"] = {}
    spectra, spaces, steps = {}, {}, {}
    for kind, F in dense.items():
        values, vectors = torch.linalg.eigh(F)
        spectra[kind], vectors = values.flip(0), vectors.flip(1)
        count = min(k, int((spectra[kind] > len(F) * 2.3e-16 * values.abs().max()).sum()))
        spaces[kind] = vectors[:, :count]
        steps[kind] = torch.linalg.solve(F + damping * torch.eye(len(F)), gradient)
    for i, j in itertools.product(dense, dense):
        a, b = dense[i], dense[j]
        inner, size = (a * b).sum(), min(spaces[i].shape[1], spaces[j].shape[1])
        best = inner / b.square().sum()
        at = {"kind_i": i, "kind_j": j}
        expected = {
            "distance": (a - b).norm() / a.norm(),
            "cosine": inner / (a.norm() * b.norm()),
            "scale": best,
            "scaled_distance": (a - best * b).norm() / a.norm(),
            "trace_ratio": b.trace() / a.trace(),
            "natural_gradient_cosine": torch.cosine_similarity(steps[i], steps[j], dim=0),
        }
        for name, value in expected.items():
            slack = 1e-7 if name in ("distance", "scaled_distance") and value < 1e-7 else tol
            assert found[name].sel(at).item() == pytest.approx(value.item(), rel=tol, abs=slack), (name, i, j)
        assert found["overlap_size"].sel(at).item() == size
        assert found["overlap_chance"].sel(at).item() == pytest.approx(size / len(a))
        cosines = torch.linalg.svdvals(spaces[i][:, :size].T @ spaces[j][:, :size]).clamp(max=1)
        assert found["overlap"].sel(at).item() == pytest.approx(cosines.square().mean().item(), rel=1e-7)
        angles = found["principal_angle"].sel(at).values
        assert np.allclose(np.cos(angles[:size]), cosines, rtol=0, atol=1e-7)
        assert np.isnan(angles[size:]).all()
    for kind, values in spectra.items():
        shown = found["eigenvalue"].sel(kind=kind).values
        shown = shown[np.isfinite(shown)]
        assert np.allclose(shown, values[: len(shown)], rtol=0, atol=1e-10 * values.abs().max())
        assert found["trace"].sel(kind=kind).item() == pytest.approx(dense[kind].trace().item(), rel=1e-10)
        assert found["frobenius_norm"].sel(kind=kind).item() == pytest.approx(dense[kind].norm().item(), rel=1e-10)


@pytest.fixture(autouse=True)
def _doubles():
    """Plain ``torch.eye`` in the checks above is to be double."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("name", CASES)
def test_kinds_match_their_dense_matrices(name):
    case = ALL_CASES[name]()
    kinds = ("exact", "mc", "empirical")
    found = fl.compare_kinds(case[0], case[1], likelihood=case[2], k=2, mc_samples=2, seed=5, damping=0.1)
    dense, gradient = matrices(case, kinds, seed=5, mc_samples=2)
    check(found, dense, gradient, 2, 0.1)
    assert not [key for key in found if key.endswith("_spread") or (key.endswith("_sem") and "sampling" not in key)]


@pytest.mark.parametrize("name", ["mlp_tanh", "segmentation"])
def test_the_hessian_joins_in_any_order(name):
    case = ALL_CASES[name]()
    kinds = ("hessian", "empirical", "exact")
    found = fl.compare_kinds(case[0], case[1], likelihood=case[2], kinds=kinds, k=3, damping=0.3)
    assert list(found["kind"].values) == list(kinds)
    check(found, *matrices(case, kinds), 3, 0.3)
    assert found.attrs["method"] == "exact"


def test_each_layer_is_its_own_block():
    case = ALL_CASES["lenet"]()
    found = fl.compare_kinds(case[0], case[1], likelihood=case[2], k=2, by="layer", damping=[0.1, 1.0])
    assert list(found["layer"].values) == ["0", "3", "7", "9", "all"]
    assert found["natural_gradient_cosine"].dims == ("damping", "layer", "kind_i", "kind_j")
    for layer in ("0", "9", "all"):
        dense, gradient = matrices(case, ("exact", "mc", "empirical"), None if layer == "all" else layer)
        check(found.sel(layer=layer, damping=1.0), dense, gradient, 2, 1.0)


def test_class_weights_ignored_labels_and_batches():
    model, (x, y), _ = ALL_CASES["segmentation"]()
    y = y.clone()
    y[0], y[1, 0] = -100, -100
    likelihood = fl.Categorical(weight=[1.0, 2.0, 0.5])
    batches = [(x[:2], y[:2]), (x[2:3], y[2:3]), (x[3:], y[3:])]
    found = fl.compare_kinds(model, batches, likelihood=likelihood, k=2, damping=0.1, seed=3)
    dense, gradient = matrices((model, (x, y), None), ("exact", "mc", "empirical"), seed=3, likelihood=likelihood)
    check(found, dense, gradient, 2, 0.1)
    assert np.isnan(found["sampling_noise"].sel(kind="empirical"))  # its rows are terms, and no draw is


def test_float32_agrees():
    case = ALL_CASES["mlp_tanh"]()
    found = fl.compare_kinds(*cast(copy.deepcopy(case), torch.float32)[:2], likelihood=case[2], k=2, damping=0.1)
    exact = fl.compare_kinds(*case[:2], likelihood=case[2], k=2, damping=0.1)
    for name in ("distance", "cosine", "overlap", "natural_gradient_cosine", "trace_ratio"):
        same = np.eye(3, dtype=bool)
        assert np.allclose(found[name].values[~same], exact[name].values[~same], rtol=1e-4, atol=1e-4), name


def test_a_linear_model_has_its_fisher_as_hessian():
    model, data, likelihood = ALL_CASES["softmax_regression"]()
    found = fl.compare_kinds(model, data, likelihood=likelihood, kinds=("exact", "hessian"), k=3)
    assert found["distance"].max() < 1e-13
    assert found["scaled_distance"].max() < 1e-13
    assert found["overlap"].min() > 1 - 1e-12
    assert found["principal_angle"].max() < 1e-6


def test_several_seeds_give_mean_spread_and_distance_between_draws():
    case, seeds = ALL_CASES["mlp_tanh"](), (4, 9, 1)
    options = {"likelihood": case[2], "k": 2, "damping": 0.1}
    found = fl.compare_kinds(*case[:2], seed=seeds, **options)
    single = [fl.compare_kinds(*case[:2], seed=s, **options) for s in seeds]
    pair = {"kind_i": "exact", "kind_j": "mc"}
    for name in ("distance", "cosine", "overlap", "natural_gradient_cosine", "scale"):
        values = [one[name].sel(pair).item() for one in single]
        assert found[name].sel(pair).item() == pytest.approx(np.mean(values), rel=1e-10)
        assert found[name + "_spread"].sel(pair).item() == pytest.approx(np.std(values, ddof=1), rel=1e-8)
        fixed = {"kind_i": "exact", "kind_j": "empirical"}
        assert found[name].sel(fixed).item() == pytest.approx(single[0][name].sel(fixed).item(), rel=1e-10)
        assert found[name + "_spread"].sel(fixed).item() == 0
    draws = [matrices(case, ("mc",), seed=s)[0]["mc"] for s in seeds]
    between = [((a - b).norm() / a.norm()).item() for a, b in itertools.permutations(draws, 2)]
    assert found["seed_distance"].item() == pytest.approx(np.mean(between), rel=1e-10)
    assert list(found.attrs["seed"]) == list(seeds)
    assert "eigenvalue_spread" in found
    assert found["eigenvalue_spread"].sel(kind="exact").fillna(0).max() == 0


def test_sampling_noise_is_the_distance_of_fresh_labels():
    model, (x, y), likelihood = ALL_CASES["mlp_tanh"]()
    exact = fl.Fisher(model, (x, y), likelihood=likelihood).dense()
    draws = fl.Fisher(model, (x, None), likelihood=likelihood, kind="mc", mc_samples=1200, seed=7)
    rows = draws.scores.rows_at(torch.arange(draws.scores.rows)) * 1200**0.5
    rows = rows.view(len(x), 600, 2, -1)  # 600 times two labels per example
    square = np.empty(600)
    for at in range(600):
        U = rows[:, at].flatten(0, 1) / 2**0.5
        square[at] = ((U.T @ U / len(x) - exact).norm() / exact.norm()).square().item()
    truth, error = np.mean(square), np.std(square) / 600**0.5
    # 600 labels per example in all, as one alone says little of a fourth moment
    found = fl.compare_kinds(model, (x, y), likelihood=likelihood, mc_samples=300, seed=(0, 1), k=1)
    estimate = found["sampling_noise"].sel(kind="mc").item() ** 2 * 300 / 2
    assert abs(estimate - truth) < 5 * error + 0.02 * truth
    empirical = found["sampling_noise"].sel(kind="empirical").item() ** 2
    assert empirical == pytest.approx(2 * estimate, rel=1e-9)
    assert found["sampling_noise"].sel(kind="exact").item() == 0
    assert found["sampling_noise_sem"].sel(kind="mc").item() > 0


def test_more_draws_come_closer():
    model, data, likelihood = ALL_CASES["mlp_tanh"]()
    few, many = (
        fl.compare_kinds(model, data, likelihood=likelihood, kinds=("exact", "mc"), mc_samples=s)["distance"][0, 1]
        for s in (1, 400)
    )
    assert many < 0.15 * few


def test_spaces_no_larger_than_the_rank():
    """One example has one empirical score: its leading space is a line, whatever k is."""
    model, (x, y), likelihood = ALL_CASES["mlp_tanh"]()
    found = fl.compare_kinds(model, (x[:1], y[:1]), likelihood=likelihood, kinds=("exact", "empirical"), k=4)
    assert found["overlap_size"].values.tolist() == [[2, 1], [1, 1]]
    assert np.isnan(found["gap"]).all()
    assert np.allclose(np.diag(found["overlap"]), 1)


def test_a_fisher_of_zero_has_no_direction():
    model, (x, y), likelihood = ALL_CASES["mlp_tanh"]()
    with torch.no_grad():
        model[-1].weight.zero_()
        model[-1].bias.copy_(torch.tensor([1000.0, 0.0, 0.0]))
    with pytest.warns(NumericalWarning, match="come out as 0"):
        found = fl.compare_kinds(model, (x, y * 0), likelihood=likelihood, kinds=("exact", "empirical"), k=2)
    assert np.isnan(found["distance"]).all()
    assert np.isnan(found["cosine"]).all()
    assert (found["overlap_size"] == 0).all()
    assert np.isnan(found["overlap"]).all()


def test_without_labels_there_are_no_natural_gradients():
    model, (x, _), likelihood = ALL_CASES["mlp_tanh"]()
    found = fl.compare_kinds(model, (x, None), likelihood=likelihood, kinds=("exact", "mc"))
    assert "natural_gradient_cosine" not in found
    with pytest.raises(InputError, match="empirical kind takes scores at observed labels"):
        fl.compare_kinds(model, (x, None), likelihood=likelihood)


@pytest.mark.parametrize("kinds", [("exact", "mc", "empirical"), ("empirical", "exact", "hessian")])
@pytest.mark.parametrize("by", [None, "layer"])
def test_probes_agree_within_their_errors(kinds, by):
    model, data, likelihood = ALL_CASES["mlp_tanh"]()
    options = {"likelihood": likelihood, "kinds": kinds, "k": 2, "damping": 0.1, "by": by}
    exact = fl.compare_kinds(model, data, **options)
    found = fl.compare_kinds(model, data, method="probes", num_probes=200, **options)
    assert found.attrs["method"] == "probes"
    assert found.attrs["num_matvecs"] >= 600
    for name in ("distance", "cosine", "scale", "scaled_distance", "trace_ratio"):
        error = found[f"{name}_sem"].values
        assert (np.abs(found[name] - exact[name]).values <= 5 * error + 1e-9).all(), name
        if name != "trace_ratio":  # over the trace of the Hessian, which is close to zero here
            assert error.max() < 0.2 * max(1.0, float(np.abs(exact[name]).max())), name
    for name in ("overlap", "natural_gradient_cosine"):
        assert np.allclose(found[name], exact[name], atol=1e-5), name
    count = found.sizes["rank"]
    assert count == 3
    known = exact["eigenvalue"].isel(rank=slice(0, count))
    assert np.allclose(found["eigenvalue"], known, atol=1e-6 * float(known.max()), equal_nan=True)
    same = [kind for kind in kinds if kind != "hessian"]
    assert np.allclose(found["trace"].sel(kind=same), exact["trace"].sel(kind=same), rtol=1e-10)


def test_a_large_hessian_is_probed_beside_exact_kinds(monkeypatch):
    model, data, likelihood = ALL_CASES["mlp_tanh"]()
    options = {"likelihood": likelihood, "kinds": ("exact", "hessian", "empirical"), "k": 2, "damping": 0.1}
    exact = fl.compare_kinds(model, data, **options)
    monkeypatch.setattr(importlib.import_module("fisherlens.spectrum.kinds_parts"), "DENSE_LIMIT", 10)
    found = fl.compare_kinds(model, data, num_probes=200, **options)
    assert found.attrs["method"] == "exact, Hessian by probes"
    fixed = {"kind_i": "exact", "kind_j": "empirical"}
    assert found["distance"].sel(fixed).item() == pytest.approx(exact["distance"].sel(fixed).item(), rel=1e-10)
    assert found["distance_sem"].sel(fixed).item() < 1e-12
    for name in ("distance", "cosine", "scale", "scaled_distance", "trace_ratio"):
        assert (np.abs(found[name] - exact[name]).values <= 5 * found[f"{name}_sem"].values + 1e-9).all(), name
    assert np.allclose(found["overlap"], exact["overlap"], atol=1e-5)


def test_auto_takes_probes_where_the_rows_do_not_fit(monkeypatch):
    model, data, likelihood = ALL_CASES["mlp_tanh"]()
    monkeypatch.setattr(importlib.import_module("fisherlens.spectrum.kinds"), "fits", lambda F, members: False)
    assert fl.compare_kinds(model, data, likelihood=likelihood, k=2).attrs["method"] == "probes"
    with pytest.raises(MemoryBudgetError, match=r"method='exact' needs a matrix of order .* Use method='probes'"):
        fl.compare_kinds(model, data, likelihood=likelihood, method="exact")


def test_probes_refuse_what_would_not_fit():
    model, data, likelihood = ALL_CASES["mlp_tanh"]()
    with pytest.raises(MemoryBudgetError, match=r"keeps 5000 products .* Use fewer num_probes"):
        fl.compare_kinds(model, data, likelihood=likelihood, method="probes", num_probes=5000, memory="2MB")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"kinds": "exact"}, TypeError, r"kinds must be a list of names such as \['exact', 'empirical'\]; got 'exact'"),
        ({"kinds": ("exact", "emprical")}, InputError, "Unknown kind 'emprical'. Did you mean 'empirical'?"),
        ({"kinds": ("exact",)}, InputError, "kinds must name two or more different kinds"),
        ({"kinds": ("mc", "mc")}, InputError, "To compare draws of the mc kind give several seeds"),
        ({"k": 0}, InputError, "k must be an integer >= 1; got 0"),
        ({"mc_samples": 1.5}, InputError, "mc_samples must be an integer >= 1; got 1.5"),
        ({"num_probes": 2}, InputError, "num_probes must be an integer >= 3; got 2"),
        ({"by": "unit"}, InputError, "Unknown option by= 'unit'"),
        ({"method": "exakt"}, InputError, "Unknown method 'exakt'. Did you mean 'exact'?"),
        ({"seed": -1}, InputError, "seed must be an integer >= 0, or several different ones; got -1"),
        ({"seed": (1, 1)}, InputError, "several different ones"),
        ({"seed": ()}, InputError, "several different ones"),
        ({"damping": 0.0}, InputError, "damping must be a finite number > 0"),
        ({"likelihood": nn.CrossEntropyLoss()}, TypeError, "use likelihood='categorical'"),
    ],
)
def test_bad_options(options, error, text):
    model, data, likelihood = ALL_CASES["softmax_regression"]()
    with pytest.raises(error, match=text):
        fl.compare_kinds(model, data, **({"likelihood": likelihood} | options))


def test_nothing_of_the_user_changes():
    model, (x, y), likelihood = ALL_CASES["lenet"]()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fl.compare_kinds(model, (x, y), likelihood=likelihood, kinds=("exact", "mc", "hessian"), k=2, progress=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())


def test_result_survives_a_file(tmp_path):
    model, data, likelihood = ALL_CASES["softmax_regression"]()
    found = fl.compare_kinds(model, data, likelihood=likelihood, seed=(0, 1), k=2)
    fl.save(found, tmp_path / "kinds.nc")
    assert fl.load(tmp_path / "kinds.nc").identical(found)
    assert found.attrs["likelihood"] == "categorical"
    assert found.attrs["kind"] == "exact, mc, empirical"


# --- the picture -----------------------------------------------------------------------------------------------------


@pytest.fixture
def layered():
    case = ALL_CASES["lenet"]()
    yield fl.compare_kinds(*case[:2], likelihood=case[2], k=2, by="layer", seed=(0, 1))
    plt.close("all")


def test_plot_shows_numbers_and_what_to_judge_them_by(layered):
    before = layered.copy(deep=True)
    axes = fl.plot.kinds(layered)
    assert list(axes) == ["spectrum", "distance", "overlap"]
    whole = layered.sel(layer="all")
    texts = [text.get_text() for text in axes["distance"].texts]
    pair = {"kind_i": "exact", "kind_j": "mc"}
    assert f"{whole['distance'].sel(pair).item():.2f}" in texts
    small = f"± {whole['distance_spread'].sel(pair).item():.2f}\nlabel noise {whole['sampling_noise'].sel(kind='mc').item():.2f}"
    assert small in texts
    assert any(text.get_text().startswith("chance") for text in axes["overlap"].texts)
    assert [line.get_label() for line in axes["spectrum"].get_lines()] == ["exact", "mc", "empirical"]
    floor = whole["noise_floor"].values
    assert all((line.get_ydata() > low).all() for line, low in zip(axes["spectrum"].get_lines(), floor, strict=True))
    assert layered.identical(before)


def test_plot_options(layered):
    first = fl.plot.kinds(layered, layer="0", panels=["cosine"], show_noise=False)["cosine"]
    assert len(first.texts) == 9
    assert first.texts[1].get_text() == f"{layered['cosine'].sel(layer='0')[0, 1].item():.2f}"
    own = plt.figure().subplots(1, 2)
    given = fl.plot.kinds(layered, dict(zip(("distance", "overlap"), own, strict=True)), panels=["distance", "overlap"])
    assert given["overlap"] is own[1]
    quiet = fl.plot.kinds(layered.sel(layer="0"), panels=["spectrum"], legend=False, show_noise=False)["spectrum"]
    assert quiet.get_legend() is None
    assert not quiet.collections


def test_plot_errors(layered):
    with pytest.raises(InputError, match=r"Unknown panel 'overlaps'. Did you mean 'overlap'?"):
        fl.plot.kinds(layered, panels=["overlaps"])
    with pytest.raises(InputError, match="Unknown layer 'conv'"):
        fl.plot.kinds(layered, layer="conv")
    with pytest.raises(InputError, match="needs a result with several layers"):
        fl.plot.kinds(layered.sel(layer="0", drop=True), layer="0")
    with pytest.raises(InputError, match="axes lacks 'overlap'"):
        fl.plot.kinds(layered, {"spectrum": None, "distance": None})
    with pytest.raises(TypeError, match=r"plot.kinds draws an xarray Dataset; got dict"):
        fl.plot.kinds({})
    with pytest.raises(InputError, match="reads the variable 'distance'"):
        fl.plot.kinds(layered[["cosine"]], panels=["distance"])
    zero = layered.sel(layer="0").assign(eigenvalue=layered["eigenvalue"].sel(layer="0") * 0)
    with pytest.raises(InputError, match="no eigenvalue above zero"):
        fl.plot.kinds(zero)
