"""What the results say in a few numbers: the ones on the cards, derived once and kept with the results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fisherlens.report.blocks import SEGMENTS
from fisherlens.report.relations import ALPHA
from fisherlens.report.steps import FULL
from fisherlens.results import make_dataset
from fisherlens.spectrum import WHOLE, effective_dimension

if TYPE_CHECKING:
    import xarray as xr

CARRY = (0.5, 0.9, 0.99)
HELD, PARTLY = 0.8, 0.4  # rank correlations from which on a predicted order is said to hold, or to hold in part


def node(tree: xr.DataTree, name: str) -> xr.Dataset | None:
    """One result of the tree, or None where it is missing."""
    try:
        found = tree[name].to_dataset()
    except KeyError:
        return None
    return found if found.variables else None


def stages_of(tree: xr.DataTree) -> list[str]:
    """Stages that were analysed, in order."""
    facts = node(tree, "fisher")
    return [] if facts is None else [str(name) for name in facts.stage.values]


def at(result: xr.Dataset | None, stage: str) -> xr.Dataset | None:
    """One stage of a result, or None where it is missing."""
    if result is None or stage not in result.stage.values:
        return None
    return result.sel(stage=stage)


def carrying(values: np.ndarray, share: float) -> int:
    """How many of the largest eigenvalues add up to this share of their sum."""
    values = np.clip(values[np.isfinite(values)], 0, None)
    total = values.sum()
    return int(np.searchsorted(np.cumsum(values), share * total * (1 - 1e-12)) + 1) if total > 0 else 0


def rank_correlation(first: Any, second: Any) -> float:
    """Spearman's rank correlation with mean ranks for ties; NaN for fewer than three pairs or without variation."""
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    good = np.isfinite(first) & np.isfinite(second)
    if good.sum() < 3:
        return float("nan")
    a, b = (_ranks(values[good]) for values in (first, second))
    if a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def verdict(rho: float) -> str:
    """A rank correlation in one word: ``held``, ``held in part``, ``did not hold``, ``not known``."""
    if not np.isfinite(rho):
        return "not known"
    return "held" if rho >= HELD else "held in part" if rho >= PARTLY else "did not hold"


def speed(curves: xr.Dataset) -> xr.DataArray:
    """Geometric mean of the training loss over a run's records after the start, median over seeds: low is fast."""
    loss = curves.train_loss.isel(step=slice(1, None))
    return np.exp(np.log(loss.where(loss > 0)).mean("step", skipna=False)).median("seed", skipna=True)


def predicted_order(tree: xr.DataTree) -> xr.DataArray | None:
    """What a segmentation keeps of the natural step's decrease, mean over stages: what its training should follow."""
    judged = node(tree, "independence")
    return None if judged is None else judged.decrease_ratio.sel(layer=WHOLE).mean("stage")


def trained_order(tree: xr.DataTree) -> tuple[list[str], np.ndarray, np.ndarray] | None:
    """Segmentations with what they keep, and the mean training loss of CW-NGD on their blocks."""
    expected, curves = predicted_order(tree), node(tree, "segment_training")
    if expected is None or curves is None:
        return None
    names = [str(name) for name in curves.optimizer.values if name in expected.partition.values]
    found = speed(curves)
    return (
        names,
        np.array([float(expected.sel(partition=n)) for n in names]),
        np.array([float(found.sel(optimizer=n)) for n in names]),
    )


