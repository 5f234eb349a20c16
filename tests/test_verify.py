"""Claims where the truth is known: each is reported true, and false where the operator is made wrong; and what surrounds them."""

from __future__ import annotations

import json
import math

import matplotlib as mpl
import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from conftest import snapshot

mpl.use("Agg")

import fisherlens as fl
from fisherlens import reference
from fisherlens.errors import InputError, NumericalWarning
from fisherlens.training import synthetic
from fisherlens.training.verify import Claim, Curve, Row, Subject, at_least, at_most, equal, order, run
from fisherlens.training.verify import metric as metric_module
from fisherlens.training.verify import stability as stability_module
from fisherlens.training.verify.claim import rank_correlation
from fisherlens.training.verify.thresholds import bisect, grows, largest_stable_rate

MINE = ("metric", "stability", "one_step")


@pytest.fixture(scope="module")
def line():
    return fl.problem("linear-gaussian", num_train=60)


@pytest.fixture(scope="module")
def truth(line):
    return fl.verify(line, MINE, seeds=2, damping=0.3, progress=False)


def tiny(seed=0, likelihood="categorical"):
    """A smooth network on noise: quadratic near its parameters only, and with a Hessian that is not F."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(30, 4, generator=generator)
    y = torch.arange(30) % 3
    make = lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))  # noqa: E731
    return fl.Problem("tiny", "Noise.", make, (x, y), (x, y), likelihood, batch_size=10)


# --- deciding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "pairs", "tolerance", "holds", "decided"),
    [
        (equal, [(2, 2.02), (3, 3.01), (4, 3.99)], 0.02, True, True),
        (equal, [(2, 2.4), (3, 3.7), (4, 4.9)], 0.02, False, True),
        (equal, [(2, 2.0), (3, 3.6), (4, 3.9)], 0.05, False, False),  # the interval holds a boundary
        (equal, [(2, 1.6)], 0.1, False, True),  # one seed is decided as it stands
        (equal, [(math.inf, math.inf)], 0.0, True, True),
        (equal, [(1.0, math.inf)], 0.9, False, True),
        (equal, [(0.0, 0.0)], 0.0, True, True),
        (equal, [(math.nan, 1.0)], 0.5, False, False),
        (at_least, [(1, 5), (1, 7), (1, 9)], 0.0, True, True),
        (at_least, [(1, 0.5), (1, 0.4), (1, 0.45)], 0.1, False, True),
        (at_least, [(1, 0.2), (1, 3), (1, 3)], 0.0, False, False),
        (at_most, [(1, 0.2), (1, 0.3), (1, 0.1)], 0.0, True, True),
        (at_most, [(1, 2), (1, 2.1), (1, 1.9)], 0.1, False, True),
    ],
)
def test_relations_decide_with_the_uncertainty_over_seeds(make, pairs, tolerance, holds, decided):
    row = make("claim/case", "Words.", pairs, tolerance)
    assert (row.holds, row.decided) == (holds, decided)
    assert ("undecided" in row.note) == (not decided)
    assert len(row.per_seed) == len(pairs)


def test_order_is_spearmans_over_seeds():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 40, 30]) == 0.8
    assert rank_correlation([1, 2, 2, 4], [1, 5, 5, math.inf]) == 1.0
    assert math.isnan(rank_correlation([1, 2, 3], [5, 5, 5]))
    assert math.isnan(rank_correlation([1, 2, math.nan], [1, 2, 3]))
    same, other = ([1, 2, 3, 4], [1, 2, 3, 4]), ([1, 2, 3, 4], [4, 3, 2, 1])
    assert order("a/b", "Words.", [same, same, same], 0.7).holds
    refuted = order("a/b", "Words.", [other, other, other], 0.7)
    assert (refuted.holds, refuted.decided, refuted.measured) == (False, True, -1.0)
    assert not order("a/b", "Words.", [same, other, same], 0.7).decided
    with pytest.raises(InputError, match=r"Two lists of equal length are ranked; got shapes \(2,\) and \(3,\)"):
        rank_correlation([1, 2], [1, 2, 3])


def test_rows_refuse_what_no_table_could_show():
    with pytest.raises(InputError, match="is named claim/case, such as 'metric/top'; got 'metric'"):
        Row("metric", "", 1, 1, 0, True, "equal")
    with pytest.raises(InputError, match="The relation of a row is one of equal, at least, at most, order; got 'near'"):
        Row("a/b", "", 1, 1, 0, True, "near")


# --- thresholds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preconditioned", [False, True])
def test_largest_stable_rate_is_that_of_the_dense_matrices(preconditioned):
    generator = torch.Generator().manual_seed(4)
    root = torch.randn(8, 12, generator=generator, dtype=torch.float64)
    F = root @ root.T
    P = torch.diag(F.diagonal()) + 0.1 * torch.eye(8, dtype=torch.float64) if preconditioned else torch.eye(8).double()
    start = torch.randn(8, generator=generator, dtype=torch.float64)
    inverse = torch.linalg.inv(P)
    found = largest_stable_rate(
        lambda v: F @ v,
        lambda c: inverse @ c,
        start,
        length=1.0,
        warm_up=60,
        steps=60,
        precision=1e-4,
        definite=True,
    )
    expected = reference.stable_rate(F, P)
    assert found == pytest.approx(expected, rel=1e-3)
    for rate in (0.99 * expected, 1.01 * expected):
        slow = reference.energies(F, start, rate, 400, P)
        assert (slow[-1] > slow[-100]) == (rate > expected)
        assert grows(rate, lambda v: F @ v, lambda c: inverse @ c, start, 400) == (rate > expected)


def test_negative_curvature_is_no_divergence():
    H = torch.diag(torch.tensor([1.0, 0.3, -2.0], dtype=torch.float64))
    start = torch.ones(3, dtype=torch.float64)
    options = {"length": 1.0, "warm_up": 40, "steps": 10, "precision": 1e-4, "definite": False}
    assert largest_stable_rate(lambda v: H @ v, lambda c: c, start, **options) == pytest.approx(2.0, rel=1e-3)
    assert largest_stable_rate(lambda v: -v, lambda c: c, start, **options) == math.inf


def test_bisection_ends_where_there_is_no_threshold():
    assert bisect(lambda rate: False, 1.0, 0.01) == math.inf
    assert bisect(lambda rate: True, 1.0, 0.01) == 0.0
    assert bisect(lambda rate: rate > 37.0, 1.0, 0.01) == pytest.approx(37.0, rel=0.01)


# --- closed form -----------------------------------------------------------------------------------------------------


def test_every_claim_holds_where_the_model_is_quadratic(truth):
    assert truth.holds.values.tolist() == [True] * truth.sizes["claim"], truth.claim[~truth.holds].values
    assert truth.decided.all()


def test_the_metric_is_exact_at_every_length(truth):
    found = truth.metric_divergence.mean("metric_sign")
    where = truth.metric_length > 1e-5
    np.testing.assert_allclose(found.where(where, drop=True), truth.metric_quadratic.where(where, drop=True), rtol=1e-8)
    assert "no end up to length 100" in str(truth.note.sel(claim="metric/reach-top").values)


def test_rates_and_curvatures_are_those_of_the_known_fisher(line, truth):
    for seed in (0, 1):
        F = synthetic.known_fisher(line, line.model(seed))
        eye = torch.eye(len(F), dtype=torch.float64)
        values = torch.linalg.eigvalsh(F)
        expected = {"metric/top": values[-1].item(), "metric/bottom": values[0].item()}
        expected |= {
            "stability/sgd": reference.stable_rate(F),
            "stability/ngd": reference.stable_rate(F, F + 0.3 * eye),
        }
        for name, value in expected.items():
            for variable in ("predicted_by_seed", "measured_by_seed"):
                assert float(truth[variable].sel(claim=name, seed=seed)) == pytest.approx(value, rel=5e-3), (
                    name,
                    variable,
                )
            assert float(truth.predicted_by_seed.sel(claim=name, seed=seed)) == pytest.approx(value, rel=1e-8)


def test_one_step_decreases_by_exactly_what_is_promised(line, truth):
    promised, happened = truth.one_step_promised, truth.one_step_happened
    np.testing.assert_allclose(happened, promised, rtol=1e-8, atol=1e-13)
    subject = Subject(line, 0)
    F, g = synthetic.known_fisher(line, subject.model), subject.gradient
    best = promised.sel(seed=0, one_step_fraction=1.0)
    gradient = reference.promised_decrease(F, g, g, 1e-15)
    assert float(best.sel(one_step_preconditioner="gradient")) == pytest.approx(gradient, rel=1e-9)
    natural = reference.promised_decrease(F, g, reference.solve(F, g, 0.3), 1e-15)
    assert float(best.sel(one_step_preconditioner="ngd")) == pytest.approx(natural, rel=1e-8)


class Scaled:
    """c F, as an operator that knows nothing else."""

    def __init__(self, F, c):
        self.F, self.c, self.shape, self.dtype, self.device = F, c, F.shape, F.dtype, F.device

    def __matmul__(self, v):
        return self.c * (self.F @ v)


def shuffled(model, data, likelihood):
    F = fl.Fisher(model, data, likelihood=likelihood)
    place = torch.randperm(F.n_params, generator=torch.Generator().manual_seed(3))
    back = torch.argsort(place)
    return fl.Operator(lambda v: (F @ v[place])[back], F.n_params)


@pytest.mark.parametrize("operator", [lambda F: Scaled(F, 2.0), shuffled], ids=["scaled", "shuffled"])
def test_a_wrong_operator_makes_claims_false(line, operator):
    found = fl.verify(line, MINE, operator=operator, seeds=2, damping=0.3)
    holds = dict(zip(found.claim.values.tolist(), found.holds.values.tolist(), strict=True))
    assert not any(holds[f"metric/{name}"] for name in ("top", "middle", "bottom"))
    assert not holds["one_step/gradient"]
    if operator is not shuffled:  # a permutation of rows and columns has the same eigenvalues, so the same rates
        false = ("sgd-quadratic", "sgd", "sgd-training", "ngd-quadratic", "block-layer-quadratic", "block-unit")
        assert not any(holds[f"stability/{name}"] for name in false)
        assert float(found.predicted.sel(claim="stability/sgd")) == pytest.approx(
            float(found.measured.sel(claim="stability/sgd")) / 2, rel=0.01
        )
    else:
        assert not holds["stability/block-unit-quadratic"]
    assert holds["stability/sgd-hessian"]  # which no operator replaces
    assert found.measured.sel(claim="stability/sgd-quadratic").notnull()


def test_measured_numbers_do_not_depend_on_the_operator(line, truth):
    found = fl.verify(line, MINE[:2], operator=lambda F: Scaled(F, 3.0), seeds=1, damping=0.3)
    names = [name for name in found.claim.values.tolist() if name.startswith(("stability", "metric"))]
    names = [name for name in names if "reach" not in name and "training" not in name]
    xr.testing.assert_allclose(
        found.measured_by_seed.sel(claim=names), truth.measured_by_seed.sel(claim=names, seed=[0]), rtol=1e-6
    )


# --- a network that is not quadratic ---------------------------------------------------------------------------------


def test_a_network_is_quadratic_near_its_parameters_and_its_hessian_governs():
    found = fl.verify(tiny(), ("metric", "stability"), seeds=2, num_examples=20)
    holds = dict(zip(found.claim.values.tolist(), found.holds.values.tolist(), strict=True))
    assert all(holds[f"metric/{name}"] for name in ("top", "middle", "bottom"))
    assert all(holds[f"stability/{name}-quadratic"] for name in ("sgd", "ngd", "block-layer", "block-unit"))
    assert holds["stability/sgd-hessian"]
    predicted, measured = found.predicted_by_seed, found.measured_by_seed
    by_fisher = np.abs(measured.sel(claim="stability/sgd") / predicted.sel(claim="stability/sgd") - 1)
    by_hessian = np.abs(measured.sel(claim="stability/sgd-hessian") / predicted.sel(claim="stability/sgd-hessian") - 1)
    assert float(by_hessian.max()) < 5e-3 < float(by_fisher.max())
    assert found.attrs["dtype"] == "float64"
    # far out the divergence leaves the quadratic form, which the linear problem never does
    ratio = found.metric_divergence.isel(metric_length=-1, metric_sign=0) / found.metric_quadratic.isel(
        metric_length=-1
    )
    assert float(ratio.sel(metric_direction="top").max()) < 0.5


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_every_likelihood(likelihood):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 3, generator=generator)
    y = torch.arange(20) % 2 if likelihood == "categorical" else torch.rand(20, 2, generator=generator).round()
    problem = fl.Problem("own", "Noise.", lambda: nn.Linear(3, 2), (x, y), (x, y), likelihood, batch_size=20)
    found = fl.verify(problem, ("metric", "one_step"), seeds=2)
    assert found.holds.sel(claim=["metric/top", "metric/middle", "metric/bottom"]).all()
    assert found.attrs["likelihood"] == likelihood


def test_kinds_predict_and_the_empirical_one_is_no_metric():
    exact, empirical = (fl.verify(tiny(), "metric", seeds=2, kind=kind) for kind in ("exact", "empirical"))
    assert bool(exact.holds.sel(claim="metric/top"))
    assert not bool(empirical.holds.sel(claim="metric/top"))
    assert empirical.attrs["kind"] == "empirical"
    np.testing.assert_array_equal(exact.measured_by_seed[:3], empirical.measured_by_seed[:3])


# --- the result and its surroundings ---------------------------------------------------------------------------------


def test_result_is_labelled_and_survives_a_file(truth, tmp_path):
    assert truth.sizes["seed"] == 2
    assert set(truth.relation.values) == {"equal", "at least", "order"}
    assert truth.attrs["problem"] == "linear-gaussian"
    assert not bool(truth.interrupted)
    fl.save(truth, tmp_path / "verify.nc")
    back = fl.load(tmp_path / "verify.nc")
    xr.testing.assert_equal(back, truth)
    assert back.attrs["settings"] == truth.attrs["settings"]


def test_a_row_can_be_asked_for_by_its_name(line):
    found = fl.verify(line, ["one_step/order", "metric/top"], seeds=1)
    assert found.claim.values.tolist() == ["metric/top", "one_step/order"]
    assert found.attrs["n_data"] == 60  # all of them, where there are few


def test_few_examples_where_outputs_are_many():
    x = torch.rand(300, 40, generator=torch.Generator().manual_seed(2))
    wide = fl.Problem("wide", "Itself.", lambda: nn.Linear(40, 40), (x, x), (x, x), "bernoulli")
    assert Subject(wide).num_examples == 2500 // 40
    assert Subject(wide, num_examples=90).num_examples == 90
    assert len(Subject(wide).data[0]) == 62


def test_two_runs_agree_and_nothing_outside_changes(line):
    model = line.model(0)
    held = fl.Problem("held", "Returns one and the same model.", lambda: model, line.train, line.test, line.likelihood)
    before = snapshot(model)
    first, second = (fl.verify(held, ("metric", "one_step"), seeds=1) for _ in range(2))
    assert snapshot(model) == before
    xr.testing.assert_identical(first.drop_attrs(), second.drop_attrs())


def test_ctrl_c_keeps_the_claims_that_are_finished(line, monkeypatch):
    def stop(subjects):
        raise KeyboardInterrupt

    monkeypatch.setattr(stability_module, "stability", stop)
    found = fl.verify(line, MINE, seeds=1)
    assert bool(found.interrupted)
    assert {name.split("/")[0] for name in found.claim.values.tolist()} == {"metric"}
    with pytest.raises(KeyboardInterrupt):
        fl.verify(line, "stability", seeds=1)


def test_a_claim_that_the_problem_does_not_admit_is_left_out(line, monkeypatch):
    def refuse(subjects):
        message = "There is nothing to check here."
        raise InputError(message)

    monkeypatch.setattr(metric_module, "metric", refuse)
    with pytest.warns(NumericalWarning, match=r"The claim 'metric' was not checked: There is nothing to check here\."):
        found = fl.verify(line, ("metric", "one_step"), seeds=1)
    assert {name.split("/")[0] for name in found.claim.values.tolist()} == {"one_step"}
    assert found.attrs["skipped"] == '{"metric": "There is nothing to check here."}'
    with pytest.raises(InputError, match="There is nothing to check here"):
        fl.verify(line, "metric", seeds=1)


def test_claims_that_train_are_left_out_where_the_loss_is_not_known():
    x = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    data = (x, x[:, :1].sin())
    problem = fl.Problem(
        "noisy", "Mean and variance.", lambda: nn.Linear(2, 2), data, data, fl.HeteroscedasticGaussian()
    )
    with pytest.warns(NumericalWarning, match="was not checked: The claim needs the loss of 'heteroscedastic"):
        found = fl.verify(problem, ("metric", "convergence", "sharing"), seeds=1)
    assert {name.split("/")[0] for name in found.claim.values.tolist()} == {"metric"}
    assert set(json.loads(found.attrs["skipped"])) == {"convergence", "sharing"}


def test_series_of_claims_do_not_overwrite_each_other(line, monkeypatch):
    words = {"long_name": "something", "units": "1"}
    row = equal("metric/x", "Words.", [(1, 1)], 0.1)

    def claim(label, dim, values):
        return lambda subjects: Claim((row,), {label: Curve((dim,), values, words, {dim: values})})

    monkeypatch.setattr(metric_module, "metric", claim("one_step_promised", "a", [1.0]))
    with pytest.raises(InputError, match="calls a series 'one_step_promised', which is taken"):
        fl.verify(line, ("metric", "one_step"), seeds=1)
    monkeypatch.setattr(metric_module, "metric", claim("mine", "one_step_fraction", [1.0]))
    with pytest.raises(InputError, match="gives the dim 'one_step_fraction' of 'one_step_promised' other labels"):
        fl.verify(line, ("metric", "one_step"), seeds=1)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"claims": "metrc"}, InputError, "Unknown claim 'metrc'. Did you mean 'metric'?"),
        ({"claims": ["metric/tip"]}, InputError, "Unknown claim 'metric/tip'. Did you mean 'metric/top'?"),
        ({"claims": []}, InputError, "claims must name at least one claim; got none"),
        ({"preset": "quik"}, InputError, "Unknown preset 'quik'. Did you mean 'quick'?"),
        ({"kind": "hessian"}, InputError, "Unknown kind 'hessian'"),
        ({"seeds": 0}, InputError, "at least one seed, each once; got 0"),
        ({"seeds": [1, 1]}, InputError, r"at least one seed, each once; got \[1, 1\]"),
        ({"seeds": [0.5]}, TypeError, r"Every seed must be an int; got float 0\.5 in \[0\.5\]\."),
        ({"claims": 5}, TypeError, "claims must be None, the name of a claim or a list of them; got int"),
        ({"damping": "x"}, InputError, "damping must be a finite number > 0; got 'x'"),
        ({"damping": True}, InputError, "damping must be a finite number > 0; got True"),
        ({"device": "cdua"}, InputError, "Unknown device 'cdua'"),
        ({"seeds": "3"}, TypeError, "seeds must be a number of seeds or a sequence of them; got str '3'"),
        ({"num_examples": 0}, InputError, "num_examples must be at least 1; got 0"),
        ({"damping": 0.0}, InputError, r"damping must be a finite number > 0; got 0\.0"),
        ({"operator": "F"}, TypeError, "operator must be an operator with @ .* got str"),
        ({"operator": lambda a, b: None}, TypeError, "operator must be an operator with @ .* got function"),
        ({"operator": lambda F: None}, TypeError, "got a function that returns NoneType"),
        ({"operator": torch.eye(3).double()}, InputError, r"must be of shape \(14, 14\), .* got \(3, 3\)"),
    ],
)
def test_bad_input(line, options, error, text):
    with pytest.raises(error, match=text):
        fl.verify(line, **({"claims": "metric", "seeds": 1} | options))


def test_problem_must_be_one():
    with pytest.raises(TypeError, match=r"problem must be a fl\.Problem or the name of one; got Linear"):
        fl.verify(nn.Linear(2, 1))
    with pytest.raises(InputError, match=r"Unknown problem 'digit-cnn'\. Did you mean 'digits-cnn'\?"):
        fl.verify("digit-cnn")


def test_a_network_without_gradient_flow_and_one_in_float32_only(line):
    x, y = torch.zeros(6, 3), torch.arange(6) % 2
    dead = fl.Problem("dead", "Zeros.", lambda: nn.Linear(3, 2, bias=False), (x, y), (x, y))
    with pytest.raises(InputError, match="The Fisher is zero: no parameter changes any output"):
        fl.verify(dead, "metric", seeds=1)

    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 2))

        def forward(self, x):
            return (x.float() - 0.5) @ self.weight.to(self.weight.dtype)

    problem = fl.Problem(
        "narrow", "One.", Narrow, (torch.eye(3).repeat(4, 1), (torch.arange(12) % 3 == 0).long()), (x, y)
    )
    with pytest.warns(NumericalWarning, match="does not run in float64"):
        found = fl.verify(problem, "one_step", seeds=1)
    assert found.attrs["dtype"] == "float32"
    assert found.holds.sel(claim="one_step/gradient")


def test_registry_is_in_the_order_of_the_claims():
    assert list(run.CLAIMS) == [
        "metric",
        "stability",
        "one_step",
        "convergence",
        "independence",
        "information",
        "sharing",
    ]
    assert all(callable(run.CLAIMS[name]) for name in MINE)
    with pytest.raises(KeyError):
        run.CLAIMS["other"]


def test_a_claim_without_memory_leaves_the_others(line, monkeypatch):
    def starve(subjects):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(stability_module, "stability", starve)
    with pytest.warns(NumericalWarning, match=r"The claim 'stability' was not checked: CUDA out of memory\."):
        found = fl.verify(line, MINE[:2], seeds=1)
    assert {name.split("/")[0] for name in found.claim.values.tolist()} == {"metric"}
