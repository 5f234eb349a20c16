"""From what is known of each matrix to labelled pairs: distances, overlaps, spectra, and their errors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherlens.spectrum.kinds_capture import Member
from fisherlens.spectrum.kinds_parts import Part

Variables = dict[str, tuple[tuple[str, ...], np.ndarray, dict[str, str]]]

_WORDS = {
    "distance": "Frobenius distance of kind j from kind i over the norm of kind i",
    "cosine": "cosine of the two matrices",
    "scale": "factor of kind j that brings it closest to kind i",
    "scaled_distance": "relative Frobenius distance after the best scaling",
    "trace_ratio": "trace of kind j over that of kind i",
    "overlap": "overlap of the leading spaces",
    "overlap_size": "leading eigenvectors compared",
    "overlap_chance": "overlap of random spaces of that size",
    "principal_angle": "principal angle of the leading spaces",
    "natural_gradient_cosine": "cosine of the natural gradients",
    "trace": "trace",
    "frobenius_norm": "Frobenius norm",
    "eigenvalue": "eigenvalue",
    "above_noise": "eigenvalue above the noise floor",
    "noise_floor": "noise floor n ε λ_max",
    "gap": "relative gap below the leading space",
    "sampling_noise": "distance from the exact kind that sampled labels alone give",
}
_UNITS = {"principal_angle": "rad", **dict.fromkeys(("trace", "frobenius_norm", "eigenvalue", "noise_floor"), "nat")}


def tabulate(
    parts: Sequence[Part],
    members: Sequence[Member],
    kinds: Sequence[str],
    k: int,
    dampings: Sequence[float],
    mc_samples: int,
    *,
    stacked: bool,
) -> tuple[Variables, dict[str, Any]]:
    """Variables and coordinates of the result; ``stacked`` keeps the parts as a dim ``layer``."""
    places = [[at for at, member in enumerate(members) if member.kind == kind] for kind in kinds]
    each: dict[str, list[np.ndarray]] = {}
    dims: dict[str, tuple[str, ...]] = {}

    def add(name: str, over: tuple[str, ...], values: Any) -> None:
        each.setdefault(name, []).append(np.asarray(values))
        dims[name] = over

    pair, length = ("kind_i", "kind_j"), max(len(v) for part in parts for v in part.values)
    for part in parts:
        over_pairs = _norms(part) | _spaces(part, k)
        if part.steps:
            over_pairs["natural_gradient_cosine"] = _directions(part.steps)
        singles = _singles(part, k, length)
        for name, values in over_pairs.items():
            tail = ("angle",) if name == "principal_angle" else ()
            lead = ("damping",) if name == "natural_gradient_cosine" else ()
            for suffix, found in _by_kind(values, places, pairs=True, spread=_has_spread(name)).items():
                add(name + suffix, (*lead, *pair, *tail), np.moveaxis(found, -1, 0) if lead else found)
            if len(members) > len(kinds) and name in _BETWEEN_SEEDS:
                add(f"seed_{name}", lead, _between_seeds(values, places))
        for name, values in singles.items():
            tail = ("rank",) if name in ("eigenvalue", "above_noise") else ()
            for suffix, found in _by_kind(values, places, pairs=False, spread=_has_spread(name)).items():
                add(name + suffix, ("kind", *tail), found)
        for name, values in _noise(part).items():
            add(name, ("kind",), _by_kind(values, places, pairs=False, spread=False)[""])
    if len(members) == len(kinds):
        each = {name: values for name, values in each.items() if not name.endswith("_spread")}
    if all(part.inner.shape[-1] == 1 for part in parts):
        each = {
            name: values for name, values in each.items() if name == "sampling_noise_sem" or not name.endswith("_sem")
        }
    variables: Variables = {}
    for name, values in each.items():
        over, stack = dims[name], np.stack(values)
        if "damping" in over:
            stack, over = np.moveaxis(stack, 1, 0), ("damping", *(("layer",) if stacked else ()), *over[1:])
            stack = stack if stacked else stack[:, 0]
        else:
            over, stack = (("layer", *over), stack) if stacked else (over, stack[0])
        variables[name] = (over, stack, _describe(name))
    coords = {
        "kind": list(kinds),
        "kind_i": list(kinds),
        "kind_j": list(kinds),
        "rank": np.arange(length),
        "angle": np.arange(k),
    }
    return variables, coords


_BETWEEN_SEEDS = ("distance", "cosine", "overlap", "natural_gradient_cosine")


def _has_spread(name: str) -> bool:
    return not name.endswith("_sem") and name not in (
        "above_noise",
        "noise_floor",
        "overlap_size",
        "overlap_chance",
        "principal_angle",
    )


def _describe(name: str) -> dict[str, str]:
    plain, ending = name, ""
    if name.startswith("seed_"):
        plain, ending = name.removeprefix("seed_"), ", two seeds of the mc kind"
    for suffix, text in (("_sem", ", standard error"), ("_spread", ", standard deviation over seeds")):
        if name.endswith(suffix):
            plain, ending = name.removesuffix(suffix), text
    return {"long_name": _WORDS[plain] + ending, "units": _UNITS.get(plain, "1")}


def _norms(part: Part) -> dict[str, np.ndarray]:
    """What follows from inner products and traces; where they are means over probes, with jackknife errors."""
    inner, square, trace = part.inner.numpy(), part.square.numpy(), part.trace.numpy()
    found = _functionals(inner.mean(-1), square.mean(-1), trace.mean(-1))
    found.pop("frobenius_norm")
    found.pop("trace")
    return found | _errors(inner, square, trace, drop=("frobenius_norm", "trace"))


def _functionals(inner: np.ndarray, square: np.ndarray, trace: np.ndarray) -> dict[str, np.ndarray]:
    own = inner.diagonal()
    with np.errstate(divide="ignore", invalid="ignore"):
        norm = np.sqrt(own)
        cosine = np.clip(inner / (norm[:, None] * norm), -1, 1)
        np.fill_diagonal(cosine, np.where(own > 0, 1.0, np.nan))
        # ‖A - sB‖² from ‖A - B‖², which does not cancel for matrices that are close
        left = square - ((own[:, None] - own - square) / 2) ** 2 / own
        return {
            "distance": np.sqrt(square) / norm[:, None],
            "cosine": cosine,
            "scale": inner / own,
            "scaled_distance": np.sqrt(np.clip(left, 0, None)) / norm[:, None],
            "trace_ratio": trace / trace[:, None],
            "frobenius_norm": norm,
            "trace": trace,
        }


def _errors(inner: np.ndarray, square: np.ndarray, trace: np.ndarray, drop: Sequence[str]) -> dict[str, np.ndarray]:
    """Jackknife standard errors over probes, under names with ``_sem``."""
    count = inner.shape[-1]
    if count == 1:
        return {}
    sums = [x.sum(-1) for x in (inner, square, trace)]
    left_out = [
        _functionals(
            *((total - x[..., b]) / (count - 1) for total, x in zip(sums, (inner, square, trace), strict=True))
        )
        for b in range(count)
    ]
    found = {}
    for name in left_out[0]:
        if name not in drop:
            stack = np.stack([one[name] for one in left_out])
            found[f"{name}_sem"] = np.sqrt((count - 1) / count * np.square(stack - stack.mean(0)).sum(0))
    return found


def _singles(part: Part, k: int, length: int) -> dict[str, np.ndarray]:
    """What is known of each matrix alone."""
    inner, square, trace = part.inner.numpy(), part.square.numpy(), part.trace.numpy()
    means = _functionals(inner.mean(-1), square.mean(-1), trace.mean(-1))
    errors = _errors(inner, square, trace, drop=("distance", "cosine", "scale", "scaled_distance", "trace_ratio"))
    eigenvalue = np.full((len(part.values), length), np.nan)
    above = np.zeros(eigenvalue.shape, dtype=bool)
    gap = np.full(len(part.values), np.nan)
    for at, (values, floor) in enumerate(zip(part.values, part.floors, strict=True)):
        row = values.cpu().numpy()
        eigenvalue[at, : len(row)] = row
        above[at, : len(row)] = np.abs(row) > (floor if np.isfinite(floor) else 0)
        if len(row) > k and above[at, k - 1]:
            gap[at] = 1 - row[k] / row[k - 1]
    found = {name: means[name] for name in ("trace", "frobenius_norm")} | errors
    return found | {"eigenvalue": eigenvalue, "above_noise": above, "noise_floor": np.array(part.floors), "gap": gap}


def _spaces(part: Part, k: int) -> dict[str, np.ndarray]:
    """Overlap and principal angles of the leading spaces of every pair."""
    count = len(part.spaces)
    overlap, size = np.full((count, count), np.nan), np.zeros((count, count), dtype=int)
    angles = np.full((count, count, k), np.nan)
    for i, j in itertools.product(range(count), repeat=2):
        common = min(part.spaces[i].shape[1], part.spaces[j].shape[1])
        size[i, j] = common
        if common:
            found = _principal_angles(part.spaces[i][:, :common].double(), part.spaces[j][:, :common].double())
            overlap[i, j], angles[i, j, :common] = np.square(np.cos(found)).mean(), found
    return {"overlap": overlap, "overlap_size": size, "overlap_chance": size / part.size, "principal_angle": angles}


def _principal_angles(a: Tensor, b: Tensor) -> np.ndarray:
    """Ascending, in rad; small ones from their sines, which keep the digits that cosines lose."""
    inner = a.T @ b
    cosine = torch.linalg.svdvals(inner).clamp(max=1)
    sine = torch.linalg.svdvals(b - a @ inner).clamp(max=1).flip(0)
    return torch.where(cosine > 0.7, sine.asin(), cosine.acos()).cpu().numpy()


def _directions(steps: Sequence[Tensor]) -> np.ndarray:
    """Cosine of the steps of every pair, ``(members, members, dampings)``."""
    stack = torch.stack([step.double() for step in steps])  # (members, P, dampings)
    unit = stack / torch.linalg.vector_norm(stack, dim=1, keepdim=True)
    return torch.einsum("ipd,jpd->ijd", unit, unit).clamp(-1, 1).cpu().numpy()


def _noise(part: Part) -> dict[str, np.ndarray]:
    """The expected distance, relative to the first member with noise 0, which is the exact kind."""
    if not part.noise:
        return {}
    count = len(part.values)
    square, error = (np.array(column)[:count] for column in zip(*part.noise, strict=True))
    exact = next(at for at in range(count) if square[at] == 0 and error[at] == 0)
    norm = np.sqrt(part.inner[exact, exact].mean().item())
    with np.errstate(divide="ignore", invalid="ignore"):
        noise = np.sqrt(square) / norm
        sem = np.where(square > 0, error / (2 * np.sqrt(square)) / norm, np.where(error == 0, 0.0, np.nan))
    return {"sampling_noise": noise, "sampling_noise_sem": sem}


def _by_kind(
    values: np.ndarray, places: Sequence[Sequence[int]], *, pairs: bool, spread: bool
) -> dict[str, np.ndarray]:
    """Mean and standard deviation over the seeds of each kind, or pair of kinds."""
    if not pairs:
        groups = [values[list(at)] for at in places]
        mean = np.stack([group.any(0) if group.dtype == bool else group.mean(0) for group in groups])
        std = np.stack([_deviation(group) for group in groups]) if spread else None
    else:
        combos = [[[(i, i) for i in a] if a is b else list(itertools.product(a, b)) for b in places] for a in places]
        groups = [[np.stack([values[i, j] for i, j in cell]) for cell in row] for row in combos]
        mean = np.stack([np.stack([group.mean(0) for group in row]) for row in groups])
        std = np.stack([np.stack([_deviation(group) for group in row]) for row in groups]) if spread else None
    return {"": mean} if std is None else {"": mean, "_spread": std}


def _deviation(group: np.ndarray) -> np.ndarray:
    return group.std(0, ddof=1) if len(group) > 1 else np.zeros(group.shape[1:])


def _between_seeds(values: np.ndarray, places: Sequence[Sequence[int]]) -> np.ndarray:
    """Mean over ordered pairs of different seeds of the mc kind."""
    seeds = next(at for at in places if len(at) > 1)
    return np.mean([values[i, j] for i, j in itertools.permutations(seeds, 2)], axis=0)
