r"""Claim: what a part of the parameters tells is what its removal costs.

Removing a unit or filter b puts its parameters at zero: δ = -θ_b. To second order

.. math:: \mathrm{KL}(p_\theta \,\|\, p_{\theta - \theta_b}) = \tfrac12 \theta_b^\top F_{bb} \theta_b, \qquad
          \ell(\theta - \theta_b) - \ell(\theta) = -g^\top \theta_b + \tfrac12 \theta_b^\top F_{bb} \theta_b,

the second with F for the Hessian. So the units of least information are the ones to remove, and the loss adds a term that no Fisher knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fisherlens.partitions import partition
from fisherlens.training.verify.claim import Claim, Curve, Row, at_most, equal, order
from fisherlens.training.verify.movable import curvature
from fisherlens.training.verify.subject import Subject

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)  # of a unit's parameters that are taken away, all alike
SMALL = 0.05  # the share at which the quadratic form must hold
AGREE = 0.1  # relative tolerance of that, and what "the quadratic region" means
RANKED = 0.8  # smallest rank correlation that counts as the same order
REMOVED = np.linspace(0.0, 0.5, 11)  # shares of the units that a pruning curve removes
RANKINGS = ("information", "magnitude", "random")
# Divergences below this share of the largest are rounding, and so is their ratio.
_FLOOR = 1e-9
_MOST_UNITS, _DRAWS = {"quick": 64, "full": 512}, {"quick": 5, "full": 20}
_COLUMNS_BYTES = 2**26


@dataclass(frozen=True)
class Removal:
    """What the units of one network predict and do: ``(units,)``, and ``(units, shares)`` of the divergences; all units are priced, some are tried."""

    labels: list[str]
    tried: np.ndarray
    predicted: np.ndarray
    divergence: np.ndarray
    loss_predicted: np.ndarray
    loss_change: np.ndarray
    magnitude: np.ndarray
    pruned: np.ndarray


def information(subjects: Sequence[Subject], *, by: str = "unit") -> Claim:
    """Compare what removals are predicted to change with what they change.

    Parameters
    ----------
    subjects
        One per seed.
    by
        What is removed: a scheme of :func:`fisherlens.partition`, ``"unit"`` (an output unit or filter with its bias) or ``"kernel"``, say.

    Returns
    -------
    Rows ``information/small`` and ``/removed`` (the factor by which both differ, geometric mean over units, for a twentieth of a unit's
    parameters and for all of them), ``/rank`` and ``/loss`` (order of the units by divergence, and by change of the loss), ``/against-magnitude`` and
    ``/against-random`` (area under the pruning curve up to half of the units, mean divergence in nat). Curves ``information_predicted``, ``_divergence``,
    ``_loss_predicted``, ``_loss_change`` over units, ``_ratio`` over removed shares and ``_pruned`` over removed units.
    """
    found = [_remove(subject, by) for subject in subjects]
    ratios = [_ratios(one) for one in found]
    small, whole = SHARES.index(SMALL), SHARES.index(1.0)
    reach = float(np.median([_reach(ratio) for ratio in ratios]))
    region = f"within {AGREE:.0%} up to a removed share of {reach:g}" if reach else "nowhere in the quadratic region"
    tried = f"{len(found[0].tried)} of {len(found[0].labels)} units"
    rows: list[Row] = [
        equal(
            "information/small",
            f"Taking away {SMALL:.0%} of a unit's parameters changes the outputs by ½ δᵀFδ.",
            [(1.0, float(ratio[small])) for ratio in ratios],
            AGREE,
            note=f"factor between the two, geometric mean of {tried}; {region}",
        ),
        equal(
            "information/removed",
            "Removing a whole unit changes the outputs by ½ θ_bᵀF_bbθ_b.",
            [(1.0, float(ratio[whole])) for ratio in ratios],
            0.3,
            note=f"factor between the two, geometric mean of {tried}",
        ),
    ]
    if len(found[0].tried) >= 3:  # two have no order that could be told from chance
        rows += [
            order(
                "information/rank",
                "Units rank by ½ θ_bᵀF_bbθ_b as by the divergence that their removal causes.",
                [(one.predicted[one.tried], one.divergence[:, whole]) for one in found],
                RANKED,
            ),
            order(
                "information/loss",
                "Units rank by -gᵀθ_b + ½ θ_bᵀF_bbθ_b as by the change of the loss that their removal causes.",
                [(one.loss_predicted, one.loss_change) for one in found],
                RANKED,
                note=_gradient_share(found),
            ),
        ]
    areas = [one.pruned.mean(axis=1) for one in found]  # the shares removed are evenly spaced
    for place, rival in enumerate(RANKINGS[1:], start=1):
        rows.append(
            at_most(
                f"information/against-{rival}",
                f"Removing the units of least ½ θ_bᵀF_bbθ_b changes the outputs less than removing {'those of smallest ‖θ_b‖' if rival == 'magnitude' else 'units at random'}.",
                [(float(area[place]), float(area[0])) for area in areas],
                0.0,
                unit="nat",
                note=f"area under the pruning curve up to half of the units; predicted is that of the rival, {rival}",
            )
        )
    return Claim(tuple(rows), _curves(found, ratios))


def _remove(subject: Subject, by: str) -> Removal:
    theta = subject.theta
    parts = partition(subject.model, by)
    predicted, along, magnitude = _priced(subject, parts.blocks)
    generator = subject.generator(31)
    most = _MOST_UNITS.get(subject.preset, 64)
    # the same units of every seed, so that their curves share an axis
    chosen = (
        torch.randperm(len(predicted), generator=torch.Generator().manual_seed(0), device="cpu")[:most]
        .sort()
        .values.numpy()
    )
    divergence, change = np.zeros((len(chosen), len(SHARES))), np.zeros(len(chosen))
    before = subject.loss(theta)
    for row, unit in enumerate(chosen):
        block = parts.blocks[unit].to(theta.device)
        for column, share in enumerate(SHARES):
            moved = theta.clone()
            moved[block] *= 1 - share
            divergence[row, column] = subject.kl(theta, moved)
        moved = theta.clone()
        moved[block] = 0
        change[row] = subject.loss(moved) - before
        subject.tick("units removed")
    draws = _DRAWS.get(subject.preset, 5)
    orders = {
        "information": [np.argsort(predicted, kind="stable")],
        "magnitude": [np.argsort(magnitude, kind="stable")],
        "random": [torch.randperm(len(predicted), generator=generator, device="cpu").numpy() for _ in range(draws)],
    }
    pruned = np.array(
        [np.mean([_curve(subject, parts.blocks, one) for one in orders[key]], axis=0) for key in RANKINGS]
    )
    loss_predicted = (predicted - along)[chosen]
    return Removal(list(parts.labels), chosen, predicted, divergence, loss_predicted, change, magnitude, pruned)


def _priced(subject: Subject, blocks: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """½ θ_bᵀF_bbθ_b, gᵀθ_b and ‖θ_b‖ of every block; products in groups of bounded memory."""
    theta, g = subject.theta, subject.gradient
    half, along, size = (np.zeros(len(blocks)) for _ in range(3))
    together = max(1, _COLUMNS_BYTES // (len(theta) * theta.itemsize))
    for start in range(0, len(blocks), together):
        some = blocks[start : start + together]
        v = torch.zeros(len(some), len(theta), dtype=theta.dtype, device=theta.device)
        for row, block in enumerate(some):
            at = block.to(theta.device)
            v[row, at] = theta[at]
        here = slice(start, start + len(some))
        half[here] = (curvature(subject.fisher, v.T) / 2).cpu().numpy()
        along[here] = (v @ g).cpu().numpy()
        size[here] = torch.linalg.vector_norm(v, dim=1).cpu().numpy()
    return half, along, size


def _curve(subject: Subject, blocks: Sequence[Tensor], ranking: np.ndarray) -> np.ndarray:
    """Divergence after removing the first units of a ranking, at each of the shares :data:`REMOVED`."""
    theta, found = subject.theta, np.zeros(len(REMOVED))
    for place, share in enumerate(REMOVED):
        count = round(share * len(ranking))
        moved = theta.clone()
        if count:
            moved[torch.cat([blocks[unit] for unit in ranking[:count]]).to(theta.device)] = 0
        found[place] = subject.kl(theta, moved)
    subject.tick("units pruned")
    return found


def _ratios(one: Removal) -> np.ndarray:
    """The factor by which measured and predicted divergence differ at every share, geometric mean over the units that do anything: 1 or more."""
    predicted = one.predicted[one.tried, None] * np.square(SHARES)
    floor = _FLOOR * np.square(SHARES) * max(one.predicted.max(), one.divergence[:, -1].max(), np.finfo(float).tiny)
    heard = (predicted > floor) | (one.divergence > floor)
    # what one side alone hears is held at the floor, so that it counts against the claim and not as infinity
    logs = np.log(np.maximum(one.divergence, floor)) - np.log(np.maximum(predicted, floor))
    return np.array([np.exp(np.abs(logs[seen, k]).mean()) if seen.any() else np.nan for k, seen in enumerate(heard.T)])


def _reach(ratio: np.ndarray) -> float:
    """The largest share up to which measured and predicted agree, 0 where they do not at the smallest."""
    bad = np.flatnonzero(~(np.abs(ratio - 1) <= AGREE))
    count = bad[0] if len(bad) else len(ratio)
    return SHARES[count - 1] if count else 0.0


def _gradient_share(found: Sequence[Removal]) -> str:
    """How much of the predicted change of the loss is the gradient's."""
    linear = np.mean([np.abs(one.loss_predicted - one.predicted[one.tried]).sum() for one in found])
    quadratic = np.mean([np.abs(one.predicted[one.tried]).sum() for one in found])
    return f"the gradient terms |gᵀθ_b| add up to {linear:.2g} nat, the quadratic ones to {quadratic:.2g}"


