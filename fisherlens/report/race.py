"""A comparison of optimizers for the command line: its entries, a table and a picture."""

from __future__ import annotations

import io
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fisherlens import plots
from fisherlens.errors import InputError, nearest
from fisherlens.report.train import CWNGD_OPTIONS, SGD_OPTIONS
from fisherlens.report.words import num, seconds, share
from fisherlens.training import Problem
from fisherlens.training.loop import MakeOptimizer

if TYPE_CHECKING:
    import xarray as xr

_DEFAULTS: dict[str, dict[str, float]] = {"cw-ngd": CWNGD_OPTIONS, "sgd": SGD_OPTIONS, "adam": {"lr": 1e-3}}


def optimizer(entry: str, problem: Problem) -> MakeOptimizer:
    """The optimizer that ``name`` or ``name=lr`` stands for.

    Raises
    ------
    InputError: an unknown name (with the nearest), or a learning rate that is not a number above 0.
    """
    name, given, rate = entry.partition("=")
    if name not in _DEFAULTS:
        raise InputError(
            f"Unknown optimizer {name!r}. {nearest(name, _DEFAULTS)} Any other one goes through fl.compare_optimizers."
        )
    options = dict(_DEFAULTS[name])
    if given:
        try:
            options["lr"] = float(rate)
        except ValueError:
            options["lr"] = float("nan")
        if not 0 < options["lr"] < float("inf"):
            raise InputError(
                f"The learning rate of {name!r} must be a number above 0; got {rate!r}. For example -o {name}=0.01."
            )
    if name == "cw-ngd":
        from fisherlens.optim import CWNGD

        return partial(CWNGD, likelihood=problem.likelihood, **options)
    make: Any = torch.optim.SGD if name == "sgd" else torch.optim.Adam
    return lambda model: make(model.parameters(), **options)


def picture(found: xr.Dataset) -> bytes | None:
    """Training loss by step and by time, as PNG; None where nothing was recorded."""
    from matplotlib.figure import Figure

    if not np.isfinite(found.train_loss.values).any():
        return None
    canvas = Figure(figsize=(10.0, 4.0), layout="constrained")
    left, right = canvas.subplots(1, 2)
    plots.optimizers(found, left)
    plots.optimizers(found, right, x="seconds", legend=False)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def table(found: xr.Dataset) -> str:
    """What each optimizer reached, as lines of text."""
    last = found.isel(step=-1).median("seed")
    rows = [("optimizer", "train loss", "test loss", "accuracy", "time", "")]
    for name in [str(entry) for entry in found.optimizer.values]:
        one, runs = last.sel(optimizer=name), found.sel(optimizer=name)
        ended = [f"{int(runs[word].sum())} {word}" for word in ("diverged", "interrupted") if bool(runs[word].any())]
        numbers = (num(one.train_loss), num(one.test_loss), share(one.test_accuracy), seconds(float(one.seconds)))
        rows.append((name, *numbers, ", ".join(ended)))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [f"After {int(found.step[-1])} steps, medians over {found.sizes['seed']} seeds, losses in nat:", ""]
    for name, *numbers, ended in rows:
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells, ended]).rstrip())
    return "\n".join(lines)
