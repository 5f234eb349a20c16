"""The bootstrap over examples and labels: against replicates made the long way, and what it says of where variance comes from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fisher_checks import ZOO, case
from torch import nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.errors import InputError, MemoryBudgetError
from fisherlens.spectrum.bootstrap import bootstrap_functions, bootstrap_spectrum, replicate

DTYPE = torch.float64


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def sample(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=g, dtype=DTYPE), torch.randint(3, (n,), generator=g)


def redrawn(n: int, count: int, seed: int) -> np.ndarray:
    """The counts that the bootstrap draws, from the same generator."""
    generator = np.random.default_rng(seed)
    return np.stack([generator.multinomial(n, np.full(n, 1 / n)) for _ in range(count)])


@pytest.mark.parametrize("kind", ["exact", "empirical", "mc"])
@pytest.mark.parametrize("n", [6, 60])
def test_replicates_are_fishers_of_redrawn_data(kind, n, unchanged):
    """On the Gram side and on that of the columns: each replicate is the Fisher of the data with examples repeated."""
    model, (x, y) = network(), sample(n, 1)
    options = {"likelihood": "categorical", "kind": kind, "mc_samples": 1}
    F = fl.Fisher(model, (x, y), **options)
    assert (F.n_rows < F.n_params) == (n == 6)
    with unchanged(model):
        found = replicate(F, 5, seed=3)
    for counts, row in zip(redrawn(n, 5, 3), found.examples, strict=True):
        if kind == "mc":  # labels stay with their examples
            rows = F.scores.rows_at(torch.arange(n)).double()
            truth = torch.linalg.eigvalsh((rows * torch.from_numpy(counts).double()[:, None]).T @ rows / n).flip(0)
        else:
            again = torch.from_numpy(np.repeat(np.arange(n), counts))
            truth = reference.spectrum(reference.fisher(model, (x[again], y[again]), "categorical", kind))
        truth = truth[: len(row)].clamp(min=0).numpy()
        assert row == pytest.approx(truth, abs=1e-12 * truth[0])
    assert found.point == pytest.approx(fl.spectrum(F)["eigenvalue"].values, abs=1e-12)
    assert (found.labels is None, found.draws) == (True, 1 if kind == "mc" else 0)


def test_weights_and_ignored_examples():
    model, (x, y) = network(), sample(12, 2)
    y = y.clone()
    y[[3, 7]] = -100
    likelihood = fl.Categorical(weight=[0.5, 1.0, 3.0])
    F = fl.Fisher(model, (x, y), likelihood=likelihood)
    found = replicate(F, 4, seed=0)
    kept = np.flatnonzero(y.numpy() != -100)
    for counts, row in zip(redrawn(10, 4, 0), found.examples, strict=True):
        again = torch.from_numpy(np.repeat(kept, counts))
        truth = reference.spectrum(reference.fisher(model, (x[again], y[again]), likelihood))
        assert row == pytest.approx(truth[: len(row)].clamp(min=0).numpy(), abs=1e-12 * truth[0].item())


@pytest.mark.parametrize("name", ["segmentation", "gaussian_image", "batchnorm_2d"])
def test_all_rows_of_an_example_go_together(name):
    c = case(name)
    found = replicate(c.fisher(), 3, seed=1)
    x, y = c.data
    for counts, row in zip(redrawn(len(x), 3, 1), found.examples, strict=True):
        again = torch.from_numpy(np.repeat(np.arange(len(x)), counts))
        truth = reference.spectrum(reference.fisher(c.model, (x[again], y[again]), c.likelihood))
        assert row == pytest.approx(truth[: len(row)].clamp(min=0).numpy(), abs=1e-10 * truth[0].item())


def test_blocks_see_the_same_draws():
    c = case("mlp_tanh")
    F = c.fisher()
    eigenvalue = fl.spectrum(F, by="layer")["eigenvalue"].values
    index = [torch.arange(layer.start, layer.stop) for layer in F.layout.layers]
    found = bootstrap_spectrum(F, eigenvalue, 40, seed=5, blocks=[*index, None])
    assert found["eigenvalue_low"][1].shape == eigenvalue.shape
    for place, name in enumerate(F.layout.layer_names):
        part = bootstrap_spectrum(F.restrict(name), eigenvalue[place], 40, seed=5)
        for key in ("eigenvalue_sem", "eigenvalue_low", "trace_high"):
            assert found[key][1][place] == pytest.approx(part[key][1], rel=1e-6, abs=1e-9, nan_ok=True)
    whole = bootstrap_spectrum(F, fl.spectrum(F)["eigenvalue"].values, 40, seed=5)
    assert whole["trace_low"][1] == pytest.approx(found["trace_low"][1][-1])
    assert whole["trace_low"][0] == ()
    assert whole["eigenvalue_low"][0] == ("rank",)
    assert "95 % bootstrap interval over examples, indicative" in whole["trace_low"][2]["long_name"]


@pytest.mark.parametrize("by", [None, "layer", "unit"])
def test_through_the_spectrum(by, unchanged, tmp_path):
    c = case("mlp_tanh")
    F = fl.Fisher(c.model, c.data, likelihood=c.likelihood, kind="mc", mc_samples=2)
    plain = fl.spectrum(F, by=by)
    with unchanged(c.model):
        ds = fl.spectrum(F, by=by, bootstrap=25, seed=1)
    assert ds["eigenvalue_low"].dims == ds["eigenvalue"].dims
    assert ds["trace_sem"].dims == ds["trace"].dims
    assert ds[list(plain.data_vars)].drop_attrs().identical(plain.drop_attrs())
    shown = ds["eigenvalue_low"].notnull()
    assert shown.isel(rank=0).all()
    assert (ds["eigenvalue_low"] < ds["eigenvalue_high"]).where(shown, True).all()
    assert ds["trace_label_share"].min() >= 0
    assert ds["trace_label_share"].max() <= 1
    assert ds.identical(fl.spectrum(F, by=by, bootstrap=25, seed=1).assign_attrs(created_at=ds.attrs["created_at"]))
    assert not ds["trace_sem"].identical(fl.spectrum(F, by=by, bootstrap=25, seed=2)["trace_sem"])
    fl.save(ds, tmp_path / "spectrum.nc")
    assert fl.load(tmp_path / "spectrum.nc").identical(ds)
    with pytest.raises(InputError, match="bootstrap=3 replicates say nothing"):
        fl.spectrum(F, by=by, bootstrap=3)


@pytest.mark.parametrize("function", [fl.effective_dimension, fl.log_determinant])
def test_through_functions_of_the_spectrum(function):
    F = fl.Fisher(network(), sample(40, 3), likelihood="categorical", kind="mc", mc_samples=2)
    found, whole = (
        function(F, [1e-3, 0.1], bootstrap=30, seed=2),
        fl.spectral_summary(F, damping=[1e-3, 0.1], bootstrap=30, seed=2),
    )
    name = function.__name__
    assert found.values == pytest.approx(whole[name].values)
    for end in ("low", "high"):
        assert found[f"data_{end}"].values == pytest.approx(whole[f"{name}_data_{end}"].values)
    for part, source in (("data", "data"), ("label", "labels")):
        assert found[f"{part}_variance"].values == pytest.approx(whole[f"{name}_variance"].sel(source=source).values)
    assert function(F, 0.1, bootstrap=30)["data_low"].ndim == 0
    with pytest.raises(InputError, match="but Dataset knows no examples"):
        function(fl.spectrum(F), 0.1, bootstrap=30)
    with pytest.raises(InputError, match="bootstrap must be an integer >= 0"):
        function(F, 0.1, bootstrap=-2)


def test_intervals_shrink_with_the_sample_and_widen_with_confidence():
    model = network()
    widths = []
    for n, confidence in ((25, 0.95), (400, 0.95), (400, 0.5)):
        F = fl.Fisher(model, sample(n, 4), likelihood="categorical")
        found = bootstrap_spectrum(F, fl.spectrum(F)["eigenvalue"].values, 100, confidence=confidence)
        low, high, sem = (found[f"trace_{key}"][1] for key in ("low", "high", "sem"))
        assert low < F.trace() < high
        assert np.isfinite(found["eigenvalue_low"][1][:5]).all()
        assert (found["eigenvalue_low"][1][:5] < found["eigenvalue_high"][1][:5]).all()
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.35)
    assert widths[2] < 0.5 * widths[1]
    # the standard error of the trace is that of a mean over examples
    single = (F.scores.rows_at(torch.arange(F.scores.rows)).square().sum(1).view(400, -1).sum(1)).numpy()
    assert sem == pytest.approx(single.std() / 20, rel=0.2)


def test_variance_over_labels_and_over_data():
    """Against what many examples with many draws each say: with 4 draws per example the two parts of the trace's variance are told apart."""
    model, n, draws = network(), 100, 4
    many = fl.Fisher(model, sample(1000, 6), likelihood="categorical", kind="mc", mc_samples=40)
    single = 40 * many.scores.rows_at(torch.arange(many.scores.rows)).square().sum(1).view(1000, 40)
    labels = single.var(1).mean().item() / draws / n
    data = (single.mean(1).var().item() - single.var(1).mean().item() / 40) / n
    told = []
    for seed in range(12):
        F = fl.Fisher(model, sample(n, 1000 + seed), likelihood="categorical", kind="mc", mc_samples=draws, seed=seed)
        found = bootstrap_functions(F, {"trace": lambda values: values.sum(-1)}, 150, seed, 0.95)["trace"]
        told.append((found["data"], found["labels"]))
    data_part, label_part = np.mean(told, axis=0)
    assert label_part == pytest.approx(labels, rel=0.25)
    assert data_part == pytest.approx(data, rel=0.25)
    assert 0.1 < label_part / data_part < 10  # neither part is negligible here


