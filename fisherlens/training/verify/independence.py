r"""Claim: block-wise steps follow exact natural gradient in function space as far as :func:`fisherlens.independence` says.

From equal weights and an equal batch, with p = (F + λ)⁻¹g, p_b = (F_b + λ)⁻¹g and its best length α = g·p_b/(p_bᵀ(F + λ)p_b), in the metric F + λ

.. math:: \frac{\|p - \alpha p_b\|^2}{\|p\|^2} = 1 - \eta, \qquad \eta = \text{decrease ratio},

and a squared distance of two short steps is twice the divergence of what the network says after them. So the distance of the block step from the
exact one, over the length of the exact one, is predicted as √(1 - η) and measured as the root of

.. math:: \frac{\mathrm{KL}(p_{\theta - r p} \,\|\, p_{\theta - r \alpha p_b})}{\mathrm{KL}(p_\theta \,\|\, p_{\theta - r p})}.

Predictions know the batch and its damped matrix; the divergence is that on the claim's data, which the optimizer has not chosen its step for.

The steps are those of :class:`fisherlens.optim.NGD` and of :class:`fisherlens.optim.CWNGD` on that partition, momentum, averages and clipping off, if these had
statistics of every parameter: here the blocks of normalisation layers and of modules of one's own are natural-gradient blocks too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherlens.approximations import BlockDiagonal
from fisherlens.fisher import Fisher
from fisherlens.partitions import Partition
from fisherlens.training.base import Pair
from fisherlens.training.verify.blocks import chosen, judge, quality
from fisherlens.training.verify.claim import Claim, Row, curves, equal, order
from fisherlens.training.verify.movable import Movable, batches, curvature
from fisherlens.training.verify.subject import Subject

HARMLESS = 0.9  # a segmentation that keeps this share of the decrease is called harmless
FRACTION = 0.1  # r: the share of the full natural step that is taken, so that steps stay in the quadratic region
TOLERANCE = 0.25
RANKED = 0.7
_STEPS = {"quick": 6, "full": 30}
_MOST_ROWS = 1200  # score rows of a batch: each step factors a matrix of this order
_SAME = 1e-6  # shares of the way that are this near to 1 are 1
_CURVES = {
    "predicted": "decrease ratio of the segmentation",
    "cosine": "cosine to the exact natural gradient",
    "shared": "share of the exact step's way that the block step has in common with it",
    "apart": "divergence of the block run from the exact one, over that of the exact one from its start",
}


@dataclass(frozen=True)
class Departure:
    """Over (segmentations, steps): what a step is predicted to share with the exact one, what it shares, and how far whole runs are apart."""

    predicted: np.ndarray
    cosine: np.ndarray
    shared: np.ndarray
    apart: np.ndarray


def independence(
    subjects: Sequence[Subject],
    *,
    partitions: Mapping[str, Any] | None = None,
    num_steps: int | None = None,
    batch_size: int | None = None,
    fraction: float = FRACTION,
) -> Claim:
    """Compare how far segmentations are predicted to depart from exact natural gradient with how far they depart in function space.

    Parameters
    ----------
    subjects
        One per seed; kind and damping are theirs.
    partitions
        Name → what :func:`fisherlens.partition` takes; None for layers, units, the segments of CW-NGD and MBF, shuffled blocks of CW-NGD's
        sizes, and single entries.
    num_steps, batch_size
        Steps of the runs, by preset; examples of each, the problem's, or fewer where each has many score columns.
    fraction
        r, the share of the full natural step that is taken.

    Returns
    -------
    A row ``independence/<segmentation>`` each, the distance √(1 - share), mean over the steps of the exact run, and
    ``independence/runs``: whether segmentations that are predicted to share less end further from the exact run, each on its own path from
    equal weights through equal batches. Curves over steps: ``independence_predicted``, ``independence_shared``, ``independence_cosine`` and
    ``independence_apart`` (divergence of the two runs over that of the exact run from its start).
    """
    parts = [chosen(subject, partitions) for subject in subjects]
    names = [name for name in parts[0] if all(name in one for one in parts)]
    found = []
    for subject, one in zip(subjects, parts, strict=True):
        steps = _STEPS.get(subject.preset, 6) if num_steps is None else num_steps
        size = _batch_size(subject) if batch_size is None else batch_size
        found.append(_follow(subject, [one[name] for name in names], steps, size, fraction))
    rows: list[Row] = []
    for place, name in enumerate(names):
        pairs = [(_distance(one.predicted[place]), _distance(one.shared[place])) for one in found]
        ratio = float(np.mean([one.predicted[place].mean() for one in found]))
        cosine = float(np.mean([one.cosine[place].mean() for one in found]))
        last = float(np.mean([one.apart[place, -1] for one in found]))
        rows.append(
            equal(
                f"independence/{name}",
                f"A step with {name} blocks departs from the exact natural step, in function space, as far as its decrease ratio says.",
                pairs,
                TOLERANCE,
                note=f"{'harmless' if ratio >= HARMLESS else 'not harmless'} by its decrease ratio {ratio:.2g}; cosine {cosine:.2g}; after "
                f"{found[0].apart.shape[1]} steps the runs are apart by {last:.2g} of the exact run's way, in divergence",
            )
        )
    lists = [(one.predicted.mean(1), -one.apart[:, -1]) for one in found]
    if len(names) >= 3 and not all(np.ptp(a) < _SAME and np.ptp(b) < _SAME for a, b in lists):
        rows.append(
            order(
                "independence/runs",
                "The less a segmentation shares with the exact step, the further its run ends from the exact run.",
                lists,
                RANKED,
            )
        )
    steps = {"long_name": "optimizer steps", "units": "1"}
    coords = {
        "independence_segmentation": list(names),
        "independence_step": ("independence_step", np.arange(1, found[0].shared.shape[1] + 1), steps),
    }
    return Claim(tuple(rows), curves("independence", found, _CURVES, coords))


def _batch_size(subject: Subject) -> int:
    """That of the problem, as far as a step of exact natural gradient stays quick."""
    columns = subject.true_fisher.n_columns if subject.kind == "exact" else 1
    return max(4, min(subject.problem.batch_size, _MOST_ROWS // columns))


def _distance(shared: np.ndarray) -> float:
    """Distance to the exact step over its length, mean over steps, from the shares of the way."""
    rest = 1 - shared
    return float(np.sqrt(np.where(np.abs(rest) < _SAME, 0, np.maximum(rest, 0))).mean())


def _follow(subject: Subject, parts: Sequence[Partition], steps: int, size: int, fraction: float) -> Departure:
    network, damping = Movable(subject), subject.damping
    shape = (len(parts), steps)
    predicted, cosine, shared, apart = (np.full(shape, np.nan) for _ in range(4))
    start = subject.theta
    exact, own = start, [start] * len(parts)
    for t, batch in enumerate(batches(subject, size, steps, 41)):
        seed = 1009 * subject.seed + t  # of drawn labels, the same for every run
        F = network.put(exact).fisher(batch, subject.kind, seed)
        g = F.gradient()
        p = F.natural_gradient(damping)
        moved = exact - fraction * p
        way = subject.kl(exact, moved)
        for k, part in enumerate(parts):
            q, ratio, angle = _block_step(F, part, g, p, damping)
            predicted[k, t], cosine[k, t] = ratio, angle
            shared[k, t] = 1 - subject.kl(moved, exact - fraction * q) / way if way > 0 else np.nan
        if subject.operator is not None and t == 0:
            # a replaced operator is asked once: it need not follow the weights
            told = judge(network.predictor(F), parts, g, damping)
            from_operator = [(one.decrease_ratio, one.natural_gradient_cosine) for one in told]
        for k, part in enumerate(parts):
            own[k] = own[k] - fraction * _step_at(network, own[k], batch, part, subject.kind, seed, damping)
        whole = subject.kl(start, moved)
        for k, theta in enumerate(own):
            apart[k, t] = subject.kl(moved, theta) / whole if whole > 0 else np.nan
        exact = moved
        subject.tick(f"step {t + 1} of {steps}")
    if subject.operator is not None:
        predicted[:], cosine[:] = (np.array(column)[:, None] for column in zip(*from_operator, strict=True))
    return Departure(predicted, cosine, shared, apart)


def _block_step(F: Fisher, part: Partition, g: Tensor, p: Tensor, damping: float) -> tuple[Tensor, float, float]:
    """α p_b at its best length, its decrease ratio and its cosine to p."""
    q = BlockDiagonal(F, part).solve(g, damping)
    bend = float(curvature(F, q)) + damping * float(q @ q)
    ratio, angle = quality(g, p, q, bend)
    return (float(g @ q) / bend * q if bend > 0 else torch.zeros_like(q)), ratio, angle


def _step_at(
    network: Movable, theta: Tensor, batch: Pair, part: Partition, kind: str, seed: int, damping: float
) -> Tensor:
    """The block step of a run of its own."""
    F = network.put(theta).fisher(batch, kind, seed)
    g = F.gradient()
    return _block_step(F, part, g, g, damping)[0]
