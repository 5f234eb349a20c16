r"""Kronecker-factored stand-ins of one layer's block, dense: from inputs and output scores to G ⊗ A, straight from the definitions.

A layer with weight W ``(d_o, d_i)`` maps its inputs a_t at position t to W a_t + b. With g_nrt the derivative of score column r by its output,
the row (n, r) of U is Σ_t g_nrt ⊗ [a_nt, 1]. A convolution has one such W per group of channels. Stand-ins come as ``(p, p)`` over the layer's piece
of the flat vector: the weight, then the bias.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fisherlens.reference.network import Data, labels_by_term, output_fisher, outputs_at, score, terms


def inputs_and_scores(
    model: nn.Module, data: Data, likelihood: Any, layer: str, kind: str = "exact", *, labels: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Collect a ``(groups, N, T, d_i)``, g ``(groups, N, rows, T, d_o)`` with √w in it, and w ``(N,)``; calls of the module are concatenated along T."""
    module = model.get_submodule(layer)
    groups, channels = getattr(module, "groups", 1), 1 if hasattr(module, "groups") else -1
    read, added = [], []

    def hook(_: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        read.append(args[0].detach().clone())
        added.append(torch.zeros_like(output, requires_grad=True))
        return output + added[-1]

    handle = module.register_forward_hook(hook)
    try:
        with torch.enable_grad():
            outputs = outputs_at(model, {}, data[0])
            t = terms(outputs, likelihood, data[1])
            columns = _columns(t, outputs.detach(), likelihood, data[1], kind, labels)  # (rows, N, T, C)
            found = [torch.autograd.grad(t.f, added, column, retain_graph=True) for column in columns]
    finally:
        handle.remove()
    g = [torch.stack(of_use, 1) for of_use in zip(*found, strict=True)]  # of each call: (N, rows, ...)
    g = [x.movedim(channels if channels < 0 else channels + 1, -1) for x in g]
    g = torch.cat(
        [x.reshape(*x.shape[:2], -1, groups, x.shape[-1] // groups) for x in g], 2
    )  # (N, rows, T, groups, d_o)
    a = torch.cat([_read_by_weight(module, x, groups, channels) for x in read], 2)
    return a, g.movedim(3, 0), t.weight.sum(1)


def _columns(t: Any, outputs: Tensor, likelihood: Any, targets: Any, kind: str, labels: Any) -> list[Tensor]:
    """Score columns at the outputs of the network, ``(N, T, C)`` each: one for every row that an example has."""
    root = t.weight.sqrt()[..., None].detach()
    if kind == "mc":
        draws = [labels_by_term(draw, outputs, likelihood) for draw in labels.unbind(-1)]
        return [(root * score(t, y) / math.sqrt(len(draws))).detach() for y in draws]
    if kind == "empirical":
        each = (root * score(t, t.observed)).detach()[..., None]  # (N, T, C, 1)
    else:
        values, vectors = torch.linalg.eigh(output_fisher(outputs, likelihood, targets))
        each = vectors * values.clamp(min=0).sqrt()[..., None, :] * root[..., None]  # (N, T, C, C)
    only = torch.eye(each.shape[1]).to(each)
    return [each[..., r] * only[k][None, :, None] for k in range(each.shape[1]) for r in range(each.shape[-1])]


def _read_by_weight(module: nn.Module, x: Tensor, groups: int, channels: int) -> Tensor:
    """What each entry of a row of the weight is multiplied by, ``(groups, N, T, d_i)``: the answer to a weight with a single 1."""
    zero = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    found = []
    for row in range(0, len(module.weight), len(module.weight) // groups):
        entries = []
        for k in range(module.weight[0].numel()):
            weight = torch.zeros_like(module.weight)
            weight[row].view(-1)[k] = 1
            with torch.no_grad():
                answer = functional_call(module, {**zero, "weight": weight}, (x,))
            entries.append(answer.select(channels, row).reshape(len(x), -1))
        found.append(torch.stack(entries, -1))
    return torch.stack(found)


def with_bias(a: Tensor) -> Tensor:
    """[a, 1]."""
    return torch.cat([a, torch.ones_like(a[..., :1])], -1)


def kronecker_factors(a: Tensor, g: Tensor, w: Tensor, form: str = "expand") -> tuple[Tensor, Tensor]:
    """G = Σ g gᵀ / W ``(groups, d_o, d_o)`` and A = Σ w a aᵀ / (W T) ``(groups, d_i, d_i)``; the reduce form has one position, mean a and sum g."""
    if form == "reduce":
        a, g = a.mean(2, keepdim=True), g.sum(3, keepdim=True)
    G = torch.einsum("jnrto,jnrtp->jop", g, g) / w.sum()
    return G, torch.einsum("n,jnti,jntk->jik", w, a, a) / (w.sum() * a.shape[2])


def kronecker_block(left: Tensor, right: Tensor, bias: bool) -> Tensor:
    """diag_j (L_j ⊗ R_j), ``(p, p)``, rows and columns in the order weight, bias; the bias is the last input of R."""
    whole = _in_groups(left, right)
    order = _weight_then_bias(len(whole), right.shape[1], bias)
    return whole[order][:, order]


def _in_groups(left: Tensor, right: Tensor) -> Tensor:
    pairs = zip(left, right, strict=True)
    return torch.block_diag(*(torch.kron(one.contiguous(), other.contiguous()) for one, other in pairs))


def _weight_then_bias(size: int, inputs: int, bias: bool) -> Tensor:
    """Places of the weight, row by row, and of the bias after it, in a vector of rows [weight, bias]."""
    every = torch.arange(size).view(-1, inputs)  # (output, input)
    return torch.cat([every[:, :-1].reshape(-1), every[:, -1]]) if bias else every.reshape(-1)


def factored_damping(G: Tensor, A: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """G + (√λ/π) I and A + π√λ I with π² = (tr A/d_i) / (tr G/d_o), group by group."""
    pi = [(a.trace() / len(a) / (g.trace() / len(g))).sqrt() for g, a in zip(G, A, strict=True)]
    left = [g + damping**0.5 / p * torch.eye(len(g)).to(g) for g, p in zip(G, pi, strict=True)]
    right = [a + damping**0.5 * p * torch.eye(len(a)).to(a) for a, p in zip(A, pi, strict=True)]
    return torch.stack(left), torch.stack(right)


def ekfac_block(F_l: Tensor, Q_G: Tensor, Q_A: Tensor, bias: bool) -> Tensor:
    """Q diag(Qᵀ F_l Q) Qᵀ with Q = Q_G ⊗ Q_A, eigenvectors in columns: the best diagonal in these bases."""
    Q = _in_groups(Q_G, Q_A)
    Q = Q[_weight_then_bias(len(Q), Q_A.shape[1], bias)]
    return Q @ torch.diag((Q.T @ F_l @ Q).diagonal()) @ Q.T


def best_kronecker_error(F_l: Tensor, d_o: int, d_i: int) -> float:
    """Smallest ‖F_l - G ⊗ A‖² for a layer without bias: all singular values of the rearranged block but the first (Van Loan and Pitsianis)."""
    rearranged = F_l.view(d_o, d_i, d_o, d_i).permute(0, 2, 1, 3).reshape(d_o**2, d_i**2)
    return torch.linalg.svdvals(rearranged)[1:].square().sum().item()
