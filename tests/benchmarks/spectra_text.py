"""The figures of spectra.py as Markdown and as a picture."""

from __future__ import annotations

from typing import Any

from harness import table

TITLES = {"mlp": "MLP 784-1000-500-10", "lenet": "LeNet, 28×28", "conv6": "conv-6, 32×32"}
_ERRORS = {
    "complete spectrum": "largest error / λ₁",
    "top 10": "largest error / λ₁",
    "trace to 1 %": "relative error",
    "density": "Wasserstein distance / mean eigenvalue",
}


def number(value: float | None) -> str:
    """Three figures, or "-"."""
    if value is None or value != value:
        return "-"
    if value == 0 or 0.01 <= abs(value) < 100:
        return f"{value:.3g}"
    return f"{value:.0f}" if 100 <= abs(value) < 1e5 else f"{value:.1e}"


def _marked(row: dict[str, Any], value: float | None) -> str:
    sign = "> " if row.get("bound") else "≈ " if row["extrapolated"] else ""
    return sign + number(value)


def rows_of(found: dict[str, Any]) -> list[list[str]]:
    """One line per contestant."""
    lines, before = [], None
    for row in found["rows"]:
        notes = [row.get("note", ""), row.get("favour", "")]
        if "sem" in row:
            notes.append(f"standard error {100 * row['sem']:.2g} %")
        first = row["what"] if row["what"] != before else ""
        before = row["what"]
        lines.append(
            [
                first,
                row["contestant"],
                _marked(row, row["gradients"]),
                _marked(row, row["seconds"]),
                _marked(row, row.get("products")),
                number(row.get("error")),
                "; ".join(note for note in notes if note),
            ]
        )
    return lines


HEAD = ["what", "contestant", "gradients", "seconds", "products", "error", "notes"]


def ratio(found: dict[str, Any], what: str) -> float | None:
    """How many times faster our first way is than the fastest peer's."""
    rows = [row for row in found["rows"] if row["what"] == what]
    ours = [row["gradients"] for row in rows if row["contestant"].startswith("fisherlens")]
    theirs = [row["gradients"] for row in rows if "Lanczos" in row["contestant"] or "eigsh" in row["contestant"]]
    theirs = theirs or [row["gradients"] for row in rows if not row["contestant"].startswith("fisherlens")]
    return min(theirs) / ours[0] if ours and theirs else None


def _goals(found: dict[str, Any]) -> list[str]:
    """What design.md asks for, and what was reached."""
    lines = []
    complete = next(row["gradients"] for row in found["rows"] if row["what"] == "complete spectrum")
    goal = found["goals"]["complete"]
    lines.append(f"complete spectrum: {number(complete)} gradients" + (f", goal ≤ {goal}" if goal else ""))
    lines.append(f"all eigenvalues against the peer's top 10: {number(ratio(found, 'top 10'))} times faster")
    goal = found["goals"]["density"]
    lines.append(f"density: {number(ratio(found, 'density'))} times faster" + (f", goal ≥ {goal}" if goal else ""))
    if "large" in found:
        goal = found["goals"]["large"]
        times = ratio(found["large"], "density, large")
        lines.append(
            f"density at N = {found['large']['n']}: {number(times)} times faster" + (f", goal ≥ {goal}" if goal else "")
        )
    return lines


def _title(name: str, found: dict[str, Any]) -> str:
    return (
        f"{TITLES.get(name, name)}: N = {found['n']}, P = {found['params']:,}, order of the Gram matrix {found['order']}, "
        f"one gradient {1e3 * found['gradient_seconds']:.3g} ms"
    )


def short(name: str, found: dict[str, Any]) -> str:
    """For the terminal, after each network."""
    large = rows_of(found["large"]) if "large" in found else []
    return "\n".join([_title(name, found), table(HEAD, rows_of(found) + large), *_goals(found)])


def markdown(payload: dict[str, Any]) -> str:
    """The section of the documentation."""
    settings = payload["settings"]
    text = [
        "## Spectra",
        "",
        f"Times in gradient evaluations on the same data; {payload['machine']}. Ours include the capture. Errors are against the complete spectrum in "
        f"float64: of eigenvalues relative to the largest, of the trace relative, of a density the Wasserstein distance in units of the mean eigenvalue. "
        f"`eigsh` and `top_eigenvalues` run with tol = {settings['tol']:g}; the power iteration stops, in its favour, as soon as it is within "
        f"{payload['accuracy']:g} λ₁ of the truth. ≈ marks times extrapolated from a run cut at {settings['seconds']:g} s, > lower bounds.",
    ]
    for name, found in payload["networks"].items():
        large = rows_of(found["large"]) if "large" in found else []
        text += ["", f"### {_title(name, found)}", "", table(HEAD, rows_of(found) + large), ""]
        text += [f"- {line}" for line in _goals(found)]
    return "\n".join(text)


def draw(payload: dict[str, Any], path: str) -> None:
    """Time against error, one panel per quantity, one marker per network; filled markers are ours."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    quantities = ["top 10", "trace to 1 %", "density"]
    colors = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), layout="constrained")
    marks = ["o", "s", "^", "D"]
    for ax, what in zip(axes, quantities, strict=True):
        names: list[str] = []
        for network, mark in zip(payload["networks"], marks, strict=False):
            rows = [row for row in payload["networks"][network]["rows"] if row["what"] == what]
            for row, color in zip(rows, colors, strict=False):
                name = row["contestant"]
                label = None if name in names else name
                names.append(name)
                error = max(row.get("error") or 0.0, 1e-9)
                fill = color if name.startswith("fisherlens") else "white"
                style = {"marker": mark, "markersize": 8, "markerfacecolor": fill, "markeredgecolor": color}
                ax.plot([row["gradients"]], [error], linestyle="none", label=label, **style)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("time [gradient evaluations]")
        ax.set_ylabel(_ERRORS[what])
        ax.set_title(what, loc="left", fontsize=10)
        ax.grid(True, color="#E4E4E4")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    shown = ", ".join(f"{mark} {name}" for name, mark in zip(payload["networks"], ["●", "■", "▲", "◆"], strict=False))
    figure.suptitle(f"{shown}; filled: fisherlens", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)
