r"""The network and its Fisher matrix: outputs, derivatives, likelihoods, score rows, divergences; all dense.

The arguments are explained in :mod:`fisherlens.reference`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, one_hot

from fisherlens import errors
from fisherlens.errors import InputError, NonFiniteError
from fisherlens.layout import Layout

Data = tuple[Any, Any]
Theta = Mapping[str, Tensor]
Names = Sequence[str] | str | None

_FAMILIES = {"class_axis": "categorical", "pos_weight": "bernoulli", "variance": "gaussian"}
_NEEDS_EVAL = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)

# --- 1. The network: its outputs and their derivatives ---------------------------------------------------------------


def outputs_at(model: nn.Module, theta: Theta, inputs: Any) -> Tensor:
    """Compute f(x; θ) of all examples, ``(N, ...)``, with the parameters named in ``theta`` replaced by those given."""
    for name, module in model.named_modules():
        if isinstance(module, _NEEDS_EVAL) and (module.training or getattr(module, "running_mean", 0) is None):
            raise InputError(
                f"Each output must depend on its own example only; module {name!r} ({type(module).__name__}) uses "
                "batch statistics or chance. Call model.eval(), and keep running statistics in batch normalisation."
            )
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (inputs, None)
    return _finite(torch.func.functional_call(model, dict(theta), args, kwargs), "The network's output")


def jacobian(model: nn.Module, inputs: Any, params: Names = None) -> Tensor:
    """J = ∂f/∂θ, ``(N, ..., P)``: the shape of the outputs, then P. One backward pass per output element."""
    theta = _leaves(model, params)
    with torch.enable_grad():
        outputs = outputs_at(model, theta, inputs)  # (N, ...)
        rows = [_gradient(element, theta) for element in outputs.reshape(-1)]  # N·T·C of (P,)
    return torch.stack(rows).reshape(*outputs.shape, -1)  # (N, ..., P)


def negative_log_likelihood(model: nn.Module, data: Data, likelihood: Any, theta: Theta | None = None) -> Tensor:
    """-Σ_t w_t ln p(y_t | f_t) / Σ_t w_t in nat, constants included: a scalar, differentiable in ``theta``."""
    t = terms(outputs_at(model, theta or {}, data[0]), likelihood, data[1])
    return -(t.weight * log_probability(t)).sum() / t.weight.sum()


def gradient(model: nn.Module, data: Data, likelihood: Any, params: Names = None) -> Tensor:
    """∂/∂θ of the mean negative log-likelihood, flat ``(P,)``, by one backward pass."""
    theta = _leaves(model, params)
    with torch.enable_grad():
        return _gradient(negative_log_likelihood(model, data, likelihood, theta), theta)


def _leaves(model: nn.Module, params: Names) -> dict[str, Tensor]:
    """Copies of the selected parameters to differentiate by: the model's own are not touched."""
    own = dict(model.named_parameters())
    return {name: own[name].detach().clone().requires_grad_() for name in Layout.from_model(model, params)}


def _gradient(scalar: Tensor, theta: Theta) -> Tensor:
    """∂scalar/∂θ, flat ``(P,)``; zero for parameters that it does not depend on."""
    pieces = torch.autograd.grad(scalar, list(theta.values()), retain_graph=True, materialize_grads=True)
    return _finite(torch.cat([piece.reshape(-1) for piece in pieces]), "A derivative")


def _finite(tensor: Tensor, what: str) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise NonFiniteError(f"{what} must be finite; it holds NaN or infinity. Look at the weights and the inputs.")
    return tensor


# --- 2. The likelihood: terms, log-probabilities, scores, and the Fisher of the output distribution ------------------


@dataclass(frozen=True)
class Terms:
    """Outputs and labels of a batch, term by term."""

    family: str  # categorical: a position is a term, its elements the classes; else an example is one term, T = 1
    f: Tensor  # (N, T, C)
    labels: Tensor | None  # (N, T) classes, or (N, T, C) values; None without targets
    weight: Tensor  # (N, T): w_t, the class weight of the observed label, 0 where that is ignored
    element_weight: Tensor  # (N, T, C): 1 + (pos_weight - 1) y for Bernoulli, else 1
    variance: Tensor  # (N, T, C): that of Gaussian outputs, else 1

    @property
    def observed(self) -> Tensor:
        """The labels, which must be there."""
        if self.labels is None:
            raise InputError("Observed labels are needed, but the targets are None. Give data as (inputs, targets).")
        return self.labels


