"""The gradient of the loss of one piece of data with its graph, and whether that can be differentiated again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherlens.errors import InputError, UnsupportedModuleError


@dataclass
class LossGraph:
    """The gradient of the summed loss as a function of the leaves; None where it does not depend on a leaf."""

    leaves: dict[str, Tensor]
    gradient: dict[str, Tensor | None]
    weight: Tensor

    def flat_gradient(self) -> Tensor:
        """The gradient itself, float64 ``(p,)``."""
        pairs = zip(self.leaves.values(), self.gradient.values(), strict=True)
        return torch.cat([(torch.zeros_like(x) if g is None else g.detach()).reshape(-1).double() for x, g in pairs])

    def add_product(self, tangents: Mapping[str, Tensor], out: Tensor, *, keep: bool) -> None:
        """Add Σ w ∇²l V, over the leaves that ``tangents`` names, to ``out``: ``(K, …)`` tangents for ``(K, p)``, others for ``(p,)``."""
        pairs = [(g, tangents[name]) for name in tangents if (g := self.gradient[name]) is not None and g.requires_grad]
        if not pairs:
            return
        wanted = [self.leaves[name] for name in tangents]
        found = torch.autograd.grad(
            [g for g, _ in pairs],
            wanted,
            [t.to(g.dtype) for g, t in pairs],
            retain_graph=keep,
            allow_unused=True,
            is_grads_batched=out.ndim == 2,
        )
        for part, h in zip(out.split([leaf.numel() for leaf in wanted], dim=-1), found, strict=True):
            if h is not None:
                part += (h.to_dense() if h.is_sparse else h).reshape(part.shape)

    def functions(self) -> set[str]:
        """Names of the nodes of the graph; ``custom:`` in front of those of a ``torch.autograd.Function``."""
        todo = [g.grad_fn for g in self.gradient.values() if g is not None and g.grad_fn is not None]
        seen = set(todo)
        while todo:
            new = {node for node, _ in todo.pop().next_functions if node is not None} - seen
            seen |= new
            todo += new
        custom = torch.autograd.function.BackwardCFunction
        return {f"custom:{type(node).__name__}" if isinstance(node, custom) else type(node).__name__ for node in seen}


def check_nodes(graph: LossGraph) -> None:
    """Refuse a function marked as differentiable once: torch leaves its second derivative out without a word."""
    if graph.functions() & {"Error", "NotImplemented"}:
        raise UnsupportedModuleError(
            "A torch.autograd.Function in this model is marked once_differentiable, so the Hessian does not exist in torch. Let its backward be made of "
            "differentiable operations, or use kind='exact', which needs first derivatives only."
        )


def check_symmetric(first: Tensor, second: Tensor, products: Tensor, tolerance: float) -> None:
    """Refuse a matrix with ⟨u, Hv⟩ ≠ ⟨v, Hu⟩; ``products`` are Hu and Hv, ``(2, P)``."""
    norms = torch.linalg.vector_norm(torch.stack([first, second]), dim=1), torch.linalg.vector_norm(products, dim=1)
    scale = norms[0][0] * norms[1][1] + norms[0][1] * norms[1][0]
    gap = (first @ products[1] - second @ products[0]).abs()
    if gap > tolerance * scale:
        raise InputError(
            f"The second derivatives of this model are not symmetric (⟨u, Hv⟩ and ⟨v, Hu⟩ differ by {(gap / scale).item():.1e} of their size), so "
            "a first derivative in it is not that of its function: look for a torch.autograd.Function with a backward of its own, or a detach()."
        )


def check_differences(product: Tensor, ahead: Tensor, behind: Tensor, step: float, tolerance: float) -> None:
    """Refuse a product that is not the change of the gradient along its vector."""
    change = (ahead - behind) / (2 * step)
    scale = torch.maximum(torch.linalg.vector_norm(change), torch.linalg.vector_norm(product))
    gap = torch.linalg.vector_norm(change - product)
    if gap > tolerance * scale:
        raise InputError(
            f"The second derivative of this model is not the change of its gradient (they differ by {(gap / scale).item():.1e} of their size). The model "
            "holds a torch.autograd.Function: its backward must be made of differentiable torch operations on the saved tensors."
        )
