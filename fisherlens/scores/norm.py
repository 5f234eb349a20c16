"""Explicit score rows of normalisation layers: Σ g · x̂ for the scale, Σ g for the shift."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from fisherlens.layout import LayerInfo

Statistics = tuple[Tensor, Tensor]


def normalised_input(module: nn.Module, x: Tensor, statistics: Statistics | None = None) -> Tensor:
    """The input after normalisation and before scale and shift; ``statistics`` are the running mean and variance of the call."""
    if isinstance(module, nn.LayerNorm):
        return functional.layer_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return functional.group_norm(x, module.num_groups, eps=module.eps)
    mean, variance = (s.to(x.dtype) for s in statistics or (module.running_mean, module.running_var))
    return functional.batch_norm(x, mean, variance, eps=module.eps, training=False)


def norm_rows(
    module: nn.Module, layer: LayerInfo, x: Tensor, g: Tensor, statistics: Statistics | None = None
) -> list[Tensor]:
    """Explicit rows of one use, ``(n, r, p)`` per parameter; ``x`` (n, …) is the module's input and ``g`` (n, r, …) its output scores."""
    xhat = normalised_input(module, x, statistics)[:, None]
    if isinstance(module, nn.LayerNorm):
        keep = len(module.normalized_shape)
        axes = tuple(range(2, g.ndim - keep))
    else:
        axes = tuple(range(3, g.ndim))  # all but example, column and channel

    def reduced(scores: Tensor) -> Tensor:
        return (scores.sum(axes) if axes else scores).flatten(2)

    pieces = []
    if layer.weight:
        pieces.append(reduced(g * xhat))
    if layer.bias:
        pieces.append(reduced(g))
    return pieces
