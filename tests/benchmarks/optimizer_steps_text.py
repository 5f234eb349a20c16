"""The figures of optimizer_steps.py as Markdown and as a picture."""

from __future__ import annotations

from typing import Any

from harness import table

TITLES = {
    "lenet": "LeNet, 28×28",
    "conv6": "conv-6, 32×32",
    "autoencoder": "autoencoder 784-1000-500-250-30 and back",
    "vgg16": "VGG-16, 32×32",
    "resnet18": "ResNet-18, 32×32",
}
PEERS = ("singd", "ASDL")
HEAD = ["method", "periods", "step / SGD-m", "quartiles", "goal", "plain", "statistics", "inverses", "peak / SGD-m"]
HEAD += ["peak, MiB", "kept, MiB"]


def number(value: float | None) -> str:
    """Three figures, or "-"."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def megabytes(value: float | None) -> str:
    """MiB, or "-"."""
    return "-" if value is None else f"{value / 2**20:,.1f}"


def periods(rate: list[int]) -> str:
    """``refresh/inverse_refresh``, one number where they are the same."""
    refresh, inverses = rate
    return "-" if not refresh else str(refresh) if refresh == inverses else f"{refresh}/{inverses}"


def _goal(value: float | None) -> str:
    return "-" if value is None else f"≤ {number(value)}"


def rows_of(run: dict[str, Any]) -> list[list[str]]:
    """A line for each method and each of its periods; what belongs to the method stands on its first."""
    rows = []
    for name, found in run["methods"].items():
        if "rates" not in found:
            rows.append([name, *["-"] * (len(HEAD) - 1)])
            continue
        kinds = [number(found["kinds"].get(kind, {}).get("ratio")) for kind in ("plain", "statistics", "inverses")]
        memory = [number(found.get("peak_ratio")), megabytes(found.get("peak")), megabytes(found.get("kept"))]
        for k, row in enumerate(found["rates"]):
            shown = [number(row["ratio"]), f"{number(row['low'])} to {number(row['high'])}", _goal(row["goal"])]
            own = [*kinds, *memory] if k == 0 else [""] * 6
            rows.append([name if k == 0 else "", periods(row["rate"]), *shown, *own])
    return rows


def notes(run: dict[str, Any]) -> list[str]:
    """What was left out, and what did not go smoothly."""
    lines = []
    for name, found in run["methods"].items():
        if "note" in found:
            lines.append(f"{name}: {found['note']}.")
        if "peak_note" in found:
            lines.append(f"{name}, peak: {found['peak_note']}.")
        if found.get("events"):
            steps = sum(one["steps"] for one in found["kinds"].values())
            events = ", ".join(f"{count} {what}" for what, count in found["events"].items())
            lines.append(f"{name}: {events} in about {steps} steps.")
    return lines


def title(run: dict[str, Any]) -> str:
    """Network, batch and the unit."""
    peak = f", its peak {megabytes(run['sgd_peak'])} MiB" if run["sgd_peak"] else ""
    return (
        f"{TITLES.get(run['network'], run['network'])}, batch {run['batch']}: P = {run['params']:,}; "
        f"a step of SGD with momentum takes {run['sgd_seconds'] * 1e3:.1f} ms{peak}"
    )


def short(run: dict[str, Any]) -> str:
    """For the terminal, after each network."""
    return "\n".join([title(run), table(HEAD, rows_of(run)), *notes(run)])


def summary(payload: dict[str, Any]) -> str:
    """Goals beside what was reached."""
    rows = []
    for run in payload["runs"]:
        for name, found in run["methods"].items():
            for row in found.get("rates", []):
                if row["goal"] is not None:
                    at = f"{TITLES.get(run['network'], run['network'])}, batch {run['batch']}"
                    reached = "yes" if row["ratio"] <= row["goal"] else "no"
                    rows.append([at, name, periods(row["rate"]), number(row["ratio"]), _goal(row["goal"]), reached])
    return table(["network", "method", "periods", "step / SGD-m", "goal", "reached"], rows) if rows else ""


def markdown(payload: dict[str, Any]) -> str:
    """The section of docs/benchmarks.md."""
    settings = payload["settings"]
    parts = [
        f"## Steps of the optimizers, on {'a GPU' if settings['device'].startswith('cuda') else 'a CPU'}",
        f"Measured on: {payload['machine']}. At most {settings['rounds']} rounds and about {settings['budget']:g} s per method, at least 3 rounds.",
        "Time of a whole step (forward, backward and `opt.step()`) over that of the same step with `torch.optim.SGD` and momentum, timed at most a "
        "second before. *Periods* are those of the statistics and of the inverses, roots or bases, in steps; *plain*, *statistics* and *inverses* are steps "
        "that take neither, the first, or both, and the amortised figure weights their medians as in a period of that length. Methods are as they come, with the "
        "labels, paths and clipping of their defaults. KFAC 1/5 has the periods of kfac-jax, 20/100 those of TENGraD's baselines; bases of EKFAC and of ProjectedKFAC "
        "every 50 steps and roots of Shampoo every 20 are our choice. singd's default is 10, and its statistics are of the observed labels. "
        "Goals are those set for the package before it was written, for batch 128; that of ProjectedKFAC is KFAC's figure with the same period of statistics.",
        "Peaks are beyond the network, a copy of its parameters and the data, with activations and gradients, over the first steps in a fresh process on one thread. "
        "*Kept* is the size of all tensors in `opt.state_dict()`. A dash: not measured, not told, or not applicable.",
        summary(payload),
    ]
    for run in payload["runs"]:
        parts += [f"### {title(run)}", table(HEAD, rows_of(run))]
        if found := notes(run):
            parts.append("Notes: " + " ".join(found))
    return "\n\n".join(part for part in parts if part)


def _points(run: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Method and figures by the label of a line of the picture."""
    return {
        f"{name} ({periods(row['rate'])})".removesuffix(" (-)"): (name, row)
        for name, found in run["methods"].items()
        for row in found.get("rates", [])
    }


