"""The search for options: the same number of trials for every optimizer, on seeds of its own, all of it reported."""

from __future__ import annotations

import itertools
import math
import numbers
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fisherlens import errors
from fisherlens.errors import InputError, NumericalWarning, user_level
from fisherlens.training.base import TARGETS, check_count, check_seeds
from fisherlens.training.record import Run
from fisherlens.training.targets import first_step

CRITERIA = ("final", "mean", "target")
_FIRST_SEED = 1000  # of those that a search takes by itself
_EDGE = 0.1  # of a range, on its logarithmic scale, from either end
_NOT_AN_OPTION = (
    "Tuning options of optimizer {label!r} must be a dict option -> list of values or fl.LogUniform(low, high), each not empty; got {got}. "
    "For example {{'lr': [0.01, 0.1]}}."
)


@dataclass(frozen=True)
class LogUniform:
    """A range of positive numbers to draw from, evenly on a logarithmic scale.

    Parameters
    ----------
    low, high
        Its ends, 0 < low < high.

    Raises
    ------
    InputError: ends that are not finite, not positive or not in order. TypeError: ends that are no numbers.

    Examples
    --------
    >>> round(LogUniform(1e-4, 1e-2).at(0.5), 12)
    0.001
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        """Check the ends."""
        for name in ("low", "high"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"{name} must be a number; got {type(value).__name__} {value!r}.")
        if not 0 < self.low < self.high < math.inf:
            raise InputError(
                f"LogUniform needs finite numbers with 0 < low < high; got low={self.low!r} and high={self.high!r}."
            )

    def at(self, share: float) -> float:
        """Return the number that ``share`` of the range lies below, for a share in [0, 1]."""
        return float(self.low * (self.high / self.low) ** share)


@dataclass(frozen=True, eq=False)
class Tuning:
    """A search for options that gives every optimizer the same budget, for :func:`compare_optimizers`.

    A trial is a choice of options. It is trained once for each tuning seed, and judged by the mean of its scores over them; a trial that
    diverges on any of them is worse than all that do not. The first of several equal ones is taken.

    Parameters
    ----------
    options
        Label of an optimizer → option → values: a list, or a :class:`LogUniform` range. They reach the entry as keywords.
    num_trials
        None tries every combination of the lists, in their order. A number draws so many at random: from ranges evenly on a logarithmic
        scale, from lists evenly. Every optimizer gets the same draws, at its own ranges.
    criterion
        What a run is judged by. ``"final"``: the metric at the last step. ``"mean"``: its mean over the recorded steps after the first,
        which rewards speed. ``"target"``: the steps to the target of that metric, those that do not reach it ordered by their last value.
    metric
        ``"train_loss"``, ``"test_loss"`` or ``"test_accuracy"`` (as the error, one minus it). Anything of the test set would choose by the
        data that the result is then reported on.
    num_steps
        Steps of a trial; by default those of the comparison.
    seeds
        How many seeds, or the seeds themselves. By default one, and never one that is reported: 1000, 1001, …
    seed
        Of the random draws.
    allow_unequal
        Do not warn where optimizers get different numbers of trials. One that is not named in ``options`` gets one.

    Raises
    ------
    InputError: an unknown criterion or metric, no values, a range without ``num_trials``, numbers below 1. TypeError: other types.

    Examples
    --------
    >>> search = Tuning({"sgd": {"lr": [0.1, 0.01], "momentum": [0.0, 0.9]}})
    >>> search.trials("sgd")[1]
    {'lr': 0.1, 'momentum': 0.9}
    >>> drawn = Tuning({"sgd": {"lr": LogUniform(1e-3, 1.0)}}, num_trials=4).trials("sgd")
    >>> len(drawn), all(1e-3 <= trial["lr"] <= 1 for trial in drawn)
    (4, True)
    """

    options: Mapping[str, Mapping[str, Sequence[Any] | LogUniform]]
    num_trials: int | None = None
    criterion: str = "final"
    metric: str = "train_loss"
    num_steps: int | None = None
    seeds: int | Sequence[int] = 1
    seed: int = 0
    allow_unequal: bool = False

    def __post_init__(self) -> None:
        """Check everything that can be checked without the comparison."""
        for what, value, known in (("criterion", self.criterion, CRITERIA), ("metric", self.metric, TARGETS)):
            if value not in known:
                hint = errors.nearest(str(value), known)
                raise InputError(errors.UNKNOWN_NAME.format(what=what, name=value, hint=hint))
        for name in ("num_trials", "num_steps"):
            if getattr(self, name) is not None:
                check_count(getattr(self, name), name)
        if not isinstance(self.options, Mapping) or not self.options:
            raise TypeError(
                "Tuning takes a dict label -> option -> values, such as {'sgd': {'lr': [0.01, 0.1]}}; "
                f"got {type(self.options).__name__}{' without entries' if isinstance(self.options, Mapping) else ''}."
            )
        for label, options in self.options.items():
            self._check(label, options)

    def _check(self, label: str, options: object) -> None:
        if not isinstance(options, Mapping) or not options:
            raise TypeError(_NOT_AN_OPTION.format(label=label, got=repr(options)))
        for option, values in options.items():
            if isinstance(values, LogUniform):
                if self.num_trials is None:
                    raise InputError(
                        f"Option {option!r} of optimizer {label!r} is a range, from which num_trials= values are drawn; num_trials is None. "
                        f"Give fl.Tuning(..., num_trials=8), or a list in the place of the range."
                    )
            elif isinstance(values, str) or not hasattr(values, "__len__") or len(values) == 0:
                raise TypeError(_NOT_AN_OPTION.format(label=label, got=f"{option!r}: {values!r}"))

    def trials(self, label: str) -> list[dict[str, Any]]:
        """Return the options of each trial of an optimizer, in order; one trial without options where it is not tuned."""
        options = self.options.get(label)
        if options is None:
            return [{}]
        lists = {name: _listed(values) for name, values in options.items() if not isinstance(values, LogUniform)}
        if self.num_trials is None:
            return [dict(zip(lists, chosen, strict=True)) for chosen in itertools.product(*lists.values())]
        draws = np.random.default_rng(self.seed).random((self.num_trials, len(options)))
        return [
            {
                name: values.at(share) if isinstance(values, LogUniform) else lists[name][int(share * len(values))]
                for (name, values), share in zip(options.items(), row, strict=True)
            }
            for row in draws
        ]

    def seeds_beside(self, reported: Sequence[int]) -> list[int]:
        """Return the seeds of the search; chosen by number they keep off those that are reported, named they may meet them, with a warning."""
        if isinstance(self.seeds, numbers.Integral):
            free = (seed for seed in itertools.count(_FIRST_SEED) if seed not in reported)
            return list(itertools.islice(free, check_count(self.seeds, "seeds")))
        chosen = check_seeds(self.seeds)
        if not chosen or len(set(chosen)) < len(chosen):
            raise InputError(f"A search needs at least one seed, each once; got seeds {chosen}.")
        shared = sorted(set(chosen) & set(reported))
        if shared:
            warnings.warn(
                f"Seeds {shared} are both searched and reported, so the reported runs are better than new ones would be. "
                "Choose other seeds for the search.",
                NumericalWarning,
                stacklevel=user_level(),
            )
        return chosen

    def score(self, run: Run, targets: Mapping[str, float]) -> tuple[float, float]:
        """Return what a run is judged by, lower is better, and what decides between equal ones; infinite where it diverged."""
        values = run.metrics[self.metric]
        values = 1 - values if self.metric == "test_accuracy" else values
        last = float(values[-1])
        if run.diverged or not math.isfinite(last):
            return math.inf, math.inf
        if self.criterion == "final":
            return last, last
        if self.criterion == "mean":
            return float(values[1:].mean()), last
        goal = targets[self.metric]
        found = int(first_step(run.steps, run.metrics[self.metric], goal, rising=self.metric == "test_accuracy"))
        # a run that did not arrive is worse than any that did; scores stay numbers, so that means over seeds are
        return float(run.steps[found]) if found < len(run.steps) else float(2 * run.steps[-1]), last

    def edges(self, label: str, chosen: Mapping[str, Any]) -> list[str]:
        """Return the options whose chosen value is at an end of what was searched."""
        found = []
        for name, values in self.options.get(label, {}).items():
            value = chosen[name]
            if isinstance(values, LogUniform):
                share = math.log(value / values.low) / math.log(values.high / values.low)
                at_end = not _EDGE <= share <= 1 - _EDGE
            else:
                known = [v for v in _listed(values) if isinstance(v, numbers.Real) and not isinstance(v, bool)]
                at_end = len(set(known)) > 1 and value in (min(known), max(known))
            if at_end:
                found.append(name)
        return found


def as_tuning(tune: Tuning | Mapping[str, Any] | None, labels: Sequence[str]) -> Tuning | None:
    """Return the search that ``tune=`` means, after a look at its labels and the budgets that it gives."""
    if tune is None:
        return None
    if not isinstance(tune, Tuning):
        if not isinstance(tune, Mapping):
            raise TypeError(f"tune must be a dict label -> options or a fl.Tuning; got {type(tune).__name__}.")
        tune = Tuning(tune)
    for label in tune.options:
        if label not in labels:
            raise InputError(
                errors.UNKNOWN_NAME.format(
                    what="optimizer in tune", name=label, hint=errors.nearest(str(label), labels)
                )
            )
    budgets = {label: len(tune.trials(label)) for label in labels}
    if len(set(budgets.values())) > 1 and not tune.allow_unequal:
        shown = ", ".join(f"{label!r} {count}" for label, count in budgets.items())
        warnings.warn(
            f"The optimizers get different numbers of trials: {shown}. The one that is tried more often looks better than it is. "
            "Give each the same number, or fl.Tuning(..., allow_unequal=True) if that is meant.",
            NumericalWarning,
            stacklevel=user_level(),
        )
    return tune


def _listed(values: Any) -> list[Any]:
    return values.tolist() if hasattr(values, "tolist") else list(values)