def test_one_draw_cannot_be_split_and_other_kinds_have_no_labels():
    model, data = network(), sample(20, 7)
    functional = {"trace": lambda values: values.sum(-1)}
    one = bootstrap_functions(fl.Fisher(model, data, likelihood="categorical", kind="mc"), functional, 20, 0, 0.95)[
        "trace"
    ]
    assert np.isnan(one["labels"])
    assert one["data"] > 0
    exact = bootstrap_functions(fl.Fisher(model, data, likelihood="categorical"), functional, 20, 0, 0.95)["trace"]
    assert exact["labels"] == 0
    assert exact["data"] > 0


def test_the_summary_says_where_the_variance_comes_from():
    model, data = network(), sample(40, 8)
    F = fl.Fisher(model, data, likelihood="categorical", kind="mc", mc_samples=3)
    ds = fl.spectral_summary(F, damping=[1e-3, 0.1], bootstrap=40, method="quadrature", num_probes=5, num_matvecs=10)
    assert list(ds["source"].values) == ["probes", "data", "labels"]
    for name in ("trace", "squared_norm", "participation_ratio", "effective_dimension", "log_determinant"):
        variance = ds[f"{name}_variance"]
        assert variance.sel(source="probes").values == pytest.approx(ds[f"{name}_sem"].values ** 2)
        assert (variance.sel(source=["data", "labels"]) > 0).all()
        assert (ds[f"{name}_data_low"] < ds[f"{name}_data_high"]).all()
    assert ds["trace_variance"].sel(source="probes") == 0  # exact
    assert ds["squared_norm_variance"].attrs["units"] == "nat⁴"
    again = fl.spectral_summary(F, damping=[1e-3, 0.1], bootstrap=40, method="quadrature", num_probes=5, num_matvecs=10)
    assert again.drop_attrs().identical(ds.drop_attrs())


