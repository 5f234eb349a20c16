"""The section on whether the analysis comes true."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fisherlens.report.elements import Section, paragraph, table
from fisherlens.report.sections.view import View
from fisherlens.report.verdicts import FAILS, HOLDS, UNDECIDED, rule, skipped, states
from fisherlens.report.words import count, listing, num

if TYPE_CHECKING:
    import xarray as xr

_TITLES = {
    "metric": "F as the metric of the outputs",
    "stability": "the largest stable learning rates",
    "one_step": "the gain of one step",
    "convergence": "the order in which segmentations converge",
    "independence": "where segmentations do no harm",
    "information": "what removing a unit does",
    "sharing": "how fast the curvature drifts",
}


def verification(view: View) -> Section:
    """The section on claims; there is none for a network that was not trained."""
    section = Section("verification", "Does it come true?", "Does what the analysis predicts happen?")
    found = view.node("verify")
    if found is None:
        section.headline = "The claims of the analysis were not checked."
        section.add(view.troubles("claims"))
        return section
    section.headline = _headline(found)
    section.add(
        paragraph(_setup(view, found)),
        view.picture(
            "verification",
            "**Claims of the analysis.** Each mark is how far what was measured lies from what was predicted, with its 95 % bounds over seeds (strokes); in the grey "
            "range the claim holds. Circles hold, crosses fail, diamonds are undecided.",
        ),
        _table(found),
        paragraph(_not_checked(found)),
        paragraph("All claims, those on stability and on training runs included: `fisherlens verify`, or `fl.verify`."),
        view.troubles("claims"),
    )
    return section


def _headline(found: xr.Dataset) -> str:
    words = states(found)
    names = found.claim.values.tolist()
    failed = [f"`{name}`" for name, word in zip(names, words, strict=True) if word == FAILS]
    undecided = [f"`{name}`" for name, word in zip(names, words, strict=True) if word == UNDECIDED]
    held = words.count(HOLDS)
    text = f"**{'All' if held == len(words) else count(held)} {'' if held == len(words) else 'of '}{count(len(words))} claims hold.**"
    text += f" {listing(failed)} {'fails' if len(failed) == 1 else 'fail'}." if failed else ""
    return text + (f" {listing(undecided)} {'is' if len(undecided) == 1 else 'are'} undecided." if undecided else "")


def _setup(view: View, found: xr.Dataset) -> str:
    checked = [
        _TITLES[name]
        for name in dict.fromkeys(str(label).split("/")[0] for label in found.claim.values)
        if name in _TITLES
    ]
    seeds = found.seed.values.tolist()
    return (
        f"Every quantity on this page makes a prediction. Here {listing(checked)} {'is' if len(checked) == 1 else 'are'} held against the network itself, on {count(found.attrs['n_data'])} "
        f"examples in {found.attrs['dtype']}, over {'seed' if len(seeds) == 1 else 'seeds'} {listing([str(seed) for seed in seeds])}, at parameters that some steps of Adam have led to. "
        "A claim that fails is a result: there the analysis does not describe what happens."
    )


def _table(found: xr.Dataset) -> str:
    rows, strong = [], []
    for place, (name, word) in enumerate(zip(found.claim.values.tolist(), states(found), strict=True)):
        one = found.isel(claim=place)
        unit = "" if str(one.unit.values) == "1" else str(one.unit.values)
        numbers = [f"{num(float(one[key]))} {unit}".strip() for key in ("predicted", "measured")]
        note = f" ({one.note.values})" if str(one.note.values) else ""
        rows.append(
            [
                f"`{name}`",
                f"{one.statement.values}{note}",
                *numbers,
                rule(str(one.relation.values), float(one.tolerance)),
                word,
            ]
        )
        if word == FAILS:
            strong.append(place)
    return table(
        ["Claim", "in words", "predicted", "measured", "rule", ""],
        rows,
        "Claims, means over seeds. The rule says how measured must lie to predicted.",
        words=2,
        strong=strong,
    )


def _not_checked(found: xr.Dataset) -> str:
    left = [f"`{name}`: {why}" for name, why in skipped(found).items()]
    return f"Not checked: {' '.join(left)}" if left else ""
