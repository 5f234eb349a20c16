"""The density of eigenvalues."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fisherlens.errors import InputError
from fisherlens.plots import _common as common

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

_GROUPS, _TURNS = ("layer", "block"), ("stage", "step")
_MOST_NAMED = 8  # curves with an entry in the legend; more get a colour bar of names
_BAND = 2.0  # standard errors on either side
_FEW = 1e-3  # shares below this are not worth a word
_NOTHING = (
    "plot.density found nothing above zero to put on a logarithmic axis. Is F the zero matrix, or does the grid miss its eigenvalues? Its "
    "zero_fraction says the first; scale='linear' draws what there is."
)


class _Curve(NamedTuple):
    name: str
    x: np.ndarray
    y: np.ndarray
    error: np.ndarray | None
    zero: float | None
    unresolved: float
    floor: float | None
    single: float | None


def density(
    dataset: xr.Dataset,
    ax: Axes | None = None,
    *,
    y: str = "density",
    scale: str | None = None,
    show_error: bool = True,
    show_zero: bool = True,
    show_floor: bool = True,
    legend: bool = True,
) -> Axes:
    """Draw the density of eigenvalues with a band of two standard errors.

    The legend tells the share of eigenvalues that are zero, which have no place on the axis, and the share that the probes could not tell
    from zero, which the lowest peak stands for.

    Parameters
    ----------
    dataset
        What :func:`fisherlens.spectral_density` returns: ``density (grid)``, with ``layer`` or ``block``, and ``stage`` or ``step``, as further
        dims at will; ``density_sem``, ``zero_fraction``, ``unresolved_fraction`` and ``noise_floor`` if present.
    ax
        Axes to draw on; None for those of a new figure.
    y
        ``"density"``, or ``"cumulative"`` for the share of eigenvalues up to each point.
    scale
        ``"log"``: both axes logarithmic (of the cumulative share only the first). ``"linear"``: the eigenvalues linear, the density logarithmic.
        None takes that of the grid.
    show_error
        Draw the band.
    show_zero
        Tell the share of zeros.
    show_floor
        Draw the noise floor where it lies within the axis.
    legend
        Name the curves.

    Returns
    -------
    The Axes.

    Raises
    ------
    InputError: no ``density``, other dims than those above, an unknown ``y`` or ``scale``, or nothing above zero to draw.
    TypeError: not a Dataset.

    Examples
    --------
    >>> import xarray as xr
    >>> density(xr.Dataset({"density": ("grid", [0.1, 0.5, 0.1])}, {"grid": [1.0, 10.0, 100.0]})).get_xlabel()
    'eigenvalue'
    """
    common.choose("y", y, ("density", "cumulative"))
    array = common.read(
        dataset, y, caller="density", source="fl.spectral_density", needs=("grid",), may=(*_GROUPS, *_TURNS)
    )
    scale = scale or ("log" if dataset.attrs.get("grid_scale", "log") == "log" else "linear")
    common.choose("scale", scale, ("log", "linear"))
    curves = list(_curves(dataset, array, y, scale))
    group, turn = _dim(array, _GROUPS), _dim(array, _TURNS)
    ax = common.new_axes(ax, *((8.0, 5.2) if len(curves) > _MOST_NAMED else (6.4, 4.4)))
    looks = _looks(array, group, turn)
    many = len(curves) > _MOST_NAMED
    for curve, (color, style) in zip(curves, looks, strict=True):
        text = _caption(curve, y, show_zero, single=len(curves) == 1)
        ax.plot(curve.x, curve.y, color=color, linestyle=style, linewidth=1.1 if many else 1.7, label=text)
        if show_error and curve.error is not None and not many:
            low, high = curve.y - _BAND * curve.error, curve.y + _BAND * curve.error
            tiny = np.finfo(float).tiny if y == "density" else 0.0
            ax.fill_between(curve.x, np.maximum(low, tiny), high, color=color, alpha=0.2, linewidth=0, zorder=1)
    if scale == "log":
        ax.set_xscale("log")
    if y == "density":
        ax.set_yscale("log")
    _limit(ax, curves, y, scale)
    grid = array["grid"]
    ax.set_xlabel(common.wrap(common.label(grid) if "long_name" in grid.attrs else "eigenvalue", common.span(ax, "x")))
    ax.set_ylabel(common.wrap(common.label(array), common.span(ax, "y")))
    common.tidy(ax)
    if show_floor:
        _draw_floor(ax, curves)
    if legend:
        band = show_error and not many and any(curve.error is not None and curve.error.any() for curve in curves)
        _explain(ax, array, looks, group, turn, curves, band, y)
    return ax


def _dim(array: xr.DataArray, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in array.dims), None)


def _curves(dataset: xr.Dataset, array: xr.DataArray, y: str, scale: str) -> Iterator[_Curve]:
    others = [dim for dim in array.dims if dim != "grid"]
    x = array["grid"].values.astype(float)
    drawn = False
    for place in product(*(range(array.sizes[dim]) for dim in others)):
        chosen = dict(zip(others, place, strict=True))
        values = array.isel(chosen).values.astype(float)
        good = np.isfinite(values) & ((x > 0) if scale == "log" else True) & ((values > 0) if y == "density" else True)
        drawn = drawn or bool(good.any())
        error = _part(dataset, f"{y}_sem", chosen)
        error = error[good] if error is not None and error.ndim == 1 and np.isfinite(error).any() else None
        numbers = [_part(dataset, name, chosen) for name in ("zero_fraction", "unresolved_fraction", "noise_floor")]
        zero, unresolved, floor = (
            float(v) if v is not None and v.ndim == 0 and np.isfinite(v) else None for v in numbers
        )
        size, width = (_part(dataset, part, chosen) for part in ("size", "width"))
        # how high one eigenvalue stands: what lies far below is the flank of a kernel
        single = float(0.4 / (size * width)) if size is not None and width is not None and width.ndim == 0 else None
        name = " · ".join(common.entries(array, dim)[index] for dim, index in chosen.items())
        yield _Curve(name, x[good], values[good], error, zero, unresolved or 0.0, floor, single)
    if not drawn:
        raise InputError(_NOTHING)


def _part(dataset: xr.Dataset, name: str, chosen: dict[Any, int]) -> np.ndarray | None:
    if name not in dataset:
        return None
    part = dataset[name].isel({dim: place for dim, place in chosen.items() if dim in dataset[name].dims})
    return part.squeeze([dim for dim in part.dims if dim != "grid" and part.sizes[dim] == 1]).values


def _looks(array: xr.DataArray, group: str | None, turn: str | None) -> list[tuple[Any, Any]]:
    """Colour and line style of each curve: layers by colour (the whole network in black); stages by colour, or by style."""
    turns = array.sizes[turn] if turn else 1
    if group:
        names = common.entries(array, group)
        shades = iter(common.colors(len(names) - names.count(common.WHOLE)))
        layers = [common.INK if name == common.WHOLE else next(shades) for name in names]
        return [(shade, common.STYLES[place % len(common.STYLES)]) for shade in layers for place in range(turns)]
    return [(shade, "-") for shade in common.colors(turns, ordered=turns > 1)]


def _percent(share: float) -> str:
    """A share in words: 99.97 % is not 100 %."""
    for digits in range(5):
        text = f"{100 * share:.{digits}f}"
        if 0 < float(text) < 100 or share in (0.0, 1.0):
            break
    return f"{text} %"


def _caption(curve: _Curve, y: str, show_zero: bool, *, single: bool) -> str:
    name = (
        common.shorten([curve.name])[0] if curve.name else {"density": "density", "cumulative": "cumulative share"}[y]
    )
    facts = []
    if show_zero and curve.zero is not None and curve.zero >= _FEW:
        facts.append(f"{_percent(curve.zero)} of eigenvalues are zero" if single else f"{_percent(curve.zero)} zero")
    if show_zero and curve.unresolved >= _FEW:
        facts.append(f"{_percent(curve.unresolved)} unresolved")
    return f"{name} ({', '.join(facts)})" if facts else name


def _limit(ax: Axes, curves: list[_Curve], y: str, scale: str) -> None:
    """Show every peak, and not how far a Gaussian falls beside it."""
    x = np.concatenate([curve.x for curve in curves])
    ax.set_xlim(x.min(), x.max())
    if y == "cumulative":
        ax.set_ylim(-0.02, 1.02)
        return
    lowest, highest = np.inf, 0.0
    for curve in curves:
        if not len(curve.y):
            continue
        height = curve.y * curve.x if scale == "log" else curve.y
        if scale == "linear" and curve.single:
            lowest, highest = min(lowest, curve.single / 2), max(highest, curve.y.max())
            continue
        edges = np.concatenate([[0.0], height, [0.0]])
        peaks = (height >= edges[:-2]) & (height >= edges[2:]) & (height > 1e-8 * height.max())
        lowest, highest = min(lowest, curve.y[peaks].min()), max(highest, curve.y.max())
    ax.set_ylim(lowest / 8, highest * 3)


def _draw_floor(ax: Axes, curves: list[_Curve]) -> None:
    floors = [curve.floor for curve in curves if curve.floor]
    low, high = ax.get_xlim()
    if (
        floors
        and np.allclose(floors, floors[0], rtol=1e-6, atol=0)
        and low < floors[0] < high
        and ax.get_xscale() == "log"
    ):
        ax.axvline(floors[0], color=common.INK, linewidth=1.0, linestyle=(0, (4, 2)), zorder=1, label="noise floor")


def _explain(
    ax: Axes,
    array: xr.DataArray,
    looks: list[tuple[Any, Any]],
    group: str | None,
    turn: str | None,
    curves: list[_Curve],
    band: bool,
    y: str,
) -> None:
    """Name each of a few curves, layers by colour and stages by style; many by a colour bar."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = common.named(ax)
    named, reference = handles[: len(curves)], handles[len(curves) :]
    if band:
        shade = looks[0][0] if len(curves) == 1 else common.FAINT
        reference = [Patch(color=shade, alpha=0.25, linewidth=0, label=f"± {_BAND:g} standard errors"), *reference]
    layers = common.entries(array, group) if group else []
    stages = common.entries(array, turn) if turn else []
    if len(curves) > _MOST_NAMED:
        named = []
        if group:
            common.name_bar(ax, [color for color, _ in looks[:: max(1, len(stages))]], layers, group)
            styles = [style for _, style in looks[: len(stages)]]
            named = [
                Line2D([], [], color=common.INK, linestyle=s, label=n) for s, n in zip(styles, stages, strict=True)
            ]
        else:
            common.name_bar(ax, [color for color, _ in looks], stages, str(turn))
    handles = [*named, *reference]
    corner = (
        "lower left"
        if y == "density" and ax.get_xscale() == "log"
        else "upper right"
        if y == "density"
        else "lower right"
    )
    if _collides(ax, corner, common.entry_texts(ax, handles)):
        common.legend_above(ax, handles)
    else:
        common.legend(ax, handles, loc=corner)


def _collides(ax: Axes, corner: str, texts: list[str]) -> bool:
    """Whether a curve passes through the place of the legend."""
    lines = sum(text.count("\n") + 1 for text in texts)
    height = 0.19 * (lines + 0.6) / common.span(ax, "y")
    width = min(
        1.0, (0.075 * max((len(t) for text in texts for t in text.split("\n")), default=0) + 0.5) / common.span(ax, "x")
    )
    left, right = (1 - width, 1.0) if "right" in corner else (0.0, width)
    low, high = (1 - height, 1.0) if "upper" in corner else (0.0, height)
    for line in ax.get_lines():
        data = np.asarray(line.get_xydata(), dtype=float)
        if line.get_label() == "noise floor" or not len(data):
            continue
        x, y = ax.transAxes.inverted().transform(ax.transData.transform(data)).T
        if ((x > left) & (x < right) & (y > low) & (y < high)).any():
            return True
    return False
