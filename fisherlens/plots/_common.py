"""What the plots share: reading a Dataset, colours, labels that do not collide.

Nothing here, or in the other files of this package, imports torch; matplotlib and xarray are imported when a plot is drawn.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from fisherlens import errors
from fisherlens.errors import InputError

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

# Okabe and Ito's palette ("Color Universal Design", 2008) without its yellow, too faint for lines on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "*")
WHOLE = "all"  # the entry of a layer dim that stands for the whole network
INK, FAINT, GRID = "#333333", "#8A8A8A", "#E4E4E4"
STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1, 1, 1)))
HATCHES = (None, "////", "....", "xxxx")
TICK_SIZE, NOTE_SIZE = 9.0, 8.5
_FORMULA = re.compile(r"\$[^$]*\$")
_GLYPH = 0.6 / 72  # mean width of a character in inches, per point of font size


def read(
    dataset: Any, variable: str, *, caller: str, source: str, needs: Sequence[str], may: Sequence[str] = ()
) -> xr.DataArray:
    """The variable to draw, with the dims it needs first and then those it may have; entries of length one are dropped.

    Raises TypeError for what is no Dataset and InputError for one without the variable or with other dims.
    """
    import xarray as xr

    if not isinstance(dataset, xr.Dataset):
        hint = "Take one node of the tree: tree['name'].to_dataset()." if isinstance(dataset, xr.DataTree) else ""
        hint = hint or f"Pass the Dataset that {source} returns, or one that fl.load read."
        raise TypeError(f"plot.{caller} draws an xarray Dataset; got {type(dataset).__name__}. {hint}")
    if variable not in dataset:
        known = errors.nearest(variable, [str(name) for name in dataset.data_vars])
        raise InputError(
            f"plot.{caller} reads the variable {variable!r}, as {source} returns it; this Dataset has none of that name. {known}"
        )
    return fit(dataset[variable], caller=caller, needs=needs, may=may)


def fit(array: xr.DataArray, *, caller: str, needs: Sequence[str], may: Sequence[str] = ()) -> xr.DataArray:
    """Transpose to the dims a plot can draw; one more dim of several entries is an InputError that says how to select."""
    extra = [dim for dim in array.dims if dim not in (*needs, *may)]
    array = array.squeeze([dim for dim in extra if array.sizes[dim] == 1])
    missing = [dim for dim in needs if dim not in array.dims]
    if missing:
        raise InputError(
            f"plot.{caller} draws {array.name!r} over {', '.join(map(repr, needs))}; it has the dims {array.dims} here, "
            f"without {missing[0]!r}. Was that dim selected away? Pass the Dataset as the analysis returned it."
        )
    left = [dim for dim in array.dims if dim not in (*needs, *may)]
    if left:
        dim = left[0]
        first = array[dim].values[0].item() if dim in array.coords else 0
        select = f"sel({dim}={first!r})" if dim in array.coords else f"isel({dim}={first})"
        raise InputError(
            f"plot.{caller} draws {array.name!r} over {', '.join(map(repr, (*needs, *may)))}; here it also runs over {dim!r} "
            f"({array.sizes[dim]} entries). Select one of them first: dataset.{select}."
        )
    return array.transpose(*needs, *[dim for dim in may if dim in array.dims])


def entries(array: xr.DataArray, dim: str) -> list[str]:
    """The names along a dim, as text; places where it has no coordinate."""
    return [str(value) for value in array[dim].values]


def lacking(axes: Any, panels: Sequence[str]) -> list[str]:
    """The panels that have no Axes of their own: all of them where ``axes`` is no dict, a single Axes, say."""
    return [panel for panel in panels if not isinstance(axes, Mapping) or panel not in axes]


def choose(name: str, value: str, known: Sequence[str]) -> str:
    """An option that must be one of a few words."""
    if value not in known:
        raise InputError(errors.UNKNOWN_NAME.format(what=name, name=value, hint=errors.nearest(str(value), known)))
    return value


def label(array: xr.DataArray) -> str:
    """``long_name [units]`` from the attributes of the variable, without a unit of "1"."""
    name = str(array.attrs.get("long_name", array.name))
    units = str(array.attrs.get("units", "1"))
    return name if units in ("1", "") else f"{name} [{units}]"


def wrap(text: str, inches: float, size: float = 10.0) -> str:
    """Break a long label into lines that fit; a formula between dollars stays whole and counts as six characters."""
    formulas = iter(_FORMULA.findall(text))
    width = max(12, int(inches / (size * _GLYPH)))
    plain = _FORMULA.sub("\0" * 6, text)
    lines = "\n".join(textwrap.wrap(plain, width, break_long_words=False, break_on_hyphens=False)) or text
    return re.sub("\0{6}", lambda _: next(formulas), lines)


def new_axes(ax: Axes | None, width: float, height: float) -> Axes:
    """The Axes given, or those of a new figure of this size in inches."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def tidy(ax: Axes, grid: str | None = "both") -> None:
    """Quiet frame, readable ticks, a grid behind the data along ``"x"``, ``"y"``, ``"both"`` or None."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT)
    ax.tick_params(labelsize=TICK_SIZE, color=FAINT, labelcolor=INK)
    ax.tick_params(which="minor", color=FAINT)
    ax.xaxis.label.set_color(INK)
    ax.yaxis.label.set_color(INK)
    ax.set_axisbelow(True)
    if grid is not None:
        ax.grid(True, which="major", axis=grid, color=GRID, linewidth=0.8)


def colors(count: int, *, ordered: bool = False) -> list[Any]:
    """Colours that colour-blind readers can tell apart; a light-to-dark scale where order matters or the palette ends."""
    if not ordered and count <= len(PALETTE):
        return list(PALETTE[:count])
    from matplotlib import colormaps

    return list(colormaps["viridis"](np.linspace(0.85, 0.0, count)))


def cycle(count: int) -> list[tuple[str, int]]:
    """Colours for series without an order: the palette again and again, with the number of the round to vary something else."""
    return [(PALETTE[place % len(PALETTE)], place // len(PALETTE)) for place in range(count)]


def shorten(names: Sequence[str], limit: int = 26) -> list[str]:
    """Make long names fit: drop the path that all of them share, then cut middles, and only so far that they stay different."""
    names = list(names)
    if len(set(names)) > 1 and max(map(len, names)) > limit:
        parts = [name.split(".")[:-1] for name in names]
        shared = list(takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False)))
        dropped = sum(len(level[0]) + 1 for level in shared)
        if dropped > 4:
            names = [f"…{name[dropped:]}" for name in names]
    for size in range(limit, max(map(len, names), default=0) + 1):
        head = (size - 1) // 3
        tail = size - 1 - head
        cut = [n if len(n) <= size else f"{n[:head].rstrip('.')}…{n[len(n) - tail :].lstrip('.')}" for n in names]
        if len(set(cut)) == len(set(names)):
            return cut
    return names


def span(ax: Axes, axis: str) -> float:
    """Length of an axis in inches, as far as it is known before the layout."""
    share = 1.0
    if ax.get_aspect() != "auto":  # square cells leave a part of the Axes empty, and a colour bar will take some more
        ax.apply_aspect()
        share = 0.93
    box = ax.get_window_extent()
    return float(share * (box.width if axis == "x" else box.height) / ax.figure.dpi)


def name_ticks(ax: Axes, axis: str, places: Sequence[float], names: Sequence[str]) -> None:
    """Names as ticks: as they are if they fit, else turned, else smaller, and at last only every k-th."""
    names = shorten(names)
    target = ax.xaxis if axis == "x" else ax.yaxis
    low, high = sorted(ax.get_xlim() if axis == "x" else ax.get_ylim())
    room = span(ax, axis) / max(high - low, 1e-9) * _spacing(places)
    longest = max((len(line) for name in names for line in name.split("\n")), default=0)
    size, rotation = TICK_SIZE, 0
    if axis == "x" and (longest + 1) * TICK_SIZE * _GLYPH > room:
        rotation = 40 if room > 2.6 * TICK_SIZE / 72 and longest > 3 else 90
    if (axis == "y" or rotation) and room < 1.25 * size / 72:
        size = max(6.0, room * 72 / 1.25)
    step = max(1, math.ceil(1.15 * size / 72 / room)) if axis == "y" or rotation else 1
    names = [name.replace("\n", " ") for name in names] if rotation else names
    target.set_ticks(list(places)[::step], names[::step])
    for text in target.get_ticklabels():
        text.set_fontsize(size)
        if rotation:
            text.set_rotation(rotation)
            text.set_rotation_mode("anchor")
            text.set_horizontalalignment("right")
            text.set_verticalalignment("center" if rotation == 90 else "top")
    ax.tick_params(axis=axis, which="both", length=0)


def _spacing(places: Sequence[float]) -> float:
    return float(np.diff(places).min()) if len(places) > 1 else 1.0


def name_bar(ax: Axes, shades: Sequence[Any], names: Sequence[str], title: str) -> None:
    """A colour bar with one step and one name per curve: the legend of many ordered curves."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    count = len(names)
    steps = ScalarMappable(BoundaryNorm(np.arange(count + 1) - 0.5, count), ListedColormap(list(shades)))
    bar = ax.figure.colorbar(steps, ax=ax, fraction=0.04, pad=0.02, aspect=40)
    bar.ax.invert_yaxis()  # the first layer on top, as a network is read
    bar.outline.set_visible(False)
    bar.set_label(title, fontsize=NOTE_SIZE, color=INK)
    bar.minorticks_off()
    height = span(ax, "y") / count
    size = float(np.clip(height * 72 / 1.25, 6.0, NOTE_SIZE))
    step = max(1, math.ceil(1.15 * size / 72 / height))
    bar.set_ticks(list(range(count))[::step], labels=shorten(names, 32)[::step])
    bar.ax.tick_params(labelsize=size, length=0, labelcolor=INK)


