"""Fixed subsets of a data set, with as equally many examples of each class as there are."""

from __future__ import annotations

import numpy as np

from fisherlens.errors import InputError
from fisherlens.training.base import check_count

_SUBSET = "num_{part} must be at most {available:,}, the {part} examples of {name}; got {count:,}. Leave it out to take them all."


def balanced(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices of ``count`` examples, as equally many of each class as there are, in data order.

    The draw is always the same, and a smaller one is part of a larger one: the examples of each class are ranked once by chance, and
    those of the lowest ranks are taken.
    """
    chance = np.random.default_rng(0).permutation(len(labels))
    order = chance[np.argsort(labels[chance], kind="stable")]  # by class, within a class by chance
    first = np.searchsorted(labels[order], labels[order])  # where the class of each begins in that order
    rank = np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(labels)) - first
    return np.sort(np.lexsort((labels, rank))[:count])


def take(labels: np.ndarray, count: int | None, part: str, name: str) -> np.ndarray:
    """Indices of the ``num_train=`` or ``num_test=`` examples that were asked for: all of them, or a balanced subset."""
    if count is None:
        return np.arange(len(labels))
    if check_count(count, f"num_{part}") > len(labels):
        raise InputError(_SUBSET.format(part=part, available=len(labels), name=name, count=count))
    return balanced(labels, count)
