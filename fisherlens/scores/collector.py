"""Turn batches of data into score columns and hand them to each layer's writer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fisherlens.errors import InputError, NonFiniteError, NumericalWarning, user_level
from fisherlens.likelihoods import BoundLikelihood, Likelihood
from fisherlens.likelihoods.base import along
from fisherlens.linalg.memory import Workspace
from fisherlens.scores.batch import joined, joined_size
from fisherlens.scores.draws import Draws
from fisherlens.scores.matrix import ScoreMatrix
from fisherlens.scores.per_example import PerExample
from fisherlens.scores.plan import Plan
from fisherlens.scores.recorder import Recorder, Unexplained, Use, backward, flattened_map, probe, unexplained
from fisherlens.scores.source import Batch, Source
from fisherlens.scores.writers import Writer

# Larger passes gain nothing on a CPU and lose the caches; on a GPU this still fills the device (our choice).
_TRANSIENT = 192 * 2**20
# The same for a pass that collects no scores; measured on convolutions, which want their activations in the caches. Below it
# the fixed cost of a pass dominates, so it is taken also where the budget of what is kept is smaller.
_LINEAR = 64 * 2**20
# Examples up to which small batches are joined: more gain nothing on a CPU, as the activations leave the caches (our measurement).
_JOINED = 1024


@dataclass(frozen=True)
class Piece:
    """A part of the data of bounded size: its rows in the whole, its batch, and the uniform numbers of its labels."""

    at: slice
    batch: Batch
    uniforms: Tensor


class Collector:
    """One forward pass per piece, one backward pass per score column, and a writer for each layer.

    Parameters
    ----------
    recorder
        Runs the model.
    likelihood, kind, mc_samples
        Which score columns to take.
    sample
        A few examples, from which shapes are read; the model is checked on them.
    like
        A tensor with the dtype and device of the scores.
    n_data
        Examples of the whole data set.
    mc_sampling, rows
        How labels are drawn, and how the empirical kind makes rows; see :class:`fisherlens.Fisher`.
    """

    def __init__(
        self,
        recorder: Recorder,
        likelihood: Likelihood,
        kind: str,
        mc_samples: int,
        sample: Batch,
        like: Tensor,
        n_data: int,
        mc_sampling: str = "independent",
        rows: str = "term",
    ):
        self.recorder, self.likelihood, self.kind, self.mc_samples, self.like = (
            recorder,
            likelihood,
            kind,
            mc_samples,
            like,
        )
        self.mc_sampling, self.rows = mc_sampling, rows
        outputs = probe(recorder, sample)
        likelihood.check_data(outputs.shape[1:], n_data)
        if not outputs.requires_grad:
            warnings.warn(
                "The outputs do not depend on any of the selected parameters, so F is zero. If that is not meant: does the model's forward run under "
                "torch.no_grad, detach its result, or pass it through numpy?",
                NumericalWarning,
                stacklevel=user_level(),
            )
        # bound for its shapes: which examples these are does not matter
        bound = self.bind(outputs, sample, slice(0, sample.size))
        recorder.release(unexplained(recorder, sample))
        self.uses = recorder.forward(sample)[1]
        observed = bound.num_terms if rows == "term" else 1
        self.r = {"exact": bound.num_columns, "mc": mc_samples, "empirical": observed}[kind]
        self.rank_per_term, self.output_shape = likelihood.rank_per_term(outputs.shape), outputs.shape[1:]
        self.graph_bytes = self.pass_bytes = recorder.graph_bytes(sample)
        self._num_uniforms, self._sample_size = bound.num_uniforms, sample.size
        self.joins = True  # whether the model may be given several small batches as one
        layout = recorder.layout
        maps = {name: flattened_map(u[0]) for name, u in self.uses.items() if u and layout.layer(name).kind == "dense"}
        recorder.layout = self.layout = layout.with_input_maps({name: found for name, found in maps.items() if found})

    def bind(self, outputs: Tensor, batch: Batch, at: slice) -> BoundLikelihood:
        """The likelihood at the outputs of a batch, which holds examples ``at`` of the data."""
        if batch.targets is None and (self.kind == "empirical" or self.likelihood.needs_targets):
            reasons = {"empirical": "the empirical kind takes scores at observed labels"}
            why = reasons.get(self.kind, "class weights and ignored labels follow the observed label")
            raise InputError(f"targets are None, but {why}. Give data as (inputs, targets), or use kind='exact'.")
        return self.likelihood.bind(outputs, batch.targets, batch.where, at)

    def prepare(self, plan: Plan, budget: int, batches: Sequence[int]) -> None:
        """Take the plan, and the sizes of the batches; from now on pieces can be collected."""
        self.plan = plan
        ruleless = [layer for layer in self.layout.layers if plan[layer.name].storage == "per example"]
        self._per_example = PerExample(self.recorder, ruleless) if ruleless else None
        self._workspace = Workspace(limit=budget // 4)
        self.step = self._piece_size(budget, batches)

    def _piece_size(self, budget: int, batches: Sequence[int]) -> int:
        """Examples per piece such that the graph and the score buffers stay under 192 MiB and an eighth of the budget.

        Where no scores are kept, those of a piece are in its size too, and it may take half of the budget. Also tells the plan what the
        largest piece adds to what is kept.
        """
        n = max(batches)
        per_example, share = max(1, self.graph_bytes + self._buffer_bytes()), budget // 8
        if not self.plan.kept:
            per_example, share = per_example + self.plan.scores_nbytes // self.plan.n_data, max(budget // 2, _LINEAR)
        step = max(1, min(4096, min(share, _TRANSIENT) // per_example))
        p, size = self.layout.n_params, self.like.dtype.itemsize
        if self.plan.kept:
            # the mean gradient and that of the witness are summed in float64, from a gradient and a product in the dtype of the scores
            self.plan.transient_nbytes = min(step, n) * per_example + 2 * (8 + size) * p
        elif self.plan.linearised:
            # vectors of a product; those of its graph are kept (measured on five networks, as all that follows)
            self.plan.transient_nbytes = 12 * size * p
        else:
            # the first pass sums gradients of two kinds in float64, and a product holds twice what its pass over a piece does, for a while
            step_of_one = self.linear_step(1)
            together = joined_size(batches, min(step_of_one, _JOINED)) if self.joins else n
            piece = min(step_of_one, max(n, together)) * self.pass_bytes
            self.plan.transient_nbytes = int(max(piece + (6 * size + 34) * p, 1.85 * piece + 5 * size * p))
        return step

    def _buffer_bytes(self) -> int:
        """Bytes per example beside the graph: scores on their way to rows, unfolded patches, one gradient of each size."""
        size, n = self.like.dtype.itemsize, self._sample_size
        buffers, patches, largest = 0, 0, 0
        for name, layer_uses in self.uses.items():
            for use in layer_uses:
                outputs, inputs = use.output_shape.numel() // n, use.inputs.numel() // n
                largest = max(largest, outputs, inputs)
                kernel = math.prod(getattr(use.module, "kernel_size", (1,)))
                if self.plan[name].storage == "rows":
                    buffers += self.r * outputs
                    if kernel > 1:
                        positions = math.prod(use.output_shape[2:])
                        patches += inputs + use.inputs.shape[1] * kernel * positions
        return size * (buffers + patches + 3 * largest)

    def rest(self) -> None:
        """Let go of the graph of the sample and of idle buffers: what is left can collect again."""
        self.uses = {
            name: [replace(use, inputs=use.inputs.detach(), edge=None) for use in found]
            for name, found in self.uses.items()
        }
        self._workspace = Workspace(limit=self._workspace.limit)

    def linear_step(self, vectors: int) -> int:
        """Examples per piece where no scores are collected: the graph, and as many derivatives as there are vectors."""
        # a piece may take as much as the vectors themselves: with few examples each, passing over the parameters would be all the work
        share = max(_LINEAR, 4 * vectors * self.layout.n_params * self.like.dtype.itemsize)
        return max(1, min(4096, share // max(1, self.graph_bytes * (2 + vectors))))

    def pieces(self, source: Source, seed: int, step: int | None = None, *, join: bool = False) -> Iterator[Piece]:
        """The data in pieces of up to ``step`` examples, each of one batch, or of several small ones if they may be joined.

        The labels' uniform numbers are the same in every pass and for every split into batches.
        """
        draws = Draws(self._num_uniforms, self.mc_samples, self.mc_sampling, seed)
        done, step = 0, step or self.step
        for whole in joined(source.batches(), min(step, _JOINED)) if join and self.joins else source.batches():
            for begin in range(0, whole.size, step):
                batch = whole.part(begin, begin + step)
                yield Piece(slice(done, done + batch.size), batch, draws.take(batch.size))
                done += batch.size

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, list[Use]], dict[str, Tensor]]:
        """Outputs, uses and leaves of a batch, the shape of the outputs checked."""
        outputs, uses, leaves = self.recorder.forward(batch)
        if outputs.shape[1:] != self.output_shape or outputs.shape[0] != batch.size:
            raise InputError(
                f"The outputs of {batch.where} have shape {tuple(outputs.shape)}; expected ({batch.size}, …) with {tuple(self.output_shape)} per "
                "example as in the first batch. Pad examples to one size, and keep the batch on the first axis."
            )
        changed = [name for name, found in uses.items() if not self._used_as_planned(name, found, batch.size)]
        if changed:
            raise Unexplained(changed)
        return outputs, uses, leaves

    def _used_as_planned(self, name: str, uses: list[Use], size: int) -> bool:
        """Whether a layer is called as it was on the sample: a routed or conditional layer, or a longer sequence, may not be."""
        planned = self.uses[name]
        if len(uses) != len(planned) or not all(use.of_examples(size) for use in uses):
            return False
        shapes = [(use.inputs.shape[1:], use.output_shape[1:]) for use in uses]
        return self.plan[name].storage == "rows" or shapes == [
            (u.inputs.shape[1:], u.output_shape[1:]) for u in planned
        ]

    def writers(self, n: int) -> dict[str, Writer]:
        """Room for the scores of n examples."""
        return {
            layer.name: Writer(layer, entry, self.uses.get(layer.name, []), n, self.r, self.like, self._workspace)
            for layer, entry in zip(self.layout.layers, self.plan, strict=True)
        }

    def collect(
        self,
        piece: Piece,
        bound: BoundLikelihood,
        outputs: Tensor,
        uses: dict[str, list[Use]],
        writers: dict[str, Writer],
        at: slice,
    ) -> None:
        """Write the scores of a piece, whose forward pass is given, into rows ``at`` of the writers."""
        for name, writer in writers.items():
            writer.start(uses.get(name, []), at)
        for column, signal in enumerate(self.signals(bound, piece.uniforms)):
            for name, scores in backward(outputs, uses, signal).items():
                writers[name].take(column, scores)
            if self._per_example is not None:
                for name, rows in self._per_example.rows(piece.batch, signal).items():
                    writers[name].take_rows(column, rows)
        for writer in writers.values():
            writer.finish_batch()

    def matrix(self, piece: Piece) -> ScoreMatrix:
        """The score matrix of one piece alone."""
        outputs, uses, _ = self.forward(piece.batch)
        writers = self.writers(piece.batch.size)
        bound = self.bind(outputs, piece.batch, piece.at)
        self.collect(piece, bound, outputs, uses, writers, slice(0, piece.batch.size))
        scores = ScoreMatrix([writer.scores() for writer in writers.values()])
        require_finite_scores(scores, f" of {piece.batch.where}")
        return scores

    def signals(self, bound: BoundLikelihood, uniforms: Tensor) -> Iterator[Tensor]:
        """The score columns at the network's outputs, one after another."""
        if self.kind == "exact":
            for r in range(bound.num_columns):
                yield bound.column(r)
        elif self.kind == "mc":
            for s in range(self.mc_samples):
                yield bound.sampled_score(uniforms[..., s]) / math.sqrt(self.mc_samples)
        elif bound.num_terms == 1 or self.rows == "example":
            yield bound.observed_score()
        else:
            for t in range(bound.num_terms):
                yield bound.observed_score(t)

    def curvature(self, bound: BoundLikelihood, uniforms: Tensor, changes: Tensor) -> Tensor:
        """Σ_r c_r c_rᵀ of the score columns c_r applied to changes of the outputs, ``(K, *outputs)``."""
        if self.kind == "exact":
            return bound.curvature(changes)
        return sum(along(column, changes) for column in self.signals(bound, uniforms))

    def kept_rows(self, bound: BoundLikelihood) -> Tensor:
        """Which rows carry weight, ``(n, r)``."""
        if self.kind == "exact":
            return bound.kept_rows()
        if self.kind == "mc":
            return (bound.weight > 0).any(1, keepdim=True).expand(-1, self.mc_samples)
        return bound.weight > 0 if self.rows == "term" else (bound.weight > 0).any(1, keepdim=True)

    def gradient_coefficients(self, bound: BoundLikelihood) -> Tensor | None:
        """Coefficients d, ``(n, r)``, with Uᵀd the gradient of the summed loss; None where it is not in the row space."""
        if self.kind == "exact":
            return bound.gradient_coefficients()
        found = bound.observed_coefficients() if self.kind == "empirical" else None
        if found is None or self.rows == "term":
            return found
        # a sum of scores gives the gradient back only where all terms of the example carry one weight
        shared = found.amax(1, keepdim=True)
        return shared if ((found == shared) | (found == 0)).all() else None


