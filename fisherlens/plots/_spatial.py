"""Pictures of what the places in a convolution have to do with each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fisherlens.errors import InputError
from fisherlens.plots import _common as common
from fisherlens.plots import _coupling as pairs

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

_OFFSETS = ("offset_i", "offset_j")
_MISSING = (
    "plot.spatial_coupling draws the panels {panels}; axes has no entry {missing!r}. Pass axes=None for a new figure, or a dict with "
    "one Axes for each panel."
)


def spatial_coupling(
    dataset: xr.Dataset, axes: Mapping[str, Axes] | None = None, *, annotate: bool | None = None, legend: bool = True
) -> dict[str, Axes]:
    """Draw the coupling of places in a kernel, the correlation inside one kernel, and both shares and couplings by distance of output positions.

    Parameters
    ----------
    dataset
        What :func:`fisherlens.spatial_coupling` returns.
    axes
        Panel → Axes to draw on, ``"kernel"``, ``"correlation"`` and ``"distance"``; None for those of a new figure. The first two are left out where the
        layer has no kernel.
    annotate
        Write the numbers into the cells; None for up to 12 places.
    legend
        Name what is drawn by distance, and the noise floor.

    Returns
    -------
    Panel → Axes.

    Raises
    ------
    InputError: no ``trace_share`` over ``distance``, or ``axes`` without one of the panels. TypeError: not a Dataset.

    Examples
    --------
    >>> import xarray as xr
    >>> found = xr.Dataset({"trace_share": ("distance", [0.7, 0.2, 0.1])}, {"distance": [0, 1, 2]})
    >>> list(spatial_coupling(found))
    ['distance']
    """
    share = common.read(
        dataset, "trace_share", caller="spatial_coupling", source="fl.spatial_coupling", needs=("distance",)
    )
    panels = ["kernel", "correlation"] if "kernel_coupling" in dataset else []
    panels.append("distance")
    if axes is None:
        axes = _new(panels, dataset)
    missing = common.lacking(axes, panels)
    if missing:
        raise InputError(_MISSING.format(panels=panels, missing=missing[0]))
    if "kernel" in panels:
        _places(axes["kernel"], dataset, "kernel_coupling", annotate, legend)
        _places(axes["correlation"], dataset, "kernel_correlation", annotate, legend)
    _by_distance(axes["distance"], dataset, share, legend)
    return {name: axes[name] for name in panels}


def _new(panels: list[str], dataset: xr.Dataset) -> dict[str, Axes]:
    import matplotlib.pyplot as plt

    places = dataset.sizes.get("offset_i", 0)
    side = float(np.clip(0.34 * places + 1.6, 3.6, 6.4))
    widths = [*[side + 1.0] * (len(panels) - 1), 5.2]
    _, row = plt.subplots(
        1, len(panels), figsize=(sum(widths), max(side, 3.6)), width_ratios=widths, layout="constrained", squeeze=False
    )
    return dict(zip(panels, row[0], strict=True))


def _places(ax: Axes, dataset: xr.Dataset, variable: str, annotate: bool | None, legend: bool) -> None:
    array = common.read(dataset, variable, caller="spatial_coupling", source="fl.spatial_coupling", needs=_OFFSETS)
    values = array.values.astype(float)
    count = len(values)
    image = pairs.draw(ax, values, excess=False)
    if variable == "kernel_correlation":
        from matplotlib import colormaps

        image.set_cmap(colormaps["RdBu_r"].with_extremes(bad="#E3E3E3"))
        image.set_clim(-1, 1)
    if annotate or (annotate is None and count <= pairs.MOST_NUMBERS):
        pairs.write(ax, values, image)
    names = common.entries(array, "offset_i")
    for axis in "xy":
        common.name_ticks(ax, axis, range(count), names)
    ax.set_xlabel("place in the kernel (row,column)" if names and names[0].count(",") == 1 else "place in the kernel")
    ax.set_ylabel("place in the kernel")
    floor = None
    if variable == "kernel_coupling" and "kernel_noise_floor" in dataset and count > 1 and legend:
        floor = dataset["kernel_noise_floor"].transpose(*_OFFSETS).values[~np.eye(count, dtype=bool)]
    handles = pairs.bar(ax, image, common.wrap(common.label(array), common.span(ax, "y")), floor)
    if legend:
        common.legend(ax, handles, **common.ABOVE)


def _by_distance(ax: Axes, dataset: xr.Dataset, share: xr.DataArray, legend: bool) -> None:
    distance = share["distance"].values.astype(float)
    common.tidy(ax, grid="y")
    own = float(share.values[0]) if len(distance) else np.nan
    ax.bar(
        distance,
        share.values,
        width=0.8,
        color="#BFD7EA",
        zorder=1.5,
        label=f"share of the trace ({100 * own:.0f} % at distance 0)",
    )
    ax.axhline(0, color=common.FAINT, linewidth=0.8)
    for variable, style in _LINES.items():
        if variable in dataset:
            array = common.fit(dataset[variable], caller="spatial_coupling", needs=("distance",))
            ax.plot(distance, array.values, label=common.label(array), **style)
    ax.set_xlabel("distance of two output positions")
    ax.set_ylabel("share or coupling")
    if len(distance) <= 16:
        ax.set_xticks(distance)
    if legend:
        common.legend(ax, **common.ABOVE)


_LINES: dict[str, dict[str, Any]] = {
    "position_coupling": {
        "color": common.PALETTE[0],
        "marker": "o",
        "markersize": 4.5,
        "linewidth": 1.4,
        "zorder": 2.2,
    },
    "position_noise_floor": {"color": common.PALETTE[1], "linestyle": (0, (5, 1.5)), "linewidth": 1.4, "zorder": 2.1},
}
