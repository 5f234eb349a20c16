"""The heat map of the couplings between blocks."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from fisherlens.errors import InputError
from fisherlens.plots import _common as common

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

MOST_NUMBERS = 12  # blocks up to which each cell carries its number
_MOST_MARKS = 60  # blocks up to which single cells carry a mark that can be seen
_MOST_NAMES = 40  # blocks up to which each block is named; more are named by layer where that is known

TESTS = {"p_adjusted": "adjusted p", "q_value": "q", "p_value": "p"}  # variable and what a legend calls it

_NOT_BELOW = (
    "plot.coupling(below={below!r}) needs the variable {needs!r}; this Dataset has none. Compute it with fl.coupling (num_null > 0 for p-values), or pass "
    "below='all'."
)
_NO_FLOOR = (
    "plot.coupling(excess=True) subtracts the variable 'noise_floor'; this Dataset has none. "
    "Pass the Dataset as fl.coupling returned it, or excess=False."
)


def coupling(
    dataset: xr.Dataset,
    ax: Axes | None = None,
    *,
    excess: bool = False,
    alpha: float = 0.05,
    test: str = "p_adjusted",
    show_significant: bool = True,
    show_noise: bool = True,
    below: str | None = None,
    annotate: bool | None = None,
    boundaries: bool | None = None,
    colorbar: bool = True,
    legend: bool = True,
) -> Axes:
    """Draw the coupling of every pair of blocks as a heat map, with what chance alone would give.

    A dot marks pairs whose ``p_adjusted`` (or another ``test``) is below ``alpha``, hatching those at or below their noise floor. The legend
    counts both over the pairs of different blocks, each once. Where the cells are too small for marks, the half below the diagonal
    shows only what stands out, and the half above it everything.

    Parameters
    ----------
    dataset
        What :func:`fisherlens.coupling` returns: ``coupling (block_i, block_j)``; ``noise_floor``, ``p_adjusted`` and the
        coordinate ``layer_i (block_i)`` are used if present.
    ax
        Axes to draw on; None for those of a new figure.
    excess
        Draw coupling minus noise floor, on a scale symmetric about zero and without the diagonal, instead of the coupling in [0, 1].
    alpha
        Level of the dots; 0.05 by convention.
    test
        What is compared with it: ``"p_adjusted"``, which bounds the chance of a single false dot; ``"q_value"``, which bounds the share of false ones among the
        dots; or ``"p_value"``, which is right for a pair chosen beforehand.
    show_significant, show_noise
        Draw the dots; the hatching and the median floor in the colour bar.
    below
        What to draw below the diagonal: ``"all"``; only pairs that are ``"significant"`` at ``alpha``; or only those ``"above floor"``. None for "all" up to 60
        blocks, and without legend or ``show_significant``; else the first of the others that the Dataset has.
    annotate
        Write the numbers into the cells; None for up to 12 blocks.
    boundaries
        Draw lines between layers; None for "where a layer has more than one block".
    colorbar, legend
        Draw the colour bar; the legend.

    Returns
    -------
    The Axes.

    Raises
    ------
    InputError: no ``coupling`` over (block_i, block_j), more dims than these, ``excess`` without a noise floor, or ``below`` without what it needs.
    TypeError: not a Dataset.

    Examples
    --------
    >>> import xarray as xr
    >>> blocks = {"block_i": ["0", "2"], "block_j": ["0", "2"]}
    >>> ax = coupling(xr.Dataset({"coupling": (("block_i", "block_j"), [[1.0, 0.3], [0.3, 1.0]])}, blocks))
    >>> [text.get_text() for text in ax.texts]
    ['1', '0.30', '0.30', '1']
    """
    needs = ("block_i", "block_j")
    array = common.read(dataset, "coupling", caller="coupling", source="fl.coupling", needs=needs)
    extra = {
        name: common.fit(dataset[name], caller="coupling", needs=needs).values.astype(float)
        for name in ("noise_floor", common.choose("test", test, list(TESTS)), "coupling_sem")
        if name in dataset and set(needs) <= set(dataset[name].dims)
    }
    floor, p_value = extra.get("noise_floor"), extra.get(test)
    if excess and floor is None:
        raise InputError(_NO_FLOOR)
    values = array.values.astype(float)
    count = len(values)
    side = float(np.clip(0.42 * count + 2.0, 4.8, 7.2))
    ax = common.new_axes(ax, side + 1.2, side)
    shown = np.where(np.eye(count, dtype=bool), np.nan, values - floor) if excess else values
    if below is None and (count <= _MOST_MARKS or not (show_significant and legend)):
        below = "all"
    kept, how = _below(below, values, floor, p_value, test, alpha)
    shown = np.where(kept, shown, np.nan)
    image = draw(ax, shown, excess)
    noisy = floor is not None and show_noise
    handles: list[Any] = []
    pairs = ~np.eye(count, dtype=bool)  # both triangles, so that a count is twice the number of pairs
    if p_value is not None and show_significant:
        handles.append(mark_significant(ax, (p_value < alpha) & pairs, f"{TESTS[test]} < {alpha:g}"))
    if noisy:
        handles.append(_mark_noise(ax, (values <= floor) & pairs & np.isfinite(values)))
    if how:
        handles.append(note(f"below the diagonal: only pairs {how}"))
    if "coupling_sem" in extra and count > 1 and np.isfinite(extra["coupling_sem"][pairs]).any():
        handles.append(note(f"median standard error {np.nanmedian(extra['coupling_sem'][pairs]):.2g}"))
    if annotate or (annotate is None and count <= MOST_NUMBERS):
        write(ax, shown, image)
    layers = [str(name) for name in dataset["layer_i"].values] if "layer_i" in dataset.coords else None
    name_blocks(ax, array, layers, boundaries)
    if colorbar:
        text = f"{common.label(array)} − noise floor" if excess else common.label(array)
        handles += bar(ax, image, text, floor[pairs] if noisy and count > 1 and not excess else None)
    if legend:
        common.legend(ax, handles, **common.ABOVE)
    return ax


def _below(
    below: str | None,
    values: np.ndarray,
    floor: np.ndarray | None,
    p_value: np.ndarray | None,
    test: str,
    alpha: float,
) -> tuple[np.ndarray, str]:
    """Which cells to draw, and what that says of those below the diagonal."""
    known = {"all": True, "significant": p_value is not None, "above floor": floor is not None}
    if below is None:
        below = next((name for name in ("significant", "above floor") if known[name]), "all")
    elif not known[common.choose("below", below, list(known))]:
        raise InputError(_NOT_BELOW.format(below=below, needs=test if below == "significant" else "noise_floor"))
    upper = np.triu(np.ones_like(values, dtype=bool))
    if below == "significant" and p_value is not None:
        return upper | (p_value < alpha), f"with {TESTS[test]} < {alpha:g}"
    if below == "above floor" and floor is not None:
        return upper | (values > floor), "above the noise floor"
    return np.ones_like(upper), ""


def note(text: str) -> Any:
    """An entry of a legend that is words alone."""
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="none", label=text)


def draw(ax: Axes, values: np.ndarray, excess: bool) -> Any:
    """Cells in shades of [0, 1], or about zero."""
    from matplotlib import colormaps

    if excess:
        limit = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
        shades, low, high = "RdBu_r", -limit, limit
    else:
        shades, low, high = "YlGnBu", 0.0, 1.0
    image = ax.imshow(
        values, cmap=colormaps[shades].with_extremes(bad="#E3E3E3"), vmin=low, vmax=high, interpolation="nearest"
    )
    common.tidy(ax, grid=None)
    ax.spines[:].set_visible(False)
    return image


def mark_significant(ax: Axes, cells: np.ndarray, words: str, *, upper: bool = False) -> Any:
    """Dots on the pairs of two blocks that are significant, on both sides of the diagonal or above it, and how many there are."""
    from matplotlib.lines import Line2D

    count = len(cells)
    cells = cells & ~np.eye(count, dtype=bool)
    total = count * (count - 1) // 2
    text = f"{words}: {cells.sum() // 2} of {total} pairs"
    if count > _MOST_MARKS:
        return note(text)
    size = max(1.5, min(5.0, 0.16 * common.span(ax, "y") / count * 72))
    rows, columns = np.nonzero(np.triu(cells) if upper else cells)
    style: dict[str, Any] = {
        "marker": "o",
        "markeredgecolor": common.INK,
        "markerfacecolor": "white",
        "linestyle": "none",
    }
    ax.plot(columns + 0.34, rows - 0.34, markersize=size, markeredgewidth=0.8, **style)
    return Line2D([], [], markersize=5, markeredgewidth=0.8, label=text, **style)


def _mark_noise(ax: Axes, cells: np.ndarray) -> Any:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Patch, Rectangle

    count = len(cells)
    total = count * (count - 1) // 2
    text = f"at or below the noise floor: {cells.sum() // 2} of {total} pairs"
    if count > _MOST_MARKS:
        return note(text)
    style: dict[str, Any] = {"facecolor": "none", "edgecolor": "#B0B0B0", "linewidth": 0.0, "hatch": "////"}
    squares = [Rectangle((column - 0.5, row - 0.5), 1, 1) for row, column in zip(*np.nonzero(cells), strict=True)]
    marks = PatchCollection(squares, **style)
    if hasattr(marks, "set_hatch_linewidth"):  # not in matplotlib before 3.11
        marks.set_hatch_linewidth(0.6)
    ax.add_collection(marks, autolim=False)
    return Patch(label=text, **style)


def write(ax: Axes, values: np.ndarray, image: Any) -> None:
    """Numbers in the cells, in the ink that the cell's own colour leaves readable."""
    size = float(np.clip(0.3 * common.span(ax, "y") / len(values) * 72, 5.5, 9.0))
    for (row, column), value in np.ndenumerate(values):
        if not np.isfinite(value):
            continue
        red, green, blue, _ = image.cmap(image.norm(value))
        dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5
        text = (
            "1"
            if np.isclose(value, 1.0, rtol=0, atol=1e-9)
            else f"{value:.2f}".replace("-0.00", "0.00").replace("-", "−")
        )
        ax.text(column, row, text, ha="center", va="center", fontsize=size, color="white" if dark else common.INK)


