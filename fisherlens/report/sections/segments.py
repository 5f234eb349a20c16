"""The section on couplings between segments inside a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fisherlens.report.blocks import SEGMENTS
from fisherlens.report.elements import Section, paragraph, table
from fisherlens.report.relations import ALPHA, RELATIONS
from fisherlens.report.sections.view import View
from fisherlens.report.words import count, fixed, listing, num, plural, share, times

if TYPE_CHECKING:
    import xarray as xr

_TASKS = ("coupling of the segments", "relations of segments")


def segments(view: View) -> Section:
    """The section on couplings between CW-NGD's segments inside each layer."""
    section = Section(
        "segments", "Couplings between segments", "Which of CW-NGD's segments inside a layer are coupled?"
    )
    found = view.node("segment_relations")
    if found is None:
        section.headline = "No layer has a number of segments for which all pairs could be looked at here."
        section.add(view.troubles(*_TASKS))
        return section
    last = view.known(found)[-1]
    one = found.sel(stage=last)
    layers = [str(name) for name in one.layer.values]
    total = one.sel(relation=RELATIONS[0])
    pairs = int(total.pairs.sum())
    above = float((total.above_floor * total.pairs).sum() / max(pairs, 1))
    section.headline = f"**{share(above)} of {count(pairs)} pairs** of segments in the same layer are coupled above their noise floor {view.when(last)}. {_tightest(one)}"
    silent = int(one.num_silent.sum())
    section.add(
        paragraph(
            f"A segment is a block of the `{SEGMENTS}` segmentation: one kernel of a convolution, one source channel of a unit, or the biases of a "
            f"layer. CW-NGD treats them as independent. All pairs were looked at in {listing([f'`{name}` ({int(one.num_segments.sel(layer=name))} segments)' for name in layers])}.",
            f"{plural(silent, 'segment')} {'tells' if silent == 1 else 'tell'} nothing {view.when(last)} and {'is' if silent == 1 else 'are'} left out of all counts."
            if silent
            else "",
        ),
        view.troubles(*_TASKS),
        paragraph(*(_relation_sentence(one, name) for name in layers)),
        view.picture(
            "relations",
            "**What coupled segments have in common.** Each row is a kind of pair: same output (both feed one unit or channel), same input (both read "
            "one channel), neither, or with the layer's biases. Dots left of or on the black line, the median noise floor, would be chance.",
        ),
        view.picture(
            "coupling-segments",
            "**Coupling of every pair of segments**, by layer. Dark squares on the diagonal are groups of segments with one output; grey are segments "
            f"that tell nothing; the orange line in a colour bar is the median noise floor. Dots (adjusted p < {ALPHA:g}) and hatching (at or below the "
            "floor) are drawn where cells are large enough.",
        ),
        _table(view, found, last),
        paragraph(_course(view, found)),
    )
    return section


def _tightest(one: xr.Dataset) -> str:
    """The kind of pair with the strongest median coupling over all layers."""
    kinds = one.sel(relation=list(RELATIONS[1:])).coupling
    if not np.isfinite(kinds.values).any():
        kinds = one.sel(relation=[RELATIONS[0]]).coupling
    best = np.unravel_index(np.nanargmax(kinds.values), kinds.shape)
    part = one.sel(layer=kinds.layer[best[0]], relation=kinds.relation[best[1]])
    kind, layer = str(kinds.relation.values[best[1]]), str(kinds.layer.values[best[0]])
    words = {
        "same output": " with the same output",
        "same input": " with the same input",
        "neither": " with neither output nor input in common",
    }
    words |= {"with a bias": " of which one holds the biases", "all pairs": ""}
    floor = float(part.noise_floor)
    return f"The tightest are pairs{words[kind]} in `{layer}`: **{num(float(part.coupling))}** at the median" + (
        f", {times(float(part.coupling) / floor)} the floor." if floor > 0 else "."
    )


def _relation_sentence(one: xr.Dataset, layer: str) -> str:
    part = one.sel(layer=layer)
    kinds = [kind for kind in RELATIONS[1:4] if int(part.pairs.sel(relation=kind)) > 0]
    if len(kinds) < 2:
        whole = part.sel(relation=RELATIONS[0])
        if not int(whole.pairs):
            return ""
        return (
            f"In `{layer}` the median pair has {num(float(whole.coupling))}, {times(float(whole.excess))} its floor; {share(float(whole.above_floor))} of the "
            f"pairs are above theirs."
        )
    values = {kind: float(part.coupling.sel(relation=kind)) for kind in kinds}
    order = sorted(kinds, key=lambda kind: -values[kind])
    low = values[order[-1]]
    said = listing([f"{num(values[kind])} ({kind})" for kind in order])
    close = values[order[0]] - low < 0.05
    meaning = "so what they share hardly matters" if close else f"so pairs with the {order[0]} belong together most"
    if not close and order[0] == "neither":
        meaning = "so a common output or input is not what ties them"
    return f"In `{layer}` the median coupling is {said}, {meaning}."


def _table(view: View, found: xr.Dataset, last: str) -> str:
    one = found.sel(stage=last)
    head = [
        "Layer",
        "Pairs",
        "Number",
        "median\ncoupling",
        "10 – 90 %\nof the pairs",
        "median\nfloor",
        "times the\nfloor",
        "above\nthe floor",
        f"adjusted\np < {ALPHA:g}",
    ]
    rows = []
    strong = []
    for layer in [str(name) for name in one.layer.values]:
        kinds = [kind for kind in RELATIONS if int(one.pairs.sel(layer=layer, relation=kind)) > 0]
        if len(kinds) == 2:  # the only kind says what all pairs say
            kinds = kinds[:1]
        for kind in kinds:
            part = one.sel(layer=layer, relation=kind)
            if kind == RELATIONS[0]:
                strong.append(len(rows))
            row = [
                f"`{layer}`",
                kind,
                count(int(part.pairs)),
                fixed(part.coupling),
                f"{fixed(part.coupling_low)} – {fixed(part.coupling_high)}",
            ]
            row += [
                fixed(part.noise_floor, 3),
                f"{num(float(part.excess), 2)} ×",
                share(float(part.above_floor)),
                share(float(part.significant)),
            ]
            rows.append(row)
    strongest = listing(
        [
            f"`{one.strongest_pair.sel(layer=layer).item()}` ({fixed(one.strongest_coupling.sel(layer=layer))})"
            for layer in one.layer.values
        ]
    )
    draws = min(int(view.facts["num_null"]), 99)
    test = (
        f" p-values from {draws} permutations, adjusted within each layer, so that many pairs make each one hard to show."
        if draws
        else ""
    )
    return table(
        head,
        rows,
        f"Segments by what they share{view.at(last)}. Strongest pairs: {strongest}.{test}",
        words=2,
        strong=strong,
    )


def _course(view: View, found: xr.Dataset) -> str:
    known = view.known(found)
    if len(known) < 2:
        return ""
    said = []
    for layer in [str(name) for name in found.layer.values]:
        values = [
            float(found.coupling.sel(stage=stage, layer=layer, relation=RELATIONS[0]))
            for stage in (known[0], known[-1])
        ]
        if np.isfinite(values).all():
            said.append(f"{num(values[0])} → {num(values[1])} in `{layer}`")
    return f"From {known[0]} to {known[-1]} the median coupling of all pairs went {listing(said)}." if said else ""
