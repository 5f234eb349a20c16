"""Inputs and output scores of layers once more, piece by piece, where F kept only what it needed for itself.

A capture may keep a convolution as explicit rows, or nothing at all. Kronecker factors need its inputs and output scores. They
come from another pass over the data with everything as it was at the capture, and are held against what F kept.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fisherlens.errors import FisherLensError, InputError, UnsupportedModuleError
from fisherlens.layout import LayerInfo, Layout
from fisherlens.likelihoods import BoundLikelihood
from fisherlens.scores.base import CHUNK_BYTES, PART, LayerScores
from fisherlens.scores.collector import Collector, Piece
from fisherlens.scores.conv import ConvGeometry, ConvScores
from fisherlens.scores.dense import DenseScores
from fisherlens.scores.explicit import ZeroScores
from fisherlens.scores.matrix import ScoreMatrix
from fisherlens.scores.plan import Plan
from fisherlens.scores.recorder import Unexplained, Use, backward, preserved_randomness
from fisherlens.scores.source import Source

FACTORED = ("dense", "conv")


@dataclass(frozen=True)
class LayerFactors:
    """Inputs and output scores of a dense or convolution layer on n examples, group by group of its channels.

    The score row (n, r) of group j's weight is Σ_t g_nrjt ⊗ a_njt. Uses of one module, and of one weight, lie one after another
    along the positions t. The roots of the examples' weights are in g and not in a.

    Attributes
    ----------
    layer
        The layer.
    inputs
        a, ``(n, groups, t, d_i)``; patches of a convolution, in the order of its weight. The 1 of the bias is not in it.
    outputs
        g, ``(n, r, groups, t, d_o)``.
    weight
        w_n ``(n,)``, the sum of the weights of the example's terms, float64.
    """

    layer: LayerInfo
    inputs: Tensor
    outputs: Tensor
    weight: Tensor

    @property
    def positions(self) -> int:
        """Positions per example, t."""
        return self.outputs.shape[3]

    @property
    def homogeneous(self) -> Tensor:
        """The inputs of the selected parameters, ``(n, groups, t, d)``: with a 1 as last entry for the bias, or the 1 alone."""
        one = self.inputs.new_ones(*self.inputs.shape[:3], 1)
        if not self.layer.weight:
            return one
        return torch.cat([self.inputs, one], dim=3) if self.layer.bias else self.inputs

    def reduced(self) -> LayerFactors:
        """One position: the mean of the inputs and the sum of the scores over positions."""
        mean = self.inputs.sum(2, keepdim=True) / max(self.positions, 1)
        return LayerFactors(self.layer, mean, self.outputs.sum(3, keepdim=True), self.weight)

    def part(self, at: slice) -> LayerFactors:
        """Some of the examples, sharing memory."""
        return LayerFactors(self.layer, self.inputs[at], self.outputs[at], self.weight[at])

    def matrices(self) -> Tensor:
        """The score rows as matrices, ``(n, r, groups, d_o, d)``: Σ_t g ⊗ homogeneous a."""
        return torch.einsum("nrbto,nbti->nrboi", self.outputs, self.homogeneous)

    def in_parts(self) -> Iterator[LayerFactors]:
        """Parts of the examples whose :meth:`matrices` stay under 64 MiB."""
        per_example = self.outputs.shape[1] * self.layer.size * self.outputs.itemsize
        step = max(1, CHUNK_BYTES // per_example)
        for start in range(0, len(self.outputs), step):
            yield self.part(slice(start, start + step))

    def images(self, v: Tensor) -> Tensor:
        """U_l v of a vector over the layer's parameters, ``(n, r)``."""
        w = as_matrices(self.layer, v[:, None])[0]
        h = torch.einsum("nbti,boi->nbto", self.homogeneous, w).flatten(1)
        return torch.einsum("nrx,nx->nr", self.outputs.flatten(2), h)


def as_matrices(layer: LayerInfo, v: Tensor) -> Tensor:
    """Vectors ``(p, K)`` over a layer's parameters as matrices ``(K, groups, d_o, d)``, the bias as the last column."""
    k, groups, pieces = v.shape[1], layer.groups, []
    n_weight = layer.weight.numel if layer.weight else 0
    d_o = (layer.weight or layer.bias).shape[0] // groups
    if layer.weight:
        pieces.append(v[:n_weight].T.reshape(k, groups, d_o, -1))
    if layer.bias:
        pieces.append(v[n_weight:].T.reshape(k, groups, d_o, 1))
    return torch.cat(pieces, dim=3)