def terms(outputs: Tensor, likelihood: Any, targets: Tensor | None = None) -> Terms:
    """Sort outputs ``(N, ...)`` and targets into the terms of the mean, with their weights."""
    family = _family(likelihood)
    class_weight, pos_weight = getattr(likelihood, "weight", None), getattr(likelihood, "pos_weight", None)

    def sort(values: Any) -> Tensor:
        values = torch.as_tensor(values, dtype=outputs.dtype, device=outputs.device)
        return by_term(values.expand_as(outputs), outputs, likelihood)  # (N, T, C)

    f, variance = sort(outputs), sort(getattr(likelihood, "variance", 1.0))
    t = Terms(family, f, None, torch.ones_like(f[..., 0]), torch.ones_like(f), variance)
    if targets is not None:
        t = replace(t, labels=labels_by_term(targets, outputs, likelihood))
    if family == "categorical" and targets is not None:
        kept = t.observed != getattr(likelihood, "ignore_index", -100)  # (N, T)
        labels = t.observed.where(kept, 0)
        if ((labels < 0) | (labels >= f.shape[-1])).any():
            raise InputError(f"Labels must lie in 0..{f.shape[-1] - 1}; got {labels.min()}..{labels.max()}.")
        t = replace(t, labels=labels, weight=kept.to(f))
    if class_weight is not None:
        t = replace(t, weight=t.weight * torch.as_tensor(class_weight, dtype=f.dtype, device=f.device)[t.observed])
    if pos_weight is not None:
        t = replace(t, element_weight=1 + (sort(pos_weight) - 1) * t.observed)
    if t.weight.sum() <= 0:
        raise InputError("The weights of all terms add up to 0: no example, or every label ignored or of weight 0.")
    return t


