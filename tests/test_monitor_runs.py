"""A Monitor along a run: when it measures and what that costs, what goes wrong, files, states, and what it refuses."""

import io
import re
import signal
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from monitor_samples import (
    TIMES,
    advance,
    images,
    points,
    regularised,
    seeded,
    sgd,
    small,
    watched,
)
from torch import nn

import fisherlens as fl
from fisherlens.errors import InputError, NonFiniteError, NumericalWarning
from fisherlens.results import load
from fisherlens.training.monitor import monitor as monitoring
from fisherlens.training.monitor.clock import stability_limit
from fisherlens.training.monitor.file import RunFile

# --- when something goes wrong ---------------------------------------------------------------------------------------


def test_non_finite_weights_are_noted_and_the_training_goes_on():
    model, data = seeded(small).double(), points()
    monitor = fl.Monitor(model, data, likelihood="categorical", every=1)
    weight = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.warns(
        NumericalWarning,
        match=r"^The Monitor could not measure step 1, which is NaN in its result; the training goes on, .*NonFiniteError: Parameter '0\.weight'",
    ) as caught:
        measured = [monitor.step() for _ in range(2)]
    assert measured == [True, True]
    assert len(caught) == 1
    assert Path(caught[0].filename) == Path(__file__)
    with torch.no_grad():
        model[0].weight.copy_(weight)
    monitor.step()
    run = monitor.result
    assert run["measured"].values.tolist() == [True, False, False, True]
    assert run["problem"].values[1].startswith("NonFiniteError: Parameter '0.weight' holds NaN")
    assert run["problem"].values[[0, 3]].tolist() == ["", ""]
    for name in ("loss", "trace", "eigenvalue", "coupling", "alignment", "overlap_previous", "effective_dimension"):
        assert np.isnan(run[name][1:3]).all(), name
    assert run["loss"][3] == run["loss"][0]
    assert run["overlap_previous"][3] == pytest.approx(1)  # with the last space that was measured
    assert run["seconds"].notnull().all()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"^Parameter '0\.weight' holds NaN or infinity"):
        fl.Monitor(model, data, likelihood="categorical", strict=True)
    with pytest.warns(NumericalWarning, match="could not measure step 0"):
        assert not fl.Monitor(model, data, likelihood="categorical").result["measured"].any()


def test_a_network_that_changes_its_shape_or_freezes():
    model, data = seeded(small), points(dtype=torch.float32)
    monitor = fl.Monitor(model, data, likelihood="categorical", every=1)
    model[0].requires_grad_(False)
    monitor.step()
    assert monitor.result["measured"].all()
    assert (monitor.result["trace"][1] == monitor.result["trace"][0]).all()
    assert not model[0].weight.requires_grad
    model[2] = seeded(lambda: nn.Linear(3, 4))
    with pytest.warns(
        NumericalWarning,
        match=r"InputError: The network has 25 of the monitored parameters, and had 21 when the Monitor was built",
    ):
        monitor.step()


