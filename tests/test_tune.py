"""Searches with equal budgets, and steps to targets."""

import json
import re
from functools import partial

import numpy as np
import pytest
import torch
import training_samples as samples
import xarray as xr
from torch import nn

import fisherlens as fl
from fisherlens.errors import InputError, NumericalWarning
from fisherlens.results import load, save
from fisherlens.training.devices import on_device
from fisherlens.training.record import Run
from fisherlens.training.search import best, judge
from fisherlens.training.targets import target_variables

EDGE = pytest.mark.filterwarnings("ignore:The best trial:fisherlens.errors.NumericalWarning")


def compare(entries=None, **options):
    setting = {"num_steps": 8, "seeds": 2, "batch_size": 8, "record_every": 2, "progress": False} | options
    return fl.compare_optimizers(samples.clouds(), entries or {"sgd": samples.sgd, "adam": samples.adam}, **setting)


GRID = {"sgd": {"lr": [0.001, 0.3, 1e9]}, "adam": {"lr": [1e-5, 0.05, 1e-4]}}


# --- the search -----------------------------------------------------------------------------------------------------


@EDGE
def test_the_whole_search_is_in_the_result(tmp_path):
    found = compare(tune=GRID)
    assert found.trial_options.dims == ("optimizer", "trial")
    assert found.option_lr.values.tolist() == [[0.001, 0.3, 1e9], [1e-5, 0.05, 1e-4]]
    assert found.trial_options.values[0].tolist() == ["lr=0.001", "lr=0.3", "lr=1e+09"]
    assert found.trial_chosen.values.tolist() == [[False, True, False]] * 2
    assert found.trial_diverged.values[1].tolist() == [False] * 3
    assert (found.trial_seconds.values > 0).all()
    settings = json.loads(found.attrs["settings"])
    assert settings["tune"] == {
        "criterion": "final",
        "metric": "train_loss",
        "num_steps": 8,
        "num_trials": None,
        "options": GRID,
        "record_every": 2,
        "seed": 0,
        "seeds": [1000],
    }
    # the scores are those of training with these options on the seed of the search, and the best one was then run
    again = fl.compare_optimizers(
        samples.clouds(), {"x": partial(samples.sgd, lr=0.001)}, num_steps=8, seeds=[1000], batch_size=8, progress=False
    )
    assert found.trial_score.values[0, 0] == again.train_loss.values[0, 0, -1]
    chosen = compare({"sgd": partial(samples.sgd, lr=0.3), "adam": partial(samples.adam, lr=0.05)})
    xr.testing.assert_equal(found.train_loss, chosen.train_loss)
    assert load(save(found, tmp_path / "run.nc")).identical(found)


def test_a_search_over_several_options_takes_every_combination():
    tune = fl.Tuning({"sgd": {"lr": [0.1, 0.2], "momentum": np.array([0.0, 0.5, 0.9])}})
    assert len(tune.trials("sgd")) == 6
    assert tune.trials("sgd")[4] == {"lr": 0.2, "momentum": 0.5}
    assert tune.trials("other") == [{}]


def test_random_searches_draw_the_same_for_all():
    space = {"a": {"lr": fl.LogUniform(1e-4, 1e-2)}, "b": {"lr": fl.LogUniform(1e-2, 1.0)}, "c": {"kind": ["x", "y"]}}
    tune = fl.Tuning(space, num_trials=200)
    a, b = (np.log10([trial["lr"] for trial in tune.trials(label)]) for label in "ab")
    np.testing.assert_allclose(a + 2, b, atol=1e-12)
    assert -4 < a.min() < -3.95
    assert -2.05 < a.max() < -2
    assert abs(a.mean() + 3) < 5 * 2 / 12**0.5 / 200**0.5  # evenly on the logarithmic scale
    assert tune.trials("a") == fl.Tuning(space, num_trials=200).trials("a")
    assert tune.trials("a") != fl.Tuning(space, num_trials=200, seed=1).trials("a")
    assert {trial["kind"] for trial in tune.trials("c")} == {"x", "y"}


def run(losses, *, diverged=False, interrupted=False, accuracy=None, steps_taken=None):
    losses = np.array(losses, float)
    made = Run("x", 0, np.arange(len(losses)) * 5, diverged=diverged, interrupted=interrupted)
    made.metrics["train_loss"] = losses
    made.metrics["test_accuracy"] = np.array(accuracy if accuracy is not None else losses * np.nan)
    made.metrics["seconds"] = np.arange(len(losses)) / 10
    made.steps_taken = made.steps[-1] if steps_taken is None else steps_taken
    return made


