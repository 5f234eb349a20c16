"""What a search found: the best trial of each optimizer, and all of them as variables of the result."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from fisherlens.errors import NumericalWarning, user_level
from fisherlens.training.record import Run
from fisherlens.training.tune import Tuning


@dataclass(frozen=True)
class Trial:
    """One choice of options, judged."""

    options: Mapping[str, Any]
    score: float  # mean over the seeds of the search, infinite where it diverged, NaN where it was not finished
    tie: float
    diverged: bool
    finished: bool
    seconds: float
    steps_taken: int


def judge(tuning: Tuning, options: Mapping[str, Any], runs: Sequence[Run], targets: Mapping[str, float]) -> Trial:
    """Sum up the runs of a trial, one for each seed of the search."""
    finished = not any(run.interrupted for run in runs)
    scores = np.array([tuning.score(run, targets) for run in runs]) if finished else np.full((1, 2), math.nan)
    spent = [run.metrics["seconds"][np.isfinite(run.metrics["seconds"])] for run in runs]
    return Trial(
        dict(options),
        *(float(mean) for mean in scores.mean(0)),
        diverged=any(run.diverged for run in runs),
        finished=finished,
        seconds=float(sum(values[-1] for values in spent if len(values))),
        steps_taken=sum(run.steps_taken for run in runs),
    )


def best(tuning: Tuning, trials: Mapping[str, Sequence[Trial]]) -> dict[str, int]:
    """Return the place of the best trial of each optimizer whose search is finished, with warnings where it says little."""
    chosen = {}
    for label, found in trials.items():
        if not found or not all(trial.finished for trial in found):
            continue
        order = [(trial.score, trial.tie, -trial.steps_taken) for trial in found]
        chosen[label] = place = order.index(min(order))
        if label not in tuning.options:
            continue
        if math.isinf(found[place].score):
            _warn(
                f"Every trial of optimizer {label!r} diverged; the one that lasted longest is reported: {_shown(found[place].options)}. "
                "Search smaller learning rates or larger dampings."
            )
        edges = tuning.edges(label, found[place].options)
        if edges:
            _warn(
                f"The best trial of optimizer {label!r}, {_shown(found[place].options)}, is at the edge of the search in {', '.join(edges)}: "
                "a better one may lie beyond. Search further there."
            )
    return chosen


def _warn(text: str) -> None:
    warnings.warn(text, NumericalWarning, stacklevel=user_level())


def _shown(options: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in options.items()
    )


def search_variables(
    tuning: Tuning, trials: Mapping[str, Sequence[Trial]], chosen: Mapping[str, int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return variables over (optimizer, trial), and the coordinate; rows of fewer trials are filled up with NaN."""
    most = max(len(found) for found in trials.values())
    grid = [[*found, *[None] * (most - len(found))] for found in trials.values()]
    by = ("optimizer", "trial")

    def table(value: Any, dtype: Any, empty: Any) -> np.ndarray:
        return np.array([[empty if trial is None else value(trial) for trial in row] for row in grid], dtype=dtype)

    what = {"final": "at the last step", "mean": "mean over recorded steps", "target": "steps to its target"}[
        tuning.criterion
    ]
    metric = "test error" if tuning.metric == "test_accuracy" else tuning.metric.replace("_", " ")
    units = "1" if tuning.criterion == "target" or tuning.metric == "test_accuracy" else "nat"
    variables: dict[str, Any] = {
        "trial_options": (by, table(lambda t: _shown(t.options), np.str_, ""), _named("options tried")),
        "trial_score": (by, table(lambda t: t.score, float, np.nan), _named(f"{metric}, {what}", units)),
        "trial_diverged": (by, table(lambda t: t.diverged, np.bool_, False), _named("whether a run of it diverged")),
        "trial_seconds": (by, table(lambda t: t.seconds, float, np.nan), _named("training time of the trial", "s")),
        "trial_chosen": (by, np.zeros((len(grid), most), np.bool_), _named("whether its options were reported")),
    }
    at_edge = np.zeros(len(grid), np.bool_)
    for row, (label, found) in enumerate(trials.items()):
        if label in chosen:
            variables["trial_chosen"][1][row, chosen[label]] = True
            at_edge[row] = bool(tuning.edges(label, found[chosen[label]].options))
    variables["at_edge"] = (("optimizer",), at_edge, _named("whether the best trial is at the edge of the search"))
    names = dict.fromkeys(name for options in tuning.options.values() for name in options)
    for name in names:
        values = [t.options.get(name) for row in grid for t in row if t is not None and name in t.options]
        if all(isinstance(value, Real) and not isinstance(value, bool) for value in values):
            numbers = table(lambda t, name=name: t.options.get(name, np.nan), float, np.nan)
            variables[f"option_{name}"] = (by, numbers, _named(f"{name} of the trial"))
    return variables, {"trial": ("trial", np.arange(most), {"long_name": "trial"})}


def _named(long_name: str, units: str = "1") -> dict[str, str]:
    return {"long_name": long_name, "units": units}
