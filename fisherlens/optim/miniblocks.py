"""The blocks of MBF: what of a layer's gradient their outer products are made of, and where their directions go."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisherlens.layout import LayerInfo
from fisherlens.linalg.dense import self_gram
from fisherlens.optim.averages import Averages
from fisherlens.optim.factors import matrix_of, matrix_shape, write_matrix

VARIANTS = ("B", "A", "released_view")  # of dense layers


@dataclass(eq=False)
class Blocks(Averages):
    """One matrix for all units or inputs of a dense layer, or one per kernel of a convolution; and their damped inverses."""

    layer: str
    F: Tensor  # (B, s, s)
    inverse: Tensor  # (B, s, s)
    inversions: int = 0

    @classmethod
    def zeros(cls, layer: LayerInfo, variant: str, like: Tensor) -> Blocks:
        """Start at zero, in the dtype and on the device of ``like``."""
        if layer.kind == "conv":
            count = layer.weight.shape[0] * layer.weight.shape[1]
            size = layer.weight.numel // count
        else:
            _, d_o, d_i = matrix_shape(layer)
            count, size = 1, d_i if variant == "A" else d_o
        return cls(layer.name, like.new_zeros(count, size, size), like.new_zeros(count, size, size))


def products(layer: LayerInfo, flat: Tensor, variant: str) -> Tensor:
    """What F averages, for one flat gradient, ``(B, s, s)``."""
    if layer.kind == "conv":
        g = _kernels(layer, flat)
        return g[:, :, None] * g[:, None, :]
    if variant == "B":
        parts = _tensors(layer, flat)  # [∂W, ∂b] side by side, never put together
        return (sum(self_gram(G) for G in parts) / sum(G.shape[1] for G in parts))[None]
    G = _rows(layer, flat, variant)
    return (G.T @ G / len(G))[None]


def write_direction(layer: LayerInfo, blocks: Blocks, m: Tensor, variant: str, damping: float, out: Tensor) -> None:
    """Put (F + λI)⁻¹ m of a layer into ``out``; m / λ before the first inversion."""
    if layer.kind == "conv":
        kernels = _kernels(layer, m)
        u = (blocks.inverse @ kernels[:, :, None])[:, :, 0] if blocks.inversions else kernels / damping
        out[layer.weight.start : layer.weight.stop] = u.reshape(-1)
        return
    if variant == "B":
        for G, u in zip(_tensors(layer, m), _tensors(layer, out), strict=True):
            if blocks.inversions:
                torch.mm(blocks.inverse[0], G, out=u)
            else:
                torch.div(G, damping, out=u)
        return
    rows = _rows(layer, m, variant)
    rows = rows @ blocks.inverse[0] if blocks.inversions else rows / damping
    write_matrix(layer, rows.reshape(matrix_shape(layer)), out)


def _kernels(layer: LayerInfo, flat: Tensor) -> Tensor:
    """Kernels of a convolution, one per pair of channels: (B, k)."""
    shape = layer.weight.shape
    return flat[layer.weight.start : layer.weight.stop].view(shape[0] * shape[1], -1)


def _rows(layer: LayerInfo, flat: Tensor, variant: str) -> Tensor:
    """A dense layer's gradients as rows of which S is the mean outer product, whose other axis is that of S."""
    G = matrix_of(layer, flat)[0]  # (O, I+1)
    return G if variant == "A" else G.reshape(G.shape[1], G.shape[0])


def _tensors(layer: LayerInfo, flat: Tensor) -> list[Tensor]:
    """Weight ``(O, I)`` and bias ``(O, 1)`` of a dense layer, as views of a flat vector."""
    return [flat[p.start : p.stop].view(p.shape[0], -1) for p in (layer.weight, layer.bias) if p is not None]
