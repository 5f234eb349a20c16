"""The section on couplings between layers and their chance level."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from fisherlens.report.elements import Section, paragraph, table
from fisherlens.report.findings import strongest_pair
from fisherlens.report.relations import ALPHA
from fisherlens.report.sections.view import View
from fisherlens.report.words import count, listing, num, p_value, times

if TYPE_CHECKING:
    import xarray as xr

_MOST_ROWS = 21  # pairs in the table; of more, the strongest


def coupling(view: View) -> Section:
    """The section on couplings between layers."""
    section = Section("coupling", "Couplings between layers", "Which layers are coupled, and by how much above chance?")
    found = view.node("coupling")
    if found is None or found.sizes["block_i"] < 2:
        one = found is not None
        section.headline = (
            "The network has one layer, so there is no pair."
            if one
            else "The couplings of layers are not available here."
        )
        section.add(view.troubles("coupling of layers"))
        return section
    last = view.known(found)[-1]
    one = found.sel(stage=last)
    names = [str(name) for name in one.block_i.values]
    i, j = strongest_pair(one)
    rho, floor = float(one.coupling[i, j]), float(one.noise_floor[i, j])
    above, pairs = (round(view.number(name, last)) for name in ("pairs_above_floor", "num_pairs"))
    section.headline = (
        f"{_of(above, pairs)} of layers {'is' if above == 1 or pairs == 1 else 'are'} coupled more than chance gives {view.when(last)}. The strongest is "
        f"**`{names[i]}` – `{names[j]}` with {num(rho)}**, {times(rho / floor) if floor > 0 else 'far'} the noise floor of {num(floor)}."
    )
    section.add(
        paragraph(
            "A coupling of 0 means that dropping the block of F between two layers loses nothing; 1 means that the two layers move the predictions "
            "in the same way on every example. The **noise floor** is the coupling that a sample of this size gives, on average, to two blocks that have "
            f"nothing to do with each other (here {num(float(np.median(one.noise_floor.values[np.triu_indices(len(names), 1)])))} at the median pair)."
        ),
        paragraph(_significance(view, found, last), _course(view, found)),
        view.picture(
            "coupling-layers",
            f"**Coupling of every pair of layers.** A white dot marks pairs whose permutation p-value, adjusted for all pairs, is below {ALPHA:g}; hatching "
            "would mark pairs at or below their noise floor, whose median is the orange line in the colour bar.",
        ),
        _table(view, found),
        view.troubles("coupling of layers"),
    )
    return section


def _of(some: int, total: int) -> str:
    if total == 1:
        return "**The only pair**" if some else "**Not even the only pair**"
    if some == total:
        return f"**All {count(total)} pairs**"
    return f"**{count(some) if some else 'None'} of {count(total)} pairs**"


def _significance(view: View, found: xr.Dataset, last: str) -> str:
    draws = int(view.facts["num_null"])
    if "p_adjusted" not in found:
        return "No permutations were drawn, so there are no p-values."
    some, total = round(view.number("pairs_significant", last)), round(view.number("num_pairs", last))
    text = (
        f"The test: the examples of one layer are shuffled against those of the other ({count(draws)} times, labels sampled once from the model), "
        f"which keeps each layer as it is and breaks what ties them. {count(some) if some else 'None'} of {count(total)} pairs "
        f"{'has' if some == 1 else 'have'} an adjusted p below {ALPHA:g}."
    )
    above = round(view.number("pairs_above_floor", last))
    if some < above:
        text += (
            f" {count(above - some)} {'pair is' if above - some == 1 else 'pairs are'} above the noise floor without being significant: the test sees one "
            "sampled label per example, which is noisier than the exact coupling shown."
        )
    return text


def _course(view: View, found: xr.Dataset) -> str:
    known = view.known(found)
    if len(known) < 2:
        return ""
    upper = np.triu_indices(found.sizes["block_i"], 1)
    means = [float(found.coupling.sel(stage=stage).values[upper].mean()) for stage in known]
    listed = listing([f"{num(mean)} {view.when(stage)}" for mean, stage in zip(means, known, strict=True)])
    moved = means[-1] - means[0]
    words = (
        "Training tied the layers together"
        if moved > 0.05
        else "Training loosened the layers"
        if moved < -0.05
        else "Training left this about as it was"
    )
    return f"{words}: the mean coupling of two layers is {listed}."


def _table(view: View, found: xr.Dataset) -> str:
    known = view.known(found)
    names = [str(name) for name in found.block_i.values]
    last = found.sel(stage=known[-1])
    pairs = sorted(combinations(range(len(names)), 2), key=lambda pair: -float(last.coupling[pair]))
    draws = int(view.facts["num_null"])
    tested = "p_adjusted" in found
    head = [
        "Pair of layers",
        *(view.head("coupling", stage) for stage in known),
        view.head("noise floor", known[-1]),
        "times the\nfloor",
    ]
    head += [view.head("adjusted p", stage) for stage in known] if tested else []
    rows = []
    for i, j in pairs[:_MOST_ROWS]:
        rho, floor = float(last.coupling[i, j]), float(last.noise_floor[i, j])
        row = [
            f"`{names[i]}` – `{names[j]}`",
            *(num(float(found.coupling.sel(stage=stage)[i, j])) for stage in known),
            num(floor, 2),
        ]
        row += [f"{num(rho / floor, 2)} ×" if floor > 0 else "–"]
        row += [p_value(float(found.p_adjusted.sel(stage=stage)[i, j]), draws) for stage in known] if tested else []
        rows.append(row)
    left = (
        f" The {_MOST_ROWS} strongest of {count(len(pairs))} pairs; the data file has all."
        if len(pairs) > _MOST_ROWS
        else ""
    )
    return table(head, rows, f"Couplings of layers, strongest first.{left}")
