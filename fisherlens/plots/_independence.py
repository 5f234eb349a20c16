"""What each partition keeps of the Fisher: one quantity per Axes, or several side by side."""

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

PANELS = ("natural_gradient_cosine", "energy_captured", "decrease_ratio", "condition_number")

_FLOOR = "energy_noise_floor"
_IDEAL = {  # the value that no approximation at all would have
    "natural_gradient_cosine": 1.0,
    "energy_captured": 1.0,
    "decrease_ratio": 1.0,
    "condition_number": 1.0,
    "metric_cosine": 1.0,
    "mu_max": 1.0,
    "mu_min": 1.0,
    "kl_divergence": 0.0,
}
_LOGARITHMIC = (
    "condition_number",
    "mu_max",
    "mu_min",
    "predicted_steps",
    "num_blocks",
    "largest_block",
    "storage_bytes",
)
_MOST_BARS = 60  # bars up to which their tops can be read; more become points
_NO_LOG = (
    "plot.independence(scale='log') found no value above zero in {name!r}. Use scale='linear', or look at the values."
)
_ONE_LAYER = "plot.independence(over='damping') draws one line per partition, for one layer; got layers={layers}. Choose one of them, 'all' being the whole network."
_ONE_FIGURE = (
    "plot.independence_panels draws into the Axes of every variable or of none; axes lacks {missing!r}. "
    "Pass a dict variable -> Axes for {variables}."
)


def independence(
    dataset: xr.Dataset,
    ax: Axes | None = None,
    *,
    variable: str = "natural_gradient_cosine",
    layers: Sequence[str] | None = None,
    over: str = "layer",
    scale: str = "auto",
    show_floor: bool = True,
    show_ideal: bool = True,
    legend: bool = True,
) -> Axes:
    """Draw one quantity of every partition, in a group of bars for the whole network and for each layer, or against the damping.

    More than 60 bars become points. On a logarithmic axis, where the length of a bar means nothing, points are drawn at
    any number. A missing bar is a value that was not computed (NaN). With ``over="damping"`` every partition is a line.

    Parameters
    ----------
    dataset
        What :func:`fisherlens.independence` returns, over (partition, layer).
    ax
        Axes to draw on; None for those of a new figure.
    variable
        Any variable of the result over these dims, such as ``"energy_captured"``, ``"condition_number"``.
    layers
        Names of the layers to draw, ``"all"`` being the whole network; None for every one, or over dampings for ``"all"``.
    over
        ``"layer"``, or ``"damping"`` for a result with several dampings and one layer of it.
    scale
        ``"linear"``, ``"log"``, or ``"auto"``: logarithmic for condition number, block counts and sizes and storage.
    show_floor
        With ``energy_captured``: mark what a random partition with the same block sizes captures on average.
    show_ideal
        Draw the value of the full Fisher, where one exists.
    legend
        Name the partitions.

    Returns
    -------
    The Axes.

    Raises
    ------
    InputError: an unknown variable, layer or scale, a further dim (such as ``damping``), several layers over dampings, or nothing above
    zero on a logarithmic axis. TypeError: not a Dataset.

    Examples
    --------
    >>> import xarray as xr
    >>> cosine = (("partition", "layer"), [[0.9], [0.7]], {"long_name": "cosine"})
    >>> names = {"partition": ["layer", "unit"], "layer": ["all"]}
    >>> independence(xr.Dataset({"natural_gradient_cosine": cosine}, names)).get_ylabel()
    'cosine'
    """
    common.choose("scale", scale, ("auto", "linear", "log"))
    if common.choose("value of over", over, ("layer", "damping")) == "damping":
        return over_damping(dataset, ax, variable, layers, scale, show_ideal, legend)
    array = common.read(
        dataset, variable, caller="independence", source="fl.independence", needs=("partition", "layer")
    )
    floor = dataset.get(_FLOOR) if variable == "energy_captured" and show_floor else None
    if floor is not None:
        floor = common.fit(floor, caller="independence", needs=("partition", "layer"))
    chosen = _choose_layers(common.entries(array, "layer"), layers)
    names = [common.entries(array, "layer")[place] for place in chosen]
    partitions = common.entries(array, "partition")
    values = array.values.astype(float)[:, chosen]
    scale = _choose_scale(variable, values, scale)
    bars = scale == "linear" and values.size <= _MOST_BARS
    ax = common.new_axes(ax, float(np.clip(2.0 + 0.17 * values.size, 6.0, 11.0)), 4.2)
    places = np.arange(len(names)) + (0.35 if common.WHOLE in names[:1] else 0.0) * (np.arange(len(names)) > 0)
    ax.set_xlim(places[0] - 0.6, places[-1] + 0.6)
    width = 0.84 / len(partitions)
    for number, (partition, (shade, turn)) in enumerate(zip(partitions, common.cycle(len(partitions)), strict=True)):
        x = places + (number - (len(partitions) - 1) / 2) * width
        if bars:
            hatch = common.HATCHES[turn % len(common.HATCHES)]
            ax.bar(
                x,
                values[number],
                width=0.92 * width,
                color=shade,
                hatch=hatch,
                edgecolor="white",
                linewidth=0,
                label=partition,
            )
        else:
            good = np.isfinite(values[number]) & ((values[number] > 0) | (scale == "linear"))
            marker = common.MARKERS[number % len(common.MARKERS)]
            ax.plot(
                x[good],
                values[number][good],
                linestyle="none",
                marker=marker,
                markersize=6,
                color=shade,
                label=partition,
            )
        if floor is not None:
            _mark_floor(ax, x, floor.values.astype(float)[number, chosen], width, first=number == 0)
    _frame(ax, array, values, scale, places, names, show_ideal)
    if legend:
        common.legend_above(ax, _ordered(ax, partitions))
    return ax