def _curves(found: Sequence[Removal], ratios: Sequence[np.ndarray]) -> dict[str, Curve]:
    units = {"information_unit": [found[0].labels[unit] for unit in found[0].tried]}
    removed = {
        "information_removed": ("information_removed", REMOVED, {"long_name": "share of units removed", "units": "1"})
    }
    shares = {
        "information_share": ("information_share", list(SHARES), {"long_name": "removed share of a unit", "units": "1"})
    }

    def over_units(text: str, values: list[np.ndarray]) -> Curve:
        return Curve(("seed", "information_unit"), np.array(values), {"long_name": text, "units": "nat"}, units)

    return {
        "information_predicted": over_units(
            "predicted divergence, ½ θᵀFθ", [one.predicted[one.tried] for one in found]
        ),
        "information_divergence": over_units("divergence when removed", [one.divergence[:, -1] for one in found]),
        "information_loss_predicted": over_units("predicted change of the loss", [one.loss_predicted for one in found]),
        "information_loss_change": over_units("change of the loss when removed", [one.loss_change for one in found]),
        "information_ratio": Curve(
            ("seed", "information_share"),
            np.array(ratios),
            {"long_name": "factor between measured and predicted divergence", "units": "1"},
            shares,
        ),
        "information_pruned": Curve(
            ("seed", "information_ranking", "information_removed"),
            np.array([one.pruned for one in found]),
            {"long_name": "divergence of the pruned network", "units": "nat"},
            {"information_ranking": list(RANKINGS), **removed},
        ),
    }
