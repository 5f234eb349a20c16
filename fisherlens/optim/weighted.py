"""Layers whose examples count with different weights in the gradient of their parameters, but not in that of their input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fisherlens.scores.conv import ConvGeometry


class _WeightedGradient(torch.autograd.Function):
    """Hands an output on that has been computed already; its parameters receive Σ_n c_n g_n a_nᵀ, its input Σ_n of the plain g_n.

    One matrix product (or convolution) each for input and weight, as in the layer's own backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        c: Tensor,
        conv: tuple[Any, ...] | None,
    ) -> Tensor:
        ctx.mark_dirty(output)
        ctx.save_for_backward(x, weight, c)
        ctx.conv, ctx.bias = conv, bias is not None
        return output

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, c = ctx.saved_tensors
        _, to_x, to_weight, to_bias, _, _ = ctx.needs_input_grad
        weighted = g * c.to(g.dtype).view(-1, *[1] * (g.ndim - 1))
        to_bias = to_bias and ctx.bias
        # under autocast the layer computed in another dtype than it stores
        a, w = x.to(g.dtype), weight.to(g.dtype)
        dx = dw = db = None
        if ctx.conv is None:
            if to_x:
                dx = g @ w
            if to_weight:
                dw = weighted.reshape(-1, g.shape[-1]).T @ a.reshape(-1, a.shape[-1])
            if to_bias:
                db = weighted.reshape(-1, g.shape[-1]).sum(0)
        else:
            stride, padding, dilation, groups = ctx.conv
            rest = (None, stride, padding, dilation, False, [0] * len(stride), groups)
            if to_x:
                dx = torch.ops.aten.convolution_backward(g, a, w, *rest, (True, False, False))[0]
            if to_weight:
                dw = torch.ops.aten.convolution_backward(weighted, a, w, *rest, (False, True, False))[1]
            if to_bias:
                db = weighted.flatten(2).sum((0, 2))
        cast = [
            None if d is None else d.to(kind) for d, kind in ((dx, x.dtype), (dw, weight.dtype), (db, weight.dtype))
        ]
        return None, *cast, None, None


def weigh_gradient(module: nn.Module, x: Tensor, output: Tensor, c: Tensor) -> Tensor:
    """The output of a Linear or convolution module, whose parameters get the gradients of the examples times c ``(n,)``.

    The gradient of the input, which earlier layers receive, stays as it is. The module's own graph is let go.
    """
    conv = None
    if not isinstance(module, nn.Linear):
        geometry = ConvGeometry.of(module)
        before, after = geometry.pad[0::2], geometry.pad[1::2]
        padding = list(reversed(before))  # torch.nn.functional.pad counts axes from the last
        if geometry.pad_mode != "constant" or before != after:
            x, padding = geometry.padded(x), [0] * len(before)
        conv = (list(geometry.stride), padding, list(geometry.dilation), geometry.groups)
    return _WeightedGradient.apply(output.data, x, module.weight, module.bias, c, conv)