def over_damping(
    dataset: xr.Dataset,
    ax: Axes | None,
    variable: str,
    layers: Sequence[str] | None,
    scale: str,
    show_ideal: bool,
    legend: bool,
) -> Axes:
    """One line per partition against the damping, for one layer."""
    needs = ("partition", "layer", "damping")
    array = common.read(dataset, variable, caller="independence", source="fl.independence", needs=needs)
    known = common.entries(array, "layer")
    chosen = _choose_layers(known, [common.WHOLE] if layers is None else layers)
    if len(chosen) > 1:
        raise InputError(_ONE_LAYER.format(layers=[known[place] for place in chosen]))
    values = array.values.astype(float)[:, chosen[0]]
    scale = _choose_scale(variable, values, scale)
    ax = common.new_axes(ax, 6.4, 4.2)
    partitions, dampings = common.entries(array, "partition"), array["damping"].values
    for number, (partition, (shade, turn)) in enumerate(zip(partitions, common.cycle(len(partitions)), strict=True)):
        good = np.isfinite(values[number]) & ((values[number] > 0) | (scale == "linear"))
        marker, style = common.MARKERS[number % len(common.MARKERS)], common.STYLES[turn % len(common.STYLES)]
        look = {"color": shade, "linestyle": style, "marker": marker, "markersize": 5, "linewidth": 1.6}
        ax.plot(dampings[good], values[number][good], label=partition, **look)
    ax.set_xscale("log")
    ideal = _IDEAL.get(variable)
    if scale == "log":
        ax.set_yscale("log")
    elif ideal == 1.0 and np.nanmax(values, initial=0.0) <= 1.0:
        ax.set_ylim(min(0.0, np.nanmin(values, initial=0.0) * 1.05), 1.06)
    if ideal is not None and show_ideal:
        ax.axhline(ideal, color=common.FAINT, linewidth=1.0, linestyle=(0, (4, 2)), zorder=1, label="full Fisher")
    layer = known[chosen[0]]
    ax.set_xlabel("damping λ [nat]" if layer == common.WHOLE else f"damping λ [nat], layer {layer}")
    ax.set_ylabel(common.wrap(common.label(array), common.span(ax, "y")))
    common.tidy(ax)
    if legend:
        common.legend_above(ax, _ordered(ax, partitions))
    return ax


def _choose_scale(variable: str, values: np.ndarray, scale: str) -> str:
    if scale == "auto":
        scale = "log" if variable in _LOGARITHMIC and (values > 0).any() else "linear"
    if scale == "log" and not (values > 0).any():
        raise InputError(_NO_LOG.format(name=variable))
    return scale