def key_numbers(tree: xr.DataTree) -> xr.Dataset | None:
    """Derive the few numbers that the page leads with, over ``stage`` where they belong to one.

    Returns
    -------
    Dataset; NaN where an analysis is missing, and None where no stage was analysed.
    """
    stages = stages_of(tree)
    if not stages:
        return None
    found: dict[str, tuple[list[float], str, str]] = {}

    def per_stage(name: str, text: str, units: str, value: Any) -> None:
        found[name] = ([float(value(stage)) for stage in stages], text, units)

    facts, spectrum = node(tree, "fisher"), node(tree, "spectrum")
    judged, pairs, steps = (node(tree, name) for name in ("independence", "coupling", "one_step"))
    whole = None if spectrum is None else spectrum.sel(layer=WHOLE)

    def eigenvalues(stage: str) -> np.ndarray:
        part = at(whole, stage)
        return np.array([np.nan]) if part is None else part.eigenvalue.values

    def dimension(stage: str) -> float:
        part = at(whole, stage)
        damping = float(facts.damping.sel(stage=stage))
        return np.nan if part is None or not damping > 0 else float(effective_dimension(part, damping))

    per_stage("trace", "trace of F", "nat", lambda stage: facts.trace.sel(stage=stage))
    per_stage("top_eigenvalue", "largest eigenvalue of F", "nat", lambda stage: facts.top_eigenvalue.sel(stage=stage))
    per_stage("effective_dimension", "effective dimension at the damping", "1", dimension)
    for share in CARRY:
        name = f"carry_{round(100 * share)}"
        per_stage(
            name, f"eigenvalues that carry {share:.0%} of the trace", "1", lambda s, q=share: _carry(eigenvalues(s), q)
        )
    per_stage("strongest_coupling", "strongest coupling of two layers", "1", lambda s: _strongest(at(pairs, s))[0])
    per_stage("strongest_floor", "noise floor of that pair", "1", lambda s: _strongest(at(pairs, s))[1])
    per_stage("pairs_above_floor", "pairs of layers above their noise floor", "1", lambda s: _pairs(at(pairs, s))[0])
    per_stage(
        "pairs_significant", f"pairs of layers with adjusted p < {ALPHA:g}", "1", lambda s: _pairs(at(pairs, s))[1]
    )
    per_stage("num_pairs", "pairs of layers", "1", lambda s: _pairs(at(pairs, s))[2])
    for scheme in () if judged is None else [str(name) for name in judged.partition.values]:
        name = f"decrease_{scheme.replace('-', '')}"
        text = f"what {scheme} blocks keep of the natural step's decrease"
        per_stage(name, text, "1", lambda s, p=scheme: _kept(at(judged, s), p))
    per_stage(
        "one_step_correlation",
        "rank correlation of predicted and measured decrease",
        "1",
        lambda s: step_correlation(at(steps, s)),
    )
    trained = trained_order(tree)
    variables: dict[str, Any] = {
        name: ("stage", values, {"long_name": text, "units": units}) for name, (values, text, units) in found.items()
    }
    rho = (
        np.nan
        if trained is None
        else rank_correlation(trained[1], -np.log(np.where(trained[2] > 0, trained[2], np.nan)))
    )
    variables["training_correlation"] = (
        (),
        rho,
        {"long_name": "rank correlation of what segmentations keep and how fast CW-NGD trains on them", "units": "1"},
    )
    for name, value, text in _training_numbers(node(tree, "training")):
        variables[name] = ((), value, {"long_name": text, "units": "1" if "accuracy" in name else "nat"})
    return make_dataset(variables, {"stage": stages}, method="derived from the other results of this report")


def _carry(values: np.ndarray, share: float) -> float:
    return carrying(values, share) if np.isfinite(values).any() else np.nan


def _strongest(pairs: xr.Dataset | None) -> tuple[float, float]:
    if pairs is None or pairs.sizes["block_i"] < 2:
        return np.nan, np.nan
    i, j = strongest_pair(pairs)
    return float(pairs.coupling[i, j]), float(pairs.noise_floor[i, j])


def strongest_pair(pairs: xr.Dataset) -> tuple[int, int]:
    """Places of the two different blocks with the largest coupling."""
    values = np.triu(pairs.coupling.values, 1)
    return tuple(int(place) for place in np.unravel_index(int(values.argmax()), values.shape))


def _pairs(pairs: xr.Dataset | None) -> tuple[float, float, float]:
    if pairs is None:
        return np.nan, np.nan, np.nan
    upper = np.triu_indices(pairs.sizes["block_i"], 1)
    above = (pairs.coupling.values > pairs.noise_floor.values)[upper].sum()
    significant = (pairs.p_adjusted.values[upper] < ALPHA).sum() if "p_adjusted" in pairs else np.nan
    return float(above), float(significant), float(len(upper[0]))


def _kept(judged: xr.Dataset | None, scheme: str) -> float:
    return np.nan if judged is None else float(judged.decrease_ratio.sel(partition=scheme, layer=WHOLE))


def step_correlation(steps: xr.Dataset | None, factor: float = 1.0) -> float:
    """Rank correlation of promised and measured decrease over all directions but the gradient, at one damping."""
    if steps is None or factor not in steps.damping_factor.values:
        return np.nan
    part = steps.sel(damping_factor=factor)
    return rank_correlation(part.predicted_decrease.values, part.measured_decrease.values)


def _training_numbers(curves: xr.Dataset | None) -> list[tuple[str, float, str]]:
    if curves is None:
        return []
    last = curves.isel(step=-1)
    rows = []
    for name in [str(entry) for entry in curves.optimizer.values]:
        key = name.replace("-", "").replace(" ", "_")
        one = last.sel(optimizer=name)
        rows += [
            (
                f"final_loss_{key}",
                float(one.train_loss.median()),
                f"training loss of {name} after the last step, median over seeds",
            ),
            (
                f"final_accuracy_{key}",
                float(one.test_accuracy.median()),
                f"test accuracy of {name} after the last step, median over seeds",
            ),
        ]
    return rows


__all__ = [
    "CARRY",
    "FULL",
    "HELD",
    "PARTLY",
    "SEGMENTS",
    "at",
    "carrying",
    "key_numbers",
    "node",
    "rank_correlation",
    "speed",
    "stages_of",
    "verdict",
]
