"""The loss that belongs to a likelihood: its mean negative log-likelihood, with nothing left out or rescaled."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional

from fisherlens.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood


def summed_loss(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | int]:
    """Return the weighted sum of the negative log-likelihood of a batch, in nat, and the weight that it is a sum of.

    Their ratio, over any number of batches, is the mean that the Fisher's normalisation belongs to: Σ w_t ℓ_t / Σ w_t.
    """
    if isinstance(likelihood, Categorical):
        weight = None if likelihood.weight is None else likelihood.weight.to(outputs.device, outputs.dtype)
        logits = outputs.movedim(likelihood.class_axis, 1)
        labels = targets.long()
        total = functional.cross_entropy(
            logits, labels, weight=weight, ignore_index=likelihood.ignore_index, reduction="sum"
        )
        kept = labels[labels != likelihood.ignore_index]
        return total, kept.numel() if weight is None else weight[kept].sum()
    targets = targets.to(outputs.dtype)
    if isinstance(likelihood, Bernoulli):
        pos_weight = None if likelihood.pos_weight is None else likelihood.pos_weight.to(outputs.device, outputs.dtype)
        total = functional.binary_cross_entropy_with_logits(outputs, targets, pos_weight=pos_weight, reduction="sum")
        return total, len(outputs)
    if isinstance(likelihood, Gaussian):
        variance = likelihood.variance_at(outputs, "this batch").to(outputs.device, outputs.dtype)
        terms = (outputs - targets).square() / variance + (2 * math.pi * variance).log()
        return terms.sum() / 2, len(outputs)
    raise TypeError(
        f"Training knows the loss of Categorical, Bernoulli and Gaussian; got {type(likelihood).__name__}. "
        "Write the training loop yourself for another likelihood: any loop works with the optimizers and with fl.Fisher."
    )


def mean_loss(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of a batch, in nat; 0 where every term of the batch is ignored."""
    total, weight = summed_loss(likelihood, outputs, targets)
    return total / weight if weight > 0 else total


def count_correct(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> tuple[int, int]:
    """Count the labels that the most probable prediction meets, and the labels; (0, 0) where there are none to meet."""
    if isinstance(likelihood, Categorical):
        kept = targets != likelihood.ignore_index
        hits = outputs.argmax(likelihood.class_axis) == targets
        return int((hits & kept).sum()), int(kept.sum())
    if isinstance(likelihood, Bernoulli):
        return int(((outputs > 0) == (targets > 0.5)).sum()), targets.numel()
    return 0, 0
