"""A copy of a network that stands wherever it is put, and the batches and Fishers that training would see there."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from fisherlens.errors import NonFiniteError
from fisherlens.fisher import Fisher
from fisherlens.training.base import Pair
from fisherlens.training.loss import mean_loss
from fisherlens.training.verify.subject import Subject, resolve_operator


class Movable:
    """A copy of a subject's network that can be put at any parameters; the subject's own stays where it is.

    Attributes
    ----------
    model
        The copy, in eval mode.
    """

    def __init__(self, subject: Subject):
        self.subject, self.layout = subject, subject.layout
        self.model = copy.deepcopy(subject.model).eval()
        own = dict(self.model.named_parameters())
        self._parameters = [own[info.name] for info in self.layout.parameters]

    def here(self) -> Tensor:
        """The parameters now, flat ``(P,)``, a copy."""
        return torch.cat([p.detach().reshape(-1) for p in self._parameters])

    def gradient(self) -> Tensor:
        """The gradients that the last backward pass left, flat ``(P,)``, zero where it left none."""
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        return torch.cat([grad.reshape(-1) for grad in found])

    def put(self, theta: Tensor) -> Movable:
        """Stand at θ."""
        if not torch.isfinite(theta).all():
            raise NonFiniteError(
                "A run that the claims compare has left all finite parameters: its steps are too long. A larger damping keeps them shorter."
            )
        with torch.no_grad():
            for info, p in zip(self.layout.parameters, self._parameters, strict=True):
                p.copy_(theta[info.start : info.stop].view(info.shape))
        return self

    def fisher(self, data: Pair, kind: str, seed: int = 0) -> Fisher:
        """The Fisher of the network as it stands, on some data."""
        likelihood = self.subject.likelihood
        return Fisher(
            self.model, data, likelihood=likelihood, kind=kind, seed=seed, progress=False, check_deterministic=False
        )

    def predictor(self, F: Fisher) -> Any:
        """What takes the place of a Fisher of this network in predictions: that Fisher, unless the subject has an operator of the user's."""
        subject = self.subject
        if subject.operator is None:
            return F
        if hasattr(subject.operator, "__matmul__"):
            return subject.fisher
        return resolve_operator(subject.operator, _Stand(self, F))  # type: ignore[arg-type]

    def backward(self, optimizer: torch.optim.Optimizer, data: Pair) -> None:
        """Gradients of the mean loss here, and the statistics that an optimizer takes of them."""
        loss = mean_loss(self.subject.likelihood, self.model(data[0]), data[1])
        optimizer.zero_grad()
        loss.backward()


class _Stand:
    """What a user's function for an operator may ask for, at other parameters and on other data than the subject's."""

    def __init__(self, network: Movable, F: Fisher):
        subject = network.subject
        self.model, self.data, self.likelihood, self.problem = (
            network.model,
            subject.data,
            subject.likelihood,
            subject.problem,
        )
        self.true_fisher, self.theta = F, F.parameters


def batches(subject: Subject, size: int, count: int, purpose: int) -> list[Pair]:
    """Some batches of the training data, on the network's device and in its dtype.

    Each pass takes every example once, in an order of its own; all examples in their own order where ``size`` is not less than their number.
    """
    x, y = subject.problem.train
    found: list[Tensor] = []
    if size >= len(x):
        found = [torch.arange(len(x), device="cpu")] * count
    generator = subject.generator(purpose)
    while len(found) < count:
        found += torch.randperm(len(x), generator=generator, device="cpu")[: len(x) // size * size].split(size)
    like = subject.theta

    def taken(part: Tensor, at: Tensor) -> Tensor:
        chosen = part[at.to(part.device)].to(like.device)
        return chosen.to(like.dtype) if chosen.is_floating_point() else chosen

    return [(taken(x, at), taken(y, at)) for at in found[:count]]


def curvature(F: Any, v: Tensor) -> Tensor:
    """vᵀFv of a flat vector, or of every column of ``(P, K)``, for anything with ``@``."""
    image = F @ v.to(getattr(F, "device", v.device), getattr(F, "dtype", v.dtype))
    found = (v * image.to(v.device, v.dtype)).sum(0)
    if not torch.isfinite(found).all():
        raise NonFiniteError("The operator gave NaN or infinity. Look at where it was made.")
    return found
