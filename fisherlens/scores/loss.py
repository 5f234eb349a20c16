"""The gradient of the loss by a network's outputs, as a function that can be differentiated again."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherlens.errors import InputError
from fisherlens.likelihoods import (
    Bernoulli,
    BoundLikelihood,
    Categorical,
    ElementwiseLikelihood,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
)


def loss_gradient(
    likelihood: Likelihood, bound: BoundLikelihood, outputs: Tensor, targets: Tensor, where: str, at: slice | None
) -> Tensor:
    """Gradient of Σ w · (negative log-likelihood) by the outputs of one batch, in their shape and with their graph.

    ``bound`` is the likelihood at the same outputs, which has checked them and the targets. Gradients are written out, not
    losses: their derivatives keep their digits where an output saturates.
    """
    if isinstance(likelihood, Categorical):
        return _categorical(likelihood, bound, outputs, targets)
    y = targets.to(outputs.dtype)
    if isinstance(likelihood, Bernoulli):
        score = (1 - y) * outputs.sigmoid() - y * (-outputs).sigmoid()
        if likelihood.pos_weight is None:
            return score
        return score * (1 + (likelihood.pos_weight.to(outputs.device) - 1) * targets.double()).to(outputs.dtype)
    if isinstance(likelihood, Gaussian):
        return (outputs - y) / likelihood.variance_at(outputs, where, at).to(outputs.device, outputs.dtype)
    if isinstance(likelihood, HeteroscedasticGaussian):
        mean, log_variance = outputs.chunk(2, likelihood.axis)
        scaled = (mean - y) * (-log_variance).exp()
        return torch.cat([scaled, (1 - (mean - y) * scaled) / 2], dim=likelihood.axis)
    if isinstance(likelihood, ElementwiseLikelihood):
        return likelihood.score(outputs, y)
    raise InputError(
        "kind='hessian' needs the second derivative of the negative log-likelihood, which fisherlens knows for its own likelihoods and for an "
        f"ElementwiseLikelihood, whose score it differentiates; got {type(likelihood).__name__}. Write it as an ElementwiseLikelihood, or use "
        "kind='exact', whose matrix needs first derivatives only."
    )


def _categorical(likelihood: Categorical, bound: BoundLikelihood, outputs: Tensor, targets: Tensor) -> Tensor:
    moved = outputs.movedim(likelihood.class_axis, -1)
    weight = bound.weight.reshape(moved.shape[:-1]).to(outputs.dtype)
    labels = targets.long().masked_fill(targets == likelihood.ignore_index, 0)[..., None]
    log_p = moved.log_softmax(-1)
    # p - e_y; p_y - 1 by expm1, which keeps its digits when p_y is close to 1
    score = log_p.exp().scatter(-1, labels, torch.expm1(log_p.gather(-1, labels)))
    return (score * weight[..., None]).movedim(-1, likelihood.class_axis)


def check_differentiable(
    likelihood: Likelihood, bound: BoundLikelihood, outputs: Tensor, targets: Tensor, where: str, at: slice | None
) -> None:
    """Compare the derivative of a user's score with its differences: a score that leaves torch has no derivative, or a wrong one."""
    if not isinstance(likelihood, ElementwiseLikelihood):
        return
    with torch.inference_mode(False), torch.enable_grad():
        f = outputs.detach().clone().requires_grad_()
        gradient = loss_gradient(likelihood, bound, f, targets, where, at)
        slope = torch.zeros_like(f)
        if gradient.requires_grad:
            slope = torch.autograd.grad(gradient.sum(), f, allow_unused=True, materialize_grads=True)[0]
    step = torch.finfo(f.dtype).eps ** (1 / 3) * f.detach().abs().clamp(min=1)
    ahead, behind = (loss_gradient(likelihood, bound, f.detach() + s * step, targets, where, at) for s in (1, -1))
    differences = (ahead - behind) / (2 * step)
    gap = (slope - differences).abs().max()
    if gap > 1e-2 * differences.abs().max().clamp(min=1e-3 * gradient.detach().abs().max()):
        raise InputError(
            f"The derivative that torch sees of {type(likelihood).__name__}.score is not that of its values (they differ by {gap.item():.2g}, where the "
            f"values change by {differences.abs().max().item():.2g} per unit of the outputs). kind='hessian' differentiates it: write score in torch "
            "operations on the outputs that it is given, without detach(), .data or numpy."
        )
