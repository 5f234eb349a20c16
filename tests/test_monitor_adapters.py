"""A Monitor in other people's training loops and logs: the logic with stand-ins of their classes, and the real libraries where they are installed."""

import re
import sys
import types

import numpy as np
import pytest
import torch
from adapter_samples import OPTIONS, advance, hide, network, points, seeded
from torch import nn
from torch.nn import functional

import fisherlens as fl
from fisherlens.errors import InputError, NumericalWarning
from fisherlens.results import load

# --- loggers ---------------------------------------------------------------------------------------------------------


class Writer:
    def __init__(self):
        self.seen, self.flushed = [], 0

    def add_scalar(self, name, value, global_step):
        self.seen.append((name, value, global_step))

    def flush(self):
        self.flushed += 1

    def close(self):
        raise AssertionError("it is the user's")


class Run:
    def __init__(self):
        self.metrics, self.seen = [], []

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, values):
        self.seen.append(values)


class Client:
    def __init__(self):
        self.seen = []

    def log_metric(self, run_id, name, value, step):
        self.seen.append((run_id, name, value, step))


def test_loggers_receive_every_measurement():
    writer, run, client, own = Writer(), Run(), Client(), []
    model = nn.Sequential()
    model.add_module("a b(c)", network())
    to = [
        fl.adapters.tensorboard(writer),
        fl.adapters.wandb(run, prefix="f/"),
        fl.adapters.mlflow(client, "7"),
        lambda step, values: own.append((step, values)),
    ]
    with fl.Monitor(model, points(), **OPTIONS, to=to) as monitor:
        advance(model, 3, lambda step: monitor.step())
    result = monitor.result
    assert [step for step, _ in own] == [0, 2]
    assert writer.seen == [("fisher/" + name, value, step) for step, values in own for name, value in values.items()]
    assert writer.flushed == 2
    assert run.metrics == [("f/step", None), ("f/*", "f/step")]
    assert run.seen == [
        {"f/step": step} | {"f/" + name: value for name, value in values.items()} for step, values in own
    ]
    assert [(run_id, step) for run_id, _, _, step in client.seen] == [
        ("7", step) for step, values in own for _ in values
    ]
    assert "fisher/trace/a b_c_.0" in {name for _, name, _, _ in client.seen}
    values = own[-1][1]
    assert values["trace/a b(c).0"] == result["trace"][1, 0]
    assert values["coupling/mean"] == result["coupling"][1, 0, 1]
    assert values["overlap_previous"] == result["overlap_previous"][1]
    assert set(values) >= {
        "loss",
        "gradient_norm",
        "trace/all",
        "eigenvalue/0",
        "eigenvalue/1",
        "effective_dimension",
        "alignment",
        "share_of_time",
    }
    assert "lr" not in values  # there was no optimizer
    assert all(np.isfinite(value) for _, each in own for value in each.values())


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: fl.adapters.tensorboard(3),
            TypeError,
            "tensorboard takes a SummaryWriter or the folder of one; got int.",
        ),
        (
            lambda: fl.adapters.wandb(3),
            TypeError,
            "wandb takes what wandb.init returned, or None for the active run; got int.",
        ),
        (lambda: fl.adapters.mlflow(3, "7"), TypeError, "client must be an mlflow.MlflowClient; got int."),
        (
            lambda: fl.adapters.mlflow(Client()),
            InputError,
            "mlflow takes a client together with a run_id, or neither for the active run.",
        ),
        (
            lambda: fl.adapters.mlflow(Client(), "7", prefix=1),
            TypeError,
            "prefix must be text that is put before each name, such as 'fisher/'; got 1.",
        ),
    ],
)
def test_what_is_no_logger_is_refused(make, error, text):
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        make()


