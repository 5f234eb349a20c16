"""The heat map of the dependence between blocks, beside what is linear of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fisherlens.plots import _common as common
from fisherlens.plots import _coupling as pairs

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes


def dependence(
    dataset: xr.Dataset,
    ax: Axes | None = None,
    *,
    alpha: float = 0.05,
    test: str = "p_adjusted",
    show_significant: bool = True,
    show_linear: bool = True,
    annotate: bool | None = None,
    boundaries: bool | None = None,
    colorbar: bool = True,
    legend: bool = True,
) -> Axes:
    """Draw the dependence of every pair of blocks above the diagonal, and the square of its linear coupling below.

    Both are shares in [0, 1], so that a pair which is darker above the diagonal than below depends on more than correlation. The linear one is
    not corrected for bias: with few examples it is large by chance. Values below 0, which independent blocks have half of the time, are drawn as 0.

    Parameters
    ----------
    dataset
        What :func:`fisherlens.dependence` returns: ``dependence (block_i, block_j)``; ``linear_coupling``, the ``test`` and the coordinate ``layer_i``
        are used if present.
    ax
        Axes to draw on; None for those of a new figure.
    alpha
        Level of the dots; 0.05 by convention.
    test
        What is compared with it: ``"p_adjusted"``, ``"q_value"`` or ``"p_value"`` of the dependence, as in :func:`coupling`.
    show_significant
        Draw the dots, and count them in the legend.
    show_linear
        Draw the squared linear coupling below the diagonal; False draws the dependence on both sides.
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
    InputError: no ``dependence`` over (block_i, block_j), or more dims than these. TypeError: not a Dataset.

    Examples
    --------
    >>> import xarray as xr
    >>> blocks = {"block_i": ["0", "2"], "block_j": ["0", "2"]}
    >>> ax = dependence(xr.Dataset({"dependence": (("block_i", "block_j"), [[1.0, 0.3], [0.3, 1.0]])}, blocks))
    >>> [text.get_text() for text in ax.texts]
    ['1', '0.30', '0.30', '1']
    """
    needs = ("block_i", "block_j")
    array = common.read(dataset, "dependence", caller="dependence", source="fl.dependence", needs=needs)
    extra = {
        name: common.fit(dataset[name], caller="dependence", needs=needs).values.astype(float)
        for name in ("linear_coupling", common.choose("test", test, list(pairs.TESTS)))
        if name in dataset and set(needs) <= set(dataset[name].dims)
    }
    values = array.values.astype(float)
    count = len(values)
    linear = "linear_coupling" in extra and show_linear and count > 1
    lower = np.tri(count, k=-1, dtype=bool)
    if linear:
        values = np.where(lower, np.square(extra["linear_coupling"]), values)
    side = float(np.clip(0.42 * count + 2.0, 4.8, 7.2))
    ax = common.new_axes(ax, side + 1.2, side)
    image = pairs.draw(ax, values, excess=False)
    handles = []
    if linear:
        handles += [
            pairs.note(f"above the diagonal: {common.label(array)}"),
            pairs.note("below: squared coupling, of the same sample"),
        ]
    if test in extra and show_significant:
        words = f"{pairs.TESTS[test]} < {alpha:g}"
        handles.append(pairs.mark_significant(ax, extra[test] < alpha, words, upper=linear))
    if annotate or (annotate is None and count <= pairs.MOST_NUMBERS):
        pairs.write(ax, values, image)
    layers = [str(name) for name in dataset["layer_i"].values] if "layer_i" in dataset.coords else None
    pairs.name_blocks(ax, array, layers, boundaries)
    if colorbar:
        pairs.bar(ax, image, "share" if linear else common.wrap(common.label(array), common.span(ax, "y")), None)
    if legend:
        common.legend(ax, handles, **common.ABOVE)
    return ax