def require_finite_scores(scores: ScoreMatrix, where: str = "") -> None:
    """Refuse scores with NaN or infinity, seen by one cheap product."""
    if not torch.isfinite(scores.matmat(torch.ones(scores.size, 1, dtype=scores.dtype, device=scores.device))).all():
        raise NonFiniteError(
            f"The scores{where} hold NaN or infinity although parameters, inputs and outputs are finite: a derivative overflowed. Look for square "
            "roots or logarithms at 0 in the model's forward, or use a float64 model."
        )


def warn_of_underflow(scores: ScoreMatrix) -> None:
    """Name layers whose scores are so small that entries of F, or their squares in norms and couplings, fall below the smallest numbers."""
    narrow, wide = torch.finfo(scores.dtype), torch.finfo(torch.float64)
    # squares are taken in the dtype of the scores, and fourth powers in float64
    least = max((narrow.tiny / narrow.eps) ** 0.5, (wide.tiny / wide.eps) ** 0.25)
    small = [name for name, size in scores.sizes.items() if 0 < size < least]
    if small:
        warnings.warn(
            f"The scores of layer {small[0]!r}{f' and {len(small) - 1} more' if small[1:] else ''} are at most {scores.sizes[small[0]]:.1e}: entries of F there, or "
            f"their squares in norms and couplings, fall below the numbers of {str(scores.dtype).removeprefix('torch.')} and come out as 0 (from {least:.0e} on they "
            "do not). Outputs are saturated, or weights or inputs tiny. Use a float64 model, or rescale inputs, weights or outputs.",
            NumericalWarning,
            stacklevel=user_level(),
        )
