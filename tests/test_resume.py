"""A comparison that is killed at any point and called again gives the same result to the bit."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import training_samples as samples
import xarray as xr
from torch import nn

import fisherlens as fl
from fisherlens.errors import FileFormatError, InputError
from fisherlens.training import checkpoint as checkpoints
from fisherlens.training import loop
from fisherlens.training.states import NotStorableError, read_state, write_state

pytestmark = [
    pytest.mark.filterwarnings("ignore:The best trial:fisherlens.errors.NumericalWarning"),
    pytest.mark.filterwarnings("ignore:The optimizers get different:fisherlens.errors.NumericalWarning"),
]
HERE = Path(__file__).resolve().parent


class Killed(Exception):
    """Stands for a kill: nothing in the package knows it."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The result of a comparison that nobody interrupts, without any folder."""
    return samples.comparison(None)


def same(one, other):
    """Equal to the bit, but for what a clock says."""
    timed = ("seconds", "seconds_to_own_accuracy", "seconds_to_target", "trial_seconds")
    left, right = (found.drop_vars([name for name in timed if name in found]) for found in (one, other))
    xr.testing.assert_equal(left, right)  # NaN equals NaN, and nothing else is close
    for name in left.data_vars:
        assert left[name].dtype == right[name].dtype
    attrs = [{k: v for k, v in found.attrs.items() if k != "created_at"} for found in (one, other)]
    assert {k: str(v) for k, v in attrs[0].items()} == {k: str(v) for k, v in attrs[1].items()}


def kill_after(monkeypatch, count):
    """Let the batch loss be computed so often, then break off."""
    ordinary, calls = loop.mean_loss, itertools.count()

    def counted(*arguments):
        if next(calls) == count:
            raise Killed
        return ordinary(*arguments)

    monkeypatch.setattr(loop, "mean_loss", counted)
    return calls


# 4 trials and 8 runs of 6 steps are 72 steps
@pytest.mark.parametrize("count", [0, 1, 3, 5, 6, 7, 11, 13, 18, 23, 24, 25, 29, 33, 38, 44, 52, 59, 66, 71])
def test_killed_at_twenty_points(whole, tmp_path, monkeypatch, count):
    every = {"checkpoint_every": (None, 1, 2, 4)[count % 4]}
    kill_after(monkeypatch, count)
    with pytest.raises(Killed):
        samples.comparison(tmp_path / "runs", **every)
    monkeypatch.undo()
    same(samples.comparison(tmp_path / "runs", **every), whole)


def test_killed_again_and_again(whole, tmp_path, monkeypatch):
    for count in (9, 5, 1, 14, 3):
        kill_after(monkeypatch, count)
        with pytest.raises(Killed):
            samples.comparison(tmp_path, checkpoint_every=2)
        monkeypatch.undo()
    same(samples.comparison(tmp_path, checkpoint_every=2), whole)


def test_a_finished_comparison_takes_no_step(whole, tmp_path, monkeypatch):
    same(samples.comparison(tmp_path), whole)
    assert len(list(tmp_path.glob("*.run"))) == 12
    assert not list(tmp_path.glob("*.checkpoint"))
    kill_after(monkeypatch, 0)
    same(samples.comparison(tmp_path), whole)


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    kill_after(monkeypatch, 70)
    with pytest.raises(Killed):
        samples.comparison(tmp_path, checkpoint_every=1)
    monkeypatch.undo()
    calls = kill_after(monkeypatch, -1)
    samples.comparison(tmp_path, checkpoint_every=1)
    # the last run is that of the optimizer that keeps something to itself: it starts again, 11 other runs do not
    assert next(calls) == 6