@pytest.mark.parametrize(
    ("hidden", "make", "what", "package"),
    [
        (
            ("torch.utils.tensorboard",),
            lambda: fl.adapters.tensorboard("runs"),
            "tensorboard needs torch.utils.tensorboard",
            "tensorboard",
        ),
        (("wandb",), lambda: fl.adapters.wandb(), "wandb needs wandb", "wandb"),
        (("mlflow",), lambda: fl.adapters.mlflow(), "mlflow needs mlflow", "mlflow-skinny"),
        (
            ("lightning", "lightning.pytorch", "pytorch_lightning"),
            lambda: fl.adapters.lightning_callback(points(), **OPTIONS),
            "lightning_callback needs lightning.pytorch or pytorch_lightning",
            "lightning",
        ),
        (
            ("transformers",),
            lambda: fl.adapters.transformers_callback(points(), **OPTIONS),
            "transformers_callback needs transformers",
            "transformers",
        ),
    ],
)
def test_a_missing_library_is_named_with_the_command_that_brings_it(monkeypatch, hidden, make, what, package):
    hide(monkeypatch, *hidden)
    text = rf"^fl\.adapters\.{re.escape(what)}, which cannot be imported here \(.*\)\. fisherlens does not bring it: pip install {package}$"
    with pytest.raises(ImportError, match=text):
        make()


# --- callbacks, on stand-ins of the classes that they derive from ----------------------------------------------------


@pytest.fixture
def lightning(monkeypatch):
    module = types.ModuleType("lightning.pytorch")
    module.Callback = type("Callback", (), {})
    monkeypatch.setitem(sys.modules, "lightning", types.ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, "lightning.pytorch", module)


class Trainer:
    """What a Lightning callback sees of a Trainer."""

    def __init__(self, model, is_global_zero=True):
        self.model, self.global_step, self.is_global_zero = model, 0, is_global_zero
        self.optimizers = [torch.optim.SGD(model.parameters(), lr=0.1)]
        self.logged = []
        self.loggers = [types.SimpleNamespace(log_metrics=lambda values, step: self.logged.append((step, values)))]

    def fit(self, callback, steps):
        x, y = points()
        callback.on_train_start(self, self.model)
        for batch in range(steps):
            functional.cross_entropy(self.model(x), y).backward()
            if batch % 2:  # gradients of two batches make one step
                self.optimizers[0].step()
                self.optimizers[0].zero_grad()
                self.global_step += 1
            callback.on_train_batch_end(self, self.model, None, None, batch)
        callback.on_train_end(self, self.model)


def test_a_lightning_callback_counts_optimizer_steps_and_feeds_the_loggers(lightning):
    model = seeded(network)
    trainer = Trainer(model)
    callback = fl.adapters.lightning_callback(points(), **OPTIONS)
    assert callback.monitor is None
    assert callback.state_dict() == {}
    trainer.fit(callback, 9)
    run = callback.monitor.result
    assert run["step"].values.tolist() == [0, 2, 4]
    assert (run["lr"] == 0.1).all()
    assert [step for step, _ in trainer.logged] == [0, 2, 4]
    assert trainer.logged[1][1]["fisher/trace/all"] == run["trace"].sel(step=2, layer="all")
    quiet = fl.adapters.lightning_callback(points(), log=False, **OPTIONS)
    second = Trainer(seeded(network))
    second.fit(quiet, 4)
    assert second.logged == []
    other = Trainer(model, is_global_zero=False)
    idle = fl.adapters.lightning_callback(points(), **OPTIONS)
    other.fit(idle, 4)
    assert idle.monitor is None


