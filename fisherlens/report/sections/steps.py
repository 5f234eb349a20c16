"""The section on one step, predicted and measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fisherlens.report.elements import Section, bullets, paragraph, table
from fisherlens.report.findings import FULL, HELD, PARTLY, SEGMENTS, step_correlation, verdict
from fisherlens.report.sections.view import View
from fisherlens.report.steps import GRADIENT, LENGTHS
from fisherlens.report.words import count, listing, num, plain

if TYPE_CHECKING:
    import xarray as xr

_NARROW = 1.5  # factor between the largest and the smallest prediction below which their order says little
_FAR = 3.0  # factor between promised and measured decrease from which on the quadratic model is said to be left


def steps(view: View) -> Section:
    """The section on predicted and measured decrease of the loss for one step."""
    section = Section("steps", "One step", "Does a step with these blocks do what the quadratic model predicts?")
    found = view.node("one_step")
    if found is None:
        section.headline = "The one-step check is not available here."
        section.add(view.troubles("one-step check"))
        return section
    known = view.known(found)
    rhos = {stage: step_correlation(found.sel(stage=stage)) for stage in known}
    section.headline = _headline(view, rhos)
    section.add(
        paragraph(
            f"For each segmentation the network takes one step along its own direction, and the loss on the same {count(view.facts['n_data'])} examples is "
            f"measured at {len(LENGTHS)} step lengths. **Predicted** is the decrease that the quadratic model with F + λI promises at its best length; "
            f"**measured** is the largest decrease found. `{FULL}` is the exact natural gradient, `{GRADIENT}` the plain gradient, the direction of SGD.",
            f"The predicted order is said to hold from a rank correlation of {HELD:g} on, and in part from {PARTLY:g}.",
        ),
        view.picture(
            "one-step",
            "**Predicted and measured decrease of the loss**, one mark per direction. On the dashed line the quadratic model is exact. Marks that rise from left "
            "to right keep the predicted order, even away from the line.",
        ),
        bullets([_stage_sentence(view, found, stage, rhos[stage]) for stage in known]),
        _table(view, found),
        _damping_table(view, found),
        paragraph(_damping_sentence(view, found)),
        view.troubles("one-step check"),
    )
    return section


def _headline(view: View, rhos: dict[str, float]) -> str:
    groups: dict[str, list[str]] = {}
    for stage, rho in rhos.items():
        groups.setdefault(verdict(rho), []).append(f"{view.when(stage)} (rank correlation ρ = {num(rho, 2)})")
    if set(groups) == {"not known"}:
        return "The predicted order of the segmentations cannot be judged: the decreases do not differ, or could not be measured."
    said = [f"**{words}** {listing(stages)}" for words, stages in groups.items()]
    return f"The predicted order of the segmentations {listing(said, 'and')}."


def _stage_sentence(view: View, found: xr.Dataset, stage: str, rho: float) -> str:
    one = found.sel(stage=stage, damping_factor=1.0)
    promised, measured = (
        float(one.predicted_decrease.sel(direction=FULL)),
        float(one.measured_decrease.sel(direction=FULL)),
    )
    best = str(one.direction.values[int(one.measured_decrease.values.argmax())])
    when = view.when(stage).capitalize()
    if not promised > 0:
        return f"{when} the gradient is zero, so no step is predicted."
    text = f"{when} (loss {num(float(one.loss))} nat) the exact step promises {num(promised)} nat and gives {num(measured)}; the largest decrease measured is that of `{best}`."
    length = float(one.best_length.sel(direction=FULL))
    if measured * _FAR < promised:
        text += (
            f" The promise is far outside the range where the quadratic model holds: the best length is {num(length, 2)} of the promised one, and at the promised one "
            f"the loss {_moved(float(one.decrease_at_predicted_length.sel(direction=FULL)))}."
        )
    values = one.predicted_decrease.values
    spread = values.max() / values.min() if values.min() > 0 else np.inf
    if verdict(rho) != "held" and spread < _NARROW:
        return f"{text} The predictions lie within a factor of {num(spread)} of each other, so that their order says little."
    if verdict(rho) == "did not hold":
        text += " **The predicted order fails here.**"
    return text


def _moved(drop: float) -> str:
    if not np.isfinite(drop):
        return "is not finite"
    return f"rises by {num(-drop)} nat" if drop < 0 else f"falls by {num(drop)} nat"


def _table(view: View, found: xr.Dataset) -> str:
    known = view.known(found)
    part = found.sel(damping_factor=1.0)
    head = ["Direction"]
    for stage in known:
        head += [view.head(words, stage) for words in ("predicted", "measured", "length")]
    rows = []
    for name in [str(entry) for entry in part.direction.values]:
        row = [f"`{name}`"]
        for stage in known:
            one = part.sel(stage=stage, direction=name)
            row += [
                num(float(one.predicted_decrease)),
                num(float(one.measured_decrease)),
                f"{num(float(one.best_length), 2)} ×",
            ]
        rows.append(row)
    marked = [place for place, name in enumerate(part.direction.values) if name == SEGMENTS]
    return table(
        head,
        rows,
        "One step along each direction: predicted and measured decrease of the loss in nat, and the length of the measured one in multiples of the predicted.",
        strong=marked,
    )


def _damping_table(view: View, found: xr.Dataset) -> str:
    known = view.known(found)
    head = [
        "Damping",
        *(view.head("ρ", stage) for stage in known),
        *(view.head("measured/predicted", stage) for stage in known),
    ]
    rows = []
    for factor in found.damping_factor.values.tolist():
        row = ["λ" if factor == 1 else f"{plain(factor)} λ"]
        row += [num(step_correlation(found.sel(stage=stage), factor), 2) for stage in known]
        for stage in known:
            one = found.sel(stage=stage, damping_factor=factor, direction=FULL)
            row.append(
                f"{num(float(one.measured_decrease / one.predicted_decrease), 2)} ×"
                if float(one.predicted_decrease) > 0
                else "–"
            )
        rows.append(row)
    return table(
        head,
        rows,
        f"More damping, shorter steps: rank correlation ρ over {found.sizes['direction']} directions, and measured over predicted decrease of the exact step.",
    )


def _damping_sentence(view: View, found: xr.Dataset) -> str:
    said = []
    for stage in view.known(found):
        rhos = [step_correlation(found.sel(stage=stage), factor) for factor in found.damping_factor.values.tolist()]
        if verdict(rhos[0]) == "held" or not np.isfinite(rhos).all():
            continue
        best = int(np.argmax(rhos))
        factor = plain(float(found.damping_factor[best]))
        if verdict(rhos[best]) != verdict(rhos[0]):
            said.append(
                f"{view.when(stage)} a damping of {factor} λ keeps steps short enough for the order to hold ({verdict(rhos[best])}, ρ = {num(rhos[best], 2)})"
            )
        else:
            said.append(
                f"{view.when(stage)} more damping does not bring the predicted order back (best ρ = {num(rhos[best], 2)})"
            )
    return f"{listing(said)[0].upper()}{listing(said)[1:]}." if said else ""
