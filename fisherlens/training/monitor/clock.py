"""When to measure, and what it costs: the share of the wall time that is spent on looking rather than on training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """Counts the seconds of a run and those of them in the Monitor, on from an earlier part if there was one."""

    def __init__(self, elapsed: float = 0.0, spent: float = 0.0) -> None:
        self._origin = time.perf_counter() - elapsed
        self._spent = spent
        self._inside: float | None = None
        self._latest = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds of the run; what lies between its parts does not count."""
        return time.perf_counter() - self._origin

    @property
    def spent(self) -> float:
        """Seconds of it in the Monitor."""
        return self._spent + (0.0 if self._inside is None else time.perf_counter() - self._inside)

    @property
    def share(self) -> float:
        """Share of the time spent in the Monitor so far."""
        return min(self.spent / max(self.elapsed, 1e-9), 1.0)

    def allows(self, max_share: float | None) -> bool:
        """Whether one more measurement like the latest keeps the share at a limit or below."""
        if max_share is None:
            return True
        return self._spent + self._latest <= max_share * (self.elapsed + self._latest)

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Count what is inside; what the device still has to do for the training is waited for, and not counted."""
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        self._inside = time.perf_counter()
        try:
            yield
        finally:
            self._latest = time.perf_counter() - self._inside
            self._spent, self._inside = self._spent + self._latest, None


def learning_rate(optimizer: Any) -> float:
    """The largest learning rate of an optimizer's groups; NaN where it names none."""
    rates = [float(group["lr"]) for group in getattr(optimizer, "param_groups", ()) if "lr" in group]
    return max(rates, default=float("nan"))


def stability_limit(optimizer: Any) -> float:
    r"""The largest curvature at which gradient descent does not diverge on a quadratic; NaN for anything but SGD.

    2(1 + β)/η with heavy-ball momentum β, 2(1 + β)/(η (1 + 2β)) with Nesterov's, less the weight decay; the smallest over the groups. Source: Cohen et
    al., *Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability* (2021), section 3 and appendix B; derived again for torch's update.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # behind the wrappers of accelerate and Lightning
    if not isinstance(inner, torch.optim.SGD):
        return float("nan")
    limits = []
    for group in inner.param_groups:
        rate, beta = float(group["lr"]), float(group["momentum"])
        if group["dampening"] or group["maximize"] or rate <= 0:
            return float("nan")
        factor = 2 * (1 + beta) / (1 + 2 * beta) if group["nesterov"] else 2 * (1 + beta)
        limits.append(factor / rate - float(group["weight_decay"]))
    return min(limits, default=float("nan"))