def name_blocks(ax: Axes, array: xr.DataArray, layers: list[str] | None, boundaries: bool | None) -> None:
    """Blocks by name while they are few, else layers at the middle of their blocks; lines where the layer changes."""
    count = array.sizes["block_i"]
    names = common.entries(array, "block_i")
    places = list(range(count))
    edges: list[int] = []
    if layers is not None:
        edges = [place for place in range(1, count) if layers[place] != layers[place - 1]]
        if count > _MOST_NAMES:
            bounds = [0, *edges, count]
            places = [(start + stop - 1) / 2 for start, stop in pairwise(bounds)]
            names = [layers[start] for start in bounds[:-1]]
    if boundaries or (boundaries is None and 0 < len(edges) < count - 1):
        width = 0.8 if len(edges) <= 12 else 0.4
        for edge in edges:
            ax.axhline(edge - 0.5, color=common.INK, linewidth=width)
            ax.axvline(edge - 0.5, color=common.INK, linewidth=width)
    common.name_ticks(ax, "x", places, names)
    common.name_ticks(ax, "y", places, names)
    whole = "layer" if layers is not None and len(names) < count else "block"
    ax.set_xlabel(whole)
    ax.set_ylabel(whole)


def bar(ax: Axes, image: Any, text: str, floor: np.ndarray | None) -> list[Any]:
    """The colour bar, with the median noise floor as a line in it."""
    scale = ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.03)
    scale.outline.set_visible(False)
    scale.set_label(text, color=common.INK)
    scale.ax.tick_params(labelsize=common.TICK_SIZE, color=common.FAINT, labelcolor=common.INK)
    if floor is None or not np.isfinite(floor).any():
        return []
    middle = float(np.nanmedian(floor))
    line = scale.ax.axhline(
        middle, color=common.PALETTE[1], linewidth=2.0, label=f"median noise floor {middle:.2f} (in the colour bar)"
    )
    return [line]