def chosen(tuning, *trials, targets=None):
    judged = [judge(tuning, {"lr": k}, runs, targets or {}) for k, runs in enumerate(trials)]
    return best(tuning, {"x": judged}).get("x"), judged


def wide(**options):
    return fl.Tuning({"x": {"lr": [-1, *range(9), 99]}}, **options)


def test_criteria():
    fast, deep = run([3, 0.5, 0.4, 0.4]), run([3, 2.0, 1.0, 0.3])
    assert chosen(wide(), [fast], [deep])[0] == 1
    assert chosen(wide(criterion="mean"), [fast], [deep])[0] == 0
    by_target = wide(criterion="target")
    place, judged = chosen(by_target, [deep], [fast], targets={"train_loss": 0.6})
    assert (place, judged[0].score, judged[1].score) == (1, 15.0, 5.0)
    # of those that do not arrive the lower one is better, and any that arrives is better than both
    high, low = run([3, 2, 2, 2]), run([3, 2, 2, 1.9])
    assert chosen(by_target, [high], [low], targets={"train_loss": 0.5})[0] == 1
    assert chosen(by_target, [high], [low], [deep], targets={"train_loss": 0.5})[0] == 2
    sure, unsure = run([1, 1], accuracy=[0.1, 0.9]), run([1, 0.5], accuracy=[0.1, 0.8])
    assert chosen(wide(metric="test_accuracy"), [unsure], [sure])[0] == 1
    # the mean over seeds decides
    assert chosen(wide(), [run([3, 1.0]), run([3, 1.0])], [run([3, 0.1]), run([3, 2.0])])[0] == 0


def test_the_first_of_equal_trials_is_taken():
    assert chosen(wide(), [run([3, 1.0])], [run([3, 0.5])], [run([3, 0.5])])[0] == 1


def test_divergence_is_worse_than_anything():
    bad = run([3, np.nan, np.nan], diverged=True, steps_taken=4)
    place, judged = chosen(wide(), [bad, run([3, 0.1, 0.1])], [run([3, 50, 99.0])] * 2)
    assert place == 1
    assert judged[0].diverged
    assert judged[0].score == np.inf
    longer = run([3, 2, np.nan], diverged=True, steps_taken=7)
    with pytest.warns(
        NumericalWarning, match=r"^Every trial of optimizer 'x' diverged; the one that lasted longest is .*lr=1\."
    ):
        assert chosen(wide(), [bad], [longer])[0] == 1


def test_unfinished_searches_choose_nothing():
    place, judged = chosen(wide(), [run([3, 1.0])], [run([3, np.nan], interrupted=True)])
    assert place is None
    assert np.isnan(judged[1].score)


def test_the_edge_of_a_search_is_flagged():
    text = "The best trial of optimizer 'sgd', lr=0.3, is at the edge of the search in lr: a better one may lie beyond. Search further there."
    with pytest.warns(NumericalWarning, match=f"^{re.escape(text)}$"):
        found = compare({"sgd": samples.sgd}, tune={"sgd": {"lr": [0.003, 0.01, 0.3]}})
    assert found.at_edge.values.tolist() == [True]
    assert not compare({"sgd": samples.sgd}, tune={"sgd": {"lr": [0.003, 0.3, 1e9]}}).at_edge.values.any()
    ranged = fl.Tuning({"x": {"lr": fl.LogUniform(1e-4, 1.0), "word": ["a", "b"], "flag": [False, True]}}, num_trials=3)
    middle = {"lr": 1e-2, "word": "a", "flag": True}
    assert ranged.edges("x", middle) == []
    assert ranged.edges("x", middle | {"lr": 0.5}) == ["lr"]
    assert ranged.edges("x", middle | {"lr": 2e-4}) == ["lr"]
    assert fl.Tuning({"x": {"lr": [0.1]}}).edges("x", {"lr": 0.1}) == []  # one value has no edge


