"""The filters of a convolution as pictures, each kernel or each of its weights tinted by what it tells."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from fisherlens import errors
from fisherlens.errors import InputError
from fisherlens.plots import _common as common

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

_ENTRY = re.compile(r"^(?P<name>.*)\[(?P<place>[\d,]+)\]$")
_ABSENT, _ZERO = "#FFFFFF", "#D9D9D9"
_NOTHING = (
    "plot.filters draws the kernels of a convolution: what fl.information(F, 'kernel') returns, or fl.information(F, 'parameter') for every weight of them; {got}. "
    "Of dense layers plot.information draws sorted curves."
)


def filters(
    dataset: xr.Dataset,
    ax: Axes | None = None,
    *,
    layer: str | None = None,
    variable: str = "information",
    scale: str = "auto",
    max_outputs: int = 32,
    max_inputs: int = 32,
    colorbar: bool = True,
    title: bool = True,
) -> Axes:
    """Draw what each kernel of a convolution tells, as a grid of output by input channels.

    From information by kernel every cell is one kernel; from information by parameter every cell is a picture of its kernel, weight by weight.
    Grey cells tell nothing; where channels are in groups, pairs without a kernel stay white. Of a large layer only the corner is drawn, and the axis
    labels say so.

    Parameters
    ----------
    dataset
        What :func:`fisherlens.information` returns by ``"kernel"`` or ``"parameter"``.
    ax
        Axes to draw on; None for those of a new figure.
    layer
        Which layer; None where only one has kernels.
    variable
        ``"information"``, ``"share"``, ``"saliency"``, ``"std_bound"``, …; values of both signs, as ``"value"`` has, get a scale with white in the middle.
    scale
        ``"linear"``, ``"log"``, or ``"auto"``: logarithmic where positive values span more than a factor of 100.
    max_outputs, max_inputs
        Channels to draw at most.
    colorbar, title
        Draw the colour bar; write the layer above.

    Returns
    -------
    The Axes.

    Raises
    ------
    InputError: no kernels in the dataset, an unknown layer, variable or scale, several layers without ``layer``, or a limit below 1. TypeError: not a Dataset.

    Examples
    --------
    >>> import xarray as xr
    >>> place = {"layer": ("kernel", ["0"] * 4), "out_channel": ("kernel", [0, 0, 1, 1]), "in_channel": ("kernel", [0, 1, 0, 1])}
    >>> ax = filters(xr.Dataset({"information": ("kernel", [1.0, 2.0, 0.0, 4.0])}, place))
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('input channel', 'output channel')
    """
    common.choose("scale", scale, ("auto", "linear", "log"))
    for name, limit in (("max_outputs", max_outputs), ("max_inputs", max_inputs)):
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise InputError(f"{name} must be an integer >= 1, the channels to draw at most; got {limit!r}.")
    array = common.read(dataset, variable, caller="filters", source="fl.information", needs=(), may=("kernel", "param"))
    if array.ndim != 1:
        raise InputError(_NOTHING.format(got=f"{variable!r} has the dims {array.dims} here"))
    values, placed = array.values.astype(float), _places(array)
    known = list(dict.fromkeys(owner for owner, place in placed if place is not None))
    chosen = _layer(layer, known)
    here = [k for k, (owner, place) in enumerate(placed) if owner == chosen and place is not None]
    place = np.array([placed[k][1] for k in here])
    picture, cell = _picture(place, values[here], max_outputs, max_inputs)
    outputs, inputs = place[:, 0].max() + 1, place[:, 1].max() + 1
    shown = (min(outputs, max_outputs), min(inputs, max_inputs))
    ax = _draw(ax, array, picture, scale, colorbar)
    _name(ax, (outputs, inputs), shown, cell)
    if title:
        text = f"{chosen}: {outputs} × {inputs} channels" + (
            f", kernels of {cell[0]} × {cell[1]}" if cell != (1, 1) else ""
        )
        ax.set_title(common.wrap(text, max(common.span(ax, "x"), 1.6)), loc="left", fontsize=10, color=common.INK)
    return ax


def _places(array: xr.DataArray) -> list[tuple[str, tuple[int, ...] | None]]:
    """Layer of every entry, and (output, input, row, column) where it belongs to a kernel, else None."""
    owners = [str(name) for name in array["layer"].values] if "layer" in array.coords else [""] * array.size
    if "kernel" in array.dims:
        if "out_channel" not in array.coords or "in_channel" not in array.coords:
            raise InputError(_NOTHING.format(got="the coordinates out_channel and in_channel are missing here"))
        pairs = zip(array["out_channel"].values.tolist(), array["in_channel"].values.tolist(), strict=True)
        return [(o, (*pair, 0, 0) if min(pair) >= 0 else None) for o, pair in zip(owners, pairs, strict=True)]
    if "param_name" not in array.coords:
        raise InputError(_NOTHING.format(got="the coordinate param_name is missing here"))
    found: list[tuple[str, tuple[int, ...] | None]] = []
    for owner, label in zip(owners, common.entries(array, "param_name"), strict=True):
        match = _ENTRY.match(label)
        place = tuple(map(int, match["place"].split(","))) if match and match["name"].endswith("weight") else ()
        if len(place) == 3:
            found.append((owner, (*place[:2], 0, place[2])))
        elif len(place) == 4:
            found.append((owner, place))
        elif len(place) == 5:  # slices of a volume one under the other, with an empty line between
            found.append((owner, (place[0], place[1], place[2] * 1000 + place[3], place[4])))
        else:
            found.append((owner, None))
    return found


def _layer(layer: str | None, known: list[str]) -> str:
    if not known:
        raise InputError(_NOTHING.format(got="no layer of this Dataset has kernels"))
    if layer is None:
        if len(known) > 1:
            raise InputError(
                f"plot.filters draws one layer; this Dataset has kernels of {known}. Name one: layer={known[0]!r}."
            )
        return known[0]
    if layer not in known:
        raise InputError(
            errors.UNKNOWN_NAME.format(what="layer with kernels", name=layer, hint=errors.nearest(layer, known))
        )
    return layer


def _picture(
    place: np.ndarray, values: np.ndarray, max_outputs: int, max_inputs: int
) -> tuple[np.ndarray, tuple[int, int]]:
    """All kernels in one image, an empty line between them where they have more than one weight; NaN where there is nothing."""
    deep = place[:, 2] // 1000
    height = place[:, 2].max() % 1000 + 1 if deep.max() == 0 else (place[:, 2] % 1000).max() + 1
    row = place[:, 2] % 1000 + deep * (height + 1)
    cell = (int(row.max()) + 1, int(place[:, 3].max()) + 1)
    gap = 0 if cell == (1, 1) else 1
    kept = (place[:, 0] < max_outputs) & (place[:, 1] < max_inputs)
    rows = place[kept, 0] * (cell[0] + gap) + row[kept]
    columns = place[kept, 1] * (cell[1] + gap) + place[kept, 3]
    picture = np.full((rows.max() + 1, columns.max() + 1), np.nan)
    picture[rows, columns] = values[kept]
    return picture, cell


def _draw(ax: Axes | None, array: xr.DataArray, picture: np.ndarray, scale: str, colorbar: bool) -> Axes:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize

    finite = picture[np.isfinite(picture)]
    positive = finite[finite > 0]
    signed = bool((finite < 0).any())
    if scale == "log" and (signed or not positive.size):
        raise InputError(
            f"plot.filters(scale='log') needs values above zero and none below; {array.name!r} has others. Use scale='linear'."
        )
    log = scale == "log" or (scale == "auto" and not signed and positive.size and positive.max() > 100 * positive.min())
    rows, columns = picture.shape
    size = float(np.clip(6.0 / max(rows, columns), 0.03, 0.45))
    ax = common.new_axes(ax, max(4.6, size * columns + 1.9), max(2.4, size * rows + 1.1))
    if signed:
        limit = float(np.abs(finite).max())
        norm, shades = Normalize(-limit, limit), "RdBu_r"
    elif log:
        norm, shades = LogNorm(positive.min(), max(positive.max(), 1.01 * positive.min())), "YlGnBu"
    else:
        norm, shades = Normalize(0.0, float(finite.max(initial=0.0)) or 1.0), "YlGnBu"
    colours = colormaps[shades].with_extremes(bad=_ABSENT)
    if not signed and (finite == 0).any():
        ax.imshow(np.where(picture == 0, 0.0, np.nan), cmap=_flat(), vmin=0, vmax=1, interpolation="nearest")
        picture = np.where(picture == 0, np.nan, picture)
        colours = colours.with_extremes(bad=(1, 1, 1, 0))
    image = ax.imshow(picture, cmap=colours, norm=norm, interpolation="nearest")
    common.tidy(ax, grid=None)
    ax.spines[:].set_visible(False)
    if colorbar:
        bar = ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.03)
        bar.outline.set_visible(False)
        none = ", grey: none" if not signed and (finite == 0).any() else ""
        bar.set_label(common.wrap(common.label(array) + none, common.span(ax, "y")), color=common.INK)
        bar.ax.tick_params(labelsize=common.TICK_SIZE, color=common.FAINT, labelcolor=common.INK)
    return ax


def _flat() -> Any:
    """One grey for what tells nothing."""
    from matplotlib.colors import ListedColormap

    return ListedColormap([_ZERO]).with_extremes(bad=(1, 1, 1, 0))


def _name(ax: Axes, full: tuple[int, int], shown: tuple[int, int], cell: tuple[int, int]) -> None:
    gap = 0 if cell == (1, 1) else 1
    for axis, count, total, size, word in (
        ("y", shown[0], full[0], cell[0], "output"),
        ("x", shown[1], full[1], cell[1], "input"),
    ):
        every = next(n for n in (1, 2, 4, 5, 8, 10, 16, 20, 50, 100, 10**9) if count / n <= 12)
        places = [channel * (size + gap) + (size - 1) / 2 for channel in range(0, count, every)]
        names = [str(channel) for channel in range(0, count, every)]
        (ax.set_xticks if axis == "x" else ax.set_yticks)(places, names)
        text = f"{word} channel" + (f" (first {count} of {total})" if count < total else "")
        (ax.set_xlabel if axis == "x" else ax.set_ylabel)(text)
    ax.tick_params(length=0)
