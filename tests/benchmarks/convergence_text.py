"""The figures of convergence.py as Markdown and as a picture."""

from __future__ import annotations

import statistics
from typing import Any

from harness import table

_WORDS = {
    "own": "steps to 90 % of its own final accuracy",
    "seconds_own": "seconds to 90 % of its own final accuracy",
    "train_loss": "final training loss",
    "test_error": "final test error",
}
_SIGN = {"train_loss": "≤", "test_loss": "≤", "test_accuracy": "≥"}
_UNIT = {"own": "", "seconds_own": " s", "train_loss": " nat", "test_error": ""}


def number(value: float | None, digits: int = 3) -> str:
    """Some significant figures, or "-"."""
    if value is None:
        return "-"
    return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"


def middle(values: list[float | None]) -> float | None:
    """The median where never is later than everything, None where that is the median."""
    found = statistics.median([float("inf") if value is None else value for value in values])
    return None if found == float("inf") else found


def range_of(values: list[float | None], digits: int = 3) -> str:
    """The median, and the lowest and highest of the seeds."""
    known = [value for value in values if value is not None]
    if not known:
        return "never"
    text = number(middle(values), digits) if middle(values) is not None else "never"
    if len(set(values)) > 1:
        high = "never" if len(known) < len(values) else number(max(known), digits)
        text += f" ({number(min(known), digits)} to {high})"
    return text