def test_a_lightning_callback_comes_back_from_a_checkpoint(lightning, tmp_path):
    whole = fl.adapters.lightning_callback(points(), **OPTIONS)
    Trainer(seeded(network)).fit(whole, 12)
    trainer = Trainer(seeded(network))
    options = OPTIONS | {"out": tmp_path / "run.nc"}
    part = fl.adapters.lightning_callback(points(), **options)
    trainer.fit(part, 6)
    resumed = Trainer(trainer.model)
    resumed.global_step = 3
    again = fl.adapters.lightning_callback(points(), **options)
    again.load_state_dict(part.state_dict())
    resumed.fit(again, 6)
    times = ["seconds", "monitor_seconds", "share_of_time"]
    assert again.monitor.result.drop_vars(times).equals(whole.monitor.result.drop_vars(times))
    assert load(tmp_path / "run.nc").identical(again.monitor.result)
    resumed.fit(again, 4)  # another fit of the same run goes on
    assert again.monitor.result["step"].values.tolist() == [0, 2, 4, 6, 8]


def test_the_module_to_watch_is_chosen(lightning):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = seeded(network)

        def forward(self, x):
            return self.net(x)

    expected = fl.Monitor(seeded(network), points(), **OPTIONS).result["trace"]
    for module in ("net", lambda model: model.net):
        callback = fl.adapters.lightning_callback(points(), module=module, **OPTIONS)
        callback.on_train_start(Trainer(Holder()), Holder())
        assert callback.monitor.result["trace"].equals(expected)
    with pytest.raises(InputError, match=r"^likelihood is missing: give 'categorical'"):
        fl.adapters.lightning_callback(points())
    with pytest.raises(TypeError, match=r"^module must be a name, a function of the model, or None; got int\.$"):
        fl.adapters.lightning_callback(points(), module=1, **OPTIONS)


def test_a_transformers_callback_goes_on_with_its_file(monkeypatch, tmp_path):
    module = types.ModuleType("transformers")
    module.TrainerCallback = type("TrainerCallback", (), {})
    monkeypatch.setitem(sys.modules, "transformers", module)
    options = OPTIONS | {"out": tmp_path / "run.nc"}
    state = types.SimpleNamespace(global_step=0, is_world_process_zero=True)
    model = seeded(network)

    def fit(callback, steps):
        optimizer = types.SimpleNamespace(
            optimizer=torch.optim.SGD(model.parameters(), lr=0.5), param_groups=[{"lr": 0.5}]
        )
        callback.on_train_begin(None, state, None, model=model, optimizer=optimizer)
        start = state.global_step

        def after(step):
            state.global_step = start + step
            callback.on_step_end(None, state, None, model=model)

        advance(model, steps, after)
        callback.on_train_end(None, state, None)
        return callback.monitor.result

    first = fit(fl.adapters.transformers_callback(points(), **options), 6)
    assert first["step"].values.tolist() == [0, 2, 4, 6]
    assert (first["stability_limit"] == 4).all()  # behind accelerate's wrapper
    state.global_step = 5  # resumed from a checkpoint that was written before the last measurement
    second = fit(fl.adapters.transformers_callback(points(), **options), 4)
    assert second["step"].values.tolist() == [0, 2, 4, 6, 8]
    assert second["trace"][:3].equals(first["trace"][:3])
    assert not second["trace"][3].equals(first["trace"][3])
    state.global_step = 9
    alone = fit(fl.adapters.transformers_callback(points(), **OPTIONS), 2)  # without a file the record begins here
    assert alone["step"].values.tolist() == [9, 11]
    state.is_world_process_zero = False
    idle = fl.adapters.transformers_callback(points(), **OPTIONS)
    idle.on_train_begin(None, state, None, model=model)
    idle.on_step_end(None, state, None)
    idle.on_train_end(None, state, None)
    assert idle.monitor is None


def test_callbacks_do_not_end_a_training_that_diverged(lightning):
    model = seeded(network)
    trainer = Trainer(model)
    callback = fl.adapters.lightning_callback(points(), **OPTIONS)
    trainer.fit(callback, 4)
    with torch.no_grad():
        model[0].bias[0] = torch.inf
    with pytest.warns(NumericalWarning, match="could not measure step 4"):
        trainer.fit(callback, 4)
    assert trainer.logged[-1][0] == 4
    assert "fisher/trace/all" not in trainer.logged[-1][1]
