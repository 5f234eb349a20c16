"""One Kronecker factor on a small basis: what is seen of it from there, and its damped inverse, updated and never recomputed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fisherlens.errors import NonFiniteError
from fisherlens.optim import texts
from fisherlens.optim.averages import Averages
from fisherlens.optim.side_rows import PatchRows, Rows

DAMPING_COLUMNS = 4  # per update, in cyclic order


@dataclass(eq=False)
class Side(Averages):
    """One factor of B blocks, known on a basis: (PᵀCP + γI)⁻¹ there, one level for all directions outside it."""

    layer: str
    P: Tensor  # (B, d, r), orthonormal columns
    Q: Tensor  # (B, r, r)
    outside: Tensor  # (B,), average of tr C - tr PᵀCP
    trace: Tensor  # (B,), average of tr C
    gamma: Tensor  # (B,)
    steps: int = 0

    @classmethod
    def zeros(cls, layer: str, like: Tensor, B: int, d: int, rank: int) -> Side:
        """Nothing seen yet, on at most ``rank`` directions, in the dtype and on the device of ``like``."""
        r = min(rank, d)
        return cls(layer, *(like.new_zeros(shape) for shape in ((B, d, r), (B, r, r), (B,), (B,), (B,))))

    @property
    def level(self) -> Tensor:
        """Mean eigenvalue outside the basis, (B, 1, 1)."""
        d, r = self.P.shape[1:]
        return (self.outside / max(d - r, 1)).clamp(min=0)[:, None, None]

    def average(self, new: Seen, beta: float) -> None:
        """Take new traces into the averages, which start at the first ones."""
        weight = 1 - beta if self.steps else 1.0
        inside = new.gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        self.trace = self.trace.lerp(new.squares, weight)
        self.outside = self.outside.lerp(new.squares - inside, weight)

    def advance(
        self, new: Seen, gamma: Tensor, moved: tuple[Tensor, Tensor] | None, beta: float
    ) -> tuple[Tensor, bool]:
        """Take one update into Q; which blocks have none now, (B,), and whether that is so because they start afresh.

        ``moved`` is another basis, if there is one, and the level outside the old one.
        """
        afresh = not self.steps or beta == 0
        if moved is not None:
            if not afresh:
                change_basis(self, *moved)
            self.P = moved[0]
        self.gamma = gamma
        stands = torch.zeros(len(gamma), dtype=torch.bool, device=gamma.device)
        if not afresh:
            columns = torch.cat([new.sketch, damping_columns(self.Q, gamma, self.steps)], dim=2)
            self.Q, stands = recursive_inverse(self.Q, columns, beta)
        self.steps += 1
        return ~stands, afresh


@dataclass(eq=False)
class Seen:
    """Sums over the rows x of one factor since the last step, seen from its basis."""

    gram: Tensor  # Σ PᵀxxᵀP, (B, r, r)
    sketch: Tensor  # Σ Pᵀx s for k random signs s, (B, r, k)
    squares: Tensor  # Σ |x|², (B,)

    def __add__(self, other: Seen) -> Seen:
        return Seen(self.gram + other.gram, self.sketch + other.sketch, self.squares + other.squares)

    def mean(self, factor: float) -> Seen:
        """Make means of the sums; the outer products of the sketch then are one of PᵀCP."""
        share = math.sqrt(factor / self.sketch.shape[2])
        return Seen(self.gram * factor, self.sketch * share, self.squares * factor)


class Pair(NamedTuple):
    """What is seen of both factors of a layer."""

    a: Seen
    g: Seen

    def __add__(self, other: Pair) -> Pair:  # type: ignore[override]
        return Pair(self.a + other.a, self.g + other.g)


def seen_from(P: Tensor, x: Rows | PatchRows, sketches: int, generator: torch.Generator) -> Seen:
    """Look at rows from a basis, with fresh random signs."""
    y = x.seen(P)  # (B, r, m)
    drawn = torch.randint(0, 2, (len(y), y.shape[2], sketches), generator=generator, dtype=torch.int8, device="cpu")
    signs = drawn.to(y.device, y.dtype).mul_(2).sub_(1)
    return Seen((y @ y.mT) * x.factor**2, (y @ signs) * x.factor, x.squares() * x.factor**2)


def random_basis(like: Tensor, generator: torch.Generator) -> Tensor:
    """Orthonormal columns to start from; the identity where nothing is projected."""
    if like.shape[1] == like.shape[2]:
        return torch.eye(like.shape[1], dtype=like.dtype, device=like.device).expand_as(like).clone()
    start = torch.randn(like.shape, generator=generator, dtype=torch.float64, device="cpu")
    return torch.linalg.qr(start)[0].to(like.device, like.dtype)


def power_steps(
    sides: Sequence[Side], rows: Callable[[], Iterator[tuple[Rows | PatchRows, ...]]], generator: torch.Generator
) -> list[Tensor]:
    """P ← qr(C P) from the rows of the current batch; the first time from random directions, twice."""
    P = [random_basis(side.P, generator) if not side.steps else side.P for side in sides]
    for _ in range(1 if sides[0].steps else 2):
        if all(one.shape[1] == one.shape[2] for one in P):
            break
        powers = [torch.zeros_like(one) for one in P]
        for found in rows():
            for power, one, x in zip(powers, P, found, strict=True):
                power += x.power(one)
        if not all(torch.isfinite(power).all() for power in powers):
            raise NonFiniteError(texts.BAD_STATISTICS.format(layer=sides[0].layer))
        P = [orthonormal(power, one) for power, one in zip(powers, P, strict=True)]
    return P


def shares(a: Side, g: Side, damping: float) -> tuple[Tensor, Tensor]:
    """γ_A = π √λ and γ_G = √λ / π, (B,), from the average traces; π = 1 where one of them is zero."""
    mean_a, mean_g = a.trace / a.P.shape[1], g.trace / g.P.shape[1]
    usual = (mean_a > 0) & (mean_g > 0)
    pi = mean_a.where(usual, 1.0).sqrt() / mean_g.where(usual, 1.0).sqrt()
    return math.sqrt(damping) * pi, math.sqrt(damping) / pi


def damping_columns(Q: Tensor, gamma: Tensor, steps: int) -> Tensor:
    """√(γ r / 4) e_j for the next four j in cyclic order, (B, r, 4): their outer products average to γI."""
    r = Q.shape[1]
    count = min(DAMPING_COLUMNS, r)
    at = (torch.arange(count, device=Q.device) + steps * count) % r
    columns = torch.zeros(r, count, dtype=Q.dtype, device=Q.device)
    columns[at, torch.arange(count, device=Q.device)] = 1.0
    return (gamma * (r / count)).sqrt()[:, None, None] * columns


def recursive_inverse(Q: Tensor, V: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(β Q⁻¹ + (1 - β) V Vᵀ)⁻¹ by Woodbury's formula, symmetrised, and whether its pivots are positive: (B, r, r) and (B,)."""
    w = Q @ V
    inner = V.mT @ w
    inner.diagonal(dim1=-2, dim2=-1).add_(beta / (1 - beta))
    factor, info = torch.linalg.cholesky_ex(inner)
    out = (Q - w @ torch.cholesky_solve(w.mT, factor)) / beta
    out = (out + out.mT) / 2
    stands = (info == 0) & torch.isfinite(out).flatten(1).all(1)
    return out, stands & (out.diagonal(dim1=-2, dim2=-1) > 0).all(1)


