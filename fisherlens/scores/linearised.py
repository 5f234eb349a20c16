"""A network linearised at its parameters: directional derivatives and gradients from one kept forward graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fisherlens.scores.recorder import leaf_gradients


class Graph:
    """The outputs of one batch with their graph; kept, each further product costs 4/3 of a gradient instead of 5/3.

    Parameters
    ----------
    outputs, leaves
        Outputs of the network and the parameters that they depend on, as leaves of the graph.
    keep
        Also keep the graph of the gradient as a function of the score, whose derivative is the linearised forward pass.
    """

    def __init__(self, outputs: Tensor, leaves: dict[str, Tensor], *, keep: bool = False):
        self.outputs, self.leaves, self.keep = outputs, leaves, keep
        if keep and outputs.requires_grad:
            with torch.inference_mode(False), torch.enable_grad():
                self._dummy = torch.zeros_like(outputs, requires_grad=True)
                grads = torch.autograd.grad(
                    outputs, list(leaves.values()), self._dummy, create_graph=True, allow_unused=True
                )
            self._grads = {name: g for name, g in zip(leaves, grads, strict=True) if g is not None and g.requires_grad}

    def derivative(self, tangents: dict[str, Tensor]) -> Tensor:
        """J v, in the shape of the outputs: the derivative of u → Jᵀu in the direction v (needs ``keep``)."""
        if not self.outputs.requires_grad or not self._grads:
            return torch.zeros_like(self.outputs)
        directions = [tangents[name] for name in self._grads]
        found = torch.autograd.grad(
            list(self._grads.values()), self._dummy, directions, retain_graph=True, allow_unused=True
        )
        return torch.zeros_like(self.outputs) if found[0] is None else found[0].detach()

    def pull_back(self, signal: Tensor) -> Tensor:
        """Jᵀ u, flat in float64."""
        grads = leaf_gradients(self.outputs, self.leaves, signal, keep=self.keep)
        return torch.cat([g.reshape(-1) for g in grads.values()]).double()


@cache
def _load_forward_mode() -> None:
    """Let torch load its forward-mode rules, in which it uses functions that it deprecates itself, without the warning."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


def forward_derivative(
    function: Callable[[dict[str, Tensor]], Tensor], leaves: dict[str, Tensor], tangents: dict[str, Tensor]
) -> tuple[Graph, Tensor]:
    """Outputs with their graph, and J v from the same pass by forward mode; reverse over reverse where that does not exist."""
    _load_forward_mode()
    with torch.inference_mode(False), torch.enable_grad():
        try:
            with forward_ad.dual_level():
                dual = {name: forward_ad.make_dual(leaf, tangents[name]) for name, leaf in leaves.items()}
                outputs, change = forward_ad.unpack_dual(function(dual))
            return Graph(outputs, leaves), torch.zeros_like(outputs) if change is None else change.detach()
        except (NotImplementedError, RuntimeError):
            graph = Graph(function(leaves), leaves, keep=True)
            return graph, graph.derivative(tangents)
