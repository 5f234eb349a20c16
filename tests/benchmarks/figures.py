"""The figures of docs/benchmarks.md, drawn from the JSON of products.py and scaling.py; imports no torch."""

from __future__ import annotations

import math
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.lines import Line2D
from names import OURS, STREAMED

mpl.use("Agg")

import matplotlib.pyplot as plt

# Okabe and Ito's palette, as in the package's own plots.
BLUE, ORANGE, GREEN, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#8A8A8A", "#333333"
NAMES = {
    "mlp": "MLP",
    "lenet": "LeNet",
    "conv6": "conv-6",
    "resnet18": "ResNet-18",
    "transformer": "Transformer",
    "conv": "convolutional network",
}


def _tidy(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.tick_params(which="both", color=GREY, labelcolor=INK, labelsize=9)
    ax.set_axisbelow(True)


def _plain(value: float, _: Any = None) -> str:
    """A tick of a log axis without powers of ten."""
    return f"{value:g}"


def _log_axis(ax: Any, values: list[float]) -> None:
    """Log x axis around the values, with fewer ticks in each decade where the range is wide."""
    ax.set_xscale("log")
    low, high = min(values) / 1.5, max(values) * 1.5
    ax.set_xlim(low, high)
    decades = math.log10(high / low)
    steps = (1, 2, 5) if decades < 1.3 else (1, 3) if decades < 2.2 else (1,)
    ax.set_xticks([s * 10.0**d for d in range(-4, 7) for s in steps if low <= s * 10.0**d <= high])
    ax.xaxis.set_major_formatter(_plain)
    ax.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    ax.grid(axis="x", color="#E4E4E4", linewidth=0.8)


def _contestants(payload: dict[str, Any]) -> list[str]:
    """Those that multiply with the Fisher, or with the Hessian, somewhere; in the order of the tables."""
    found: dict[str, None] = {}
    for network in payload["networks"].values():
        found |= dict.fromkeys(name for name, one in network["contestants"].items() if one.get("columns"))
    return sorted(found, key=list(found).index)


def draw_products(payload: dict[str, Any], path: str) -> None:
    """Time per vector and peak memory of every contestant, a panel per network; log axes, so dots and no bars."""
    networks, contestants = payload["networks"], _contestants(payload)
    places = {name: -i for i, name in enumerate(contestants)}
    with_peaks = any(one.get("peaks") for network in networks.values() for one in network["contestants"].values())
    rows = 2 if with_peaks else 1
    height = 0.34 * len(contestants) + 0.9
    figure, axes = plt.subplots(
        rows,
        len(networks),
        figsize=(2.6 + 2.25 * len(networks), rows * height + 0.5),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for column, (name, network) in enumerate(networks.items()):
        _time_panel(axes[0, column], network, places)
        axes[0, column].set_title(NAMES.get(name, name), fontsize=11, color=INK)
        if with_peaks:
            _memory_panel(axes[1, column], network, places)
    for row in axes:
        row[0].set_yticks(list(places.values()), _labels(payload, contestants))
        row[0].set_ylim(min(places.values()) - 0.6, 0.6)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=4, frameon=False, fontsize=9.5)
    row_titles = ["Gradient evaluations per vector", "Peak memory beyond a gradient's, MiB"]
    for row, title in zip(axes, row_titles, strict=False):
        centre = 0.5 if len(networks) % 2 else 1.03  # of the panel left of the middle, or of the gap beside it
        row[(len(networks) - 1) // 2].set_xlabel(title, x=centre, fontsize=10.5, color=INK)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _labels(payload: dict[str, Any], contestants: list[str]) -> list[str]:
    """Contestants under the names they go by, with what else they multiply with."""
    labels = []
    for name in contestants:
        ones = [
            network["contestants"][name] for network in payload["networks"].values() if name in network["contestants"]
        ]
        shown = next((one["name"] for one in ones if "name" in one), name)
        hessian = any(one.get("matrix") == "Hessian" for one in ones) and "Hessian" not in shown.replace(
            "PyHessian", ""
        )
        labels.append(f"{shown} (Hessian)" if hessian else shown)
    return labels


def _legend() -> list[Line2D]:
    dot = {"linestyle": "none", "markersize": 7}
    return [
        Line2D([], [], marker="o", color=BLUE, label="single product", **dot),
        Line2D([], [], marker="s", color=ORANGE, label="in a block of 16", **dot),
        Line2D([], [], marker="|", color=INK, markeredgewidth=2, label="goal, in its colour", **dot),
        Line2D([], [], color=GREY, linewidth=1, label="one gradient evaluation"),
    ]


def _band(ax: Any, places: dict[str, int]) -> None:
    """A quiet ground under our rows."""
    for name, y in places.items():
        if name.startswith(OURS):
            ax.axhspan(y - 0.5, y + 0.5, color="#F1F5F9", zorder=0, linewidth=0)


def _time_panel(ax: Any, network: dict[str, Any], places: dict[str, int]) -> None:
    values = [1.0]
    _band(ax, places)
    ax.axvline(1, color=GREY, linewidth=1, zorder=1)
    for name, y in places.items():
        columns = network["contestants"].get(name, {}).get("columns", {})
        if not columns:
            ax.annotate("–", (0.5, y), xycoords=("axes fraction", "data"), ha="center", va="center", color=GREY)
        for k, marker, color, shift in (("1", "o", BLUE, 0.13), ("16", "s", ORANGE, -0.13)):
            if k in columns:
                one = columns[k]
                scale = one["per_vector"] / one["ratio"]
                ax.plot(
                    [one["ratio_low"] * scale, one["ratio_high"] * scale], [y + shift] * 2, color=color, linewidth=1.5
                )
                ax.plot(one["per_vector"], y + shift, marker, color=color, markersize=6.5, zorder=3)
                values.append(one["per_vector"])
    goals = network.get("goals") or {}
    for key, name, color, shift in (
        ("single", OURS, BLUE, 0.13),
        ("block", OURS, ORANGE, -0.13),
        ("streamed", STREAMED, BLUE, 0.13),
    ):
        if key in goals and name in places:
            ax.plot(goals[key], places[name] + shift, "|", color=color, markersize=12, markeredgewidth=2, zorder=2)
            values.append(goals[key])
    _tidy(ax)
    _log_axis(ax, values)


def _memory_panel(ax: Any, network: dict[str, Any], places: dict[str, int]) -> None:
    values = []
    _band(ax, places)
    for name, y in places.items():
        peaks = network["contestants"].get(name, {}).get("peaks", {})
        for k, marker, color, shift in (("1", "o", BLUE, 0.13), ("16", "s", ORANGE, -0.13)):
            size = peaks.get(k, {}).get("peak")
            if size is not None and size > 0:
                ax.plot(size / 2**20, y + shift, marker, color=color, markersize=6.5, zorder=3)
                values.append(size / 2**20)
    _tidy(ax)
    _log_axis(ax, values or [1.0])


def draw_scaling(payload: dict[str, Any], path: str) -> None:
    """Seconds against each size, log-log: a row per network, a panel per variable, with a guide of slope 1."""
    titles = {"N": "examples N", "P": "parameters P", "C": "classes C", "K": "vectors in a block K"}
    styles = {
        "single": (BLUE, "o", "single product"),
        "streamed": (GREEN, "^", "single product, streamed"),
        "capture": (GREY, "D", "capture"),
        "block": (ORANGE, "s", "product with K vectors"),
    }
    families = payload["networks"]
    figure, axes = plt.subplots(
        len(families), 4, figsize=(12.5, 0.6 + 3.0 * len(families)), layout="constrained", squeeze=False
    )
    for row, (family, variables) in zip(axes, families.items(), strict=True):
        for ax, (variable, title) in zip(row, titles.items(), strict=True):
            for quantity, one in variables[variable].items():
                color, marker, _ = styles[quantity]
                sizes, milliseconds = np.array(one["sizes"], float), 1e3 * np.array(one["seconds"])
                ax.plot(sizes, milliseconds, color=color, marker=marker, markersize=4.5, linewidth=1.4)
                _guide(ax, sizes, milliseconds, color)
                ax.annotate(
                    f"{one['slope']:.2f}",
                    (sizes[-1], milliseconds[-1]),
                    xytext=(6, 0),
                    textcoords="offset points",
                    color=color,
                    fontsize=9.5,
                    va="center",
                )
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.margins(x=0.14)
            ax.grid(color="#EEEEEE", linewidth=0.8)
            _few_ticks(ax, variable, variables[variable])
            ax.set_xlabel(title, fontsize=10.5, color=INK)
            _tidy(ax)
        row[0].set_ylabel(f"{NAMES.get(family, family)}\nmilliseconds", fontsize=10.5, color=INK)
    handles = [
        Line2D([], [], color=color, marker=marker, markersize=5, label=label)
        for color, marker, label in styles.values()
    ]
    handles.append(
        Line2D([], [], color=GREY, linestyle=(0, (4, 3)), linewidth=1, label="slope 1; numbers: fitted slopes")
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9.5)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _few_ticks(ax: Any, variable: str, quantities: dict[str, Any]) -> None:
    """Sizes that were measured on the x axis, powers of ten on the y axis, in plain numbers."""
    sizes = next(iter(quantities.values()))["sizes"]
    if variable == "P":
        ax.xaxis.set_major_formatter(lambda v, _: f"{v / 1e6:g}M" if v >= 1e6 else f"{v / 1e3:g}k")
    else:
        ax.set_xticks(sizes[:: 2 if len(sizes) > 5 else 1], minor=False)
        ax.xaxis.set_major_formatter(_plain)
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,)))
    ax.yaxis.set_major_formatter(_plain)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_locator(mpl.ticker.NullLocator())


def _guide(ax: Any, sizes: Any, values: Any, color: str) -> None:
    """Linear growth at the level of the upper half of the range, in which the slope is fitted."""
    start = math.sqrt(sizes[0] * sizes[-1])
    upper = sizes >= start * 0.999
    level = np.exp(np.mean(np.log(values[upper] / sizes[upper])))
    ends = np.array([start, sizes[-1]])
    ax.plot(ends, level * ends, color=color, linestyle=(0, (4, 3)), linewidth=1, alpha=0.7, zorder=1)
