"""Scores of a convolution of any spatial dimension, with groups, strides, dilation and every padding mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fisherlens.layout import LayerInfo
from fisherlens.linalg.memory import Workspace
from fisherlens.scores.base import LayerScores, largest_entry

# Bytes of signals at a convolution's outputs for vectors that are taken together, and the fewest such vectors (measured: all of
# 256 vectors at once are twice as slow; above 4 MiB fresh pages cost what fewer calls gain).
_CACHED = 4 * 2**20
_FEW = 8

_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_CONV_WEIGHT = {1: nn.grad.conv1d_weight, 2: nn.grad.conv2d_weight, 3: nn.grad.conv3d_weight}


@dataclass(frozen=True)
class ConvGeometry:
    """Kernel, stride, dilation and padding of a convolution, with padding resolved to numbers once."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pad: tuple[int, ...]  # as torch.nn.functional.pad takes it: last axis first, (before, after)
    pad_mode: str
    groups: int

    @classmethod
    def of(cls, module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> ConvGeometry:
        """Read the geometry off a module; "same" pads one more behind than before where the total is odd."""
        pad: list[int] = []
        for axis in reversed(range(len(module.kernel_size))):
            if module.padding == "same":
                total = module.dilation[axis] * (module.kernel_size[axis] - 1)
                pad += [total // 2, total - total // 2]
            elif module.padding == "valid":
                pad += [0, 0]
            else:
                pad += [module.padding[axis], module.padding[axis]]
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        return cls(module.kernel_size, module.stride, module.dilation, tuple(pad), mode, module.groups)

    @property
    def dim(self) -> int:
        return len(self.kernel)

    def padded(self, x: Tensor) -> Tensor:
        return functional.pad(x, self.pad, mode=self.pad_mode) if any(self.pad) else x

    def positions(self, padded: Tensor) -> tuple[int, ...]:
        """Output positions per axis for an input that is already padded."""
        spans = zip(padded.shape[2:], self.kernel, self.stride, self.dilation, strict=True)
        return tuple((n - d * (k - 1) - 1) // s + 1 for n, k, s, d in spans)

    def patches(self, padded: Tensor, workspace: Workspace | None = None) -> Tensor:
        """``(n, groups, c/groups * k, T)`` patches of a padded input, entries in the order of the weight."""
        n, c = padded.shape[:2]
        out = self.positions(padded)
        strides = padded.stride()
        kernel_strides = [st * d for st, d in zip(strides[2:], self.dilation, strict=True)]
        out_strides = [st * s for st, s in zip(strides[2:], self.stride, strict=True)]
        view = padded.as_strided((n, c, *self.kernel, *out), (*strides[:2], *kernel_strides, *out_strides))
        shape = (n, self.groups, c // self.groups * math.prod(self.kernel), math.prod(out))
        if workspace is None:
            return view.reshape(shape)
        return workspace.empty(view.shape, view.dtype, view.device).copy_(view).view(shape)


def conv_rows(
    geometry: ConvGeometry,
    layer: LayerInfo,
    x: Tensor,
    g: Tensor,
    out: Sequence[Tensor | None] = (None, None),
    workspace: Workspace | None = None,
) -> list[Tensor]:
    """Explicit rows of one use, one piece per parameter: Σ_t g_nrt ⊗ patch_nt (n, r, d_o d_i) and Σ_t g_nrt (n, r, d_o).

    ``x`` (n, c, …) is the input before padding, ``g`` (n, r, d_o, …) the output scores; ``out`` may name where to write.
    """
    n, r, d_o = g.shape[:3]
    groups = geometry.groups
    g = g.reshape(n, r, d_o, -1)
    pieces = []
    if layer.weight:
        patches = geometry.patches(geometry.padded(x), workspace)  # (n, groups, d_i, T)
        if groups == 1:
            target = None if out[0] is None else out[0].view(n, r * d_o, -1)
            pieces.append(torch.bmm(g.view(n, r * d_o, -1), patches[:, 0].mT, out=target).view(n, r, -1))
        else:
            per_group = g.view(n, r, groups, d_o // groups, -1)
            pieces.append(torch.matmul(per_group, patches[:, None].mT).view(n, r, -1))
    if layer.bias:
        pieces.append(g.sum(-1))
    for piece, target in zip(pieces, out, strict=False):
        if target is not None and piece.data_ptr() != target.data_ptr():
            target.copy_(piece)
    return pieces


class ConvScores(LayerScores):
    """A convolution's scores as padded inputs and output scores; products are convolutions, no patches are kept.

    Parameters
    ----------
    layer, geometry
        The layer and its geometry.
    inputs
        Padded inputs, ``(n, c, …)``.
    outputs
        Output scores g, ``(n, r, d_o, …)``.
    """

    path = "factors"

    def __init__(self, layer: LayerInfo, geometry: ConvGeometry, inputs: Tensor, outputs: Tensor):
        self.layer, self.geometry = layer, geometry
        self.x = inputs
        self.positions = tuple(outputs.shape[3:])
        self.g = outputs.flatten(3)  # (n, r, d_o, T)
        self.n, self.r, self.d_o, self.t = self.g.shape
        self.d_i = inputs.shape[1] // geometry.groups * math.prod(geometry.kernel)
        self.dtype, self.device = outputs.dtype, outputs.device
        self.n_weight = self.d_o * self.d_i if layer.weight else 0
        self.width = self.t * self.d_o

    def largest(self) -> float:
        return self.t * largest_entry(self.g) * max(1.0, largest_entry(self.x))

    def part(self, at: slice) -> ConvScores:
        g = self.g[at]
        return ConvScores(self.layer, self.geometry, self.x[at], g.view(*g.shape[:3], *self.positions))

    @property
    def nbytes(self) -> int:
        return (self.x.numel() + self.g.numel()) * self.g.itemsize

    def _weight_shape(self, k: int) -> tuple[int, ...]:
        return (k * self.d_o, self.x.shape[1] // self.geometry.groups, *self.geometry.kernel)

    def _together(self, k: int) -> list[slice]:
        """Vectors whose signals at the layer's outputs stay in the caches between the two halves of a product, but not too few for a convolution."""
        step = max(_FEW, _CACHED // max(1, self.n * self.width * self.dtype.itemsize))
        return [slice(i, min(i + step, k)) for i in range(0, k, step)]

    def matmat(self, v: Tensor) -> Tensor:
        groups = self._together(v.shape[1])
        return torch.cat([self._matmat(v[:, some]) for some in groups], dim=1) if len(groups) > 1 else self._matmat(v)

    def _matmat(self, v: Tensor) -> Tensor:
        k, groups = v.shape[1], self.geometry.groups
        vt = v.T.contiguous()
        h = vt.new_zeros(())
        if self.layer.weight:
            # outputs of a grouped convolution are group-major, so the K vectors go inside each group
            weight = vt[:, : self.n_weight].view(k, groups, -1).transpose(0, 1).reshape(self._weight_shape(k))
            settings = {"stride": self.geometry.stride, "dilation": self.geometry.dilation, "groups": groups}
            h = _CONV[self.geometry.dim](self.x, weight, **settings)
            h = (
                h.view(self.n, groups, k, self.d_o // groups, self.t)
                .transpose(1, 2)
                .reshape(self.n, k, self.d_o, self.t)
            )
        if self.layer.bias:
            h = h + vt[:, self.n_weight :, None]
        h = h.expand(self.n, k, self.d_o, self.t)
        return torch.bmm(self.g.flatten(2), h.flatten(2).mT).reshape(self.rows, k)

    def _rmatmat(self, z: Tensor, out: Tensor) -> None:
        for some in self._together(z.shape[1]):
            self._spread(z[:, some], out[some])

    def _spread(self, z: Tensor, out: Tensor) -> None:
        k, groups = z.shape[1], self.geometry.groups
        h = torch.bmm(z.reshape(self.n, self.r, k).mT, self.g.flatten(2)).view(self.n, k, self.d_o, self.t)
        if self.layer.weight:
            per_group = h.view(self.n, k, groups, self.d_o // groups, self.t).transpose(1, 2)
            signal = per_group.reshape(self.n, k * self.d_o, *self.positions)
            settings = {"stride": self.geometry.stride, "dilation": self.geometry.dilation, "groups": groups}
            weight = _CONV_WEIGHT[self.geometry.dim](self.x, self._weight_shape(k), signal, **settings)
            out[:, : self.n_weight] = weight.view(groups, k, -1).transpose(0, 1).reshape(k, -1)
        if self.layer.bias:
            out[:, self.n_weight :] = h.sum((0, 3))

    def columns(self, index: Tensor) -> Tensor:
        out = self.g.new_empty(self.n, self.r, len(index))
        is_bias = index >= self.n_weight
        unit = torch.where(is_bias, index - self.n_weight, index // self.d_i)
        out[:, :, is_bias] = self.g[:, :, unit[is_bias]].sum(-1)
        per_group = self.d_o // self.geometry.groups
        if self.layer.weight and not is_bias.all():
            patches = self.geometry.patches(self.x)
            for o in unit[~is_bias].unique().tolist():
                here = ((unit == o) & ~is_bias).nonzero()[:, 0]
                entries = patches[:, o // per_group, index[here] % self.d_i]  # (n, m, T)
                out[:, :, here] = torch.bmm(self.g[:, :, o], entries.mT)
        return out.reshape(self.rows, -1)

    def rows_at(self, index: Tensor) -> Tensor:
        if not len(index):
            return self.g.new_empty(0, self.size)
        n, r = index // self.r, index % self.r
        g = self.g[n, r].view(len(index), 1, self.d_o, *self.positions)
        # the input is padded already
        bare = ConvGeometry(**{**vars(self.geometry), "pad": (0,) * (2 * self.geometry.dim)})
        return torch.cat(conv_rows(bare, self.layer, self.x[n], g), dim=2)[:, 0]

    def contract(self, coefficients: Tensor) -> ConvScores:
        g = torch.einsum("nr,nrot->not", coefficients, self.g).view(self.n, 1, self.d_o, *self.positions)
        return ConvScores(self.layer, self.geometry, self.x, g)