def as_vectors(layer: LayerInfo, w: Tensor) -> Tensor:
    """Matrices ``(K, groups, d_o, d)`` as vectors ``(p, K)``: the inverse of :func:`as_matrices`."""
    k, pieces = len(w), []
    if layer.weight:
        pieces.append((w[..., :-1] if layer.bias else w).reshape(k, -1))
    if layer.bias:
        pieces.append(w[..., -1].reshape(k, -1))
    return torch.cat(pieces, dim=1).T


class Captured(Protocol):
    """What is asked of a Fisher."""

    layout: Layout
    plan: Plan
    scores: ScoreMatrix
    replay: Replay


def has_factors(F: Captured, name: str) -> bool:
    """Whether a layer has inputs and output scores that give its rows: dense and convolution, by exact type, used through their module."""
    return F.layout.layer(name).kind in FACTORED and F.plan[name].storage != "per example"


def factor_pieces(F: Captured, names: Sequence[str]) -> Iterator[tuple[slice, dict[str, LayerFactors]]]:
    """Inputs and output scores of some layers of a Fisher, piece by piece, examples in order.

    Parameters
    ----------
    F
        The Fisher (not of the Hessian kind).
    names
        Layers with factors (see :func:`has_factors`).

    Yields
    ------
    The examples of the piece, and the :class:`LayerFactors` of each layer; row (n, r) is the row n R + r of F's score matrix, sampled
    labels included.

    Raises
    ------
    UnsupportedModuleError
        A layer without factors.
    InputError
        Model or data are not what they were when F was built; or F was unpickled, which leaves them behind.

    Notes
    -----
    Layers that F keeps as factors cost nothing; the others together one pass over the data, with parameters, buffers and modes as they
    were at the capture: a forward and R backward passes, the memory of a piece bounded as in the capture. Each piece is compared with
    the rows that F kept, by their product with one random vector.
    """
    for name in names:
        if not has_factors(F, name):
            layer = F.layout.layer(name)
            raise UnsupportedModuleError(
                f"Layer {name!r} ({layer.type_name}) has no inputs and output scores that give its score rows; Linear and Conv1d/2d/3d have, "
                "where their parameters are used by their own module alone. Leave it out with F.restrict([...])."
            )
    matrix = F.scores
    kept = [name for name in names if isinstance(matrix[name], (DenseScores, ConvScores, ZeroScores))]
    again = [name for name in names if name not in kept]
    if again:
        for at, found in F.replay.pieces(matrix, again):
            weight = F.replay.weight[at]
            own = {name: _kept_factors(matrix[name].part(at), weight) for name in kept}
            yield at, {name: own.get(name) or found[name] for name in names}
        return
    step = _step([matrix[name] for name in names])
    for start in range(0, matrix.n, step):
        at = slice(start, min(start + step, matrix.n))
        weight = F.replay.weight[at]
        yield at, {name: _kept_factors(matrix[name].part(at), weight) for name in names}