def test_eigenvalues_that_a_replicate_may_lack_have_no_interval():
    """Six examples, of which a replicate sees four: nothing is known of the smallest eigenvalues of other samples."""
    F = fl.Fisher(network(), sample(6, 9), likelihood="categorical")
    found = bootstrap_spectrum(F, fl.spectrum(F)["eigenvalue"].values, 50)
    assert np.isfinite(found["eigenvalue_low"][1][:2]).all()
    assert np.isnan(found["eigenvalue_low"][1][-3:]).all()
    assert np.isnan(found["eigenvalue_high"][1][-3:]).all()
    zero = case("one_class").fisher()
    assert np.isnan(bootstrap_spectrum(zero, fl.spectrum(zero)["eigenvalue"].values, 20)["trace_low"][1])


@pytest.mark.parametrize("name", list(ZOO)[::9])
def test_the_zoo(name):
    F = case(name, "mc").fisher()
    found = bootstrap_spectrum(F, fl.spectrum(F)["eigenvalue"].values, 20)
    assert {key: value[0] for key, value in found.items()}.keys() == {
        f"{what}_{part}" for what in ("eigenvalue", "trace") for part in ("low", "high", "sem", "label_share")
    }


def test_what_is_refused(monkeypatch):
    c = case("mlp_tanh")
    F = c.fisher()
    values = fl.spectrum(F)["eigenvalue"].values
    for bad, text in (
        (-1, "bootstrap must be an integer >= 0"),
        (5, "bootstrap=5 replicates say nothing of the tails"),
    ):
        with pytest.raises(InputError, match=text):
            bootstrap_spectrum(F, values, bad)
    with pytest.raises(InputError, match="confidence must be a number between 0 and 1"):
        bootstrap_spectrum(F, values, 20, confidence=1.0)
    blocks = fl.BlockDiagonal(F, "layer")
    with pytest.raises(
        InputError, match="bootstrap= draws the examples of a Fisher anew, but BlockDiagonal knows no examples"
    ):
        fl.spectral_summary(blocks, bootstrap=20)
    H = fl.Fisher(c.model, c.data, likelihood=c.likelihood, kind="hessian")
    with pytest.raises(InputError, match="This needs score rows"):
        fl.spectral_summary(H, damping=None, bootstrap=20)
    single = fl.Fisher(network(), sample(1, 0), likelihood="categorical")
    with pytest.raises(InputError, match="needs at least two examples with weight; this Fisher has 1"):
        bootstrap_spectrum(single, fl.spectrum(single)["eigenvalue"].values, 20)
    wide = fl.Fisher(
        nn.Linear(700, 3).double(),
        (torch.randn(701, 700, generator=torch.Generator().manual_seed(0)).double(), None),
        likelihood="gaussian",
    )
    wide.memory = 10**6
    with pytest.raises(MemoryBudgetError, match="The bootstrap works on 2103 score rows at once"):
        replicate(wide, 20, 0)


def test_scores_that_are_not_kept():
    """The weights of the examples are known whatever is kept."""
    c = case("mlp_tanh")
    kept, streamed = c.fisher(), c.fisher(memory=1200)
    assert streamed.plan.streamed
    for F in (kept, streamed):
        assert replicate(F, 20, 0).n_data == kept.n_data
    found, truth = (fl.spectrum(F, bootstrap=20) for F in (streamed, kept))
    for name in ("eigenvalue_low", "eigenvalue_sem", "trace_high"):
        np.testing.assert_allclose(found[name], truth[name], rtol=1e-8, atol=1e-12)
    with pytest.raises(InputError, match="seed must be an integer >= 0, of the bootstrap; got -1"):
        fl.spectrum(kept, bootstrap=20, seed=-1)
