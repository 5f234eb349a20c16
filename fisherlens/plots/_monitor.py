"""A training run as its Fisher saw it: one small panel per quantity, over the optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fisherlens import errors
from fisherlens.errors import InputError
from fisherlens.plots import _common as common

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

# panel -> the variable that must be there
PANELS = {
    "loss": "loss",
    "trace": "trace",
    "eigenvalue": "eigenvalue",
    "effective_dimension": "effective_dimension",
    "alignment": "alignment",
    "drift": "overlap_previous",
    "coupling": "coupling",
    "share_of_time": "share_of_time",
}
_AXES = ("step", "seconds")
_MOST_PAIRS = 5  # the strongest couplings, told apart by colour
_FEW = 30  # points that are marked one by one
_SOURCE = "fl.Monitor"
_DASHED, _DOTTED = (0, (4, 2)), (0, (1.5, 1.5))
_NOTHING = "plot.monitor found no step that was measured. Look at the variable 'problem', which says why, or wait for the first measurement."


def monitor(
    dataset: xr.Dataset,
    axes: Mapping[str, Axes] | None = None,
    *,
    panels: Sequence[str] | None = None,
    layers: Sequence[str] | None = None,
    x: str = "step",
    scale: str = "auto",
    show_chance: bool = True,
    show_limit: bool = True,
    legend: bool = True,
) -> dict[str, Axes]:
    """Draw what a Monitor measured along a training run, one panel per quantity.

    Steps that could not be measured are marked by a vertical line, and curves have a gap there.

    Parameters
    ----------
    dataset
        The ``result`` of a :class:`fisherlens.Monitor`, or the file of one, over ``step``.
    axes
        Panel → Axes to draw on; None for those of a new figure, three in a row.
    panels
        ``"loss"``, ``"trace"`` by layer, ``"eigenvalue"``, ``"effective_dimension"`` with its interval, ``"alignment"`` and ``"drift"`` with what chance gives,
        ``"coupling"`` of the five most coupled pairs of layers, ``"share_of_time"``; None for all that were measured.
    layers
        Of the trace; None for all of up to seven, and the network alone beyond. ``"all"`` is the whole network.
    x
        ``"step"``, or ``"seconds"`` of wall time.
    scale
        Of losses, traces and eigenvalues: ``"log"``, ``"linear"``, or ``"auto"``: logarithmic where values above zero span more than a factor of 10, and for eigenvalues.
    show_chance, show_limit
        Draw what chance gives; draw the largest stable curvature over the eigenvalues, where the learning rate of an SGD was known.
    legend
        Name the curves.

    Returns
    -------
    Panel → Axes.

    Raises
    ------
    InputError: an unknown panel, layer or option, a panel that was not measured, ``axes`` without one of the panels, nothing measured at all.
    TypeError: not a Dataset.

    Examples
    --------
    >>> import xarray as xr
    >>> run = xr.Dataset({"loss": ("step", [2.0, 1.0]), "seconds": ("step", [0.1, 0.2])}, {"step": [0, 50]})
    >>> list(monitor(run))
    ['loss']
    """
    common.choose("x", x, _AXES)
    common.choose("scale", scale, ("auto", "linear", "log"))
    chosen = _choose_panels(dataset, panels)
    places = common.read(
        dataset, "step" if x == "step" else "seconds", caller="monitor", source=_SOURCE, needs=("step",)
    )
    measured = _measured(dataset, chosen)
    if not measured.any():
        raise InputError(_NOTHING)
    if axes is None:
        axes = _new_axes(chosen)
    missing = common.lacking(axes, chosen)
    if missing:
        raise InputError(
            f"axes must hold one Axes for each of the panels {chosen}; {missing[0]!r} is missing. Give it, or name other panels."
        )
    run = _Run(dataset, places.values.astype(float), scale, show_chance, show_limit, layers)
    for name in chosen:
        ax = axes[name]
        _DRAW[name](run, ax)
        for place in run.x[~measured & np.isfinite(run.x)]:
            ax.axvline(place, color=common.FAINT, linewidth=0.8, zorder=0.5)
        ax.set_xlabel("optimizer steps" if x == "step" else common.label(places))
        ax.margins(x=0.03)
        common.tidy(ax)
        if legend and len(common.named(ax)) > 1:
            common.legend_above(ax, common.named(ax))  # inside, it would hide the beginning or the end of a curve
    return {name: axes[name] for name in chosen}


def _choose_panels(dataset: Any, panels: Sequence[str] | None) -> list[str]:
    import xarray as xr

    if not isinstance(dataset, xr.Dataset):
        raise TypeError(f"plot.monitor draws the Dataset of fl.Monitor, monitor.result; got {type(dataset).__name__}.")
    known = [name for name, variable in PANELS.items() if variable in dataset]
    if panels is None:
        if not known:
            raise InputError(
                f"plot.monitor draws the result of fl.Monitor; this Dataset has none of its variables. {errors.nearest('loss', map(str, dataset.data_vars))}"
            )
        return known
    wanted = [panels] if isinstance(panels, str) else list(panels)
    for name in wanted or [""]:
        common.choose("panel", name, list(PANELS))
        if name not in known:
            raise InputError(
                f"The panel {name!r} was not measured; this result holds {', '.join(known) or 'none'}. Ask for it in quantities=."
            )
    return wanted


def _measured(dataset: xr.Dataset, panels: Sequence[str]) -> np.ndarray:
    """Which steps hold any finite number."""
    if "measured" in dataset:
        return dataset["measured"].values.astype(bool)
    found = [dataset[PANELS[name]].transpose("step", ...).values.astype(float) for name in panels]
    return np.any([np.isfinite(values).reshape(len(values), -1).any(axis=1) for values in found], axis=0)


def _new_axes(panels: Sequence[str]) -> dict[str, Axes]:
    import matplotlib.pyplot as plt

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = plt.figure(figsize=(4.3 * columns, 3.2 * rows + 0.2), layout="constrained")
    return {name: figure.add_subplot(rows, columns, place + 1) for place, name in enumerate(panels)}


class _Run:
    """The numbers of one run and how to draw them."""

    def __init__(
        self,
        dataset: xr.Dataset,
        x: np.ndarray,
        scale: str,
        show_chance: bool,
        show_limit: bool,
        layers: Sequence[str] | None,
    ):
        self.dataset, self.x, self.scale = dataset, x, scale
        self.show_chance, self.show_limit, self.layers = show_chance, show_limit, layers

    def read(self, name: str, *dims: str) -> xr.DataArray:
        return common.read(self.dataset, name, caller="monitor", source=_SOURCE, needs=("step", *dims))

    def values(self, name: str) -> np.ndarray | None:
        """A variable over step alone; None where it is absent or nowhere finite."""
        if name not in self.dataset:
            return None
        values = self.read(name).values.astype(float)
        return values if np.isfinite(values).any() else None

    def line(self, ax: Axes, values: np.ndarray, **look: Any) -> None:
        marker = "o" if np.isfinite(values).sum() <= _FEW else None
        ax.plot(self.x, values, **({"linewidth": 1.6, "marker": marker, "markersize": 3.2} | look))

    def chance(self, ax: Axes, name: str, text: str, style: Any = _DASHED) -> None:
        values = self.values(name)
        if self.show_chance and values is not None:
            self.line(ax, values, color=common.FAINT, linewidth=1.1, linestyle=style, marker=None, label=text)

    def set_scale(self, ax: Axes, values: np.ndarray, *, always: bool = False) -> None:
        """Choose the scale of the vertical axis by the numbers on it."""
        good = values[np.isfinite(values)]
        positive = good[good > 0]
        wide = len(positive) and (always or positive.max() > 10 * positive.min())
        if self.scale == "log" or (self.scale == "auto" and wide and (always or good.min() > 0)):
            ax.set_yscale("log")


def _loss(run: _Run, ax: Axes) -> None:
    array = run.read("loss")
    values = array.values.astype(float)
    run.line(ax, values, color=common.INK)
    run.set_scale(ax, values)
    ax.set_ylabel(common.wrap(common.label(array), common.span(ax, "y")))


def _trace(run: _Run, ax: Axes) -> None:
    array = run.read("trace", "layer")
    known = common.entries(array, "layer")
    parts = [name for name in known if name != common.WHOLE]
    wanted = run.layers
    if wanted is None:
        wanted = [*(parts if 1 < len(parts) <= len(common.PALETTE) else []), common.WHOLE]
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    for name in wanted or [""]:
        if name not in known:
            raise InputError(errors.UNKNOWN_NAME.format(what="layer", name=name, hint=errors.nearest(name, known)))
    shades = dict(zip(parts, common.colors(len(parts)), strict=True))
    names = dict(zip(parts, common.shorten(parts, 18), strict=True)) if parts else {}
    values = array.values.astype(float)
    for name in wanted:
        whole = name == common.WHOLE
        look = {"color": common.INK, "linewidth": 2.0} if whole else {"color": shades[name]}
        run.line(ax, values[:, known.index(name)], label="whole network" if whole else names[name], **look)
    run.set_scale(ax, values[:, [known.index(name) for name in wanted]])
    ax.set_ylabel(common.wrap(common.label(array), common.span(ax, "y")))


def _eigenvalue(run: _Run, ax: Axes) -> None:
    array = run.read("eigenvalue", "rank")
    values = array.values.astype(float)
    positive = np.where(values > 0, values, np.nan) if run.scale != "linear" else values
    count = values.shape[1]
    for rank, shade in enumerate(common.colors(count, ordered=True)[::-1]):
        told = "largest" if not rank else f"{_ordinal(count)} largest" if rank == count - 1 else None
        run.line(ax, positive[:, rank], color=shade, linewidth=1.3, markersize=2.4, label=told)
    limit = run.values("stability_limit")
    if run.show_limit and limit is not None:
        run.line(
            ax,
            limit,
            color=common.PALETTE[1],
            linestyle=_DASHED,
            marker=None,
            label="stability limit",
        )
    run.set_scale(ax, values, always=True)
    ax.set_ylabel(common.wrap(common.label(array), common.span(ax, "y")))


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _effective_dimension(run: _Run, ax: Axes) -> None:
    array = run.read("effective_dimension")
    low, high = run.values("effective_dimension_low"), run.values("effective_dimension_high")
    if low is not None and high is not None and (high > low).any():
        ax.fill_between(run.x, low, high, color=common.PALETTE[0], alpha=0.18, linewidth=0, label="interval")
    run.line(ax, array.values.astype(float), color=common.PALETTE[0], label="value")
    ax.set_ylim(bottom=0)
    ax.set_ylabel(common.wrap(common.label(array), common.span(ax, "y")))


def _alignment(run: _Run, ax: Axes) -> None:
    array = run.read("alignment")
    run.line(ax, array.values.astype(float), color=common.PALETTE[2], label="gradient")
    run.chance(ax, "alignment_chance_in_rows", "random, row space", _DOTTED)
    run.chance(ax, "chance", "random")
    ax.set_ylim(-0.03, 1.03)
    ax.set_ylabel(common.wrap(common.label(array), common.span(ax, "y")))


def _drift(run: _Run, ax: Axes) -> None:
    for name, text, shade in (
        ("overlap_previous", "previous measurement", common.PALETTE[0]),
        ("overlap_first", "first measurement", common.PALETTE[1]),
    ):
        values = run.values(name)
        if values is not None:
            run.line(ax, values, color=shade, label=text)
    run.chance(ax, "chance", "random spaces")
    ax.set_ylim(-0.03, 1.03)
    ax.set_ylabel(common.wrap("overlap of leading eigenspaces", common.span(ax, "y")))


def _coupling(run: _Run, ax: Axes) -> None:
    array = run.read("coupling", "block_i", "block_j")
    values, names = array.values.astype(float), common.shorten(common.entries(array, "block_i"), 14)
    rows, columns = np.triu_indices(len(names), 1)
    pairs = values[:, rows, columns]
    seen = np.isfinite(pairs).all(axis=1)
    if pairs.shape[1]:
        strongest = np.argsort(-pairs[seen].mean(axis=0), kind="stable")[:_MOST_PAIRS]
        for place, shade in zip(strongest, common.colors(len(strongest)), strict=True):
            run.line(ax, pairs[:, place], color=shade, label=f"{names[rows[place]]} – {names[columns[place]]}")
        if run.show_chance and "coupling_floor" in run.dataset:
            floors = run.read("coupling_floor", "block_i", "block_j").values.astype(float)[:, rows, columns]
            run.line(
                ax,
                floors[:, strongest].mean(axis=1),
                **{"color": common.FAINT, "linewidth": 1.1, "linestyle": _DASHED, "marker": None, "label": "by chance"},
            )
    ax.set_ylim(-0.03, 1.03)
    ax.set_ylabel(common.wrap(common.label(array), common.span(ax, "y")))


def _share_of_time(run: _Run, ax: Axes) -> None:
    array = run.read("share_of_time")
    run.line(ax, 100 * array.values.astype(float), color=common.INK)
    ax.set_ylim(bottom=0)
    ax.set_ylabel(common.wrap(f"{array.attrs.get('long_name', 'share of the time')} [%]", common.span(ax, "y")))


_DRAW: dict[str, Callable[[_Run, Any], None]] = {
    "loss": _loss,
    "trace": _trace,
    "eigenvalue": _eigenvalue,
    "effective_dimension": _effective_dimension,
    "alignment": _alignment,
    "drift": _drift,
    "coupling": _coupling,
    "share_of_time": _share_of_time,
}
