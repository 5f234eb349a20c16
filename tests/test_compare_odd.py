"""Comparisons that hostile users make: odd last batches, one broken seed, factories with habits, numbers out of numpy, full disks, devices."""

from __future__ import annotations

import copy
import errno

import numpy as np
import pytest
import torch
import training_samples as samples
from torch import nn

import fisherlens as fl
from fisherlens.errors import InputError, NonFiniteError, NumericalWarning
from fisherlens.training import checkpoint, devices, resume
from fisherlens.training.record import Setting

SGD = {"sgd": samples.sgd}
QUICK = {"num_steps": 4, "seeds": 1, "progress": False}


def positions():
    """A convolution whose batch normalisation has four positions to take statistics over."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 1, 2)), nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(4, 3)
    )


# --- a last batch of one example ---------------------------------------------------------------------------------------


def test_a_last_batch_of_one_is_left_out_where_batch_normalisation_trains():
    problem = samples.clouds(n=31, factory=samples.network)
    with pytest.warns(NumericalWarning, match="The last batch of each pass would hold one example") as told:
        found = fl.compare_optimizers(
            problem, {"sgd": samples.sgd, "adam": samples.adam}, batch_size=10, **QUICK | {"num_steps": 7}
        )
    assert len(told) == 1
    assert "(31 of them in batches of 10), and module '1' (BatchNorm1d), in training mode" in str(told[0].message)
    assert found.steps_taken.values.tolist() == [[7], [7]]
    assert not found.diverged.any()
    assert '"skip_single": true' in found.attrs["settings"]


def test_every_example_is_seen_where_one_alone_will_do():
    for problem in (
        samples.clouds(n=31),
        samples.clouds(n=31, factory=positions),
        samples.clouds(n=31, factory=lambda: samples.network().eval()),
    ):
        found = fl.compare_optimizers(problem, SGD, batch_size=10, **QUICK)
        assert "skip_single" not in found.attrs["settings"]


def test_batches_without_the_single_one():
    pair = (torch.zeros(7, 1), torch.zeros(7))
    setting = Setting(pair, None, fl.Gaussian(), 1, 3, 1, skip_single=True)
    batches = setting.batches(0)
    passes = [torch.cat([next(batches) for _ in range(2)]) for _ in range(3)]
    plain = Setting(pair, None, fl.Gaussian(), 1, 3, 1).batches(0)
    for seen in passes:
        whole = torch.cat([next(plain) for _ in range(3)])
        assert torch.equal(seen, whole[:6])  # the order is that of the seed, with or without


def test_batches_of_one_alone_are_refused():
    problem = samples.clouds(n=6, factory=samples.network)
    with pytest.raises(
        InputError, match=r"^Every batch would hold one example \(6 of them in batches of 1\), and module '1'"
    ):
        fl.compare_optimizers(problem, SGD, batch_size=1, **QUICK)


def test_a_single_run_leaves_it_out_too_and_its_network_as_it_was():
    problem = samples.clouds(n=11, factory=samples.network)
    model = problem.model(0)
    state = torch.get_rng_state()
    with pytest.warns(NumericalWarning, match="That batch is left out"):
        record = fl.train(model, problem, samples.sgd, num_steps=3, batch_size=5, progress=False)
    assert int(record.steps_taken[0, 0]) == 3
    assert int(model[1].num_batches_tracked) == 3  # the network was asked on a copy
    assert torch.equal(state, torch.get_rng_state())


# --- a run that cannot begin or breaks off ------------------------------------------------------------------------------


def broken_for_some_seeds():
    """Not finite where the seed makes one weight of the last layer negative."""
    model = samples.plain_network()
    with torch.no_grad():
        model[2].weight[0, 0].mul_(torch.inf if model[2].weight[0, 0] < 0 else 1.0)
    return model


def test_one_broken_start_is_told_and_the_others_run():
    problem = samples.clouds(factory=broken_for_some_seeds)
    found = fl.compare_optimizers(problem, SGD, **QUICK | {"seeds": 8})
    broken = found.diverged.values[0]
    assert 0 < broken.sum() < 8
    assert (found.steps_taken.values[0] == np.where(broken, 0, 4)).all()
    assert np.isnan(found.train_loss.values[0, broken]).all()
    assert all(text.startswith("before the first step: ") for text in found.ended_by.values[0, broken])
    assert np.isfinite(found.train_loss.values[0, ~broken]).all()


def test_a_problem_that_is_broken_for_all_seeds_is_an_error():
    def factory():
        model = samples.plain_network()
        nn.init.constant_(model[2].bias, torch.nan)
        return model

    with pytest.raises(NonFiniteError, match=r"^The network's output is NaN or infinite in the training data") as error:
        fl.compare_optimizers(samples.clouds(factory=factory), SGD, **QUICK | {"seeds": 2})
    assert error.value.__notes__ == ["So it was in every run, before its first step."]


class Singular(torch.optim.SGD):
    """Fails as optimizers do that factor what has no factors."""

    def step(self, closure=None):
        torch.linalg.cholesky(-torch.eye(2))


def test_a_matrix_without_factors_ends_its_own_run():
    entries = {"singular": lambda model: Singular(model.parameters(), lr=0.1), **SGD}
    found = fl.compare_optimizers(samples.clouds(), entries, **QUICK)
    assert found.diverged.values.tolist() == [[True], [False]]
    assert found.ended_by.values[0, 0].startswith("in step 1: linalg.cholesky")
    assert found.steps_taken.values.tolist() == [[0], [4]]


# --- factories ----------------------------------------------------------------------------------------------------------


def test_a_factory_that_returns_one_network_again_is_refused():
    model = samples.plain_network()
    problem = samples.clouds(factory=lambda: model)
    with pytest.raises(
        InputError, match=r"^The factory of problem 'clouds' returned a network with parameters of the one before"
    ):
        fl.compare_optimizers(problem, SGD, **QUICK)
    copied = samples.clouds(factory=lambda: copy.deepcopy(model))
    assert fl.compare_optimizers(copied, SGD, **QUICK).train_loss.notnull().all()


def test_weights_that_no_seed_of_torch_fixes_are_told():
    rng = np.random.default_rng(0)

    def factory():
        model = samples.plain_network()
        with torch.no_grad():
            model[0].bias.copy_(torch.from_numpy(rng.normal(size=4)))
        return model

    with pytest.warns(
        NumericalWarning, match=r"^Two networks of problem 'clouds' with the same seed have different initial weights"
    ):
        fl.compare_optimizers(samples.clouds(factory=factory), SGD, **QUICK)


# --- numbers out of numpy -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The best trial:fisherlens.errors.NumericalWarning")
def test_numbers_out_of_numpy_arrays_are_numbers():
    n = np.int64
    settings = {"num_steps": 4, "batch_size": 8, "record_every": 2, "num_eval": 9}
    plain = fl.compare_optimizers(
        samples.clouds(),
        SGD,
        seeds=2,
        tune=fl.Tuning({"sgd": {"lr": [0.1, 0.2, 0.3]}}, seeds=1),
        progress=False,
        **settings,
    )
    given = {name: n(value) for name, value in settings.items()}
    tune = fl.Tuning({"sgd": {"lr": np.array([0.1, 0.2, 0.3])}}, seeds=n(1))
    problem = samples.clouds(batch_size=n(8))
    found = fl.compare_optimizers(problem, SGD, seeds=n(2), tune=tune, workers=n(0), progress=False, **given)
    np.testing.assert_array_equal(found.train_loss, plain.train_loss)
    assert found.attrs["settings"] == plain.attrs["settings"]
    with torch.random.fork_rng(devices=[]):
        assert torch.equal(problem.model(n(3))[0].weight, problem.model(3)[0].weight)
    record = fl.train(problem.model(0), problem, samples.sgd, num_steps=n(2), seed=n(5), progress=False)
    assert record.seed.values.tolist() == [5]
    checked = fl.verify("linear-gaussian", "metric", seeds=n(1), num_examples=n(20), progress=False)
    assert checked.attrs["n_data"] == 20
    with pytest.raises(TypeError, match=r"num_steps must be an int; got float64"):
        fl.compare_optimizers(samples.clouds(), SGD, num_steps=np.float64(2), seeds=1)
    with pytest.raises(TypeError, match=r"^Every seed must be an int; got str '3'\.$"):
        problem.model("3")


# --- full disks ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_does_not_take_the_result_away(tmp_path, monkeypatch):
    def full(path, state):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(resume, "write_state", full)
    monkeypatch.setattr(checkpoint, "write_state", full)
    with pytest.warns(
        NumericalWarning,
        match=r"^A run could not be kept in .*runs \(No space left on device\); the comparison goes on",
    ):
        found = fl.compare_optimizers(samples.clouds(), SGD, resume=tmp_path / "runs", checkpoint_every=2, **QUICK)
    assert found.train_loss.notnull().all()
    monkeypatch.undo()
    again = fl.compare_optimizers(samples.clouds(), SGD, resume=tmp_path / "runs", checkpoint_every=2, **QUICK)
    np.testing.assert_array_equal(again.train_loss, found.train_loss)


def test_a_folder_that_refuses_files_is_told_before_any_run(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(resume, "_lock", refuse)
    with pytest.raises(InputError, match=r"^Cannot keep runs in .*: Permission denied\. resume= names a folder"):
        fl.compare_optimizers(samples.clouds(), SGD, resume=tmp_path, **QUICK)


# --- devices ------------------------------------------------------------------------------------------------------------


def test_devices_that_are_not_here(monkeypatch):
    assert devices.find_device(None) is None
    assert devices.find_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match=r"^Device 'meta' was asked for, but torch keeps no numbers on it"):
        devices.find_device("meta")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.find_device("auto") == torch.device("cpu")
    for name in ("cuda", "cuda:3"):
        with pytest.raises(
            InputError, match=rf"^Device '{name}' was asked for, but torch finds no CUDA device here\. Use 'auto'"
        ):
            fl.verify("linear-gaussian", "metric", device=name)
    if not torch.backends.mps.is_available():
        with pytest.raises(InputError, match=r"^Device 'mps' was asked for, but torch cannot use it \(.*\) here\."):
            devices.find_device("mps")
    with pytest.raises(InputError, match=r"^Unknown device 'gpu'\. Known: 'auto', 'cpu', 'cuda'"):
        devices.find_device("gpu")


# --- modes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_trains_in_whatever_mode_it_is_called(mode):
    problem = samples.clouds()
    expected = fl.compare_optimizers(problem, SGD, **QUICK)
    with mode():
        found = fl.compare_optimizers(problem, SGD, **QUICK)
        record = fl.train(problem.model(0), problem, samples.sgd, num_steps=4, progress=False)
    np.testing.assert_array_equal(found.train_loss, expected.train_loss)
    np.testing.assert_array_equal(record.train_loss[0, 0], expected.train_loss[0, 0])


# --- what is told in words ----------------------------------------------------------------------------------------------


def test_optimizers_that_need_a_closure_are_refused_before_any_run():
    for entry in (
        lambda model: torch.optim.LBFGS(model.parameters()),
        lambda model: fl.optim.NGD(model, adapt_damping=True),
    ):
        with pytest.raises(InputError, match=r"^Optimizer 'x' \(\w+\) computes the loss several times in a step"):
            fl.compare_optimizers(samples.clouds(), {"x": entry}, **QUICK)


def test_wrong_labels_and_targets_are_told():
    problem = samples.clouds()
    wrong = fl.Problem(
        "wrong", "Labels beyond the outputs.", problem.factory, (problem.train[0], problem.train[1] + 5), problem.test
    )
    with pytest.raises(InputError, match=r"^Label \d in the training data is outside 0\.\.2"):
        fl.verify(wrong, "metric", seeds=1)
    with pytest.raises(TypeError, match=r"^The target for train_loss must be a number; got str '0\.1'\.$"):
        samples.clouds(targets={"train_loss": "0.1"})


def test_claims_say_once_what_no_method_covers_and_run_in_inference_mode():
    x, y = samples.clouds().train

    def factory():
        return nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3))

    problem = fl.Problem("normed", "A layer norm.", factory, (x, y), (x, y), batch_size=10)
    with torch.inference_mode():  # and no warning of what the methods leave alone
        found = fl.verify(problem, ["convergence", "sharing"], seeds=1, num_examples=12, progress=False)
    assert "parameters without statistics: 1 (22.9% of all)" in str(found.note.sel(claim="convergence/exact").values)
