"""Steps of optimizers whose statistic is the mean gradient of a batch, with dense matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fisherlens.reference.matrix import damped


def mbf_statistic(G: Tensor, variant: str) -> Tensor:
    """F̂ of a dense layer with mean gradient G = [∂W, ∂b] ``(O, I)``, over its row-major entries ``(O I, O I)``; I counts the bias.

    A: the mean over units o of G_o G_oᵀ, for every unit. B: the mean over inputs i of G_·i G_·iᵀ, for every input. released_view: the same
    as B for runs of O entries of the row-major gradient.
    """
    O, I = G.shape  # noqa: E741
    if variant == "A":
        mean = sum(torch.outer(G[o], G[o]) for o in range(O)) / O  # (I, I)
        return torch.block_diag(*[mean] * O)
    if variant == "B":
        mean = sum(torch.outer(G[:, i], G[:, i]) for i in range(I)) / I  # (O, O)
        F_hat = torch.zeros(O, I, O, I, dtype=G.dtype)
        for i in range(I):
            F_hat[:, i, :, i] = mean
        return F_hat.reshape(O * I, O * I)
    runs = G.reshape(-1).split(O)
    return torch.block_diag(*[sum(torch.outer(v, v) for v in runs) / I] * I)


def mbf_kernels(G: Tensor) -> Tensor:
    """F̂ of a convolution with mean gradient G ``(c_out, c_in, ...)``: one block k kᵀ per kernel, over the row-major entries."""
    kernels = G.flatten(2).flatten(0, 1)  # (c_out c_in, k)
    return torch.block_diag(*[torch.outer(k, k) for k in kernels])


def mbf_scalar_rule(g: Tensor, state: Mapping[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
    """Direction of norm layers and biases of convolutions: a / (1e-8 + √(v / (1 - 0.999^t))), a and v averages of g and a²."""
    state = state or {"t": 0, "a": torch.zeros_like(g), "v": torch.zeros_like(g)}
    t, a = state["t"] + 1, 0.9 * state["a"] + 0.1 * g
    v = 0.999 * state["v"] + 0.001 * a**2
    return a / (1e-8 + (v / (1 - 0.999**t)).sqrt()), {"t": t, "a": a, "v": v}


def contraction(G: Tensor, mode: int) -> Tensor:
    """Σ G_...i... G_...j... over all other axes, ``(n_mode, n_mode)``."""
    slices = G.movedim(mode, 0).reshape(G.shape[mode], -1)  # (n_mode, rest)
    return slices @ slices.T


def along(G: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Multiply one axis of G by a matrix."""
    return torch.tensordot(matrix, G, dims=([1], [mode])).movedim(0, mode)


def symmetric_power(matrix: Tensor, exponent: float) -> Tensor:
    """M^exponent of a symmetric positive definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**exponent) @ vectors.T


def shampoo_direction(gradients: list[Tensor], damping: float, block: int = 128) -> Tensor:
    """Direction after these gradients of one tensor, without momentum: the last one times (Σ L_i + λI)^(-1/2k) along each of k axes.

    A tensor is cut into blocks of at most ``block`` entries per axis first, and has the length of its gradient in the end; a vector is left.
    """
    G = gradients[-1]
    if G.ndim < 2:
        return G
    out = torch.zeros_like(G)
    for index in torch.cartesian_prod(*(torch.arange(0, n, block) for n in G.shape)).tolist():
        at = tuple(slice(i, i + block) for i in index)
        u = G[at]
        for mode in range(G.ndim):
            L = sum(contraction(g[at], mode) for g in gradients)
            u = along(u, symmetric_power(damped(L, damping), -1 / (2 * G.ndim)), mode)
        out[at] = u
    return out * G.norm() / out.norm()


def tnt_direction(G: Tensor, statistic: Tensor, damping: float, damping_form: str = "each") -> Tensor:
    """Direction of TNT from one mean gradient at sampled labels: G times (U_i + λI)⁻¹ along each of k axes, λ^(1/k) where it is shared.

    U_i = H_i / (c^(k-1) ∏_{j≠i} n_j), H_i the contraction of the statistic, c = (tr H_1 / ∏ n)^(1/k): c is the mean eigenvalue of all U_i.
    """
    n, k = statistic.numel(), statistic.ndim
    c = (statistic.square().sum() / n) ** (1 / k)
    share = damping if damping_form == "each" else damping ** (1 / k)
    u = G
    for mode in range(k):
        U = contraction(statistic, mode) / (
            c ** (k - 1) * math.prod(m for j, m in enumerate(statistic.shape) if j != mode)
        )
        u = along(u, torch.linalg.inv(damped(U, share)), mode)
    return u
