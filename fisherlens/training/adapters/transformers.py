"""A callback for the Trainer of Hugging Face's transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fisherlens.training.adapters.libraries import require
from fisherlens.training.adapters.owner import Owner


def transformers_callback(
    data: Any, *, module: str | Callable[[nn.Module], nn.Module] | None = None, **options: Any
) -> Any:
    """Build a callback that watches a Hugging Face ``Trainer`` with a :class:`fisherlens.Monitor`: ``Trainer(..., callbacks=[...])``.

    Its ``monitor`` holds the result. It runs on the first process only. A Trainer that resumes from a checkpoint goes on with the file of
    ``out``, whose measurements of steps behind the checkpoint are dropped; drift is then counted from the first space after it.

    Parameters
    ----------
    data
        As for the Monitor; batches may be dicts with the targets under ``"labels"``, as a data collator makes them.
    module
        The part of the model to watch: a name, a function of the model, or None for all of it, whose output may hold the ``logits``.
    **options
        All other arguments of the Monitor; ``likelihood`` is needed. Loggers go into ``to``: the Trainer's own are not reached by callbacks.

    Returns
    -------
    A ``transformers.TrainerCallback``.

    Raises
    ------
    ImportError: transformers is not installed; names the command. InputError: no likelihood; when the training starts, what the Monitor
    refuses.
    """
    library = require("fl.adapters.transformers_callback", ["transformers"], "transformers")
    owner = Owner(data, module, options)

    class FisherCallback(library.TrainerCallback):  # type: ignore[name-defined, misc]
        """Steps a Monitor after each optimizer step."""

        @property
        def monitor(self) -> Any:
            """The Monitor; None before the training starts."""
            return owner.monitor

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                owner.begin(kwargs["model"], kwargs.get("optimizer"), state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            owner.step(state.global_step)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if owner.monitor is not None:
                owner.monitor.close()

    return FisherCallback()
