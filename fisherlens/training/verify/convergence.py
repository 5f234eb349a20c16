r"""Claim: segmentations rank in training as their condition numbers and decrease ratios say.

A block step of rate r contracts mode k of the quadratic model by \|1 - r μ_k\|, μ the eigenvalues of (F_b + λ)⁻¹(F + λ): about κ/2 steps per
factor e at the best fixed rate, κ = μ_max/μ_min, and one step where the blocks are the whole. So the smaller κ, or the larger the decrease ratio, the
sooner the block-wise optimizer should reach a target. Each optimizer is tuned over the same rates on a seed of its own, and then run on every seed.

Parameters that a method has no statistics of (normalisation layers, those of modules of one's own) are in the matrix too, each divided by what the
method divides it by: see ``treatment``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fisherlens.errors import NumericalWarning
from fisherlens.partitions import Partition
from fisherlens.training.compare import compare_optimizers
from fisherlens.training.segments import as_blocks
from fisherlens.training.tune import Tuning
from fisherlens.training.verify.blocks import Judgement, chosen, judge
from fisherlens.training.verify.claim import Claim, Curve, Row, at_most, order
from fisherlens.training.verify.movable import Movable, batches
from fisherlens.training.verify.subject import Subject
from fisherlens.training.verify.treatment import judge_treatments, treatment

if TYPE_CHECKING:
    import xarray as xr

FULL = "full"
WAY, WHOLE_WAY = 0.5, 0.9  # of the way down, with mini-batches and with all examples (our choice)
CLIP = 1e-2  # with mini-batches: of the divergence of a step, as published for TENGraD and its baselines; without it runs break off where F grows fast
SLOWEST, FASTEST = 0.003, 1.0  # the rates that are tried, evenly spaced on a log axis: r = 1 is the full natural step
RANKED = 0.7
_STEPS = {"quick": 30, "full": 120}
_RECORDS = 10  # of a run
_NUM_EVAL = 512  # examples that a run is judged on


def convergence(
    subjects: Sequence[Subject],
    *,
    partitions: Mapping[str, Any] | None = None,
    num_steps: int | None = None,
    batch_size: int | None = None,
    rates: Sequence[float] | None = None,
) -> Claim:
    """Compare the order that condition numbers and decrease ratios predict with the order in which optimizers reach a target.

    Parameters
    ----------
    subjects
        One per seed. Labels are observed ones for the kind ``"empirical"``, drawn from the model otherwise; predictions take the same.
    partitions
        Name → what :func:`fisherlens.partition` takes; None for layers, units, the segments of CW-NGD and MBF, shuffled blocks of CW-NGD's
        sizes, and single entries. Exact natural gradient runs beside them.
    num_steps, batch_size
        Steps of a run, by preset; examples of each, the problem's, or all where there are no more than four times as many. Steps on all
        examples are not clipped.
    rates
        Learning rates that every optimizer is tried with; by default from 0.003 to 1, as many as the preset allows.

    Returns
    -------
    Rows ``convergence/condition-number`` and ``/decrease-ratio``, rank correlations of predicted and measured order over the
    segmentations, and ``/exact``, whether exact natural gradient (condition number 1 where it covers all) is as fast as the best of them. The target lies on the
    way, on a log scale, from the common start to the best loss of any run, per seed: half-way with mini-batches, whose noise limits what
    any can reach, nine tenths with all examples. Steps are whole ones; a run that does not reach it is extrapolated at its mean
    rate, and one that diverges ranks last. Curves ``convergence_condition_number``, ``_decrease_ratio``, ``_steps`` and ``_loss`` over
    segmentations, and ``_rate``.
    """
    subjects[0].require_loss()
    starts = [subject.initial for subject in subjects]
    parts = [chosen(start, partitions) for start in starts]
    names = [name for name in parts[0] if all(name in one for one in parts)]
    first, count = starts[0], len(starts[0].problem.train[0])
    steps = _STEPS.get(first.preset, 20) if num_steps is None else num_steps
    if batch_size is None:
        batch_size = count if count <= 4 * first.problem.batch_size else first.problem.batch_size
    size, way, clip = (batch_size, WAY, CLIP) if batch_size < count else (count, WHOLE_WAY, None)
    rates = np.geomspace(SLOWEST, FASTEST, first.budget.rates).tolist() if rates is None else list(rates)
    damping = float(np.mean([start.damping for start in starts]))  # an optimizer is the same on all seeds
    entries: dict[str, Any] = {FULL: partial(whole, start=first, damping=damping, kl_clip=clip)}
    entries |= {
        name: partial(blockwise, start=first, damping=damping, kl_clip=clip, part=parts[0][name]) for name in names
    }
    told = [_predict(start, entries, one, size, damping) for start, one in zip(starts, parts, strict=True)]
    with warnings.catch_warnings():
        # trials that are too fast, best ones at the edge, parameters without statistics: the rows say it
        warnings.filterwarnings(
            "ignore", r"The best trial of|Every trial of|\d+ blocks of|\w+ does not precondition", NumericalWarning
        )
        runs = compare_optimizers(
            first.problem,
            entries,
            num_steps=steps,
            seeds=[subject.seed for subject in subjects],
            batch_size=size,
            record_every=max(1, steps // _RECORDS),
            num_eval=min(_NUM_EVAL, count),
            tune=Tuning({name: {"lr": rates} for name in entries}, criterion="mean"),
            progress=False,
        )
    if bool(runs.interrupted.any()):  # a comparison keeps what it has; a claim needs all of it
        raise KeyboardInterrupt
    first.tick("optimizers compared")
    reached = np.array([steps_to_target(runs.isel(seed=k), way) for k in range(len(subjects))])  # (seeds, entries)
    kappa = np.array([[one.condition_number for one in row] for row, _ in told])
    ratio = np.array([[one.decrease_ratio for one in row] for row, _ in told])
    edge = ", ".join(str(name) for name in runs.optimizer.values[runs.at_edge.values])
    note = f"steps to {way:.0%} of the way to the best loss, {len(entries)} optimizers, {len(rates)} rates each"
    note += f"; the best rate of {edge} lies on the edge of those tried" if edge else ""
    rest = (
        f"; parameters without statistics: {told[0][1]}, each in predictions as the method treats it"
        if told[0][1]
        else ""
    )
    rows: list[Row] = [
        order(
            "convergence/condition-number",
            "The larger the condition number of the preconditioned Fisher, the more steps its optimizer takes to the target.",
            list(zip(kappa[:, 1:], reached[:, 1:], strict=True)),
            RANKED,
            note=note + rest,
        ),
        order(
            "convergence/decrease-ratio",
            "The smaller the share of the natural step's decrease, the more steps its optimizer takes to the target.",
            list(zip(-ratio[:, 1:], reached[:, 1:], strict=True)),
            RANKED,
            note=note + rest,
        ),
        at_most(
            "convergence/exact",
            "Exact natural gradient, which drops nothing, takes no more steps to the target than the best of the block-wise optimizers.",
            [(float(steps[1:].min()), float(steps[0])) for steps in reached],
            0.2,
            unit="steps",
            note="predicted is the best of the block-wise ones" + rest,
        ),
    ]
    return Claim(tuple(rows), _curves(list(entries), kappa, ratio, reached, runs))


def _predict(
    start: Subject, entries: Mapping[str, Any], parts: Mapping[str, Partition], size: int, damping: float
) -> tuple[list[Judgement], str]:
    """What the Fisher of an optimizer's first batch says of each entry, in its own kind, or the user's operator in its place; and what no method covers."""
    network, batch = Movable(start), batches(start, size, 1, 51)[0]
    F = network.fisher(batch, labels(start)[1], start.seed)
    predictor, g = network.predictor(F), F.gradient()
    makes = {name: partial(make, start=start, kl_clip=None) for name, make in entries.items()}
    exact = treatment(start, makes.pop(FULL), None, batch)
    if exact is None:  # every method covers the same layers
        return [Judgement(1.0, 1.0, 1.0), *judge(predictor, [parts[name] for name in makes], g, damping)], ""
    treated = [exact, *(treatment(start, make, parts[name], batch) for name, make in makes.items())]
    covered = {layer.name for layer in exact.covered}
    left = [name for name in start.layout.layer_names if name not in covered]
    share = 1 - float(exact.inside.double().mean())
    return judge_treatments(predictor, treated, g, damping), f"{_named(left)} ({share:.1%} of all)"


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more layers" if len(names) > 3 else "")


def labels(start: Subject) -> tuple[str, str]:
    """The optimizers' ``labels``, and the kind of Fisher that they then take: observed labels, or one drawn per example."""
    return ("true", "empirical") if start.kind == "empirical" else ("sampled", "mc")


