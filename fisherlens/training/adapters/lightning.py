"""A callback for Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fisherlens.training.adapters.libraries import require
from fisherlens.training.adapters.owner import Owner

_LIBRARIES = ("lightning.pytorch", "pytorch_lightning")


def lightning_callback(
    data: Any, *, module: str | Callable[[nn.Module], nn.Module] | None = None, log: bool = True, **options: Any
) -> Any:
    """Build a Lightning callback that watches a ``trainer.fit`` with a :class:`fisherlens.Monitor`.

    Its ``monitor`` holds the result. It runs on the first process only, goes into Lightning's checkpoints and comes back from them.

    Parameters
    ----------
    data
        As for the Monitor.
    module
        The network inside the LightningModule whose forward gives the outputs of the likelihood: the name of an attribute such as ``"net"``, a
        function of the LightningModule, or None where its own forward does.
    log
        Also send every measurement to the Trainer's loggers, as ``fisher/...``.
    **options
        All other arguments of the Monitor; ``likelihood`` is needed. ``optimizer`` is the Trainer's first one unless given, and steps are its
        ``global_step``, which counts those of all its optimizers.

    Returns
    -------
    A ``Callback`` of ``lightning`` or ``pytorch_lightning``: of the one that is imported already, or that is installed.

    Raises
    ------
    ImportError: neither is installed; names the command. InputError: no likelihood; when the fit starts, what the Monitor refuses.
    """
    library = require("fl.adapters.lightning_callback", _LIBRARIES, "lightning")
    owner = Owner(data, module, options)

    class FisherCallback(library.Callback):  # type: ignore[name-defined, misc]
        """Steps a Monitor after each batch that moved the parameters."""

        @property
        def monitor(self) -> Any:
            """The Monitor; None before the training starts."""
            return owner.monitor

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.is_global_zero:
                return
            if log:
                owner.options["to"] = [*options.get("to", ()), _Loggers(trainer)]
            optimizers = list(trainer.optimizers)
            owner.begin(pl_module, optimizers[0] if optimizers else None, trainer.global_step)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any, **__: Any) -> None:
            owner.step(trainer.global_step)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            if owner.monitor is not None:
                owner.monitor.close()

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            if owner.monitor is not None:
                owner.monitor.close()

        def state_dict(self) -> dict[str, Any]:
            return owner.state()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            owner.load(state_dict)

    return FisherCallback()


class _Loggers:
    """Hands measurements to whatever loggers a Trainer has."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def __call__(self, step: int, values: dict[str, float]) -> None:
        named = {f"fisher/{name}": value for name, value in values.items()}
        for logger in self.trainer.loggers:
            logger.log_metrics(named, step=step)
