r"""Claim: statistics that are shared over time cost what the drift of the curvature says.

TENGraD keeps the rows of one batch for many steps, FNGD the example weights of its first epoch. At the same weights and for the same batch, a stale
direction d_s and a fresh one d_f are predicted to lower the loss, each at its own best length, in the ratio of

.. math:: m(d) = \frac{(g^\top d)^2}{2\, d^\top (F + \lambda I)\, d}

with F, g of the claim's data at these weights; the measured ratio is that of the decreases of the loss at three tenths of these lengths. Drift is told in two ways: the
cosine of the two directions, beside that of directions which differ in the batch alone, and \|\|K_t - K_0\|\|/\|\|K_0\|\| of Gram matrices on the same data.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fisherlens.errors import NumericalWarning
from fisherlens.fisher import Fisher
from fisherlens.optim import FNGD, TENGraD
from fisherlens.training.base import Pair
from fisherlens.training.verify.claim import Claim, Row, curves, equal, order
from fisherlens.training.verify.movable import Movable, batches, curvature
from fisherlens.training.verify.subject import Subject

METHODS = ("tengrad", "fngd")
RATE = 0.1  # of both optimizers, whose directions are those of NGD in size
DAMPING = 10.0  # times that of the other claims: a tenth of the largest eigenvalue, as the sources have 0.1 to 0.3 nat
TOLERANCE = 0.2
RANKED = 0.6
_AGES = {
    "quick": (1, 4, 16),
    "full": (1, 4, 16, 64, 100),
}  # steps since the statistics were taken; 100 is TENGraD's published period
_EPOCH = {"quick": 8, "full": 32}  # first steps of FNGD, in which it averages
FRACTION = 0.3  # of the best length: a quadratic model is trusted that far, and the ratio that it predicts is the same for every fraction
_MOST_ROWS = 3000  # Gram matrices above this order are not compared
_CURVES = {
    "predicted": "predicted decrease, stale over fresh",
    "measured": "measured decrease, stale over fresh",
    "cosine": "cosine of the stale and the fresh direction",
    "other_batch": "cosine of fresh directions with two batches' rows",
    "gram": "relative change of the Gram matrix",
}

Make = Callable[[Movable], Any]


@dataclass
class Drift:
    """What one method shows at each age, ``(ages,)``."""

    predicted: np.ndarray
    measured: np.ndarray
    cosine: np.ndarray
    other_batch: np.ndarray
    gram: np.ndarray


def sharing(
    subjects: Sequence[Subject], *, ages: Sequence[int] | None = None, batch_size: int | None = None, rate: float = RATE
) -> Claim:
    """Compare what stale statistics are predicted to cost with what they cost, along runs from the initial weights.

    Parameters
    ----------
    subjects
        One per seed.
    ages
        Steps since TENGraD's rows, or the end of FNGD's first epoch, at which stale and fresh are compared; by preset.
    batch_size
        Examples of a step; the problem's.
    rate
        Learning rate of both.

    Returns
    -------
    Rows ``sharing/tengrad-<age>`` and ``/fngd-<age>`` (stale over fresh, of the predicted and of the measured decrease) and ``/order``: whether
    what is lost ranks over methods and ages as predicted. Curves over (method, age): ``sharing_predicted``,
    ``sharing_measured``, ``sharing_cosine``, ``sharing_other_batch`` (cosine to the direction with another batch's statistics taken at the same
    weights: what is not drift) and ``sharing_gram``.
    """
    first = subjects[0]
    first.require_loss()
    when = tuple(_AGES.get(first.preset, _AGES["quick"]) if ages is None else ages)
    found: list[dict[str, Drift]] = []
    for subject in subjects:
        start = subject.initial
        size = start.problem.batch_size if batch_size is None else batch_size
        with warnings.catch_warnings():
            # parameters without statistics are part of both directions, stale and fresh
            warnings.filterwarnings("ignore", r"\w+ does not precondition", NumericalWarning)
            found.append({"tengrad": _tengrad(start, when, size, rate), "fngd": _fngd(start, when, size, rate)})
        subject.tick("shared statistics followed")
    rows: list[Row] = []
    for method, words in (
        ("tengrad", "Rows of {age} steps ago cost TENGraD"),
        ("fngd", "Weights frozen {age} steps ago cost FNGD"),
    ):
        for k, age in enumerate(when):
            cosine, other, gram = (
                float(np.mean([getattr(one[method], name)[k] for one in found]))
                for name in ("cosine", "other_batch", "gram")
            )
            beside = "" if math.isnan(other) else f", {other:.2g} for a fresh one with another batch's rows"
            rows.append(
                equal(
                    f"sharing/{method}-{age}",
                    words.format(age=age) + " the share of the decrease that the quadratic model says.",
                    [(float(one[method].predicted[k]), float(one[method].measured[k])) for one in found],
                    TOLERANCE,
                    note=f"stale over fresh; cosine {cosine:.2g}{beside}; Gram matrix changed by {gram:.2g}",
                )
            )
    lists = [
        (
            np.concatenate([one[method].predicted for method in METHODS]),
            np.concatenate([one[method].measured for method in METHODS]),
        )
        for one in found
    ]
    flat = all(np.ptp(a) < 1e-6 and np.ptp(b) < 1e-6 for a, b in lists)
    if not flat and len(when) * len(METHODS) >= 3:
        rows.append(
            order(
                "sharing/order",
                "What shared statistics lose of the decrease ranks over methods and ages as the quadratic model says.",
                lists,
                RANKED,
            )
        )
    ages_in_steps = {"long_name": "steps since the statistics were taken", "units": "1"}
    coords = {"sharing_method": list(METHODS), "sharing_age": ("sharing_age", list(when), ages_in_steps)}
    return Claim(tuple(rows), curves("sharing", found, _CURVES, coords, _of_methods))


def _tengrad(start: Subject, ages: Sequence[int], size: int, rate: float) -> Drift:
    network, fresh = Movable(start), Movable(start)
    plan = batches(start, size, ages[-1] + 1, 61)
    options = _options(start)

    def make(on: Movable, refresh: int) -> TENGraD:
        # the clip is that of the source: it keeps the path from breaking off, and leaves directions as they are
        return TENGraD(on.model, rate, DAMPING * start.damping, refresh=refresh, momentum=0.0, **options)

    stale = make(network, ages[-1] + 1)
    seen = _Seen(start, ages)
    for t, batch in enumerate(plan):
        before = network.here()
        network.backward(stale, batch)
        stale.step()
        if t in ages:
            direction = before - network.here()
            reference = _direction(fresh.put(before), make(fresh, 1), batch)
            seen.add(t, before, direction, reference, _with_rows_of(fresh, make(fresh, 2), before, plan[0], batch))
    return seen.drift


def _fngd(start: Subject, ages: Sequence[int], size: int, rate: float) -> Drift:
    network, fresh = Movable(start), Movable(start)
    epoch = _EPOCH.get(start.preset, 8)
    plan = batches(start, size, epoch + ages[-1], 67)

    def make(on: Movable, steps: int) -> FNGD:
        return FNGD(
            on.model, rate, DAMPING * start.damping, epoch_steps=steps, momentum=0.0, likelihood=start.likelihood
        )

    shared = make(network, epoch)
    seen = _Seen(start, ages)
    for t, batch in enumerate(plan, start=1):
        before = network.here()
        network.backward(shared, batch)
        shared.step()
        if t - epoch in ages:
            direction = before - network.here()
            seen.add(t - epoch, before, direction, _direction(fresh.put(before), make(fresh, 1), batch), None)
    return seen.drift


def _options(start: Subject) -> dict[str, Any]:
    labels = "true" if start.kind == "empirical" else "sampled"
    return {"likelihood": start.likelihood, "labels": labels, "seed": start.seed}


def _direction(network: Movable, optimizer: Any, batch: Pair) -> Tensor:
    """The direction of an optimizer's first step where the network stands."""
    before = network.here()
    network.backward(optimizer, batch)
    optimizer.step()
    optimizer.remove_hooks()
    return before - network.here()


