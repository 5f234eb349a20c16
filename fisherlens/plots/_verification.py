"""Claims of the analysis against training: how far what was measured lies from what was predicted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fisherlens.plots import _common as common

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

# State of a claim → colour, marker and word: told apart by shape and word as well as by colour.
_STATES = {"holds": (common.PALETTE[0], "o"), "fails": (common.PALETTE[1], "X"), "undecided": (common.FAINT, "D")}
_LINEAR = 0.01  # agreement below which the axis is linear
_TICKS = (-1.0, -0.1, -0.01, 0.0, 0.01, 0.1, 1.0)


def verification(
    dataset: xr.Dataset,
    ax: Axes | None = None,
    *,
    show_range: bool = True,
    show_seeds: bool = True,
    show_numbers: bool = True,
    legend: bool = True,
) -> Axes:
    """Draw one row per claim: the agreement of measured with predicted, and the range in which the claim holds.

    The horizontal axis is what decides a claim: (measured − predicted) over the larger of the two sizes, which is 0 where both are equal
    and ±1 where one is nothing beside the other; for an order of things it is the rank correlation less 1. A claim that holds is a
    filled circle, one that fails a cross, one that the seeds leave undecided an open diamond.

    Parameters
    ----------
    dataset
        As :func:`fisherlens.verify` returns it.
    ax
        Axes to draw on; a new figure, as high as there are claims, by default.
    show_range
        Shade the range in which each claim holds.
    show_seeds
        Show the agreement of each seed as a small stroke.
    show_numbers
        Write predicted and measured at the right of each row.
    legend
        Explain the marks above the Axes.

    Returns
    -------
    The Axes.

    Raises
    ------
    InputError: a Dataset of another analysis. TypeError: no Dataset.

    Examples
    --------
    >>> import fisherlens as fl
    >>> ax = fl.plot.verification(fl.verify("linear-gaussian", "metric", seeds=1, num_examples=30))
    >>> ax.get_yticklabels()[0].get_text()
    'metric/top'
    """
    options = {"caller": "verification", "source": "fl.verify"}
    holds = common.read(dataset, "holds", **options, needs=("claim",))
    columns = {
        name: common.read(dataset, name, **options, needs=("claim",)).values
        for name in ("decided", "agreement", "agreement_low", "agreement_high", "tolerance", "relation")
    }
    names = common.entries(holds, "claim")
    ax = common.new_axes(ax, 9.0, 1.3 + 0.3 * len(names))
    ax.set_xscale("symlog", linthresh=_LINEAR, linscale=0.6)
    places = np.arange(len(names))
    states = np.where(holds.values, "holds", np.where(columns["decided"], "fails", "undecided"))
    shift = np.where(columns["relation"] == "order", 1.0, 0.0)  # a correlation of 1 is full agreement
    if show_range:
        _ranges(ax, places, columns["relation"], columns["tolerance"])
    ax.axvline(0.0, color=common.INK, linewidth=0.9, zorder=1)
    if show_seeds and {"predicted_by_seed", "measured_by_seed"} <= set(dataset):
        _strokes(ax, places, dataset, columns["relation"])
    for state, (shade, marker) in _STATES.items():
        chosen = (states == state) & np.isfinite(columns["agreement"])
        if not chosen.any():
            continue
        middle = columns["agreement"][chosen] - shift[chosen]
        low, high = (columns[f"agreement_{end}"][chosen] - shift[chosen] for end in ("low", "high"))
        reach = np.stack([np.maximum(middle - low, 0), np.maximum(high - middle, 0)])
        ax.errorbar(
            middle,
            places[chosen],
            xerr=reach,
            fmt=marker,
            color=shade,
            markerfacecolor="white" if state == "undecided" else shade,
            markersize=8 if state == "fails" else 6.5,
            elinewidth=1.4,
            capsize=2.5,
            zorder=4,
            label=f"{state} ({int((states == state).sum())})",
        )
    _frame(ax, names, states)
    if show_numbers:
        _numbers(ax, places, dataset)
    if legend:
        common.legend_above(ax, common.named(ax))
    return ax


def _ranges(ax: Axes, places: np.ndarray, relations: np.ndarray, tolerances: np.ndarray) -> None:
    """A bar from the smallest to the largest agreement with which a claim holds."""
    ends = {"equal": (-1, 1), "at least": (-1, np.inf), "at most": (-np.inf, 1)}
    label: str | None = "range in which the claim holds"
    for place, relation, tolerance in zip(places, relations, tolerances, strict=True):
        low, high = (
            (tolerance - 1, 0.0)
            if relation == "order"
            else (
                float(np.clip(end * tolerance if np.isfinite(end) else end, -2.0, 1.0)) for end in ends[str(relation)]
            )
        )
        ax.barh(place, high - low, left=low, height=0.62, color=common.GRID, zorder=0, label=label)
        label = None


def _strokes(ax: Axes, places: np.ndarray, dataset: xr.Dataset, relations: np.ndarray) -> None:
    predicted, measured = (
        dataset[f"{name}_by_seed"].transpose("claim", "seed").values for name in ("predicted", "measured")
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        size = np.maximum(np.abs(predicted), np.abs(measured))
        agreement = np.where(predicted == measured, 0.0, (measured - predicted) / np.where(size > 0, size, 1.0))
    agreement = np.where(relations[:, None] == "order", measured - 1.0, agreement)
    agreement = np.where(np.isinf(measured) & np.isfinite(predicted), np.sign(measured), agreement)
    rows = np.broadcast_to(places[:, None], agreement.shape)
    known = np.isfinite(agreement)
    ax.plot(
        agreement[known],
        rows[known],
        linestyle="none",
        marker="|",
        markersize=11,
        color=common.INK,
        alpha=0.45,
        zorder=3,
    )


def _numbers(ax: Axes, places: np.ndarray, dataset: xr.Dataset) -> None:
    """Predicted and measured with their units, in columns at the right, at distances in points that no width of the Axes changes."""
    units = dataset["unit"].values if "unit" in dataset else np.array(["1"] * len(places))
    columns = {
        name: [
            _short(float(value)) + ("" if str(unit) == "1" else f" {unit}")
            for value, unit in zip(dataset[name].values, units, strict=True)
        ]
        for name in ("predicted", "measured")
    }
    start = 10.0
    for name, words in columns.items():
        entries = [(-0.85, name, "bold"), *((place, word, "normal") for place, word in zip(places, words, strict=True))]
        for place, word, weight in entries:
            ax.annotate(
                word,
                (1.0, place),
                xycoords=ax.get_yaxis_transform(),
                xytext=(start, 0.0),
                textcoords="offset points",
                annotation_clip=False,
                fontsize=common.NOTE_SIZE,
                color=common.INK,
                weight=weight,
                va="center",
            )
        start += 0.62 * common.NOTE_SIZE * max(len(word) for _, word, _ in entries) + 10.0


def _short(value: float) -> str:
    if not np.isfinite(value):
        return "–" if np.isnan(value) else "never" if value > 0 else "−∞"
    lead, _, power = f"{value:.3g}".partition("e")
    return (f"{lead}e{int(power)}" if power else lead).replace("-", "−")


def _frame(ax: Axes, names: list[str], states: np.ndarray) -> None:
    common.tidy(ax, grid="x")
    ax.set_ylim(len(names) - 0.4, -1.2)
    ax.set_xlim(-2.0, 1.15)
    ax.set_xticks(_TICKS, ["−100 %", "−10 %", "−1 %", "0", "1 %", "10 %", "100 %"])
    ax.minorticks_off()
    ax.set_xlabel("measured beside predicted, relative difference")
    size = float(np.clip(common.span(ax, "y") * 72 / (1.25 * (len(names) + 1)), 5.0, common.TICK_SIZE))
    ax.set_yticks(range(len(names)), common.shorten(names, 40), fontsize=size)
    ax.tick_params(axis="y", length=0)
    for text, state in zip(ax.get_yticklabels(), states, strict=False):
        text.set_fontweight("normal" if state == "holds" else "bold")
