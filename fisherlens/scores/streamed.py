"""Scores that are never kept: every answer passes over the data again, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fisherlens.errors import MemoryBudgetError, NonFiniteError
from fisherlens.layout import LayerInfo
from fisherlens.likelihoods.base import inner_products
from fisherlens.scores.base import PART, LayerScores, Total
from fisherlens.scores.checks import LOW_PRECISION
from fisherlens.scores.linearised import Graph, forward_derivatives
from fisherlens.scores.matrix import ScoreMatrix
from fisherlens.scores.recorder import preserved_randomness
from fisherlens.scores.source import Source

if TYPE_CHECKING:
    from fisherlens.scores.collector import Collector, Piece

# Vectors that one linearised pass takes at most: each adds its own activations to those of the graph (our choice).
_TOGETHER = 8
# Examples in a piece below which collecting its scores does not pay (our choice).
_PIECE = 8


class Stream:
    """The data as often as asked: pieces, or the scores of each piece, one at a time.

    A part of its own, so that layers and matrix need not refer to each other: kept graphs go with the last that uses them.
    """

    def __init__(self, collector: Collector, source: Source, seed: int, budget: int):
        self.collector, self.source, self.seed, self.budget = collector, source, seed, budget
        self.n, self.r = source.n_data, collector.r
        self.dtype, self.device = collector.like.dtype, collector.like.device

    def pieces(self, step: int | None = None) -> Iterator[Piece]:
        """The data once more, global random state preserved."""
        with preserved_randomness(self.device):
            yield from self.collector.pieces(self.source, self.seed, step, join=True)

    def parts(self) -> Iterator[tuple[slice, ScoreMatrix]]:
        """Rows and score matrix of each piece."""
        for piece in self.pieces():
            yield slice(piece.at.start * self.r, piece.at.stop * self.r), self.collector.matrix(piece)


class StreamedLayer(LayerScores):
    """One layer of a streamed score matrix."""

    path = "streamed"

    def __init__(self, layer: LayerInfo, stream: Stream):
        self.layer, self._stream = layer, stream
        self.n, self.r, self.dtype, self.device = stream.n, stream.r, stream.dtype, stream.device

    @property
    def nbytes(self) -> int:
        return 0

    def _each(self, function: Callable[[LayerScores, slice], Tensor]) -> Iterator[Tensor]:
        for rows, scores in self._stream.parts():
            yield function(scores[self.layer.name], rows)

    def matmat(self, v: Tensor) -> Tensor:
        return torch.cat(list(self._each(lambda part, rows: part.matmat(v))))

    def largest(self) -> float:
        return float("inf")  # not known without a pass over the data

    def part(self, at: slice) -> LayerScores:
        raise NotImplementedError("streamed scores come in the pieces of their data")

    def rmatmat(self, z: Tensor, out: Tensor) -> None:
        def half(part: LayerScores, rows: slice) -> Tensor:
            buffer = torch.empty_like(out)
            part.rmatmat(z[rows].contiguous(), buffer)
            return buffer

        out.copy_(Total.of(self._each(half)))

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
        return Total.of(self._each(lambda part, rows: part.diagonal()))

    def trace(self) -> Tensor:
        return Total.of(self._each(lambda part, rows: part.trace()))

    def moments(self, index: Tensor) -> Tensor:
        return Total.of(self._each(lambda part, rows: part.moments(index)))

    def contract(self, coefficients: Tensor) -> LayerScores:
        raise MemoryBudgetError(
            "One row per example was asked of scores that are streamed, as they do not fit the memory budget. Use num_null=0, fewer examples, "
            "kind='mc', or a larger memory= of the Fisher."
        )

    def column_chunks(self) -> list[Tensor]:
        # each chunk is a pass over the data, so chunks are as large as the budget allows
        step = max(1, self._stream.budget // 4 // max(1, self.rows * self.dtype.itemsize))
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
        self.stream, self.collector = Stream(collector, source, seed, budget), collector
        collector.recorder.freeze()
        source.remember()
        super().__init__([StreamedLayer(layer, self.stream) for layer in collector.layout.layers], kept, budget)
        self._graphs = self._kept_graphs()

    def __getstate__(self) -> dict[str, Any]:
        return {
            **vars(self),
            "_graphs": {},
        }  # a graph survives neither a file nor a deep copy: what comes back depends on nothing

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._graphs = self._kept_graphs()

    def _kept_graphs(self) -> dict[int, Graph]:
        """The linearised network on each piece, by its first example, where the plan keeps it."""
        graphs: dict[int, Graph] = {}
        recorder = self.collector.recorder
        for piece in self.stream.pieces() if self.collector.plan.linearised else ():
            leaves = recorder.leaves()
            # a graph holds its inputs, which a loader may write over; whole tensors are compared in every pass
            batch = piece.batch if self.stream.source.whole else piece.batch.own()
            graphs[piece.at.start] = Graph(recorder.outputs_with_graph(batch, leaves), leaves, keep=True)
        return graphs

    def restrict(self, names: Sequence[str]) -> ScoreMatrix:
        # layer by layer: the fused product below is of the whole network
        part = ScoreMatrix([layer for layer in self.layers if layer.layer.name in set(names)], self.kept, self.memory)
        part._grams = self._grams
        return part

    def _linear(self, vectors: int) -> bool:
        """Whether vectors cost less through the linearised network than through the scores of each piece.

        In gradients: 1/3 + K against (1 + R)/3 + 2K/3 with scores; 4K/3 where the graph is kept. Scores that fit for a few examples
        only are a pass over all parameters for each of these.
        """
        if self.collector.step < min(_PIECE, self.n):
            return True
        return 4 * vectors <= 1 + self.r + 2 * vectors if self._graphs else vectors <= self.r

    def parts(self) -> Iterator[tuple[slice, ScoreMatrix]]:
        """Rows and score matrix of each piece, one at a time."""
        return self.stream.parts()

    def _summed(self, function: Callable[[ScoreMatrix, slice], Tensor]) -> Tensor:
        """Sum of a function of the scores of each piece, and its rows, in parts of ``PART`` examples that are added in float64."""
        total = Total()
        for rows, scores in self.parts():
            total.add(function(scores, rows), scores.n)
        return total.value()

    def matmat(self, v: Tensor) -> Tensor:
        if not self._linear(v.shape[1]):
            return torch.cat([scores.matmat(v) for _, scores in self.parts()])
        groups = self._tangents(v)
        images = [torch.cat([self._image(piece, some) for some in groups]) for piece in self._linear_pieces(groups)]
        return torch.cat(images, dim=1).flatten(1).T.contiguous()

    def rmatmat(self, z: Tensor) -> Tensor:
        return self._summed(lambda scores, rows: scores.rmatmat(z[rows].contiguous()).T).T

    def product(self, v: Tensor, scale: float = 1.0) -> Tensor:
        """UᵀU V in one pass over the data; sums over pieces in float64."""
        if not self._linear(v.shape[1]):
            return self._summed(lambda scores, rows: scores.product(v, scale).T).T
        groups = self._tangents(v)
        totals = [[Total() for _ in group] for group in groups]
        for piece in self._linear_pieces(groups):
            for group, sums in zip(groups, totals, strict=True):
                for total, gradient in zip(sums, self._linearised(piece, group), strict=True):
                    total.add(gradient, piece.batch.size if gradient.dtype not in LOW_PRECISION else PART)
        out = torch.empty(v.shape[1], self.size, dtype=self.dtype, device=self.device)
        for rows, sums in zip(out.split(_TOGETHER), totals, strict=True):
            at = 0
            for total in sums:
                found = total.value().reshape(len(rows), -1).to(self.dtype)  # a parameter may be a single number
                torch.mul(found, scale, out=rows[:, at : at + found.shape[1]])
                at += found.shape[1]
        return out.T

    def checked_product(self, v: Tensor, scale: float = 1.0) -> tuple[Tensor, bool]:
        return self.product(v, scale), False

    def diagonal(self) -> Tensor:
        return self._summed(lambda scores, rows: scores.diagonal())

    def trace(self) -> Tensor:
        return self._summed(lambda scores, rows: scores.trace())

    def dense(self, index: Tensor | None = None) -> Tensor:
        return self._summed(lambda scores, rows: scores.dense(index))

    def columns(self, index: Tensor) -> Tensor:
        return torch.cat([scores.columns(index) for _, scores in self.parts()])

    def contract(self, coefficients: Tensor) -> ScoreMatrix:
        return ScoreMatrix([layer.contract(coefficients) for layer in self.layers])

    def _tangents(self, v: Tensor) -> list[dict[str, Tensor]]:
        """Vectors ``(P, K)`` as tangents ``(k, *shape)`` of the parameters, in groups that go through the network together."""
        layout = self.collector.layout
        sizes = [layout[name].numel for name in layout.names]
        leaves = self.collector.recorder.leaves()
        return [
            {
                # memory of its own each: forward mode would copy the parts of a larger tensor again in every piece
                name: part.reshape(len(part), *leaves[name].shape).to(leaves[name].dtype, copy=True)
                for name, part in zip(layout.names, group.T.split(sizes, dim=1), strict=True)
            }
            for group in v.split(_TOGETHER, dim=1)
        ]

    def _linear_pieces(self, groups: Sequence[dict[str, Tensor]]) -> Iterator[Piece]:
        together = max(len(next(iter(group.values()))) for group in groups)
        return self.stream.pieces(None if self._graphs else self.collector.linear_step(together))

    def _changes(self, piece: Piece, tangents: dict[str, Tensor]) -> tuple[Tensor, Graph]:
        """J V of one piece, ``(K, *outputs)``, and the graph of its outputs."""
        recorder = self.collector.recorder
        if piece.at.start in self._graphs:
            graph = self._graphs[piece.at.start]
            return graph.derivatives(tangents), graph
        graph, changes = forward_derivatives(
            lambda values: recorder.outputs_with_graph(piece.batch, values), recorder.leaves(), tangents
        )
        return changes, graph

    def _image(self, piece: Piece, tangents: dict[str, Tensor]) -> Tensor:
        """Row-space images of K vectors, ``(K, n, r)``."""
        changes, graph = self._changes(piece, tangents)
        columns = self.collector.signals(self.collector.bind(graph.outputs, piece.batch, piece.at), piece.uniforms)
        return _finite(torch.stack([inner_products(column, changes) for column in columns], dim=2), piece)

    def _linearised(self, piece: Piece, tangents: dict[str, Tensor]) -> list[Tensor]:
        """UᵀU V of one piece, ``(K, *shape)`` for each parameter: Jᵀ H J V with the curvature H of the outputs."""
        changes, graph = self._changes(piece, tangents)
        bound = self.collector.bind(graph.outputs, piece.batch, piece.at)
        return graph.pull_backs(_finite(self.collector.curvature(bound, piece.uniforms, changes), piece))


def _finite(found: Tensor, piece: Piece) -> Tensor:
    if not torch.isfinite(found).all():
        raise NonFiniteError(
            f"The product on {piece.batch.where} holds NaN or infinity: a derivative overflowed. Use a float64 model."
        )
    return found
