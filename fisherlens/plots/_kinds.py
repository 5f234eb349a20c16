"""Kinds of Fisher side by side: spectra, distances, overlaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fisherlens import errors
from fisherlens.errors import InputError
from fisherlens.plots import _common as common

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

PANELS = ("spectrum", "distance", "overlap")
_SOURCE = "fl.compare_kinds"
_PAIR = ("kind_i", "kind_j")
_TITLES = {
    "distance": r"distance $\|F_i - F_j\|\,/\,\|F_i\|$",
    "scaled_distance": "distance after the best scaling",
    "overlap": "overlap of leading spaces",
    "cosine": "cosine",
    "natural_gradient_cosine": "cosine of natural gradients",
}
_UNBOUNDED = ("distance",)
_MISSING_AXES = "plot.kinds draws into the Axes of every panel or of none; axes lacks {missing!r}. Pass a dict panel -> Axes for {panels}, or choose panels=."


def kinds(
    dataset: xr.Dataset,
    axes: Mapping[str, Axes] | None = None,
    *,
    panels: Sequence[str] = PANELS,
    layer: str | None = None,
    show_noise: bool = True,
    legend: bool = True,
) -> dict[str, Axes]:
    """Draw spectra side by side, and a matrix for each quantity of pairs.

    The small print in a cell says how to judge its number: ``±`` the larger of its standard error over probes and its standard
    deviation over seeds; ``label noise`` the distance from the exact kind that sampled labels alone give; ``chance`` the overlap
    of random spaces. In the spectra the band is one standard deviation over seeds, and each line ends at its kind's noise floor.

    Parameters
    ----------
    dataset
        What :func:`fisherlens.compare_kinds` returns.
    axes
        Panel → Axes to draw on; None for those of a new figure.
    panels
        ``"spectrum"``, and any of ``"distance"``, ``"scaled_distance"``, ``"cosine"``, ``"overlap"``, ``"natural_gradient_cosine"``.
    layer
        Which layer, where the result has several; None is the whole network.
    show_noise
        Write and draw what tells signal from noise.
    legend
        Name the kinds in the spectra.

    Returns
    -------
    Panel → Axes.

    Raises
    ------
    InputError: unknown panels or layers, Axes missing, or a Dataset without the variables. TypeError: not a Dataset.

    Examples
    --------
    >>> import xarray as xr
    >>> names = ["exact", "mc"]
    >>> ds = xr.Dataset({"cosine": (("kind_i", "kind_j"), [[1.0, 0.8], [0.8, 1.0]])}, {"kind_i": names, "kind_j": names})
    >>> list(kinds(ds, panels=["cosine"]))
    ['cosine']
    """
    panels = [common.choose("panel", panel, ("spectrum", *_TITLES)) for panel in panels]
    first = "eigenvalue" if panels[0] == "spectrum" else panels[0]
    common.read(
        dataset, first, caller="kinds", source=_SOURCE, needs=(), may=tuple(dataset.dims) if _is(dataset) else ()
    )
    dataset = _one_layer(dataset, layer)
    if axes is None:
        axes = _new_axes(panels)
    missing = common.lacking(axes, panels)
    if missing:
        raise InputError(_MISSING_AXES.format(missing=missing[0], panels=panels))
    for panel in panels:
        if panel == "spectrum":
            _spectra(dataset, axes[panel], show_noise, legend)
        else:
            _matrix(dataset, axes[panel], panel, show_noise)
    return {panel: axes[panel] for panel in panels}


def _is(dataset: Any) -> bool:
    return hasattr(dataset, "data_vars") and hasattr(dataset, "dims")


def _one_layer(dataset: xr.Dataset, layer: str | None) -> xr.Dataset:
    if "layer" not in dataset.dims:
        if layer is not None and "layer" not in dataset.coords:
            raise InputError(
                f"plot.kinds(layer={layer!r}) needs a result with several layers; this one is of the whole. Use fl.compare_kinds(..., by='layer')."
            )
        return dataset
    known = common.entries(dataset, "layer")
    wanted = common.WHOLE if layer is None else layer
    if wanted not in known:
        raise InputError(errors.UNKNOWN_NAME.format(what="layer", name=wanted, hint=errors.nearest(wanted, known)))
    return dataset.isel(layer=known.index(wanted))


def _new_axes(panels: Sequence[str]) -> dict[str, Axes]:
    """Three panels in a row."""
    import matplotlib.pyplot as plt

    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    widths = [1.35 if "spectrum" in panels[column::columns] else 1.0 for column in range(columns)]
    figure = plt.figure(figsize=(3.6 * sum(widths) + 0.3, 4.0 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, columns, width_ratios=widths)
    return {panel: figure.add_subplot(grid[place // columns, place % columns]) for place, panel in enumerate(panels)}


def _spectra(dataset: xr.Dataset, ax: Axes, show_noise: bool, legend: bool) -> None:
    array = common.read(dataset, "eigenvalue", caller="kinds", source=_SOURCE, needs=("kind", "rank"))
    names = common.entries(array, "kind")
    spread = dataset["eigenvalue_spread"].transpose("kind", "rank").values if "eigenvalue_spread" in dataset else None
    floor = dataset["noise_floor"].values if "noise_floor" in dataset else np.full(len(names), np.nan)
    top = np.nanmax(array.values, initial=0.0)
    if not top > 0:
        raise InputError(
            "plot.kinds has a logarithmic axis and found no eigenvalue above zero to put on it. Is F the zero matrix?"
        )
    low = top
    for at, (name, color) in enumerate(zip(names, common.colors(len(names)), strict=True)):
        values = array.values[at]
        shown = np.isfinite(values) & (values > 0)
        if np.isfinite(floor[at]):
            shown &= values > floor[at]
        place = np.arange(1, len(values) + 1)[shown]
        style = common.STYLES[at % len(common.STYLES)]
        few = {"marker": common.MARKERS[at], "markersize": 3.5} if len(place) <= 40 else {}
        negative = int((values < -np.nan_to_num(floor[at])).sum())
        text = name + (f" ({negative} negative, not shown)" if negative else "")
        ax.plot(place, values[shown], color=color, linestyle=style, linewidth=1.7, label=text, **few)
        low = min(low, values[shown].min(initial=low))
        if spread is not None and show_noise and np.nanmax(spread[at], initial=0.0) > 0:
            band = spread[at][shown]
            bottom = np.maximum(values[shown] - band, values[shown] * 0.05)
            ax.fill_between(place, bottom, values[shown] + band, color=color, alpha=0.22, linewidth=0)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(max(low / 2, top * 1e-12), top * 2.5)
    ax.set_xlabel("rank (1 = largest)")
    ax.set_ylabel(common.label(array))
    ax.set_title("spectra above the noise floor", fontsize=10, color=common.INK, loc="left")
    common.tidy(ax)
    if legend:
        common.legend(ax, loc="lower left")


def _matrix(dataset: xr.Dataset, ax: Axes, name: str, show_noise: bool) -> None:
    from matplotlib import colormaps

    array = common.read(dataset, name, caller="kinds", source=_SOURCE, needs=_PAIR)
    values = array.values.astype(float)
    names = common.entries(array, "kind_i")
    high = float(np.nanmax(values, initial=1.0)) if name in _UNBOUNDED else 1.0
    shades = colormaps["YlOrBr" if "distance" in name else "YlGnBu"].with_extremes(bad="#D9D9D9")
    image = ax.imshow(values, cmap=shades, vmin=0.0, vmax=max(high, 1.0) * 1.15, interpolation="nearest")
    prints = _small_print(dataset, name, names) if show_noise else {}
    longest = max((len(line) for lines in prints.values() for line in lines), default=1)
    small = float(np.clip(common.span(ax, "x") / len(names) * 72 / (0.55 * (longest + 1)), 6.0, 7.5))
    for (row, column), value in np.ndenumerate(values):
        if not np.isfinite(value):
            continue
        red, green, blue, _ = image.cmap(image.norm(value))
        ink = "white" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5 else common.INK
        lines = prints.get((row, column), [])
        rise = 0.07 * len(lines)
        ax.text(column, row - rise, _number(value), ha="center", va="center", fontsize=11, color=ink)
        if lines:
            style = {"fontsize": small, "color": ink, "linespacing": 1.15}
            ax.text(column, row + 0.15 - rise / 2, "\n".join(lines), ha="center", va="top", **style)
    common.tidy(ax, grid=None)
    ax.spines[:].set_visible(False)
    common.name_ticks(ax, "x", list(range(len(names))), names)
    common.name_ticks(ax, "y", list(range(len(names))), names)
    ax.set_ylabel("kind i")
    ax.set_xlabel("kind j")
    ax.set_title(_TITLES[name], fontsize=10, color=common.INK, loc="left")


def _small_print(dataset: xr.Dataset, name: str, names: Sequence[str]) -> dict[tuple[int, int], list[str]]:
    """What each number off the diagonal is to be judged by."""
    pairs = [(i, j) for i in range(len(names)) for j in range(len(names)) if i != j]
    found: dict[tuple[int, int], list[str]] = {pair: [] for pair in pairs}
    errors_of = [dataset[name + end] for end in ("_sem", "_spread") if name + end in dataset]
    error = np.fmax.reduce([one.transpose(*_PAIR).values for one in errors_of]) if errors_of else None
    noise = dataset["sampling_noise"].values if "sampling_noise" in dataset and name == "distance" else None
    chance = (
        dataset["overlap_chance"].transpose(*_PAIR).values
        if "overlap_chance" in dataset and name == "overlap"
        else None
    )
    for i, j in pairs:
        if error is not None and np.isfinite(error[i, j]) and error[i, j] > 0:
            found[i, j].append(f"± {_number(error[i, j])}")
        if noise is not None and names[i] == "exact" and np.isfinite(noise[j]):
            found[i, j].append(f"label noise {_number(noise[j])}")
        if chance is not None:
            found[i, j].append(f"chance {_number(chance[i, j])}")
    return found


def _number(value: float) -> str:
    if value == 0 or 0.01 <= abs(value) < 100:
        return f"{value:.2f}".replace("-", "−")
    return f"{value:.1g}".replace("-", "−")
