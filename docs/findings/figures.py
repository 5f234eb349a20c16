"""The figures of the page, one file each."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from cuts import CONTIGUOUS, NEIGHBOURS, RANDOM, SCATTERED, SHIFTED
from gather import Network, mean_sem
from pairs import RELATIONS

BLUE, RED, GREEN, PINK, ORANGE, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D"
STAGE_WORDS = {"init": "before training", "epoch": "after one epoch", "end": "at the end"}
KIND_WORDS = {"exact": "exact Fisher", "batch": "empirical, one batch", "averaged": "empirical, several batches"}
SHORT = [
    "layer", "unit", "input", "cw-ngd", SHIFTED, RANDOM.format("cw-ngd"), "mbf", "diagonal",
]  # fmt: skip
LONG = [
    "unit", CONTIGUOUS.format("unit"), RANDOM.format("unit"),
    "input", CONTIGUOUS.format("input"), RANDOM.format("input"),
    "cw-ngd", SHIFTED, RANDOM.format("cw-ngd"), NEIGHBOURS, SCATTERED, "diagonal",
]  # fmt: skip


def shade(cut: str) -> str:
    """Colour of a cut: rules blue, what fills their sizes otherwise orange, random grey."""
    return GREY if cut.endswith("random") else RED if "," in cut else BLUE


def _tidy(ax, grid: str) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=grid, color="#E4E4E4", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=9)


def _save(figure, path: Path) -> str:
    # without software and date, so that the same results give the same file
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return path.name


def step(networks: list[Network], path: Path) -> str:
    """Decrease ratio of the whole network by cut, per kind of Fisher and damping, at the end."""
    figure, axes = plt.subplots(
        len(networks),
        2,
        figsize=(10, 3.6 * len(networks) + 0.5),
        squeeze=False,
        sharey=True,
        sharex=True,
        layout="constrained",
    )
    for row, network in zip(axes, networks, strict=True):
        for column, ax in enumerate(row):
            for place, (kind, color, mark) in enumerate(zip(KIND_WORDS, (BLUE, ORANGE, GREEN), "os^", strict=True)):
                if not network.has(kind):
                    continue
                found = [
                    mean_sem(network.value("decrease_ratio", c, stage=network.last, kind=kind, damping=column))
                    for c in SHORT
                ]
                y = np.arange(len(SHORT)) + 0.22 * (place - 1)
                ax.errorbar(
                    [m for m, _ in found], y, xerr=[np.nan_to_num(e) for _, e in found], fmt=mark, color=color,
                    markersize=5, linewidth=1.2, label=KIND_WORDS[kind],
                )  # fmt: skip
            ax.set_yticks(range(len(SHORT)), SHORT)
            ax.set_xlim(0, 1.02)
            words = ("1e-7, as released", "0.01 λ_max")[column]
            ax.set_title(f"{network.plan['title']}, λ = {words}", loc="left", fontsize=10)
            _tidy(ax, "both")
    axes[0, 0].invert_yaxis()  # which all share
    for ax in axes[-1]:
        ax.set_xlabel("decrease ratio: share of the best step's decrease", fontsize=10)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=10
    )
    return _save(figure, path)


def energy(networks: list[Network], path: Path) -> str:
    """Energy captured per layer by rules and their controls, with the level of chance."""
    columns = 4
    rows = [(n, n.layers[at : at + columns]) for n in networks for at in range(0, len(n.layers), columns)]
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(13, 3.9 * len(rows)), squeeze=False, sharey=True, sharex=True, layout="constrained"
    )
    for panels, (network, layers) in zip(axes, rows, strict=True):
        for ax in panels[len(layers) :]:
            ax.set_visible(False)
        for ax, layer in zip(panels, layers, strict=False):
            for place, cut in enumerate(LONG):
                value, error = mean_sem(network.value("energy_captured", cut, layer=layer, stage=network.last))
                floor = mean_sem(network.value("energy_noise_floor", cut, layer=layer, stage=network.last))[0]
                ax.barh(place, value, height=0.62, color=shade(cut), alpha=0.85)
                ax.errorbar(value, place, xerr=np.nan_to_num(error), color="black", linewidth=1)
                ax.plot([floor, floor], [place - 0.42, place + 0.42], color="black", linewidth=1.6)
            ax.set_yticks(range(len(LONG)), LONG)
            ax.set_xlim(0, 1.02)
            ax.set_title(f"{network.plan['title']}: {layer}", loc="left", fontsize=9.5)
            _tidy(ax, "x")
    axes[0, 0].invert_yaxis()  # which all share
    figure.supxlabel(
        "share of the layer's ‖F‖² inside the blocks; black line: expected of random blocks of these sizes", fontsize=10
    )
    return _save(figure, path)


def coupling(networks: list[Network], path: Path) -> str:
    """Squared coupling between segments by where they lie, over training, with the noise floor."""
    rows = [(network, layer) for network in networks for layer in network.segmented]
    columns = min(3, max(1, len(rows)))
    lines = -(-len(rows) // columns)
    figure, axes = plt.subplots(
        max(1, lines), columns, figsize=(4.6 * columns, 3.6 * max(1, lines) + 0.6), squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(rows) :]:
        ax.set_visible(False)
    for ax, (network, layer) in zip(axes.flat, rows, strict=False):
        for relation, color, mark in zip(RELATIONS[:4], (RED, ORANGE, BLUE, GREY), "os^D", strict=True):
            found = [mean_sem(network.coupling("squared_coupling", relation, [layer], s)) for s in network.stages]
            floor = [mean_sem(network.coupling("squared_floor", relation, [layer], s))[0] for s in network.stages]
            x = np.arange(len(found))
            ax.errorbar(
                x,
                [m for m, _ in found],
                yerr=[np.nan_to_num(e) for _, e in found],
                color=color,
                marker=mark,
                label=relation,
            )
            ax.plot(x, floor, color=color, linestyle=":", linewidth=1)
        ax.set_xticks(x, [STAGE_WORDS[s] for s in network.stages])
        ax.set_yscale("log")
        ax.set_ylabel("mean ρ² of two segments")
        ax.set_title(f"{network.plan['title']}: {layer}", loc="left", fontsize=10)
        _tidy(ax, "y")
    if rows:
        figure.legend(
            *axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=9.5
        )
    return _save(figure, path)


def training(networks: list[Network], path: Path) -> str:
    """Energy and decrease ratio of the whole network along training."""
    variables = (("energy_captured", "energy captured"), ("decrease_ratio", "decrease ratio, λ = 0.01 λ_max"))
    figure, axes = plt.subplots(
        len(networks), 2, figsize=(10, 3.3 * len(networks) + 0.6), squeeze=False, layout="constrained"
    )
    cuts = [("layer", GREY, "o"), ("unit", BLUE, "s"), ("input", SKY, "v"), ("cw-ngd", RED, "^"), ("mbf", PINK, "P"),
            (RANDOM.format("cw-ngd"), ORANGE, "D"), ("diagonal", GREEN, "X")]  # fmt: skip
    for row, network in zip(axes, networks, strict=True):
        for ax, (variable, words) in zip(row, variables, strict=True):
            x = np.arange(len(network.stages))
            for cut, color, mark in cuts:
                found = [mean_sem(network.value(variable, cut, stage=stage)) for stage in network.stages]
                ax.errorbar(
                    x,
                    [m for m, _ in found],
                    yerr=[np.nan_to_num(e) for _, e in found],
                    color=color,
                    marker=mark,
                    label=cut,
                )
            ax.set_xticks(x, [STAGE_WORDS[s] for s in network.stages])
            ax.set_ylabel(words)
            ax.set_ylim(0, None)
            ax.set_title(network.plan["title"], loc="left", fontsize=10)
            _tidy(ax, "y")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=7, frameon=False, fontsize=9.5
    )
    return _save(figure, path)


def width(networks: list[Network], path: Path) -> str:
    """What width does to energy, decrease ratio and coupling, before and after training."""
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.7), layout="constrained")
    for stage, color, mark in (("init", ORANGE, "s"), ("end", BLUE, "o")):
        own = [n for n in networks if stage in n.stages]
        x = [n.plan["width"] for n in own]

        def draw(ax, found, label, style="-", x=x, color=color, mark=mark):
            ax.errorbar(x, [m for m, _ in found], yerr=[np.nan_to_num(e) for _, e in found], color=color, marker=mark,
                        linestyle=style, label=label)  # fmt: skip

        draw(
            axes[0],
            [mean_sem(n.value("energy_captured", "cw-ngd", stage=stage)) for n in own],
            f"cw-ngd, {STAGE_WORDS[stage]}",
        )
        draw(axes[0], [mean_sem(n.value("energy_captured", RANDOM.format("cw-ngd"), stage=stage)) for n in own],
             f"random, {STAGE_WORDS[stage]}", ":")  # fmt: skip
        draw(axes[1], [mean_sem(n.value("decrease_ratio", "cw-ngd", stage=stage)) for n in own], STAGE_WORDS[stage])
        draw(
            axes[2],
            [mean_sem(n.coupling("squared_coupling", RELATIONS[0], n.segmented, stage)) for n in own],
            "coupling, " + STAGE_WORDS[stage],
        )
        draw(
            axes[2],
            [mean_sem(n.coupling("squared_floor", RELATIONS[0], n.segmented, stage)) for n in own],
            "floor, " + STAGE_WORDS[stage],
            ":",
        )
    axes[2].set_yscale("log")
    titles = ("energy captured", "decrease ratio of cw-ngd, λ = 0.01 λ_max", "mean ρ², neighbouring segments of a unit")
    for ax, title in zip(axes, titles, strict=True):
        ax.set_xscale("log", base=2)
        ax.set_xticks([n.plan["width"] for n in networks], [f"{n.plan['width']:g}" for n in networks])
        ax.set_xlabel("width, relative")
        ax.set_title(title, loc="left", fontsize=10)
        ax.legend(frameon=False, fontsize=8.5)
        _tidy(ax, "y")
    return _save(figure, path)
