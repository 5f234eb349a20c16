"""A plane of parameter space: Fisher ellipses and contours of the true divergence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fisherlens.plots import _common as common

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes


def ellipse(
    dataset: xr.Dataset,
    ax: Axes | None = None,
    *,
    show_kl: bool = True,
    show_ratio: bool = False,
    equal: bool = False,
    legend: bool = True,
) -> Axes:
    """Draw the Fisher ellipse of each radius, and where the true divergence has the same value.

    Dashed is the quadratic model, solid the true divergence in the same colour: where the two part, the quadratic model ends. A plane that holds a
    direction without information has two parallel lines in place of each ellipse.

    Parameters
    ----------
    dataset
        What :func:`fisherlens.ellipse` returns.
    ax
        Axes to draw on; None for those of a new figure.
    show_kl
        Draw the contours of ``kl``, if it is there.
    show_ratio
        Tint the plane by the true divergence over the quadratic model: white where they agree, red where the divergence is larger.
    equal
        One length of both directions on the page, so that the shape of the ellipse is the true one; else each fills its axis.
    legend
        Name radii and line styles.

    Returns
    -------
    The Axes.

    Raises
    ------
    InputError: a Dataset without the boundary. TypeError: not a Dataset.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> angle = np.linspace(0, 2 * np.pi, 40)
    >>> circle = {"boundary_x": (("contour", "angle"), [np.cos(angle)]), "boundary_y": (("contour", "angle"), [np.sin(angle)])}
    >>> ax = ellipse(xr.Dataset(circle, {"x": [-2.0, 2.0], "y": [-2.0, 2.0]}))
    >>> len(ax.get_lines())  # the ellipse and the centre
    2
    """
    from matplotlib.lines import Line2D

    reads: dict[str, Any] = {"caller": "ellipse", "source": "fl.ellipse", "needs": ("contour", "angle")}
    x, y = (common.read(dataset, name, **reads) for name in ("boundary_x", "boundary_y"))
    count = x.sizes["contour"]
    radii = dataset["radius"].values.astype(float) if "radius" in dataset.coords else np.arange(count)
    tones = common.colors(count)
    ax = common.new_axes(ax, 6.2, 5.0)
    kl = dataset["kl"].transpose("y", "x") if "kl" in dataset and (show_kl or show_ratio) else None
    handles: list[Any] = []
    if show_ratio and kl is not None and "kl_quadratic" in dataset:
        _tint(ax, kl, dataset["kl_quadratic"].transpose("y", "x"))
    for k, tone in enumerate(tones):
        for points in _curves(dataset, x.values[k], y.values[k], radii[k]):
            ax.plot(*points, color=tone, linewidth=1.6, linestyle=(0, (5, 2)), zorder=3)
        if show_kl and kl is not None:
            fine = _refined(kl, dataset)
            if fine[2].min() < radii[k] < fine[2].max():
                ax.contour(*fine, levels=[radii[k]], colors=[tone], linewidths=1.8, zorder=2)
        handles.append(Line2D([], [], color=tone, linewidth=1.8, label=f"KL = {radii[k]:g} nat"))
    ax.plot(0, 0, marker="+", markersize=9, color=common.INK, linestyle="none", zorder=4)
    handles.append(Line2D([], [], color=common.INK, linestyle=(0, (5, 2)), label="½ δᵀFδ, the quadratic model"))
    if show_kl and kl is not None:
        handles.append(Line2D([], [], color=common.INK, label="true divergence on the data"))
    if "bounded" in dataset and not bool(dataset["bounded"]):
        handles.append(Line2D([], [], linestyle="none", label="unbounded: a direction without information"))
    for name, limit, say in (("x", ax.set_xlim, ax.set_xlabel), ("y", ax.set_ylim, ax.set_ylabel)):
        if name in dataset.coords:
            limit(float(dataset[name].min()), float(dataset[name].max()))
        say(common.label((x, y)[name == "y"]))
    if equal:
        ax.set_aspect("equal", adjustable="box")
    common.tidy(ax)
    if legend:
        common.legend_above(ax, handles)
    return ax


def _curves(dataset: xr.Dataset, x: np.ndarray, y: np.ndarray, radius: float) -> list[tuple[Any, Any]]:
    """The ellipse, or the two lines that are left of it where one direction has no information."""
    if np.isfinite(x).all() and np.isfinite(y).all():
        return [(x, y)]
    if not {"principal", "semi_axis", "eigenvalue"} <= set(dataset.data_vars):
        return []
    values, principal = dataset["eigenvalue"].values, dataset["principal"].transpose("rank", "axis_i").values
    if not values[0] > 0:
        return []
    semi = np.sqrt(2 * radius / values[0])
    reach = 10 * max(float(np.abs(dataset[name]).max()) for name in ("x", "y") if name in dataset.coords)
    along = principal[1] / np.abs(principal[1]).max() * reach
    lines = []
    for sign in (1, -1):
        foot = sign * semi * principal[0]
        lines.append(tuple(zip(foot - along, foot + along, strict=True)))
    return lines


def _tint(ax: Axes, kl: xr.DataArray, quadratic: xr.DataArray) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import TwoSlopeNorm

    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(quadratic.values > 0, np.log2(kl.values / quadratic.values), np.nan)
    shades = colormaps["RdBu_r"].with_extremes(bad="white")
    image = ax.pcolormesh(
        kl["x"].values,
        kl["y"].values,
        np.clip(np.nan_to_num(ratio, nan=0.0), -2, 2),
        cmap=shades,
        norm=TwoSlopeNorm(0, -2, 2),
        shading="nearest",
        alpha=0.55,
        linewidth=0,
        zorder=0,
    )
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.03, ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_yticklabels(["≤ ¼", "½", "1", "2", "≥ 4"])
    bar.outline.set_visible(False)
    bar.set_label("true divergence over its quadratic model", color=common.INK)
    bar.ax.tick_params(labelsize=common.TICK_SIZE, color=common.FAINT, labelcolor=common.INK)


def _refined(kl: xr.DataArray, dataset: xr.Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The divergence on a finer grid: its ratio to the quadratic model is smooth, also where an ellipse is smaller than a cell.

    Where the model vanishes away from the centre the difference takes the place of the ratio.
    """
    x, y, values = kl["x"].values, kl["y"].values, kl.values.astype(float)
    finite = values[np.isfinite(values)]
    values = np.where(np.isfinite(values), values, 1e3 * finite.max(initial=1.0))  # beyond every contour
    if "metric" not in dataset:
        return x, y, values
    metric = dataset["metric"].transpose("axis_i", "axis_j").values

    def model(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        u, v = np.meshgrid(x, y)
        return (metric[0, 0] * u**2 + 2 * metric[0, 1] * u * v + metric[1, 1] * v**2) / 2

    def between(grid: np.ndarray) -> np.ndarray:
        rows = np.stack([np.interp(fine_x, x, row) for row in grid])
        return np.stack([np.interp(fine_y, y, column) for column in rows.T], axis=1)

    fine_x, fine_y = np.linspace(x[0], x[-1], 241), np.linspace(y[0], y[-1], 241)
    coarse, fine = model(x, y), model(fine_x, fine_y)
    small = coarse <= 1e-9 * coarse.max()
    if small.sum() <= 1:  # the centre alone
        return fine_x, fine_y, fine * between(np.where(small, 1.0, values / np.where(small, 1.0, coarse)))
    return fine_x, fine_y, fine + between(values - coarse)
