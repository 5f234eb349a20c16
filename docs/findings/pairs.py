"""How strongly the segments of a layer are coupled, by where they lie to each other: ρ² and its noise floor, means over pairs."""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr
from cuts import of_rule

import fisherlens as fl

RELATIONS = (
    "same unit, next source",
    "same unit, farther source",
    "same source, other unit",
    "other unit, other source",
    "units",
    "inputs",
)
MOST = 400  # segments whose couplings are computed; of a larger layer those of a few whole units


def _chosen(owner: np.ndarray, seed: int) -> np.ndarray:
    """Places of the segments to look at: all, or those of units drawn at random, two at least."""
    if len(owner) <= MOST:
        return np.arange(len(owner))
    units = np.unique(owner)
    count = max(2, MOST * len(units) // len(owner))
    return np.flatnonzero(np.isin(owner, np.random.default_rng([seed, 3]).permutation(units)[:count]))


def _mean(found: xr.Dataset, cells: np.ndarray) -> tuple[float, float, int]:
    """Mean ρ², mean squared floor and number of pairs, over the pairs above the diagonal whose blocks are not zero."""
    alive = found.block_norm.values > 0
    keep = np.triu(cells, 1) & alive[:, None] & alive
    count = int(keep.sum())
    if not count:
        return np.nan, np.nan, 0
    return float((found.coupling.values[keep] ** 2).mean()), float((found.noise_floor.values[keep] ** 2).mean()), count


def _segments(F: fl.Fisher, seed: int) -> dict[str, tuple[float, float, int]]:
    """The first four relations, of a layer that CW-NGD cuts into segments of more than one weight; else nothing."""
    layer, own = F.layout.layers[0], of_rule(F, "cw-ngd")
    weight = layer.weight
    if weight is None:
        return {}
    row = (weight.stop - weight.start) // weight.shape[0]
    inside = [block - weight.start for block in own.blocks if weight.start <= int(block[0]) < weight.stop]
    size = len(inside[0])
    if size == 1 or row // size < 2:
        return {}
    first = np.array([int(block[0]) for block in inside])
    unit, source = first // row, first % row // size
    places = _chosen(unit, seed)
    blocks = {str(place): inside[place] + weight.start for place in places}
    rest = torch.ones(F.n_params, dtype=torch.bool)
    rest[torch.cat(list(blocks.values()))] = False
    if rest.any():
        blocks["rest"] = rest.nonzero()[:, 0]
    found = fl.coupling(F, blocks, num_null=0, progress_bar=False)
    keep = slice(0, len(places))
    found = found.isel(block_i=keep, block_j=keep)
    unit, source = unit[places], source[places]
    same_unit, same_source = unit[:, None] == unit, source[:, None] == source
    next_to = np.abs(source[:, None] - source) == 1
    cells = (same_unit & next_to, same_unit & ~next_to, ~same_unit & same_source, ~same_unit & ~same_source)
    return {name: _mean(found, cell) for name, cell in zip(RELATIONS, cells, strict=False)}


def coupling_by_relation(F: fl.Fisher, seed: int) -> xr.Dataset:
    """``squared_coupling``, ``squared_floor`` and ``num_pairs`` over layer and relation; NaN where a layer has no such pairs."""
    names = list(F.layout.layer_names)
    values = np.full((3, len(names), len(RELATIONS)), np.nan)
    for place, name in enumerate(names):
        own = F.restrict(name)
        found = _segments(own, seed)
        for relation, scheme in (("units", "unit"), ("inputs", "input")):
            part = of_rule(own, scheme)
            if 2 <= part.num_blocks <= 2100:
                table = fl.coupling(own, part, num_null=0, progress_bar=False)
                found[relation] = _mean(table, np.ones((part.num_blocks,) * 2, dtype=bool))
        for relation, three in found.items():
            values[:, place, RELATIONS.index(relation)] = three
    dims = ("layer", "relation")
    variables = dict(
        zip(("squared_coupling", "squared_floor", "num_pairs"), ((dims, part) for part in values), strict=True)
    )
    return xr.Dataset(variables, {"layer": names, "relation": list(RELATIONS)})
