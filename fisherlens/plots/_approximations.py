"""Stand-ins for the Fisher side by side: what each gets wrong, and how good a step it gives."""

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

PANELS = ("error", "step")
_SPLIT = {"dropped_coupling": "coupling that was dropped", "within_block_error": "error inside the blocks"}
_STEP = {"decrease_ratio": "decrease ratio", "natural_gradient_cosine": "cosine of the natural gradients"}
_SOURCE = "fl.compare_approximations"
_MISSING_AXES = "plot.approximations draws into the Axes of every panel or of none; axes lacks {missing!r}. Pass a dict panel -> Axes for {panels}."


def approximations(
    dataset: xr.Dataset,
    axes: Mapping[str, Axes] | None = None,
    *,
    panels: Sequence[str] = PANELS,
    layer: str = common.WHOLE,
    damping: float | None = None,
    legend: bool = True,
) -> dict[str, Axes]:
    """Draw the error of every approximation, split in two, and beside it how good its natural-gradient step is.

    The length of a bar in ``error`` is ‖F - F̂‖²/‖F‖², so that both parts add up. In ``step`` 1 is the exact natural gradient. A missing mark
    is a value that was not computed (NaN).

    Parameters
    ----------
    dataset
        What :func:`fisherlens.compare_approximations` returns.
    axes
        Panel → Axes to draw on; None for those of a new figure.
    panels
        ``"error"`` and ``"step"``, or one of them.
    layer
        The layer, or ``"all"`` for the whole network.
    damping
        Which damping, where the result has several; the nearest is taken. None for the middle one.
    legend
        Name the parts and the measures.

    Returns
    -------
    Panel → Axes.

    Raises
    ------
    InputError: an unknown panel or layer, Axes missing, a damping where the result has one only, or a Dataset without the variables. TypeError: not
    a Dataset.

    Examples
    --------
    >>> import xarray as xr
    >>> names = {"approximation": ["KFAC", "diagonal"], "layer": ["all"]}
    >>> over = ("approximation", "layer")
    >>> ds = xr.Dataset({"dropped_coupling": (over, [[0.1], [0.7]]), "within_block_error": (over, [[0.2], [0.0]])}, names)
    >>> list(approximations(ds, panels=["error"]))
    ['error']
    """
    panels = [common.choose("panel", panel, PANELS) for panel in panels]
    first = next(iter(_SPLIT if panels[0] == "error" else _STEP))
    array = common.read(
        dataset, first, caller="approximations", source=_SOURCE, needs=("approximation", "layer"), may=("damping",)
    )
    names, known = common.entries(array, "approximation"), common.entries(array, "layer")
    if layer not in known:
        raise InputError(errors.UNKNOWN_NAME.format(what="layer", name=layer, hint=errors.nearest(str(layer), known)))
    dataset = _one_damping(dataset, damping).isel(layer=known.index(layer))
    own = axes is None
    if axes is None:
        axes = _new_axes(panels, names)
    missing = common.lacking(axes, panels)
    if missing:
        raise InputError(_MISSING_AXES.format(missing=missing[0], panels=panels))
    for at, panel in enumerate(panels):
        draw = _error if panel == "error" else _step
        draw(dataset, axes[panel], names, legend)
        if own and at:  # side by side panels share the names at the left
            axes[panel].tick_params(axis="y", labelleft=False)
    return {panel: axes[panel] for panel in panels}


def _one_damping(dataset: xr.Dataset, damping: float | None) -> xr.Dataset:
    if "damping" not in dataset.dims:
        if damping is not None:
            raise InputError(
                f"plot.approximations(damping={damping!r}) chooses among several dampings; this result has one. Leave damping= out."
            )
        return dataset
    values = np.log(dataset["damping"].values)
    place = len(values) // 2 if damping is None else int(np.abs(values - np.log(damping)).argmin())
    return dataset.isel(damping=place)


def _new_axes(panels: Sequence[str], names: Sequence[str]) -> dict[str, Axes]:
    import matplotlib.pyplot as plt

    height = float(np.clip(1.3 + 0.36 * len(names), 2.4, 9.0))
    figure = plt.figure(figsize=(4.6 * len(panels) + 0.8, height), layout="constrained")
    return {panel: figure.add_subplot(1, len(panels), at + 1) for at, panel in enumerate(panels)}


def _values(dataset: xr.Dataset, variable: str) -> np.ndarray:
    found = common.read(dataset, variable, caller="approximations", source=_SOURCE, needs=("approximation",))
    return found.values.astype(float)


def _error(dataset: xr.Dataset, ax: Axes, names: Sequence[str], legend: bool) -> None:
    places, left = np.arange(len(names)), np.zeros(len(names))
    for (variable, words), shade, hatch in zip(_SPLIT.items(), common.PALETTE, (None, "////"), strict=False):
        values = _values(dataset, variable)
        width = np.nan_to_num(values)
        ax.barh(
            places, width, left=left, height=0.62, color=shade, hatch=hatch, edgecolor="white", linewidth=0, label=words
        )
        left = left + width
    for place in places[~np.isfinite(_values(dataset, "within_block_error"))]:
        _not_computed(ax, place)
    ax.set_xlim(0, 1.04 * max(left.max(initial=0.0), 1e-12))
    _frame(ax, names, "squared error over ‖F‖²", legend)


def _step(dataset: xr.Dataset, ax: Axes, names: Sequence[str], legend: bool) -> None:
    places, lowest = np.arange(len(names)), 0.0
    shades = (common.PALETTE[2], common.PALETTE[3])
    for (variable, words), shade, marker in zip(_STEP.items(), shades, common.MARKERS, strict=False):
        if variable not in dataset:
            continue
        values = _values(dataset, variable)
        lowest = min(lowest, np.nanmin(values, initial=0.0))
        ax.plot(values, places, linestyle="none", marker=marker, markersize=7, color=shade, label=words, zorder=3)
    ax.hlines(places, min(lowest, 0.0), 1.0, color=common.GRID, linewidth=0.8, zorder=0)
    ax.axvline(1.0, color=common.FAINT, linewidth=1.0, linestyle=(0, (4, 2)), zorder=1, label="exact natural gradient")
    for place in places[~np.isfinite(_values(dataset, next(iter(_STEP))))]:
        _not_computed(ax, place)
    ax.set_xlim(1.04 * lowest - 0.01, 1.04)
    _frame(ax, names, "share of the exact step, or cosine to it", legend)


def _not_computed(ax: Axes, place: Any) -> None:
    ax.annotate(
        "not computed", (0.02, place), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=common.FAINT
    )


def _frame(ax: Axes, names: Sequence[str], text: str, legend: bool) -> None:
    ax.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    ax.set_xlabel(common.wrap(text, common.span(ax, "x")))
    common.tidy(ax, grid="x")
    common.name_ticks(ax, "y", list(range(len(names))), names)
    if legend:
        common.legend_above(ax, common.named(ax))
