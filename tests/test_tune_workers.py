"""Runs in worker processes, and the pictures and page of a search."""

import multiprocessing
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import training_samples as samples
import xarray as xr
from plot_samples import figures  # noqa: F401 - the fixture acts by its presence
from test_tune import EDGE, GRID, compare
from torch import nn

import fisherlens as fl
from fisherlens import plots
from fisherlens.errors import FisherLensError, InputError
from fisherlens.training.workers import Crew

# --- worker processes -----------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    assert not multiprocessing.active_children()


@EDGE
def test_workers_find_the_same_to_the_bit(one_thread, tmp_path):
    options = {"tune": GRID, "targets": {"train_loss": 0.5}}
    here, there = compare(**options), compare(**options, workers=2, resume=tmp_path)
    timed = ["seconds", "seconds_to_own_accuracy", "seconds_to_target", "trial_seconds"]
    xr.testing.assert_equal(here.drop_vars(timed), there.drop_vars(timed))
    assert (there.seconds.values[..., -1] > 0).all()
    assert (here.attrs["settings"], here.attrs["threads"]) == (there.attrs["settings"], there.attrs["threads"])
    # what workers did is kept, and no process is needed for it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Crew, "_start", lambda self: pytest.fail("a process was started"))
        again = compare(**options, workers=2, resume=tmp_path)
    xr.testing.assert_identical(again.seconds, there.seconds)


