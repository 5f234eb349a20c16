"""The page: one HTML file that holds everything it shows."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from fisherlens.report import cards
from fisherlens.report.elements import Figure, Section, note, paragraph, text
from fisherlens.report.sections import ANSWERS, made, words_used
from fisherlens.report.sections.view import View
from fisherlens.report.style import STYLE
from fisherlens.report.words import count, listing

if TYPE_CHECKING:
    import xarray as xr

_STATUS = {
    "interrupted": "**This report is incomplete.** It was interrupted ({reason}). What was finished before is shown; the rest is missing.",
    "failed": "**This report is incomplete.** It ended with an error ({reason}). What was finished before is shown; the rest is missing.",
}
_OF_PROBLEMS = ("training", "verification")  # sections on what only a problem has


def page(tree: xr.DataTree, pictures: Mapping[str, Figure]) -> str:
    """Write the page of a report from its results and figures; it loads nothing from anywhere."""
    view = View(tree, pictures)
    with np.errstate(all="ignore"):  # a ratio of zeros is shown as a dash
        answers = [build(view) for build in ANSWERS if view.trained or build.__name__ not in _OF_PROBLEMS]
    rest = [made(view), words_used()]
    title = f"Fisher report: {view.facts['subject']}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<div class="frame">{_contents(answers, rest)}<main>{_head(view)}{_short(view, answers)}'
        f"{''.join(_section(section, number) for number, section in enumerate(answers, start=1))}"
        f"{''.join(_section(section, None) for section in rest)}</main></div></body></html>\n"
    )


def _head(view: View) -> str:
    facts = view.facts
    about = [
        f"{count(facts['n_params'])} parameters" if "n_params" in facts else "",
        f"F on {count(facts['n_data'])} examples" if "n_data" in facts else "",
    ]
    about += [f"{facts['kind']} Fisher, {facts['likelihood']} likelihood", str(facts["created_at"])[:10]]
    status = _STATUS.get(str(facts.get("status", "")), "")
    return (
        f'<header><p class="kicker">Fisher report</p><h1>{html.escape(str(facts["subject"]))}</h1>'
        f"{paragraph(str(facts['description']), kind='lead')}"
        f'<p class="about">{" · ".join(html.escape(piece) for piece in about if piece)}</p>'
        f"{note(status.format(reason=facts.get('status_reason', '')), 'warning') if status else ''}"
        f"{cards.render(cards.cards(view), view)}{_stages(view)}</header>"
    )


def _stages(view: View) -> str:
    if not view.stages:
        return ""
    if not view.trained:
        return '<p class="under">Numbers are of the network as it stands. Each leads to its section.</p>'
    where = (
        f"Numbers without a stage are {view.when(view.last)} of the run {html.escape(str(view.facts['analysed_run']))}"
    )
    steps = view.node("fisher")
    taken = (
        listing([f"{stage} is step {count(float(steps.step.sel(stage=stage)))}" for stage in view.stages])
        if "step" in steps.coords
        else ""
    )
    return f'<p class="under">{where}; {html.escape(taken)}. Each leads to its section.</p>'


def _short(view: View, answers: list[Section]) -> str:
    items = [
        f'<li><a href="#{section.key}">{text(section.question)}</a><br>{text(section.headline)}</li>'
        for section in answers
        if section.headline
    ]
    return f'<section id="short"><h2>In short</h2><ol class="short">{"".join(items)}</ol></section>'


def _section(section: Section, number: int | None) -> str:
    kicker = f'<span class="number">{number}</span>' if number is not None else ""
    question = f'<p class="question">{text(section.question)}</p>'
    headline = paragraph(section.headline, kind="headline") if section.headline else ""
    return f'<section id="{section.key}"><h2>{kicker}{text(section.title)}</h2>{question}{headline}{"".join(section.body)}</section>'


def _contents(answers: list[Section], rest: list[Section]) -> str:
    links = ['<li><a href="#short">In short</a></li>']
    links += [
        f'<li><a href="#{section.key}"><span class="number">{n}</span>{text(section.title)}</a></li>'
        for n, section in enumerate(answers, start=1)
    ]
    links += [f'<li><a href="#{section.key}">{text(section.title)}</a></li>' for section in rest]
    return f'<nav aria-label="Contents"><p class="kicker">Contents</p><ul>{"".join(links)}</ul></nav>'
