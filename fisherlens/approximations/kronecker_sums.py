"""Sums over score rows from which Kronecker-factored stand-ins are made: factors, moments in their bases, inner products with F."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fisherlens.errors import ConvergenceWarning, user_level
from fisherlens.fisher import Fisher
from fisherlens.linalg.kronecker import KroneckerPair, RotatedDiagonal
from fisherlens.scores.base import CHUNK_BYTES, Total
from fisherlens.scores.explicit import ExplicitScores
from fisherlens.scores.replay import LayerFactors, as_matrices, factor_pieces

#: score rows of a layer: as inputs and output scores of one position, or as matrices ``(rows, groups, d_o, d)``
Rows = LayerFactors | Tensor
# Half-steps of the alternation after which the best Kronecker block is given up (our choice); it converges linearly.
_MOST_STEPS = 200


class _Factor:
    """A sum of XᵀX, and the rows X themselves as long as they are fewer than half the order: then the factor has low rank."""

    def __init__(self) -> None:
        self._total, self._rows = Total(), []

    def add(self, x: Tensor) -> None:
        """Take rows ``(groups, m, d)``."""
        self._total.add(x.mT @ x)
        if self._rows is not None:
            self._rows.append(x)
            if 2 * sum(rows.shape[1] for rows in self._rows) > x.shape[2]:
                self._rows = None

    def over(self, divisor: float) -> tuple[Tensor, Tensor | None]:
        """The factor divided by a number, and its rows likewise, or None."""
        rows = None if self._rows is None else torch.cat(self._rows, dim=1) / divisor**0.5
        return self._total.value() / divisor, rows if rows is not None and rows.shape[1] else None


def kronecker_pairs(F: Fisher, names: Sequence[str], form: str) -> dict[str, KroneckerPair]:
    """G ``(groups, d_o, d_o)`` and A ``(groups, d, d)`` of each layer, in one pass; see :class:`fisherlens.KFAC` for their formulae."""
    of_outputs, of_inputs = {name: _Factor() for name in names}, {name: _Factor() for name in names}
    positions = dict.fromkeys(names, 0.0)
    for _, found in factor_pieces(F, names):
        for name, given in found.items():
            factors = given.reduced() if form == "reduce" else given
            g = factors.outputs.movedim(2, 0).flatten(1, 3)  # (groups, n r t, d_o)
            of_outputs[name].add(g)
            root = factors.weight.sqrt().to(g.dtype).view(-1, 1, 1, 1)
            a = (factors.homogeneous * root).transpose(0, 1).flatten(1, 2)  # (groups, n t, d)
            of_inputs[name].add(a)
            positions[name] += factors.weight.sum().item() * factors.positions
    pairs = {}
    for name in names:
        G, rows_g = of_outputs[name].over(F.total_weight)
        A, rows_a = of_inputs[name].over(positions[name] or 1.0)
        pairs[name] = KroneckerPair(G, A, f"Layer {name!r}", (rows_g, rows_a))
    return pairs


def kronecker_factors(F: Fisher, names: Sequence[str], form: str) -> dict[str, tuple[Tensor, Tensor]]:
    """G and A alone, as plain matrices; see :func:`kronecker_pairs`."""
    return {name: (pair.G, pair.A) for name, pair in kronecker_pairs(F, names, form).items()}


def _rows(F: Fisher, names: Sequence[str]) -> Iterator[tuple[str, Rows]]:
    """Score rows of layers in pieces of bounded size; kept ones where they are explicit, so that only the rest may take a pass."""
    explicit = [name for name in names if isinstance(F.scores[name], ExplicitScores)]
    for name in explicit:
        scores = F.scores[name]
        step = max(1, CHUNK_BYTES // (scores.size * scores.dtype.itemsize))
        for index in torch.arange(scores.rows, device=scores.device).split(step):
            yield name, as_matrices(scores.layer, scores.rows_at(index).T)
    others = [name for name in names if name not in explicit]
    if not others:
        return
    for _, found in factor_pieces(F, others):
        for name, factors in found.items():
            if factors.positions == 1:
                yield name, factors
            else:
                yield from ((name, part.matrices().flatten(0, 1)) for part in factors.in_parts())


def inner_products(F: Fisher, pairs: Mapping[str, KroneckerPair]) -> dict[str, float]:
    """⟨F_l, G ⊗ A⟩ = Σ_nr ⟨U_nr, G U_nr A⟩ / W of each layer, with U_nr the row (n, r) as a matrix."""
    total = dict.fromkeys(pairs, 0.0)
    for name, rows in _rows(F, list(pairs)):
        pair = pairs[name]
        if isinstance(rows, Tensor):
            found = (pair.product(rows) * rows).sum((-2, -1))
        else:
            g, a = rows.outputs[:, :, :, 0], rows.homogeneous[:, :, 0]  # (n, r, groups, d_o), (n, groups, d)
            found = _quadratic(g, pair.G).sum(1) * _quadratic(a, pair.A)
        total[name] += found.double().sum().item()
    return {name: value / F.total_weight for name, value in total.items()}


def rotated_moments(F: Fisher, bases: Mapping[str, RotatedDiagonal]) -> dict[str, Tensor]:
    """S = Σ_nr (Q_Gᵀ U_nr Q_A)² / W of each layer, ``(groups, d_o, d)`` float64, positions summed before squaring."""
    totals = {name: Total() for name in bases}
    bases = {name: RotatedDiagonal(b.q_g.to(F.dtype), b.q_a.to(F.dtype), b.s) for name, b in bases.items()}
    for name, rows in _rows(F, list(bases)):
        basis = bases[name]
        if isinstance(rows, Tensor):
            found = basis.rotate(rows).square().sum(0)
        else:
            g = torch.einsum("nrbo,bop->nrbp", rows.outputs[:, :, :, 0], basis.q_g).square().sum(1)
            a = torch.einsum("nbi,bij->nbj", rows.homogeneous[:, :, 0], basis.q_a).square()
            found = torch.einsum("nbo,nbi->boi", g, a)
        totals[name].add(found.double())
    return {name: total.value() / F.total_weight for name, total in totals.items()}


def best_pairs(F: Fisher, start: Mapping[str, KroneckerPair]) -> dict[str, KroneckerPair]:
    """G and A with the smallest ‖F_l - G ⊗ A‖ for each layer and group, by alternating least squares.

    Each half-step is the exact minimum over one factor, so the error never grows; from a positive semi-definite start both stay so.
    """
    tol = 1e-13 if F.dtype == torch.float64 else 1e-7
    factors = {name: (pair.G, pair.A) for name, pair in start.items()}
    reached = dict.fromkeys(start, -1.0)
    active = list(start)
    for step in range(_MOST_STEPS):
        sums = _half_step(F, {name: factors[name] for name in active}, left=step % 2 == 0)
        for name, fresh in sums.items():
            G, A = factors[name]
            factors[name] = (fresh, A) if step % 2 == 0 else (G, fresh)
            kept = KroneckerPair(
                *factors[name]
            ).squared_norm()  # what the block keeps of ‖F_l‖²: it grows to its maximum
            if step > 0 and kept <= reached[name] * (1 + tol):
                active.remove(name)
            reached[name] = kept
        if not active:
            break
    else:
        _warn_not_reached(active, tol)
    return {name: KroneckerPair(*found, f"Layer {name!r}") for name, found in factors.items()}


def _warn_not_reached(active: Sequence[str], tol: float) -> None:
    warnings.warn(
        f"The best Kronecker factors of {active} were not reached to {tol:g} in {_MOST_STEPS} half-steps; the last ones are returned, which are never "
        "worse than KFAC's. Two directions of these layers are nearly as good as each other.",
        ConvergenceWarning,
        stacklevel=user_level(),
    )


def _half_step(F: Fisher, factors: Mapping[str, tuple[Tensor, Tensor]], left: bool) -> dict[str, Tensor]:
    """The best G for given A, Σ U A Uᵀ / (W ‖A‖²), or the best A for given G, group by group."""
    totals = {name: Total() for name in factors}
    for name, rows in _rows(F, list(factors)):
        G, A = factors[name]
        if isinstance(rows, Tensor):
            if left:
                found = torch.einsum("mboi,mbpi->bop", torch.einsum("mboi,bij->mboj", rows, A), rows)
            else:
                found = torch.einsum("mboi,mboj->bij", torch.einsum("bop,mbpi->mboi", G, rows), rows)
        else:
            g, a = rows.outputs[:, :, :, 0], rows.homogeneous[:, :, 0]
            if left:
                scaled = g * _quadratic(a, A)[:, None, :, None]
                found = torch.einsum("nrbo,nrbp->bop", scaled, g)
            else:
                found = torch.einsum("nbi,nbj->bij", a * _quadratic(g, G).sum(1)[..., None], a)
        totals[name].add(found)
    out = {}
    for name, total in totals.items():
        other = factors[name][1 if left else 0]
        size = other.double().square().sum((-2, -1), keepdim=True)
        out[name] = (total.value() / F.total_weight / size.where(size > 0, 1.0)).to(other.dtype)
    return out


def _quadratic(x: Tensor, matrix: Tensor) -> Tensor:
    """Quadratic forms xᵀ M x, group by group: ``(..., groups, d)`` and ``(groups, d, d)`` → ``(..., groups)``."""
    return (torch.einsum("...bi,bij->...bj", x, matrix) * x).sum(-1)


__all__ = ["best_pairs", "inner_products", "kronecker_factors", "kronecker_pairs", "rotated_moments"]