def _with_rows_of(network: Movable, optimizer: Any, theta: Tensor, rows: Pair, batch: Pair) -> Tensor:
    """The direction of a batch's gradient with the rows of another batch, both taken at θ."""
    network.put(theta)
    network.backward(optimizer, rows)
    optimizer.step()
    network.put(theta)
    return _direction(network, optimizer, batch)


class _Seen:
    """Judges stale against fresh directions, age by age."""

    def __init__(self, start: Subject, ages: Sequence[int]):
        self.start, self.ages = start, list(ages)
        self.drift = Drift(*(np.full(len(self.ages), np.nan) for _ in range(5)))
        self.network = Movable(start)
        self.first = self._gram(self.network.fisher(start.data, "exact"))

    def _gram(self, F: Fisher) -> Tensor | None:
        return F.gram().double() if F.n_rows <= _MOST_ROWS else None

    def add(self, age: int, theta: Tensor, stale: Tensor, fresh: Tensor, other: Tensor | None) -> None:
        k, start, drift = self.ages.index(age), self.start, self.drift
        network = self.network.put(theta)
        F = network.fisher(start.data, "exact")
        told = F if start.kind == "exact" else network.fisher(start.data, start.kind, start.seed)
        operator, g = network.predictor(told), F.gradient()
        before = start.loss(theta)
        promised, kept = zip(*(self._decrease(operator, F, g, theta, before, d) for d in (stale, fresh)), strict=True)
        drift.predicted[k] = promised[0] / promised[1] if promised[1] > 0 else np.nan
        drift.measured[k] = kept[0] / kept[1] if kept[1] > 0 else np.nan
        drift.cosine[k] = _cosine(stale, fresh)
        drift.other_batch[k] = np.nan if other is None else _cosine(other, fresh)
        gram = self._gram(F)
        if gram is not None and self.first is not None and gram.shape == self.first.shape:
            drift.gram[k] = float((gram - self.first).norm() / self.first.norm())

    def _decrease(
        self, operator: Any, F: Fisher, g: Tensor, theta: Tensor, before: float, d: Tensor
    ) -> tuple[float, float]:
        """What the quadratic model promises along -d, and the decrease of the loss at a share of the true model's best length."""
        damping = DAMPING * self.start.damping
        slope = float(g @ d)
        bend, true = (float(curvature(one, d)) + damping * float(d @ d) for one in (operator, F))
        promised = max(slope, 0.0) * slope / (2 * bend) if bend > 0 else math.nan
        length = slope / true if true > 0 else 0.0
        drop = before - self.start.loss(theta - FRACTION * length * d)
        return promised, drop if math.isfinite(drop) else math.nan


def _of_methods(one: dict[str, Drift], name: str) -> np.ndarray:
    """What the methods show of something, ``(methods, ages)``."""
    return np.array([getattr(one[method], name) for method in METHODS])


def _cosine(a: Tensor, b: Tensor) -> float:
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale else math.nan
