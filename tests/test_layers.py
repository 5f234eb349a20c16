"""Every layer of the second zoo, in all kinds, kept, streamed and linearised, in both precisions, against the dense reference."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
import torch
from cases import fill
from cases_more import MORE_CASES
from fisher_checks import DRAWS, KINDS, QUIET, SEED, drawn_labels, error
from torch import Tensor, nn

import fisherlens as fl
from fisherlens import reference

pytestmark = [
    pytest.mark.filterwarnings(QUIET),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]
TOLERANCE = 1e-10


@cache
def made(name: str) -> tuple[Any, Any, str]:
    return MORE_CASES[name]()


def dense_twin(name: str) -> tuple[Any, Any, str]:
    """The same case without sparse gradients, which the reference does not read."""
    model, data, likelihood = MORE_CASES[name]()
    for module in model.modules():
        if hasattr(module, "sparse"):
            module.sparse = False
    return model, data, likelihood


@cache
def truth(name: str, kind: str) -> Tensor:
    model, data, likelihood = dense_twin(name)
    labels = drawn_labels(model, data, likelihood) if kind == "mc" else None
    return reference.fisher(model, data, likelihood, kind, labels=labels)


def reference_gradient(name: str) -> Tensor:
    return reference.gradient(*dense_twin(name))


def fisher(name: str, kind: str = "exact", **options: Any) -> fl.Fisher:
    model, data, likelihood = made(name)
    return fl.Fisher(model, data, likelihood=likelihood, kind=kind, mc_samples=DRAWS, seed=SEED, **options)


def vectors(size: int, k: int) -> Tensor:
    return torch.randn(size, k, generator=torch.Generator().manual_seed(k), dtype=torch.float64)


def not_kept(name: str, path: str, kind: str = "exact") -> fl.Fisher:
    """Built in the largest budget that does not hold the scores; ``path`` says whether it is taken to hold the graph."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fisherlens.scores.plan._GRAPHS", 1e-9 if path == "linearised" else 1e9)
        patch.setattr("fisherlens.scores.plan._SLOW_TWICE", frozenset())
        budget = fisher(name, kind).plan.nbytes
        F = fisher(name, kind, memory=budget)
        while not (F.plan.streamed or F.plan.linearised):
            budget = budget * 2 // 3
            F = fisher(name, kind, memory=budget)
    return F


@pytest.mark.parametrize("name", MORE_CASES)
def test_kept(name, unchanged):
    model = made(name)[0]
    gradient = reference_gradient(name)
    attributes = {module: dict(vars(module)) for module in model.modules()}
    with unchanged(model):
        for kind in KINDS:
            F, T = fisher(name, kind), truth(name, kind)
            V = vectors(F.n_params, 3)
            assert F.n_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
            assert T.norm() > 0
            assert error(F.dense(), T) < TOLERANCE
            assert error(F @ V, T @ V) < TOLERANCE
            assert error(F @ V[:, 0], T @ V[:, 0]) < TOLERANCE
            assert error(F.diagonal(), T.diagonal()) < TOLERANCE
            assert error(F.gradient(), gradient) < TOLERANCE
    for module, before in attributes.items():  # weights that hooks compute, say
        assert all(vars(module)[key] is value for key, value in before.items())


# Where torch has no derivative along a direction that agrees with the gradient, scores are collected in each product.
COLLECTED = {
    "linearised": {
        *("embedding bag, sum", "embedding bag, mean of what is no padding", "embedding bag, sparse"),
        *("embedding bag, max", "function with a hidden backward", "function differentiable once"),
    },
    "streamed": {"forward without gradient", "checkpoint"},
}
COLLECTED["streamed"] |= COLLECTED["linearised"]


@pytest.mark.parametrize("path", ["streamed", "linearised"])
@pytest.mark.parametrize("name", MORE_CASES)
def test_not_kept(name, path, unchanged):
    kind = KINDS[(list(MORE_CASES).index(name) + len(path)) % 3]  # each path meets each kind in a third of the cases
    with unchanged(made(name)[0]):
        F, T = not_kept(name, path, kind), truth(name, kind)
        for k in (1, 2, 5):
            V = vectors(F.n_params, k)
            assert error(F @ V, T @ V) < TOLERANCE
        assert error(F.diagonal(), T.diagonal()) < TOLERANCE
    if name != "bilinear":  # whose graph holds nothing but inputs and parameters, and fits in any budget
        assert F.plan.linearised == (path == "linearised" and name not in COLLECTED["linearised"])
    collected = name in COLLECTED["streamed"] and F.plan.streamed
    assert ("collected in each product" in repr(F.plan)) == collected