@EDGE
def test_unequal_budgets_are_said():
    uneven = {"sgd": {"lr": [0.1, 0.3]}, "adam": {"lr": [0.01]}}
    text = r"^The optimizers get different numbers of trials: 'sgd' 2, 'adam' 1\. .*allow_unequal=True"
    with pytest.warns(NumericalWarning, match=text):
        found = compare(tune=uneven)
    assert found.trial_options.values.tolist() == [["lr=0.1", "lr=0.3"], ["lr=0.01", ""]]
    assert np.isnan(found.trial_score.values[1, 1])
    with pytest.warns(NumericalWarning, match="'sgd' 2, 'adam' 1"):  # an optimizer that is not named is tried once
        compare(tune={"sgd": {"lr": [0.1, 0.3]}})
    quiet = compare(tune=fl.Tuning({"sgd": {"lr": [0.01, 0.3, 1e9]}}, allow_unequal=True))
    assert quiet.trial_options.values[1].tolist() == [""] * 3
    assert not quiet.trial_chosen.values[1].any()
    assert quiet.train_loss.notnull().all()


def test_seeds_of_the_search_keep_off_the_reported():
    tune = fl.Tuning({"sgd": {"lr": [0.1]}}, seeds=2)
    assert tune.seeds_beside([0, 1]) == [1000, 1001]
    assert tune.seeds_beside([1000, 3]) == [1001, 1002]
    named = fl.Tuning({"sgd": {"lr": [0.1]}}, seeds=[1, 5])
    assert named.seeds_beside([0, 2]) == [1, 5]
    with pytest.warns(
        NumericalWarning, match=r"^Seeds \[1\] are both searched and reported, so the reported runs are better"
    ):
        assert named.seeds_beside([0, 1]) == [1, 5]


@EDGE
def test_shorter_trials_and_global_state():
    problem, before = samples.clouds(), torch.get_rng_state()
    data = [part.clone() for part in (*problem.train, *problem.test)]
    tune = fl.Tuning(GRID, num_steps=3, seeds=2, criterion="mean")
    found = fl.compare_optimizers(
        problem, {"sgd": samples.sgd, "adam": samples.adam}, num_steps=8, seeds=1, tune=tune, progress=False
    )
    assert json.loads(found.attrs["settings"])["tune"]["num_steps"] == 3
    assert found.step.values[-1] == 8
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, data, (*problem.train, *problem.test)))


def test_ctrl_c_in_a_search_keeps_it():
    class Stopped(torch.optim.SGD):
        def step(self, closure=None):
            if self.param_groups[0]["lr"] == 0.2:
                raise KeyboardInterrupt
            return super().step(closure)

    entries = {"x": lambda model, lr: Stopped(model.parameters(), lr=lr)}
    found = compare(entries, tune={"x": {"lr": [0.1, 0.2, 0.3]}})
    assert np.isfinite(found.trial_score.values).tolist() == [[True, False, False]]
    assert not found.trial_chosen.values.any()
    assert found.interrupted.values.all()
    assert found.train_loss.isnull().all()


# --- targets --------------------------------------------------------------------------------------------------------


def test_steps_to_targets():
    steps = np.array([0, 5, 10, 12])
    metrics = {
        "train_loss": np.array([[[2.0, 1.0, 0.5, 0.6], [2.0, 1.5, np.nan, np.nan]]]),
        "test_accuracy": np.array([[[0.1, 0.7, 0.6, 0.75], [0.1, 0.2, np.nan, np.nan]]]),
        "test_loss": np.full((1, 2, 4), np.nan),
        "seconds": np.array([[[0.0, 0.1, 0.2, 0.3], [0.0, 0.4, np.nan, np.nan]]]),
    }
    variables, coords = target_variables(steps, metrics, {"train_loss": 0.5, "test_accuracy": 0.2})
    assert coords["target"][1] == ["train_loss", "test_accuracy"]
    np.testing.assert_array_equal(variables["steps_to_target"][1], [[[10, np.nan]], [[5, 5]]])
    np.testing.assert_array_equal(variables["seconds_to_target"][1], [[[0.2, np.nan]], [[0.1, 0.4]]])
    assert variables["reached"][1].tolist() == [[[True, False]], [[True, True]]]  # before it diverged
    # 90 % of 0.75 is 0.675, first met at step 5; a run without an end has no final accuracy
    np.testing.assert_array_equal(variables["steps_to_own_accuracy"][1], [[5, np.nan]])
    np.testing.assert_array_equal(variables["seconds_to_own_accuracy"][1], [[0.1, np.nan]])