def draw(payload: dict[str, Any], path: str) -> None:
    """Amortised time of each method, a panel per network; a colour per batch size, hollow where it is a peer's, a bar for the goal."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from figures import GREY, INK, ORANGE, _log_axis, _tidy

    colors = ["#0072B2", "#009E73", "#CC79A7", "#E69F00"]
    networks = list(dict.fromkeys(run["network"] for run in payload["runs"]))
    labels = list(dict.fromkeys(label for run in payload["runs"] for label in _points(run)))[::-1]
    figure, axes = plt.subplots(
        1,
        len(networks),
        figsize=(3.2 + 3.6 * len(networks), 1.4 + 0.27 * len(labels)),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for ax, network in zip(axes[0], networks, strict=True):
        runs = [run for run in payload["runs"] if run["network"] == network]
        values = [1.0]
        for run, color in zip(runs, colors, strict=False):
            for label, (name, row) in _points(run).items():
                at = labels.index(label) - 0.22 * (runs.index(run) - (len(runs) - 1) / 2)
                values += [row["low"], row["high"]]
                fill = "white" if name.startswith(PEERS) else color
                ax.plot([row["low"], row["high"]], [at, at], color=color, linewidth=1.5)
                ax.plot(row["ratio"], at, "o", color=color, markerfacecolor=fill, markersize=6)
                if row["goal"] is not None:
                    ax.plot(row["goal"], at, "|", color=ORANGE, markersize=11, markeredgewidth=2)
            ax.plot([], [], "o", color=color, label=f"batch {run['batch']}")
        ax.axvline(1.0, color=GREY, linewidth=1)
        if any(
            row["goal"] is not None for run in runs for one in run["methods"].values() for row in one.get("rates", [])
        ):
            ax.plot([], [], "|", color=ORANGE, markersize=11, markeredgewidth=2, label="goal, batch 128")
        _tidy(ax)
        _log_axis(ax, values)
        ax.set_yticks(range(len(labels)), labels)
        ax.grid(axis="y", color="#F0F0F0", linewidth=0.8)
        ax.set_xlabel("step / step of SGD with momentum", color=INK, fontsize=9)
        ax.set_title(TITLES.get(network, network), loc="left", color=INK, fontsize=10, wrap=True)
        ax.legend(
            fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.06 - 0.9 / len(labels)), ncols=3
        )
    figure.savefig(path, dpi=120)
    plt.close(figure)
