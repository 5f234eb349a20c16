"""How much memory the graph of a computation holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def held_bytes(run: Callable[[], Any], known: Iterable[Tensor], *, keep: bool = False) -> int:
    """Bytes that the graph of what ``run`` makes holds beside known tensors.

    Where the forward pass takes derivatives by ``torch.func``, which allows nobody to look at what a graph saves, it is all that is made.

    Parameters
    ----------
    run
        Makes a graph.
    known
        Tensors whose memory does not count.
    keep
        Whether what was saved for a graph that is gone before the end counts too.
    """
    before = {_memory(x)[0] for x in known}
    held: dict[int, tuple[int, Tensor | None]] = {}

    def note(x: Tensor, keep: bool = keep) -> Tensor:
        address, nbytes = _memory(x)
        if address not in before:
            held[address] = (nbytes, x if keep else None)  # kept alive, no address is used twice
        return x

    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            made = run()
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        held.clear()
        with _Results(lambda x: note(x, True)):
            made = run()
    del made
    return sum(nbytes for nbytes, _ in held.values())


class _Results(TorchDispatchMode):
    """Shows every tensor that an operation makes, below autograd and ``torch.func``."""

    def __init__(self, note: Callable[[Tensor], Any]):
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._note(x)
        return out


def _memory(x: Tensor) -> tuple[int, int]:
    """Address and bytes of a tensor's memory; of one that has none of its own to show, wrapped by ``torch.func`` or sparse, a number like it."""
    try:
        return x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()
    except RuntimeError:
        return id(x), 0 if x.layout != torch.strided else x.nbytes
