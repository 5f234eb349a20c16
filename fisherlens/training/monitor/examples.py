"""The examples that a run is judged by: chosen once, kept for the whole run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fisherlens.errors import InputError
from fisherlens.scores.batch import Batch, map_tensors
from fisherlens.scores.source import Source

Batches = list[tuple[Any, Tensor | None]]
_CPU = torch.device("cpu")


def choose_examples(data: Any, num_examples: int | None, seed: int) -> tuple[Batches, int]:
    """Copies of some examples in main memory, as a list of batches, and how many they are.

    From ``(inputs, targets)`` a random choice with a generator of its own, in their order; from batches the first ones, read no
    further than needed. None takes all.
    """
    if _is_whole(data):
        whole = _read(data, 0)
        if num_examples is not None and num_examples < whole.size:
            generator = torch.Generator().manual_seed(seed)
            whole = whole.take(
                torch.randperm(whole.size, generator=generator, device="cpu")[:num_examples].sort().values
            )
        return [_copied(whole)], whole.size
    if isinstance(data, Tensor | Mapping | str | bytes) or not isinstance(data, Iterable):
        raise InputError(
            f"data must be (inputs, targets), or batches of them such as a DataLoader; got {type(data).__name__}. "
            "For inputs without targets give (inputs, None)."
        )
    found: Batches = []
    taken = 0
    for place, item in enumerate(data):
        batch = _read(item, place)
        if num_examples is not None:
            batch = batch.part(0, num_examples - taken)
        found.append(_copied(batch))
        taken += batch.size
        if taken == num_examples:
            break
    if not found:
        raise InputError("The data to monitor are empty: no batch was found. Give (inputs, targets) or a DataLoader.")
    return found, taken


def _is_whole(data: Any) -> bool:
    """Whether data are one pair, or one mapping with labels, rather than a collection of batches."""
    if isinstance(data, Mapping):
        return "labels" in data
    if not isinstance(data, tuple | list) or len(data) != 2:
        return False
    inputs, targets = data
    if targets is not None and not isinstance(targets, Tensor):
        return False
    if isinstance(inputs, tuple | list):
        return any(isinstance(x, Tensor) for x in inputs)
    return isinstance(inputs, Tensor | Mapping)


def _read(item: Any, place: int) -> Batch:
    """One item as a batch in main memory, its form and its values checked as for any analysis."""
    batch = next(Source([item], _CPU).batches())
    return Batch(batch.inputs, batch.targets, batch.size, f"batch {place}")


def _copied(batch: Batch) -> tuple[Any, Tensor | None]:
    """A batch that does not change with the buffers that it came from."""
    targets = None if batch.targets is None else batch.targets.detach().clone()
    return map_tensors(batch.inputs, lambda x: x.detach().clone()), targets
