"""One batch of data in any of its forms, cut into parts, moved, and summed up in a fingerprint."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fisherlens.errors import InputError, NonFiniteError

# Words of 8 bytes in a row of a checksum: a row and its weights stay in the cache, and sums are a small share of the data (our choice).
_WORDS = 2048


@dataclass(frozen=True)
class Batch:
    """One piece of the data: inputs (tensor, tuple or dict), targets or None, its size and how to call it in errors."""

    inputs: Any
    targets: Any
    size: int
    where: str

    def part(self, start: int, stop: int) -> Batch:
        """Examples start..stop of this batch; what does not count examples stays whole."""
        if start == 0 and stop >= self.size:
            return self
        targets = None if self.targets is None else self.targets[start:stop]
        inputs = map_tensors(self.inputs, lambda x: x[start:stop] if self.counts_examples(x) else x)
        stop = min(stop, self.size)
        return Batch(inputs, targets, stop - start, f"{self.where}, examples {start}..{stop - 1}")

    def take(self, index: Tensor) -> Batch:
        """Some examples of this batch, in another order."""
        targets = None if self.targets is None else self.targets[index.to(self.targets.device)]
        inputs = map_tensors(self.inputs, lambda x: x[index.to(x.device)] if self.counts_examples(x) else x)
        return Batch(inputs, targets, len(index), self.where)

    def counts_examples(self, x: Tensor) -> bool:
        """Whether the first axis of one of the inputs counts the examples."""
        return x.ndim > 0 and x.shape[0] == self.size

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        moved = self.targets.to(device) if isinstance(self.targets, Tensor) else self.targets
        there = Batch(map_tensors(self.inputs, lambda x: x.to(device)), moved, self.size, self.where)
        # no graph may hold what was made under inference mode, by a loader say
        return there.own() if any(x.is_inference() for x in there.tensors()) else there

    def own(self) -> Batch:
        """A copy: whatever the user, or a loader that fills its buffers anew, does to the data later does not reach it."""
        with torch.inference_mode(False):
            targets = None if self.targets is None else self.targets.clone()
            return replace(self, inputs=map_tensors(self.inputs, lambda x: x.clone()), targets=targets)

    def tensors(self) -> list[Tensor]:
        """Inputs and targets."""
        return [*tensors_of(self.inputs), *([] if self.targets is None else [self.targets])]

    def fingerprint(self) -> tuple[int, ...]:
        """Its size and a number per tensor that changes with any bit of it and with the order of its entries."""
        return (self.size, *(_fingerprint(x) for x in self.tensors()))


def make_batch(inputs: Any, targets: Any, where: str) -> Batch:
    """Check that inputs and targets count the same examples on their first axis."""
    if targets is not None and not isinstance(targets, Tensor):
        raise InputError(f"The targets of {where} must be a tensor or None; got {type(targets).__name__}.")
    tensors = tensors_of(inputs)
    for x in (*tensors, *([] if targets is None else [targets])):
        if x.is_meta or x.is_nested or x.layout != torch.strided:
            how = (
                "on the meta device, without values"
                if x.is_meta
                else "nested"
                if x.is_nested
                else f"of layout {x.layout}"
            )
            raise InputError(
                f"A tensor of {where} is {how}; an analysis needs dense values that can be cut into examples. Use x.to_dense(), or pad examples to one "
                "size, before handing them over."
            )
    first = next((x for x in tensors if x.ndim), None)
    if first is None:
        raise InputError(f"The inputs of {where} are a scalar; the first axis must count examples.")
    size = first.shape[0]
    if targets is not None:
        # beside the examples there may be what they share, such as a table of positions: the targets tell which is which
        fits = targets.ndim > 0 and any(x.ndim and x.shape[0] == targets.shape[0] for x in tensors)
        if not fits:
            length = "a scalar" if targets.ndim == 0 else f"length {targets.shape[0]}"
            raise InputError(
                f"Inputs and targets of {where} differ in length: {size} inputs, targets of {length}. The first axis of both counts examples."
            )
        size = targets.shape[0]
    return Batch(inputs, targets, size, where)


def joined(batches: Iterable[Batch], most: int) -> Iterator[Batch]:
    """Neighbouring batches as one, up to ``most`` examples together: where batches are small, each pays for work that is per parameter.

    Only where the inputs are one tensor: of several, some may be shared by the examples, and belong to a batch as it is.
    """
    held: list[Batch] = []
    for batch in batches:
        if held and not (_alike(held[0], batch) and sum(b.size for b in held) + batch.size <= most):
            yield _as_one(held)
            held = []
        held.append(batch)
        # what joins nothing, or leaves no room for another of its size, is handed on before the next is read
        if not isinstance(batch.inputs, Tensor) or sum(b.size for b in held) + batch.size > most:
            yield _as_one(held)
            held = []
        else:
            held[-1] = batch.own()  # a loader may fill the same memory with the next batch
    if held:
        yield _as_one(held)


def joined_size(sizes: Sequence[int], most: int) -> int:
    """Examples of the largest batch that :func:`joined` makes of batches of these sizes."""
    largest, held = 0, 0
    for size in sizes:
        held = held + size if held + size <= most else size
        largest = max(largest, held)
    return largest


def _alike(a: Batch, b: Batch) -> bool:
    """Whether two batches are inputs, and targets, of one shape and dtype per example."""
    if (
        not isinstance(a.inputs, Tensor)
        or not isinstance(b.inputs, Tensor)
        or (a.targets is None) != (b.targets is None)
    ):
        return False
    pairs = zip(a.tensors(), b.tensors(), strict=True)
    return all(x.shape[1:] == y.shape[1:] and x.dtype == y.dtype for x, y in pairs)


def _as_one(batches: Sequence[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    columns = zip(*(batch.tensors() for batch in batches), strict=True)
    with torch.inference_mode(False):
        inputs, *targets = (torch.cat(column) for column in columns)
    where = f"{batches[0].where} to {batches[-1].where}"
    return Batch(inputs, targets[0] if targets else None, sum(batch.size for batch in batches), where)


def _leaves(inputs: Any) -> Iterator[Tensor]:
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, Mapping):
        for x in inputs.values():
            yield from _leaves(x)
    elif isinstance(inputs, (tuple, list)):
        for x in inputs:
            yield from _leaves(x)


def tensors_of(inputs: Any) -> list[Tensor]:
    """The tensors among the inputs of a batch, nested or not."""
    leaves = list(_leaves(inputs))
    if not leaves:
        raise InputError(
            f"The inputs of a batch must hold tensors; got {type(inputs).__name__}. Convert arrays and lists with torch.as_tensor."
        )
    return leaves


def map_tensors(inputs: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same inputs with every tensor replaced; None and whatever else is no tensor pass through. A mapping becomes a dict."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {key: map_tensors(x, function) for key, x in inputs.items()}
    if isinstance(inputs, tuple) and hasattr(inputs, "_fields"):
        return type(inputs)(*(map_tensors(x, function) for x in inputs))
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(map_tensors(x, function) for x in inputs)
    return inputs


def describe(inputs: Any) -> str:
    """Shapes and dtypes of the inputs, for errors."""
    return ", ".join(f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in tensors_of(inputs))


def _fingerprint(x: Tensor) -> int:
    x = x.detach()
    x = x.int_repr() if x.is_quantized else x
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return _checksum(x.contiguous().reshape(-1).view(torch.uint8))


def _checksum(x: Tensor) -> int:
    """Of all bytes, in exact arithmetic on the device: words times random odd weights, summed modulo 2^64 by rows, then the CRC of the sums.

    The upper halves of the words are summed once more as numbers of their own: modulo 2^64 a product keeps nothing of a weight beside the
    highest bit of a word, so that where signs change, or change places, only the parity of their number would show.
    """
    x = x.clone() if x.storage_offset() % 8 else x
    whole = x.numel() // (8 * _WORDS) * (8 * _WORDS)
    words, weights = x[:whole].view(torch.int64).view(-1, _WORDS), _weights(x.device)
    sums = torch.stack([(words * weights).sum(1), (words >> 32).mul_(weights).sum(1)])
    return zlib.crc32(x[whole:].cpu().numpy(), zlib.crc32(sums.cpu().numpy()))


@cache
def _weights(device: torch.device) -> Tensor:
    drawn = torch.randint(-(2**62), 2**62, (_WORDS,), generator=torch.Generator().manual_seed(0), device="cpu")
    return (2 * drawn + 1).to(device)


def require_finite_inputs(batch: Batch) -> None:
    """Refuse NaN and infinity in the inputs, naming the first example."""
    inputs = batch.inputs
    named = (
        inputs.items()
        if isinstance(inputs, Mapping)
        else enumerate(inputs if isinstance(inputs, (tuple, list)) else [inputs])
    )
    for key, value in named:
        for x in _leaves(value):
            real = x.is_floating_point() or x.is_complex()
            if real and not torch.isfinite(x.sum()) and not torch.isfinite(x).all():  # a finite sum has finite terms
                bad = (~torch.isfinite(x)).reshape(x.shape[0] if x.ndim else 1, -1).any(1).nonzero()[0].item()
                which = "The inputs" if isinstance(inputs, Tensor) else f"Input {key!r}"
                raise NonFiniteError(
                    f"{which} of {batch.where} hold NaN or infinity, first at example {bad}. Clean or rescale the data before the analysis."
                )
