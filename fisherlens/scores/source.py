"""Data as the user has it: tensors or a re-iterable of batches, read again and again, checked on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from fisherlens.errors import InputError
from fisherlens.scores.batch import Batch, describe, make_batch, require_finite_inputs, tensors_of

__all__ = ["Batch", "Source", "call", "describe", "tensors_of"]

# Bytes that go to another device at once, where the data are whole tensors (our choice).
_AT_ONCE = 64 * 2**20


def call(model: Callable[..., Any], inputs: Any) -> Tensor:
    """Apply the model to inputs: a tuple as positional, a dict as keyword arguments."""
    if isinstance(inputs, Mapping):
        return output_tensor(model(**inputs))
    if isinstance(inputs, (tuple, list)):
        return output_tensor(model(*inputs))
    return output_tensor(model(inputs))


def output_tensor(outputs: Any) -> Tensor:
    """The outputs themselves, or those under ``logits`` of an object or mapping; anything else is an InputError."""
    if isinstance(outputs, Tensor):
        return outputs
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if isinstance(found, Tensor):
        return found
    got = type(outputs).__name__
    if isinstance(outputs, (tuple, list)):
        got += f" of length {len(outputs)}"
    elif isinstance(outputs, Mapping):
        got += f" with the keys {list(outputs)}"
    raise InputError(
        f"The model must return one tensor of outputs, or an object or dict that holds it as logits; it returned {got}. Wrap it in a module whose "
        "forward returns the logits or means alone, such as `return self.model(x)[0]`."
    )


class Source:
    """Batches that can be read more than once; knows its number of examples after one light pass.

    Parameters
    ----------
    data
        ``(inputs, targets)`` tensors, or a re-iterable of such pairs (a DataLoader, a list of batches). A batch may also be a
        mapping with the targets under ``"labels"``.
    device
        Where batches are moved, one at a time; whole tensors in parts of 64 MiB.
    check
        Compare every later pass with the first one, batch by batch.
    """

    def __init__(self, data: Any, device: torch.device, *, check: bool = False):
        self.device, self.check = device, check
        self._whole = _as_pair(data)
        self._data = data
        self._known: list[tuple[int, ...]] | None = None
        if self._whole is None:
            _require_reiterable(data)
        self.sizes = []
        seen = []
        for batch in self._read():
            self.sizes.append(batch.size)
            if check and batch.size and self._whole is None:  # tensors are the same a moment later
                seen.append(batch.fingerprint())
        self.n_data = sum(self.sizes)
        if self.n_data == 0:
            raise InputError(
                "The data set is empty: no example was found, so there is no Fisher. If the data come from a generator, "
                "it may be exhausted; give a list of batches or a DataLoader."
            )
        if seen:
            self._known = seen

    @property
    def whole(self) -> bool:
        """Whether the data are tensors rather than batches that are read one by one."""
        return self._whole is not None

    def remember(self) -> None:
        """From now on the data must stay what they are, also tensors that the user may change in place."""
        if self.check and self._known is None:
            self._known = [batch.fingerprint() for batch in self._read() if batch.size]

    def _read(self) -> Iterator[Batch]:
        if self._whole is not None:
            inputs, targets = self._whole
            whole = make_batch(inputs, targets, "the data")
            step = self._step(whole)
            if whole.size <= step:
                yield whole
            else:
                yield from (whole.part(start, start + step) for start in range(0, whole.size, step))
            return
        for k, item in enumerate(self._data):
            inputs, targets = _split_item(item, k)
            yield make_batch(inputs, targets, f"batch {k}")

    def _step(self, whole: Batch) -> int:
        """Examples that are moved at once: all where nothing is moved."""
        if all(x.device == self.device for x in whole.tensors()):
            return max(whole.size, 1)
        held = sum(x.nbytes for x in whole.tensors())
        return max(1, _AT_ONCE * whole.size // max(held, 1))

    def batches(self) -> Iterator[Batch]:
        """All batches, on the device, checked for finiteness."""
        seen, k = 0, 0
        for batch in self._read():
            seen += batch.size
            if batch.size:
                if self._known is not None and (k >= len(self._known) or self._known[k] != batch.fingerprint()):
                    raise InputError(
                        f"{batch.where} differs from what it was in an earlier pass over the data, so F is not one fixed matrix. {self._cause()} "
                        "check_deterministic=False skips this test."
                    )
                k += 1
                moved = batch.to(self.device)
                require_finite_inputs(moved)
                yield moved
        if seen != self.n_data:
            raise InputError(
                f"The data gave {self.n_data} examples in the first pass and {seen} in a later one, so F is not one fixed matrix. {self._cause()}"
            )

    def _cause(self) -> str:
        """Why two passes may differ, and what to do."""
        if self._whole is not None:
            return "The tensors were changed in place: give a copy of them, or build F again."
        sampler = getattr(self._data, "sampler", None)
        sampler = getattr(getattr(self._data, "batch_sampler", None), "sampler", sampler)
        if isinstance(sampler, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)):
            return (
                f"The loader draws a new order in every pass (its sampler is a {type(sampler).__name__}). Turn off shuffling: "
                "DataLoader(..., shuffle=False), or give the tensors themselves."
            )
        dataset = getattr(self._data, "dataset", None)
        held = f"{type(self._data).__name__}" + ("" if dataset is None else f" of a {type(dataset).__name__}")
        return (
            f"The {held} gives other batches in every pass. Turn off shuffling, random sampling and augmentation in it, or give the tensors "
            "themselves."
        )


def _as_pair(data: Any) -> tuple[Any, Any] | None:
    """``(inputs, targets)`` if data is such a pair, or one mapping with labels, rather than a collection of batches."""
    if isinstance(data, Mapping) and "labels" in data:
        return _split_item(data, 0)
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        return None
    inputs, targets = data
    if targets is not None and not isinstance(targets, Tensor):
        return None
    if isinstance(inputs, (Tensor, Mapping)):
        return inputs, targets
    if isinstance(inputs, (tuple, list)) and any(isinstance(x, Tensor) for x in inputs):
        # ((x, y), (x, y)) is a list of two batches; ((x1, x2), y) is one pair: in the latter, targets is a tensor or None
        return inputs, targets
    return None


def _require_reiterable(data: Any) -> None:
    if isinstance(data, (Tensor, Mapping, str, bytes)) or not isinstance(data, Iterable):
        hint = " A dict is one batch if it holds its targets under 'labels'." if isinstance(data, Mapping) else ""
        raise InputError(
            f"data must be (inputs, targets) or a re-iterable of such batches; got {type(data).__name__}. "
            f"For inputs without targets give (inputs, None).{hint}"
        )
    if iter(data) is data:
        raise InputError(
            f"data is a one-shot {type(data).__name__}, which is empty after its first pass, while the analysis reads the data more than once. "
            "Use list(data), or a DataLoader."
        )


def _split_item(item: Any, k: int) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        if "labels" not in item:
            raise InputError(
                f"Batch {k} of the data is a {type(item).__name__} with the keys {list(item)}; its targets are expected under 'labels'. Rename "
                "them, or give pairs (inputs, targets); for inputs alone (inputs, None)."
            )
        return {key: value for key, value in item.items() if key != "labels"}, item["labels"]
    if isinstance(item, Sequence) and not isinstance(item, str) and len(item) == 2:
        return item[0], item[1]
    raise InputError(
        f"Batch {k} of the data must be a pair (inputs, targets); got {type(item).__name__}"
        f"{f' of length {len(item)}' if isinstance(item, Sequence) else ''}. For inputs alone give (inputs, None); convert arrays with torch.as_tensor."
    )
