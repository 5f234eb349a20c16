"""The scree plot of a spectrum."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from fisherlens.errors import InputError
from fisherlens.plots import _common as common

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

_NOTHING = (
    "plot.spectrum has a logarithmic axis and found no finite eigenvalue above zero to put on it. "
    "Is F the zero matrix, or was every layer selected away?"
)
_FLOOR = r"noise floor $n\,\varepsilon\,\lambda_\mathrm{max}$"
_MOST_NAMED = 8  # curves with an entry in the legend; more get a colour bar of names
_GROUPS, _TURNS = ("layer", "block"), ("stage", "step")  # dims that name curves, and dims along which training runs
_BOUNDS = (("lower", "upper"), ("eigenvalue_low", "eigenvalue_high"))
_AXES = {"rank": "rank (1 = largest)", "fraction": "rank / number of eigenvalues"}


def spectrum(
    dataset: xr.Dataset,
    ax: Axes | None = None,
    *,
    x: str = "rank",
    show_noise: bool = True,
    show_floor: bool = True,
    show_bounds: bool = True,
    legend: bool = True,
) -> Axes:
    """Draw eigenvalues over their rank, both logarithmic.

    Values below the noise floor n·ε·λ_max are drawn faint and hollow, the floor itself as a line (one per curve where the
    curves have different floors). Zero and negative values, which rounding leaves below the floor, have no place on the
    axis; the legend counts all values. Bounds of each value are bars; pairs that have not converged are crosses.

    Parameters
    ----------
    dataset
        What :func:`fisherlens.spectrum` or ``top_eigenvalues`` returns: ``eigenvalue (rank)``, with ``layer`` or ``block``, and
        ``stage`` or ``step`` of training, as further dims at will (NaN where a layer has fewer values); ``above_noise``, ``noise_floor``,
        ``converged``, and bounds ``lower`` and ``upper`` (or ``eigenvalue_low`` and ``eigenvalue_high``) if present.
    ax
        Axes to draw on; None for those of a new figure.
    x
        ``"rank"``, or ``"fraction"`` (rank over the number of values of that curve) to compare layers of different size.
    show_noise
        Draw the values below the floor.
    show_floor
        Draw the floor.
    show_bounds
        Draw the bounds.
    legend
        Name the curves, with the number of values above the floor.

    Returns
    -------
    The Axes.

    Raises
    ------
    InputError: no ``eigenvalue``, other dims than those above, an unknown ``x``, or nothing above zero to draw.
    TypeError: not a Dataset.

    Examples
    --------
    >>> import xarray as xr
    >>> spectrum(xr.Dataset({"eigenvalue": ("rank", [2.0, 1.0, 0.1])})).get_xlabel()
    'rank (1 = largest)'
    """
    common.choose("x", x, tuple(_AXES))
    array = common.read(
        dataset, "eigenvalue", caller="spectrum", source="fl.spectrum", needs=("rank",), may=(*_GROUPS, *_TURNS)
    )
    curves = list(_curves(dataset, array))
    if not any((values > 0).any() for _, values, _, _ in curves):
        raise InputError(_NOTHING)
    many = len(curves) > _MOST_NAMED
    ax = common.new_axes(ax, *((8.0, 5.2) if array.sizes.get("layer", 1) > _MOST_NAMED else (6.4, 4.4)))
    looks = _looks(array)
    bounds = list(_extra(dataset, array, [name for pair in _BOUNDS for name in pair])) if show_bounds else []
    converged = list(_extra(dataset, array, ["converged"]))
    bars = False
    for place, ((name, values, above, floor), (color, style)) in enumerate(zip(curves, looks, strict=True)):
        places = np.arange(1, len(values) + 1) / (len(values) if x == "fraction" else 1)
        dots = len(values) <= 40 and not many
        _draw(ax, places, values, above, show_noise, dots, color, style, _caption(name, above, floor))
        for low, high in _BOUNDS if bounds else ():
            if low in bounds[place] and high in bounds[place]:
                bars |= _draw_bounds(ax, places, values, bounds[place][low], bounds[place][high], color)
        if "converged" in converged[place]:
            open_ = (converged[place]["converged"] == 0) & (values > 0)
            if open_.any():
                ax.plot(places[open_], values[open_], "x", color=color, markersize=7, label="_not converged")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel(_AXES[x])
    ax.set_ylabel(common.wrap(common.label(array), common.span(ax, "y")))
    common.tidy(ax)
    floors = [
        (floor, color) for (*_, floor), (color, _) in zip(curves, looks, strict=True) if floor is not None and floor > 0
    ]
    far = _far_floor(curves, floors)
    _limit(ax, curves, floors if (show_floor or show_noise) and far is None else [], show_noise)
    _few_ranks(ax, x, max(len(values) for _, values, _, _ in curves))
    if far is not None:
        floors = []
    if show_floor and floors:
        _draw_floors(ax, floors)
    if legend:
        notes = _notes(ax, bars, far if show_floor else None)
        _explain(ax, array, looks, floors if show_floor else [], notes)
    return ax


def _curves(dataset: xr.Dataset, array: xr.DataArray) -> Iterator[tuple[str, np.ndarray, np.ndarray, float | None]]:
    """Name, values, which of them are above the noise, and the floor of each curve, padding removed."""
    others = [dim for dim in array.dims if dim != "rank"]
    floor = dataset.get("noise_floor", dataset.attrs.get("noise_floor"))
    for place in product(*(range(array.sizes[dim]) for dim in others)):
        chosen = dict(zip(others, place, strict=True))
        values = array.isel(chosen).values.astype(float)
        kept = np.isfinite(values)
        above = np.ones(kept.sum(), dtype=bool)
        if "above_noise" in dataset:
            flags = _part(dataset["above_noise"], chosen)
            above = np.broadcast_to(flags.values.astype(bool), values.shape)[kept]
        level = None if floor is None else float(_part(floor, chosen) if hasattr(floor, "dims") else floor)
        names = [common.entries(array, dim)[index] for dim, index in chosen.items()]
        yield " · ".join(names), values[kept], above, level


def _extra(dataset: xr.Dataset, array: xr.DataArray, names: list[str]) -> Iterator[dict[str, np.ndarray]]:
    """Further variables over rank, for each curve in turn, with the same padding removed."""
    others = [dim for dim in array.dims if dim != "rank"]
    for place in product(*(range(array.sizes[dim]) for dim in others)):
        chosen = dict(zip(others, place, strict=True))
        kept = np.isfinite(array.isel(chosen).values.astype(float))
        parts = {name: _part(dataset[name], chosen) for name in names if name in dataset}
        yield {name: part.values.astype(float)[kept] for name, part in parts.items() if part.dims == ("rank",)}


def _draw_bounds(ax: Axes, x: np.ndarray, y: np.ndarray, low: np.ndarray, high: np.ndarray, color: Any) -> bool:
    """A bar from bound to bound; one at or below zero reaches down to the axis."""
    good = (y > 0) & np.isfinite(low) & np.isfinite(high) & (high > 0)
    if not good.any():
        return False
    bottom = np.where(low[good] > 0, low[good], y[y > 0].min() * 1e-30)
    ax.vlines(x[good], bottom, high[good], color=color, linewidth=4.5, alpha=0.3, zorder=1)
    return True


def _far_floor(curves: list[Any], floors: list[tuple[float, Any]]) -> float | None:
    """The highest floor, where no value is noise and it lies so far below all of them that drawing it would squeeze them."""
    if not floors or any((~above).any() for _, _, above, _ in curves):
        return None
    highest = max(floor for floor, _ in floors)
    lowest = min(values[values > 0].min(initial=np.inf) for _, values, _, _ in curves)
    return highest if highest < lowest / 1e3 else None


def _few_ranks(ax: Axes, x: str, count: int) -> None:
    """Plain numbers for a short axis, which holds hardly a power of ten."""
    if x == "rank" and 1 < count <= 50:
        ticks = [tick for tick in (1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 50) if tick <= count]
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.xaxis.minorticks_off()


def _notes(ax: Axes, bars: bool, far: float | None) -> list[Any]:
    """Legend entries of what all curves share."""
    from matplotlib.lines import Line2D

    notes = []
    if far is not None:
        notes.append(Line2D([], [], linestyle="none", label=f"{_FLOOR} = {far:.1g}, below the axis"))
    if bars:
        notes.append(Line2D([], [], color=common.FAINT, linewidth=4.5, alpha=0.5, label="bounds"))
    if any(line.get_label() == "_not converged" for line in ax.get_lines()):
        notes.append(Line2D([], [], color=common.FAINT, marker="x", linestyle="none", label="not converged"))
    return notes


def _part(array: xr.DataArray, chosen: dict[Any, int]) -> xr.DataArray:
    part = array.isel({dim: value for dim, value in chosen.items() if dim in array.dims})
    return part.squeeze([dim for dim in part.dims if dim != "rank"])


def _dim(array: xr.DataArray, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in array.dims), None)


def _looks(array: xr.DataArray) -> list[tuple[Any, Any]]:
    """Colour and line style of each curve: layers by colour (the whole network in black); stages by colour, or by style."""
    group, turn = _dim(array, _GROUPS), _dim(array, _TURNS)
    turns = array.sizes[turn] if turn else 1
    if group:
        names = common.entries(array, group)
        shades = iter(common.colors(len(names) - names.count(common.WHOLE)))
        layers = [common.INK if name == common.WHOLE else next(shades) for name in names]
        styles = common.STYLES[:turns] if turn else common.STYLES[:1]
        return [(shade, styles[place % len(styles)]) for shade in layers for place in range(turns)]
    return [(shade, "-") for shade in common.colors(turns, ordered=turns > 1)]


def _caption(name: str, above: np.ndarray, floor: float | None) -> str:
    name = common.shorten([name])[0] if name else "eigenvalues"
    return name if floor is None and above.all() else f"{name} ({above.sum()} of {len(above)} above noise)"


def _draw(
    ax: Axes,
    x: np.ndarray,
    y: np.ndarray,
    above: np.ndarray,
    noise: bool,
    dots: bool,
    color: Any,
    style: Any,
    text: str,
) -> None:
    good, faint = above & (y > 0), ~above & (y > 0)
    ax.plot(
        x[good],
        y[good],
        color=color,
        linestyle=style,
        linewidth=1.7,
        marker="o" if dots or good.sum() == 1 else None,
        markersize=3.5,
        label=text,
    )
    if noise and faint.any():
        shown = np.flatnonzero(faint)
        count = max(8, int(30 * np.log10((shown[-1] + 1) / (shown[0] + 1))))
        if len(shown) > count:  # evenly spread over the logarithmic axis, since neighbours would cover each other
            picks = np.geomspace(shown[0] + 1, shown[-1] + 1, count).astype(int) - 1
            shown = np.intersect1d(picks, shown)
        style = {"linestyle": "none", "marker": "o", "markersize": 3.5, "markerfacecolor": "none", "alpha": 0.45}
        ax.plot(x[shown], y[shown], color=color, markeredgewidth=0.8, **style)


def _limit(ax: Axes, curves: list[Any], floors: list[Any], noise: bool) -> None:
    """Leave three decades below the lowest floor: how far rounding scatters below that means nothing."""
    drawn = np.concatenate([values[(values > 0) & (above | noise)] for _, values, above, _ in curves])
    low = drawn.min(initial=np.inf)
    if floors:
        lowest = min(floor for floor, _ in floors)
        low = min(max(low, lowest / 1000), lowest / 10)
    ax.set_ylim(low / 1.5, np.nanmax([values.max() for _, values, _, _ in curves]) * 2.5)


def _draw_floors(ax: Axes, floors: list[tuple[float, Any]]) -> None:
    """One line where all curves have one floor; else a mark of its colour for each, at the left edge."""
    levels = [floor for floor, _ in floors]
    bottom = ax.get_ylim()[0]
    ax.axhspan(bottom, min(levels), color="#EFEFEF", zorder=0, linewidth=0)
    if np.allclose(levels, levels[0], rtol=1e-6, atol=0.0):
        ax.axhline(levels[0], color=common.INK, linewidth=1.0, linestyle=(0, (4, 2)), zorder=1, label=_FLOOR)
        return
    ax.axhspan(min(levels), max(levels), color="#F6F6F6", zorder=0, linewidth=0)
    for level, color in floors:
        ax.plot([0, 0.035], [level, level], color=color, linewidth=1.6, transform=ax.get_yaxis_transform(), zorder=1)
    ax.plot([], [], color=common.FAINT, linewidth=1.6, label=f"{_FLOOR}, left edge")


def _explain(
    ax: Axes,
    array: xr.DataArray,
    looks: list[tuple[Any, Any]],
    floors: list[tuple[float, Any]],
    notes: list[Any],
) -> None:
    """Name the curves: each of a few; layers by colour and stages by style; many layers by a colour bar."""
    from matplotlib.lines import Line2D

    handles = common.named(ax)
    reference = [*notes, *(handles[-1:] if floors else [])]
    handles = [*(handles[:-1] if floors else handles), *reference]
    group, turn = _dim(array, _GROUPS), _dim(array, _TURNS)
    layers = common.entries(array, group) if group else []
    stages = common.entries(array, turn) if turn else []
    if len(layers) > _MOST_NAMED:
        common.name_bar(ax, [color for color, _ in looks[:: max(1, len(stages))]], layers, str(group))
        handles = reference
    if layers and stages:
        names = common.shorten(layers) if len(layers) <= _MOST_NAMED else []
        lines = [Line2D([], [], color=looks[n * len(stages)][0], label=name) for n, name in enumerate(names)]
        lines += [Line2D([], [], color=common.INK, linestyle=looks[n][1], label=name) for n, name in enumerate(stages)]
        handles = [*lines, *reference]
    elif len(looks) > _MOST_NAMED and not layers:
        common.name_bar(ax, [color for color, _ in looks], stages, str(turn))
        handles = reference
    columns = 2 if len(handles) > _MOST_NAMED else 1
    corner = _empty_corner(ax, floors, common.entry_texts(ax, handles), columns)
    if corner is None:
        common.legend_above(ax, handles)
    else:
        common.legend(ax, handles, loc="lower left", bbox_to_anchor=(0.0, corner), ncols=columns)


def _empty_corner(ax: Axes, floors: list[tuple[float, Any]], texts: list[str], columns: int) -> float | None:
    """Height, as a share of the axis, at which a legend on the left fits between floor and curves; None if it does not."""
    low, high = np.log(ax.get_ylim())
    bottom = max([(np.log(floor) - low) / (high - low) + 0.01 for floor, _ in floors], default=0.0)
    lines = sum(text.count("\n") + 1 for text in texts) / columns
    height = 0.19 * (np.ceil(lines) + 0.6) / common.span(ax, "y")
    widest = max((len(line) for text in texts for line in text.split("\n")), default=0)
    width = min(1.0, columns * (0.075 * widest + 0.5) / common.span(ax, "x"))
    left, right = np.log(ax.get_xlim())
    lowest = 1.0
    for line in ax.get_lines():
        x, y = (np.asarray(part, dtype=float) for part in line.get_data())
        if line.get_label().startswith(("_", _FLOOR)) or not len(x):
            continue
        near = np.log(x[x > 0]) < left + width * (right - left)
        lowest = min(lowest, ((np.log(y[x > 0][near]) - low) / (high - low)).min(initial=1.0))
    return bottom if bottom + height < lowest else None
