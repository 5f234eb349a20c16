r"""What an optimizer does to each parameter in its first step, and what that predicts.

The natural-gradient methods have statistics of dense layers and convolutions. Elsewhere (normalisation layers, parameters of one's own modules) each has
a plain rule: a gradient divided by a number, one per entry. So with blocks B of the covered part and scales d of the rest

.. math:: P = \begin{pmatrix} \operatorname{blocks}(F + \lambda) & 0 \\ 0 & \operatorname{diag}(d) \end{pmatrix}, \qquad
          \kappa = \frac{\mu_{\max}}{\mu_{\min}}\big(P^{-1} (F + \lambda)\big), \qquad
          \eta = \frac{(g^\top P^{-1} g)^2}{(P^{-1} g)^\top (F + \lambda) (P^{-1} g) \; g^\top (F + \lambda)^{-1} g}.

The scales are not written down a second time: the optimizer is asked, by a step.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherlens.approximations import BlockDiagonal
from fisherlens.fisher import Fisher
from fisherlens.independence.conditioning import extreme_ratios
from fisherlens.independence.options import Options
from fisherlens.independence.standin import StandIn
from fisherlens.independence.target import Target
from fisherlens.layout import LayerInfo
from fisherlens.linalg.pencil import dense_extremes
from fisherlens.optim.base import NaturalGradient
from fisherlens.optim.moments import restrict
from fisherlens.partitions import Partition
from fisherlens.spectrum import WHOLE
from fisherlens.training.base import Pair
from fisherlens.training.verify.blocks import Judgement, quality, written_out
from fisherlens.training.verify.movable import Movable, curvature
from fisherlens.training.verify.subject import Subject


@dataclass(frozen=True)
class Treatment:
    """How a method treats the parameters of a network.

    Attributes
    ----------
    blocks
        A segmentation of the network; None where all that the method covers is one block.
    covered
        The layers that it has statistics of.
    inside
        Whether an entry belongs to one of them, ``(P,)``.
    scales
        What it divides the gradient of the other entries by, ``(P,)``; NaN where the entry did not move, for want of a gradient.
    """

    blocks: Partition | None
    covered: tuple[LayerInfo, ...]
    inside: Tensor
    scales: Tensor


def treatment(
    start: Subject, make: Callable[..., NaturalGradient], blocks: Partition | None, batch: Pair
) -> Treatment | None:
    """Ask an optimizer, by its first step on a batch with rate 1 and nothing clipped, what it does; None where it covers all."""
    network = Movable(start)
    before = network.here()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters without statistics: that is what is asked
        optimizer = make(network.model, lr=1.0)
    covered = optimizer.covered
    inside = torch.zeros(len(before), dtype=torch.bool, device=before.device)
    for layer in covered:
        inside[layer.start : layer.stop] = True
    if inside.all():
        optimizer.remove_hooks()
        return None
    network.backward(optimizer, batch)
    gradient = network.gradient()
    optimizer.step()
    optimizer.remove_hooks()
    scales = gradient / (before - network.here())
    return Treatment(blocks, covered, inside, torch.where(scales.isfinite() & (scales > 0), scales, math.nan))


def judge_treatments(
    operator: Any, treatments: Sequence[Treatment], gradient: Tensor, damping: float
) -> list[Judgement]:
    """Decrease ratio, cosine and condition number of what methods do; an operator that is no Fisher is written out."""
    if not isinstance(operator, Fisher):
        return _dense(operator, treatments, gradient, damping)
    F = operator
    diagonal = F.diagonal().double()
    target = Target(F, WHOLE, Options(), diagonal)
    stand_ins = [
        StandIn(f"method {place}", _Treated(F, one, diagonal, damping), None, exact_blocks=False)
        for place, one in enumerate(treatments)
    ]
    exact, g = target.step(damping).vector, gradient.to(F.dtype)
    found = []
    for stand_in, ratio in zip(stand_ins, extreme_ratios(target, stand_ins, damping), strict=True):
        q = stand_in.solve(g[:, None], damping)[:, 0]
        decrease, cosine = quality(g, exact, q, float(curvature(F, q)) + damping * float(q @ q))
        found.append(Judgement(decrease, cosine, ratio.high / ratio.low))
    return found


class _Treated:
    """P as a stand-in that damps in a form of its own."""

    def __init__(self, F: Fisher, one: Treatment, diagonal: Tensor, damping: float):
        covered = F.restrict([layer.name for layer in one.covered])
        self._at = torch.cat([torch.arange(layer.start, layer.stop, device=F.device) for layer in one.covered])
        self._part = covered if one.blocks is None else BlockDiagonal(covered, _compressed(one, covered, self._at))
        self._scales = _filled(one, diagonal, damping).to(F.dtype)[:, None]

    def damped_product(self, v: Tensor, damping: float) -> Tensor:
        """P V."""
        out = self._scales * v
        inside = v[self._at]
        out[self._at] = (self._part @ inside) + damping * inside
        return out

    def _solve(self, v: Tensor, damping: float) -> Tensor:
        """P⁻¹ V."""
        out = v / self._scales
        out[self._at] = self._part.solve(v[self._at], damping)
        return out


def _compressed(one: Treatment, covered: Fisher, at: Tensor) -> Partition:
    """The blocks as far as the method covers them, in the indices of the covered part alone."""
    own = restrict(one.blocks, one.covered)
    place = torch.full((own.layout.n_params,), -1, dtype=torch.int64, device="cpu")
    place[at.cpu()] = torch.arange(len(at), device="cpu")
    return Partition(own.scheme, covered.layout, own.sizes.copy(), place[own.flat])


def _filled(one: Treatment, diagonal: Tensor, damping: float) -> Tensor:
    """The scales; an entry that does not move gets its own curvature, which says nothing."""
    return torch.where(one.scales.isnan(), diagonal.to(one.scales) + damping, one.scales)


def _dense(operator: Any, treatments: Sequence[Treatment], gradient: Tensor, damping: float) -> list[Judgement]:
    matrix = written_out(operator, gradient)
    whole = matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    g = gradient.to(matrix.dtype)
    p = torch.linalg.solve(whole, g)
    found = []
    for one in treatments:
        within = one.inside[:, None] & one.inside[None]
        if one.blocks is not None:
            number = one.blocks.block_of.to(matrix.device)
            within &= number[:, None] == number[None]
        scales = _filled(one, matrix.diagonal(), damping).to(matrix.dtype)
        inner = torch.where(within, whole, 0) + torch.diag(torch.where(one.inside, 0, scales))
        q = torch.linalg.solve(inner, g)
        decrease, cosine = quality(g, p, q, float(q @ whole @ q))
        low, high = dense_extremes(whole, inner)
        found.append(Judgement(decrease, cosine, high / low if low > 0 else math.inf))
    return found
