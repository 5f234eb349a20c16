"""How long runs took to fixed targets, and to a share of the accuracy that they ended with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np

from fisherlens import errors
from fisherlens.errors import InputError
from fisherlens.training.base import TARGETS

OWN_SHARE = (
    0.9  # of its own final accuracy: the measure of the follow-up of CW-NGD (github.com/tranvansang/cw-ngd-results)
)
_NEVER = "this metric is never measured here: {why}. Leave this target out."


def check_targets(targets: Mapping[str, float], *, has_test: bool, has_accuracy: bool) -> dict[str, float]:
    """Return metric → number after a look at both."""
    if not isinstance(targets, Mapping):
        raise TypeError(f"targets must be a dict such as {{'train_loss': 0.1}}; got {type(targets).__name__}.")
    found = {}
    for name, value in targets.items():
        if name not in TARGETS:
            hint = errors.nearest(str(name), TARGETS)
            raise InputError(errors.UNKNOWN_NAME.format(what="target", name=name, hint=hint))
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"The target for {name} must be a number; got {type(value).__name__} {value!r}.")
        if not math.isfinite(value):
            raise InputError(f"The target for {name} must be a finite number; got {value}. Leave it out instead.")
        if name == "test_accuracy" and not has_accuracy:
            raise InputError(f"A target for {name}: " + _NEVER.format(why="the targets of this problem are no labels"))
        if name != "train_loss" and not has_test:
            raise InputError(f"A target for {name}: " + _NEVER.format(why="there are no test data"))
        found[str(name)] = float(value)
    return found


def first_step(steps: np.ndarray, values: np.ndarray, goal: np.ndarray | float, *, rising: bool) -> np.ndarray:
    """The index of the first recorded value that meets the goal, ``len(steps)`` where none does; over the last axis."""
    with np.errstate(invalid="ignore"):
        met = (values >= goal) if rising else (values <= goal)
    return np.where(met.any(-1), met.argmax(-1), len(steps))


def target_variables(
    steps: np.ndarray, metrics: Mapping[str, np.ndarray], targets: Mapping[str, float]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Variables and coordinates for a result, from metrics over (optimizer, seed, step)."""
    variables: dict[str, Any] = {}
    coords: dict[str, Any] = {}
    accuracy = metrics["test_accuracy"]
    found = first_step(steps, accuracy, OWN_SHARE * accuracy[..., -1:], rising=True)
    words = f"{100 * OWN_SHARE:g} % of its own final test accuracy"
    by, seconds = ("optimizer", "seed"), metrics["seconds"]
    variables["steps_to_own_accuracy"] = (by, _at(steps, found), _named(f"steps to {words}", "1"))
    variables["seconds_to_own_accuracy"] = (by, _at(seconds, found), _named(f"training time to {words}", "s"))
    if targets:
        rows = [
            first_step(steps, metrics[name], goal, rising=name == "test_accuracy") for name, goal in targets.items()
        ]
        by = ("target", "optimizer", "seed")
        reached = np.array([row < len(steps) for row in rows])
        values = np.array(list(targets.values()))
        variables["target_value"] = (("target",), values, _named("what the metric should reach, in its units", "1"))
        variables["reached"] = (by, reached, _named("whether the target was reached", "1"))
        taken = np.array([_at(steps, row) for row in rows])
        variables["steps_to_target"] = (by, taken, _named("optimizer steps to the target", "1"))
        spent = np.array([_at(seconds, row) for row in rows])
        variables["seconds_to_target"] = (by, spent, _named("training time to the target", "s"))
        coords["target"] = ("target", list(targets), {"long_name": "metric that a target is set for"})
    return variables, coords


def _named(long_name: str, units: str) -> dict[str, str]:
    return {"long_name": long_name, "units": units}


def _at(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """``values`` at an index along the last axis, NaN where the index is past the end."""
    full = np.broadcast_to(np.asarray(values, float), (*index.shape, np.shape(values)[-1]))
    inside = np.minimum(index, full.shape[-1] - 1)[..., None]
    taken = np.take_along_axis(full, inside, -1)[..., 0]
    return np.where(index < full.shape[-1], taken, np.nan)
