"""What a layer's scores answer. Nothing above this package asks anything else of a network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from fisherlens.layout import LayerInfo
from fisherlens.linalg.dense import add_self_gram, mirror
from fisherlens.linalg.memory import Workspace
from fisherlens.linalg.precision import OwnPrecision

# Transient memory of a chunked contraction: large enough that the matrix products dominate, small beside any budget.
CHUNK_BYTES = 64 * 2**20
# A sum over more examples than this is taken in parts, which are added in float64: in float32 the error of a part stays
# near √4096 ε = 8e-6 of its terms, and the buffers of a part have a bounded size (our choice).
PART = 4096
_PART_BYTES = 256 * 2**20


class Total:
    """A sum of tensors of one dtype, in float64 but for terms of few examples; the first is kept, not copied."""

    def __init__(self):
        self._value: Tensor | None = None
        self._open: Tensor | None = None  # a sum of terms that stand for few examples, in their own dtype
        self._examples = 0

    def add(self, x: Tensor, examples: int = PART) -> None:
        """Add a term. Terms that stand for up to ``PART`` examples together are a part, which is summed in their dtype.

        A term of at least ``PART`` examples may be written over afterwards, but for the first.
        """
        if self._examples + examples > PART:
            self._close()
        if examples >= PART:
            self._fold(x)
        elif self._open is None:
            self._open, self._owned, self._examples = x, False, examples
        else:
            # the first term may be a view that repeats entries; what is made here is not
            self._open = self._open.add_(x) if self._owned else self._open + x
            self._owned, self._examples = True, self._examples + examples

    def _close(self) -> None:
        if self._open is not None:
            self._fold(self._open)
            self._open, self._examples = None, 0

    def _fold(self, x: Tensor) -> None:
        if self._value is None:
            self._value, self._dtype = x, x.dtype
        else:
            self._value = self._value.double()
            self._value += x.double()  # faster than a sum of two dtypes

    @classmethod
    def of(cls, terms: Iterable[Tensor]) -> Tensor:
        """The sum of tensors that nobody else writes to."""
        total = cls()
        for term in terms:
            total.add(term)
        return total.value()

    def value(self) -> Tensor:
        """The sum, in the dtype of its terms."""
        self._close()
        if self._value is None:
            raise ValueError("an empty sum has no shape")
        return self._value.to(self._dtype)


class LayerScores(OwnPrecision, ABC):
    """The columns of the score matrix U that belong to one layer, U_l of shape ``(rows, p)``.

    Rows are ordered n-major, ``(example n, score column r)``, and carry the square root of the example's weight.
    No answer is divided by the total weight W. Indices count from the layer's first parameter.

    Attributes
    ----------
    layer : LayerInfo
        The layer and its place in the flat vector.
    path : str
        ``"factors"`` or ``"explicit"``.
    n, r : int
        Examples and score columns per example; ``rows = n * r``.
    """

    layer: LayerInfo
    path: str
    n: int
    r: int
    dtype: torch.dtype
    device: torch.device
    workspace: Workspace = Workspace(limit=0)  # keeps nothing; a ScoreMatrix gives its layers a shared one

    #: whether NaN or infinity in v always shows in U_l v
    spreads: bool = True
    #: numbers per example and vector that a half-product holds on its way
    width: int = 1

    def _empty(self, *shape: int) -> Tensor:
        return self.workspace.empty(shape, self.dtype, self.device)

    @property
    def rows(self) -> int:
        return self.n * self.r

    @property
    def size(self) -> int:
        return self.layer.size

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the representation holds."""

    @abstractmethod
    def matmat(self, v: Tensor) -> Tensor:
        """``(p, K)`` → ``(rows, K)``: U_l V."""

    @abstractmethod
    def largest(self) -> float:
        """A bound: no entry of U_l is larger."""

    @abstractmethod
    def part(self, at: slice) -> LayerScores:
        """The scores of some examples, sharing memory."""

    def _parts(self, vectors: int = 1) -> Iterator[tuple[slice, LayerScores]]:
        """Rows and scores of parts of bounded size."""
        step = max(1, min(PART, _PART_BYTES // max(1, vectors * self.width * self.dtype.itemsize)))
        if step >= self.n:
            yield slice(0, self.rows), self
            return
        for start in range(0, self.n, step):
            part = self.part(slice(start, min(start + step, self.n)))
            part.workspace = self.workspace
            yield slice(start * self.r, min(start + step, self.n) * self.r), part

    def _summed(self, function: Callable[[LayerScores], Tensor]) -> Tensor:
        """Sum over the parts, in float64 where there are several."""
        return Total.of(function(part) for _, part in self._parts())

    def rmatmat(self, z: Tensor, out: Tensor) -> None:
        """Write U_lᵀ Z, for Z ``(rows, K)``, into ``out`` of shape ``(K, p)`` (its transpose)."""
        parts = self._parts(z.shape[1])
        rows, part = next(parts)
        part._rmatmat(z[rows], out)
        if rows.stop == self.rows:
            return
        total, buffer = Total(), self._empty(*out.shape)
        total.add(out)
        for rows, part in parts:
            part._rmatmat(z[rows], buffer)
            total.add(buffer)
        out.copy_(total.value())

    @abstractmethod
    def _rmatmat(self, z: Tensor, out: Tensor) -> None:
        """As :meth:`rmatmat`, at once over all examples."""

    @abstractmethod
    def columns(self, index: Tensor) -> Tensor:
        """Explicit columns of U_l, ``(rows, len(index))``."""

    @abstractmethod
    def rows_at(self, index: Tensor) -> Tensor:
        """Explicit rows of U_l, ``(len(index), p)``: for small uses and for tests."""

    @abstractmethod
    def contract(self, coefficients: Tensor) -> LayerScores:
        """One row per example, Σ_r c_nr u_nr, for coefficients ``(n, r)``: the scores at sampled labels, say."""

    def gram(self) -> Tensor:
        """``(rows, rows)``: U_l U_lᵀ, by column chunks."""
        total = torch.zeros(self.rows, self.rows, dtype=self.dtype, device=self.device)
        self.add_gram(total)
        return mirror(total)

    def add_gram(self, out: Tensor) -> None:
        """Add U_l U_lᵀ to the lower triangle of a ``(rows, rows)`` matrix at least; the upper one is the caller's to mirror."""
        for chunk in self.column_chunks():
            add_self_gram(out, self.columns(chunk))

    def diagonal(self) -> Tensor:
        """``(p,)``: the column sums of U_l²."""
        return self._summed(lambda part: part._diagonal())

    def _diagonal(self) -> Tensor:
        return torch.cat([self.columns(chunk).square().sum(0) for chunk in self.column_chunks()])

    def trace(self) -> Tensor:
        """The sum of U_l², a float64 number."""
        return self.diagonal().double().sum()

    def moments(self, index: Tensor) -> Tensor:
        """``(B, s)`` indices of B blocks → ``(B, s, s)``: U_bᵀ U_b of every block."""
        return self._summed(lambda part: part._moments(index))

    def _moments(self, index: Tensor) -> Tensor:
        return column_moments(self, index)

    def block_rows(self, index: Tensor) -> Tensor:
        """``(B, s)`` → X of shape ``(B, m, s)`` with X_bᵀ X_b = U_bᵀ U_b and as few rows m as the layer allows."""
        columns = self.columns(index.reshape(-1)).reshape(self.rows, *index.shape)
        return columns.transpose(0, 1)

    def block_row_count(self, index: Tensor) -> int:
        """The number of rows m that :meth:`block_rows` would give, without computing them."""
        return self.rows

    def column_chunks(self) -> list[Tensor]:
        """All column indices in chunks of bounded memory."""
        step = max(1, CHUNK_BYTES // max(1, self.rows * self.dtype.itemsize))
        return list(torch.arange(self.size, device=self.device).split(step))


def largest_entry(tensor: Tensor) -> float:
    """The largest |x|, without a copy of the size of the tensor."""
    return torch.linalg.vector_norm(tensor, ord=float("inf")).item()


class Columns(Protocol):
    """Anything with explicit columns."""

    rows: int
    dtype: torch.dtype
    device: torch.device

    def columns(self, index: Tensor) -> Tensor: ...


def column_moments(scores: Columns, index: Tensor) -> Tensor:
    """U_bᵀ U_b of every block of columns, ``(B, s)`` → ``(B, s, s)``, from the columns themselves in chunks of blocks."""
    num_blocks, size = index.shape
    out = torch.empty(num_blocks, size, size, dtype=scores.dtype, device=scores.device)
    step = max(1, CHUNK_BYTES // max(1, scores.rows * size * scores.dtype.itemsize))
    for start in range(0, num_blocks, step):
        chunk = index[start : start + step]
        columns = scores.columns(chunk.reshape(-1)).reshape(scores.rows, -1, size).transpose(0, 1)
        out[start : start + step] = torch.bmm(columns.transpose(1, 2), columns)
    return out
