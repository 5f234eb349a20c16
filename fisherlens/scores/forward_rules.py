"""Operations that torch differentiates along a direction otherwise than backwards, or with work for nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import UnpackedDualTensor, make_dual, unpack_dual
from torch.nn.functional import embedding, linear
from torch.overrides import TorchFunctionMode

_LAYERS = (linear, torch.conv1d, torch.conv2d, torch.conv3d)


class ForwardRules(TorchFunctionMode):
    """Gives table look-ups the derivative along a direction that their gradient has, and layers no more work than they need.

    Backwards, the row of the padding index receives nothing, while the forward rule of torch lets it through; and a sparse
    gradient cannot be differentiated again, nor rightly that of a normalised weight. Of linear maps and convolutions torch computes the
    derivative by the input also where that is data and does not change: a quarter of the linearised forward pass of a network whose
    first layer is the largest.

    Parameters
    ----------
    layers
        Whether linear maps and convolutions follow :func:`_layer`: right where the forward pass takes no gradients of its own.
    """

    def __init__(self, layers: bool = True):
        super().__init__()
        self.layers = layers

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is embedding:
            return _look_up(*args, **(kwargs or {}))
        if function is torch._weight_norm:
            return _normalised_weight(*args, **(kwargs or {}))
        if self.layers and function in _LAYERS:
            return _layer(function, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _look_up(input: Tensor, weight: Tensor, padding_idx: int | None = None, *_: Any, **__: Any) -> Tensor:
    # max_norm and scale_grad_by_freq, which may follow, are refused before anything runs
    rows = embedding(input, weight)
    if padding_idx is None:
        return rows
    return torch.where((input == padding_idx % len(weight))[..., None], rows.detach(), rows)


def _normalised_weight(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    # the fused kernel has a wrong second derivative (torch 2.13: not symmetric, by a fifth of its size)
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _layer(
    function: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Of an operation that is linear in the input, and in weight and bias together: the terms of its derivative that are not zero."""
    x, w, b = (
        unpack_dual(input),
        unpack_dual(weight),
        UnpackedDualTensor(None, None) if bias is None else unpack_dual(bias),
    )
    if w.tangent is None or (b.tangent is None) != (bias is None):
        return function(input, weight, bias, *args, **kwargs)
    with torch.no_grad():
        change = function(x.primal, w.tangent, b.tangent, *args, **kwargs)
        if x.tangent is not None:
            change += function(x.tangent, w.primal, None, *args, **kwargs)
    return make_dual(function(x.primal, w.primal, b.primal, *args, **kwargs), change)
