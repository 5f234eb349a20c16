"""A layer's weight, cut into its blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fisherlens.errors import InputError
from fisherlens.plots import _common as common

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

# Light tones, so that borders and labels stay readable on them; they differ in lightness, for colour-blind readers.
_SHADES = ("#9CC9E8", "#F6B48F", "#A8DDB5", "#E8C3DC", "#F4E3A1", "#7FA8C9", "#D08C60", "#8FBC9A")
_GREYS = ("#C4C4C4", "#DDDDDD")
_NO_BLOCK = "#F5F5F5"
_ALL = (*_SHADES, *_GREYS, _NO_BLOCK, "#FFFFFF")
_WHITE = len(_ALL) - 1
_NO_SQUARES = (
    "plot.partition(squares=True) draws kernels in two dimensions; {layer} has none, or its Dataset does not say how wide they are (kernel_width). "
    "Leave squares out for dense layers, and pass what Partition.to_dataset(layer) returns."
)
# Schemes whose blocks go on in other layers, so that their sizes here are not their sizes.
_CROSSING = ("sequential", "random", "own")
_NEEDS_LAYER = (
    "plot.partition draws one layer of a partition; got {got} without layer=. "
    "Name it: plot.partition(p, layer='...'), or pass p.to_dataset('...')."
)


def partition(
    dataset: Any,
    ax: Axes | None = None,
    *,
    layer: str | None = None,
    max_outputs: int = 32,
    max_inputs: int = 72,
    show_kernels: bool = True,
    squares: bool = False,
    title: bool = True,
) -> Axes:
    """Draw the weight of one layer as a matrix, cut into the blocks of a partition.

    Rows are output units or channels; columns are inputs, or the entries of each input channel's kernel one after the
    other. Neighbouring blocks differ in colour, entries of one block share it, and a colour has no other meaning; grey are
    blocks that hold no weight, only biases. Of a large weight only the corner is drawn, whole kernels where one fits, and the axis labels say so.
    With ``squares`` every kernel of a convolution, and every source channel of a flattened map, is a picture of its own.

    Parameters
    ----------
    dataset
        What ``Partition.to_dataset(layer)`` returns: ``block (output, input)``, ``bias_block (output)`` if there is a bias;
        -1 for entries in no block. A Partition (anything with ``to_dataset(layer)``) is taken too, with ``layer``.
    ax
        Axes to draw on; None for those of a new figure.
    layer
        Which layer, where ``dataset`` is a Partition.
    max_outputs, max_inputs
        Rows and columns to draw at most; 32 and 72 are what a page can show. Fewer columns where a kernel would be cut.
    show_kernels
        Draw lines between the kernels of a convolution, or between the source channels of a flattened map.
    squares
        Draw each kernel in its two dimensions, one picture for each pair of output and input channel, instead of as a run of columns.
    title
        Write the layer, the scheme and the sizes of its blocks above.

    Returns
    -------
    The Axes.

    Raises
    ------
    InputError: no ``block`` over (output, input), further dims, a Partition without ``layer``, or a limit below 1.
    TypeError: neither a Dataset nor a Partition.

    Examples
    --------
    >>> import xarray as xr
    >>> ax = partition(xr.Dataset({"block": (("output", "input"), [[0, 0], [1, 1]])}))
    >>> ax.get_title(loc="left")
    '2 blocks of 2'
    """
    import xarray as xr

    if not isinstance(dataset, xr.Dataset | xr.DataArray | xr.DataTree) and hasattr(dataset, "to_dataset"):
        if layer is None:
            raise InputError(_NEEDS_LAYER.format(got=type(dataset).__name__))
        dataset = dataset.to_dataset(layer)
    for name, limit in (("max_outputs", max_outputs), ("max_inputs", max_inputs)):
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise InputError(f"{name} must be an integer >= 1, the rows or columns to draw at most; got {limit!r}.")
    array = common.read(
        dataset, "block", caller="partition", source="Partition.to_dataset(layer)", needs=("output", "input")
    )
    outputs, inputs = array.shape
    kernel = _kernel(array, dataset)
    if 1 < kernel <= max_inputs < inputs:
        max_inputs -= max_inputs % kernel
    matrix = array.values[:max_outputs, :max_inputs].astype(np.int64)
    bias = None
    if "bias_block" in dataset:
        bias = common.fit(dataset["bias_block"], caller="partition", needs=("output",)).values[:max_outputs]
    if squares:
        return _squares(dataset, array, matrix, bias, ax, title)
    if bias is not None:  # two empty columns keep it apart from the weight
        matrix = np.column_stack([matrix, np.full((len(matrix), 2), _GAP), bias])
    rows, columns = matrix.shape
    scale = float(np.clip(7.2 / columns, 0.11, 0.34))
    ax = common.new_axes(ax, max(3.6, columns * scale + 1.2), float(np.clip(rows * scale + 1.1, 2.0, 7.0)))
    _paint(ax, _tones(matrix, apart=bias is not None))
    _cut(ax, matrix)
    shown = columns - (3 if bias is not None else 0)
    step = _kernel(array, dataset) if show_kernels else 1
    if 1 < step < inputs:
        for edge in range(step, shown, step):
            ax.plot([edge - 0.5] * 2, [-0.5, rows - 0.5], color=common.INK, linewidth=0.7, linestyle=(0, (1, 1.5)))
    _name(ax, (outputs, inputs), (rows, shown), step if step > 1 else 1, bias is not None, _kernel(array, dataset))
    if title:
        ax.set_title(_sentence(dataset, array), loc="left", fontsize=10, color=common.INK)
    return ax


def _squares(
    dataset: xr.Dataset, array: xr.DataArray, matrix: np.ndarray, bias: Any, ax: Axes | None, title: bool
) -> Axes:
    """Output by input channels, every cell a kernel in its own two dimensions; the bias beside its output."""
    kernel, width = _kernel(array, dataset), int(array.attrs.get("kernel_width", dataset.attrs.get("kernel_width", 0)))
    if kernel == 1 or width < 1 or kernel % width:
        raise InputError(_NO_SQUARES.format(layer=dataset.attrs.get("layer", "this layer")))
    outputs, channels, height = len(matrix), max(1, matrix.shape[1] // kernel), kernel // width
    cells = matrix[:, : channels * kernel].reshape(outputs, channels, height, width)
    flat = cells.transpose(0, 2, 1, 3).reshape(outputs * height, channels * width)
    if bias is not None:
        flat = np.column_stack([flat, np.repeat(np.asarray(bias), height)])
    # tones are chosen as if kernels lay side by side, so that neighbours differ; -1 picks the margin between them
    lines = _spaced(outputs, height)
    across = [
        *_spaced(channels, width),
        *([-1, -1, *[flat.shape[1] - 1] * max(1, width // 2)] if bias is not None else []),
    ]
    tones = np.pad(_tones(flat, apart=bias is not None), ((0, 1), (0, 1)), constant_values=_WHITE)[
        np.ix_(lines, across)
    ]
    blocks = np.pad(flat, ((0, 1), (0, 1)), constant_values=_GAP)[np.ix_(lines, across)]
    rows, columns = tones.shape
    scale = float(np.clip(7.2 / columns, 0.06, 0.3))
    ax = common.new_axes(ax, max(3.6, columns * scale + 1.2), float(np.clip(rows * scale + 1.1, 2.0, 8.5)))
    _paint(ax, tones)
    _cut(ax, blocks)
    every = max(1, -(-outputs // 16))
    ax.set_yticks(
        [o * (height + 1) + (height - 1) / 2 for o in range(0, outputs, every)],
        [str(o) for o in range(0, outputs, every)],
    )
    every = max(1, -(-channels // 16))
    places = [c * (width + 1) + (width - 1) / 2 for c in range(0, channels, every)]
    names = [str(c) for c in range(0, channels, every)]
    if bias is not None:
        places, names = [*places, columns - 1 - (max(1, width // 2) - 1) / 2], [*names, "bias"]
    ax.set_xticks(places, names)
    total = array.shape[1] // kernel
    ax.set_xlabel(
        f"input channel, {height} × {width} each" + (f" (first {channels} of {total})" if channels < total else "")
    )
    ax.set_ylabel("output" + (f" (first {outputs} of {array.shape[0]})" if outputs < array.shape[0] else ""))
    common.tidy(ax, grid=None)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    if title:
        ax.set_title(_sentence(dataset, array), loc="left", fontsize=10, color=common.INK)
    return ax


def _spaced(count: int, size: int) -> list[int]:
    """Places 0, 1, …, with a -1 after every ``size`` of them but the last."""
    return [place for cell in range(count) for place in (*range(cell * size, (cell + 1) * size), -1)][:-1]


_GAP = -2  # marks the columns between weight and bias


def _kernel(array: xr.DataArray, dataset: xr.Dataset) -> int:
    """Columns that belong to one input channel."""
    return int(array.attrs.get("columns_per_channel", dataset.attrs.get("columns_per_channel", 1)))


def _tones(matrix: np.ndarray, *, apart: bool) -> np.ndarray:
    """Which tone every entry gets; the bias, where it stands apart, is the last column."""
    tones = _color_blocks(matrix)
    if apart:  # blocks of the bias alone are grey, since no weight belongs to them
        own = ~np.isin(matrix[:, -1], matrix[:, :-1])
        order = np.unique(matrix[:, -1], return_inverse=True)[1]
        tones[own, -1] = len(_SHADES) + order[own] % 2
    return np.where(matrix == _GAP, _WHITE, np.where(matrix < 0, _WHITE - 1, tones))


def _paint(ax: Axes, tones: np.ndarray) -> None:
    from matplotlib.colors import to_rgba

    shades = np.array([to_rgba(shade) for shade in _ALL])
    picture = shades[tones]
    ax.imshow(picture, interpolation="nearest", aspect="equal")
    ax.spines[:].set_visible(False)


def _color_blocks(matrix: np.ndarray) -> np.ndarray:
    """A tone per entry such that blocks that touch differ, as far as eight tones allow (greedy, in order of appearance)."""
    found, numbers = np.unique(matrix, return_inverse=True)
    numbers = numbers.reshape(matrix.shape)
    neighbours: list[dict[int, int]] = [{} for _ in found]
    for one, two in ((numbers[:, :-1], numbers[:, 1:]), (numbers[:-1], numbers[1:])):
        for a, b in zip(one[one != two].tolist(), two[one != two].tolist(), strict=True):
            neighbours[a][b] = neighbours[a].get(b, 0) + 1
            neighbours[b][a] = neighbours[b].get(a, 0) + 1
    tones = np.full(len(found), -1)
    for block in range(len(found)):
        used = np.zeros(len(_SHADES), dtype=np.int64)
        for other, touches in neighbours[block].items():
            if tones[other] >= 0 and found[other] >= 0:
                used[tones[other]] += touches
        tones[block] = int(used.argmin())  # the first free tone, or the one that touches least
    return tones[numbers]


def _cut(ax: Axes, matrix: np.ndarray) -> None:
    """White lines between entries of different blocks."""
    from matplotlib.collections import LineCollection

    lines: list[Any] = []
    for row, column in zip(*np.nonzero(matrix[:, :-1] != matrix[:, 1:]), strict=True):
        lines.append([(column + 0.5, row - 0.5), (column + 0.5, row + 0.5)])
    for row, column in zip(*np.nonzero(matrix[:-1] != matrix[1:]), strict=True):
        lines.append([(column - 0.5, row + 0.5), (column + 0.5, row + 0.5)])
    width = float(np.clip(common.span(ax, "x") / matrix.shape[1] * 72 * 0.14, 0.5, 1.8))
    ax.add_collection(LineCollection(lines, colors="white", linewidths=width), autolim=False)


def _name(ax: Axes, full: tuple[int, int], shown: tuple[int, int], step: int, bias: bool, kernel: int) -> None:
    from matplotlib.ticker import MaxNLocator

    outputs, inputs = full
    rows, columns = shown
    ax.set_xlim(-0.5, columns + (3 if bias else 0) - 0.5)
    ax.set_ylim(rows - 0.5, -0.5)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 4, 5, 8, 10]))
    channels = 1 < kernel < inputs
    if channels and step > 1:
        whole = -(-columns // kernel)
        every = max(1, -(-whole // 12))
        places = [
            channel * kernel + (min(kernel, columns - channel * kernel) - 1) / 2 for channel in range(0, whole, every)
        ]
        names = [str(channel) for channel in range(0, whole, every)]
        text = f"input channel, {kernel} entries each"
        total, drawn = inputs // kernel, columns / kernel
        cut = f" (first {drawn:.3g} of {total})" if columns < inputs else ""
    else:
        every = next(n for n in (1, 2, 4, 5, 8, 10, 16, 20, 50, 100, 10**9) if columns / n <= 12)
        places, names = list(range(0, columns, every)), [str(n) for n in range(0, columns, every)]
        text = "input" if not channels else "entry of the row"
        cut = f" (first {columns} of {inputs})" if columns < inputs else ""
    if bias:
        places, names = [*places, columns + 2], [*names, "bias"]
    ax.set_xticks(places, names)
    ax.set_xlabel(text + cut)
    ax.set_ylabel("output" + (f" (first {rows} of {outputs})" if rows < outputs else ""))
    common.tidy(ax, grid=None)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


def _sentence(dataset: xr.Dataset, array: xr.DataArray) -> str:
    """The layer, the scheme and what the blocks of the whole layer are like, drawn or not."""
    ids = array.values.reshape(-1)
    if "bias_block" in dataset:
        ids = np.concatenate([ids, dataset["bias_block"].values.reshape(-1)])
    sizes = np.unique(ids[ids >= 0], return_counts=True)[1]
    kinds, counts = np.unique(sizes, return_counts=True)
    if len(kinds) == 0:
        shown = "no blocks"
    elif len(kinds) == 1:
        shown = f"{counts[0]} block{'s' if counts[0] > 1 else ''} of {kinds[0]}"
    elif len(kinds) == 2:
        shown = " and ".join(f"{count} of {kind}" for kind, count in zip(kinds[::-1], counts[::-1], strict=True))
        shown = f"{counts.sum()} blocks, {shown}"
    else:
        shown = f"{counts.sum()} blocks of {kinds[0]} to {kinds[-1]}"
    if dataset.attrs.get("scheme") in _CROSSING and len(kinds):
        entries = f"{kinds[0]} to {kinds[-1]} entries" if len(kinds) > 1 else f"{kinds[0]} entries"
        shown = f"{counts.sum()} blocks with {entries} here"
    parts = [str(dataset.attrs[name]) for name in ("layer", "scheme") if name in dataset.attrs]
    return " · ".join([*(common.shorten(parts, 40) if parts else []), shown])