def test_a_failing_logger_or_disk_is_told_once_and_nothing_is_lost(tmp_path, monkeypatch):
    model, data = seeded(small), points(dtype=torch.float32)
    received = []

    def broken(step, values):
        raise ConnectionError("no network")

    options = {"out": tmp_path / "run.nc", "to": [lambda step, values: received.append((step, values)), broken]}
    with pytest.warns(
        NumericalWarning,
        match=r"^The Monitor measured step 0 and could not hand it to broken; .*ConnectionError: no network",
    ) as caught:
        monitor = watched(model, data, 2, k=2, **options)
    assert len(caught) == 1
    with monkeypatch.context() as patch:
        patch.setattr(RunFile, "write", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.warns(NumericalWarning, match=r"step 3 and could not write .*run\.nc; .*OSError: full"):
            monitor.step()
    assert load(tmp_path / "run.nc")["step"].values.tolist() == [0, 1, 2]
    monitor.step()
    assert load(tmp_path / "run.nc").identical(monitor.result)
    assert [step for step, _ in received] == [0, 1, 2, 3, 4]
    values = received[0][1]
    assert values["trace/all"] == monitor.result["trace"].sel(layer="all")[0]
    assert values["eigenvalue/1"] == monitor.result["eigenvalue"][0, 1]
    assert values["coupling/max"] == monitor.result["coupling"][0, 0, 1]
    assert "overlap_previous" not in values  # not a number yet
    strict = fl.Monitor(model, data, likelihood="categorical", start=False, strict=True, to=[broken])
    with pytest.raises(ConnectionError, match="no network"):
        strict.measure()


# --- when it measures, and what that costs -----------------------------------------------------------------------------


def test_the_share_of_time_is_measured_and_kept_below_a_limit(monkeypatch):
    """One second per step and per measurement: with an eighth of the time, the k-th follows when the clock shows 8 k."""
    time = [0.0]
    fake = types.SimpleNamespace(perf_counter=lambda: time[0])
    monkeypatch.setattr("fisherlens.training.monitor.clock.time", fake)
    real = monitoring.measure

    def slow(*arguments):
        time[0] += 1
        return real(*arguments)

    monkeypatch.setattr(monitoring, "measure", slow)
    model, data = seeded(small), points(dtype=torch.float32)
    for every, steps, shares in ((5, [0, 14, 21, 28, 35], [1, 1 / 8, 1 / 8, 1 / 8, 1 / 8]), (20, [0, 20], [1, 2 / 22])):
        time[0] = 0.0
        monitor = fl.Monitor(model, data, likelihood="categorical", every=every, max_share=0.125, quantities="trace")
        for _ in range(36):
            time[0] += 1
            monitor.step()
        run = monitor.result
        assert run["step"].values.tolist() == steps
        np.testing.assert_allclose(run["share_of_time"], shares)
        np.testing.assert_allclose(run["monitor_seconds"], np.arange(1, len(steps) + 1))
        assert monitor.share_of_time == pytest.approx(len(steps) / (36 + len(steps)))
        assert f"{100 * monitor.share_of_time:.1f} % of the time" in repr(monitor)


def test_the_share_of_a_real_run_counts_everything(tmp_path):
    model, data = seeded(small), points(dtype=torch.float32)
    with fl.Monitor(model, data, likelihood="categorical", every=3, out=tmp_path / "run.nc") as monitor:
        advance(model, sgd(model), data, 7, monitor)
    run = monitor.result
    assert run["step"].values.tolist() == [0, 3, 6]
    assert (run["seconds"].diff("step") > 0).all()
    assert (run["monitor_seconds"] <= run["seconds"]).all()
    np.testing.assert_allclose(run["share_of_time"], run["monitor_seconds"] / run["seconds"], rtol=0.05)
    assert 0 < monitor.share_of_time < 1
    shown = r"^Monitor\(every=3, N=12, P=21, loss, trace, .*drift: 3 measurements, the last at step 6; \d+\.\d % of the time, out='.*run\.nc'\)$"
    assert re.match(shown, repr(monitor))
    assert not monitor.step()  # closed
    monitor.close()


def test_steps_may_be_counted_by_others_and_may_go_back():
    model, data = seeded(small), points(dtype=torch.float32)
    monitor = fl.Monitor(model, data, likelihood="categorical", every=10)
    assert [monitor.step(at=at) for at in (4, 10, 10, 19, 25)] == [False, True, False, False, True]
    assert monitor.result["step"].values.tolist() == [0, 10, 25]
    assert not monitor.step(at=12)
    assert monitor.result["step"].values.tolist() == [0, 10]
    monitor.measure()
    monitor.measure()
    monitor.measure(at=13)
    assert np.isnan(monitor.result["overlap_previous"].values[:3]).tolist() == [
        True,
        False,
        True,
    ]  # what was dropped is no earlier one
    assert monitor.result["overlap_previous"][3] == pytest.approx(1)
    assert monitor.result["step"].values.tolist() == [0, 10, 12, 13]
    with pytest.raises(
        InputError, match=r"^at must be the number of optimizer steps so far, an integer >= 0; got -1\.$"
    ):
        monitor.step(at=-1)
    late = fl.Monitor(model, data, likelihood="categorical", every=2, start=False)
    assert [late.step() for _ in range(4)] == [False, True, False, True]
    assert late.result["step"].values.tolist() == [2, 4]


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"momentum": 0.5, "nesterov": True}, {"momentum": 0.9, "weight_decay": 7.0}]
)
def test_the_stability_limit_is_where_descent_on_a_quadratic_turns_into_divergence(options):
    sizes = []
    for factor in (0.97, 1.03):
        x = nn.Parameter(torch.ones(1, dtype=torch.float64))
        opt = torch.optim.SGD([x], lr=0.1, **options)
        curvature = factor * stability_limit(opt)
        for _ in range(300):
            x.grad = curvature * x.detach()
            opt.step()
        sizes.append(abs(x.item()))
    assert sizes[0] < 1e-1
    assert sizes[1] > 1e1