def by_term(values: Tensor, outputs: Tensor, likelihood: Any) -> Tensor:
    """Rearrange values ``(N, ..., *rest)``, which begin with the shape of the outputs, as ``(N, T, C, *rest)``."""
    (N, *shape), rest = outputs.shape, values.shape[outputs.ndim :]
    if _family(likelihood) != "categorical":
        return values.reshape(N, 1, math.prod(shape), *rest)
    axis = getattr(likelihood, "class_axis", 1)
    if not shape or axis % outputs.ndim == 0:
        raise InputError(f"Axis {axis} of outputs {tuple(outputs.shape)} cannot hold classes. One logit is Bernoulli.")
    C = outputs.shape[axis]
    classes_last = values.movedim(axis % outputs.ndim, len(shape))  # (N, d1, ..., C, *rest)
    return classes_last.reshape(N, math.prod(shape) // C, C, *rest)


def labels_by_term(targets: Tensor, outputs: Tensor, likelihood: Any) -> Tensor:
    """Labels as ``(N, T)`` classes, or as ``(N, T, C)`` values for Bernoulli and Gaussian."""
    family, wanted = _family(likelihood), outputs.shape
    if family == "categorical":
        wanted = outputs.select(getattr(likelihood, "class_axis", 1), 0).shape  # (N, d1, ...)
    if targets.shape != wanted:
        raise InputError(
            f"Targets of a {family} likelihood must have shape {tuple(wanted)} for outputs of shape "
            f"{tuple(outputs.shape)}; got {tuple(targets.shape)}. Check the class axis and the number of examples."
        )
    if family == "categorical":
        return targets.reshape(len(targets), math.prod(wanted[1:]))  # (N, T)
    return by_term(targets.to(outputs), outputs, likelihood)  # (N, T, C)


def log_probability(t: Terms) -> Tensor:
    """The logarithm of p(y_t | f_t) at the observed labels, ``(N, T)``, in nat."""
    y = t.observed
    if t.family == "categorical":
        return t.f.log_softmax(-1).gather(-1, y[..., None])[..., 0]
    if t.family == "bernoulli":
        ones = t.element_weight - (1 - y)  # pos_weight · y
        return (ones * logsigmoid(t.f) + (1 - y) * logsigmoid(-t.f)).sum(-1)
    return -((t.f - y) ** 2 / t.variance + (2 * math.pi * t.variance).log()).sum(-1) / 2


def score(t: Terms, y: Tensor) -> Tensor:
    """-∇_f log p(y | f) at any labels y, ``(N, T, C)``; an element weight c scales it by √c, and so H by c."""
    if t.family == "categorical":
        return t.f.softmax(-1) - one_hot(y, t.f.shape[-1])
    if t.family == "bernoulli":
        return t.element_weight.sqrt() * (t.f.sigmoid() - y)
    return (t.f - y) / t.variance


def output_fisher(outputs: Tensor, likelihood: Any, targets: Tensor | None = None) -> Tensor:
    """H = E[s sᵀ] over y ~ p(· | f), ``(N, T, C, C)``; targets matter only where ``pos_weight`` is set.

    Categorical: diag(p) - p pᵀ. Bernoulli: diag(p (1 - p)). Gaussian: diag(1 / variance).
    """
    t = terms(outputs, likelihood, targets)
    if t.family == "categorical":
        p = t.f.softmax(-1)  # (N, T, C)
        return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    if t.family == "bernoulli":
        return torch.diag_embed(t.element_weight * t.f.sigmoid() * (-t.f).sigmoid())
    return torch.diag_embed(1 / t.variance)


def _family(likelihood: Any) -> str:
    known = list(_FAMILIES.values())
    if likelihood in known:
        return likelihood
    if isinstance(likelihood, str):
        hint = errors.nearest(likelihood, known)
        raise InputError(errors.UNKNOWN_NAME.format(what="likelihood", name=likelihood, hint=hint))
    found = [family for attribute, family in _FAMILIES.items() if hasattr(likelihood, attribute)]
    if len(found) != 1 or isinstance(likelihood, nn.Module):
        raise TypeError(
            f"likelihood must be one of {known}, or an object with one of the attributes {list(_FAMILIES)}; got "
            f"{type(likelihood).__name__}. A loss does not fix the scale of a Fisher: name the distribution behind it."
        )
    return found[0]


# --- 3. The Fisher matrix, three kinds of it -------------------------------------------------------------------------


def fisher(
    model: nn.Module, data: Data, likelihood: Any, kind: str = "exact", params: Names = None, *, labels: Any = None
) -> Tensor:
    """F = Σ_t w_t J_tᵀ H_t J_t / Σ_t w_t, ``(P, P)``; also ``kind="empirical"``, and ``"mc"`` with ``labels``."""
    if kind != "exact":
        U, total = score_matrix(model, data, likelihood, kind, params, labels=labels)
        return U.T @ U / total
    outputs, J, t = _linearise(model, data, likelihood, params)
    H = output_fisher(outputs, likelihood, data[1])  # (N, T, C, C)
    return torch.einsum("nt,ntcp,ntcd,ntdq->pq", t.weight, J, H, J) / t.weight.sum()


def empirical_fisher(model: nn.Module, data: Data, likelihood: Any, params: Names = None) -> Tensor:
    """Σ_t w_t u_t u_tᵀ / Σ_t w_t with the score u_t of each term at its observed label. Not the Fisher matrix."""
    return fisher(model, data, likelihood, "empirical", params)


def mc_fisher(model: nn.Module, data: Data, likelihood: Any, labels: Tensor, params: Names = None) -> Tensor:
    """The same at sampled labels ``(*targets.shape, S)``, terms of an example summed (scores have mean 0)."""
    return fisher(model, data, likelihood, "mc", params, labels=labels)


def score_matrix(
    model: nn.Module, data: Data, likelihood: Any, kind: str = "exact", params: Names = None, *, labels: Any = None
) -> tuple[Tensor, float]:
    """U ``(rows, P)`` and W = Σ w with F = Uᵀ U / W; each row carries its √w.

    Rows per example: T·C columns of a root S Sᵀ = H (exact), T observed scores (empirical), S sampled scores (mc).
    """
    outputs, J, t = _linearise(model, data, likelihood, params)
    root_weight = t.weight.sqrt()[..., None]  # (N, T, 1)
    if kind == "exact":
        values, vectors = torch.linalg.eigh(output_fisher(outputs, likelihood, data[1]))  # (N, T, C), (N, T, C, C)
        root = vectors * values.clamp(min=0).sqrt()[..., None, :] * root_weight[..., None]  # (N, T, C, C)
        U = torch.einsum("ntcp,ntcr->ntrp", J, root)
    elif kind == "empirical":
        U = torch.einsum("ntcp,ntc->ntp", J, root_weight * score(t, t.observed))
    elif kind == "mc" and labels is not None:
        sampled = [labels_by_term(draw, outputs, likelihood) for draw in labels.unbind(-1)]  # S of (N, T) or (N, T, C)
        scores = torch.stack([root_weight * score(t, y) for y in sampled]) / math.sqrt(len(sampled))  # (S, N, T, C)
        U = torch.einsum("ntcp,sntc->nsp", J, scores)
    else:
        raise InputError(f"kind must be 'exact', 'empirical', or 'mc' together with labels; got {kind!r}.")
    return U.reshape(-1, U.shape[-1]), t.weight.sum().item()


def _linearise(model: nn.Module, data: Data, likelihood: Any, params: Names) -> tuple[Tensor, Tensor, Terms]:
    """Outputs ``(N, ...)``, their Jacobian by term ``(N, T, C, P)``, and the terms."""
    with torch.no_grad():
        outputs = outputs_at(model, {}, data[0])
    t = terms(outputs, likelihood, data[1])
    return outputs, by_term(jacobian(model, data[0], params), outputs, likelihood), t


def kl_divergence(
    model: nn.Module, params: Names, delta: Tensor, inputs: Any, likelihood: Any, targets: Tensor | None = None
) -> float:
    """Mean over terms of KL(p(· | θ) ‖ p(· | θ + δ)) in nat, closed form: ½ δᵀ F δ + O(δ³), which is what F means."""
    step = Layout.from_model(model, params).unflatten(delta)
    with torch.no_grad():
        moved = {name: p + step[name] for name, p in _leaves(model, params).items()}
        a, b = (terms(outputs_at(model, theta, inputs), likelihood, targets) for theta in ({}, moved))
        if a.family == "categorical":
            each = a.f.softmax(-1) * (a.f.log_softmax(-1) - b.f.log_softmax(-1))  # (N, T, C)
        elif a.family == "bernoulli":
            each = a.f.sigmoid() * (logsigmoid(a.f) - logsigmoid(b.f))
            each = a.element_weight * (each + (-a.f).sigmoid() * (logsigmoid(-a.f) - logsigmoid(-b.f)))
        else:
            each = (a.f - b.f) ** 2 / (2 * a.variance)
        return ((a.weight * each.sum(-1)).sum() / a.weight.sum()).item()
