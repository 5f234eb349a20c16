"""Rows of the two factors of a layer, as far as projections need them: seen from a basis, multiplied by their moments, their lengths."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fisherlens.errors import InputError
from fisherlens.layout import LayerInfo
from fisherlens.linalg.memory import Workspace
from fisherlens.optim import texts
from fisherlens.optim.factors import matrix_shape, positions
from fisherlens.optim.patch_moments import patch_sums
from fisherlens.optim.tap import Call
from fisherlens.scores.conv import ConvGeometry


@dataclass(eq=False)
class Rows:
    """Rows in columns, ``(B, d, m)``, all of them to be multiplied by ``factor``."""

    x: Tensor
    factor: float = 1.0

    def seen(self, P: Tensor) -> Tensor:
        """Pᵀ x without the factor, ``(B, r, m)``, for orthonormal columns ``(B, d, r)``; all columns are the identity."""
        return self.x if P.shape[1] == P.shape[2] else P.mT @ self.x

    def power(self, P: Tensor) -> Tensor:
        """Σ x xᵀ P, ``(B, d, r)``."""
        return (self.x @ (self.x.mT @ P)) * self.factor**2

    def squares(self) -> Tensor:
        """Σ |x|² without the factor, ``(B,)``."""
        return torch.linalg.vector_norm(self.x, dim=(1, 2)).square()


@dataclass(eq=False)
class PatchRows:
    """The patches that one call of a convolution reads, with a 1 for its bias; they are never made, as a basis is a set of kernels."""

    geometry: ConvGeometry
    x: Tensor  # padded, (n, c, …)
    bias: bool
    factor = 1.0

    def _maps(self, P: Tensor) -> tuple[Tensor, torch.Size]:
        """Pᵀ x as maps ``(n, B r, …)``, and the shape of the kernels."""
        channels = self.x.shape[1] // self.geometry.groups
        kernels = P[:, : P.shape[1] - self.bias].mT.reshape(-1, channels, *self.geometry.kernel)
        constant = P[:, -1].reshape(-1) if self.bias else None
        convolve = getattr(functional, f"conv{self.geometry.dim}d")
        options = {"stride": self.geometry.stride, "dilation": self.geometry.dilation, "groups": self.geometry.groups}
        return convolve(self.x, kernels, constant, **options), kernels.shape

    def seen(self, P: Tensor) -> Tensor:
        """Pᵀ x, ``(B, r, m)``."""
        maps = self._maps(P)[0].flatten(2)
        return maps.unflatten(1, (len(P), -1)).permute(1, 2, 0, 3).flatten(2)

    def power(self, P: Tensor) -> Tensor:
        """Σ x xᵀ P, ``(B, d, r)``."""
        maps, shape = self._maps(P)
        by_weight = getattr(nn.grad, f"conv{self.geometry.dim}d_weight")
        options = {"stride": self.geometry.stride, "dilation": self.geometry.dilation, "groups": self.geometry.groups}
        found = by_weight(self.x, shape, maps, **options).view(len(P), P.shape[2], -1).mT
        if not self.bias:
            return found
        return torch.cat([found, maps.flatten(2).sum((0, 2)).view(len(P), 1, -1)], dim=1)

    def squares(self) -> Tensor:
        """Σ |x|², ``(B,)``."""
        found = patch_sums(self.geometry, self.x.square()).sum(1)
        return found + len(self.x) * math.prod(self.geometry.positions(self.x)) if self.bias else found


def rows_of(
    layer: LayerInfo, calls: Sequence[Call], dtype: torch.dtype, workspace: Workspace
) -> Iterator[tuple[Rows | PatchRows, Rows]]:
    """Rows of the two factors: positions, those of scores divided by √T."""
    if layer.kind != "conv" or layer.weight is None:
        for a, g in positions(layer, calls, dtype, workspace):
            yield Rows(a.flatten(2)), Rows(g.flatten(2), 1 / math.sqrt(g.shape[3]))
        return
    if any(call.use.modified for call in calls):
        raise InputError(texts.WRITTEN_OVER.format(layer=layer.name))
    groups, d_o, _ = matrix_shape(layer)
    total = sum(math.prod(call.score.shape[2:]) for call in calls)
    for call in calls:
        geometry = ConvGeometry.of(call.use.module)
        scores = call.score.to(dtype).flatten(2).unflatten(1, (groups, d_o)).permute(1, 2, 0, 3).flatten(2)
        patches = PatchRows(geometry, geometry.padded(call.use.inputs.to(dtype)), layer.bias is not None)
        yield patches, Rows(scores, 1 / math.sqrt(total))