def apply_side(side: Side, x: Tensor) -> Tensor:
    """Inverse of the damped factor times x (B, d, ·): x / (s + γ) + P (Q - I / (s + γ)) Pᵀ x."""
    if side.P.shape[1] == side.P.shape[2]:
        return side.Q @ x  # P = I
    outside = 1 / (side.level + side.gamma[:, None, None])
    y = side.P.mT @ x
    return x * outside + side.P @ (side.Q @ y - outside * y)


def orthonormal(power: Tensor, old: Tensor) -> Tensor:
    """An orthonormal basis of the columns of C P; the identity stays."""
    if old.shape[1] == old.shape[2]:
        return old
    return torch.linalg.qr(power.double())[0].to(old.dtype)


def change_basis(side: Side, P: Tensor, level: Tensor) -> None:
    """Carry what is known of C over to another basis; what lies outside the old one counts with the old level."""
    identity = torch.eye(P.shape[2], dtype=torch.float64, device=P.device)
    gamma = side.gamma.double()[:, None, None]
    values, vectors = torch.linalg.eigh(side.Q.double())
    inside = vectors / values.clamp(min=torch.finfo(values.dtype).tiny)[:, None, :] @ vectors.mT  # PᵀCP + γI
    turn = (P.mT @ side.P).double()
    moved = turn @ (inside - gamma * identity) @ turn.mT + level.double() * (identity - turn @ turn.mT)
    values, vectors = torch.linalg.eigh((moved + moved.mT) / 2)
    side.Q = (vectors / (values.clamp(min=0)[:, None, :] + gamma) @ vectors.mT).to(side.Q.dtype)
