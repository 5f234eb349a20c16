"""The section on the size and the place of the information."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fisherlens.report.elements import Section, paragraph, table
from fisherlens.report.relations import SILENT
from fisherlens.report.sections.view import View
from fisherlens.report.words import change, count, listing, num, share, times

if TYPE_CHECKING:
    import xarray as xr

_MANY = 10  # units of which a tenth is one
_LENGTH = 0.1  # of the change of parameters that the text takes as an example


def information(view: View) -> Section:
    """The section on trace, effective dimension and their place."""
    section = Section("information", "The information", "How large is the information, and where does it sit?")
    found, facts = view.node("information"), view.node("fisher")
    if facts is None:
        section.headline = "The Fisher could not be taken, so this question has no answer here."
        section.add(view.troubles("stage", "largest eigenvalue"))
        return section
    last = view.last
    trace = float(facts.trace.sel(stage=last))
    others = [f"{num(float(facts.trace.sel(stage=stage)))} {view.when(stage)}" for stage in view.stages[:-1]]
    section.headline = f"The trace of F is **{num(trace)} nat** {view.when(last)}" + (
        f" ({listing(others)})." if others else "."
    )
    if found is not None and last in found.stage.values:
        section.headline += " " + _largest(found.sel(stage=last), view.when(last))
    section.add(paragraph(_meaning(view, facts)), paragraph(_course(view, facts)))
    if found is not None:
        section.add(
            paragraph(_places(view, found), _dimension(view)),
            view.picture(
                "information",
                "**Where the information sits.** Left: trace of each layer's block, with its share of the whole. Right: effective "
                "dimension of each layer's block at the damping. Look for layers whose share changes with training.",
            ),
            _table(view, found),
        )
    units = view.node("units")
    if units is not None:
        section.add(
            paragraph(_units(view, units)),
            view.picture(
                "units",
                "**Units sorted by their information**, incoming weights and bias of each. A steep curve means that few units of the "
                "layer carry it; a curve that ends early, that the other units tell nothing.",
            ),
        )
    section.add(view.troubles("information", "largest eigenvalue", "stage", "all further"))
    return section


def _largest(found: xr.Dataset, when: str) -> str:
    top = int(found.share.values.argmax())
    layer, size = str(found.layer.values[top]), float(found["size"][top] / found["size"].sum())
    if len(found.layer) < 2:
        return ""
    return f"The largest share, **{share(float(found.share[top]))}**, sits in `{layer}`, which has {share(size)} of the parameters."


def _meaning(view: View, facts: xr.Dataset) -> str:
    one = facts.sel(stage=view.last)
    top, mean = float(one.top_eigenvalue), float(one.trace) / int(view.facts["n_params"])
    if not top > 0:
        return ""
    steep, flat = (_LENGTH**2 / 2 * value for value in (top, mean))
    return (
        f"What that means: if all parameters together move by a distance of {_LENGTH:g}, the predictions change by about {num(steep)} nat per "
        f"example in the most informative direction (½ · {_LENGTH:g}² · λ₁) and by {num(flat)} nat in a random one (½ · {_LENGTH:g}² · tr F / P), "
        f"{times(steep / flat)} less. Both are Kullback–Leibler divergences to second order."
    )


def _course(view: View, facts: xr.Dataset) -> str:
    if len(view.stages) < 2:
        return ""
    pieces = []
    for before, after in zip(view.stages, view.stages[1:], strict=False):
        old, new = (float(facts.trace.sel(stage=stage)) for stage in (before, after))
        pieces.append(f"from {before} to {after} it {change(old, new)}")
    text = f"Along the run, the trace moved with training: {listing(pieces)}."
    loss = [float(facts.loss.sel(stage=stage)) for stage in view.stages]
    if loss[-1] < loss[-2] and float(facts.trace.sel(stage=view.stages[-1])) < float(
        facts.trace.sel(stage=view.stages[-2])
    ):
        text += (
            f" The last fall goes with a loss that went from {num(loss[-2])} to {num(loss[-1])} nat on these examples: where predictions become "
            "certain, a small change of the parameters no longer changes them."
        )
    return text


def _places(view: View, found: xr.Dataset) -> str:
    one = found.sel(stage=view.known(found)[-1])
    dense = one.share / (one["size"] / one["size"].sum())
    top, low = int(dense.values.argmax()), int(dense.values.argmin())
    names = [str(name) for name in one.layer.values]
    if len(names) < 2:
        return ""
    text = (
        f"Per parameter, `{names[top]}` is the most informative layer, with {times(float(dense[top]))} the network's mean, and `{names[low]}` the "
        f"least, with {times(float(dense[low]))} it."
    )
    first, last = view.known(found)[0], view.known(found)[-1]
    if first != last:
        moved = one.share - found.share.sel(stage=first)
        place = int(abs(moved).values.argmax())
        text += (
            f" The largest shift from {first} to {last} is in `{names[place]}`, from {share(float(found.share.sel(stage=first)[place]))} to "
            f"{share(float(one.share[place]))} of the trace."
        )
    return text


def _dimension(view: View) -> str:
    value, facts = view.number("effective_dimension", view.last), view.node("fisher")
    if value != value:
        return ""
    damping, params = float(facts.damping.sel(stage=view.last)), int(view.facts["n_params"])
    return (
        f"At the damping λ = {num(damping)} the effective dimension of the whole network is {num(value)}: of {count(params)} directions in "
        f"parameter space, about {count(value)} ({share(value / params)}) are determined better by the data than by the damping."
    )


def _table(view: View, found: xr.Dataset) -> str:
    known = view.known(found)
    last = known[-1]
    total = float(found["size"].sel(stage=last).sum())
    head = [
        "Layer",
        "Parameters",
        "share",
        *(view.head("Trace [nat]", stage) for stage in known),
        *(view.head("share", stage) for stage in known),
    ]
    head += ["Per parameter\nover the mean", "Effective\ndimension"]
    rows = []
    for layer in [str(name) for name in found.layer.values]:
        one = found.sel(layer=layer)
        size = float(one["size"].sel(stage=last))
        row = [f"`{layer}`", count(size), share(size / total)]
        row += [num(float(one.information.sel(stage=stage))) for stage in known]
        row += [share(float(one.share.sel(stage=stage))) for stage in known]
        row += [
            num(float(one.share.sel(stage=last)) / (size / total), 2) + " ×",
            num(float(one.effective_dimension.sel(stage=last))),
        ]
        rows.append(row)
    if len(rows) > 1:
        row = ["whole network", count(total), "100 %"]
        row += [num(float(found.information.sel(stage=stage).sum())) for stage in known] + ["100 %"] * len(known)
        rows.append([*row, "1 ×", num(view.number("effective_dimension", last))])
    caption = f"Information by layer{'' if len(known) < 2 else '; the last two columns ' + view.when(last)}. Traces add up over layers; effective dimensions do not, because coupled layers determine the same directions."
    return table(head, rows, caption, strong=[len(rows) - 1] if len(rows) > 1 else [])


def _units(view: View, units: xr.Dataset) -> str:
    stage = view.known(units)[-1]
    told = units.information.sel(stage=stage)
    silent = told <= SILENT * told.max()
    total, quiet = told.sizes["unit"], int(silent.sum())
    order = told.values[told.values.argsort()[::-1]]
    tenth = max(1, round(0.1 * total))
    text = ""
    if total >= 2 * _MANY:
        text = (
            f"Unit by unit, {view.when(stage)}: the {tenth} most informative of {total} units (a tenth) carry "
            f"{share(float(order[:tenth].sum() / max(order.sum(), 1e-300)))} of the trace. "
        )
    if not quiet:
        return text + "Every unit tells something."
    layers = [str(name) for name in units.layer.values]
    by_layer = [
        f"{sum(bool(silent[place]) for place, name in enumerate(layers) if name == layer)} of {layers.count(layer)} in `{layer}`"
        for layer in dict.fromkeys(layers)
        if any(bool(silent[place]) for place, name in enumerate(layers) if name == layer)
    ]
    return (
        f"{text}**{quiet} of {total} units tell nothing** ({listing(by_layer)}): on these examples no output depends on their weights, as "
        "behind a ReLU that is never on."
    )
