"""Data as the user has it: tensors or a re-iterable of batches, read again and again, checked on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherlens.errors import InputError, NonFiniteError


@dataclass(frozen=True)
class Batch:
    """One piece of the data: inputs (tensor, tuple or dict), targets or None, its size and how to call it in errors."""

    inputs: Any
    targets: Any
    size: int
    where: str

    def part(self, start: int, stop: int) -> Batch:
        """Examples start..stop of this batch."""
        if start == 0 and stop >= self.size:
            return self
        targets = None if self.targets is None else self.targets[start:stop]
        inputs = _map(self.inputs, lambda x: x[start:stop] if x.ndim and x.shape[0] == self.size else x)
        return Batch(
            inputs, targets, min(stop, self.size) - start, f"{self.where}, examples {start}..{min(stop, self.size) - 1}"
        )

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        moved = self.targets.to(device) if isinstance(self.targets, Tensor) else self.targets
        return Batch(_map(self.inputs, lambda x: x.to(device)), moved, self.size, self.where)


def call(model: Callable[..., Any], inputs: Any) -> Tensor:
    """Apply the model to inputs: a tuple as positional, a dict as keyword arguments."""
    if isinstance(inputs, Mapping):
        outputs = model(**inputs)
    elif isinstance(inputs, (tuple, list)):
        outputs = model(*inputs)
    else:
        outputs = model(inputs)
    if not isinstance(outputs, Tensor):
        raise InputError(
            f"The model must return one tensor of outputs; it returned {type(outputs).__name__}. Wrap it in a module whose forward returns "
            "the logits or means alone."
        )
    return outputs


class Source:
    """Batches that can be read more than once; knows its number of examples after one light pass.

    Parameters
    ----------
    data
        ``(inputs, targets)`` tensors, or a re-iterable of such pairs (a DataLoader, a list of batches).
    device
        Where batches are moved, one at a time.
    """

    def __init__(self, data: Any, device: torch.device):
        self.device = device
        self._whole = _as_pair(data)
        self._data = data
        self._checksums: list[tuple[float, ...]] | None = None
        if self._whole is None:
            _require_reiterable(data)
        self.sizes = [batch.size for batch in self._read()]
        self.n_data = sum(self.sizes)
        if self.n_data == 0:
            raise InputError(
                "The data set is empty: no example was found, so there is no Fisher. If the data come from a generator, "
                "it may be exhausted; give a list of batches or a DataLoader."
            )

    def remember(self) -> None:
        """Note what each batch holds, so that a later pass that differs is an error instead of a wrong product."""
        self._checksums = [_checksum(batch) for batch in self._read() if batch.size]

    def _read(self) -> Iterator[Batch]:
        if self._whole is not None:
            inputs, targets = self._whole
            yield _batch(inputs, targets, "the data")
            return
        for k, item in enumerate(self._data):
            inputs, targets = _split_item(item, k)
            yield _batch(inputs, targets, f"batch {k}")

    def batches(self) -> Iterator[Batch]:
        """All batches, on the device, checked for finiteness."""
        seen, k = 0, 0
        for batch in self._read():
            seen += batch.size
            if batch.size:
                if self._checksums is not None and (
                    k >= len(self._checksums) or self._checksums[k] != _checksum(batch)
                ):
                    raise InputError(
                        f"{batch.where} differs from what it was in an earlier pass over the data, so F is not one fixed matrix. Turn off shuffling, random "
                        "sampling and augmentation in the loader, give the tensors themselves, or raise memory= so that one pass is enough."
                    )
                k += 1
                moved = batch.to(self.device)
                _require_finite_inputs(moved)
                yield moved
        if seen != self.n_data:
            raise InputError(
                f"The data gave {self.n_data} examples in the first pass and {seen} in a later one, so F is not one fixed matrix. Turn off random "
                "sampling and augmentation in the loader, or give the tensors themselves."
            )


def _as_pair(data: Any) -> tuple[Any, Any] | None:
    """``(inputs, targets)`` if data is such a pair rather than a collection of batches."""
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        return None
    inputs, targets = data
    if targets is not None and not isinstance(targets, Tensor):
        return None
    if isinstance(inputs, (Tensor, Mapping)):
        return inputs, targets
    if isinstance(inputs, tuple) and inputs and all(isinstance(x, Tensor) for x in inputs):
        # ((x, y), (x, y)) is a list of two batches; ((x1, x2), y) is one pair: in the latter, targets is a tensor or None
        return inputs, targets
    return None


def _require_reiterable(data: Any) -> None:
    if isinstance(data, (Tensor, Mapping, str, bytes)) or not isinstance(data, Iterable):
        raise InputError(
            f"data must be (inputs, targets) or a re-iterable of such batches; got {type(data).__name__}. "
            "For inputs without targets give (inputs, None)."
        )
    if iter(data) is data:
        raise InputError(
            f"data is a one-shot {type(data).__name__}, which is empty after its first pass, while the analysis reads the data more than once. "
            "Use list(data), or a DataLoader."
        )


def _split_item(item: Any, k: int) -> tuple[Any, Any]:
    if isinstance(item, Sequence) and not isinstance(item, str) and len(item) == 2:
        return item[0], item[1]
    raise InputError(
        f"Batch {k} of the data must be a pair (inputs, targets); got {type(item).__name__}"
        f"{f' of length {len(item)}' if isinstance(item, Sequence) else ''}. For inputs alone give (inputs, None)."
    )


def tensors_of(inputs: Any) -> list[Tensor]:
    """The tensors among the inputs of a batch."""
    values = (
        inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, (tuple, list)) else [inputs]
    )
    leaves = [x for x in values if isinstance(x, Tensor)]
    if not leaves:
        raise InputError(f"The inputs of a batch must hold tensors; got {type(inputs).__name__}.")
    return leaves


def describe(inputs: Any) -> str:
    """Shapes and dtypes of the inputs, for errors."""
    return ", ".join(f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in tensors_of(inputs))


def _map(inputs: Any, function: Callable[[Tensor], Tensor]) -> Any:
    def apply(x: Any) -> Any:
        return function(x) if isinstance(x, Tensor) else x

    if isinstance(inputs, Mapping):
        return {key: apply(x) for key, x in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(apply(x) for x in inputs)
    return apply(inputs)


def _batch(inputs: Any, targets: Any, where: str) -> Batch:
    first = tensors_of(inputs)[0]
    if first.ndim == 0:
        raise InputError(f"The inputs of {where} are a scalar; the first axis must count examples.")
    size = first.shape[0]
    if targets is not None:
        if not isinstance(targets, Tensor):
            raise InputError(f"The targets of {where} must be a tensor or None; got {type(targets).__name__}.")
        if targets.ndim == 0 or targets.shape[0] != size:
            length = "a scalar" if targets.ndim == 0 else f"length {targets.shape[0]}"
            raise InputError(
                f"Inputs and targets of {where} differ in length: {size} inputs, targets of {length}. The first axis of both counts examples."
            )
    return Batch(inputs, targets, size, where)


def _checksum(batch: Batch) -> tuple[float, ...]:
    """Sums that change with any entry or its place, in float64."""
    sums: list[float] = [batch.size]
    for x in [*tensors_of(batch.inputs), *([] if batch.targets is None else [batch.targets])]:
        flat = x.detach().reshape(-1).double()
        weight = torch.linspace(0.5, 1.5, len(flat), dtype=torch.float64, device=flat.device)
        sums += [flat.sum().item(), (flat @ weight).item()]
    return tuple(sums)


def _require_finite_inputs(batch: Batch) -> None:
    named = batch.inputs.items() if isinstance(batch.inputs, Mapping) else enumerate(tensors_of(batch.inputs))
    for key, x in named:
        if isinstance(x, Tensor) and x.is_floating_point() and not torch.isfinite(x).all():
            bad = (~torch.isfinite(x)).reshape(x.shape[0], -1).any(1).nonzero()[0].item()
            which = f"Input {key!r}" if isinstance(batch.inputs, (Mapping, tuple)) else "The inputs"
            raise NonFiniteError(
                f"{which} of {batch.where} hold NaN or infinity, first at example {bad}. Clean or rescale the data before the analysis."
            )