def test_threads_are_divided(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    assert [Crew(samples.clouds(), {}, workers, 10).threads for workers in (1, 2, 4, 20)] == [9, 4, 2, 1]


def test_what_cannot_be_sent_is_refused_before_any_process():
    text = r"^Optimizer 'x' cannot be sent to a worker process: .* use a function defined at the top level of a module"
    with pytest.raises(InputError, match=text):
        compare({"x": lambda model: samples.sgd(model)}, workers=2)
    local = samples.clouds(factory=lambda: nn.Linear(2, 3))
    with pytest.raises(
        InputError, match=r"^The model factory of problem 'clouds' cannot be sent to a worker process: "
    ):
        fl.compare_optimizers(local, {"sgd": samples.sgd}, num_steps=1, seeds=1, workers=2)
    with pytest.raises(InputError, match=r"^workers must be at least 1; got -1\.$"):
        compare(workers=-1)
    with pytest.raises(TypeError, match=r"^workers must be an int; got bool True\.$"):
        compare(workers=True)


@pytest.mark.slow
def test_errors_and_deaths_of_workers_are_told(one_thread):
    with pytest.raises(RuntimeError, match="the step's own bug") as error:
        compare({"bad": samples.breaking, "sgd": samples.sgd}, workers=2)
    assert re.fullmatch(r"This was in the run of optimizer .bad., seed [01]\.", error.value.__notes__[0])
    assert "Traceback" in error.value.__notes__[1]
    with pytest.raises(
        FisherLensError, match=r"^A worker process ended with exit code 3 in the run of optimizer 'bad', seed 0\."
    ):
        compare({"bad": samples.dying}, workers=1)


@pytest.mark.slow
def test_ctrl_c_ends_workers_and_keeps_what_they_have(one_thread):
    class Bar:
        pressed = False

        def update(self, n):
            if not self.pressed:
                self.pressed = True
                raise KeyboardInterrupt

    from fisherlens.training.jobs import Job

    numbers = {"num_steps": 10_000_000, "batch_size": 8, "record_every": 50, "num_eval": None}
    jobs = [Job(f"{seed}", "sgd", seed, numbers) for seed in range(3)]
    runs, started = {}, time.monotonic()
    with Crew(samples.clouds(), {"sgd": samples.sgd}, 2, 3) as crew:
        finished = crew.run(jobs, lambda job, run: runs.setdefault(job.name, run), Bar())
    assert not finished
    assert set(runs) == {"0", "1"}
    assert all(run.interrupted and run.steps_taken > 0 for run in runs.values())
    assert time.monotonic() - started < 60


# --- plots ----------------------------------------------------------------------------------------------------------


def searched():
    by, runs = ("optimizer", "trial"), ("target", "optimizer", "seed")
    return xr.Dataset(
        {
            "trial_score": (
                by,
                [[2.0, 0.5, np.inf], [1.0, np.nan, np.nan]],
                {"long_name": "train loss", "units": "nat"},
            ),
            "option_lr": (by, [[0.01, 0.1, 1.0], [0.1, np.nan, np.nan]]),
            "trial_chosen": (by, [[False, True, False], [True, False, False]]),
            "steps_to_target": (runs, [[[10.0, 20.0, np.nan], [np.nan, np.nan, 5.0]]]),
            "seconds_to_target": (runs, [[[1.0, 2.0, np.nan], [np.nan, np.nan, 0.5]]]),
            "target_value": (("target",), [0.9]),
            "steps_to_own_accuracy": (("optimizer", "seed"), [[4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]),
        },
        {"optimizer": ["sgd", "adam"], "trial": range(3), "target": ["test_accuracy"], "seed": range(3)},
    )


def test_plot_of_a_search():
    dataset, before = searched(), searched()
    ax = plots.tuning(dataset)
    lines = {line.get_label(): line for line in ax.get_lines() if not line.get_label().startswith("_")}
    assert list(lines) == ["sgd", "adam", "chosen", "diverged"]
    assert lines["sgd"].get_xydata().tolist() == [[0.01, 2.0], [0.1, 0.5]]
    assert (ax.get_xscale(), ax.get_yscale(), ax.get_ylabel()) == ("log", "linear", "train loss [nat]")
    rings = [line.get_xydata().tolist() for line in ax.get_lines() if line.get_markersize() == 11]
    assert rings == [[[0.1, 0.5]], [[0.1, 1.0]]]
    crosses = [
        line.get_xdata().tolist() for line in ax.get_lines() if line.get_marker() == "x" and len(line.get_xdata())
    ]
    assert crosses == [[1.0]]
    xr.testing.assert_identical(dataset, before)
    with pytest.raises(InputError, match=r"^Unknown option 'momentum'\..* Known: 'lr'\.$"):
        plots.tuning(dataset, option="momentum")
    with pytest.raises(
        InputError, match=r"reads the variable 'trial_score', as fl\.compare_optimizers\(tune=\.\.\.\) returns it"
    ):
        plots.tuning(dataset.drop_vars("trial_score"))
    with pytest.raises(InputError, match=r"^plot\.tuning found no finite score to draw: every trial diverged\."):
        plots.tuning(dataset.assign(trial_score=dataset.trial_score * np.inf))


def test_plot_of_targets():
    dataset, before = searched(), searched()
    ax = plots.targets(dataset)
    assert ax.get_title(loc="left") == "test_accuracy ≥ 0.9"
    dots = [line.get_xdata().tolist() for line in ax.get_lines() if line.get_marker() == "o"]
    assert dots == [[10.0, 20.0], [5.0]]
    bars = [line.get_xdata().tolist() for line in ax.get_lines() if line.get_linewidth() == 2.4]
    assert bars == [[20.0, 20.0]]  # the second arrived once of three times, so that its median is "not reached"
    assert [text.get_text().strip() for text in ax.texts] == ["1 of 3", "2 of 3", "not reached"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["sgd", "adam"]
    assert plots.targets(dataset, x="seconds").get_xlabel() == "training time [s]"
    own = plots.targets(dataset, target="own")
    assert own.get_title(loc="left") == "90 % of its own final accuracy"
    assert not own.texts
    xr.testing.assert_identical(dataset, before)
    with pytest.raises(InputError, match=r"^Unknown target 'train_loss'\..* Known: 'test_accuracy', 'own'\.$"):
        plots.targets(dataset, target="train_loss")
    with pytest.raises(InputError, match=r"^Unknown x 'hours'\."):
        plots.targets(dataset, x="hours")


# --- the page -------------------------------------------------------------------------------------------------------


@EDGE
def test_the_page_on_comparing_runs(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).resolve().parents[1] / "docs" / "howto" / "comparing_optimizers.md").read_text(
        encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    space = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "comparing_optimizers.md", "exec"), space)  # noqa: S102 - the page's own code
    timed = ["seconds", "seconds_to_own_accuracy", "seconds_to_target", "trial_seconds"]
    xr.testing.assert_equal(space["again"].drop_vars(timed), space["result"].drop_vars(timed))
    assert bool(space["result"].reached.any())
    assert len(list((tmp_path / "runs").glob("*.run"))) == 10 + 6
    assert "of seeds [0 1 2]" in capsys.readouterr().out
