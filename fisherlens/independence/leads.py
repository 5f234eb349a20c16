"""What the layers found, as a start for the whole network: Lanczos then needs fewer steps there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fisherlens.fisher import Fisher

Key = tuple[str, float]


class Leads:
    """Vectors at the ends of the spectrum, by stand-in and damping; nothing more is noted once the budget is spent.

    Parameters
    ----------
    budget
        Bytes that the vectors may take.
    """

    def __init__(self, budget: float):
        self._room = budget
        self._high: dict[Key, list[tuple[float, Tensor]]] = {}
        self._low: dict[Key, dict[str, tuple[float, Tensor]]] = {}
        self.leading: dict[tuple[str, str], list[Any]] = {}

    def _takes(self, x: Tensor) -> bool:
        self._room -= x.numel() * x.itemsize
        return self._room >= 0 and bool(torch.isfinite(x).all())

    def note_high(self, key: Key, value: float, y: Tensor) -> None:
        """The largest μ in a layer, and U x of its x, ``(rows,)``."""
        if value > 0 and y.any() and self._takes(y):
            self._high.setdefault(key, []).append((value, unit(y)))

    def note_low(self, key: Key, layer: str, inverse: float, x: Tensor) -> None:
        """The x with the smallest μ in a layer, ``(p,)``, of length 1 in F + λ, and 1/μ."""
        if inverse > 0 and self._takes(x):
            self._low.setdefault(key, {})[layer] = (inverse, x)

    def high(self, key: Key) -> Tensor | None:
        """The eigenvectors of Σ_l μ_l y_l y_lᵀ over what the layers found, weighted with their eigenvalues; None unless there are several.

        Not the leading one alone: where two layers are about as large, Lanczos would settle at the wrong one.
        """
        found = self._high.get(key, [])
        if len(found) < 2:
            return None
        half = torch.stack([y.double() * math.sqrt(value) for value, y in found])
        values, turn = torch.linalg.eigh(half @ half.T)
        vectors = torch.nn.functional.normalize(turn.T @ half, dim=1)
        return unit(values.clamp(min=0) @ vectors).to(found[0][1].dtype)

    def low(self, key: Key, F: Fisher) -> Tensor | None:
        """The best sum of what the layers found, ``(P,)``, that is the one with the smallest μ; None unless there are several.

        With A_lm = x_l · (F + λ) x_m, which needs U_l x_l alone, it is the largest c of diag(A_ll / μ_l) c = A c / μ.
        """
        found = self._low.get(key, {})
        if len(found) < 2:
            return None
        images = torch.stack([F.scores[name].matmat(x[:, None])[:, 0] for name, (_, x) in found.items()]).double()
        a = images @ images.T / F.total_weight
        a.diagonal().add_(torch.stack([x.double() @ x.double() for _, x in found.values()]), alpha=key[1])
        inverses = torch.tensor([inverse for inverse, _ in found.values()], dtype=a.dtype, device=a.device)
        half = inverses.sqrt() * a.diagonal().sqrt()
        # a / (half halfᵀ) has the small eigenvalues μ, and A is positive definite as λ is
        c = torch.linalg.eigh(a / half / half[:, None])[1][:, 0] / half
        out = torch.zeros(F.n_params, dtype=F.dtype, device=F.device)
        for (name, (_, x)), weight in zip(found.items(), c.tolist(), strict=True):
            layer = F.layout.layer(name)
            out[layer.start : layer.stop] = x * weight
        return out


class Trail:
    """Vectors that runs ask about, kept as long as a budget allows, to put a Ritz vector together in the end."""

    def __init__(self, count: int, budget: float):
        self._room = budget
        self._asked: list[list[Tensor]] = [[] for _ in range(count)]

    def add(self, which: int, v: Tensor) -> None:
        """Note the next vector of a run."""
        self._room -= v.numel() * v.itemsize
        if self._room >= 0:
            self._asked[which].append(v.clone())
        else:
            self._asked = [[] for _ in self._asked]

    def vector(self, which: int, weights: Sequence[float]) -> Tensor | None:
        """Their sum with these weights, where all were kept; the run's vectors are given back."""
        asked, self._asked[which] = self._asked[which], []
        if not len(weights) or len(asked) < len(weights):
            return None
        total = torch.zeros_like(asked[0])
        for weight, v in zip(weights, asked, strict=False):
            total.add_(v, alpha=float(weight))
        return total


def unit(v: Tensor) -> Tensor:
    """The vector with length 1, or zero."""
    norm = torch.linalg.vector_norm(v)
    return v / norm if norm > 0 else v
