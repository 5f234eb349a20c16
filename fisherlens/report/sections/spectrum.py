"""The section on the complete spectrum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fisherlens.report.elements import Section, paragraph, table
from fisherlens.report.findings import CARRY, carrying
from fisherlens.report.sections.view import View
from fisherlens.report.words import count, listing, num, share, times
from fisherlens.spectrum import WHOLE

if TYPE_CHECKING:
    import xarray as xr

_GAP = 3.0  # ratio of neighbouring eigenvalues from which on a gap is worth a sentence


def spectrum(view: View) -> Section:
    """The section on the complete spectrum, of the whole and by layer."""
    section = Section(
        "spectrum", "The spectrum", "What does the complete spectrum look like, and how many eigenvalues carry it?"
    )
    found = view.node("spectrum")
    if found is None:
        section.headline = "The spectrum is not available here."
        section.add(view.troubles("spectrum", "stage"))
        return section
    last = view.known(found)[-1]
    whole = found.sel(layer=WHOLE)
    one = whole.sel(stage=last)
    values = one.eigenvalue.values[np.isfinite(one.eigenvalue.values)]
    ninety, total = carrying(values, 0.9), max(float(np.clip(values, 0, None).sum()), 1e-300)
    section.headline = (
        f"**{count(ninety)} of {count(len(values))}** eigenvalues carry 90 % of the trace {view.when(last)}; the largest, {num(values[0])} nat, "
        f"carries {share(values[0] / total)} alone."
    )
    section.add(
        paragraph(_complete(view, one, len(values))),
        paragraph(_course(view, whole), _gap(view, whole)),
        view.picture(
            "spectrum",
            "**The complete spectrum of the whole network.** Left: every eigenvalue over its rank; hollow marks and grey ground are below the "
            "noise floor n·ε·λ₁, where rounding decides. Right: how much of the trace the largest eigenvalues carry together.",
        ),
        _stage_table(view, whole),
        paragraph(_by_layer(view, found.sel(stage=last))),
        view.picture(
            "spectrum-layers",
            "**Spectra by layer**: the diagonal block of each layer, and the whole network in black. Where the black curve is well above all "
            "others, couplings between layers add up to directions that no layer shows alone.",
        ),
        _layer_table(view, found.sel(stage=last), last),
        view.troubles("spectrum"),
    )
    return section


def _complete(view: View, one: xr.Dataset, possible: int) -> str:
    params, rows = int(view.facts["n_params"]), int(view.facts["n_data"]) * int(view.facts["n_columns"])
    above, floor = int(one.num_above_noise), float(one.noise_floor)
    text = "This is all of it, computed exactly and not sampled. "
    if possible < params:
        text += (
            f"Of the {count(params)} eigenvalues of F, {count(params - possible)} are exactly zero, because {count(view.facts['n_data'])} examples with "
            f"{view.facts['n_columns']} score columns each span at most {count(rows)} directions. "
        )
    text += (
        f"Of the {count(possible)} that can be non-zero, "
        if possible < params
        else f"Of the {count(params)} eigenvalues of F, "
    )
    name = f"the noise floor {num(floor)} nat (n·ε·λ₁, in {view.facts['dtype']})"
    if above == possible:
        return text + f"all are above {name}."
    return (
        text
        + f"{count(above)} are above {name}; the others are kept in the data file, but rounding decides their value."
    )


def _course(view: View, whole: xr.Dataset) -> str:
    known = view.known(whole)
    if len(known) < 2:
        return ""
    carried = [count(carrying(whole.eigenvalue.sel(stage=stage).values, 0.9)) for stage in known]
    tops = [num(float(whole.eigenvalue.sel(stage=stage)[0])) for stage in known]
    same = len(set(carried)) == 1
    text = f"The largest eigenvalue is {listing([f'{top} {view.when(stage)}' for top, stage in zip(tops, known, strict=True)])}. "
    if same:
        return text + f"The number that carries 90 % of the trace stays at {carried[0]} while the scale changes."
    return (
        text
        + f"Of them {listing([f'{many} {view.when(stage)}' for many, stage in zip(carried, known, strict=True)])} carry 90 % of the trace."
    )


def _gap(view: View, whole: xr.Dataset) -> str:
    """The widest gap among the leading eigenvalues; at initialisation it often comes after C - 1 of them."""
    columns = int(view.facts["n_columns"])
    said = []
    for stage in view.known(whole):
        one = whole.sel(stage=stage)
        values = one.eigenvalue.values[: min(50, int(one.num_above_noise))]
        if len(values) < 3:
            continue
        ratio = values[:-1] / values[1:]
        place = int(ratio.argmax()) + 1
        if ratio[place - 1] < _GAP:
            continue
        classes = view.facts["likelihood"] == "categorical" and view.facts["kind"] == "exact" and place == columns
        why = ", the number of classes less one," if classes else ""
        said.append(
            f"{view.when(stage)} {count(place)} eigenvalues{why} stand apart from the rest by a factor of {num(ratio[place - 1], 2)}"
        )
    if not said:
        return f"No gap in the first fifty exceeds a factor of {_GAP:g}: the spectrum falls off smoothly."
    return f"There is a gap: {listing(said)}."


def _stage_table(view: View, whole: xr.Dataset) -> str:
    head = [
        "Stage",
        "λ₁ [nat]",
        "λ₁ over\ntr F",
        *(f"carry\n{share(q)}" for q in CARRY),
        "above the\nnoise floor",
        "noise floor\n[nat]",
    ]
    head += ["damping λ\n[nat]", "effective\ndimension"]
    rows = []
    for stage in view.known(whole):
        one = whole.sel(stage=stage)
        values = one.eigenvalue.values
        row = [stage, num(values[0]), share(values[0] / float(one.trace)), *(count(carrying(values, q)) for q in CARRY)]
        row += [count(int(one.num_above_noise)), num(float(one.noise_floor))]
        row += [
            num(float(view.node("fisher").damping.sel(stage=stage))),
            num(view.number("effective_dimension", stage)),
        ]
        rows.append(row)
    return table(
        head,
        rows,
        "The whole network. “Carry 90 %” is the number of largest eigenvalues that add up to 90 % of the trace.",
    )


def _by_layer(view: View, one: xr.Dataset) -> str:
    layers = [str(name) for name in one.layer.values if name != WHOLE]
    if len(layers) < 2:
        return ""
    tops = np.array([float(one.eigenvalue.sel(layer=layer)[0]) for layer in layers])
    top = float(one.eigenvalue.sel(layer=WHOLE)[0])
    best = layers[int(tops.argmax())]
    factor = top / tops.max() if tops.max() > 0 else np.nan
    text = (
        f"By layer, `{best}` has the largest eigenvalue, {num(tops.max())}. That of the whole network is {times(factor)} as large; it would be equal "
        f"if layers were uncoupled, and could be at most {num(tops.sum())}, the sum over the layers, if their leading directions always moved the outputs together."
    )
    if tops.sum() > tops.max() and np.isfinite(factor):
        reached = (top - tops.max()) / (tops.sum() - tops.max())
        text += f" It covers {share(reached)} of that range."
    return text


def _layer_table(view: View, one: xr.Dataset, stage: str) -> str:
    rows = []
    for layer in [str(name) for name in one.layer.values]:
        part = one.sel(layer=layer)
        values = part.eigenvalue.values[np.isfinite(part.eigenvalue.values)]
        name = "whole network" if layer == WHOLE else f"`{layer}`"
        row = [
            name,
            num(values[0]),
            share(values[0] / max(float(part.trace), 1e-300)),
            count(carrying(values, 0.9)),
            count(carrying(values, 0.99)),
        ]
        rows.append([*row, count(int(part.num_above_noise)), count(len(values))])
    head = [
        "Layer",
        "λ₁ [nat]",
        "λ₁ over its\ntrace",
        "carry 90 %",
        "carry 99 %",
        "above the\nnoise floor",
        "can be\nnon-zero",
    ]
    return table(head, rows, f"Spectra by layer{view.at(stage)}.", strong=[len(rows) - 1]) if len(rows) > 2 else ""
