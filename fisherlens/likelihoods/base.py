"""What every likelihood answers in output space."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fisherlens.errors import InputError, NonFiniteError


class BoundLikelihood(ABC):
    """A likelihood at the outputs of one batch of N examples, each with T terms of the mean.

    Attributes
    ----------
    outputs : Tensor
        Outputs of the network, shape ``(N, ...)``, detached.
    weight : Tensor
        Weight of each term, float64, shape ``(N, T)``; T = 1 where all elements of an example are one term.
    num_columns : int
        Columns R of the root per example.
    num_uniforms : int
        Uniform numbers per example that one draw of labels consumes.
    """

    outputs: Tensor
    weight: Tensor
    num_columns: int
    num_uniforms: int

    @abstractmethod
    def column(self, r: int) -> Tensor:
        """Column r of √w S for every example, in the shape of the outputs."""

    @abstractmethod
    def sampled_score(self, uniforms: Tensor) -> Tensor:
        """√w times the score at labels drawn by inversion from ``uniforms`` (N, num_uniforms)."""

    @abstractmethod
    def sampled_coefficients(self, uniforms: Tensor) -> Tensor:
        """The same scores as combinations of the columns: (N, R) with score = Σ_r c_r column_r."""

    @abstractmethod
    def observed_score(self, term: int | None = None) -> Tensor:
        """√w times the score at the observed labels: summed over terms, or of one term."""

    @abstractmethod
    def gradient_coefficients(self) -> Tensor:
        """The loss gradient as a combination of the columns: (N, R) with Σ_r d_r column_r = ``loss_gradient()``."""

    @abstractmethod
    def loss_gradient(self) -> Tensor:
        """Gradient of Σ w · (negative log-likelihood) with respect to the outputs."""

    @property
    def num_terms(self) -> int:
        return self.weight.shape[1]

    def kept_rows(self) -> Tensor:
        """Which of the N × R rows carry weight, shape ``(N, R)``, bool."""
        kept = self.weight > 0
        return kept.repeat_interleave(self.num_columns // self.num_terms, dim=1)


class Likelihood(ABC):
    """Base class: a family p(y | f) whose Fisher in output space has a closed form."""

    name: str = ""
    needs_targets: bool = False

    @abstractmethod
    def bind(self, outputs: Tensor, targets: Tensor | None, where: str = "the data") -> BoundLikelihood:
        """Check outputs and targets of one batch and bind to them; ``where`` names the batch in errors."""

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in vars(self).items())
        return f"{type(self).__name__}({settings})"

    def rank_per_term(self, output_shape: torch.Size) -> int:
        """Largest rank that one term can add to F."""
        return math.prod(output_shape[1:])


def require_finite(outputs: Tensor, where: str) -> None:
    """Refuse outputs with NaN or infinity, naming the batch and the first bad example."""
    if not torch.isfinite(outputs).all():
        bad = (~torch.isfinite(outputs)).reshape(outputs.shape[0], -1).any(1).nonzero()[0].item()
        raise NonFiniteError(
            f"The network's output is NaN or infinite in {where}, first at its example {bad}. The usual causes are weights that "
            "diverged or an input that was not scaled; look at the outputs of that example."
        )


def require_targets(likelihood: Likelihood, targets: object) -> None:
    """Refuse anything but a tensor of targets."""
    if not isinstance(targets, Tensor):
        raise InputError(
            f"The observed labels are needed here, but the targets are {type(targets).__name__}. Give data as (inputs, targets) tensors; "
            f"{likelihood.name} targets may be None only for kind='exact' or 'mc' without class weights or ignored labels."
        )


def require_per_output(name: str, values: Tensor, outputs: Tensor) -> None:
    """Refuse settings that do not broadcast to one example's outputs, or would only do so along the examples."""
    wanted, got = tuple(outputs.shape[1:]), tuple(values.shape)
    fits = len(got) <= len(wanted) and all(g in (1, w) for g, w in zip(reversed(got), reversed(wanted), strict=False))
    if not fits:
        raise InputError(
            f"{name} must be a scalar or broadcast against one example's outputs of shape {wanted}; got shape {got}. "
            "Give one value per output, without an axis for the examples."
        )


def require_same_shape(likelihood: Likelihood, outputs: Tensor, targets: Tensor, where: str) -> None:
    """Refuse targets that would only fit the outputs by broadcasting."""
    if targets.shape != outputs.shape:
        raise InputError(
            f"{type(likelihood).__name__} targets must have the shape of the outputs, {tuple(outputs.shape)}; {where} holds {tuple(targets.shape)}. "
            "Broadcasting is refused because it hides mistakes: use targets.unsqueeze(-1) or outputs.squeeze(-1)."
        )
