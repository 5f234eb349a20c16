"""Training curves of several optimizers over several seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fisherlens.errors import InputError
from fisherlens.plots import _common as common

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

_AXES = ("step", "seconds")
_HEADROOM = 10.0  # a loss above so many times the largest first one is off the axis: our choice
_NOTHING = (
    "plot.optimizers found no finite value of {name!r} to draw. Did every run diverge before it was first measured? "
    "Look at the variable 'train_loss', or lower the learning rates."
)


def optimizers(
    dataset: xr.Dataset,
    ax: Axes | None = None,
    *,
    variable: str = "train_loss",
    x: str = "step",
    scale: str = "auto",
    show_range: bool = True,
    show_seeds: bool = False,
    show_diverged: bool = True,
    colors: Mapping[str, Any] | None = None,
    legend: bool = True,
) -> Axes:
    """Draw the training curves of each optimizer: the median over seeds, and the range from worst to best.

    A run has diverged where the variable ``diverged`` says so, else where its values stop being finite before those of
    the others. From there on it counts as the worst value, not as a missing one, so that the median does not improve
    when runs fail; a cross stands where each run was last finite, and the legend counts them. A loss that explodes leaves
    the axis at ten times the largest first loss, and its cross stays at that edge. Steps at which nothing was measured
    are bridged.

    Parameters
    ----------
    dataset
        What :func:`fisherlens.compare_optimizers` returns, over (optimizer, seed, step).
    ax
        Axes to draw on; None for those of a new figure.
    variable
        ``"train_loss"``, ``"test_loss"`` or ``"test_accuracy"``.
    x
        ``"step"``, or ``"seconds"``: the median over seeds of the time at which that step was done.
    scale
        ``"linear"``, ``"log"``, or ``"auto"``: logarithmic for a loss above zero that spans more than a factor of 10.
    show_range, show_seeds
        Fill the range over seeds; draw each seed as a thin line.
    show_diverged
        Mark diverged runs.
    colors
        Optimizer → colour, to keep the colours of another figure; the palette gives those that are not named.
    legend
        Name the optimizers.

    Returns
    -------
    The Axes.

    Raises
    ------
    InputError: unknown variable, ``x`` or ``scale``, other dims than those above, no finite value. TypeError: not a Dataset.

    Examples
    --------
    >>> import xarray as xr
    >>> loss = (("optimizer", "seed", "step"), [[[2.0, 1.0, 0.5]]])
    >>> ax = optimizers(xr.Dataset({"train_loss": loss}, {"optimizer": ["sgd"], "seed": [0], "step": [0, 1, 2]}))
    >>> ax.get_lines()[0].get_label()
    'sgd'
    """
    common.choose("x", x, _AXES)
    common.choose("scale", scale, ("auto", "linear", "log"))
    needs = ("optimizer", "seed", "step")
    source = "fl.compare_optimizers"
    array = common.read(dataset, variable, caller="optimizers", source=source, needs=needs)
    values = array.values.astype(float)
    finite = np.isfinite(values)
    if not finite.any():
        raise InputError(_NOTHING.format(name=variable))
    axis = _places(dataset, array, x, source)
    rising = "accuracy" in variable
    lost = _diverged(dataset, finite)
    top = None if rising else _top(values)
    names = common.entries(array, "optimizer")
    ax = common.new_axes(ax, 6.6 if len(names) <= len(common.PALETTE) else 8.4, 4.2)
    short = common.shorten(names)
    for number, (shade, turn) in enumerate(common.cycle(len(names))):
        text, shade = short[number], (colors or {}).get(names[number], shade)
        if show_diverged and lost[number].any():
            text += f" ({lost[number].sum()} of {len(lost[number])} diverged)"
        look = {"color": shade, "linestyle": common.STYLES[turn % len(common.STYLES)], "label": text}
        _draw(ax, axis[number], values[number], lost[number], rising, look, show_range, show_seeds)
        if show_diverged:
            _cross(ax, axis[number], values[number], lost[number], shade, top)
    if scale == "auto":
        drawn = values[finite] if top is None else np.minimum(values[finite], top)
        scale = "log" if not rising and drawn.min() > 0 and drawn.max() > 10 * drawn.min() else "linear"
    _frame(ax, array, values, scale, rising, top)
    ax.set_xlabel("step" if x == "step" else common.label(dataset["seconds"]))
    if show_diverged and lost.any():
        style: dict[str, Any] = {"linestyle": "none", "marker": "x", "color": common.INK, "markeredgewidth": 1.8}
        ax.plot([], [], label="a run diverged here", **style)
    if legend and len(names) > len(common.PALETTE):
        common.legend(ax, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    elif legend:
        common.legend(ax, loc="best")
    return ax


def _places(dataset: xr.Dataset, array: xr.DataArray, x: str, source: str) -> np.ndarray:
    """Horizontal places, (optimizer, step)."""
    if x == "step":
        return np.broadcast_to(array["step"].values.astype(float), (array.sizes["optimizer"], array.sizes["step"]))
    seconds = common.read(
        dataset, "seconds", caller="optimizers", source=source, needs=("optimizer", "step"), may=("seed",)
    ).values.astype(float)
    if seconds.ndim == 2:
        return seconds
    known = np.isfinite(seconds).any(axis=2)
    middle = np.full(known.shape, np.nan)
    middle[known] = np.nanmedian(seconds[known], axis=-1)
    return middle


def _diverged(dataset: xr.Dataset, finite: np.ndarray) -> np.ndarray:
    """Which runs diverged, (optimizer, seed)."""
    if "diverged" in dataset:
        return common.fit(dataset["diverged"], caller="optimizers", needs=("optimizer", "seed")).values.astype(bool)
    last = finite.any(axis=(0, 1)).nonzero()[0][-1]  # the last step at which any run was measured
    return ~finite[:, :, last]


def _draw(
    ax: Axes,
    x: np.ndarray,
    values: np.ndarray,
    lost: np.ndarray,
    rising: bool,
    look: dict[str, Any],
    band: bool,
    seeds: bool,
) -> None:
    worst = -np.inf if rising else np.inf
    finite = np.isfinite(values)
    filled = np.where(finite, values, np.nan)
    for run in np.flatnonzero(lost):  # a run that is over stays the worst of all
        after = finite[run].nonzero()[0][-1] + 1 if finite[run].any() else 0
        filled[run, after:] = worst
    measured = finite.any(axis=0) & np.isfinite(x)
    middle = np.full(len(x), np.nan)
    with np.errstate(invalid="ignore"):  # the mean of two infinite values in the middle
        middle[measured] = np.nanmedian(filled[:, measured], axis=0)
    shown = measured & np.isfinite(middle)
    ax.plot(x[shown], middle[shown], linewidth=1.9, zorder=3, marker="o" if shown.sum() == 1 else None, **look)
    shade = look["color"]
    if band and len(values) > 1 and measured.any():
        span = np.where(finite, values, np.nan)[:, measured]
        ax.fill_between(
            x[measured], np.nanmin(span, axis=0), np.nanmax(span, axis=0), color=shade, alpha=0.16, linewidth=0
        )
    if seeds:
        for run, good in zip(values, finite, strict=True):
            kept = good & np.isfinite(x)
            ax.plot(x[kept], run[kept], color=shade, linewidth=0.7, alpha=0.5)


def _cross(ax: Axes, x: np.ndarray, values: np.ndarray, lost: np.ndarray, shade: Any, top: float | None) -> None:
    for run in values[lost]:
        good = np.isfinite(run) & np.isfinite(x)
        if good.any():
            last = good.nonzero()[0][-1]
            y = run[last] if top is None else min(run[last], top / 1.25)
            ax.plot(x[last], y, marker="x", color=shade, markersize=7, markeredgewidth=2.0, linestyle="none", zorder=4)


def _top(values: np.ndarray) -> float | None:
    """Where to end the axis of a loss that explodes, so that the other curves can still be read; None if none does."""
    finite = np.isfinite(values)
    first = values[:, :, finite.any(axis=(0, 1)).argmax()]
    start = np.abs(first[np.isfinite(first)]).max(initial=0.0)
    return float(_HEADROOM * start) if 0 < _HEADROOM * start < values[finite].max() else None


def _frame(ax: Axes, array: xr.DataArray, values: np.ndarray, scale: str, rising: bool, top: float | None) -> None:
    if scale == "log":
        ax.set_yscale("log")
    if rising and np.nanmax(values) <= 1.0:
        ax.set_ylim(top=min(1.02, ax.get_ylim()[1]))
    ax.set_ylabel(common.wrap(common.label(array), common.span(ax, "y")))
    ax.margins(x=0.02)
    if top is not None:  # the margin below was made for values that are off the axis now
        low = values[np.isfinite(values) & ((values > 0) | (scale == "linear"))].min()
        ax.set_ylim(low / 1.3 if scale == "log" else low - 0.05 * (top - low), top)
    common.tidy(ax)