def test_targets_of_a_comparison(tmp_path):
    found = compare(num_steps=20, record_every=4, targets={"test_accuracy": 0.9, "train_loss": -1.0})
    assert found.steps_to_target.dims == ("target", "optimizer", "seed")
    for label in ("sgd", "adam"):
        for seed in (0, 1):
            curve = found.test_accuracy.sel(optimizer=label, seed=seed)
            there = curve.step.values[curve.values >= 0.9]
            taken = float(found.steps_to_target.sel(target="test_accuracy", optimizer=label, seed=seed))
            assert (taken == there[0]) if len(there) else np.isnan(taken)
    assert found.reached.sel(target="test_accuracy", optimizer="sgd").all()
    assert not found.reached.sel(target="train_loss").any()
    assert (found.attrs["step_resolution"], found.attrs["own_accuracy_share"]) == (4, 0.9)
    assert load(save(found, tmp_path / "run.nc")).identical(found)


def test_targets_come_from_the_problem():
    goals = {"train_loss": 0.5, "test_accuracy": 0.9}
    problem = samples.clouds(targets=goals)
    found = fl.compare_optimizers(problem, {"sgd": samples.sgd}, num_steps=2, seeds=1, progress=False)
    assert dict(zip(found.target.values.tolist(), found.target_value.values.tolist(), strict=True)) == goals
    none = fl.compare_optimizers(problem, {"sgd": samples.sgd}, num_steps=2, seeds=1, targets={}, progress=False)
    assert "target" not in none.dims


def test_bad_targets_are_named():
    with pytest.raises(InputError, match=r"^Unknown target 'test_acuracy'\. Did you mean 'test_accuracy'"):
        compare(targets={"test_acuracy": 0.9})
    with pytest.raises(InputError, match=r"^The target for train_loss must be a finite number; got nan\."):
        compare(targets={"train_loss": float("nan")})
    with pytest.raises(TypeError, match=r"^The target for train_loss must be a number; got str '1'\.$"):
        compare(targets={"train_loss": "1"})
    with pytest.raises(TypeError, match=r"^targets must be a dict such as \{'train_loss': 0\.1\}; got list\.$"):
        compare(targets=[0.1])
    line = fl.problem("linear-gaussian")
    with pytest.raises(
        InputError, match=r"^A target for test_accuracy: this metric is never measured here: the targets of this"
    ):
        fl.compare_optimizers(line, {"sgd": samples.sgd}, num_steps=1, seeds=1, targets={"test_accuracy": 0.9})
    tune = fl.Tuning({"sgd": {"lr": [0.1]}}, metric="test_accuracy")
    with pytest.raises(InputError, match=r"no test_accuracy to tune for\. Tune for train_loss\.$"):
        fl.compare_optimizers(line, {"sgd": samples.sgd}, num_steps=1, seeds=1, tune=tune)


