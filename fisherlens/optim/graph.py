"""Which layers a model uses past their modules, as the graph of one forward pass shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node

# Output and input of each call of a layer's module: the nodes between them are the module's own.
Ends = tuple[Node, Node | None]


def used_past_modules(
    outputs: Any, calls: Mapping[str, Iterable[Ends]], owners: Mapping[nn.Parameter | None, str]
) -> set[str]:
    """Name the layers with a parameter that reaches the outputs other than through a call of its module.

    Parameters
    ----------
    outputs
        What the model returned: tensors, or containers of them. A penalty that a loss makes of parameters is no part of it.
    calls
        Layer -> its calls; one that is not in it is left out.
    owners
        Parameter -> its layer.
    """
    inside = {name: {node for ends in own for node in _between(*ends)} for name, own in calls.items()}
    past = set()
    starts = [x.grad_fn for x in _tensors(outputs) if x.grad_fn is not None]
    for node in _reached(starts, set()):
        for other, _ in node.next_functions:
            owner = owners.get(other.variable) if type(other).__name__ == "AccumulateGrad" else None
            if owner in inside and node not in inside[owner]:
                past.add(owner)
    return past


def _between(output: Node, before: Node | None) -> Iterator[Node]:
    return _reached([output], {before})


def _reached(starts: Iterable[Node], stops: set[Node | None]) -> Iterator[Node]:
    """All nodes that can be reached, without the ones to stop at and what lies behind them."""
    todo = [node for node in starts if node not in stops]
    seen = set(todo)
    while todo:
        node = todo.pop()
        yield node
        for other, _ in node.next_functions:
            if other is not None and other not in seen and other not in stops:
                seen.add(other)
                todo.append(other)


def _tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        yield from (x for one in outputs.values() for x in _tensors(one))
    elif isinstance(outputs, (list, tuple)):
        yield from (x for one in outputs for x in _tensors(one))
