"""The key numbers at the top of the page, each as it stands in the results."""

from __future__ import annotations

import html
from dataclasses import dataclass

from fisherlens.report.findings import verdict
from fisherlens.report.sections.view import View
from fisherlens.report.words import count, listing, num, share


@dataclass(frozen=True)
class Card:
    """One number: which variable of ``key_numbers`` it is, at which stage if it has one, and how it is shown."""

    key: str
    stage: str | None
    label: str
    shown: str
    remark: str
    section: str


def cards(view: View) -> list[Card]:
    """The cards of a report; a number that is missing has none."""
    if view.key is None:
        return []
    last = view.last
    rank = view.node("spectrum")
    possible = f"of {count(rank.sizes['rank'])} that can be non-zero" if rank is not None else ""
    rows = [
        ("trace", last, "Information, tr F", lambda v: f"{num(v)} nat", _before(view, "trace", num), "information"),
        (
            "top_eigenvalue",
            last,
            "Largest eigenvalue",
            lambda v: f"{num(v)} nat",
            _before(view, "top_eigenvalue", num),
            "spectrum",
        ),
        (
            "effective_dimension",
            last,
            "Effective dimension",
            num,
            f"of {count(view.facts['n_params'])} parameters",
            "information",
        ),
        ("carry_90", last, "Eigenvalues that carry 90 %", count, possible, "spectrum"),
        (
            "strongest_coupling",
            last,
            "Strongest coupling of layers",
            num,
            f"noise floor {num(view.number('strongest_floor', last), 2)}",
            "coupling",
        ),
        ("decrease_cwngd", last, "CW-NGD's segments keep", share, _kept(view, last), "segmentations"),
        (
            "one_step_correlation",
            last,
            "One step: predicted order",
            lambda v: f"ρ = {num(v, 2)}",
            _steps(view),
            "steps",
        ),
        (
            "training_correlation",
            None,
            "Training: predicted order",
            lambda v: f"ρ = {num(v, 2)}",
            _trained(view),
            "training",
        ),
    ]
    found = []
    for key, stage, label, shape, remark, section in rows:
        value = view.number(key, stage)
        if value == value:
            found.append(Card(key, stage, label, shape(value), remark, section))
    return found


def _before(view: View, key: str, shape: object) -> str:
    earlier = [f"{num(view.number(key, stage))} {view.when(stage)}" for stage in view.stages[:-1]]
    return listing(earlier) if earlier else ""


def _kept(view: View, last: str) -> str:
    rest = [(name, view.number(f"decrease_{name}", last)) for name in ("layer", "unit", "diagonal")]
    shown = ", ".join(f"{name} {share(value)}" for name, value in rest if value == value)
    return f"of a natural step's decrease ({shown})"


def _steps(view: View) -> str:
    rest = [f"{num(view.number('one_step_correlation', stage), 2)} {view.when(stage)}" for stage in view.stages[:-1]]
    words = verdict(view.number("one_step_correlation", view.last)) + (f" {view.when(view.last)}" if rest else "")
    return f"{words}; {listing(rest)}" if rest else words


def _trained(view: View) -> str:
    return f"{verdict(view.number('training_correlation'))}, over segmentations"


def render(found: list[Card], view: View) -> str:
    """The cards as HTML; ``data-value`` holds the number as it is in ``key_numbers``."""
    if not found:
        return ""
    pieces = []
    for card in found:
        value = view.number(card.key, card.stage)
        stage = f' data-stage="{html.escape(card.stage)}"' if card.stage else ""
        pieces.append(
            f'<a class="card" href="#{card.section}" data-key="{card.key}"{stage} data-value="{value!r}">'
            f'<span class="label">{html.escape(card.label)}</span><span class="value">{html.escape(card.shown)}</span>'
            f'<span class="remark">{html.escape(card.remark)}</span></a>'
        )
    return f'<div class="cards">{"".join(pieces)}</div>'
