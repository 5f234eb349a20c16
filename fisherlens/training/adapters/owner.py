"""What the callbacks of training frameworks share: a Monitor that is built when the training starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fisherlens.errors import InputError
from fisherlens.training.monitor import Monitor

Choice = str | Callable[[nn.Module], nn.Module] | None


class Owner:
    """Builds a Monitor late, steps it, and carries its state.

    Parameters
    ----------
    data
        What the Monitor judges by.
    module
        Which part of the framework's model it is: None for all of it, the name of a submodule, or a function of the model.
    options
        All other arguments of the Monitor.
    """

    def __init__(self, data: Any, module: Choice, options: Mapping[str, Any]):
        if "likelihood" not in options:
            raise InputError(
                "likelihood is missing: give 'categorical', 'bernoulli', 'gaussian' or a fisherlens likelihood, as to fl.Monitor."
            )
        if module is not None and not isinstance(module, str) and not callable(module):
            raise TypeError(f"module must be a name, a function of the model, or None; got {type(module).__name__}.")
        self.data, self.module, self.options = data, module, dict(options)
        self.monitor: Monitor | None = None
        self._state: Mapping[str, Any] | None = None

    def begin(self, model: nn.Module, optimizer: Any, at: int) -> None:
        """Build the Monitor. At step 0 a run begins; at a later one it goes on with what a checkpoint or a file brought."""
        options = {"optimizer": optimizer} | self.options
        state, self._state = self._state, None
        if at > 0:
            options |= {"start": False, "existing": "continue"}
            if state is None and self.monitor is not None:  # the same callback in another fit of the same run
                state = self.monitor.state_dict()
        self.monitor = Monitor(self._watched(model), self.data, **options)
        if at > 0:
            if state is not None:
                self.monitor.load_state_dict(state)
            measured = self.monitor.step(at)
            if not measured and not self.monitor.result.sizes["step"]:
                self.monitor.measure()

    def _watched(self, model: nn.Module) -> nn.Module:
        if isinstance(self.module, str):
            return model.get_submodule(self.module)
        return model if self.module is None else self.module(model)

    def step(self, at: int) -> None:
        """Tell the Monitor how many optimizer steps there were."""
        if self.monitor is not None and at != self.monitor.steps:
            self.monitor.step(at)

    def state(self) -> dict[str, Any]:
        """For a checkpoint; empty before the training starts."""
        return {} if self.monitor is None else self.monitor.state_dict()

    def load(self, state: Mapping[str, Any]) -> None:
        """From a checkpoint, before the training starts."""
        self._state = state or None
