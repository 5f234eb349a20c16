"""How long optimizers took to a target, and what a search over their options found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fisherlens import errors
from fisherlens.errors import InputError
from fisherlens.plots import _common as common

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

_SOURCE = "fl.compare_optimizers"
_ROOM = 0.06  # of the axis, for what has no place on it


def targets(dataset: xr.Dataset, ax: Axes | None = None, *, target: str | None = None, x: str = "step") -> Axes:
    """Draw how long each optimizer took to a target: a dot per seed, a bar at the median.

    A run that did not reach the target is a cross in the column at the right, where the number of such runs stands; a median is drawn where
    more than half of the seeds arrived, and counts the others as later than all.

    Parameters
    ----------
    dataset
        What :func:`fisherlens.compare_optimizers` returns, over (target, optimizer, seed).
    ax
        Axes to draw on; None for those of a new figure.
    target
        A metric that has a target; None takes the first. ``"own"``: 90 % of each run's own final test accuracy.
    x
        ``"step"`` or ``"seconds"``.

    Returns
    -------
    The Axes.

    Raises
    ------
    InputError: no target, or an unknown one; an unknown ``x``; other dims than those above. TypeError: not a Dataset.

    Examples
    --------
    >>> import xarray as xr
    >>> taken = (("target", "optimizer", "seed"), [[[20.0, 30.0]]])
    >>> goal = (("target",), [0.1])
    >>> places = {"target": ["train_loss"], "optimizer": ["sgd"], "seed": [0, 1]}
    >>> ax = targets(xr.Dataset({"steps_to_target": taken, "target_value": goal}, places))
    >>> ax.get_title(loc="left")
    'train_loss ≤ 0.1'
    """
    common.choose("x", x, ("step", "seconds"))
    kind = {"step": "steps", "seconds": "seconds"}[x]
    needs = ("optimizer", "seed")
    if target == "own":
        array = common.read(dataset, f"{kind}_to_own_accuracy", caller="targets", source=_SOURCE, needs=needs)
        title = f"{100 * dataset.attrs.get('own_accuracy_share', 0.9):g} % of its own final accuracy"
    else:
        array = common.read(dataset, f"{kind}_to_target", caller="targets", source=_SOURCE, needs=("target", *needs))
        known = common.entries(array, "target")
        target = known[0] if target is None else common.choose("target", target, [*known, "own"])
        array = array.isel(target=known.index(target))
        goal = float(dataset["target_value"].values.reshape(-1)[known.index(target)])
        title = f"{target} {'≥' if 'accuracy' in target else '≤'} {goal:g}"
    values = array.values.astype(float)
    names = common.entries(array, "optimizer")
    ax = common.new_axes(ax, 6.4, 1.2 + 0.34 * len(names))
    finite = np.isfinite(values)
    top = float(values[finite].max()) if finite.any() else 1.0
    missing = top * (1 + 2 * _ROOM) if top else 1.0
    for row, (shade, _) in enumerate(common.cycle(len(names))):
        there = values[row][finite[row]]
        ax.plot(there, np.full(len(there), row), "o", color=shade, markersize=5.5, alpha=0.75)
        lost = int((~finite[row]).sum())
        middle = np.median(np.where(finite[row], values[row], np.inf))
        if np.isfinite(middle):
            ax.plot([middle, middle], [row - 0.3, row + 0.3], color=shade, linewidth=2.4)
        if lost:
            ax.plot([missing], [row], "x", color=shade, markersize=7, markeredgewidth=2.0)
            ax.annotate(
                f" {lost} of {values.shape[1]}",
                (missing, row),
                (6, 0),
                textcoords="offset points",
                va="center",
                fontsize=common.NOTE_SIZE,
            )
    ax.set_ylim(len(names) - 0.5, -0.5)
    if not finite.all():
        ax.axvline(top * (1 + _ROOM) if top else 0.5, color=common.FAINT, linewidth=0.8, linestyle=(0, (2, 2)))
        ax.set_xlim(0, missing * (1 + 2 * _ROOM))
        ax.set_xticks([tick for tick in ax.get_xticks() if 0 <= tick <= top])  # no numbers where there is no scale
        ax.text(missing, -0.52, "not reached", fontsize=common.NOTE_SIZE, color=common.INK, ha="center", va="bottom")
    else:
        ax.set_xlim(left=0)
    common.tidy(ax, "x")
    common.name_ticks(ax, "y", range(len(names)), names)
    ax.set_xlabel("optimizer steps" if x == "step" else "training time [s]")
    ax.set_title(title, loc="left", fontsize=10)
    return ax


def tuning(dataset: xr.Dataset, ax: Axes | None = None, *, option: str = "lr", legend: bool = True) -> Axes:
    """Draw the whole search: the score of each trial against one option, a line per optimizer, the chosen trial ringed.

    Trials that diverged stand as crosses at the upper edge. Where a search runs over other options too, the line joins the best score at each
    value of this one, and all trials are dots.

    Parameters
    ----------
    dataset
        What :func:`fisherlens.compare_optimizers` returns with ``tune=``, over (optimizer, trial).
    ax
        Axes to draw on; None for those of a new figure.
    option
        A numeric option that was searched.
    legend
        Name the optimizers.

    Returns
    -------
    The Axes.

    Raises
    ------
    InputError: no search, no such option, no finite score; other dims than those above. TypeError: not a Dataset.

    Examples
    --------
    >>> import xarray as xr
    >>> by = ("optimizer", "trial")
    >>> found = {"trial_score": (by, [[2.0, 0.5]]), "option_lr": (by, [[0.01, 0.1]]), "trial_chosen": (by, [[False, True]])}
    >>> ax = tuning(xr.Dataset(found, {"optimizer": ["sgd"], "trial": [0, 1]}))
    >>> ax.get_xscale(), ax.get_lines()[0].get_xdata().tolist()
    ('log', [0.01, 0.1])
    """
    by = ("optimizer", "trial")
    scores = common.read(dataset, "trial_score", caller="tuning", source=f"{_SOURCE}(tune=...)", needs=by)
    known = [str(name).removeprefix("option_") for name in dataset.data_vars if str(name).startswith("option_")]
    if option not in known:
        raise InputError(errors.UNKNOWN_NAME.format(what="option", name=option, hint=errors.nearest(option, known)))
    places = common.fit(dataset[f"option_{option}"], caller="tuning", needs=by).values.astype(float)
    chosen = common.fit(dataset["trial_chosen"], caller="tuning", needs=by).values.astype(bool)
    values = scores.values.astype(float)
    finite = np.isfinite(values) & np.isfinite(places)
    if not finite.any():
        raise InputError(
            "plot.tuning found no finite score to draw: every trial diverged. Search smaller learning rates."
        )
    ax = common.new_axes(ax, 6.6, 4.2)
    low, high = float(values[finite].min()), float(values[finite].max())
    log = low > 0 and high > 10 * low
    edge = high * (high / low) ** 0.08 if log else high + 0.08 * max(high - low, abs(high), 1e-12)
    names = common.entries(scores, "optimizer")
    short = common.shorten(names)
    lost_any = False
    for row, (shade, turn) in enumerate(common.cycle(len(names))):
        if not np.isfinite(places[row]).any():
            continue
        _search_line(
            ax,
            places[row],
            values[row],
            finite[row],
            {"color": shade, "linestyle": common.STYLES[turn % len(common.STYLES)], "label": short[row]},
        )
        lost = np.isinf(values[row]) & np.isfinite(places[row])
        ax.plot(places[row][lost], np.full(lost.sum(), edge), "x", color=shade, markersize=7, markeredgewidth=2.0)
        lost_any = lost_any or bool(lost.any())
        ring = chosen[row] & finite[row]
        ax.plot(
            places[row][ring],
            values[row][ring],
            "o",
            markersize=11,
            markerfacecolor="none",
            markeredgecolor=shade,
            markeredgewidth=1.6,
        )
    if places[np.isfinite(places)].min() > 0:
        ax.set_xscale("log")
    if log:
        ax.set_yscale("log")
    ax.set_xlabel(option)
    ax.set_ylabel(common.wrap(common.label(scores), common.span(ax, "y")))
    common.tidy(ax)
    ax.plot([], [], "o", color=common.INK, markersize=10, markerfacecolor="none", label="chosen")
    if lost_any:
        ax.plot([], [], "x", color=common.INK, markeredgewidth=1.8, label="diverged")
    if legend:
        wide = len(names) > len(common.PALETTE)
        common.legend(ax, **({"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)} if wide else {"loc": "best"}))
    return ax


def _search_line(ax: Axes, places: np.ndarray, values: np.ndarray, finite: np.ndarray, look: dict[str, Any]) -> None:
    """The best score at each value of the option, and all trials as dots."""
    at = np.unique(places[finite])
    lowest = [values[finite & (places == place)].min() for place in at]
    ax.plot(at, lowest, linewidth=1.6, **look)
    ax.plot(places[finite], values[finite], "o", color=look["color"], markersize=4)
