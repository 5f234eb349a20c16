"""Where measurements go as they are made: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from fisherlens.errors import InputError
from fisherlens.training.adapters.libraries import require

PREFIX = "fisher/"


class Logger:
    """A function ``(step, values)`` with a ``close``; what it receives has names such as ``trace/all`` and finite values."""

    def __init__(self, prefix: str):
        if not isinstance(prefix, str):
            raise TypeError(f"prefix must be text that is put before each name, such as 'fisher/'; got {prefix!r}.")
        self.prefix = prefix

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Let go of what this logger opened itself; what it was given stays open."""


class _TensorBoard(Logger):
    def __init__(self, writer: Any, prefix: str):
        super().__init__(prefix)
        self._own = isinstance(writer, str | os.PathLike)
        if self._own:
            module = require("fl.adapters.tensorboard", ["torch.utils.tensorboard"], "tensorboard")
            writer = module.SummaryWriter(log_dir=os.fspath(writer))
        if not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(f"tensorboard takes a SummaryWriter or the folder of one; got {type(writer).__name__}.")
        self.writer = writer

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(self.prefix + name, value, global_step=step)
        self.writer.flush()

    def close(self) -> None:
        if self._own:
            self.writer.close()


class _WandB(Logger):
    def __init__(self, run: Any, prefix: str):
        super().__init__(prefix)
        if run is None:
            run = require("fl.adapters.wandb", ["wandb"], "wandb").run
            if run is None:
                raise InputError("wandb has no active run. Start one before: run = wandb.init(...), and pass it.")
        if not callable(getattr(run, "log", None)):
            raise TypeError(
                f"wandb takes what wandb.init returned, or None for the active run; got {type(run).__name__}."
            )
        self.run = run
        self._axis = f"{prefix}step"
        if callable(getattr(run, "define_metric", None)):
            # an axis of its own: the run's step counts the calls of log, those of the training loop too
            run.define_metric(self._axis)
            run.define_metric(f"{prefix}*", step_metric=self._axis)

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({self._axis: step} | {self.prefix + name: value for name, value in values.items()})


class _MLflow(Logger):
    def __init__(self, client: Any, run_id: str | None, prefix: str):
        super().__init__(prefix)
        if (client is None) != (run_id is None):
            raise InputError("mlflow takes a client together with a run_id, or neither for the active run.")
        if client is None:
            self._module = require("fl.adapters.mlflow", ["mlflow"], "mlflow-skinny")
        elif not callable(getattr(client, "log_metric", None)):
            raise TypeError(f"client must be an mlflow.MlflowClient; got {type(client).__name__}.")
        self.client, self.run_id = client, run_id

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        # MLflow takes letters, digits and _ - . / in names, and layers have others
        named = {re.sub(r"[^\w\-./ ]", "_", self.prefix + name, flags=re.ASCII): x for name, x in values.items()}
        if self.client is None:
            self._module.log_metrics(named, step=step)
            return
        for name, value in named.items():
            self.client.log_metric(self.run_id, name, value, step=step)


def tensorboard(writer: Any, *, prefix: str = PREFIX) -> Callable[[int, Mapping[str, float]], None]:
    """Write every measurement to TensorBoard.

    Parameters
    ----------
    writer
        A ``SummaryWriter``, which stays yours to close, or a folder, for which one is opened and closed with the Monitor.
    prefix
        Put before each name: ``fisher/trace/all``.

    Raises
    ------
    ImportError: a folder, and ``tensorboard`` is not installed. TypeError: something else.
    """
    return _TensorBoard(writer, prefix)


def wandb(run: Any = None, *, prefix: str = PREFIX) -> Callable[[int, Mapping[str, float]], None]:
    """Log every measurement to a run of Weights & Biases, over an axis ``fisher/step`` of its own.

    Parameters
    ----------
    run
        What ``wandb.init`` returned; None for the active run.
    prefix
        Put before each name.

    Raises
    ------
    ImportError: None, and ``wandb`` is not installed. InputError: no active run. TypeError: something that is no run.
    """
    return _WandB(run, prefix)


def mlflow(
    client: Any = None, run_id: str | None = None, *, prefix: str = PREFIX
) -> Callable[[int, Mapping[str, float]], None]:
    """Log every measurement to a run of MLflow, at its optimizer step.

    Parameters
    ----------
    client, run_id
        An ``MlflowClient`` and the run to log to; neither for the active run.
    prefix
        Put before each name. Characters that MLflow refuses in names become ``_``.

    Raises
    ------
    ImportError: neither, and ``mlflow`` is not installed (``mlflow-skinny`` is enough). InputError: one without the other.
    """
    return _MLflow(client, run_id, prefix)