def test_a_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    def call():
        entries = {"adam": samples.adam}
        setting = {"num_steps": 10, "seeds": 1, "checkpoint_every": 3}
        return fl.compare_optimizers(samples.clouds(), entries, resume=tmp_path, progress=False, **setting)

    kill_after(monkeypatch, 8)
    with pytest.raises(Killed):
        call()
    monkeypatch.undo()
    assert [path.name for path in tmp_path.glob("*.checkpoint")] == ["run-0-0.checkpoint"]
    calls = kill_after(monkeypatch, -1)
    found = call()
    assert next(calls) == 10 - 6
    assert (np.diff(found.seconds.values[0, 0]) > 0).all()  # the parts are added up
    assert not list(tmp_path.glob("*.checkpoint"))


@pytest.mark.parametrize(
    "entry",
    [
        samples.adam,
        partial(samples.sgd, momentum=0.9, nesterov=True),
        samples.scheduled,
        *(partial(samples.method, name=name) for name in fl.optim.__all__),
    ],
    ids=["adam", "sgd", "scheduled", *fl.optim.__all__],
)
@pytest.mark.filterwarnings("ignore::fisherlens.errors.NumericalWarning")
def test_every_known_optimizer_goes_on_to_the_bit(tmp_path, monkeypatch, entry):
    problem = samples.clouds(factory=samples.double_network, dtype=torch.float64)
    setting = {"num_steps": 13, "seeds": 1, "batch_size": 8, "record_every": 1, "progress": False}
    straight = fl.compare_optimizers(problem, {"x": entry}, **setting)
    kill_after(monkeypatch, 7)
    with pytest.raises(Killed):
        fl.compare_optimizers(problem, {"x": entry}, resume=tmp_path, checkpoint_every=5, **setting)
    monkeypatch.undo()
    calls = kill_after(monkeypatch, -1)
    same(fl.compare_optimizers(problem, {"x": entry}, resume=tmp_path, checkpoint_every=5, **setting), straight)
    assert next(calls) == 8


def test_only_known_optimizers_are_stored_in_the_middle():
    model = samples.network()
    known = torch.optim.SGD(model.parameters(), lr=0.1)
    assert checkpoints.continues_exactly(known, None)
    assert not checkpoints.continues_exactly(samples.hidden(model), None)
    own = type("Own", (torch.optim.lr_scheduler.StepLR,), {"__module__": "elsewhere"})
    assert not checkpoints.continues_exactly(known, own(known, 3))


def test_a_scheduler_that_cannot_be_stored_starts_the_run_again(tmp_path, monkeypatch):
    class Falling:
        def __init__(self):
            self.rates = {1, 2}  # a set has no form in a file

        def __call__(self, step):
            return 0.9**step

    def entry(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, Falling())

    setting = {"num_steps": 6, "seeds": 1, "progress": False}
    straight = fl.compare_optimizers(samples.clouds(), {"x": entry}, **setting)
    kill_after(monkeypatch, 4)
    with pytest.raises(Killed):
        fl.compare_optimizers(samples.clouds(), {"x": entry}, resume=tmp_path, checkpoint_every=1, **setting)
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.checkpoint"))
    same(fl.compare_optimizers(samples.clouds(), {"x": entry}, resume=tmp_path, **setting), straight)


SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
import training_samples as samples
from fisherlens.training import loop
print("ready", flush=True)
samples.comparison(sys.argv[1], checkpoint_every=2, num_steps=60)
print("done", flush=True)
"""


@pytest.mark.slow
def test_killed_by_the_system(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = samples.comparison(None, num_steps=60)
        paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        for count in (0, 2, 5, 9):
            command = [sys.executable, "-c", SCRIPT, str(tmp_path / "runs")]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)  # noqa: S603
            assert process.stdout.readline() == "ready\n"
            while len(list((tmp_path / "runs").glob("*.run"))) < count or not list((tmp_path / "runs").glob("*.c*")):
                assert process.poll() is None
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            process.stdout.close()
            assert count <= len(list((tmp_path / "runs").glob("*.run"))) < 12
        same(samples.comparison(tmp_path / "runs", checkpoint_every=2, num_steps=60), whole)
    finally:
        torch.set_num_threads(before)


# --- what is refused ------------------------------------------------------------------------------------------------


def small(folder, problem=None, entries=None, **options):
    setting = {"num_steps": 2, "seeds": 1, "progress": False, "resume": folder} | options
    return fl.compare_optimizers(problem or samples.clouds(), entries or {"sgd": samples.sgd}, **setting)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_steps": 3}, "num_steps was 2 and is 3"),
        ({"seeds": [1]}, "the initial weights differ; seeds was [0] and is [1]"),
        ({"batch_size": 8}, "batch_size was 64 and is 8"),
        ({"record_every": 2}, "record_every was 1 and is 2"),
        ({"num_eval": 5}, "num_eval was null and is 5"),
        ({"entries": {"sgd": partial(samples.sgd, lr=0.2)}}, "optimizer sgd group 0 lr was 0.1 and is 0.2"),
        ({"entries": {"adam": samples.adam}}, 'order of optimizers was ["sgd"] and is ["adam"]'),
        ({"problem": samples.clouds(n=33)}, "the training data differ; the test data differ"),
        ({"problem": samples.clouds(factory=samples.network)}, "network was "),
        ({"tune": {"sgd": {"lr": [0.1]}}}, "search was null and is {"),
    ],
    ids=["num_steps", "seeds", "batch_size", "record_every", "num_eval", "lr", "order", "data", "network", "tune"],
)
def test_other_settings_are_refused_with_what_differs(tmp_path, change, text):
    small(tmp_path)
    with pytest.raises(InputError) as error:
        small(tmp_path, **change)
    message = str(error.value)
    assert message.startswith(f"{tmp_path} holds runs of another comparison, with which these cannot be joined: ")
    assert text in message
    assert message.endswith("Repeat the call with the settings of before, or give resume= another folder.")


def test_an_option_that_the_optimizer_does_not_show_is_seen_in_its_function(tmp_path):
    def entry(options):
        def make(model):
            return fl.optim.CWNGD(model, damping=1e-2, partition=options)

        return make

    small(tmp_path, entries={"x": entry("layer")})
    small(tmp_path, entries={"x": entry("layer")})
    with pytest.raises(InputError, match=r'optimizer x function around was \["layer"\] and is \["unit"\]'):
        small(tmp_path, entries={"x": entry("unit")})


class Own(nn.Module):
    """Its text and weights say nothing of what it does."""

    def __init__(self, scale=1.0, act=torch.tanh):
        super().__init__()
        self.inner, self.scale, self.act = nn.Linear(2, 3), scale, act

    def forward(self, x):
        return self.scale * self.act(self.inner(x))


class Edited(Own):
    def forward(self, x):
        return self.scale * self.act(self.inner(x)).square()


Edited.__name__ = Edited.__qualname__ = "Own"


def test_a_network_that_computes_something_else_is_refused(tmp_path):
    def call(factory):
        return small(tmp_path, problem=samples.clouds(factory=factory))

    call(Own)
    call(Own)
    assert repr(Edited()) == repr(Own())
    for other in (Edited, partial(Own, scale=2.0), partial(Own, act=torch.relu), partial(Own, act=torch.sin)):
        with pytest.raises(InputError, match=r"joined: the classes of the network differ\. Repeat"):
            call(other)


class Entry:
    """An object that makes optimizers."""

    def __init__(self, clip):
        self.clip = clip

    def __call__(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.1)


def test_options_of_callable_objects_and_after_the_star_are_seen(tmp_path):
    def keyword(clip):
        def make(model, *, clip=clip):
            return torch.optim.SGD(model.parameters(), lr=0.1 + 0 * clip)

        return make

    for k, entry in enumerate((Entry, keyword)):
        small(tmp_path / str(k), entries={"x": entry(1.0)})
        small(tmp_path / str(k), entries={"x": entry(1.0)})
        with pytest.raises(InputError, match=r"optimizer x function (clip|defaults) was \[?1\.0\]? and is \[?2\.0"):
            small(tmp_path / str(k), entries={"x": entry(2.0)})


def test_threads_and_versions_are_part_of_a_comparison(tmp_path, monkeypatch):
    small(tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    with pytest.raises(InputError, match=r"threads was \d+ and is 77"):
        small(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr("fisherlens.training.resume.__version__", "99")
    with pytest.raises(InputError, match=r'fisherlens version was "[^"]+" and is "99"\. Repeat'):
        small(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr("fisherlens.training.resume._code_of_package", lambda: "other")
    with pytest.raises(InputError, match=r"joined: the files of fisherlens differ\. Repeat"):
        small(tmp_path)


def test_targets_may_change(tmp_path):
    assert "target" not in small(tmp_path).dims
    found = small(tmp_path, targets={"train_loss": 100.0})
    assert found.steps_to_target.values.tolist() == [[[0.0]]]


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(
        InputError, match=r"holds 'holiday.jpg' and is not the folder of a comparison\. Give resume= an empty"
    ):
        small(tmp_path)
    with pytest.raises(InputError, match=r"^Cannot keep runs in .*holiday.jpg: .* resume= names a folder"):
        small(tmp_path / "holiday.jpg")
    with pytest.raises(InputError, match="give that folder too"):
        small(None, checkpoint_every=2)
    with pytest.raises(InputError, match="checkpoint_every must be at least 1; got 0"):
        small(tmp_path / "new", checkpoint_every=0)


def test_a_folder_in_use(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    small(tmp_path)
    with (tmp_path / "lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(
            InputError, match=r"^Another process is working in .*Wait for it, end it, or give resume= another"
        ):
            small(tmp_path)
    small(tmp_path)


def test_damaged_files_are_noticed(tmp_path):
    small(tmp_path)
    path = tmp_path / "run-0-0.run"
    content = path.read_bytes()
    for damaged in (content[:-1], content[:40], b"", content[:-9] + b"x" + content[-8:], b"y" + content[1:]):
        path.write_bytes(damaged)
        with pytest.raises(
            FileFormatError, match=r"run-0-0.run is damaged: .* Remove the file: what it holds is then computed"
        ):
            small(tmp_path)
    path.unlink()
    small(tmp_path)
    (tmp_path / "comparison.json").write_text("{")
    with pytest.raises(FileFormatError, match=r"comparison.json is damaged: .* remove the folder to start again"):
        small(tmp_path)


def test_settings_are_readable(tmp_path):
    small(tmp_path)
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert found["problem"] == "clouds"
    assert found["optimizer"]["sgd"]["group"]["0"]["lr"] == 0.1
    assert re.fullmatch("[0-9a-f]{16}", found["training data digest"])


# --- states ---------------------------------------------------------------------------------------------------------


def test_states_come_back_as_they_were(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(3, 2, generator=generator).to(kind) for kind in (torch.float32, torch.float64, torch.bfloat16)
    ]
    tensors += [torch.tensor(True), torch.arange(4).reshape(2, 2).T, torch.zeros(0, 3), torch.tensor([torch.nan, -0.0])]
    state = {
        "tensors": tensors,
        3: {"none": None, "t": (1, 2.5, ("x",)), "big": 2**70, "inf": -np.inf},
        "array": np.arange(6.0).reshape(2, 3),
        "counter": __import__("collections").Counter({5: 2}),
        ("a", 1): [True, False, []],
    }
    write_state(tmp_path / "s", state)
    back = read_state(tmp_path / "s")
    assert list(back) == list(state)
    assert (back[3], back["counter"], back["a", 1]) == (state[3], state["counter"], state["a", 1])
    assert type(back["counter"]) is type(state["counter"])
    assert type(back["a", 1][0]) is bool
    np.testing.assert_array_equal(back["array"], state["array"])
    for one, other in zip(tensors, back["tensors"], strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    for bad in (nn.Linear(1, 1), {1, 2}, print, np.array([None])):
        with pytest.raises(NotStorableError):
            write_state(tmp_path / "bad", {"x": bad})
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