def test_learning_rates_are_recorded_and_the_limit_only_where_it_holds():
    model, data = seeded(small), points(dtype=torch.float32)
    opt = sgd(model, lr=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    monitor = fl.Monitor(model, data, likelihood="categorical", every=1, quantities="trace", optimizer=opt)
    advance(model, opt, data, 1)
    schedule.step()
    monitor.step()
    assert monitor.result["lr"].values.tolist() == [0.5, 0.25]
    assert monitor.result["stability_limit"].values.tolist() == [4, 8]
    adam = fl.Monitor(
        model, data, likelihood="categorical", quantities="trace", optimizer=torch.optim.Adam(model.parameters())
    )
    assert adam.result["lr"].values.tolist() == [1e-3]
    assert adam.result["stability_limit"].isnull().all()
    assert fl.Monitor(model, data, likelihood="categorical", quantities="trace").result["lr"].isnull().all()
    assert np.isnan(stability_limit(sgd(model, momentum=0.9, dampening=0.1)))


# --- files and states ------------------------------------------------------------------------------------------------


def test_a_file_of_another_run_is_not_written_over(tmp_path):
    model, data, path = seeded(small), points(dtype=torch.float32), tmp_path / "run.nc"
    options = {"likelihood": "categorical", "every": 2, "k": 2, "out": path}
    with fl.Monitor(model, data, **options) as first:
        advance(model, sgd(model), data, 5, first)
    assert load(path).identical(first.result)
    bytes_before = path.read_bytes()
    text = f"{path} is there already, and a Monitor does not write over another run. Name another file, replace it with existing='replace', or go on with the run that it holds"
    with pytest.raises(InputError, match="^" + re.escape(text)):
        fl.Monitor(model, data, **options)
    with pytest.raises(
        InputError,
        match=r"run\.nc is no record of this run: it holds .*Build it with the arguments of the earlier part",
    ):
        fl.Monitor(model, data, **options | {"k": 3}, existing="continue")
    with pytest.raises(InputError, match="is no record of this run"):
        fl.Monitor(nn.Linear(2, 3), data, **options, existing="continue")
    assert path.read_bytes() == bytes_before
    on = fl.Monitor(model, data, **options, existing="continue")
    assert on.steps == 4
    assert on.result.drop_vars("problem").equals(first.result.drop_vars("problem"))
    advance(model, sgd(model), data, 2, on)
    run = load(path)
    assert run["step"].values.tolist() == [0, 2, 4, 6]
    assert run.sel(step=[0, 2, 4])["eigenvalue"].equals(first.result["eigenvalue"])
    assert (run["seconds"].diff("step") > 0).all()
    fl.Monitor(model, data, **options, existing="replace")
    assert load(path)["step"].values.tolist() == [0]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    data = images(dtype=torch.float32)
    options = {"likelihood": "categorical", "every": 2, "k": 3}

    def built(out=None, **more):
        model = seeded(regularised).eval()  # dropout is not the matter here
        opt = sgd(model, momentum=0.9)
        return model, opt, fl.Monitor(model, data, optimizer=opt, out=out, **options, **more)

    model, opt, whole = built()
    advance(model, opt, data, 9, whole)
    path = tmp_path / "run.nc"
    model, opt, part = built(path)
    advance(model, opt, data, 5, part)
    kept = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict(), "monitor": part.state_dict()}, kept)
    advance(model, opt, data, 2, part)  # killed after these, which are then taken again
    assert load(path)["step"].values.tolist() == [0, 2, 4, 6]
    kept.seek(0)
    state = torch.load(kept, weights_only=True)
    model, opt, again = built(path, existing="continue", start=False)
    model.load_state_dict(state["model"])
    opt.load_state_dict(state["opt"])
    again.load_state_dict(state["monitor"])
    assert again.steps == 5
    advance(model, opt, data, 4, again)
    for run in (again.result, load(path)):
        assert run.drop_vars(TIMES).equals(whole.result.drop_vars(TIMES))
    assert (again.result["monitor_seconds"].diff("step") > 0).all()
    other = fl.Monitor(model, data, likelihood="categorical", k=4, start=False)
    with pytest.raises(
        InputError,
        match=r"^The state is that of another Monitor: k 3 there and 4 here\. Build it with the same network",
    ):
        other.load_state_dict(state["monitor"])
    with pytest.raises(InputError, match=r"^The state is that of another Monitor"):
        other.load_state_dict({})


