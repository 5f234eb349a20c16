"""Damping that follows how well the quadratic model predicts the loss, after Levenberg and Marquardt."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fisherlens.errors import InputError
from fisherlens.optim import texts
from fisherlens.optim.kernels import RowMethod

EVERY, FACTOR = 5, 0.9**5  # the schedule of kfac-jax: every 5 steps by 0.9^5


class AdaptiveDamping(RowMethod):
    """Adds to a method with rows: λ falls where a step brought what the model had promised, and rises where it did not.

    The ratio is that of the change of the batch's loss to ḡᵀδ + ½ δᵀ(F + λI)δ, with δ all that the step adds but weight decay.
    """

    adapt_damping = False
    _predicted = 0.0

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the parameters by one step, and adapt λ where that was asked for: then a closure is needed, and called twice at times.

        Errors are those of all methods' steps; a missing closure is an InputError.
        """
        if self.adapt_damping and closure is None:
            raise InputError(texts.NEEDS_CLOSURE.format(name=self.name))
        loss = super().step(closure)
        if self.adapt_damping and self.diagnostics["steps"] % EVERY == 0:
            with torch.enable_grad():
                after = closure()
            self._clear()  # the closure's statistics belong to no step
            ratio = (_number(after) - _number(loss)) / self._predicted if self._predicted < 0 else -math.inf
            factor = (
                FACTOR if ratio > 0.75 else 1.0 if ratio >= 0.25 else 1 / FACTOR
            )  # more of it also where the ratio is no number
            for group in self.param_groups:
                group["damping"] *= factor
        return loss

    def _move(self, direction: Tensor, active: set[str]) -> None:
        if self.adapt_damping and (self.diagnostics["steps"] + 1) % EVERY == 0:
            self._predicted = self._model_change(-self._values("lr") * direction, active)
        super()._move(direction, active)

    def _model_change(self, change: Tensor, active: set[str]) -> float:
        """ḡᵀδ + ½ δᵀ(F + λI)δ, in the units of the loss; F is I where there are no statistics."""
        gradient, _ = self._mean_gradient()
        moving = torch.zeros_like(change)
        for layer in self.layout.layers:
            moving[layer.start : layer.stop] = float(layer.name in active)
        change = change * moving
        curved = (1 + self.param_groups[0]["damping"]) * change
        for block in self._kept.values():
            block.write(block.product(block.of(change)[:, None])[:, 0], curved, active)
        value = (gradient.double() @ change.double() + change.double() @ curved.double() / 2).item()
        return value * (self._examples if self.reduction == "sum" else 1)


def _number(loss: Any) -> float:
    return loss.item() if isinstance(loss, Tensor) else float(loss)
