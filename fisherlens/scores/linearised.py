"""A network linearised at its parameters: directional derivatives and gradients from one forward graph, several at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jvp, vmap

Leaves = dict[str, Tensor]
# What torch raises where an operation has no forward-mode, second or batched derivative; there is a slower way for each.
_NO_RULE = (NotImplementedError, RuntimeError)


class Graph:
    """The outputs of one batch with their graph; kept, each further product costs 4/3 of a gradient instead of 5/3.

    Parameters
    ----------
    outputs, leaves
        Outputs of the network and the parameters that they depend on, as leaves of the graph.
    keep
        Also keep the graph of the gradient as a function of the score, whose derivative is the linearised forward pass.
    """

    def __init__(self, outputs: Tensor, leaves: Leaves, *, keep: bool = False):
        self.outputs, self.leaves, self.keep = outputs, leaves, keep
        self._batched = True
        if keep and outputs.requires_grad:
            with torch.inference_mode(False), torch.enable_grad():
                self._dummy = torch.zeros_like(outputs, requires_grad=True)
                grads = torch.autograd.grad(
                    outputs, list(leaves.values()), self._dummy, create_graph=True, allow_unused=True
                )
            self._grads = {name: g for name, g in zip(leaves, grads, strict=True) if g is not None and g.requires_grad}

    def derivatives(self, tangents: Leaves) -> Tensor:
        """J v, ``(K, *outputs)``, for K tangents in front: the derivative of u → Jᵀu in the direction v (needs ``keep``)."""
        k = len(next(iter(tangents.values())))
        if not self.outputs.requires_grad or not self._grads:
            return self.outputs.new_zeros(k, *self.outputs.shape)
        directions = [tangents[name] for name in self._grads]
        return self._backward(list(self._grads.values()), [self._dummy], directions, keep=True)[0]

    def pull_backs(self, signals: Tensor) -> list[Tensor]:
        """Jᵀ u, ``(K, *shape)`` for each leaf, for signals ``(K, *outputs)``; uses the graph up unless it is kept."""
        leaves = list(self.leaves.values())
        if not self.outputs.requires_grad:
            return [leaf.new_zeros(len(signals), *leaf.shape) for leaf in leaves]
        return self._backward([self.outputs], leaves, [signals], keep=self.keep)

    def _backward(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], signals: Sequence[Tensor], *, keep: bool
    ) -> list[Tensor]:
        """Gradients by ``inputs``, ``(K, *input)``, zero where there is none and never sparse; one pass for all K where torch can."""
        k = len(signals[0])

        def dense(grads: Sequence[Tensor | None], *front: int) -> list[Tensor]:
            zeros = [x.new_zeros(*front, *x.shape) if g is None else g for x, g in zip(inputs, grads, strict=True)]
            return [(g.to_dense() if g.is_sparse else g).detach() for g in zeros]

        options = {"allow_unused": True, "is_grads_batched": True}
        if k > 1 and self._batched:
            try:
                with _without_performance_warning():
                    grads = torch.autograd.grad(outputs, inputs, signals, retain_graph=True, **options)
                return dense(grads, k)
            except _NO_RULE:
                self._batched = False
        each = []
        for i in range(k):
            one = [s[i] for s in signals]
            each.append(
                dense(torch.autograd.grad(outputs, inputs, one, retain_graph=keep or i + 1 < k, allow_unused=True))
            )
        return [column[0][None] if k == 1 else torch.stack(column) for column in zip(*each, strict=True)]


@contextmanager
def _without_performance_warning() -> Iterator[None]:
    """Silence what torch says of an operation that it batches by a loop: right all the same, and nothing to be done."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        yield


@cache
def _load_forward_mode() -> None:
    """Let torch load its forward-mode rules, in which it uses functions that it deprecates itself, without the warning."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(1, device="cpu"), torch.zeros(1, device="cpu"))


def forward_derivatives(function: Callable[[Leaves], Tensor], leaves: Leaves, tangents: Leaves) -> tuple[Graph, Tensor]:
    """Outputs with their graph, and J v, ``(K, *outputs)``, by forward mode; reverse over reverse where that does not exist.

    One vector shares the pass with the outputs; several share a second pass.
    """
    _load_forward_mode()
    k = len(next(iter(tangents.values())))
    with torch.inference_mode(False), torch.enable_grad():
        try:
            if k == 1:
                with forward_ad.dual_level():
                    dual = {name: forward_ad.make_dual(leaf, tangents[name][0]) for name, leaf in leaves.items()}
                    outputs, change = forward_ad.unpack_dual(function(dual))
                return Graph(outputs, leaves), (torch.zeros_like(outputs) if change is None else change.detach())[None]
            graph = Graph(function(leaves), leaves)
            values = {name: leaf.detach() for name, leaf in leaves.items()}
            with _without_performance_warning():
                changes = vmap(lambda t: jvp(function, (values,), (t,))[1])(tangents)
            return graph, changes.detach()
        except _NO_RULE:
            graph = Graph(function(leaves), leaves, keep=True)
            return graph, graph.derivatives(tangents)
