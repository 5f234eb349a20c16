"""A comparison of optimizers for the command line: its entries, a table and a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fisherlens import optim, plots
from fisherlens.errors import InputError, nearest
from fisherlens.report.train import CWNGD_OPTIONS, SGD_OPTIONS
from fisherlens.report.words import num, seconds, share
from fisherlens.training import Problem
from fisherlens.training.loop import MakeOptimizer

if TYPE_CHECKING:
    import xarray as xr

# Where nothing is said, an optimizer has the defaults of its class. Learning rates of the others are a coarse choice of ours for the small
# ready problems, since those of the sources are for larger networks and longer training.
TORCH: dict[str, tuple[str, dict[str, float]]] = {
    "sgd": ("SGD", SGD_OPTIONS),
    "adam": ("Adam", {"lr": 1e-3}),
    "adamw": ("AdamW", {"lr": 1e-3}),
}
OURS: dict[str, tuple[str, dict[str, float]]] = {
    "cw-ngd": ("CWNGD", CWNGD_OPTIONS),
    "mbf": ("MBF", {}),
    "tengrad": ("TENGraD", {}),
    "fngd": ("FNGD", {}),
    "projected-kfac": ("ProjectedKFAC", {}),
    "kfac": ("KFAC", {}),
    "ekfac": ("EKFAC", {}),
    "k-bfgs": ("KBFGS", {}),
    "ngd": ("NGD", {}),
    "shampoo": ("Shampoo", {}),
    "tnt": ("TNT", {}),
    "unit-wise": ("UnitWise", {}),
    "quasi-diagonal": ("QuasiDiagonal", {}),
}
NAMES = (*TORCH, *OURS)
_STEP = 10**0.5  # between the learning rates that are tried


def torch_optimizer(model: nn.Module, /, name: str, **options: Any) -> torch.optim.Optimizer:
    """One of torch's optimizers on all parameters of a network."""
    return getattr(torch.optim, name)(model.parameters(), **options)


def our_optimizer(model: nn.Module, /, name: str, **options: Any) -> torch.optim.Optimizer:
    """One of the natural-gradient methods."""
    return getattr(optim, name)(model, **options)


