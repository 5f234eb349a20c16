"""Pictures that only the report needs, in the look of :mod:`fisherlens.plots`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fisherlens.plots import _common as common
from fisherlens.report.relations import RELATIONS

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

MakeCanvas = Callable[..., "Canvas"]


def cumulative(spectrum: xr.Dataset, ax: Axes) -> None:
    """Share of the trace that the largest eigenvalues carry, over how many they are, one curve per stage."""
    stages = [str(name) for name in spectrum.stage.values]
    for stage, shade in zip(stages, common.colors(len(stages), ordered=len(stages) > 1), strict=True):
        values = spectrum.eigenvalue.sel(stage=stage).values
        values = np.clip(values[np.isfinite(values)], 0, None)
        if values.sum() > 0:
            ax.plot(
                np.arange(1, len(values) + 1), np.cumsum(values) / values.sum(), color=shade, linewidth=1.7, label=stage
            )
    ax.axhline(0.9, color=common.FAINT, linewidth=1.0, linestyle=(0, (4, 2)), label="90 %")
    ax.set_xscale("log")
    ax.set_ylim(0, 1.03)
    ax.set_xlabel("number of largest eigenvalues")
    ax.set_ylabel("share of the trace that they carry")
    common.tidy(ax)
    common.legend(ax, loc="lower right")


def relations(found: xr.Dataset, canvas: MakeCanvas, stage: str) -> Canvas:
    """Median coupling of segments and the range of 80 % of the pairs, by layer and relation, with the median noise floor."""
    rows = []
    for layer in [str(name) for name in found.layer.values]:
        present = [kind for kind in RELATIONS if int(found.pairs.sel(layer=layer, relation=kind)) > 0]
        rows += [(layer, kind) for kind in present[1:] or present]
    figure = canvas(1.1 + 0.3 * len(rows))
    ax = figure.subplots()
    shades = dict(zip(RELATIONS[1:], common.PALETTE, strict=False))
    for place, (layer, relation) in enumerate(rows):
        one = found.sel(layer=layer, relation=relation)
        shade = shades.get(relation, common.PALETTE[0])
        ax.plot(
            [one.coupling_low, one.coupling_high],
            [place, place],
            color=shade,
            linewidth=5,
            alpha=0.35,
            solid_capstyle="butt",
        )
        ax.plot(one.coupling, place, marker="o", color=shade, markersize=6)
        ax.plot([one.noise_floor] * 2, [place - 0.36, place + 0.36], color=common.INK, linewidth=1.6)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(0, 1)
    ax.set_yticks(range(len(rows)), [f"{layer} · {relation}" for layer, relation in rows], fontsize=9)
    for place in range(1, len(rows)):
        if rows[place][0] != rows[place - 1][0]:
            ax.axhline(place - 0.5, color=common.GRID, linewidth=1.0)
    ax.set_xlabel("coupling of two segments" + (f", {stage}" if stage else ""))
    common.tidy(ax, grid="x")
    from matplotlib.lines import Line2D

    keys = [
        Line2D([], [], color=common.INK, marker="o", linestyle="none", label="median pair"),
        Line2D([], [], color=common.INK, linewidth=5, alpha=0.35, label="80 % of the pairs"),
        Line2D(
            [],
            [],
            color=common.INK,
            marker="|",
            markersize=11,
            markeredgewidth=1.6,
            linestyle="none",
            label="median noise floor",
        ),
    ]
    figure.legend(handles=keys, loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    return figure


def one_step(found: xr.Dataset, canvas: MakeCanvas) -> Canvas:
    """Measured over predicted decrease of the loss for one step along every direction, a panel per stage."""
    stages = [str(name) for name in found.stage.values]
    names = [str(name) for name in found.direction.values]
    figure = canvas(3.85 if len(stages) > 1 else 5.0, 10.0 if len(stages) > 1 else 5.2)
    axes = np.atleast_1d(figure.subplots(1, len(stages)))
    part = found.sel(damping_factor=1.0)
    for ax, stage in zip(axes, stages, strict=True):
        one = part.sel(stage=stage)
        for place, name in enumerate(names):
            x, y = float(one.predicted_decrease.sel(direction=name)), float(one.measured_decrease.sel(direction=name))
            if x > 0 and y > 0:
                look = {"marker": common.MARKERS[place % len(common.MARKERS)], "color": _shade(place, len(names))}
                ax.plot(x, y, linestyle="none", markersize=8, label=name, **look)
        values = np.concatenate([one.predicted_decrease.values, one.measured_decrease.values])
        values = values[values > 0]
        if values.size:
            ends = np.array([values.min() / 1.6, values.max() * 1.6])
            ax.plot(
                ends, ends, color=common.FAINT, linewidth=1.0, linestyle=(0, (4, 2)), label="as predicted", zorder=1
            )
            ax.set_xlim(ends)
            ax.set_ylim(ends)
        ax.set_xscale("log")
        ax.set_yscale("log")
        for axis in (ax.xaxis, ax.yaxis):
            _few_ticks(axis, values)
        ax.set_box_aspect(1)
        ax.set_title(stage if len(stages) > 1 else "", fontsize=10, loc="left")
        ax.set_xlabel("predicted decrease [nat]")
        common.tidy(ax)
    axes[0].set_ylabel("measured decrease of the loss [nat]")
    keys: dict[str, Any] = {}
    for ax in axes:
        handles, texts = ax.get_legend_handles_labels()
        keys |= dict(zip(texts, handles, strict=True))
    figure.legend(
        keys.values(),
        keys.keys(),
        loc="outside upper left",
        ncols=5 if len(stages) > 1 else 3,
        frameon=False,
        fontsize=9,
    )
    return figure


def _few_ticks(axis: Any, values: np.ndarray) -> None:
    """Plain numbers at 1, 2 and 5 where a logarithmic axis spans little, powers of ten where it spans much."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if values.size and values.max() < 40 * values.min():
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.set_minor_formatter(NullFormatter())


def _shade(place: int, total: int) -> Any:
    """The full Fisher in ink and the gradient in grey; segmentations as in the other figures."""
    if place == 0:
        return common.INK
    return common.FAINT if place == total - 1 else common.PALETTE[(place - 1) % len(common.PALETTE)]


def segment_speed(
    ax: Axes, names: Sequence[str], kept: np.ndarray, loss: np.ndarray, *, shades: Mapping[str, Any]
) -> None:
    """How fast CW-NGD trains on the blocks of a segmentation, over what those blocks keep of the natural step."""
    for place, (name, x, y) in enumerate(zip(names, kept, loss, strict=True)):
        if np.isfinite(x) and np.isfinite(y):
            marker = common.MARKERS[place % len(common.MARKERS)]
            ax.plot(x, y, linestyle="none", marker=marker, markersize=8, color=shades[name], label=name)
    ax.set_yscale("log")
    ax.set_xlabel(
        common.wrap("predicted: share of the natural step's decrease that the blocks keep, mean over stages", 4.4)
    )
    ax.set_ylabel(common.wrap("measured: training loss, geometric mean over the run [nat]", 3.6))
    common.tidy(ax)
    common.legend(ax, loc="best")
