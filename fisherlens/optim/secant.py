"""BFGS updates of inverses in a batch, (B, d, d) matrices and (B, d, 1) vectors, and what K-BFGS keeps for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherlens.optim.averages import Averages


@dataclass(eq=False)
class Secants(Averages):
    """Averages and inverses of B blocks."""

    layer: str
    A: Tensor  # (B, d_i, d_i), average of a aᵀ
    H_a: Tensor  # (B, d_i, d_i)
    H_g: Tensor  # (B, d_o, d_o), or none with a memory
    s: Tensor  # (B, d_o, 1), average change of the mean pre-activation
    y: Tensor  # (B, d_o, 1), average change of its mean score
    S: Tensor  # (memory, B, d_o, 1), the newest pair last
    Y: Tensor
    steps: int = 0
    pairs: int = 0

    @classmethod
    def start(cls, layer: str, like: Tensor, B: int, d_o: int, d_i: int, memory: int | None) -> Secants:
        """H_G = I, or no pairs; in the dtype and on the device of ``like``."""
        new = like.new_zeros
        square = (
            torch.eye(d_o, dtype=like.dtype, device=like.device).expand(B, d_o, d_o).clone()
            if memory is None
            else new(0)
        )
        averages = [new(B, d_o, 1) for _ in range(2)]
        pairs = [new(memory or 0, B, d_o, 1) for _ in range(2)]
        return cls(layer, new(B, d_i, d_i), new(B, d_i, d_i), square, *averages, *pairs)

    def renew(self, A: Tensor, a: Tensor, rho: float, epsilon: float, inverted: Callable[..., list[Tensor]]) -> int:
        """Average A, and update H_A by the pair of a mean input; how many blocks could not use it. The first H_A is (A + εI)⁻¹."""
        self.steps += 1
        if self.steps == 1:
            damping = torch.full((len(A),), epsilon, dtype=torch.float64, device=A.device)
            self.A, self.H_a = A, inverted([(A, damping)])[0]
            return 0
        self.A = rho * self.A + (1 - rho) * A
        s = self.H_a @ a
        self.H_a, used = bfgs(self.H_a, s, self.A @ s + epsilon * s)
        return int((~used).sum())

    def apply(self, x: Tensor) -> Tensor:
        """H_G x, by the matrix or by the pairs."""
        if not len(self.S):
            return self.H_g @ x
        return by_pairs(self.S[-self.pairs :], self.Y[-self.pairs :], x) if self.pairs else x

    def learn(self, s: Tensor, y: Tensor, rho: float, epsilon: float) -> int:
        """Update H_G by the changes of a mean pre-activation and of its score; how many blocks could not use them."""
        if not (torch.isfinite(s).all() and torch.isfinite(y).all()):
            return 1
        self.s, self.y = rho * self.s + (1 - rho) * s, rho * self.y + (1 - rho) * y
        s, y = powell_damped(self.s, self.y, self.apply(self.y), epsilon)
        if not len(self.S):
            self.H_g, used = bfgs(self.H_g, s, y)
            return int((~used).sum())
        if not ((s * y).sum(1) > 0).all():
            return 1
        self.S, self.Y = torch.cat([self.S[1:], s[None]]), torch.cat([self.Y[1:], y[None]])
        self.pairs = min(self.pairs + 1, len(self.S))
        return 0


@dataclass(eq=False)
class Sums:
    """Over positions: Σ a aᵀ, Σ a, and Σ g / T; how many positions and examples there were."""

    A: Tensor
    a: Tensor
    g: Tensor
    count: int
    examples: int

    @classmethod
    def of(cls, a: Tensor, g: Tensor) -> Sums:
        """Sum inputs (B, d_i, n, T) and scores (B, d_o, n, T)."""
        n, t = a.shape[2:]
        flat = a.flatten(2)
        return cls(flat @ flat.mT, flat.sum(2)[..., None], g.sum((2, 3))[..., None] / t, n * t, n)

    def means(self, weight: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Mean input ā (B, d_i, 1), mean pre-activation W ā + b and ``scale`` times the sum of scores, both (B, d_o, 1)."""
        a = self.a / self.count
        return a, weight @ a, scale * self.g

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))


def bfgs(H: Tensor, s: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(I - ρ s yᵀ) H (I - ρ y sᵀ) + ρ s sᵀ with ρ = 1 / sᵀy, and where sᵀy > 0 allowed it, (B,); H stays elsewhere."""
    sy = s.mT @ y  # (B, 1, 1)
    rho = 1 / sy.where(sy > 0, 1.0)
    Hy = H @ y
    # written out, with O(d²) operations
    new = H - rho * (s @ Hy.mT + Hy @ s.mT) + (rho + rho.square() * (y.mT @ Hy)) * (s @ s.mT)
    used = (sy[:, 0, 0] > 0) & torch.isfinite(new).flatten(1).all(1)
    new = (new + new.mT) / 2
    return new.where(used[:, None, None], H), used


def powell_damped(s: Tensor, y: Tensor, Hy: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Damp s until sᵀy ≥ 0.2 yᵀHy, then y until sᵀy ≥ ε sᵀs."""
    sy, yHy = s.mT @ y, y.mT @ Hy
    small = sy < 0.2 * yHy
    theta = (0.8 * yHy / (yHy - sy).where(small, 1.0)).where(small, 1.0)
    s = theta * s + (1 - theta) * Hy
    sy, ss = s.mT @ y, s.mT @ s
    small = sy <= epsilon * ss
    theta = ((1 - epsilon) * ss / (ss - sy).where(small & (ss > sy), 1.0)).where(small & (ss > sy), 1.0)
    return s, theta * y + (1 - theta) * s


def by_pairs(S: Tensor, Y: Tensor, x: Tensor) -> Tensor:
    """H x for the H that starts as I and was updated by the pairs in ``S`` and ``Y``, (m, B, d, 1), in their order; x (B, d, k)."""
    kept = []
    for s, y in zip(S.flip(0), Y.flip(0), strict=True):
        alpha = s.mT @ x / (s.mT @ y)
        x = x - y @ alpha
        kept.append((s, y, alpha))
    for s, y, alpha in reversed(kept):
        x = x + s @ (alpha - y.mT @ x / (s.mT @ y))
    return x


def random_states(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Torch's global random states, of the CPU and of one other device."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_states(states: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    """Put random states back."""
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], device)
