r"""Claim: F is the metric of the outputs, KL(p_θ ‖ p_θ+δ) = ½ δᵀFδ + O(δ³), and it holds as far as optimizers step.

Along an eigenvector v the divergence is measured at lengths ℓ over ten decades, in both directions. Its curvature 2 KL/ℓ² is flat between
rounding (too short) and higher orders (too long); where two neighbouring lengths differ least is the measured curvature, and vᵀFv the
predicted one. The quadratic region ends where the divergence in one of the two directions leaves ½ ℓ² vᵀFv by 10 %, found by bisection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fisherlens.errors import InputError
from fisherlens.fisher import Fisher
from fisherlens.linalg.dense import eigenpairs, noise_floor
from fisherlens.spectrum.operators import as_symmetric
from fisherlens.spectrum.smaller import lift_rows, smaller_matrix
from fisherlens.training.verify.claim import Claim, Curve, Row, at_least, equal
from fisherlens.training.verify.subject import Subject

DIRECTIONS = ("top", "middle", "bottom")
LENGTHS = np.logspace(-8, 2, 41)  # a quarter of a decade apart
LEAVES = 0.1  # relative difference that ends the quadratic region
# K-FAC's implementations clip steps at δᵀFδ = 1e-3 (methods of KFAC, TENGraD and Eva as released): half of it is the divergence in nat.
TRUST = 0.5e-3
TOLERANCE = 0.01  # of the curvature, our choice: rounding and cubic terms stay far below


def metric(subjects: Sequence[Subject]) -> Claim:
    """Compare the divergence between outputs with ½ δᵀFδ along the top, middle and bottom eigenvector of each seed.

    The bottom one is that of the smallest eigenvalue above √ε λ_max (and above the noise floor): along flatter ones, rounding of the outputs
    hides the divergence at every length at which the quadratic form rules. Middle is the median rank of those above it.

    Cost: one spectrum, and about 300 forward passes per seed.
    """
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in DIRECTIONS}
    reach: dict[str, list[tuple[float, float]]] = {name: [] for name in DIRECTIONS}
    measured = np.full((len(subjects), len(DIRECTIONS), 2, len(LENGTHS)), np.nan)
    quadratic = np.full((len(subjects), len(DIRECTIONS), len(LENGTHS)), np.nan)
    endless: set[str] = set()
    for number, subject in enumerate(subjects):
        vectors = eigenvectors(subject.true_fisher)
        for place, name in enumerate(DIRECTIONS):
            subject.tick(f"seed {subject.seed}, {name}")
            v = vectors[:, place]
            predicted = float(v @ subject.product(v))
            found = np.array([divergences(subject, v, length) for length in LENGTHS]).T
            measured[number, place], quadratic[number, place] = found, predicted * LENGTHS**2 / 2
            pairs[name].append((predicted, plateau(found)))
            end, bounded = quadratic_end(subject, v, predicted, found)
            reach[name].append((TRUST, max(predicted, 0.0) * end**2 / 2))
            if not bounded:
                endless.add(name)
    rows = [_curvature(name, pairs[name]) for name in DIRECTIONS]
    rows += [_reach(name, reach[name], name in endless) for name in DIRECTIONS]
    coords = {
        "metric_direction": ("metric_direction", list(DIRECTIONS), {"long_name": "eigenvector of F"}),
        "metric_length": ("metric_length", LENGTHS, {"long_name": "length of the step", "units": "1"}),
    }
    signs = {"metric_sign": ("metric_sign", [1, -1], {"long_name": "sign of the step"})}
    dims = ("seed", "metric_direction")
    curves = {
        "metric_divergence": Curve(
            (*dims, "metric_sign", "metric_length"),
            measured,
            {"long_name": "KL from θ to θ ± ℓv", "units": "nat"},
            coords | signs,
        ),
        "metric_quadratic": Curve(
            (*dims, "metric_length"), quadratic, {"long_name": "½ ℓ² vᵀFv", "units": "nat"}, coords
        ),
    }
    return Claim(tuple(rows), curves)


def _curvature(name: str, pairs: list[tuple[float, float]]) -> Row:
    return equal(
        f"metric/{name}",
        f"Along the {name} eigenvector of F a short step of length ℓ changes the outputs by KL = ½ ℓ² vᵀFv: predicted vᵀFv, measured 2 KL/ℓ².",
        pairs,
        TOLERANCE,
        unit="nat",
    )


def _reach(name: str, pairs: list[tuple[float, float]], endless: bool) -> Row:
    return at_least(
        f"metric/reach-{name}",
        f"Along the {name} eigenvector the quadratic form holds within 10 % up to the divergence at which natural-gradient steps are clipped, {TRUST:g} nat.",
        pairs,
        0.0,
        unit="nat",
        note=f"some seeds saw no end up to length {LENGTHS[-1]:g}" if endless else "",
    )


def eigenvectors(F: Fisher) -> Tensor:
    """Top, middle and bottom eigenvector of F, ``(P, 3)``, of unit length; see :func:`metric` for what they are."""
    view = as_symmetric(F)
    matrix = smaller_matrix(view)
    values, basis = eigenpairs(matrix.matrix, f"The {matrix.words} of F")
    floor = max(noise_floor(values, len(values), F.dtype), torch.finfo(F.dtype).eps ** 0.5 * max(float(values[0]), 0))
    count = int((values > floor).sum())
    if not count:
        raise InputError(
            "The Fisher is zero: no parameter changes any output, so there is no direction to step along. "
            "Check that inputs are not all zero and that activations are not all dead."
        )
    chosen = basis[:, [0, (count - 1) // 2, count - 1]].to(F.dtype)
    vectors = chosen if matrix.dense else lift_rows(view, chosen).clone()
    return vectors / torch.linalg.vector_norm(vectors, dim=0)


def divergences(subject: Subject, v: Tensor, length: float) -> tuple[float, float]:
    """KL from θ to θ + ℓv and to θ − ℓv, in nat."""
    theta = subject.theta
    return subject.kl(theta, theta + length * v), subject.kl(theta, theta - length * v)


def plateau(divergence: np.ndarray) -> float:
    """Curvature 2 KL/ℓ² where two neighbouring lengths differ least, of the mean over both directions ``(2, length)``; NaN if nowhere."""
    with np.errstate(divide="ignore", invalid="ignore"):
        curvature = 2 * divergence.mean(0) / LENGTHS**2
        change = np.abs(np.diff(np.log(curvature)))
    change[~np.isfinite(change)] = np.inf
    best = int(change.argmin())
    return float((curvature[best] * curvature[best + 1]) ** 0.5) if np.isfinite(change[best]) else math.nan


def quadratic_end(subject: Subject, v: Tensor, predicted: float, divergence: np.ndarray) -> tuple[float, bool]:
    """Length at which the divergence leaves ½ ℓ² vᵀFv by 10 % in one of the two directions, and whether there is such a length.

    Too short steps, where rounding rules, do not count: the search begins at the first three neighbouring lengths that fit. 0 where none do.
    """
    off = (
        np.abs(divergence / (predicted * LENGTHS**2 / 2) - 1).max(0) if predicted > 0 else np.full(len(LENGTHS), np.inf)
    )
    fits = off <= LEAVES  # not where a divergence is NaN
    starts = np.flatnonzero(fits[:-2] & fits[1:-1] & fits[2:])
    if not len(starts):
        return 0.0, True
    start = int(starts[0])
    beyond = np.flatnonzero(~fits[start:])
    if not len(beyond):
        return float(LENGTHS[-1]), False
    low, high = LENGTHS[start + beyond[0] - 1], LENGTHS[start + beyond[0]]
    while high / low > 1.01:
        length = math.sqrt(low * high)
        worst = max(abs(kl / (predicted * length**2 / 2) - 1) for kl in divergences(subject, v, length))
        low, high = (low, length) if worst > LEAVES else (length, high)
    return math.sqrt(low * high), True
