"""Score rows of a whole batch: how each layer keeps them, and the kernels U Uᵀ that they span."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fisherlens.errors import InputError
from fisherlens.layout import LayerInfo
from fisherlens.linalg.dense import add_self_gram, mirror, self_gram
from fisherlens.optim import texts
from fisherlens.optim.moments import ROWS_BYTES, bytes_per_example, layer_scores
from fisherlens.optim.tap import Call, Pass
from fisherlens.scores.base import CHUNK_BYTES, LayerScores
from fisherlens.scores.conv import ConvGeometry, ConvScores
from fisherlens.scores.dense import DenseScores
from fisherlens.scores.explicit import ExplicitScores, ZeroScores

PATHS = ("auto", "A", "B", "reduced", "paper")
# Explicit rows that one convolution may keep; beyond it, its inputs and output scores are kept (our choice).
KEPT_BYTES = 256 * 2**20


class Assembled(LayerScores):
    """Rows of one layer as sums of parts, each with rows of its own: passes below each other, or uses on top of each other.

    Parameters
    ----------
    layer
        The layer of all parts.
    parts, starts
        Scores, and the example with which each of them starts.
    """

    path = "factors"
    spreads = False

    def __init__(self, layer: LayerInfo, parts: Sequence[LayerScores], starts: Sequence[int]):
        self.layer, self.parts, self.r = layer, tuple(parts), 1
        self.at = [slice(start, start + part.n) for part, start in zip(parts, starts, strict=True)]
        self.n = max(at.stop for at in self.at)
        self.dtype, self.device = parts[0].dtype, parts[0].device

    @property
    def stacked(self) -> bool:
        """Whether no two parts share a row."""
        return sum(part.n for part in self.parts) == self.n

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def largest(self) -> float:
        return sum(part.largest() for part in self.parts)

    def part(self, at: slice) -> LayerScores:
        inside = [
            (p, max(s.start, at.start), min(s.stop, at.stop), s.start) for p, s in zip(self.parts, self.at, strict=True)
        ]
        inside = [one for one in inside if one[1] < one[2]]
        parts = [p.part(slice(first - start, stop - start)) for p, first, stop, start in inside]
        return Assembled(self.layer, parts, [first - at.start for _, first, _, _ in inside])

    def _sum(self, rows: int, columns: int, pieces: Any) -> Tensor:
        out = torch.zeros(rows, columns, dtype=self.dtype, device=self.device)
        for at, piece in pieces:
            out[at] += piece
        return out

    def matmat(self, v: Tensor) -> Tensor:
        pieces = ((at, part.matmat(v)) for part, at in zip(self.parts, self.at, strict=True))
        return self._sum(self.n, v.shape[1], pieces)

    def _rmatmat(self, z: Tensor, out: Tensor) -> None:
        out.zero_()
        buffer = torch.empty_like(out)
        for part, at in zip(self.parts, self.at, strict=True):
            part.rmatmat(z[at], buffer)
            out += buffer

    def columns(self, index: Tensor) -> Tensor:
        pieces = ((at, part.columns(index)) for part, at in zip(self.parts, self.at, strict=True))
        return self._sum(self.n, len(index), pieces)

    def rows_at(self, index: Tensor) -> Tensor:
        out = torch.zeros(len(index), self.size, dtype=self.dtype, device=self.device)
        for part, at in zip(self.parts, self.at, strict=True):
            here = (index >= at.start) & (index < at.stop)
            out[here] += part.rows_at(index[here] - at.start)
        return out

    def contract(self, coefficients: Tensor) -> LayerScores:
        parts = [part.contract(coefficients[at]) for part, at in zip(self.parts, self.at, strict=True)]
        return Assembled(self.layer, parts, [at.start for at in self.at])


class TruncatedScores(ExplicitScores):
    """Rows U ≈ Q (Qᵀ U) with the leading left singular vectors Q ``(n, k)``, for products only.

    Kept are as many as have singular values whose running sum stays within a share of their total (TENGraD's rule).
    """

    def __init__(self, layer: LayerInfo, basis: Tensor, pieces: Sequence[Tensor]):
        super().__init__(layer, pieces, 1)
        self.basis, self.n = basis, len(basis)

    @classmethod
    def of(cls, scores: ExplicitScores, gram: Tensor, share: float) -> TruncatedScores:
        """Truncate explicit rows of the given U Uᵀ."""
        values, vectors = torch.linalg.eigh(gram.double())
        singular = values.flip(0).clamp(min=0).sqrt()
        kept = singular.cumsum(0) <= share * singular.sum() * (1 + 1e-12)  # 1e-12: rounding of the sum
        count = max(1, int(kept.sum()))
        basis = vectors.flip(1)[:, :count].to(scores.dtype)
        return cls(scores.layer, basis, [basis.T @ piece for piece in scores.pieces])

    def matmat(self, v: Tensor) -> Tensor:
        return self.basis @ super().matmat(v)

    def rmatmat(self, z: Tensor, out: Tensor) -> None:
        self._rmatmat(self.basis.T @ z, out)

    def add_gram(self, out: Tensor) -> None:
        small = self.basis.new_zeros(self.basis.shape[1], self.basis.shape[1])
        for piece in self.pieces:
            add_self_gram(small, piece)
        out += self.basis @ mirror(small) @ self.basis.T

    def columns(self, index: Tensor) -> Tensor:
        return self.basis @ torch.cat(self.pieces, dim=1)[:, index]

    def rows_at(self, index: Tensor) -> Tensor:
        return self.basis[index] @ torch.cat(self.pieces, dim=1)

    def part(self, at: slice) -> TruncatedScores:
        return TruncatedScores(self.layer, self.basis[at], self.pieces)


# --- from passes to scores -----------------------------------------------------------------------------------------------


def batch_scores(layer: LayerInfo, passes: Sequence[tuple[Pass, int]], like: Tensor, path: str = "auto") -> LayerScores:
    """Scores of all examples of a batch, in the order of their passes, one row each, in the dtype of ``like``.

    Dense layers keep inputs and output scores. A convolution keeps explicit rows where its kernel is to be computed from
    them and they fit, else padded inputs and output scores; on the path ``"reduced"`` their sums over positions.
    """
    total = sum(n for _, n in passes)
    parts = [_pass_scores(layer, one.calls.get(layer.name, ()), n, total, like, path) for one, n in passes]
    return parts[0] if len(parts) == 1 else _stack(layer, parts)


def _pass_scores(layer: LayerInfo, calls: Sequence[Call], n: int, total: int, like: Tensor, path: str) -> LayerScores:
    if not calls:
        return ZeroScores(layer, n, 1, like.dtype, like.device)
    if layer.weight is not None and any(call.use.modified for call in calls):
        raise InputError(texts.WRITTEN_OVER.format(layer=layer.name))
    if layer.kind == "dense":
        return layer_scores(layer, calls, slice(0, n), like.dtype)
    if path == "reduced":
        return _reduced(layer, calls, n, like.dtype)
    parts = [_conv_scores(layer, call, like.dtype) for call in calls]
    fits = total * layer.size * like.itemsize <= KEPT_BYTES
    if fits and (layer.weight is None or not by_positions(parts, total, path)):
        return _explicit(layer, calls, n, like)
    return parts[0] if len(parts) == 1 else Assembled(layer, parts, [0] * len(parts))


def _conv_scores(layer: LayerInfo, call: Call, dtype: torch.dtype) -> ConvScores:
    geometry = ConvGeometry.of(call.use.module)
    return ConvScores(layer, geometry, geometry.padded(call.use.inputs.to(dtype)), call.score.to(dtype)[:, None])


def by_positions(parts: Sequence[ConvScores], n: int, path: str) -> bool:
    """Whether the kernel is cheaper from inner products of positions (path A) than from explicit rows (path B)."""
    t, d_i, d_o = sum(part.t for part in parts), parts[0].d_i, parts[0].d_o // parts[0].geometry.groups
    return _cheaper_by_positions(n, t, d_i, d_o, path)


def _cheaper_by_positions(n: int, t: int, d_i: int, d_o: int, path: str) -> bool:
    if path in ("A", "B"):
        return path == "A"
    if path == "paper":
        return t * t * (d_i + d_o) < d_i * d_o
    return n * t * t * (d_i + d_o + 1) < (t + n) * d_i * d_o


def _explicit(layer: LayerInfo, calls: Sequence[Call], n: int, like: Tensor) -> ExplicitScores:
    """Rows of a convolution, made of a bounded amount of patches at a time."""
    step = max(1, ROWS_BYTES // max(1, bytes_per_example(layer, calls, like.dtype)))
    if step >= n:
        return layer_scores(layer, calls, slice(0, n), like.dtype)
    pieces = [like.new_empty(n, p.numel) for p in layer.parameters]
    for start in range(0, n, step):
        at = slice(start, min(start + step, n))
        for piece, rows in zip(pieces, layer_scores(layer, calls, at, like.dtype).pieces, strict=True):
            piece[at] = rows
    return ExplicitScores(layer, pieces, 1)


def _reduced(layer: LayerInfo, calls: Sequence[Call], n: int, dtype: torch.dtype) -> LayerScores:
    """Rows Σ_t g_t (1/T) Σ_t a_t: exact where inputs or scores do not vary over the positions: 1/√T on each side."""
    parts = [_conv_scores(layer, call, dtype) for call in calls]
    g = sum(part.g[:, 0].sum(-1) for part in parts)  # (n, d_o)
    if layer.weight is None:
        return ExplicitScores(layer, [g], 1)
    step = max(1, ROWS_BYTES // max(1, bytes_per_example(layer, calls, dtype)))
    sums = []
    for start in range(0, n, step):
        at = slice(start, min(start + step, n))
        sums.append(sum(part.geometry.patches(part.x[at]).sum(-1) for part in parts))
    a = torch.cat(sums) / sum(part.t for part in parts)  # (n, groups, d_i)
    if a.shape[1] == 1:
        return DenseScores(layer, a, g[:, None, None])
    weight = torch.einsum("ngo,ngi->ngoi", g.view(n, a.shape[1], -1), a).reshape(n, -1)
    return ExplicitScores(layer, [weight, g][: len(layer.parameters)], 1)


def _stack(layer: LayerInfo, parts: Sequence[LayerScores]) -> LayerScores:
    """Put passes below each other; of one shape they become one piece."""
    first = parts[0]
    if all(type(part) is DenseScores and part.t == first.t for part in parts):
        return DenseScores(layer, torch.cat([part.a for part in parts]), torch.cat([part.g for part in parts]))
    if all(type(part) is ExplicitScores for part in parts):
        return ExplicitScores(layer, [torch.cat(pieces) for pieces in zip(*(p.pieces for p in parts), strict=True)], 1)
    starts = [sum(part.n for part in parts[:i]) for i in range(len(parts))]
    if all(type(p) is ConvScores and p.x.shape[1:] == first.x.shape[1:] for p in parts):
        g = torch.cat([part.g for part in parts])
        x = torch.cat([part.x for part in parts])
        return ConvScores(layer, first.geometry, x, g.view(*g.shape[:3], *first.positions))
    return Assembled(layer, parts, starts)


# --- kernels -------------------------------------------------------------------------------------------------------------


def kernel(scores: LayerScores, path: str = "auto") -> Tensor:
    """``(n, n)``: U Uᵀ of one layer."""
    if isinstance(scores, ConvScores):
        return _conv_kernel([scores], path)
    if isinstance(scores, Assembled) and not scores.stacked and all(type(p) is ConvScores for p in scores.parts):
        return _conv_kernel(scores.parts, path)
    if type(scores) is DenseScores and scores.t > 1:
        return _dense_kernel(scores, path)
    return scores.gram()


def _dense_kernel(scores: DenseScores, path: str) -> Tensor:
    """Kernel of a dense layer with several positions."""
    positions = _cheaper_by_positions(scores.n, scores.t, scores.d_i, scores.d_o, path)
    return scores.gram_by_positions() if positions else scores.gram_by_units()


def _conv_kernel(parts: Sequence[ConvScores], path: str) -> Tensor:
    """Kernel of uses that add up, group by group; inputs are padded already."""
    first = parts[0]
    n, groups, layer = first.n, first.geometry.groups, first.layer
    out = torch.zeros(n, n, dtype=first.dtype, device=first.device)
    if layer.bias is not None:
        out += self_gram(sum(part.g[:, 0].sum(-1) for part in parts))
    if layer.weight is None:
        return out
    positions = by_positions(parts, n, path)
    bare = replace(first.geometry, groups=1)
    for group in range(groups):
        inputs = [part.x.chunk(groups, dim=1)[group] for part in parts]
        scores = [part.g[:, 0].chunk(groups, dim=1)[group] for part in parts]  # (n, d_o, T) each
        if positions:
            a = torch.cat([bare.patches(x)[:, 0].mT for x in inputs], dim=1)
            out += position_kernel(a, torch.cat([g.mT for g in scores], dim=1))
            continue
        # rows of some input channels with all outputs: nothing is computed twice, and patches stay bounded too
        per_channel = n * math.prod(bare.kernel) * (scores[0].shape[1] + sum(g.shape[2] for g in scores)) * out.itemsize
        step = max(1, CHUNK_BYTES // per_channel)
        for start in range(0, inputs[0].shape[1], step):
            pieces = [x[:, start : start + step] for x in inputs]
            rows = sum(torch.bmm(g, bare.patches(x)[:, 0].mT) for g, x in zip(scores, pieces, strict=True))
            out += self_gram(rows.flatten(1))
    return out


def position_kernel(a: Tensor, g: Tensor) -> Tensor:
    """Σ_tp (a_nt · a_qp)(g_nt · g_qp) for a ``(n, T, d_i)`` and g ``(n, T, d_o)``, in tiles of examples."""
    n, t = a.shape[:2]
    out = a.new_empty(n, n)
    step = max(1, CHUNK_BYTES // max(1, 2 * n * t * t * a.itemsize))
    a_all, g_all = a.reshape(n * t, -1), g.reshape(n * t, -1)
    for i in range(0, n, step):
        at = slice(i * t, min(i + step, n) * t)
        products = (a_all[at] @ a_all.T).mul_(g_all[at] @ g_all.T)
        out[i : i + step] = products.view(-1, t, n, t).sum((1, 3))
    return out


# --- keeping -------------------------------------------------------------------------------------------------------------


def owned(scores: LayerScores) -> LayerScores:
    """The same scores in memory of their own: the user may write the next batch into the place of this one."""
    if type(scores) is DenseScores:
        return DenseScores(scores.layer, scores.a.clone(), scores.g.clone())
    if type(scores) is ConvScores:
        g = scores.g.clone().view(*scores.g.shape[:3], *scores.positions)
        return ConvScores(scores.layer, scores.geometry, scores.x.clone(), g)
    if type(scores) is Assembled:
        return Assembled(scores.layer, [owned(part) for part in scores.parts], [at.start for at in scores.at])
    return scores


def packed(scores: LayerScores) -> dict[str, Any]:
    """What :func:`unpacked` makes the scores of again: tensors (not copied), numbers and lists."""
    if type(scores) is DenseScores:
        return {"form": "dense", "a": scores.a, "g": scores.g}
    if type(scores) is ConvScores:
        return {"form": "conv", "x": scores.x, "g": scores.g, "positions": list(scores.positions)}
    if type(scores) is Assembled:
        parts = [packed(part) for part in scores.parts]
        return {"form": "several", "parts": parts, "starts": [at.start for at in scores.at]}
    if type(scores) is TruncatedScores:
        return {"form": "truncated", "basis": scores.basis, "pieces": list(scores.pieces)}
    if type(scores) is ExplicitScores:
        return {"form": "rows", "pieces": list(scores.pieces)}
    return {"form": "none", "n": scores.n}


def unpacked(state: Mapping[str, Any], layer: LayerInfo, geometry: ConvGeometry | None, like: Tensor) -> LayerScores:
    """Scores as :func:`packed` described them."""
    form = state["form"]
    if form == "dense":
        return DenseScores(layer, state["a"], state["g"])
    if form == "conv":
        g = state["g"]
        return ConvScores(layer, geometry, state["x"], g.view(*g.shape[:3], *state["positions"]))
    if form == "several":
        return Assembled(layer, [unpacked(part, layer, geometry, like) for part in state["parts"]], state["starts"])
    if form == "truncated":
        return TruncatedScores(layer, state["basis"], state["pieces"])
    if form == "rows":
        return ExplicitScores(layer, state["pieces"], 1)
    return ZeroScores(layer, state["n"], 1, like.dtype, like.device)
