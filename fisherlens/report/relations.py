"""Which segments of a layer are coupled: pairs sorted by what they share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fisherlens.results import make_dataset

if TYPE_CHECKING:
    import xarray as xr

ALPHA = 0.05  # level of the adjusted p-values, by convention
RELATIONS = ("all pairs", "same output", "same input", "neither", "with a bias")
# A segment whose matrix is smaller than this share of the largest one's tells nothing; what is left of it is rounding.
SILENT = 1e-9
_PLACE = re.compile(r"(\d+),(\d+)\]?$")


def relations(couplings: Mapping[str, xr.Dataset], operator: Any) -> xr.Dataset:
    """Summarise the couplings of segments by relation.

    Parameters
    ----------
    couplings
        Layer → result of :func:`fisherlens.coupling` for the segments of that layer. A segment whose label ends in ``out,in``
        (a kernel, or a source channel of a unit) has an output and an input; any other is taken as a bias where such labels
        exist, and without them there is one relation only.
    operator
        The Fisher, for the attributes.

    Returns
    -------
    Dataset over ``layer, relation``, silent segments left out: ``pairs``; ``coupling`` and ``noise_floor`` (medians), ``coupling_low`` and ``coupling_high`` (10 and
    90 %), ``excess`` (median of coupling over its floor), ``above_floor`` and ``significant`` (shares of the pairs); ``num_segments``,
    ``num_silent`` (those without information) and ``strongest_pair``, ``strongest_coupling``, ``strongest_floor`` over ``layer``. NaN
    where there is no such pair.
    """
    shape = (len(couplings), len(RELATIONS))
    words = {
        "coupling": "median coupling",
        "coupling_low": "coupling that 10 % of the pairs stay below",
        "coupling_high": "coupling that 90 % of the pairs stay below",
        "noise_floor": "median noise floor",
        "excess": "median of coupling over noise floor",
        "above_floor": "share of pairs above their noise floor",
        "significant": f"share of pairs with adjusted p < {ALPHA:g}",
    }
    values = {name: np.full(shape, np.nan) for name in words}
    pairs = np.zeros(shape, dtype=np.int64)
    strongest: dict[str, list[Any]] = {"pair": [], "coupling": [], "floor": [], "silent": []}
    for row, result in enumerate(couplings.values()):
        labels = [str(label) for label in result.block_i.values]
        heard = ~silent(result)
        first, second = np.triu_indices(len(labels), 1)
        both = heard[first] & heard[second]
        first, second = first[both], second[both]
        strongest["silent"].append(int((~heard).sum()))
        rho = result.coupling.values[first, second]
        floor = result.noise_floor.values[first, second]
        p = result.p_adjusted.values[first, second] if "p_adjusted" in result else np.full(len(rho), np.nan)
        for column, mask in enumerate(_masks(labels, first, second)):
            pairs[row, column] = mask.sum()
            if not mask.any():
                continue
            ratio = np.divide(rho, floor, out=np.zeros_like(rho), where=floor > 0)
            values["coupling"][row, column] = np.median(rho[mask])
            values["coupling_low"][row, column], values["coupling_high"][row, column] = np.quantile(
                rho[mask], [0.1, 0.9]
            )
            values["noise_floor"][row, column] = np.median(floor[mask])
            values["excess"][row, column] = np.median(ratio[mask])
            values["above_floor"][row, column] = (rho > floor)[mask].mean()
            known = np.isfinite(p[mask])
            values["significant"][row, column] = (p[mask][known] < ALPHA).mean() if known.any() else np.nan
        best = int(np.argmax(rho)) if len(rho) else None
        strongest["pair"].append("" if best is None else f"{labels[first[best]]} – {labels[second[best]]}")
        strongest["coupling"].append(np.nan if best is None else rho[best])
        strongest["floor"].append(np.nan if best is None else floor[best])
    dims = ("layer", "relation")
    variables: dict[str, Any] = {
        name: (dims, values[name], {"long_name": text, "units": "1"}) for name, text in words.items()
    }
    variables["pairs"] = (dims, pairs, {"long_name": "pairs of segments", "units": "1"})
    for name, key, text in (
        ("strongest_pair", "pair", "strongest pair"),
        ("strongest_coupling", "coupling", "coupling of the strongest pair"),
        ("strongest_floor", "floor", "noise floor of the strongest pair"),
        ("num_silent", "silent", "segments without information"),
    ):
        variables[name] = ("layer", strongest[key], {"long_name": text, "units": "1"})
    sizes = [result.sizes["block_i"] for result in couplings.values()]
    variables["num_segments"] = ("layer", sizes, {"long_name": "segments of the layer", "units": "1"})
    return make_dataset(
        variables,
        {"layer": list(couplings), "relation": list(RELATIONS)},
        operator=operator,
        method="pairs by relation",
    )


def silent(couplings: xr.Dataset) -> np.ndarray:
    """Which blocks tell nothing: no output depends on them, as behind a ReLU that is never on."""
    norms = couplings.block_norm.values
    return norms <= SILENT * norms.max(initial=0.0)


def _masks(labels: list[str], first: np.ndarray, second: np.ndarray) -> list[np.ndarray]:
    """Which pairs stand in each relation, in the order of RELATIONS."""
    found = [_PLACE.search(label) for label in labels]
    placed = np.array([match is not None for match in found])
    every = np.ones(len(first), dtype=bool)
    none = np.zeros(len(first), dtype=bool)
    if not placed.any():
        return [every, none, none, none, none]
    out = np.array([int(match[1]) if match else -1 for match in found])
    into = np.array([int(match[2]) if match else -1 for match in found])
    both = placed[first] & placed[second]
    same_out, same_in = both & (out[first] == out[second]), both & (into[first] == into[second])
    return [every, same_out, same_in, both & ~same_out & ~same_in, ~both]
