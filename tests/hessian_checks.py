"""What the tests of the Hessian share: its dense twin by automatic differentiation, and operators with and without kept graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.fisher.hessian import Hessian


def dense_of(loss: Callable[[dict[str, Tensor]], Tensor], theta: dict[str, Tensor]) -> Tensor:
    """The Hessian of a function of named tensors by automatic differentiation, dense."""

    def of_flat(flat: Tensor) -> Tensor:
        pieces = zip(theta.items(), flat.split([t.numel() for t in theta.values()]), strict=True)
        return loss({name: piece.view(t.shape) for (name, t), piece in pieces})

    return torch.autograd.functional.hessian(of_flat, torch.cat([t.reshape(-1) for t in theta.values()]))


def truth_of(model: nn.Module, data, likelihood) -> Tensor:
    """The Hessian of the reference's mean loss."""
    theta = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return dense_of(lambda values: reference.negative_log_likelihood(model, data, likelihood, values), theta)


def vectors(size: int, k: int, seed: int = 3) -> Tensor:
    return torch.randn(size, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hessian(model, data, likelihood="categorical", **options) -> Hessian:
    return fl.Fisher(model, data, likelihood=likelihood, kind="hessian", **options)


def streamed(model, data, likelihood="categorical", **options) -> Hessian:
    """The same with half the budget that its graphs need, so that nothing is kept and the data come in pieces."""
    H = hessian(model, data, likelihood, memory=hessian(model, data, likelihood, **options).plan.nbytes // 2, **options)
    assert H.plan.streamed
    assert H.curvature.step < H.n_data
    return H
