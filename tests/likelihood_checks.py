"""Tiny networks, data and dense twins for the tests of likelihoods, straight from automatic differentiation."""

from __future__ import annotations

import math
from typing import Any

import torch
from cases import fill
from torch import Tensor, nn

import fisherlens as fl
from fisherlens import reference

DTYPE = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=DTYPE)


def network(*layers: nn.Module) -> nn.Module:
    return fill(nn.Sequential(*layers).double(), generator(1))


def mlp(outputs: int = 2, hidden: int = 4) -> nn.Module:
    return network(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def image(channels: int = 2) -> nn.Module:
    return network(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, channels, 1))


def error(found: Tensor, truth: Tensor) -> float:
    assert truth.norm() > 0
    return ((found - truth).norm() / truth.norm()).item()


def splits(x: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    """The data in three unequal batches."""
    sizes = [1, len(x) - 4, 3]
    return list(zip(*(values.split(sizes) for values in (x, *others)), strict=True))


def dense_twin(model: nn.Module, x: Tensor, H: Tensor) -> Tensor:
    """(1/N) Σ_n J_nᵀ H_n J_n for H ``(N, E, E)``."""
    J = reference.jacobian(model, x).reshape(len(x), -1, sum(p.numel() for p in model.parameters()))  # (N, E, P)
    return torch.einsum("nep,nef,nfq->pq", J, H, J) / len(x)


def empirical_twin(model: nn.Module, x: Tensor, y: Tensor, loss: Any) -> tuple[Tensor, Tensor]:
    """(1/N) Σ_n g_n g_nᵀ and (1/N) Σ_n g_n from the gradient of each example's loss, one backward pass each."""
    rows = []
    for n in range(len(x)):
        grads = torch.autograd.grad(loss(model(x[n : n + 1]), y[n : n + 1]), list(model.parameters()))
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    rows = torch.stack(rows)
    return rows.T @ rows / len(x), rows.mean(0)


def assert_unbiased(
    model: nn.Module, data: Any, likelihood: Any, truth: Tensor, draws: int = 150, **options: Any
) -> None:
    """The sampled Fisher meets the exact one in the mean of several directions, within 5 standard errors."""
    v = randn(len(truth), 4, seed=9)
    found = []
    for seed in range(draws):
        F = fl.Fisher(model, data, likelihood=likelihood, kind="mc", seed=seed, progress=False, **options)
        found.append(((F @ v) * v).sum(0))
    found = torch.stack(found)
    sem = found.std(0) / math.sqrt(draws)
    assert (sem > 0).all()
    assert ((found.mean(0) - (v * (truth @ v)).sum(0)).abs() < 5 * sem).all()
