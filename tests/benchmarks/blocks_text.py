"""The figures of blocks.py as Markdown."""

from __future__ import annotations

from typing import Any

from harness import table

TITLES = {"mlp": "MLP 784-1000-500-10", "lenet": "LeNet, 28×28", "conv6": "conv-6, 32×32"}
_WORDS = {
    "capture": "capture of the scores",
    "couplings": "all layer couplings, Grams given",
    "table": "complete table of independence, Grams included",
}


def number(value: float | None) -> str:
    """Three figures, or "-"."""
    if value is None or value != value:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def rows_of(name: str, found: dict[str, Any], goals: dict[str, dict[str, float]]) -> list[list[str]]:
    """One line per quantity."""
    rows = []
    for what, words in _WORDS.items():
        if what not in found:
            continue
        row, goal = found[what], goals.get(what, {}).get(name)
        note = []
        if "error" in row:
            note.append(f"{row['layers']} layers, largest error {row['error']:.0e}")
        if "condition_error" in row:
            note.append(f"condition numbers to {100 * row['condition_error']:.2g} %")
        if row.get("left_out"):
            note.append(f"{row['left_out']} entries over the memory budget")
        shown = [
            number(row["gradients"]),
            f"{number(row['low'])} to {number(row['high'])}",
            f"≤ {number(goal)}" if goal else "-",
        ]
        rows.append([TITLES.get(name, name), words, *shown, number(row["seconds"]), "; ".join(note)])
        for scheme, part in row.get("parts", {}).items():
            one = [number(part["gradients"]), "one round", "-", number(part["seconds"]), ""]
            rows.append([TITLES.get(name, name), f"'{scheme}' alone, Grams given", *one])
    return rows


HEAD = ["network", "what", "gradients", "range", "goal", "seconds", "notes"]


def short(name: str, found: dict[str, Any], goals: dict[str, dict[str, float]]) -> str:
    """The table of one network."""
    return table(HEAD, rows_of(name, found, goals))


def markdown(payload: dict[str, Any]) -> str:
    """The section of docs/benchmarks.md."""
    goals, networks = payload["goals"], payload["networks"]
    rows = [row for name, found in networks.items() for row in rows_of(name, found, goals)]
    settings = payload["settings"]
    parts = [
        "## Blocks and their independence",
        f"Measured on: {payload['machine']}. N = {settings['n']}, `memory={settings['memory']!r}`.",
        "Times are in gradient evaluations on the same data, medians, with the range over the rounds. The couplings are "
        '`fl.coupling(F, "layer", num_null=0)`. The table is `fl.independence(F)`: five segmentations, every layer and the whole network, condition '
        "numbers to 1 %; the lines after it are each segmentation alone, with what several share in each of them. Goals are those set for the package before it was written.",
        table(HEAD, rows),
    ]
    return "\n\n".join(parts)