def rows_of(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table of one task: its head and a line per optimizer."""
    accurate = (
        found["shown"] == "test_accuracy"
    )  # that of an autoencoder says how many pixels are on the right side of grey
    goals = [f"{name.replace('_', ' ')} {_SIGN[name]} {value:g}" for name, value in found["targets"].items()]
    head = ["optimizer", "learning rate"]
    for goal in goals:
        head += [f"steps to {goal}", "seconds"]
    head += ["steps to 90 % of own", "seconds", "final test accuracy"] if accurate else ["final test loss"]
    head += ["final training loss", "ms per step"]
    lines = []
    for label, one in found["optimizers"].items():
        search = one["search"]
        cells = [label, f"{search['chosen']:.3g}{' (edge)' if search['at_edge'] else ''}"]
        for goal in found["targets"]:
            cells += [range_of(one["targets"][goal]["steps"]), number(middle(one["targets"][goal]["seconds"]))]
        if accurate:
            cells += [range_of(one["steps_to_own_accuracy"]), number(middle(one["seconds_to_own_accuracy"]))]
            cells.append(number(middle(one["test_accuracy"])))
        else:
            cells.append(number(middle(one["test_loss"])))
        lost = f", {one['diverged']} diverged" if one["diverged"] else ""
        cells += [number(middle(one["train_loss"])) + lost, number(1000 * one["seconds_per_step"])]
        lines.append(cells)
    return head, lines


def claims_of(found: dict[str, Any]) -> list[str]:
    """What the sources report, and what we find."""
    lines = []
    for claim in found["claims"]:
        unit = _UNIT[claim["measure"]]
        ours = [f"{number(value)}{unit}" if value is not None else "never" for value in claim["ours"]]
        count = f"{claim['seeds_below']} of {claim['seeds']} seeds"
        lines.append(
            f"- {claim['better']} below {claim['worse']} in {_WORDS[claim['measure']]}: published {claim['published']} ({claim['source']}); "
            f"here {ours[0]} against {ours[1]}, in {count}. **{claim['verdict'].capitalize()}.**"
        )
    return lines


def search_of(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The whole search of a task: final training loss at each learning rate."""
    count = found["rates"]
    head = ["optimizer", *[f"trial {place + 1}" for place in range(count)], "seconds"]
    lines = []
    for label, one in found["optimizers"].items():
        search = one["search"]
        cells = []
        for rate, score, lost in zip(search["rates"], search["scores"], search["diverged"], strict=True):
            text = f"{rate:.3g}: {'diverged' if lost else number(score)}"
            cells.append(f"**{text}**" if rate == search["chosen"] else text)
        lines.append([label, *cells, number(search["seconds"])])
    return head, lines


def _size(found: dict[str, Any]) -> str:
    return (
        f"{found['description']} {found['num_steps']} steps of {found['batch']} ({found['epochs']:.3g} epochs), measured every "
        f"{found['record_every']}; {found['rates']} learning rates tried each, {found['seeds']} seeds reported, {found['threads']} "
        f"thread{'s' if found['threads'] > 1 else ''} a run, {found['wall_seconds']:.0f} s for all."
    )


def short(name: str, found: dict[str, Any]) -> str:
    """For the terminal, after each task."""
    return "\n".join([f"{name}: {found['title']}", _size(found), table(*rows_of(found)), *claims_of(found)])


def markdown(payload: dict[str, Any], picture: str | None = None) -> str:
    """The section of the documentation."""
    size = {"cpu": "a part of the data", "quick": "a few steps (`--quick`)", "full": "all data", "smoke": "smoke"}[
        payload["size"]
    ]
    text = [
        "## Optimizers to fixed targets",
        "",
        f"From `tests/benchmarks/convergence.py`, {size}; {payload['machine']}; {payload['workers']} runs at a time.",
        "",
    ]
    if picture:
        caption = "Medians over seeds at the learning rate of the search, and steps to the target, a dot per seed; crosses did not reach it."
        text += [f"![{caption}](_static/{picture})", "", f"*{caption}*", ""]
    text += [
        "Every optimizer of a task tries equally many learning rates, √10 apart, for as many steps as are reported, on one seed that is not; the lowest final training loss "
        "decides. Dampings are fixed: two rates of one method can differ more than two methods. MBF runs without its warm start, a pass over the data before the first step that no other "
        "method has. Numbers are medians over seeds, lowest and highest in brackets. Steps to 90 % "
        "of a run's own final accuracy favour runs that end low. A claim of a source agrees where it holds on every seed, and is not decided where seeds differ. Where a rate is at the edge of "
        "what was tried, a better one may lie beyond. Our runs are shorter than the published ones, so that their ends are lower and 90 % of them come sooner.",
    ]
    if payload["size"] in ("quick", "smoke"):
        text += ["", "**These runs are so short that they bear on no paper: they show that the benchmark runs.**"]
    for found in payload["tasks"].values():
        text += ["", f"### {found['title']}", "", _size(found), *([found["about"]] if found["about"] else []), ""]
        text += [
            table(*rows_of(found)),
            "",
            *claims_of(found),
            "",
            "The search, final training loss in nat at each learning rate:",
            "",
        ]
        text.append(table(*search_of(found)))
    return "\n".join(text)


def draw(payload: dict[str, Any], path: str) -> None:
    """Curves of each task at the left, steps to the first target at the right."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    colors = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D", "#882255"]
    tasks = payload["tasks"]
    figure, grid = plt.subplots(len(tasks), 2, figsize=(12, 3.7 * len(tasks)), layout="constrained", squeeze=False)
    for (left, right), found in zip(grid, tasks.values(), strict=True):
        names = list(found["optimizers"])
        rising = found["shown"] == "test_accuracy"
        for color, (label, one) in zip(colors, found["optimizers"].items(), strict=False):
            curve = [
                (s, v)
                for s, v in zip(one["curves"]["step"], one["curves"][found["shown"]], strict=True)
                if v is not None
            ]
            left.plot(*zip(*curve, strict=True), color=color, label=label, linewidth=1.6)
        left.set_xlabel("optimizer steps")
        left.set_ylabel("test accuracy" if rising else "training loss [nat]")
        start = max(one["curves"][found["shown"]][0] for one in found["optimizers"].values())
        if not rising:
            left.set_ylim(top=1.05 * start)
        left.set_title(found["title"], loc="left", fontsize=10)
        left.legend(fontsize=7.5, framealpha=0.85, edgecolor="none")
        goal, value = next(iter(found["targets"].items()))
        left.axhline(value, color="#8A8A8A", linewidth=0.9, linestyle=(0, (3, 2)))
        end = found["num_steps"]
        for row, (color, one) in enumerate(zip(colors, found["optimizers"].values(), strict=False)):
            steps = one["targets"][goal]["steps"]
            there = [step for step in steps if step is not None]
            right.plot(there, [row] * len(there), "o", color=color, alpha=0.75)
            if len(there) < len(steps):
                right.plot([1.08 * end], [row], "x", color=color, markeredgewidth=2)
        right.axvline(1.03 * end, color="#8A8A8A", linewidth=0.8, linestyle=(0, (2, 2)))
        right.set_xlim(0, 1.13 * end)
        right.set_ylim(len(names) - 0.5, -0.5)
        right.set_yticks(range(len(names)), names)
        right.set_xlabel("optimizer steps to the target (right of the line: not reached)")
        right.set_title(f"{goal.replace('_', ' ')} {_SIGN[goal]} {value:g}", loc="left", fontsize=10)
        for ax in (left, right):
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(True, axis="both" if ax is left else "x", color="#E4E4E4")
            ax.set_axisbelow(True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
