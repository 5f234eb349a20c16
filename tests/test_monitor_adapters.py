"""A Monitor in other people's training loops and logs: the logic with stand-ins of their classes, and the real libraries where they are installed."""

import re
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import fisherlens as fl
from fisherlens.errors import InputError, NumericalWarning
from fisherlens.results import load

OPTIONS = {"likelihood": "categorical", "every": 2, "k": 2}


def seeded(build, seed=3):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build()


def network():
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3))


def points(n=12):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 3


def advance(model, steps, after):
    x, y = points()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1, steps + 1):
        loss = functional.cross_entropy(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        after(step)


def watched(steps, *sinks):
    model = seeded(network)
    with fl.Monitor(model, points(), **OPTIONS, to=sinks, strict=True) as monitor:
        advance(model, steps, lambda step: monitor.step())
    return monitor


@pytest.fixture
def without(monkeypatch):
    """Make libraries fail to import, also where they are installed."""

    def hide(*names):
        for name in list(sys.modules):
            if name.split(".")[0] in names or name in names:
                monkeypatch.delitem(sys.modules, name)
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    return hide


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
def test_a_missing_library_is_named_with_the_command_that_brings_it(without, hidden, make, what, package):
    without(*hidden)
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


# --- the real libraries ----------------------------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_tensorboard_reads_back_what_was_measured(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = watched(4, fl.adapters.tensorboard(tmp_path / "logs"))
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    found = events.Scalars("fisher/trace/all")
    assert [event.step for event in found] == [0, 2, 4]
    np.testing.assert_allclose([event.value for event in found], monitor.result["trace"].sel(layer="all"), rtol=1e-6)
    assert {"fisher/loss", "fisher/eigenvalue/0", "fisher/trace/0"} <= set(events.Tags()["scalars"])


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_mlflow_reads_back_what_was_measured(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # newer releases ask for a database otherwise
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    client = mlflow.MlflowClient()
    for own in (True, False):
        with mlflow.start_run() as run:
            sink = fl.adapters.mlflow() if own else fl.adapters.mlflow(client, run.info.run_id)
            monitor = watched(4, sink)
        history = sorted(client.get_metric_history(run.info.run_id, "fisher/trace/all"), key=lambda metric: metric.step)
        assert [metric.step for metric in history] == [0, 2, 4]
        np.testing.assert_allclose([metric.value for metric in history], monitor.result["trace"].sel(layer="all"))


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_wandb_takes_every_measurement_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert wandb.run is None
    with pytest.raises(InputError, match=r"^wandb has no active run\. Start one before"):
        fl.adapters.wandb()
    run = wandb.init(project="fisherlens", mode="offline", dir=str(tmp_path))
    try:
        model = seeded(network)
        with fl.Monitor(model, points(), **OPTIONS, to=[fl.adapters.wandb()], strict=True) as monitor:
            for step in (1, 2, 3, 4):
                run.log({"mine": step})  # the loop's own calls move the run's step
                monitor.step()
        assert run.summary["fisher/step"] == 4
        assert run.summary["fisher/trace/all"] == pytest.approx(float(monitor.result["trace"][-1, -1]))
    finally:
        run.finish()


def lightning_module(pl):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 3))

        def training_step(self, batch, _):
            return functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)

    return Module()


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning_trains_the_same_and_resumes(library, tmp_path, without):
    pl = pytest.importorskip(library)
    without("pytorch_lightning" if library.startswith("lightning") else "lightning")
    sys.modules.setdefault(library, pl)
    data = torch.utils.data.TensorDataset(*points(24))

    def fit(steps, watched, module=None, checkpoint=None):
        callbacks = [fl.adapters.lightning_callback(points(), module="net", strict=True, **OPTIONS)] if watched else []
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            module = lightning_module(pl)
            quiet = {
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "logger": False,
                "enable_checkpointing": False,
            }
            trainer = pl.Trainer(
                max_steps=steps,
                accelerator="cpu",
                callbacks=callbacks,
                default_root_dir=tmp_path,
                accumulate_grad_batches=2,
                **quiet,
            )
            trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4), ckpt_path=checkpoint)
        return trainer, module, callbacks[0].monitor if watched else None

    _, plain, _ = fit(6, watched=False)
    trainer, seen, monitor = fit(6, watched=True)
    for key, value in plain.state_dict().items():
        assert torch.equal(value, seen.state_dict()[key]), key
    assert monitor.result["step"].values.tolist() == [0, 2, 4, 6]
    assert monitor.result["measured"].all()
    np.testing.assert_allclose(monitor.result["stability_limit"], 2 * 1.9 / 0.1)
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    _, _, again = fit(9, watched=True, checkpoint=path)
    assert again.result["step"].values.tolist() == [0, 2, 4, 6, 8]
    assert again.result["trace"][:4].equals(monitor.result["trace"])
    assert again.result["overlap_first"][-1].notnull()


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_the_hugging_face_trainer_trains_the_same_and_resumes(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.BertConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=6,
        num_labels=2,
    )
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": torch.randint(11, (5,), generator=generator), "labels": torch.tensor(n % 2)} for n in range(16)
    ]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    def fit(steps, watched, folder, resume=None):
        options = OPTIONS | {"num_examples": 6, "out": tmp_path / "run.nc", "strict": True}
        callbacks = [fl.adapters.transformers_callback(batch, **options)] if watched else []
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model = transformers.BertForSequenceClassification(config)
            arguments = transformers.TrainingArguments(
                output_dir=str(tmp_path / folder),
                max_steps=steps,
                per_device_train_batch_size=4,
                save_steps=3,
                save_strategy="steps",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                logging_strategy="no",
                seed=0,
            )
            transformers.Trainer(model=model, args=arguments, train_dataset=rows, callbacks=callbacks).train(
                resume_from_checkpoint=resume
            )
        return model, callbacks[0].monitor if watched else None

    plain, _ = fit(4, watched=False, folder="plain")
    seen, monitor = fit(4, watched=True, folder="seen")
    for key, value in plain.state_dict().items():
        assert torch.equal(value, seen.state_dict()[key]), key
    first = monitor.result
    assert first["step"].values.tolist() == [0, 2, 4]
    assert first["measured"].all()
    assert first["lr"][0] == pytest.approx(5e-5, rel=0.5)
    _, again = fit(6, watched=True, folder="seen", resume=str(tmp_path / "seen" / "checkpoint-3"))
    assert again.result["step"].values.tolist() == [0, 2, 4, 6]
    assert again.result["trace"][:2].equals(first["trace"][:2])


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
