"""A Monitor inside the real Lightning and Hugging Face Trainers, and in real logs, where these libraries are installed."""

import sys

import numpy as np
import pytest
import torch
from adapter_samples import OPTIONS, advance, hide, network, points, seeded
from torch import nn
from torch.nn import functional

import fisherlens as fl
from fisherlens.errors import InputError


def watched(steps, *sinks):
    model = seeded(network)
    with fl.Monitor(model, points(), **OPTIONS, to=sinks, strict=True) as monitor:
        advance(model, steps, lambda step: monitor.step())
    return monitor


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
def test_lightning_trains_the_same_and_resumes(library, tmp_path, monkeypatch):
    pl = pytest.importorskip(library)
    hide(monkeypatch, "pytorch_lightning" if library.startswith("lightning") else "lightning")
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
