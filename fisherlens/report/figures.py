"""Every figure of the page, drawn from the results alone; what is missing is left out."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fisherlens import plots
from fisherlens.errors import FisherLensError
from fisherlens.plots._common import INK, PALETTE
from fisherlens.report import findings
from fisherlens.report.blocks import SEGMENTS
from fisherlens.report.drawing import cumulative, one_step, relations, segment_speed
from fisherlens.report.elements import Figure
from fisherlens.report.relations import SILENT, silent
from fisherlens.spectrum import WHOLE

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure as Canvas

DPI = 180  # of the files; a page shows them at 96, so that they stay sharp on dense screens and in print
_WIDTH = 10.0  # inches: the width of the page's column


def draw_all(tree: xr.DataTree) -> dict[str, Figure]:
    """Draw what the tree has results for: name without number → figure, in the order of the page."""
    import matplotlib as mpl
    import matplotlib.style

    drawn: dict[str, Figure] = {}
    with mpl.style.context("default"), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of the layout, where a very small figure has no room; the picture is still drawn
        for number, (name, draw) in enumerate(_FIGURES.items(), start=1):
            try:
                canvas = draw(tree)
            except FisherLensError:  # nothing that a plot could put on its axes, such as a spectrum of zeros
                continue
            if canvas is None:
                continue
            buffer = io.BytesIO()
            canvas.savefig(buffer, format="png", dpi=DPI)
            width, height = (round(96 * side) for side in canvas.get_size_inches())
            drawn[name] = Figure(f"{number:02d}-{name}", buffer.getvalue(), width, height)
    return drawn


def _canvas(height: float, width: float = _WIDTH) -> Canvas:
    from matplotlib.figure import Figure as Canvas

    return Canvas(figsize=(width, height), layout="constrained")


def _title(ax: Any, tree: xr.DataTree, stage: str) -> None:
    """Name the stage of a panel, where there are several."""
    if len(findings.stages_of(tree)) > 1:
        ax.set_title(stage, fontsize=10, loc="left")


def _information(tree: xr.DataTree) -> Canvas | None:
    found = findings.node(tree, "information")
    if found is None:
        return None
    layers, stages = found.sizes["layer"], found.sizes["stage"]
    canvas = _canvas(float(np.clip(1.4 + (0.16 + 0.2 * stages) * layers, 2.4, 12.0)))
    left, right = canvas.subplots(1, 2)
    plots.information(found, left, variable="information", scale="log" if _spread(found.information) > 30 else "linear")
    plots.information(found, right, variable="effective_dimension", legend=False)
    right.set_ylabel("")
    return canvas


def _spread(values: xr.DataArray) -> float:
    positive = values.values[values.values > 0]
    return float(positive.max() / positive.min()) if positive.size else 1.0


def _units(tree: xr.DataTree) -> Canvas | None:
    from matplotlib.ticker import MaxNLocator

    found = findings.node(tree, "units")
    if found is None:
        return None
    canvas = _canvas(3.7)
    stages = [str(name) for name in found.stage.values]
    shown = [stages[0], stages[-1]] if len(stages) > 1 else stages
    axes = np.atleast_1d(canvas.subplots(1, len(shown)))
    for ax, stage in zip(axes, shown, strict=True):
        one = found.sel(stage=stage, drop=True)
        told = one.information
        told = told.where(told > SILENT * told.max(), 0.0)
        scale = "log" if _spread(told) > 10 else "linear"
        plots.information(one.assign(information=told), ax, scale=scale, legend=False)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        _title(ax, tree, stage)
    for ax in axes[1:]:
        ax.set_ylabel("")
    layers = list(dict.fromkeys(str(name) for name in found.layer.values))
    if 1 < len(layers) <= 10:
        handles = [line for line in axes[0].get_lines() if not str(line.get_label()).startswith("_")]
        names = [str(line.get_label()).split(" (")[0] for line in handles]
        canvas.legend(handles, names, loc="outside upper left", ncols=len(names), frameon=False, fontsize=9)
    return canvas


def _spectrum(tree: xr.DataTree) -> Canvas | None:
    found = findings.node(tree, "spectrum")
    if found is None:
        return None
    canvas = _canvas(4.0)
    left, right = canvas.subplots(1, 2)
    plots.spectrum(found.sel(layer=WHOLE, drop=True), left)
    cumulative(found.sel(layer=WHOLE, drop=True), right)
    return canvas


def _spectrum_layers(tree: xr.DataTree) -> Canvas | None:
    found = findings.node(tree, "spectrum")
    if found is None or found.sizes["layer"] < 3:  # a single layer is the whole
        return None
    stages = [str(name) for name in found.stage.values]
    shown = [stages[0], stages[-1]] if len(stages) > 1 else stages
    canvas = _canvas(4.6, _WIDTH if len(shown) > 1 else 6.4)
    for part, stage in zip(np.atleast_1d(canvas.subfigures(1, len(shown))), shown, strict=True):
        if len(stages) > 1:
            part.suptitle(stage, fontsize=11, x=0.02, ha="left")
        plots.spectrum(found.sel(stage=stage, drop=True), part.subplots())
    return canvas


def _coupling(tree: xr.DataTree) -> Canvas | None:
    found = findings.node(tree, "coupling")
    if found is None or found.sizes["block_i"] < 2:
        return None
    stages = [str(name) for name in found.stage.values]
    canvas = _canvas(3.5 if len(stages) > 1 else 4.8, _WIDTH if len(stages) > 1 else 6.0)
    axes = np.atleast_1d(canvas.subplots(1, len(stages)))
    for ax, stage in zip(axes, stages, strict=True):
        plots.coupling(found.sel(stage=stage, drop=True), ax, colorbar=stage == stages[-1], legend=False)
        _title(ax, tree, stage)
        ax.set_xlabel("")
        ax.set_ylabel("")
    return canvas


def _segments(tree: xr.DataTree) -> Canvas | None:
    layers = _segment_layers(tree)
    if not layers:
        return None
    columns = min(2, len(layers))
    rows = -(-len(layers) // columns)
    canvas = _canvas(4.5 * rows, _WIDTH if columns > 1 else 6.0)
    axes = np.atleast_1d(canvas.subplots(rows, columns)).ravel()
    for ax, (layer, found) in zip(axes, layers.items(), strict=False):
        stage = str(found.stage.values[-1])
        few = found.sizes["block_i"] <= 16
        one = found.sel(stage=stage, drop=True)
        heard = ~silent(one)
        both = heard[:, None] & heard
        one = one.assign(coupling=one.coupling.where(both), noise_floor=one.noise_floor.where(both))
        plots.coupling(one, ax, annotate=few, show_significant=few, legend=False, boundaries=False)
        several = len(findings.stages_of(tree)) > 1
        ax.set_title(
            f"{layer}: {found.sizes['block_i']} segments" + (f", {stage}" if several else ""), fontsize=10, loc="left"
        )
        ax.set_ylabel("")
        ax.set_xlabel(
            _place_ticks(ax, [str(label).removeprefix(layer) for label in found.block_i.values], few), fontsize=9
        )
    for ax in axes[len(layers) :]:
        ax.set_visible(False)
    return canvas


def _segment_layers(tree: xr.DataTree) -> dict[str, xr.Dataset]:
    """Layer → couplings of its segments."""
    summary = findings.node(tree, "segment_relations")
    if summary is None:
        return {}
    names = [str(name) for name in summary.layer.values]
    found = {name: findings.node(tree, f"segments/{name.replace('/', '_')}") for name in names}
    return {name: result for name, result in found.items() if result is not None}


def _place_ticks(ax: Any, labels: list[str], every: bool) -> str:
    """Name every segment by its place, or only the first segment of every few outputs; what the axis shows, in words."""
    words = [label.strip(" .").rpartition(" ") for label in labels]
    kinds = {kind for kind, _, _ in words if kind}
    kind = kinds.pop() if len(kinds) == 1 else ""
    names = [place if own == kind else f"{own} {place}".strip() for own, _, place in words]
    pairs = any("," in name for name in names)
    places = list(range(len(names)))
    if not every:
        outputs = [name.split(",")[0] + ("]" if "[" in name and "," in name else "") for name in names]
        starts = [place for place in places if place == 0 or outputs[place - 1] != outputs[place]]
        places = starts[:: max(1, -(-len(starts) // 8))]
        names = outputs
    shown = [names[place] for place in places]
    ax.set_xticks(
        places,
        shown,
        rotation=90 if max(map(len, shown)) > 3 else 0,
        fontsize=8,
        ha="center",
        va="top",
        rotation_mode="default",
    )
    ax.set_yticks(places, shown, fontsize=8)
    ax.tick_params(length=0 if every else 3)
    return (kind or "segment") + ((" (output,input)" if every else ", by output") if pairs else "")


def _relations(tree: xr.DataTree) -> Canvas | None:
    found = findings.node(tree, "segment_relations")
    if found is None:
        return None
    stage = str(found.stage.values[-1])
    return relations(found.sel(stage=stage, drop=True), _canvas, stage if len(findings.stages_of(tree)) > 1 else "")


def _segmentations(tree: xr.DataTree) -> Canvas | None:
    found = findings.node(tree, "independence")
    if found is None:
        return None
    # The plot groups bars by layer; here the groups are the stages of the whole network.
    whole = found.sel(layer=WHOLE, drop=True).rename(stage="layer")
    canvas = _canvas(6.6)
    names = ("energy_captured", "natural_gradient_cosine", "decrease_ratio", "condition_number")
    axes = dict(zip(names, canvas.subplots(2, 2).ravel(), strict=True))
    plots.independence_panels(whole, axes, variables=names, legend=False)
    for ax in axes.values():
        ax.set_xlabel("")
        if found.sizes["stage"] == 1:
            ax.set_xticks([])
    _legend_on_top(canvas, axes["energy_captured"], [str(name) for name in found.partition.values])
    return canvas


def _legend_on_top(canvas: Canvas, ax: Any, partitions: list[str]) -> None:
    handles, names = ax.get_legend_handles_labels()
    pairs = sorted(
        zip(names, handles, strict=True),
        key=lambda pair: (pair[0] not in partitions, partitions.index(pair[0]) if pair[0] in partitions else 0),
    )
    canvas.legend(
        [h for _, h in pairs], [n for n, _ in pairs], loc="outside upper left", ncols=5, frameon=False, fontsize=9
    )


def _segmentations_layers(tree: xr.DataTree) -> Canvas | None:
    found = findings.node(tree, "independence")
    if found is None or found.sizes["layer"] < 3:
        return None
    canvas = _canvas(3.9)
    stage = str(found.stage.values[-1])
    ax = canvas.subplots()
    plots.independence(found.sel(stage=stage, drop=True), ax, variable="decrease_ratio", legend=False)
    _title(ax, tree, stage)
    _legend_on_top(canvas, ax, [str(name) for name in found.partition.values])
    return canvas


def _one_step(tree: xr.DataTree) -> Canvas | None:
    found = findings.node(tree, "one_step")
    return None if found is None else one_step(found, _canvas)


def _training(tree: xr.DataTree) -> Canvas | None:
    found = findings.node(tree, "training")
    if found is None or not np.isfinite(found.train_loss.values).any():
        return None
    canvas = _canvas(6.4)
    axes = canvas.subplots(2, 2).ravel()
    shades = {SEGMENTS: _segment_shade(tree, SEGMENTS), "sgd": INK}
    drawn = [("train_loss", "step"), ("train_loss", "seconds"), ("test_loss", "step"), ("test_accuracy", "step")]
    for ax, (variable, x) in zip(axes, drawn, strict=True):
        if np.isfinite(found[variable].values).any():
            plots.optimizers(found, ax, variable=variable, x=x, colors=shades, legend=ax is axes[0])
        else:
            ax.set_visible(False)
    return canvas


def _segment_training(tree: xr.DataTree) -> Canvas | None:
    found = findings.node(tree, "segment_training")
    if found is None or not np.isfinite(found.train_loss.values).any():
        return None
    canvas = _canvas(4.2)
    left, right = canvas.subplots(1, 2)
    names = [str(name) for name in found.optimizer.values]
    shades = {name: _segment_shade(tree, name) for name in names}
    plots.optimizers(found, left, colors=shades)
    trained = findings.trained_order(tree)
    if trained is None:
        right.set_visible(False)
    else:
        segment_speed(right, *trained, shades=shades)
    return canvas


def _verification(tree: xr.DataTree) -> Canvas | None:
    found = findings.node(tree, "verify")
    if found is None or not np.isfinite(found.agreement.values).any():
        return None
    canvas = _canvas(1.5 + 0.3 * found.sizes["claim"])
    plots.verification(found, canvas.subplots())
    return canvas


def _segment_shade(tree: xr.DataTree, name: str) -> str:
    """The colour that a segmentation has in every figure: that of its place among all of them."""
    judged = findings.node(tree, "independence")
    known = [str(entry) for entry in judged.partition.values] if judged is not None else [SEGMENTS]
    return PALETTE[known.index(name) % len(PALETTE)] if name in known else PALETTE[0]


_FIGURES: dict[str, Callable[[xr.DataTree], Canvas | None]] = {
    "information": _information,
    "units": _units,
    "spectrum": _spectrum,
    "spectrum-layers": _spectrum_layers,
    "coupling-layers": _coupling,
    "coupling-segments": _segments,
    "relations": _relations,
    "segmentations": _segmentations,
    "segmentations-layers": _segmentations_layers,
    "one-step": _one_step,
    "training": _training,
    "segment-training": _segment_training,
    "verification": _verification,
}

FIGURE_NAMES = tuple(_FIGURES)
