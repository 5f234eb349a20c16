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
        copied = torch.compiler.is_compiling()  # which follows no writing into a tensor without history
        if not copied:
            ctx.mark_dirty(output)
        ctx.save_for_backward(x, weight, c)
        ctx.conv, ctx.bias = conv, bias is not None
        return output.clone() if copied else output

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, c = ctx.saved_tensors
        _, to_x, to_weight, to_bias, _, _ = ctx.needs_input_grad
        to_bias = to_bias and ctx.bias
        # under autocast the layer computed in another dtype than it stores
        a, w, c = x.to(g.dtype), weight.to(g.dtype), c.to(g.dtype)
        dx = dw = db = None
        if ctx.conv is None:
            dx = g @ w if to_x else None
            weighted = (g * _like(c, g)).reshape(-1, g.shape[-1])
            dw = weighted.T @ a.reshape(-1, a.shape[-1]) if to_weight else None
            db = weighted.sum(0) if to_bias else None
        else:
            stride, padding, dilation, groups = ctx.conv
            rest = ([w.shape[0]], stride, padding, dilation, False, [0] * len(stride), groups)
            backward = torch.ops.aten.convolution_backward
            dx = backward(g, a, w, *rest, (True, False, False))[0] if to_x else None
            if a.numel() < g.numel():  # the weights go where they touch less memory
                dw = backward(g, a * _like(c, a), w, *rest, (False, True, False))[1] if to_weight else None
                db = (g.flatten(2).sum(2) * c[:, None]).sum(0) if to_bias else None
            else:
                _, dw, db = backward(g * _like(c, g), a, w, *rest, (False, to_weight, to_bias))
        cast = [
            None if d is None else d.to(kind) for d, kind in ((dx, x.dtype), (dw, weight.dtype), (db, weight.dtype))
        ]
        return None, *cast, None, None


def _like(c: Tensor, x: Tensor) -> Tensor:
    return c.view(-1, *[1] * (x.ndim - 1))


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
    return _WeightedGradient.apply(output.detach(), x, module.weight, module.bias, c, conv)


def transformed(x: Tensor) -> bool:
    """Whether a transform of torch.func is at work, whose derivatives are none of a training step's."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x)