@pytest.mark.slow
def test_a_killed_run_leaves_every_finished_measurement(tmp_path):
    path = tmp_path / "run.nc"
    program = f"""
        import torch, fisherlens as fl
        from torch import nn
        model = nn.Linear(3, 3)
        data = torch.randn(9, 3), torch.arange(9) % 3
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = fl.Monitor(model, data, likelihood="categorical", every=1, k=2, out={str(path)!r})
        while True:
            loss = nn.functional.cross_entropy(model(data[0]), data[1])
            opt.zero_grad(); loss.backward(); opt.step()
            monitor.step()
            print(monitor.steps, flush=True)
    """
    for seen in (1, 4):
        path.unlink(missing_ok=True)
        command = [sys.executable, "-c", textwrap.dedent(program)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
            for _ in range(seen):
                last = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
            process.wait()
        run = load(path)
        assert run["step"].values.tolist() == list(range(run.sizes["step"]))
        assert run.sizes["step"] > last
        assert run["measured"].all()


# --- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"every": 0}, InputError, "every must be an integer >= 1, the optimizer steps between measurements; got 0."),
        ({"k": 2.0}, InputError, "k must be an integer >= 1, the number of leading eigenvalues; got 2.0."),
        (
            {"num_examples": -1},
            InputError,
            "num_examples must be an integer >= 1, the number of monitored examples, or None for all; got -1.",
        ),
        ({"damping": 0}, InputError, "damping must be a finite number > 0; got 0."),
        ({"kind": "hessian"}, InputError, "Unknown kind 'hessian'. "),
        ({"existing": "append"}, InputError, "Unknown option existing= 'append'. "),
        ({"quantities": ["traces"]}, InputError, "Unknown quantity 'traces'. Did you mean 'trace'?"),
        ({"quantities": []}, InputError, "quantities is empty, so there is nothing to measure. Known: loss, "),
        (
            {"max_share": 5},
            InputError,
            "max_share must be a number between 0 and 1, a share of the wall time such as 0.05, or None; got 5.",
        ),
        ({"strict": 1}, TypeError, "strict must be True or False; got 1."),
        ({"keep_hooks": "all"}, TypeError, "keep_hooks must be True, False or None; got 'all'."),
        (
            {"to": ["tensorboard"]},
            TypeError,
            "to= takes functions (step, values), such as fl.adapters.tensorboard('runs/'); got str.",
        ),
        ({"likelihood": nn.CrossEntropyLoss()}, TypeError, "likelihood must be a name or a fisherlens likelihood"),
        ({"params": ["2.wight"]}, InputError, "Unknown parameter or pattern '2.wight'. Did you mean '2.weight'?"),
        ({"seed": -1}, InputError, "seed must be an integer >= 0; got -1."),
    ],
)
def test_wrong_arguments_show_before_the_training(options, error, text, unchanged):
    model = seeded(small)
    with unchanged(model), pytest.raises(error, match="^" + re.escape(text)):
        fl.Monitor(model, points(dtype=torch.float32), **{"likelihood": "categorical"} | options)


def test_wrong_models_and_data_show_before_the_training():
    model, (x, y) = seeded(small), points(dtype=torch.float32)
    with pytest.raises(TypeError, match=r"^model must be the torch\.nn\.Module that is being trained; got function\.$"):
        fl.Monitor(seeded, (x, y), likelihood="categorical")
    with pytest.raises(
        InputError, match=r"^data must be \(inputs, targets\), or batches of them such as a DataLoader; got Tensor\."
    ):
        fl.Monitor(model, x, likelihood="categorical")
    with pytest.raises(InputError, match=r"^The data to monitor are empty: no batch was found\."):
        fl.Monitor(model, [], likelihood="categorical")
    with pytest.raises(InputError, match=r"^Label 3 in .* is outside 0\.\.2"):
        fl.Monitor(model, (x, y + 1), likelihood="categorical")
    with pytest.raises(NonFiniteError, match="hold NaN or infinity, first at example 0"):
        fl.Monitor(model, (x * torch.nan, y), likelihood="categorical")