def whole(
    model: nn.Module, *, start: Subject, damping: float, kl_clip: float | None, lr: float = FASTEST
) -> torch.optim.Optimizer:
    """Exact natural gradient of the batch, nothing averaged."""
    from fisherlens.optim import NGD

    return NGD(model, lr, damping, likelihood=start.likelihood, labels=labels(start)[0], kl_clip=kl_clip)


def blockwise(
    model: nn.Module, *, start: Subject, damping: float, kl_clip: float | None, part: Partition, lr: float = FASTEST
) -> torch.optim.Optimizer:
    """Block-wise natural gradient of the batch: of the optimizers whose step it is, the cheapest; nothing averaged."""
    from fisherlens.optim import CWNGD, TENGraD, UnitWise

    shared = {"likelihood": start.likelihood, "labels": labels(start)[0], "kl_clip": kl_clip}
    if part.scheme == "layer":
        return TENGraD(model, lr, damping, refresh=1, momentum=0.0, **shared)
    if part.scheme == "unit":
        return UnitWise(model, lr, damping, **shared)
    return CWNGD(model, lr, damping, partition=as_blocks(part), ema=0.0, momentum_ema=0.0, **shared)


def steps_to_target(runs: xr.Dataset, way: float) -> np.ndarray:
    """Steps of every run of one seed until it has gone a part of the way down to the best loss of any, interpolated between records and rounded up.

    A run that ends before is extrapolated at its own mean rate; infinite where it diverged or went up.
    """
    losses = runs.train_loss.transpose("optimizer", "step").values
    finite = np.isfinite(losses)
    losses, start = np.where(finite, losses, np.inf), losses[0, 0]
    # a mean negative log-density may be negative: then the way is measured in the loss itself
    level = np.log(losses / start) if (losses > 0).all() else losses - start
    target, steps = way * level.min(), runs.step.values.astype(float)
    found = np.full(len(level), np.inf)
    for k, own in enumerate(level):
        below = np.flatnonzero(own <= target) if target < 0 else []
        if len(below):
            after = below[0]
            above, under = own[after - 1], own[after]
            share = (above - target) / (above - under) if np.isfinite(above) else 1.0
            found[k] = steps[after - 1] + share * (steps[after] - steps[after - 1])
        elif own[-1] < 0:
            found[k] = steps[-1] * target / own[-1]
    return np.ceil(found)


def _curves(
    names: Sequence[str], kappa: np.ndarray, ratio: np.ndarray, reached: np.ndarray, runs: xr.Dataset
) -> dict[str, Curve]:
    dims, coords = ("seed", "convergence_segmentation"), {"convergence_segmentation": list(names)}
    steps = {"convergence_step": ("convergence_step", runs.step.values, {"long_name": "optimizer steps", "units": "1"})}
    rates = [float(runs.option_lr[k].values[runs.trial_chosen[k].values][0]) for k in range(len(names))]

    def over(text: str, values: Any, dims: tuple[str, ...] = dims) -> Curve:
        return Curve(dims, values, {"long_name": text, "units": "1"}, coords)

    return {
        "convergence_condition_number": over("condition number of the preconditioned Fisher", kappa),
        "convergence_decrease_ratio": over("share of the natural step's decrease", ratio),
        "convergence_steps": over("steps to the target", reached),
        "convergence_rate": over("learning rate that the search chose", rates, dims[1:]),
        "convergence_loss": Curve(
            (*dims, "convergence_step"),
            runs.train_loss.transpose("seed", "optimizer", "step").values,
            {"long_name": "mean negative log-likelihood, training set", "units": "nat"},
            coords | steps,
        ),
    }
