"""One judgement for every stand-in of the Fisher: how good a direction, step, divergence and conditioning it gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherlens.errors import MemoryBudgetError
from fisherlens.independence.conditioning import extreme_ratios
from fisherlens.independence.divergence import trace_excess
from fisherlens.independence.standin import StandIn
from fisherlens.independence.starts import common_start
from fisherlens.independence.target import Target, Value

#: variables that depend on the damping: long name and units
PER_DAMPING = {
    "natural_gradient_cosine": ("cosine of the stand-in's and the exact natural gradient", "1"),
    "metric_cosine": ("the same cosine in the metric F + λ", "1"),
    "decrease_ratio": ("decrease of the quadratic model, share of the exact step's", "1"),
    "condition_number": ("condition number of the preconditioned Fisher", "1"),
    "mu_max": ("largest eigenvalue of the preconditioned Fisher", "1"),
    "mu_min": ("smallest eigenvalue of the preconditioned Fisher", "1"),
    "predicted_steps": ("steps per factor e at the best fixed rate", "1"),
    "kl_divergence": ("divergence of the stand-in's Gaussian from the exact one", "nat"),
    "kl_divergence_sem": ("standard error of the divergence over probes", "nat"),
}
_NOTHING_LOST = dict.fromkeys(PER_DAMPING, 1.0) | {
    "predicted_steps": 0.0,
    "kl_divergence": 0.0,
    "kl_divergence_sem": 0.0,
}

Note = Callable[[str], object]


def judge(target: Target, stand_ins: Sequence[StandIn], damping: float, note: Note) -> list[dict[str, float]]:
    """All of :data:`PER_DAMPING` for each stand-in; ``note`` takes what did not converge."""
    rest = [stand_in for stand_in in stand_ins if not stand_in.whole]
    found = iter(_judged(target, rest, damping, note) if rest else [])
    return [dict(_NOTHING_LOST) if stand_in.whole else next(found) for stand_in in stand_ins]


def _judged(target: Target, stand_ins: Sequence[StandIn], damping: float, note: Note) -> list[dict[str, float]]:
    exact, g = target.step(damping), target.gradient
    steps = torch.stack([_step(target, stand_in, damping) for stand_in in stand_ins]).T
    curvature = target.curvature(steps, damping)
    both = torch.stack([g.double(), exact.vector.double()])
    along, inner = (
        torch.stack([both @ x.double() for x in steps.T], dim=1).cpu().numpy()
    )  # one copy in float64 at a time
    own = torch.linalg.vector_norm(steps.T, dim=1, dtype=torch.float64) * torch.linalg.vector_norm(both[1])
    lengths = own.cpu().numpy()
    ratios = extreme_ratios(target, stand_ins, damping)
    out = []
    for k, stand_in in enumerate(stand_ins):
        scale = curvature[k] * exact.decrease
        cosine = along[k] / math.sqrt(scale) if scale > 0 else math.nan
        divergence = _divergence(target, stand_in, damping)
        for trouble in ratios[k].troubles:
            note(trouble)
        low, high = ratios[k].low, ratios[k].high
        out.append(
            {
                "natural_gradient_cosine": inner[k] / lengths[k] if lengths[k] else math.nan,
                "metric_cosine": float(np.clip(cosine, -1, 1)),
                "decrease_ratio": min(cosine**2, 1.0) if cosine == cosine else math.nan,
                "condition_number": high / low,
                "mu_max": high,
                "mu_min": low,
                "predicted_steps": predicted_steps(low, high),
                "kl_divergence": divergence.value,
                "kl_divergence_sem": divergence.sem,
            }
        )
    return out


def _step(target: Target, stand_in: StandIn, damping: float) -> Tensor:
    """(F̂ + λ)⁻¹ g, and beside it, where solves are dear, the vector that μ_max begins with."""
    g = target.gradient
    begin = common_start(target, damping) if stand_in.preconditions else None
    if begin is None:
        return stand_in.solve(g[:, None], damping)[:, 0]
    both = stand_in.solve(torch.stack([g, begin]).T, damping)
    target.solved[stand_in.name, damping] = both[:, 1]
    return both[:, 0]


def predicted_steps(low: float, high: float) -> float:
    """Steps per factor e with the best fixed rate 2/(μ_max + μ_min), which shrinks every mode by (κ - 1)/(κ + 1) or better."""
    if not math.isfinite(low + high):
        return math.nan
    shrink = (high - low) / (high + low)
    return -1 / math.log(shrink) if shrink > 1e-12 else 0.0  # less is rounding


def _divergence(target: Target, stand_in: StandIn, damping: float) -> Value:
    """½ [tr B⁻¹(F + λ) - P + log det B - log det (F + λ)] with B = F̂ + λ; where all is exact rounding does not make it negative."""
    excess, own = trace_excess(target, stand_in, damping), target.step(damping).log_determinant
    value = (excess.value + stand_in.matrix.log_determinant(damping) - own.value) / 2
    sem = math.hypot(excess.sem, own.sem) / 2
    return Value(max(value, 0.0) if sem == 0 else value, sem)


def energy(target: Target, sizes: Any, inside: float) -> dict[str, float]:
    """Share of ‖F‖² that lies inside blocks, Σ_b ‖F_bb‖² = ``inside``, and that expected of random blocks of these sizes."""
    norm2, sizes = target.squared_norm, np.asarray(sizes, dtype=float)
    if norm2.value == 0:
        return {
            "energy_captured": 1.0,
            "energy_captured_sem": 0.0,
            "energy_noise_floor": 1.0,
            "energy_noise_floor_sem": 0.0,
        }
    pairs = (sizes * (sizes - 1)).sum() / max(sizes.sum() * (sizes.sum() - 1), 1)
    on_diagonal = target.diagonal.square().sum().item()
    captured, chance = inside / norm2.value, on_diagonal * (1 - pairs) / norm2.value
    relative = norm2.sem / norm2.value
    return {
        "energy_captured": 1.0 if len(sizes) == 1 else min(captured, 1.0),
        "energy_captured_sem": 0.0 if len(sizes) == 1 else captured * relative,
        "energy_noise_floor": pairs + chance,
        "energy_noise_floor_sem": chance * relative,
    }


def errors_of(
    target: Target, inside: Callable[[], float], within: Callable[[], float], note: Note, *, one_block: bool
) -> dict[str, float]:
    """Squared errors over ‖F‖²: couplings that are dropped, what is wrong inside the blocks, and the norm of both together.

    Nothing lies outside one block, whose norm then is that of F and known.
    """
    names = ("dropped_coupling", "within_block_error", "relative_error")
    sems = [f"{name}_sem" for name in names]
    try:
        kept, wrong = inside(), within()
        norm2 = Value(kept) if one_block else target.squared_norm
    except MemoryBudgetError as error:
        note(f"The error split on {target.name!r} is left out. {error}")
        return dict.fromkeys([*names, *sems], math.nan)
    if norm2.value == 0:
        return dict.fromkeys([*names, *sems], 0.0)
    dropped, wrong, relative = max(1 - kept / norm2.value, 0.0), wrong / norm2.value, norm2.sem / norm2.value
    total = math.sqrt(dropped + wrong)
    # of dropped + wrong by ‖F‖²; an estimate below what is kept changes nothing of couplings that are then none
    slope = abs((kept / norm2.value if dropped else 0.0) - wrong) * relative
    return {
        "dropped_coupling": dropped,
        "within_block_error": wrong,
        "relative_error": total,
        "dropped_coupling_sem": kept / norm2.value * relative,
        "within_block_error_sem": wrong * relative,
        "relative_error_sem": slope / (2 * total) if total else 0.0,
    }