def independence_panels(
    dataset: xr.Dataset,
    axes: Mapping[str, Axes] | None = None,
    *,
    variables: Sequence[str] = PANELS,
    layers: Sequence[str] | None = None,
    legend: bool = True,
) -> dict[str, Axes]:
    """Draw several quantities of every partition, one panel each, with one legend.

    Parameters
    ----------
    dataset
        What :func:`fisherlens.independence` returns, over (partition, layer).
    axes
        Variable → Axes to draw on; None for those of a new figure with two panels in a row.
    variables
        Quantities to draw, in order; the default shows direction, energy, progress and conditioning.
    layers
        As in :func:`independence`.
    legend
        Name the partitions, once.

    Returns
    -------
    Variable → Axes.

    Raises
    ------
    InputError: as :func:`independence`; or ``axes`` without one of the variables. TypeError: not a Dataset.

    Examples
    --------
    >>> import xarray as xr
    >>> names = {"partition": ["layer", "unit"], "layer": ["all"]}
    >>> results = xr.Dataset({"num_blocks": (("partition", "layer"), [[1], [8]])}, names)
    >>> list(independence_panels(results, variables=["num_blocks"]))
    ['num_blocks']
    """
    variables = list(variables)
    own = axes is None
    if axes is None:
        first = common.read(
            dataset, variables[0], caller="independence_panels", source="fl.independence", needs=("partition", "layer")
        )
        axes = _panel_axes(variables, first.sizes["partition"], first.sizes["layer"] if layers is None else len(layers))
    missing = common.lacking(axes, variables)
    if missing:
        raise InputError(_ONE_FIGURE.format(missing=missing[0], variables=variables))
    drawn = {name: independence(dataset, axes[name], variable=name, layers=layers, legend=False) for name in variables}
    for ax in list(drawn.values())[:-1] if own else []:
        if ax.get_subplotspec().get_gridspec().ncols == 1:  # stacked panels share the names below the last
            ax.tick_params(axis="x", labelbottom=False)
            ax.set_xlabel("")
    if legend:
        partitions = common.entries(dataset, "partition")
        handles = {h.get_label(): h for ax in reversed(drawn.values()) for h in _ordered(ax, partitions)}
        rank = {name: place for place, name in enumerate(partitions)}
        ordered = sorted(handles.values(), key=lambda handle: rank.get(handle.get_label(), len(rank)))
        common.legend_above(drawn[variables[0]], ordered, figure=own)
    return drawn


def _ordered(ax: Axes, partitions: list[str]) -> list[Any]:
    """The partitions' handles first, then reference lines."""
    return sorted(common.named(ax), key=lambda handle: handle.get_label() not in partitions)


def _panel_axes(variables: list[str], partitions: int, layers: int) -> dict[str, Axes]:
    """Two panels in a row while bars fit them, else one above the other."""
    import matplotlib.pyplot as plt

    columns = 1 if partitions * layers > _MOST_BARS or len(variables) == 1 else 2
    rows = -(-len(variables) // columns)
    width = float(np.clip(1.2 + 0.13 * partitions * layers, 4.4, 10.0 / columns + 1))
    height = (2.2 * rows + 1.6) if columns == 1 else 3.0 * rows + 0.4
    figure = plt.figure(figsize=(width * columns, height), layout="constrained")
    return {name: figure.add_subplot(rows, columns, place + 1) for place, name in enumerate(variables)}


def _choose_layers(known: list[str], wanted: Sequence[str] | None) -> list[int]:
    """Places of the layers to draw, the whole network first."""
    if wanted is None:
        return sorted(range(len(known)), key=lambda place: known[place] != common.WHOLE)
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    for name in wanted or [""]:
        if name not in known:
            raise InputError(errors.UNKNOWN_NAME.format(what="layer", name=name, hint=errors.nearest(name, known)))
    return [known.index(name) for name in wanted]


def _mark_floor(ax: Axes, x: np.ndarray, floor: np.ndarray, width: float, *, first: bool) -> None:
    text = "random partition, same sizes" if first else None
    ax.hlines(floor, x - width / 2, x + width / 2, color="white", linewidth=3.2, zorder=3)
    ax.hlines(floor, x - width / 2, x + width / 2, color=common.INK, linewidth=1.6, zorder=4, label=text)


def _frame(
    ax: Axes,
    array: xr.DataArray,
    values: np.ndarray,
    scale: str,
    places: np.ndarray,
    names: list[str],
    show_ideal: bool,
) -> None:
    ideal = _IDEAL.get(str(array.name))
    if scale == "log":
        ax.set_yscale("log")
        ax.margins(y=0.12)
    elif ideal == 1.0 and np.nanmax(values, initial=0.0) <= 1.0:
        ax.set_ylim(min(0.0, np.nanmin(values, initial=0.0) * 1.05), 1.06)
    if ideal is not None and show_ideal:
        ax.axhline(ideal, color=common.FAINT, linewidth=1.0, linestyle=(0, (4, 2)), zorder=1, label="full Fisher")
    if len(names) > 1 and names[0] == common.WHOLE:  # set apart: it is no layer
        ax.axvline((places[0] + places[1]) / 2, color=common.GRID, linewidth=1.0)
    ax.set_ylabel(common.wrap(common.label(array), common.span(ax, "y")))
    ax.set_xlabel("layer")
    common.tidy(ax, grid="y")
    short = iter(common.shorten([name for name in names if name != common.WHOLE]))
    common.name_ticks(
        ax, "x", list(places), ["whole\nnetwork" if name == common.WHOLE else next(short) for name in names]
    )
