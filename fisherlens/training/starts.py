"""What a comparison asks of its start: a new network each time, of equal initial weights, on which losses are finite."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import numpy as np
from torch import nn
from torch.nn.parameter import is_lazy

from fisherlens.errors import InputError, NonFiniteError, NumericalWarning, user_level
from fisherlens.training.base import Problem
from fisherlens.training.loop import BEFORE
from fisherlens.training.record import Run
from fisherlens.training.resume import digest

_SAME = (
    "The factory of problem {name!r} returned a network with parameters of the one before, so that each run would go on where the last one ended. It must build "
    "a new network in every call: lambda: MyNetwork(), not lambda: network; for a trained one, lambda: copy.deepcopy(network)."
)
_DIFFERENT = (
    "Two networks of problem {name!r} with the same seed have different initial weights, so that differences between optimizers are those of their starts too, "
    "and a comparison cannot be resumed to the bit. Its factory draws from another source than torch's global generator, which is seeded for it (numpy's, or "
    "a generator of its own): draw from torch, or seed that source in the factory."
)


def checked_start(problem: Problem, seed: int) -> nn.Module:
    """A network of the problem, after a look at whether a second one is another object with equal weights.

    Raises
    ------
    InputError: both share parameters. NumericalWarning, as a warning: their weights differ.
    """
    first, second = problem.model(seed), problem.model(seed)
    if {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}:
        raise InputError(_SAME.format(name=problem.name))
    made = [p for model in (first, second) for p in model.parameters()]
    if not any(map(is_lazy, made)) and digest(list(first.parameters())) != digest(list(second.parameters())):
        warnings.warn(_DIFFERENT.format(name=problem.name), NumericalWarning, stacklevel=user_level())
    return first


def refuse_if_none_began(runs: Iterable[Run]) -> None:
    """Raise what kept every run from its first step: then the problem is broken, and not one seed of it."""
    all_runs = list(runs)
    if all(run.diverged and np.isnan(run.metrics["train_loss"][0]) for run in all_runs):
        error = NonFiniteError(all_runs[0].ended_by.removeprefix(BEFORE))
        error.add_note("So it was in every run, before its first step.")
        raise error
