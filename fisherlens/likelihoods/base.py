"""What every likelihood answers in output space."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from fisherlens import errors
from fisherlens.errors import InputError, NonFiniteError

# Columns of roots that the default coefficients hold at once, in entries.
_AT_ONCE = 2**22


class BoundLikelihood(ABC):
    """A likelihood at the outputs of one batch of N examples, each with T terms of the mean.

    A subclass gives the columns of a root S of the output Fisher H = S Sᵀ, and the score s = -∇_f log p(y | f) at sampled
    and at observed labels; everything else follows from these. All carry √w, the root of the term's weight.

    Parameters
    ----------
    outputs
        Outputs of the network, shape ``(N, ...)``; kept detached.
    num_columns
        Columns R of the root per example, a multiple of T and ordered by term.
    num_uniforms
        Uniform numbers per example that one draw of labels consumes.
    weight
        Weight of each term, shape ``(N, T)``; None for one term per example of weight 1.

    Attributes
    ----------
    outputs, num_columns, num_uniforms
        As given.
    weight : Tensor
        Weight of each term, float64, shape ``(N, T)``.
    """

    outputs: Tensor
    weight: Tensor
    num_columns: int
    num_uniforms: int

    def __init__(self, outputs: Tensor, *, num_columns: int, num_uniforms: int, weight: Tensor | None = None):
        self.outputs = outputs.detach()
        self.num_columns, self.num_uniforms = num_columns, num_uniforms
        ones = torch.ones(outputs.shape[0], 1, dtype=torch.float64, device=outputs.device)
        self.weight = ones if weight is None else weight.double()

    @abstractmethod
    def column(self, r: int) -> Tensor:
        """Column r of √w S for every example, in the shape of the outputs."""

    def curvature(self, changes: Tensor) -> Tensor:
        """The curvature w H applied to changes of the outputs, ``(K, *outputs)`` → the same shape.

        Default: column by column, K R operations for each entry of the outputs.
        """
        total = torch.zeros_like(changes)
        for r in range(self.num_columns):
            total += along(self.column(r), changes)
        return total

    @abstractmethod
    def sampled_score(self, uniforms: Tensor) -> Tensor:
        """√w times the score at labels drawn from p(y | f) by inversion.

        ``uniforms`` are float64 numbers in [0, 1) on the CPU, ``(N, num_uniforms)``; the answer has the shape of the outputs.
        """

    @abstractmethod
    def observed_score(self, term: int | None = None) -> Tensor:
        """√w times the score at the observed labels, in the shape of the outputs: summed over terms, or of one term."""

    def sampled_coefficients(self, uniforms: Tensor) -> Tensor:
        """The sampled scores as combinations of the columns: (N, R) with score = Σ_r c_r column_r.

        Default: least squares in float64, N R³ operations.
        """
        found = self._combination(self.sampled_score(uniforms))
        if not torch.isfinite(found).all():
            raise InputError(
                f"A sampled score of {type(self).__name__} is not a combination of its columns, so column and sampled_score do not belong "
                "to one distribution. Check that S Sᵀ is the expectation of s sᵀ over sampled labels."
            )
        return found

    def loss_gradient(self) -> Tensor:
        """Gradient of Σ w · (negative log-likelihood) with respect to the outputs, in their shape."""
        root_weight = self.weight.sqrt().to(self.outputs.dtype)
        shape = (-1, *[1] * (self.outputs.ndim - 1))
        if self.num_terms == 1:
            return self.observed_score() * root_weight[:, 0].view(shape)
        return sum(self.observed_score(t) * root_weight[:, t].view(shape) for t in range(self.num_terms))

    def gradient_coefficients(self) -> Tensor:
        """The loss gradient as a combination of the columns: (N, R) with Σ_r d_r column_r = ``loss_gradient()``.

        Default: least squares in float64; NaN for an example whose gradient is no such combination.
        """
        return self._combination(self.loss_gradient())

    def _combination(self, scores: Tensor) -> Tensor:
        """Coefficients ``(N, R)`` of scores in the columns; NaN where they do not give the scores back."""
        columns = [self.column(r).flatten(1) for r in range(self.num_columns)]
        wanted = scores.flatten(1).double()
        tolerance = torch.finfo(scores.dtype).eps ** 0.5
        found = []
        step = max(1, _AT_ONCE // (self.num_columns * wanted.shape[1]))
        for start in range(0, len(wanted), step):
            root = torch.stack([column[start : start + step] for column in columns], dim=-1).double()  # (n, E, R)
            part = wanted[start : start + step, :, None]
            c = torch.linalg.pinv(root) @ part
            gap = torch.linalg.vector_norm(root @ c - part, dim=1)
            met = gap <= tolerance * torch.linalg.vector_norm(part, dim=1)
            found.append(c[..., 0].where(met, torch.nan))
        return torch.cat(found).to(scores.dtype)

    def divergence(self, moved: Tensor) -> Tensor:
        """Divergence w KL(p(y | f) ‖ p(y | f')) of every term in nat, float64 ``(N, T)``, from the bound outputs f to others f' of their shape.

        What F means: for f' = f(θ + δ) the mean over terms is ½ δᵀFδ + O(δ³). A likelihood without a closed form need not give it.
        """
        raise InputError(errors.NO_DIVERGENCE.format(name=type(self).__name__))

    def observed_coefficients(self) -> Tensor | None:
        """The same for the scores at the observed labels: (N, terms) with Σ_t d_t ``observed_score(t)`` = ``loss_gradient()``.

        None where the elements of a score have weights of their own, as the gradient then is no combination of such scores.
        """
        return self.weight.sqrt().to(self.outputs.dtype)

    @property
    def num_terms(self) -> int:
        return self.weight.shape[1]

    def kept_rows(self) -> Tensor:
        """Which of the N × R rows carry weight, shape ``(N, R)``, bool."""
        kept = self.weight > 0
        return kept.repeat_interleave(self.num_columns // self.num_terms, dim=1)


class Likelihood(ABC):
    """Base class of a family p(y | f) whose Fisher in output space has a known root.

    A family of your own subclasses ``ElementwiseLikelihood`` where the outputs are independent given f, and this class with a
    ``BoundLikelihood`` otherwise.

    Attributes
    ----------
    name : str
        What results call it; by default the lower-case name of the class.
    needs_targets : bool
        Whether observed labels are needed even by the exact kind, as they are for class weights.
    """

    name: str = ""
    needs_targets: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.name and "name" not in vars(cls):
            cls.name = cls.__name__.lower()

    @abstractmethod
    def bind(
        self, outputs: Tensor, targets: Tensor | None, where: str = "the data", at: slice | None = None
    ) -> BoundLikelihood:
        """Check outputs and targets of one batch and bind to them.

        ``where`` names the batch in errors; ``at`` says which examples of the whole data set it holds, None where that is not known.
        """

    def check_data(self, output_shape: torch.Size, n_data: int) -> None:  # noqa: B027 - most have nothing to check
        """Refuse settings that do not fit a data set of ``n_data`` examples with outputs of this shape each."""

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in vars(self).items())
        return f"{type(self).__name__}({settings})"

    def rank_per_term(self, output_shape: torch.Size) -> int:
        """Largest rank that one term can add to F, for outputs of shape ``(N, ...)``."""
        return math.prod(output_shape[1:])


def inner_products(column: Tensor, changes: Tensor) -> Tensor:
    """⟨c_n, v_kn⟩ of each example's column ``(N, ...)`` with changes ``(K, N, ...)``, ``(K, N)``."""
    return (column * changes).reshape(*changes.shape[:2], -1).sum(2)


def along(column: Tensor, changes: Tensor) -> Tensor:
    """Apply c cᵀ of each example's column c ``(N, ...)`` to changes ``(K, N, ...)``."""
    inner = inner_products(column, changes)
    return column * inner.view(*inner.shape, *[1] * (column.ndim - 1))


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
    if targets.is_complex():
        raise InputError(
            f"The targets must be real numbers; got {targets.dtype}. Use targets.real, or its two parts as two outputs."
        )


def require_per_output(name: str, values: Tensor, outputs: Tensor) -> None:
    """Refuse settings that do not broadcast to one example's outputs, or would only do so along the examples."""
    wanted, got = tuple(outputs.shape[1:]), tuple(values.shape)
    if len(got) > len(wanted) or not broadcasts(got, wanted):
        raise InputError(
            f"{name} must be a scalar or broadcast against one example's outputs of shape {wanted}; got shape {got}. "
            "Give one value per output, without an axis for the examples."
        )


def broadcasts(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether values of a shape, with no more axes than wanted, broadcast to the wanted shape."""
    return all(g in (1, w) for g, w in zip(reversed(shape), reversed(wanted), strict=False))


def require_same_shape(likelihood: Likelihood, outputs: Tensor, targets: Tensor, where: str) -> None:
    """Refuse targets that would only fit the outputs by broadcasting."""
    if targets.shape != outputs.shape:
        raise InputError(
            f"{type(likelihood).__name__} targets must have the shape of the outputs, {tuple(outputs.shape)}; {where} holds {tuple(targets.shape)}. "
            "Broadcasting is refused because it hides mistakes: use targets.unsqueeze(-1) or outputs.squeeze(-1)."
        )


def require_finite_targets(likelihood: Likelihood, targets: Tensor, where: str) -> None:
    """Refuse targets with NaN or infinity."""
    if not torch.isfinite(targets.double()).all():
        raise NonFiniteError(
            f"{type(likelihood).__name__} targets hold NaN or infinity in {where}. Clean the targets or drop those examples."
        )


def as_setting(value: Any, what: str) -> Tensor:
    """A setting of a likelihood (class weights, a variance) as a float64 tensor on the CPU; what is no real number is a TypeError."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        kind = f"a tensor of {value.dtype}, {value.layout}, on {value.device}"
        if value.is_complex() or value.is_meta or value.layout != torch.strided:
            raise TypeError(f"{what} must be real numbers in a dense tensor; got {kind}.")
    try:
        return torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{what} must be a number, a list or a tensor of numbers; got {kind}: {error}.") from None


def softmax_divergence(logits: Tensor, moved: Tensor) -> Tensor:
    """KL(softmax(f) ‖ softmax(f')) over the last axis, from logits of both.

    With t = f' - f - Σ p (f' - f) it is log Σ p eᵗ = log(1 + Σ p (eᵗ - 1 - t)), which keeps the digits that Σ p (log p - log p') of two
    nearly equal distributions loses; where t is large, the other loses none.
    """
    log_p, log_q = logits.log_softmax(-1), moved.log_softmax(-1)
    p, change = log_p.exp(), moved - logits
    t = change - (p * change).sum(-1, keepdim=True)
    near = t.clamp(-1, 1)
    small = torch.log1p((p * (torch.expm1(near) - near)).sum(-1))
    plain = (p * (log_p - log_q)).sum(-1)
    return torch.where(t.abs().amax(-1) < 1, small, plain).clamp(min=0)