# --- likelihoods where no scores are kept; kept ones are in test_fisher_data.py --------------------------------------


def forms() -> dict[str, tuple[nn.Module, tuple[Tensor, Tensor], Any]]:
    """Every form of terms, weights and variances, on outputs (N, 3) and (N, 3, 2)."""
    g = torch.Generator().manual_seed(3)
    with torch.random.fork_rng(devices=[]):
        flat = fill(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double(), g)
        wide = fill(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 6), nn.Unflatten(1, (3, 2))).double(), g)
    x = torch.randn(7, 3, generator=g, dtype=torch.float64)
    y, pairs = torch.randint(3, (7,), generator=g), torch.randint(3, (7, 2), generator=g)
    last = torch.randint(2, (7, 3), generator=g)
    binary, values = torch.randint(2, (7, 3, 2), generator=g).double(), torch.randn(7, 3, 2, generator=g).double()
    y[2] = pairs[0, 1] = pairs[4] = last[1] = -100
    weight, each = [0.2, 1.0, 3.0], 0.5 + torch.rand(7, 3, 2, generator=g, dtype=torch.float64)
    return {
        "weights and ignored labels": (flat, (x, y), fl.Categorical(weight=weight)),
        "classes first": (wide, (x, pairs), "categorical"),
        "classes first, weights": (wide, (x, pairs), fl.Categorical(weight=weight)),
        "classes last": (wide, (x, last), fl.Categorical(class_axis=-1, weight=[0.5, 2.0])),
        "binary": (wide, (x, binary), "bernoulli"),
        "binary, soft labels and a weight": (wide, (x, binary * 0.8), fl.Bernoulli(2.5)),
        "binary, weights per output": (wide, (x, binary), fl.Bernoulli(torch.tensor([[0.5, 2.0]] * 3))),
        "one variance": (wide, (x, values), fl.Gaussian(0.3)),
        "variances per output": (wide, (x, values), fl.Gaussian(torch.tensor([[0.2], [1.0], [5.0]]))),
        "variances per example": (wide, (x, values), fl.Gaussian(each)),
    }


@pytest.mark.parametrize("path", ["streamed", "linearised"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", forms())
def test_likelihoods_where_scores_are_not_kept(form, kind, path):
    model, data, likelihood = forms()[form]
    drawn = drawn_labels(model, data, likelihood) if kind == "mc" else None
    T = reference.fisher(model, data, likelihood, kind, labels=drawn)
    batches = [tuple(t[at] for t in data) for at in (slice(3), slice(3, 7))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fisherlens.scores.plan._GRAPHS", 1e-9 if path == "linearised" else 1e9)
        patch.setattr("fisherlens.scores.plan._SLOW_TWICE", frozenset())
        options = {"likelihood": likelihood, "kind": kind, "mc_samples": DRAWS, "seed": SEED}
        budget = fl.Fisher(model, batches, **options).plan.nbytes // 3
        F = fl.Fisher(model, batches, memory=budget, **options)
    assert {entry.path for entry in F.plan} == {path}
    V = vectors(F.n_params, 4)
    assert error(F @ V, T @ V) < TOLERANCE
    assert error(F @ V[:, 0], T @ V[:, 0]) < TOLERANCE
    assert error(F.dense(), T) < TOLERANCE
    assert error(F.gradient(), reference.gradient(model, data, likelihood)) < TOLERANCE
    assert F.trace() == pytest.approx(T.trace().item(), rel=TOLERANCE)


def single(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(map(single, x))
    return x.float() if x.is_floating_point() else x


@pytest.mark.parametrize("name", MORE_CASES)
def test_float32(name):
    model, (inputs, targets), likelihood = MORE_CASES[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = model.float()
    kind = ("exact", "empirical")[list(MORE_CASES).index(name) % 2]
    F = fl.Fisher(model, (single(inputs), single(targets)), likelihood=likelihood, kind=kind)
    T, V = truth(name, kind), vectors(F.n_params, 3)
    assert F.dtype == F.diagonal().dtype == torch.float32
    assert error(F.dense(), T) < 1e-4
    assert error(F @ V.float(), T @ V) < 1e-4
