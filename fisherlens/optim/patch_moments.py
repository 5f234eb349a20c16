"""Second moments of a convolution's patches from products of shifted images: no patches are made, and pairs of entries share one sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fisherlens.linalg.dense import self_gram
from fisherlens.scores.conv import ConvGeometry

_IMAGES = (
    4 * 2**20
)  # bytes of images at a time on a CPU, so that moved copies stay in memory that was used before (measured)


def patch_moments(geometry: ConvGeometry, x: Tensor) -> Tensor:
    r"""Σ_nt a_nt a_ntᵀ over examples n and output positions t, a the patch in the order of the weight, ``(groups, d, d)``.

    Two entries of a patch at places k and k' of the kernel have the moment Σ_nt x(t + k) x(t + k')ᵀ, which for a stride of 1 depends on
    k' - k alone but for what lies at the border of the image. So one pair is computed for each k' - k, as the gradient of a convolution by
    its weight, and the others follow: where both places move on by one, a strip leaves the image and another one enters.

    Parameters
    ----------
    geometry
        With stride 1, and one or two axes.
    x
        Padded inputs, ``(n, c, …)``.
    """
    if geometry.dim == 1:
        added = {"kernel": (1, *geometry.kernel), "dilation": (1, *geometry.dilation), "pad": (*geometry.pad, 0, 0)}
        return patch_moments(replace(geometry, stride=(1, 1), **added), x[:, :, None])
    channels = x.shape[1] // geometry.groups
    size = (channels, *geometry.kernel)
    out = x.new_empty(geometry.groups, *size, *size)
    _first_pairs(geometry, x, out)
    for axis in (0, 1):
        if geometry.kernel[axis] > 1:
            pairs = (out, _strips(geometry, x, axis))
            _move_on(*(moments.movedim((2 + axis, 5 + axis), (0, 1)) for moments in pairs))
    return out.view(geometry.groups, math.prod(size), -1)


def patch_sums(geometry: ConvGeometry, x: Tensor) -> Tensor:
    """Σ_nt a_nt, ``(groups, d)``."""
    return geometry.patches(x.sum(0, keepdim=True))[0].sum(-1)


def shifts_are_cheaper(geometry: ConvGeometry, channels: int, positions: tuple[int, ...]) -> bool:
    """Whether shifted images save operations over a symmetric product of patches, for that many input channels in a group."""
    if geometry.dim > 2 or any(step != 1 for step in geometry.stride):
        return False
    count, kernel = math.prod(positions), math.prod(geometry.kernel)
    pairs = math.prod(2 * k - 1 for k in geometry.kernel) // 2 + 1
    whole, shifted = (channels * kernel) ** 2 * count / 2, pairs * channels**2 * count
    for k, d, t in zip(geometry.kernel, geometry.dilation, positions, strict=True):
        shifted += (channels * kernel / k * (k - 1)) ** 2 * d * (count / t)  # two strips, half of a product each
    return shifted < 0.6 * whole


def _first_pairs(geometry: ConvGeometry, x: Tensor, out: Tensor) -> None:
    """Write the moments of all pairs of places of which one is first in its row, and one in its column; ``out`` is (groups, c, k, k, c, k, k)."""
    rows, columns = geometry.kernel
    step, along = geometry.dilation
    height, width = geometry.positions(x)
    at_once = max(1, _IMAGES // (x[0].numel() * x.itemsize)) if x.device.type == "cpu" else len(x)
    first = second = None
    for part in x.split(at_once):
        found = _products(geometry, [part[:, :, :height, :width]], part, geometry.kernel)[:, 0]
        first = found if first is None else first.add_(found)
        if rows > 1 and columns > 1:  # the pairs along the other diagonal
            moved = [part[:, :, :height, j * along : j * along + width] for j in range(1, columns)]
            found = _products(geometry, moved, part[:, :, step:, :width], (rows - 1, 1))[..., 0]
            second = found if second is None else second.add_(found)
    out[:, :, 0, 0] = first
    out[..., 0, 0] = first.permute(0, 2, 3, 4, 1)
    if second is not None:
        out[:, :, 0, 1:, :, 1:, 0] = second.permute(0, 2, 1, 3, 4)
        out[:, :, 1:, 0, :, 0, 1:] = second.permute(0, 3, 4, 2, 1)


def _products(geometry: ConvGeometry, ys: Sequence[Tensor], x: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """Σ_nt y(t) x(t + k) for some images y, all channels of a group and places k of a kernel, ``(groups, ys, c, c, *kernel)``."""
    groups, channels = geometry.groups, x.shape[1] // geometry.groups
    y = torch.stack([y.unflatten(1, (groups, channels)) for y in ys], dim=2).flatten(1, 3)
    shape = (y.shape[1], channels, *kernel)
    found = nn.grad.conv2d_weight(x, shape, y, dilation=geometry.dilation, groups=groups)
    return found.view(groups, len(ys), channels, *shape[1:])


def _strips(geometry: ConvGeometry, x: Tensor, axis: int) -> Tensor:
    """What changes where both places move on by one along an axis: the strip that enters less the one that leaves.

    Both are moments over the output positions at one end of the axis, of a kernel that is shorter by one there, ``(groups, c, k, k, c, k, k)``.
    """
    kernel = [k - (place == axis) for place, k in enumerate(geometry.kernel)]
    size = (x.shape[1] // geometry.groups, *kernel)
    out = x.new_zeros(geometry.groups, *size, *size)
    view = out.movedim((2 + axis, 5 + axis), (0, 1))
    step, count = geometry.dilation[axis], kernel[axis]
    skipped = _empty_rows(geometry, axis)
    for last, sign, first, stop in ((False, -1, skipped[0], count), (True, 1, 0, count - skipped[1])):
        if first >= stop:
            continue  # it lies in the padding
        start = x.shape[2 + axis] - step * count if last else 0
        strip = x.narrow(2 + axis, start + step * first, step * (stop - first))
        part = [stop - first if place == axis else k for place, k in enumerate(kernel)]
        rows = replace(geometry, kernel=tuple(part)).patches(strip).permute(1, 2, 0, 3).flatten(2)
        found = torch.stack([self_gram(one) for one in rows]).view(geometry.groups, size[0], *part, size[0], *part)
        view[first:stop, first:stop].add_(found.movedim((2 + axis, 5 + axis), (0, 1)), alpha=sign)
    return out


def _empty_rows(geometry: ConvGeometry, axis: int) -> tuple[int, int]:
    """How many places of the kernel, at the first and at the last output position, are in the padding of zeros and may be skipped."""
    if geometry.pad_mode != "constant" or geometry.dilation[axis] != 1 or not geometry.pad:
        return 0, 0
    at = 2 * (geometry.dim - 1 - axis)  # torch.nn.functional.pad counts axes from the last
    return geometry.pad[at], geometry.pad[at + 1]


def _move_on(out: Tensor, change: Tensor) -> None:
    """Fill the pairs (k, k') of one axis, in front, from those of which one is 0: both move on by one, and the strips change."""
    for i in range(1, len(out)):
        out[i, i:] = out[i - 1, i - 1 : -1] + change[i - 1, i - 1 :]
        out[i + 1 :, i] = out[i:-1, i - 1] + change[i:, i - 1]
