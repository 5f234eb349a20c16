"""Contractions of a layer's scores by output unit, whose weights are one row of the weight matrix and whose bias is one number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fisherlens._partition_schemes import kind_of
from fisherlens.layout import LayerInfo, Layout
from fisherlens.scores.base import CHUNK_BYTES, LayerScores
from fisherlens.scores.conv import ConvScores
from fisherlens.scores.dense import DenseScores
from fisherlens.scores.explicit import ZeroScores

_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


@dataclass(frozen=True)
class Units:
    """The units of one layer that have both weights and a bias: where these lie in the flat vector, and how many units there are."""

    layer: LayerInfo
    weight: slice
    bias: slice
    count: int

    def within_layer(self) -> Units:
        """Places counted from the layer's first parameter."""
        start = self.layer.start
        weight, bias = (slice(at.start - start, at.stop - start) for at in (self.weight, self.bias))
        return Units(self.layer, weight, bias, self.count)


def units_with_bias(layout: Layout) -> list[Units]:
    """Dense and convolution layers with a bias, and normalisation layers with scale and shift, the shift as the bias."""
    found = []
    for layer in layout.layers:
        weight, bias = layer.weight, layer.bias
        if weight is not None and bias is not None and kind_of(layer) != "other" and weight.numel:
            places = slice(weight.start, weight.stop), slice(bias.start, bias.stop)
            found.append(Units(layer, *places, bias.numel))
    return found


def moments_with_bias(scores: LayerScores, units: Units) -> Tensor:
    """Σ_nr u_nri u_nr0 of every weight i with the bias 0 of its unit, flat as the weight, no row of a unit formed.

    With ḡ = Σ_t g the scores of the biases, Σ_nr ḡ_nro Σ_t g_nrto a_nt is the weight gradient of the signal Σ_r ḡ_nro g_nrto.
    """
    return scores._summed(lambda part: _moments(part, units.within_layer()))


def _moments(part: LayerScores, units: Units) -> Tensor:
    if isinstance(part, DenseScores):
        signal = torch.einsum("nro,nrto->nto", part.g.sum(2), part.g)
        return (signal.flatten(0, 1).T @ part.a.flatten(0, 1)).reshape(-1)
    if isinstance(part, ConvScores):
        signal = torch.einsum("nro,nrot->not", part.g.sum(3), part.g).view(part.n, 1, part.d_o, *part.positions)
        gradient = part.g.new_empty(1, part.size)
        ConvScores(part.layer, part.geometry, part.x, signal).rmatmat(part.g.new_ones(part.n, 1), gradient)
        return gradient[0, units.weight].clone()
    if isinstance(part, ZeroScores):
        return torch.zeros(units.weight.stop - units.weight.start, dtype=part.dtype, device=part.device)
    return torch.cat([torch.einsum("mc,mci->ci", *columns).reshape(-1) for columns in _columns(part, units)])


def projected_energy(scores: LayerScores, units: Units, h: Tensor) -> Tensor:
    """Σ_o Σ_nr (u_nro · h_o)², the sum of h_oᵀ U_oᵀ U_o h_o over units, a float64 number; h is over the layer's parameters, ``(p,)``."""
    return scores._summed(lambda part: _energy(part, units.within_layer(), h))


def _energy(part: LayerScores, units: Units, h: Tensor) -> Tensor:
    weight, bias = h[units.weight].view(units.count, -1), h[units.bias]
    if isinstance(part, DenseScores):
        z = (part.g * (part.a @ weight.T + bias)[:, None]).sum(2)
    elif isinstance(part, ConvScores):
        z = (part.g * _responses(part, weight, bias)[:, None]).sum(3)
    elif isinstance(part, ZeroScores):
        z = torch.zeros((), device=part.device)
    else:
        pieces = zip(_columns(part, units), _chunks(part, weight), _chunks(part, weight, bias), strict=True)
        z = torch.cat(
            [torch.einsum("mci,ci->mc", of_weight, w) + of_bias * b for (of_bias, of_weight), w, b in pieces], 1
        )
    return z.double().square().sum()


def _responses(part: ConvScores, weight: Tensor, bias: Tensor) -> Tensor:
    """The outputs of the layer with other parameters, ``(n, d_o, T)``."""
    geometry = part.geometry
    kernels = weight.view(part.d_o, part.x.shape[1] // geometry.groups, *geometry.kernel)
    settings = {"stride": geometry.stride, "dilation": geometry.dilation, "groups": geometry.groups}
    return _CONV[geometry.dim](part.x, kernels, bias, **settings).flatten(2)


def _chunks(part: LayerScores, weight: Tensor, values: Tensor | None = None) -> tuple[Tensor, ...]:
    """Values by unit (by default the weights themselves), in chunks whose explicit columns stay under 64 MiB."""
    step = max(1, CHUNK_BYTES // max(1, part.rows * weight.shape[1] * part.dtype.itemsize))
    return (weight if values is None else values).split(step)


def _columns(part: LayerScores, units: Units) -> Iterator[tuple[Tensor, Tensor]]:
    """Explicit columns of the biases ``(rows, c)`` and weights ``(rows, c, s)`` of chunks of units."""
    weight = torch.arange(units.weight.start, units.weight.stop, device=part.device).view(units.count, -1)
    bias = torch.arange(units.bias.start, units.bias.stop, device=part.device)
    for of_bias, of_weight in zip(_chunks(part, weight, bias), _chunks(part, weight), strict=True):
        columns = part.columns(of_weight.reshape(-1)).view(part.rows, len(of_weight), -1)
        yield part.columns(of_bias), columns
