"""What ``fl.verify`` found, for the command line: a table in text, and a picture."""

from __future__ import annotations

import io
import json
import textwrap
from typing import TYPE_CHECKING

from fisherlens import plots
from fisherlens.report.words import num, plain

if TYPE_CHECKING:
    import xarray as xr

HOLDS, FAILS, UNDECIDED = "holds", "FAILS", "undecided"


def states(found: xr.Dataset) -> list[str]:
    """What became of each claim, in one word."""
    pairs = zip(found.holds.values.tolist(), found.decided.values.tolist(), strict=True)
    return [HOLDS if holds else FAILS if decided else UNDECIDED for holds, decided in pairs]


def rule(relation: str, tolerance: float) -> str:
    """How measured must lie to predicted for a claim to hold.

    Examples
    --------
    >>> rule("equal", 0.1), rule("at least", 0.0), rule("order", 0.7)
    ('= within 10 %', '≥', 'order, ρ ≥ 0.7')
    """
    if relation == "order":
        return f"order, ρ ≥ {plain(tolerance)}"
    sign = {"equal": "=", "at least": "≥", "at most": "≤"}[relation]
    return f"{sign} within {plain(100 * tolerance)} %" if tolerance else sign


def table(found: xr.Dataset) -> str:
    """One line per claim, then how many hold, and the notes."""
    head = ("claim", "predicted", "measured", "", "rule", "")
    rows = [head]
    words = states(found)
    for place, name in enumerate(found.claim.values.tolist()):
        one = found.isel(claim=place)
        numbers = [_with_error(float(one[key]), float(one[f"{key}_sem"])) for key in ("predicted", "measured")]
        unit = "" if str(one.unit.values) == "1" else str(one.unit.values)
        rows.append((name, *numbers, unit, rule(str(one.relation.values), float(one.tolerance)), words[place]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if 1 <= k <= 2 else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    seeds = found.sizes["seed"]
    over = f"means over {seeds} seeds ± standard error" if seeds > 1 else "one seed"
    return "\n".join([f"{found.attrs['problem']}, {over}:", "", *lines, "", _count(words), *_notes(found)])


def _with_error(value: float, error: float) -> str:
    return f"{num(value)} ± {num(error, 1)}" if error > 1e-9 * abs(value) else num(value)  # less is rounding


def _count(words: list[str]) -> str:
    failed, undecided = words.count(FAILS), words.count(UNDECIDED)
    text = f"{words.count(HOLDS)} of {len(words)} claims hold"
    text += f", {failed} fail{'s' if failed == 1 else ''}" if failed else ""
    return text + (f", {undecided} {'is' if undecided == 1 else 'are'} undecided" if undecided else "") + "."


def _notes(found: xr.Dataset) -> list[str]:
    """The notes of the claims, those that many share once."""
    shared: dict[str, list[str]] = {}
    for name, note in zip(found.claim.values.tolist(), found.note.values.tolist(), strict=True):
        if note:
            shared.setdefault(note, []).append(name)
    lines = []
    for note, names in shared.items():
        who = ", ".join(names) if len(names) <= 4 else f"{len(names)} claims"
        lines += textwrap.wrap(f"{who}: {note}", 110, subsequent_indent="  ")
    return ["", *lines] if lines else []


def skipped(found: xr.Dataset) -> dict[str, str]:
    """Claims that were not checked, with the reason."""
    return dict(json.loads(found.attrs.get("skipped", "{}")))


def picture(found: xr.Dataset) -> bytes:
    """One row per claim, as PNG."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(10.0, 1.5 + 0.3 * found.sizes["claim"]), layout="constrained")
    plots.verification(found, canvas.subplots())
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