_LEGEND: dict[str, Any] = {
    **{"fontsize": NOTE_SIZE, "labelcolor": INK, "framealpha": 0.85, "edgecolor": "none"},
    **{"handlelength": 1.6, "borderaxespad": 0.3, "labelspacing": 0.35, "columnspacing": 1.4},
}


ABOVE: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.005), "borderaxespad": 0.0, "borderpad": 0.2}


def named(ax: Axes) -> list[Any]:
    """The artists that have a label of their own."""
    handles, texts = ax.get_legend_handles_labels()
    return [handle for handle, text in zip(handles, texts, strict=True) if not text.startswith("_")]


def entry_texts(ax: Axes, handles: Sequence[Any]) -> list[str]:
    """The labels of a legend's entries, broken into lines where the Axes are narrow."""
    return [wrap(str(handle.get_label()), span(ax, "x") - 0.4, 0.9 * NOTE_SIZE) for handle in handles]


def legend(ax: Axes, handles: Sequence[Any] | None = None, **options: Any) -> None:
    """A quiet legend inside the Axes; None takes every artist that has a label."""
    handles = named(ax) if handles is None else list(handles)
    if handles:
        ax.legend(handles, entry_texts(ax, handles), **(_LEGEND | options))


def legend_above(ax: Axes, handles: Sequence[Any], *, figure: bool = False) -> None:
    """A legend above the Axes, or above the whole figure, in as many columns as fit the width."""
    handles = list(handles)
    if not handles:
        return
    texts = [_FORMULA.sub("\0" * 6, str(handle.get_label())) for handle in handles]
    lengths = [0.9 * len(text) * NOTE_SIZE * _GLYPH + 0.4 for text in texts]
    width = ax.figure.get_size_inches()[0] if figure else span(ax, "x")
    for rows in range(1, len(handles) + 1):  # the fewest rows that fit; columns are filled one after the other
        columns = -(-len(handles) // rows)
        if sum(max(lengths[start : start + rows]) for start in range(0, len(handles), rows)) <= width:
            break
    if figure:
        ax.figure.legend(handles=handles, loc="outside upper center", ncols=columns, **_LEGEND)
    else:
        legend(ax, handles, ncols=columns, **ABOVE)
