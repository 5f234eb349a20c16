"""The quasi-diagonal Fisher: the diagonal, and the coupling of every weight with the bias of its unit."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherlens.approximations.base import Approximation
from fisherlens.approximations.pieces import score_parts, squared_block_norms
from fisherlens.approximations.units import Units, moments_with_bias, projected_energy, units_with_bias
from fisherlens.fisher import Fisher, require_fisher
from fisherlens.partitions import partition as make_partition
from fisherlens.scores.base import Total


class QuasiDiagonal(Approximation):
    r"""Quasi-diagonal part of F: per unit the diagonal and the row of the bias, the rest completed by the path through the bias.

    With 0 the bias of a unit and i, j its weights, F̂ has the entries of F on the diagonal and beside the bias, and

    .. math:: \hat F_{ij} = \frac{F_{0i} F_{0j}}{F_{00}} \; (i \ne j), \qquad
       \hat F_\text{unit} = D + h h^\top, \quad h = \frac{(F_{00}, F_{01}, \dots)}{\sqrt{F_{00}}}, \quad
       D_{ii} = F_{ii} - \frac{F_{0i}^2}{F_{00}}, \quad D_{00} = 0 .

    That is a centring of the inputs of each unit. :meth:`solve` is the exact inverse of F̂ + λI (Sherman–Morrison on D + λI); as λ → 0
    it becomes the quasi-diagonal step of the source. A unit whose bias has F_00 = 0 is left diagonal.

    Units are those of ``fl.partition(F, "unit")``: outputs of dense layers, output channels of convolutions (of each group), pairs of scale
    and shift of normalisation layers, for which F̂ is exact. Layers without weight or bias, and all other kinds, are diagonal.

    Parameters
    ----------
    F
        The Fisher operator.

    Notes
    -----
    Source: Ollivier, *Riemannian metrics for neural networks I* (2015), undamped; the damping as above is our choice.
    Cost: the diagonal of F and one weight gradient; one pass over streamed data each. 2 P numbers; a solve is O(P). The error within blocks
    is a difference of squared norms, so that below about ε Σ ‖F_uu‖² it is rounding.

    Examples
    --------
    >>> import torch, fisherlens as fl
    >>> F = fl.Fisher(torch.nn.Linear(1, 2), (torch.ones(3, 1), torch.tensor([0, 1, 0])), likelihood="categorical")
    >>> Q = fl.QuasiDiagonal(F)  # one weight per unit: nothing is left out within a unit
    >>> bool(Q.within_block_error() < 1e-5 * F.frobenius_norm() ** 2)
    True
    """

    def __init__(self, F: Fisher):
        require_fisher(F)
        units = units_with_bias(F.layout)
        diagonal = F.diagonal()
        h, rest = torch.zeros_like(diagonal), diagonal.clone()
        moments = _moments_with_bias(F, units)
        for own, moment in zip(units, moments, strict=True):
            at_bias = diagonal[own.bias].double()
            root = at_bias.sqrt()
            # a bias without information has no coupling either
            along = torch.where(root > 0, 1 / root, 0.0)[:, None] * moment.double().view(own.count, -1)
            remaining = diagonal[own.weight].double().view(own.count, -1) - along.square()
            h[own.bias], h[own.weight] = root.to(h.dtype), along.reshape(-1).to(h.dtype)
            rest[own.bias], rest[own.weight] = 0, remaining.clamp(min=0).reshape(-1).to(h.dtype)
        self._take(F, units, h, rest)

    def _take(self, F: Fisher, units: list[Units], h: Tensor, rest: Tensor) -> None:
        super().__init__(F, "quasi-diagonal", make_partition(F, "unit"))
        self._units, self._h, self._rest = units, h, rest

    def on_layer(self, layer: str) -> QuasiDiagonal:
        """The units of one layer, as a stand-in for ``F.restrict(layer)``."""
        info, part = self.layout.layer(layer), object.__new__(type(self))
        at, F = slice(info.start, info.stop), self._fisher.restrict(layer)
        part._take(F, units_with_bias(F.layout), self._h[at], self._rest[at])
        return part

    @property
    def storage_bytes(self) -> int:
        """Bytes of the two numbers of each parameter."""
        return 2 * self.n_params * self.dtype.itemsize

    @property
    def solve_flops(self) -> float:
        """Four operations per parameter: the sums Σ h²/(D + λ) of the units."""
        return 4.0 * self.n_params

    def _product(self, v: Tensor) -> Tensor:
        out = self._rest[:, None] * v
        for own in self._units:
            h, h0 = self._of(own, self._h)
            part, v0 = _split(own, v)
            along = torch.einsum("oi,oik->ok", h, part) + h0[:, None] * v0
            out[own.weight] += (h[:, :, None] * along[:, None]).flatten(0, 1)
            out[own.bias] += h0[:, None] * along
        return out

    def _solve(self, v: Tensor, damping: float) -> Tensor:
        out = v / (self._rest + damping)[:, None]
        for own in self._units:
            # the bias is eliminated by hand: D_00 + λ = λ alone, and v_0/λ would cancel against what the weights take from it
            h, h0 = self._of(own, self._h)
            damped = self._rest[own.weight].view(h.shape) + damping
            part, v0 = _split(own, v)
            ratio = h / damped
            inner = (h.double() * ratio.double()).sum(1)
            pulled = torch.einsum("oi,oik->ok", ratio, part).double()
            h0, v0 = h0.double()[:, None], v0.double()
            scale = damping + h0.square() + damping * inner[:, None]
            along = (h0 * v0 + damping * pulled) / scale
            out[own.bias] = ((v0 * (1 + inner[:, None]) - h0 * pulled) / scale).to(v.dtype)
            out[own.weight] -= (ratio[:, :, None] * along.to(v.dtype)[:, None]).flatten(0, 1)
        return out

    def _log_determinant(self, damping: float) -> float:
        total = torch.log1p(self._rest.double() / damping).sum()
        for own in self._units:
            h, h0 = (x.double() for x in self._of(own, self._h))
            inner = (h.square() / (self._rest[own.weight].double().view(h.shape) + damping)).sum(1)
            total += torch.log1p(inner + h0.square() / damping).sum()
        return total.item()

    def diagonal(self) -> Tensor:
        """The diagonal of F itself, to rounding, flat ``(P,)``."""
        return self._rest + self._h.square()

    def squared_norm(self) -> float:
        """Σ of ‖D + h hᵀ‖² over units: Σ D_ii² + 2 Σ D_ii h_i² + (Σ h_i²)²."""
        rest, square = self._rest.double(), self._h.double().square()
        lengths = sum((_by_unit(own, square).square().sum() for own in self._units), start=rest.new_zeros(()))
        return (rest.square().sum() + 2 * (rest * square).sum() + lengths).item()

    def within_block_error(self) -> float:
        """Σ ‖F_uu - F̂_uu‖² over units u: what weights of one unit share beside their bias; from kernels or chunks of blocks."""
        F = self._fisher
        own_energy = sum(squared_block_norms(F, group).sum().item() for group in self.partition.groups)
        projected = 0.0
        if self._units:
            for scores in score_parts(F.scores.restrict([own.layer.name for own in self._units])):
                for own in self._units:
                    h = self._h[own.layer.start : own.layer.stop]
                    projected += projected_energy(scores[own.layer.name], own, h).item()
        inner = (self._rest.double() * F.diagonal().double()).sum().item() + projected / F.total_weight
        return max(own_energy - 2 * inner + self.squared_norm(), 0.0)

    @staticmethod
    def _of(own: Units, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights ``(count, s)`` and biases ``(count,)``."""
        return x[own.weight].view(own.count, -1), x[own.bias]


def _split(own: Units, v: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors ``(P, K)`` as weights ``(count, s, K)`` and biases ``(count, K)``."""
    return v[own.weight].reshape(own.count, -1, v.shape[1]), v[own.bias]


def _by_unit(own: Units, x: Tensor) -> Tensor:
    return x[own.weight].view(own.count, -1).sum(1) + x[own.bias]


def _moments_with_bias(F: Fisher, units: list[Units]) -> list[Tensor]:
    """F_0i of every weight, in one pass over the data for all layers."""
    totals = [Total() for _ in units]
    if units:
        for scores in score_parts(F.scores.restrict([own.layer.name for own in units])):
            for total, own in zip(totals, units, strict=True):
                total.add(moments_with_bias(scores[own.layer.name], own))
    return [total.value() / F.total_weight for total in totals]