def _step(layers: Sequence[LayerScores]) -> int:
    """Examples whose inputs, unfolded and with the 1 of the bias, stay under 64 MiB together."""
    entries = 1
    for layer in layers:
        if isinstance(layer, (DenseScores, ConvScores)):
            entries += layer.layer.groups * layer.t * (layer.d_i + 1)
    return max(1, min(PART, CHUNK_BYTES // (entries * layers[0].dtype.itemsize)))


def _kept_factors(scores: LayerScores, weight: Tensor) -> LayerFactors:
    layer = scores.layer
    if isinstance(scores, DenseScores):
        return LayerFactors(layer, scores.a[:, None], scores.g[:, :, None], weight)
    if isinstance(scores, ConvScores):
        groups = scores.geometry.groups
        patches = scores.geometry.patches(scores.x).mT  # (n, groups, T, d_i)
        return LayerFactors(layer, patches, _by_group(scores.g, groups), weight)
    like = torch.empty(0, dtype=scores.dtype, device=scores.device)
    return _no_factors(layer, scores.n, scores.r, like, weight)


def _no_factors(layer: LayerInfo, n: int, r: int, like: Tensor, weight: Tensor) -> LayerFactors:
    """Those of a layer that is never called: no position."""
    d_o = (layer.weight or layer.bias).shape[0] // layer.groups
    d_i = layer.weight.numel // layer.weight.shape[0] if layer.weight else 0
    a, g = like.new_zeros(n, layer.groups, 0, d_i), like.new_zeros(n, r, layer.groups, 0, d_o)
    return LayerFactors(layer, a, g, weight)


def _by_group(g: Tensor, groups: int) -> Tensor:
    """Output scores ``(n, r, channels, T)`` as ``(n, r, groups, T, channels/groups)``."""
    n, r, d_o, t = g.shape
    return g.reshape(n, r, groups, d_o // groups, t).mT


class Replay:
    """The pass of a capture once more, for the layers that are asked for.

    Parameters
    ----------
    collector, source, seed
        Those of the capture; the graphs of the collector's sample are let go. Where F keeps all factors, nothing refers to the network.
    parameters
        The selected parameters at the capture, flat.
    weight
        Sum of the weights of each example's terms, ``(n,)``.
    """

    def __init__(
        self, collector: Collector | None, source: Source | None, seed: int, parameters: Tensor, weight: Tensor
    ):
        self._parameters, self.weight = parameters, weight
        self._collector = collector if collector is not None and _needed(collector) else None
        if self._collector is not None:
            self._source, self._seed = source, seed
            collector.rest()
            model = collector.recorder.model
            self._modes = {module: module.training for module in model.modules()}
            self._buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}

    def __deepcopy__(self, memo: Any) -> Replay:
        return self  # nothing here changes, and a copy of F needs no copy of the network

    def __reduce__(self) -> tuple[Any, ...]:
        return Replay, (None, None, 0, self._parameters, self.weight)  # network and data stay behind

    def pieces(self, matrix: ScoreMatrix, names: Sequence[str]) -> Iterator[tuple[slice, dict[str, LayerFactors]]]:
        """Examples and factors of each piece; ``matrix`` holds what F kept, to compare with."""
        if self._collector is None:
            raise InputError(
                f"The inputs and output scores of layer {names[0]!r} need another pass over the data, as F keeps only its explicit rows; but this F was "
                "unpickled, and model and data were left behind. Build F again: fl.Fisher(model, data, ...)."
            )
        collector = self._as_captured()
        # scores that are not kept come from passes that check their data themselves
        check = _Comparison(matrix, names) if self._collector.plan.kept else None
        device = collector.like.device
        with preserved_randomness(device):
            for piece in collector.pieces(self._source, self._seed):
                found = self._factors(collector, piece, names)
                if check is not None:
                    check.require(piece, found)
                yield piece.at, found

    def _as_captured(self) -> Collector:
        """The collector with parameters, buffers and modes as they were; where nothing is kept its recorder is frozen already."""
        if not self._collector.plan.kept:
            return self._collector
        collector, recorder = copy.copy(self._collector), copy.copy(self._collector.recorder)
        now = dict(recorder.model.named_parameters())
        own = recorder.layout.unflatten(self._parameters)
        if not all(name in now and now[name].shape == value.shape for name, value in own.items()):
            raise InputError(
                f"The model has other parameters than when F was built: {sorted(own)} are expected. {_REBUILD}"
            )
        recorder._frozen = {
            name: own[name].to(value.dtype) if name in own else value.detach() for name, value in now.items()
        }
        recorder._buffers, recorder._modes = self._buffers, self._modes
        collector.recorder = recorder
        return collector

    def _factors(self, collector: Collector, piece: Piece, names: Sequence[str]) -> dict[str, LayerFactors]:
        try:
            outputs, uses, _ = collector.forward(piece.batch)
        except Unexplained as found:
            raise InputError(
                f"The model uses layer {found.layers[0]!r} on {piece.batch.where} in another way than when F was built. {_REBUILD}"
            ) from None
        except FisherLensError:
            raise
        except Exception as error:
            raise InputError(
                f"The model failed on {piece.batch.where}, on which F was built: {type(error).__name__}: {error}. {_REBUILD}"
            ) from error
        bound = collector.bind(outputs, piece.batch, piece.at)
        wanted = {name: uses[name] for name in names}
        scores = _output_scores(collector, piece, bound, outputs, wanted)
        weight = bound.weight.sum(1).double()
        factors = {}
        for name in names:
            layer = collector.layout.layer(name)
            if wanted[name]:
                factors[name] = _gather(layer, wanted[name], scores[name], weight, collector.like.dtype)
            else:
                factors[name] = _no_factors(layer, piece.batch.size, collector.r, collector.like, weight)
        return factors


def _output_scores(
    collector: Collector, piece: Piece, bound: BoundLikelihood, outputs: Tensor, uses: Mapping[str, list[Use]]
) -> dict[str, list[Tensor]]:
    """Output scores of every use, ``(n, r, *shape)``."""
    like, n = collector.like, piece.batch.size
    buffers = {
        name: [like.new_zeros(n, collector.r, *use.output_shape[1:]) for use in found] for name, found in uses.items()
    }
    for r, signal in enumerate(collector.signals(bound, piece.uniforms)):
        for name, scores in backward(outputs, uses, signal).items():
            for buffer, g in zip(buffers[name], scores, strict=True):
                if g is not None:
                    buffer[:, r] = g
    return buffers


def _gather(
    layer: LayerInfo, uses: Sequence[Use], scores: Sequence[Tensor], weight: Tensor, dtype: torch.dtype
) -> LayerFactors:
    """Uses one after another along the positions."""
    inputs, outputs = [], []
    for use, g in zip(uses, scores, strict=True):
        x = use.inputs.detach().to(dtype)
        if layer.kind == "conv":
            geometry = ConvGeometry.of(use.module)
            inputs.append(geometry.patches(geometry.padded(x)).mT)
            outputs.append(_by_group(g.flatten(3), geometry.groups))
        else:
            inputs.append(x.reshape(len(x), 1, -1, x.shape[-1]))
            outputs.append(g.reshape(*g.shape[:2], 1, -1, g.shape[-1]))
    if len(inputs) == 1:
        return LayerFactors(layer, inputs[0], outputs[0], weight)
    return LayerFactors(layer, torch.cat(inputs, dim=2), torch.cat(outputs, dim=3), weight)


_REBUILD = "Model or data changed since then: build F again with fl.Fisher(...), and what is made of it."


def _needed(collector: Collector) -> bool:
    """Whether a layer that has factors is kept as something else."""
    plan = collector.plan
    as_rows = [layer for layer in collector.layout.layers if plan[layer.name].storage == "rows"]
    return not plan.kept or any(layer.kind in FACTORED for layer in as_rows)


class _Comparison:
    """Rows of another pass against those that F kept, by their products with a random vector."""

    def __init__(self, matrix: ScoreMatrix, names: Sequence[str]):
        generator = torch.Generator().manual_seed(0)
        self._vectors, self._kept, self._scales = {}, {}, {}
        for name in names:
            layer = matrix[name]
            v = torch.randn(layer.size, generator=generator, dtype=torch.float64, device="cpu").to(
                layer.device, layer.dtype
            )
            self._vectors[name] = v
            self._kept[name] = layer.matmat(v[:, None]).view(layer.n, layer.r)
            self._scales[name] = torch.linalg.vector_norm(self._kept[name].double()).item()

    def require(self, piece: Piece, found: Mapping[str, LayerFactors]) -> None:
        """Refuse a piece whose rows are not those that F kept."""
        for name, factors in found.items():
            kept = self._kept[name][piece.at]
            gap = torch.linalg.vector_norm((factors.images(self._vectors[name]) - kept).double()).item()
            # pieces are those of the capture, so what remains is the rounding of sums in another order
            tolerance = 1e-8 if kept.dtype == torch.float64 else 1e-4
            if not gap <= tolerance * self._scales[name]:
                raise InputError(
                    f"The score rows of layer {name!r} on {piece.batch.where} differ from those that F kept (by {gap:.2g}, where all of them together have "
                    f"the norm {self._scales[name]:.2g}). {_REBUILD}"
                )
