r"""The trace term of the Gaussian divergence, the only one for which F̂ and F are needed together.

.. math:: \mathrm{KL} = \tfrac12 \big[ \operatorname{tr} (\hat F + \lambda)^{-1} (F + \lambda) - P
   + \log\det(\hat F + \lambda) - \log\det(F + \lambda) \big]

With B = F̂ + λ the trace exceeds P by tr B⁻¹(F - F̂), which is 0 where F̂ is the block-diagonal part of F.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fisherlens.independence.standin import StandIn
from fisherlens.independence.target import Target, Value
from fisherlens.linalg.probes import Probes
from fisherlens.linalg.traces import trace

# Numbers that pass through solves in an exact trace: a gigabyte of float64 (our choice); above it the trace is estimated.
_MOST_ENTRIES = 2**27
_CHUNK_BYTES = 2**26
# Step of the derivative by log λ: its error is below h⁴/300 = 3e-11 of the effective dimension (derived).
_STEP = 0.01


def trace_excess(target: Target, stand_in: StandIn, damping: float) -> Value:
    """Tr B⁻¹(F + λ) - P with B = F̂ + λ, exact where affordable, else by Hutch++."""
    if stand_in.exact_blocks:
        return Value(0.0)
    F, method = target.F, target.options.method
    rows, streamed = F.scores.rows, F.plan.streamed or F.plan.linearised
    by_rows = stand_in.damps_as_usual and not streamed and rows < F.n_params
    solves = rows if by_rows else F.n_params
    if method == "exact" or (method == "auto" and solves * F.n_params <= _MOST_ENTRIES):
        excess = _over_rows if by_rows else _over_parameters
        return Value(excess(target, stand_in, damping))
    return _estimated(target, stand_in, damping)


def _over_rows(target: Target, stand_in: StandIn, damping: float) -> float:
    """Σ u B⁻¹ uᵀ / W over the score rows, less tr F̂ B⁻¹."""
    F, total = target.F, 0.0
    index = torch.arange(F.scores.rows, device=F.device)
    for chunk in index.split(_width(F.n_params, F.dtype)):
        u = F.scores.rows_at(chunk)
        total += torch.linalg.vecdot(u.double(), stand_in.solve(u.T, damping).T.double()).sum().item()
    return total / F.total_weight - effective_dimension(stand_in.matrix, damping)


def _over_parameters(target: Target, stand_in: StandIn, damping: float) -> float:
    """Σ_i (B⁻¹ (F + λ - B))_ii."""
    F, total = target.F, 0.0
    for start in range(0, F.n_params, _width(F.n_params, F.dtype)):
        columns = torch.arange(start, min(start + _width(F.n_params, F.dtype), F.n_params), device=F.device)
        unit = torch.zeros(len(columns), F.n_params, dtype=F.dtype, device=F.device)
        places = torch.arange(len(columns), device=F.device)
        unit[places, columns] = 1
        found = stand_in.solve(_difference(target, stand_in, damping, unit.T), damping)
        total += found[columns, places].double().sum().item()
    return total


def _difference(target: Target, stand_in: StandIn, damping: float, v: Tensor) -> Tensor:
    """(F + λ - B) V."""
    return target.F._product(v) + damping * v - stand_in.product(v, damping)


def _estimated(target: Target, stand_in: StandIn, damping: float) -> Value:
    """Hutch++ on the symmetric part of B⁻¹(F + λ - B), which has the same trace; plain random signs where a sketch has no room."""
    F, k = target.F, target.options.num_probes

    def product(z: Tensor) -> Tensor:
        left = stand_in.solve(_difference(target, stand_in, damping, z), damping)
        right = _difference(target, stand_in, damping, stand_in.solve(z, damping))
        return (left + right) / 2

    probes = Probes(F.n_params, F.dtype, F.device, target.options.seed)
    room = 6 * 8 * k * F.n_params <= F.memory
    found = trace(product, probes, 3 * k if room else k, "hutch++" if room else "hutchinson")
    return Value(found.value.item(), found.sem.item())


def effective_dimension(matrix: Any, damping: float) -> float:
    """Tr F̂ (F̂ + λ)⁻¹: the stand-in's own, or -d log det(I + F̂/λ) / d log λ by differences of fourth order."""
    own = getattr(matrix, "effective_dimension", None)
    if callable(own):
        return float(torch.as_tensor(own(damping), dtype=torch.float64, device="cpu").sum())
    below, above = ([matrix.log_determinant(damping * math.exp(sign * j * _STEP)) for j in (1, 2)] for sign in (-1, 1))
    return (8 * (below[0] - above[0]) - (below[1] - above[1])) / (12 * _STEP)


def _width(n_params: int, dtype: torch.dtype) -> int:
    """Vectors that are solved for together."""
    return max(1, _CHUNK_BYTES // (n_params * dtype.itemsize))
