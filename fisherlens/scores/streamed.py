"""Scores that are never kept: every answer passes over the data again, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fisherlens.errors import MemoryBudgetError, NonFiniteError
from fisherlens.layout import LayerInfo
from fisherlens.scores.base import LayerScores
from fisherlens.scores.linearised import Graph, forward_derivative
from fisherlens.scores.matrix import ScoreMatrix
from fisherlens.scores.recorder import preserved_randomness
from fisherlens.scores.source import Source

if TYPE_CHECKING:
    from fisherlens.scores.collector import Collector, Piece

# A linearised pass costs 5/3 of a gradient per vector; collecting a piece's scores costs (2 + R)/3 once for any number of
# vectors, so it wins from a few vectors on.
_FEW_VECTORS = 2


class StreamedLayer(LayerScores):
    """One layer of a streamed score matrix."""

    path = "streamed"

    def __init__(self, layer: LayerInfo, matrix: StreamedMatrix):
        self.layer, self._matrix = layer, matrix
        self.n, self.r, self.dtype, self.device = matrix.n, matrix.r, matrix.dtype, matrix.device

    @property
    def nbytes(self) -> int:
        return 0

    def _each(self, function: Callable[[LayerScores, slice], Tensor]) -> Iterator[Tensor]:
        for rows, scores in self._matrix.parts():
            yield function(scores[self.layer.name], rows)

    def matmat(self, v: Tensor) -> Tensor:
        return torch.cat(list(self._each(lambda part, rows: part.matmat(v))))

    def part(self, at: slice) -> LayerScores:
        raise NotImplementedError("streamed scores come in the pieces of their data")

    def rmatmat(self, z: Tensor, out: Tensor) -> None:
        total, buffer = torch.zeros_like(out, dtype=torch.float64), torch.empty_like(out)

        def add(part: LayerScores, rows: slice) -> Tensor:
            part.rmatmat(z[rows].contiguous(), buffer)
            return total.add_(buffer)

        for _ in self._each(add):
            pass
        out.copy_(total)

    def _rmatmat(self, z: Tensor, out: Tensor) -> None:
        self.rmatmat(z, out)

    def columns(self, index: Tensor) -> Tensor:
        return torch.cat(list(self._each(lambda part, rows: part.columns(index))))

    def rows_at(self, index: Tensor) -> Tensor:
        out = torch.empty(len(index), self.size, dtype=self.dtype, device=self.device)

        def pick(part: LayerScores, rows: slice) -> Tensor:
            here = (index >= rows.start) & (index < rows.stop)
            out[here] = part.rows_at(index[here] - rows.start)
            return out

        for _ in self._each(pick):
            pass
        return out

    def diagonal(self) -> Tensor:
        return sum(self._each(lambda part, rows: part.diagonal().double())).to(self.dtype)

    def trace(self) -> Tensor:
        return sum(self._each(lambda part, rows: part.trace()))

    def moments(self, index: Tensor) -> Tensor:
        return sum(self._each(lambda part, rows: part.moments(index).double())).to(self.dtype)

    def contract(self, coefficients: Tensor) -> LayerScores:
        raise MemoryBudgetError(
            "One row per example was asked of scores that are streamed, as they do not fit the memory budget. Use num_null=0, fewer examples, "
            "kind='mc', or a larger memory= of the Fisher."
        )

    def column_chunks(self) -> list[Tensor]:
        # each chunk is a pass over the data, so chunks are as large as the budget allows
        step = max(1, self._matrix.budget // 4 // max(1, self.rows * self.dtype.itemsize))
        return list(torch.arange(self.size, device=self.device).split(step))


class StreamedMatrix(ScoreMatrix):
    """U of a data set whose scores do not fit the budget.

    Parameters
    ----------
    collector
        Computes the scores of one piece of the data.
    source, seed
        The data, read again for every answer, and the seed of the labels.
    budget
        Bytes that an answer may hold.
    kept
        Rows that carry weight.
    """

    def __init__(self, collector: Collector, source: Source, seed: int, budget: int, kept: Tensor | None):
        self.collector, self.source, self.seed, self.budget = collector, source, seed, budget
        self.n, self.r = source.n_data, collector.r
        self.dtype, self.device = collector.like.dtype, collector.like.device
        collector.recorder.freeze()
        source.remember()
        super().__init__([StreamedLayer(layer, self) for layer in collector.layout.layers], kept)
        self._graphs: dict[int, Graph] = {}
        if collector.plan.linearised:
            for piece in self.pieces():
                leaves = collector.recorder.leaves()
                outputs = collector.recorder.outputs_with_graph(piece.batch, leaves)
                self._graphs[piece.at.start] = Graph(outputs, leaves, keep=True)

    def restrict(self, names: Sequence[str]) -> ScoreMatrix:
        # layer by layer: the fused product below is of the whole network
        part = ScoreMatrix([layer for layer in self.layers if layer.layer.name in set(names)], self.kept)
        part._grams = self._grams
        return part

    def pieces(self) -> Iterator[Piece]:
        """The data once more, global random state preserved."""
        with preserved_randomness(self.device):
            yield from self.collector.pieces(self.source, self.seed)

    def parts(self) -> Iterator[tuple[slice, ScoreMatrix]]:
        """Rows and score matrix of each piece, one at a time."""
        for piece in self.pieces():
            yield slice(piece.at.start * self.r, piece.at.stop * self.r), self.collector.matrix(piece)

    def matmat(self, v: Tensor) -> Tensor:
        if v.shape[1] > _FEW_VECTORS:
            return torch.cat([scores.matmat(v) for _, scores in self.parts()])
        rows = []
        for piece in self.pieces():
            rows.append(torch.stack([self._image(piece, v[:, k])[0] for k in range(v.shape[1])], dim=-1).flatten(0, 1))
        return torch.cat(rows)

    def rmatmat(self, z: Tensor) -> Tensor:
        out = torch.zeros(z.shape[1], self.size, dtype=torch.float64, device=self.device)
        for rows, scores in self.parts():
            out += scores.rmatmat(z[rows].contiguous()).T
        return out.to(self.dtype).T

    def product(self, v: Tensor, scale: float = 1.0) -> Tensor:
        """UᵀU V in one pass over the data; sums over pieces in float64."""
        out = torch.zeros(v.shape[1], self.size, dtype=torch.float64, device=self.device)
        if v.shape[1] > _FEW_VECTORS:
            for _, scores in self.parts():
                out += scores.product(v, scale).T
            return out.to(self.dtype).T
        for piece in self.pieces():
            for k in range(v.shape[1]):
                out[k] += self._linearised(piece, v[:, k])
        return out.mul_(scale).to(self.dtype).T

    def diagonal(self) -> Tensor:
        return sum(scores.diagonal().double() for _, scores in self.parts()).to(self.dtype)

    def trace(self) -> Tensor:
        return sum(scores.trace() for _, scores in self.parts())

    def columns(self, index: Tensor) -> Tensor:
        return torch.cat([scores.columns(index) for _, scores in self.parts()])

    def dense(self, index: Tensor | None = None) -> Tensor:
        return sum(scores.dense(index).double() for _, scores in self.parts()).to(self.dtype)

    def contract(self, coefficients: Tensor) -> ScoreMatrix:
        return ScoreMatrix([layer.contract(coefficients) for layer in self.layers])

    def _image(self, piece: Piece, v: Tensor) -> tuple[Tensor, list[Tensor], Graph]:
        """Row-space image ``(n, r)`` of one vector, the score columns, and the graph of the outputs."""
        recorder = self.collector.recorder
        if piece.at.start in self._graphs:
            graph = self._graphs[piece.at.start]
            change = graph.derivative(self._tangents(v, graph.leaves))
        else:
            leaves = recorder.leaves()
            graph, change = forward_derivative(
                lambda values: recorder.outputs_with_graph(piece.batch, values), leaves, self._tangents(v, leaves)
            )
        bound = self.collector.bind(graph.outputs, piece.batch, piece.at)
        columns = list(self.collector.signals(bound, piece.uniforms))
        z = torch.stack([(column * change).flatten(1).sum(1) for column in columns], dim=1)
        if not torch.isfinite(z).all():
            raise NonFiniteError(
                f"The product on {piece.batch.where} holds NaN or infinity: a derivative overflowed. Use a float64 model."
            )
        return z, columns, graph

    def _tangents(self, v: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.to(leaves[name].dtype) for name, t in self.collector.layout.unflatten(v).items()}

    def _linearised(self, piece: Piece, v: Tensor) -> Tensor:
        z, columns, graph = self._image(piece, v)
        signal = sum(column * z[:, r].view(-1, *[1] * (column.ndim - 1)) for r, column in enumerate(columns))
        return graph.pull_back(signal)
