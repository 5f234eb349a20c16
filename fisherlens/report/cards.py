"""The key numbers at the top of the page, each as it stands in the results."""

from __future__ import annotations

import html
from collections.abc import Callable
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
    found = []
    for key, label, shape, remark, section in _ROWS:
        stage = view.latest(key)
        value = view.number(key, stage)
        if value == value:
            words = [] if stage in (None, view.last) else [view.when(stage)]
            words += [remark(view, stage)] if remark(view, stage) else []
            found.append(Card(key, stage, label, shape(value), "; ".join(words), section))
    return found


def _nats(value: float) -> str:
    return f"{num(value)} nat"


def _rho(value: float) -> str:
    return f"ρ = {num(value, 2)}"


def _earlier(view: View, key: str, stage: str | None, digits: int = 3) -> str:
    """The same number at the stages before."""
    before = view.stages[: view.stages.index(stage)] if stage in view.stages else []
    values = [(view.number(key, name), name) for name in before]
    return (
        listing([f"{num(value, digits)} {view.when(name)}" for value, name in values if value == value])
        if before
        else ""
    )


def _possible(view: View, _: str | None) -> str:
    spectrum = view.node("spectrum")
    return f"of {count(spectrum.sizes['rank'])} that can be non-zero" if spectrum is not None else ""


def _kept(view: View, stage: str | None) -> str:
    rest = [(name, view.number(f"decrease_{name}", stage)) for name in ("layer", "unit", "diagonal")]
    shown = ", ".join(f"{name} {share(value)}" for name, value in rest if value == value)
    return f"of a natural step's decrease ({shown})"


def _steps(view: View, stage: str | None) -> str:
    before = _earlier(view, "one_step_correlation", stage, 2)
    words = verdict(view.number("one_step_correlation", stage))
    return f"{words} {view.when(stage)}; {before}" if before else words


_ROWS: tuple[tuple[str, str, Callable[[float], str], Callable[[View, str | None], str], str], ...] = (
    ("trace", "Information, tr F", _nats, lambda view, stage: _earlier(view, "trace", stage), "information"),
    ("top_eigenvalue", "Largest eigenvalue", _nats, lambda v, s: _earlier(v, "top_eigenvalue", s), "spectrum"),
    (
        "effective_dimension",
        "Effective dimension",
        num,
        lambda v, _: f"of {count(v.facts['n_params'])} parameters",
        "information",
    ),
    ("carry_90", "Eigenvalues that carry 90 %", count, _possible, "spectrum"),
    (
        "strongest_coupling",
        "Strongest coupling of layers",
        num,
        lambda view, stage: f"noise floor {num(view.number('strongest_floor', stage), 2)}",
        "coupling",
    ),
    ("decrease_cwngd", "CW-NGD's segments keep", share, _kept, "segmentations"),
    ("one_step_correlation", "One step: predicted order", _rho, _steps, "steps"),
    (
        "training_correlation",
        "Training: predicted order",
        _rho,
        lambda view, _: f"{verdict(view.number('training_correlation'))}, over segmentations",
        "training",
    ),
)


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