def optimizer(entry: str, problem: Problem, batch_size: int) -> MakeOptimizer:
    """The optimizer that ``name`` or ``name=lr`` stands for, a function that a worker process can import.

    Raises
    ------
    InputError: an unknown name (with the nearest), or a learning rate that is not a number above 0.
    """
    name, given, rate = entry.partition("=")
    if name not in NAMES:
        raise InputError(
            f"Unknown optimizer {name!r}. {nearest(name, NAMES)} Any other one goes through fl.compare_optimizers."
        )
    kind, options = (TORCH | OURS)[name]
    options = dict(options)
    if given:
        try:
            options["lr"] = float(rate)
        except ValueError:
            options["lr"] = float("nan")
        if not 0 < options["lr"] < float("inf"):
            raise InputError(
                f"The learning rate of {name!r} must be a number above 0; got {rate!r}. For example -o {name}=0.01."
            )
    if name in TORCH:
        return partial(torch_optimizer, name=kind, **options)
    if name == "fngd":  # its coefficients are those of one epoch
        options["epoch_steps"] = -(-len(problem.train[0]) // batch_size)
    return partial(our_optimizer, name=kind, likelihood=problem.likelihood, **options)


def grid(make: MakeOptimizer, problem: Problem, count: int) -> list[float]:
    """``count`` learning rates around that of an entry, √10 apart."""
    middle = float(make(problem.model(0)).defaults["lr"])
    return [float(f"{middle * _STEP ** (place - (count - 1) / 2):.3g}") for place in range(count)]


def target(text: str) -> tuple[str, float]:
    """The target that ``metric=number`` stands for."""
    name, given, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        hint = "" if given else " There is no '=' in it."
        raise InputError(f"--target takes METRIC=NUMBER, such as test_accuracy=0.95; got {text!r}.{hint}") from None


def picture(found: xr.Dataset) -> bytes | None:
    """Training loss by step and by time, steps to each target, and the search, as PNG; None where nothing was recorded."""
    from matplotlib.figure import Figure

    if not np.isfinite(found.train_loss.values).any():
        return None
    goals = [str(name) for name in found.target.values] if "target" in found.dims else []
    if np.isfinite(found.steps_to_own_accuracy.values).any():
        goals.append("own")
    searched = "option_lr" in found and bool(np.isfinite(found.trial_score.values).any())
    panels = 2 + len(goals) + searched
    rows = -(-panels // 2)
    canvas = Figure(figsize=(11.0, 4.2 * rows), layout="constrained")
    axes = canvas.subplots(rows, 2, squeeze=False).flatten()
    plots.optimizers(found, axes[0])
    plots.optimizers(found, axes[1], x="seconds", legend=False)
    for ax, goal in zip(axes[2:], goals, strict=False):
        plots.targets(found, ax, target=goal)
    if searched:
        plots.tuning(found, axes[2 + len(goals)], legend=False)
        axes[2 + len(goals)].set_title("The search, chosen trials ringed", loc="left", fontsize=10)
    for ax in axes[panels:]:
        ax.remove()
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def table(found: xr.Dataset) -> str:
    """What each optimizer reached and how soon, and what a search found, as lines of text."""
    parts = [_reached(found)]
    if "target" in found.dims or np.isfinite(found.steps_to_own_accuracy.values).any():
        parts.append(_targets(found))
    if "trial_score" in found:
        parts.append(_search(found))
    return "\n\n".join(parts)


def _names(found: xr.Dataset) -> list[str]:
    return [str(entry) for entry in found.optimizer.values]


def _reached(found: xr.Dataset) -> str:
    last = found.isel(step=-1).median("seed")
    rows = [("optimizer", "train loss", "test loss", "accuracy", "time", "")]
    for name in _names(found):
        one, runs = last.sel(optimizer=name), found.sel(optimizer=name)
        ended = [f"{int(runs[word].sum())} {word}" for word in ("diverged", "interrupted") if bool(runs[word].any())]
        numbers = (num(one.train_loss), num(one.test_loss), share(one.test_accuracy), seconds(float(one.seconds)))
        rows.append((name, *numbers, ", ".join(ended)))
    heading = f"After {int(found.step[-1])} steps, medians over {found.sizes['seed']} seeds, losses in nat:"
    return "\n".join([heading, "", *_lines(rows)])


def _targets(found: xr.Dataset) -> str:
    goals = [str(name) for name in found.target.values] if "target" in found.dims else []
    signs = [
        f"{goal} {'≥' if 'accuracy' in goal else '≤'} {float(found.target_value.sel(target=goal)):g}" for goal in goals
    ]
    own = bool(np.isfinite(found.steps_to_own_accuracy.values).any())
    share_of = f"{100 * float(found.attrs['own_accuracy_share']):g} % of own accuracy"
    rows: list[Sequence[str]] = [("optimizer", *signs, *([share_of] if own else []))]
    for name in _names(found):
        one = found.sel(optimizer=name)
        cells = [
            _how_long(one.steps_to_target.sel(target=goal), one.seconds_to_target.sel(target=goal)) for goal in goals
        ]
        cells += [_how_long(one.steps_to_own_accuracy, one.seconds_to_own_accuracy)] if own else []
        rows.append((name, *cells))
    every = int(found.attrs["step_resolution"])
    often = "every step" if every == 1 else f"every {every} steps"
    heading = f"Steps (time) to each target, medians over seeds, measured {often}:"
    return "\n".join([heading, "", *_lines(rows)])


def _how_long(steps: Any, spent: Any) -> str:
    """Median with unreached runs as later than all; how many arrived, where not all did."""
    values = steps.values
    there = np.isfinite(values)
    middle = np.median(np.where(there, values, np.inf))
    words = (
        f"{middle:.0f} ({seconds(float(np.median(np.where(there, spent.values, np.inf))))})"
        if np.isfinite(middle)
        else "not reached"
    )
    return words if there.all() or not there.any() else f"{words}, {there.sum()} of {len(values)}"


def _search(found: xr.Dataset) -> str:
    rows: list[Sequence[str]] = [("optimizer", "chosen", "score", "trials", "diverged", "time", "")]
    for name in _names(found):
        one = found.sel(optimizer=name)
        there = one.trial_options.values != ""
        if not there.any():
            continue
        best = one.trial_chosen.values
        words = (
            (str(one.trial_options.values[best][0]), num(one.trial_score.values[best][0])) if best.any() else ("-", "-")
        )
        edge = "at the edge" if bool(one.at_edge) else ""
        spent = seconds(float(np.nansum(one.trial_seconds.values)))
        rows.append((name, *words, str(there.sum()), str(int(one.trial_diverged.sum())), spent, edge))
    label = str(found.trial_score.attrs["long_name"])
    return "\n".join([f"The search, by {label} (lower is better):", "", *_lines(rows)])


def _lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of text, the first to the left and the others to the right; a last one without a heading is a remark."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *cells in rows:
        aligned = [
            cell.ljust(width) if not rows[0][-1] and place == len(cells) - 1 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths[1:], strict=True))
        ]
        lines.append("  ".join([first.ljust(widths[0]), *aligned]).rstrip())
    return lines
