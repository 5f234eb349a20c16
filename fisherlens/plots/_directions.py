"""Stiff and sloppy directions: how much the data say along each, and in which layers each lives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fisherlens.errors import InputError
from fisherlens.plots import _common as common

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

PANELS = ("eigenvalue", "layer_share")
_SOURCE = "fl.directions"
_MISSING_AXES = "plot.directions draws into the Axes of every panel or of none; axes lacks {missing!r}. Pass a dict panel -> Axes for {panels}, or choose panels=."
_NOTHING = "plot.directions found no direction above the noise floor. F is the zero matrix there: no prediction depends on any parameter, or a side was selected away."
_GAP = 0.8  # columns between the two sides


def directions(
    dataset: xr.Dataset,
    axes: Mapping[str, Axes] | None = None,
    *,
    panels: Sequence[str] = PANELS,
    show_damping: bool = True,
    annotate: bool | None = None,
    legend: bool = True,
) -> dict[str, Axes]:
    """Draw the eigenvalue of each direction, and below it the share of each layer.

    Ranks count from 1, the largest eigenvalue; a gap parts the stiff from the sloppy side. Full points are identifiable (above noise and damping), open
    ones are not; squares belong to a group of eigenvalues too close to be told apart, whose single directions are arbitrary: only sums over the group mean
    something.

    Parameters
    ----------
    dataset
        What :func:`fisherlens.directions` returns.
    axes
        Panel → Axes to draw on; None for those of a new figure.
    panels
        ``"eigenvalue"``, ``"layer_share"``, or both.
    show_damping
        Draw the damping, where it is near the values.
    annotate
        Write the shares in the cells, in per cent from 1 % on; None for "if there is room".
    legend
        Explain the points.

    Returns
    -------
    Panel → Axes.

    Raises
    ------
    InputError: unknown panels, Axes missing, or a Dataset without the variables or without any direction. TypeError: not a Dataset.

    Examples
    --------
    >>> import xarray as xr
    >>> ds = xr.Dataset({"layer_share": (("rank", "layer"), [[0.9, 0.1]])}, {"rank": [0], "layer": ["0", "2"]})
    >>> list(directions(ds, panels=["layer_share"]))
    ['layer_share']
    """
    panels = [common.choose("panel", panel, PANELS) for panel in panels]
    reads = {"caller": "directions", "source": _SOURCE}
    values = common.read(dataset, "eigenvalue", needs=("rank",), **reads) if "eigenvalue" in panels else None
    shares = common.read(dataset, "layer_share", needs=("rank", "layer"), **reads) if "layer_share" in panels else None
    first = values if values is not None else shares
    if first is None or not first.sizes["rank"]:
        raise InputError(_NOTHING)
    places, names = _columns(first)
    if axes is None:
        axes = _new_axes(panels, len(places), shares.sizes["layer"] if shares is not None else 0)
    missing = common.lacking(axes, panels)
    if missing:
        raise InputError(_MISSING_AXES.format(missing=missing[0], panels=panels))
    chosen = {panel: axes[panel] for panel in panels}
    for ax in chosen.values():
        ax.set_xlim(places[0] - 0.6, places[-1] + 0.6)
    if shares is not None:
        _map(chosen["layer_share"], shares, places, annotate, list(chosen.values()))
    if values is not None:
        _scree(dataset, chosen["eigenvalue"], values, places, show_damping, legend)
    for panel, ax in chosen.items():
        common.name_ticks(ax, "x", places, names)
        if panel == panels[-1]:
            ax.set_xlabel("rank (1 = stiffest)")
        else:
            ax.tick_params(axis="x", labelbottom=False)
    return chosen


def _columns(array: xr.DataArray) -> tuple[list[float], list[str]]:
    """Where each direction stands, with a gap where ranks are left out, and its rank counted from 1."""
    ranks = array["rank"].values.astype(int)
    sides = array["side"].values.tolist() if "side" in array.coords else [""] * len(ranks)
    places, at = [], 0.0
    for k, rank in enumerate(ranks):
        if k and (rank != ranks[k - 1] + 1 or sides[k] != sides[k - 1]):
            at += _GAP
        places.append(at)
        at += 1
    return places, [str(rank + 1) for rank in ranks]


def _new_axes(panels: Sequence[str], columns: int, layers: int) -> dict[str, Axes]:
    import matplotlib.pyplot as plt

    heights = [2.3 if panel == "eigenvalue" else float(np.clip(0.34 * layers, 1.0, 5.0)) for panel in panels]
    width = float(np.clip(0.36 * columns + 2.6, 5.0, 9.5))
    size = (width, sum(heights) + 1.0)
    axes = plt.subplots(len(panels), 1, figsize=size, height_ratios=heights, squeeze=False, layout="constrained")[1]
    return dict(zip(panels, axes[:, 0], strict=True))


def _flag(dataset: xr.Dataset, name: str, otherwise: bool, count: int) -> np.ndarray:
    if name not in dataset or dataset[name].dims != ("rank",):
        return np.full(count, otherwise)
    return dataset[name].values.astype(bool)


def _scree(
    dataset: xr.Dataset, ax: Axes, array: xr.DataArray, places: list[float], damping: bool, legend: bool
) -> None:
    from matplotlib.lines import Line2D

    x, y = np.array(places), array.values.astype(float)
    sure = _flag(dataset, "identifiable", True, len(y))
    close = _flag(dataset, "degenerate", False, len(y))
    tone, kinds = common.PALETTE[0], []
    for flag, marker, words in ((~close, "o", ""), (close, "s", ", in a group too close to tell apart")):
        for good, face, more in ((sure, tone, "identifiable"), (~sure, "white", "below damping or noise")):
            here = flag & good & (y > 0)
            if here.any():
                style: dict[str, Any] = {"marker": marker, "linestyle": "none", "color": tone, "markerfacecolor": face}
                ax.plot(x[here], y[here], markersize=5.5, **style)
                kinds.append(Line2D([], [], markersize=5.5, label=more + words, **style))
    ax.set_yscale("log")
    levels = [("damping λ", dataset.attrs.get("damping"), common.PALETTE[1])]
    if "noise_floor" in dataset and dataset["noise_floor"].ndim == 0:
        levels.append(("noise floor", float(dataset["noise_floor"]), common.FAINT))
    low, high = y[y > 0].min(initial=np.inf), y.max(initial=0.0)
    for words, level, color in levels if damping else ():
        if level is None or not level > 0:
            continue
        if low / 1e2 <= level <= 1e2 * high:
            kinds.append(ax.axhline(level, color=color, linewidth=1.2, linestyle=(0, (4, 2)), zorder=1, label=words))
        else:
            kinds.append(Line2D([], [], linestyle="none", label=f"{words} = {level:.1g}, off the axis"))
    ax.set_ylabel(common.wrap(common.label(array), common.span(ax, "y")))
    common.tidy(ax, grid="y")
    if legend:
        common.legend_above(ax, kinds)


def _map(ax: Axes, array: xr.DataArray, places: list[float], annotate: bool | None, around: list[Axes]) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    shades, values = colormaps["YlGnBu"], array.values.astype(float)
    top = np.nanmax(values, initial=0.0)
    high = 1.0 if top > 0.5 else max(float(top), 1e-3)  # of many layers each has a small share
    layers = common.entries(array, "layer")
    ax.set_ylim(len(layers) - 0.5, -0.5)  # the first layer on top, as a network is read
    room = common.span(ax, "x") / (places[-1] - places[0] + 1.2), common.span(ax, "y") / len(layers)
    size = float(min(9.0, 72 * room[0] / 1.9, 72 * room[1] / 1.3))
    write = size >= 6 if annotate is None else annotate
    for column, place in enumerate(places):
        for row, value in enumerate(values[column]):
            tone = shades(np.clip(value / high, 0.0, 1.0)) if np.isfinite(value) else common.GRID
            ax.add_patch(Rectangle((place - 0.5, row - 0.5), 1, 1, facecolor=tone, edgecolor="white", linewidth=0.6))
            if write and value >= 0.01:
                ink = "white" if value > 0.6 * high else common.INK
                ax.text(place, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=max(size, 5.5), color=ink)
    common.tidy(ax, grid=None)
    ax.spines[:].set_visible(False)
    common.name_ticks(ax, "y", range(len(layers)), layers)
    ax.set_ylabel("layer")
    bar = ax.figure.colorbar(ScalarMappable(Normalize(0, high), shades), ax=around, fraction=0.035, pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    bar.set_label(common.label(array) + (", in per cent in the cells" if write else ""), color=common.INK)
    bar.ax.tick_params(labelsize=common.TICK_SIZE, color=common.FAINT, labelcolor=common.INK)
