"""Where the information sits: bars per layer, sorted curves for units and parameters, maps over training."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from fisherlens.errors import InputError
from fisherlens.plots import _common as common

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

_PLURAL = {"unit": "units", "kernel": "kernels", "channel": "channels", "param": "parameters"}
_PARTS = ("layer", "unit", "kernel", "channel", "param")
_ZERO = "#D9D9D9"  # of what tells nothing at all
_SHARES = ("information", "share")  # variables that the share describes
_ONE_DIM = (
    "plot.information draws {name!r} over one of the dims 'layer', 'unit', 'kernel', 'channel' or 'param', and 'stage' or 'step' at will; "
    "it has the dims {dims} here. Select one entry of the others first, with dataset.sel(...)."
)
_NO_LOG = (
    "plot.information(scale='log') found no value above zero in {name!r}. Use scale='linear', or look at the values: "
    "zero information means that no output depends on the parameter."
)


def information(
    dataset: xr.Dataset,
    ax: Axes | None = None,
    *,
    variable: str = "information",
    scale: str = "auto",
    top: int | None = None,
    annotate: bool = True,
    legend: bool = True,
) -> Axes:
    """Draw the information of each layer as bars, of each unit, kernel, channel or parameter as curves sorted by size, and of many steps as a map.

    The entry "all" of a layer dim is left out: it is the sum or the whole of the others. Curves are one per layer where
    the coordinate ``layer`` is present; entries that are zero have no place on a logarithmic axis and are counted in
    the legend. Over the dim ``step`` of training (results joined by ``xr.concat``) the picture is a map: a row for each part, within a layer those that
    tell most at the last step on top, and a column for each step; grey is what tells nothing.

    Parameters
    ----------
    dataset
        What :func:`fisherlens.information` returns, over ``layer``, ``unit``, ``kernel``, ``channel`` or ``param``, and ``stage`` (stages of
        training, in order) or ``step`` at will.
    ax
        Axes to draw on; None for those of a new figure.
    variable
        ``"information"``, ``"share"``, ``"saliency"``, ``"effective_dimension"`` or ``"std_bound"``.
    scale
        ``"linear"``, ``"log"``, or ``"auto"``: linear for bars, logarithmic for curves that span more than a factor of
        100. On a logarithmic axis, where the length of a bar means nothing, layers are drawn as points.
    top
        Draw this many parts, those with the largest values, as bars with their names, sorted; None for all as above.
    annotate
        Write the ``share`` behind each bar of ``information``, else the value, where the bars leave room to read it.
    legend
        Name the stages, or the layers of the curves.

    Returns
    -------
    The Axes.

    Raises
    ------
    InputError: unknown variable or scale, dims other than those above, or nothing above zero on a logarithmic axis.
    TypeError: not a Dataset.

    Examples
    --------
    >>> import xarray as xr
    >>> ax = information(xr.Dataset({"information": ("layer", [3.0, 1.0])}, {"layer": ["0", "2"]}))
    >>> [float(bar.get_width()) for bar in ax.patches]
    [3.0, 1.0]
    """
    common.choose("scale", scale, ("auto", "linear", "log"))
    source = "fl.information"
    array = common.read(
        dataset,
        variable,
        caller="information",
        source=source,
        needs=(),
        may=(*_PARTS, "stage", "step"),
    )
    dims = [dim for dim in array.dims if dim not in ("stage", "step")]
    if len(dims) != 1 or {"stage", "step"} <= set(array.dims):
        raise InputError(_ONE_DIM.format(name=variable, dims=array.dims))
    array = array.transpose(*dims, ...)
    if top is not None:
        return _top(dataset, array, str(dims[0]), ax, scale, top, legend)
    if "step" in array.dims:
        return _map(array, str(dims[0]), ax, scale)
    if dims == ["layer"]:
        share = dataset["share"] if annotate and variable in _SHARES and "share" in dataset else None
        return _bars(array, share, ax, scale, annotate, legend)
    return _curves(dataset, array, str(dims[0]), ax, scale, legend)


def _bars(
    array: xr.DataArray, share: xr.DataArray | None, ax: Axes | None, scale: str, annotate: bool, legend: bool
) -> Axes:
    kept = [place for place, name in enumerate(common.entries(array, "layer")) if name != common.WHOLE] or [0]
    array = array.isel(layer=kept)
    names = common.entries(array, "layer")
    stages = common.entries(array, "stage") if "stage" in array.dims else [""]
    values = array.values.astype(float).reshape(len(names), len(stages))
    if share is not None:
        share = share.squeeze([dim for dim in share.dims if dim not in array.dims]).isel(layer=kept)
        shares = share.transpose(*array.dims).values.astype(float).reshape(values.shape)
    if scale == "log" and not (values > 0).any():
        raise InputError(_NO_LOG.format(name=array.name))
    row = max(0.3, 0.19 * len(stages))
    ax = common.new_axes(ax, 6.6, float(np.clip(1.2 + row * len(names), 2.6, 12.0)))
    ax.set_ylim(len(names) - 0.45, -0.55)  # the first layer on top, as a network is read
    shades = common.colors(len(stages), ordered=len(stages) > 1)
    height = 0.8 / len(stages)
    for stage, (name, shade) in enumerate(zip(stages, shades, strict=True)):
        places = np.arange(len(names)) + (stage - (len(stages) - 1) / 2) * height
        column = values[:, stage]
        if scale == "log":
            good = column > 0
            ax.plot(column[good], places[good], linestyle="none", marker="o", markersize=6, color=shade, label=name)
        else:
            ax.barh(places, column, height=0.94 * height, color=shade, label=name)
        if annotate:
            size = min(0.95 * common.span(ax, "y") / len(names) * height * 72, common.NOTE_SIZE)
            for layer, (place, value) in enumerate(zip(places, column, strict=True) if size >= 6 else ()):
                if np.isfinite(value) and not (scale == "log" and value <= 0):
                    text = f"{value:.3g}" if share is None else _percent(shares[layer, stage])
                    _note(ax, value, place, text, size, 7 if scale == "log" else 4)
    ax.set_xscale("log" if scale == "log" else "linear")
    ax.set_xlabel(
        common.label(array) + ("" if share is None else f"\n% = {share.attrs.get('long_name', 'share of tr F')}")
    )
    ax.set_ylabel("layer")
    common.tidy(ax, grid="x")
    ax.margins(x=0.16 if annotate else 0.05)
    common.name_ticks(ax, "y", range(len(names)), names)
    if legend and len(stages) > 1:
        common.legend_above(ax, common.named(ax))
    return ax


def _note(ax: Axes, x: float, y: float, text: str, size: float, gap: int) -> None:
    ax.annotate(text, (x, y), (gap, 0), textcoords="offset points", va="center", fontsize=size, color=common.INK)


def _percent(share: float) -> str:
    if not np.isfinite(share):
        return ""
    if 0 < share < 0.001:
        return "< 0.1 %"
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


def _curves(dataset: xr.Dataset, array: xr.DataArray, dim: str, ax: Axes | None, scale: str, legend: bool) -> Axes:
    stages = common.entries(array, "stage") if "stage" in array.dims else [""]
    owners = [str(name) for name in array["layer"].values] if "layer" in array.coords else [""] * array.sizes[dim]
    layers = list(dict.fromkeys(owners))
    values = array.values.astype(float).reshape(len(owners), len(stages))
    positive = values[values > 0]
    if scale == "auto":
        scale = "log" if positive.size and positive.max() > 100 * positive.min() else "linear"
    if scale == "log" and not positive.size:
        raise InputError(_NO_LOG.format(name=array.name))
    many = len(layers) > 7
    ax = common.new_axes(ax, 8.0 if many else 6.4, 4.4)
    shades = common.colors(len(layers)) if len(layers) > 1 else common.colors(len(stages), ordered=len(stages) > 1)
    for number, layer in enumerate(layers):
        for stage, name in enumerate(stages):
            column = values[np.array([owner == layer for owner in owners]), stage]
            column = np.sort(column[np.isfinite(column)])[::-1]
            drawn = column[column > 0] if scale == "log" else column
            text = " · ".join(part for part in (common.shorten([layer])[0] if layer else "", name) if part)
            zeros = int((column == 0).sum())
            text += f" ({zeros} of {len(column)} zero)" if zeros else ""
            ax.plot(
                np.arange(1, len(drawn) + 1),
                drawn,
                color=shades[number if len(layers) > 1 else stage],
                linestyle=common.STYLES[stage % len(common.STYLES)] if len(layers) > 1 else "-",
                linewidth=1.7,
                marker="o" if len(drawn) <= 40 and not many else None,
                markersize=3.5,
                label=text or "_",
            )
    if scale == "log":
        ax.set_yscale("log")
    if max(map(owners.count, layers)) > 100:
        ax.set_xscale("log")
    ax.set_xlabel(f"rank among the {_PLURAL.get(dim, dim)}{' of a layer' if len(layers) > 1 else ''} (1 = largest)")
    ax.set_ylabel(common.wrap(common.label(array), common.span(ax, "y")))
    common.tidy(ax)
    if legend and many:
        common.name_bar(ax, shades, layers, "layer")
    elif legend:
        common.legend(ax, loc="best")
    return ax


def _owners(array: xr.DataArray, dim: str) -> list[str]:
    """The layer of every part, as far as it is known."""
    if dim == "layer" or "layer" not in array.coords:
        return [""] * array.sizes[dim]
    return [str(name) for name in array["layer"].values]


def _top(
    dataset: xr.Dataset, array: xr.DataArray, dim: str, ax: Axes | None, scale: str, top: int, legend: bool
) -> Axes:
    """The largest entries as bars, sorted, the colour telling the layer."""
    from matplotlib.patches import Patch

    if not isinstance(top, int) or isinstance(top, bool) or top < 1:
        raise InputError(f"top must be an integer >= 1, the bars to draw, or None; got {top!r}.")
    if array.ndim > 1:
        raise InputError(_ONE_DIM.format(name=array.name, dims=array.dims))
    values = array.values.astype(float)
    names = common.entries(array, "param_name" if "param_name" in array.coords else dim)
    good = [
        place
        for place in np.argsort(-values, kind="stable")
        if np.isfinite(values[place]) and names[place] != common.WHOLE
    ]
    order = good[:top]
    drawn = values[order]
    if scale == "log" and not (drawn > 0).any():
        raise InputError(_NO_LOG.format(name=array.name))
    owners = _owners(array, dim)
    layers = list(dict.fromkeys(owners))
    tones = dict(zip(layers, common.colors(len(layers)), strict=True))
    ax = common.new_axes(ax, 6.6, float(np.clip(1.2 + 0.24 * len(order), 2.6, 12.0)))
    ax.set_ylim(len(order) - 0.45, -0.55)
    if scale == "log":
        ax.scatter(drawn, range(len(order)), color=[tones[owners[place]] for place in order], s=36, zorder=2)
        ax.set_xscale("log")
    else:
        ax.barh(range(len(order)), drawn, height=0.78, color=[tones[owners[place]] for place in order])
    ax.set_xlabel(common.wrap(f"{common.label(array)}, the {len(order)} largest of {len(good)}", common.span(ax, "x")))
    common.tidy(ax, grid="x")
    common.name_ticks(ax, "y", range(len(order)), [names[place] for place in order])
    shown = [layer for layer in layers if layer and any(owners[place] == layer for place in order)]
    if legend and 1 < len(shown) <= 12:
        common.legend(ax, [Patch(color=tones[layer], label=layer) for layer in shown], loc="lower right", title="layer")
    return ax


def _map(array: xr.DataArray, dim: str, ax: Axes | None, scale: str) -> Axes:
    """Parts by steps as a heat map, layer under layer."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize

    kept = [place for place, name in enumerate(common.entries(array, dim)) if name != common.WHOLE] or [0]
    array = array.isel({dim: kept}).transpose(dim, "step")
    values, owners = array.values.astype(float), _owners(array, dim)
    layers = list(dict.fromkeys(owners))
    last = np.nan_to_num(values[:, -1], nan=-np.inf)
    order = np.lexsort((-last, [layers.index(owner) for owner in owners])) if layers != [""] or dim != "layer" else None
    order = np.arange(len(values)) if order is None else order
    values = values[order]
    positive = values[values > 0]
    if scale == "log" and not positive.size:
        raise InputError(_NO_LOG.format(name=array.name))
    log = scale == "log" or (scale == "auto" and positive.size and positive.max() > 100 * positive.min())
    rows, columns = values.shape
    ax = common.new_axes(ax, float(np.clip(0.45 * columns + 3.0, 5.2, 9.0)), float(np.clip(0.3 * rows + 1.2, 2.6, 6.5)))
    high = values[np.isfinite(values)].max(initial=0.0) or 1.0
    norm = LogNorm(positive.min(), max(positive.max(), 1.01 * positive.min())) if log else Normalize(0.0, high)
    shown = np.ma.masked_where(~(values > 0), values)
    shades = colormaps["YlGnBu"].with_extremes(bad=_ZERO)
    image = ax.imshow(shown, cmap=shades, norm=norm, aspect="auto", interpolation="nearest")
    common.tidy(ax, grid=None)
    ax.spines[:].set_visible(False)
    common.name_ticks(
        ax,
        "x",
        range(columns),
        [f"{value:g}" if np.issubdtype(type(value), np.number) else str(value) for value in array["step"].values],
    )
    ax.set_xlabel("step")
    names = [common.entries(array, dim)[place] for place in order]
    if len(names) > 40 or dim == "param":
        sorted_owners = [owners[place] for place in order]
        edges = [0, *[i for i in range(1, rows) if sorted_owners[i] != sorted_owners[i - 1]], rows]
        for edge in edges[1:-1]:
            ax.axhline(edge - 0.5, color="white", linewidth=1.5)
        if layers != [""]:
            places = [(start + stop - 1) / 2 for start, stop in pairwise(edges)]
            common.name_ticks(ax, "y", places, [sorted_owners[start] for start in edges[:-1]])
        ax.set_ylabel(
            f"{_PLURAL.get(dim, dim)} by layer, the largest on top" if layers != [""] else _PLURAL.get(dim, dim)
        )
    else:
        common.name_ticks(ax, "y", range(rows), names)
        ax.set_ylabel(dim)
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.03)
    bar.outline.set_visible(False)
    bar.set_label(common.label(array) + (", grey: none" if np.ma.is_masked(shown) else ""), color=common.INK)
    bar.ax.tick_params(labelsize=common.TICK_SIZE, color=common.FAINT, labelcolor=common.INK)
    return ax