def test_losses_on_a_part_of_the_data():
    part = compare(num_eval=7, num_steps=2)
    assert json.loads(part.attrs["settings"])["num_eval"] == 7
    data = samples.clouds()
    index = torch.randperm(30, generator=torch.Generator().manual_seed(0))[:7]
    with torch.no_grad():
        expected = nn.functional.cross_entropy(data.model(0)(data.train[0][index]), data.train[1][index])
    np.testing.assert_allclose(part.train_loss.sel(seed=0, step=0).values, expected.item(), rtol=1e-5)
    xr.testing.assert_equal(compare(num_eval=100).train_loss, compare().train_loss)
    with pytest.raises(InputError, match=r"^num_eval must be at least 1; got 0\.$"):
        compare(num_eval=0)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tune", "error", "text"),
    [
        ({"sgdd": {"lr": [1]}}, InputError, r"^Unknown optimizer in tune 'sgdd'\. Did you mean 'sgd'"),
        ([0.1], TypeError, r"^tune must be a dict label -> options or a fl\.Tuning; got list\.$"),
        ({}, TypeError, r"^Tuning takes a dict label -> option -> values, .* got dict without entries\.$"),
        (
            {"sgd": [0.1]},
            TypeError,
            r"^Tuning options of optimizer 'sgd' must be a dict option -> list .* got \[0\.1\]\.",
        ),
        ({"sgd": {"lr": []}}, TypeError, r"each not empty; got 'lr': \[\]\."),
        ({"sgd": {"lr": 0.1}}, TypeError, r"each not empty; got 'lr': 0\.1\."),
        (
            {"sgd": {"lr": fl.LogUniform(0.1, 1)}},
            InputError,
            r"^Option 'lr' of optimizer 'sgd' is a range, .* num_trials is None",
        ),
        (
            {"sgd": {"lr": [1]}, "adam": {"lr": [1]}},
            InputError,
            r"^Optimizer 'adam' is called with the model and the options lr, which its signature \(model\) does not take",
        ),
    ],
    ids=["label", "list", "empty", "no dict", "no values", "number", "range", "signature"],
)
def test_a_wrong_search_shows_before_the_first_run(tune, error, text):
    def reached(model):
        raise AssertionError("a run was started")

    entries = {"sgd": samples.sgd, "adam": reached}
    with pytest.raises(error, match=text):
        compare(entries, tune=tune)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"criterion": "last"}, InputError, r"^Unknown criterion 'last'\..* Known: 'final', 'mean', 'target'\.$"),
        ({"metric": "loss"}, InputError, r"^Unknown metric 'loss'\. Did you mean"),
        ({"num_trials": 0}, InputError, r"^num_trials must be at least 1; got 0\.$"),
        ({"num_steps": 2.0}, TypeError, r"^num_steps must be an int; got float 2\.0\.$"),
        ({"seeds": 0}, InputError, r"^seeds must be at least 1; got 0\.$"),
        ({"seeds": [1, 1]}, InputError, r"^A search needs at least one seed, each once; got seeds \[1, 1\]\.$"),
        (
            {"criterion": "target"},
            InputError,
            r"^criterion='target' counts the steps to the target of train_loss, and there is none",
        ),
    ],
    ids=["criterion", "metric", "num_trials", "num_steps", "seeds", "repeated seeds", "no target"],
)
def test_bad_options_of_a_search(options, error, text):
    with pytest.raises(error, match=text):
        compare({"sgd": samples.sgd}, tune=fl.Tuning({"sgd": {"lr": [0.1]}}, **options))


def test_bad_ranges():
    for low, high in ((0, 1), (1, 1), (2, 1), (1, float("inf")), (float("nan"), 1)):
        with pytest.raises(InputError, match=r"^LogUniform needs finite numbers with 0 < low < high; got low="):
            fl.LogUniform(low, high)
    with pytest.raises(TypeError, match=r"^low must be a number; got str '1'\.$"):
        fl.LogUniform("1", 2)


def test_a_failing_run_says_which_it_was():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("the entry's own bug")

    with pytest.raises(RuntimeError, match="own bug") as error:
        compare({"x": lambda model, lr: Failing(model.parameters(), lr=lr)}, tune={"x": {"lr": [0.25]}})
    assert error.value.__notes__ == ["This was in the run of optimizer 'x' with {'lr': 0.25}, seed 1000."]


def test_schedulers_step_with_their_optimizer():
    def halved(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)

    found = compare({"x": halved}, num_steps=7, seeds=1, record_every=1)
    data, setting = samples.clouds(), {"batch_size": 8, "record_every": 1, "progress": False, "seed": 0}
    rates = []

    def note(step, model, optimizer):
        rates.append(optimizer.param_groups[0]["lr"])

    by_hand = fl.train(data.model(0), data, halved, num_steps=7, callbacks=[note], **setting)
    assert rates == [0.2, 0.2, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05]
    assert (by_hand.train_loss[0, 0] == found.train_loss[0, 0]).all()
    assert json.loads(found.attrs["settings"])["optimizers"]["x"]["scheduler"] == "StepLR"

    def waiting(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        return optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)

    with pytest.raises(InputError, match=r"^The scheduler of optimizer 'x' must be one .* got ReduceLROnPlateau\. "):
        compare({"x": waiting})


def test_a_problem_moves_with_its_networks():
    moved = on_device(samples.clouds(), "cpu")
    xr.testing.assert_equal(
        fl.compare_optimizers(moved, {"sgd": samples.sgd}, num_steps=2, seeds=1, progress=False).train_loss,
        fl.compare_optimizers(samples.clouds(), {"sgd": samples.sgd}, num_steps=2, seeds=1, progress=False).train_loss,
    )
