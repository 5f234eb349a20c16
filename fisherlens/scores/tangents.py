"""Whether torch differentiates a network along a direction as it differentiates backwards, and products for those where it does not."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from fisherlens.scores.batch import Batch, joined
from fisherlens.scores.checks import LOW_PRECISION
from fisherlens.scores.collector import Collector
from fisherlens.scores.linearised import Graph, forward_derivatives
from fisherlens.scores.plan import Plan, Sizes, make_plan
from fisherlens.scores.recorder import Recorder, leaf_gradients, unexplained
from fisherlens.scores.source import Source
from fisherlens.scores.streamed import StreamedMatrix

# Batches of one example that are tried together (our choice).
_TRIED = 8


class CollectedMatrix(StreamedMatrix):
    """Streamed scores of a network that cannot be differentiated along a direction: each product collects the rows of every piece."""

    def _linear(self, vectors: int) -> bool:
        return False


def settle_products(
    collector: Collector, plan: Plan, sizes: Sizes, sample: Batch, budget: int
) -> tuple[Plan, type[StreamedMatrix]]:
    """The plan of scores that are not kept, and how their products are taken, after a test on a few examples."""
    if plan.linearised and not linearises(collector.recorder, sample, keep=True):
        plan = make_plan(collector.layout.layers, collector.uses, replace(sizes, graph_bytes=2**62), budget)
    if not plan.streamed:
        return plan, StreamedMatrix
    recorder = collector.recorder
    recorder.layer_rules = linearises(recorder, sample, keep=False)
    if recorder.layer_rules or linearises(recorder, sample, keep=False):
        collector.pass_bytes = _pass_bytes(collector.recorder, sample)
        return plan, StreamedMatrix
    why = "; collected in each product, as a derivative along a direction does not exist or is not that of the gradient"
    share = (3 + sizes.n_columns) / 3  # of a gradient: one forward and R + 2 backward passes of half its cost each
    entries = [
        replace(entry, product_flops=entry.gradient_flops * share, reason=entry.reason + why) for entry in plan.layers
    ]
    return Plan(entries, plan.n_data, plan.n_columns, plan.budget, plan.scores_nbytes), CollectedMatrix


def joins(recorder: Recorder, source: Source, sample: Batch) -> bool:
    """Whether the model gives several small batches as one what it gives each.

    Examples of a batch were found not to depend on each other where the sample holds several. Of a model that was only ever given one example
    at a time, which it may treat as it likes (a norm of the whole input, say), some are tried together.
    """
    if sample.size > 1:
        return True
    several = next((batch for batch in joined(source.batches(), _TRIED) if batch.size > 1), None)
    if several is None:
        return True
    try:
        together, uses, leaves = recorder.forward(several)
        each = torch.cat([recorder.forward(several.part(i, i + 1))[0] for i in range(several.size)])
        of_examples = all(use.of_examples(several.size) for found in uses.values() for use in found)
        tolerance = 5e-2 if next(iter(leaves.values())).dtype in LOW_PRECISION else 1e-5
        same = together.shape == each.shape and bool((together - each).abs().max() <= tolerance * each.abs().max())
        return of_examples and same and not unexplained(recorder, several)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a model raises that takes one example only
        return False


def _pass_bytes(recorder: Recorder, sample: Batch) -> int:
    """Bytes per example that a pass in forward mode holds, with the derivatives along one vector.

    By torch's own rules, whose graph holds the derivatives too: with ours they are free sooner, but what a pass then makes of them takes
    as much again (measured on five networks).
    """
    tangents = {name: torch.zeros_like(leaf)[None] for name, leaf in recorder.leaves().items()}
    plain = copy(recorder)
    plain.layer_rules = False

    def run(leaves: dict[str, Tensor]) -> tuple[Graph, Tensor]:
        return forward_derivatives(lambda values: plain.outputs_with_graph(sample, values), leaves, tangents)

    return plain.graph_bytes(sample, run, tangents.values())


def linearises(recorder: Recorder, sample: Batch, *, keep: bool) -> bool:
    """Whether ⟨u, J v⟩ = ⟨Jᵀ u, v⟩ on a few examples, with J v as products take it and Jᵀ u from plain backpropagation.

    It is not so where an operation has neither a forward rule nor a second derivative, where a ``torch.autograd.Function`` hides
    what its backward depends on, under ``torch.no_grad`` (which forward mode ignores) and under activation checkpointing.
    ``keep`` tests the kept graph, otherwise the pass in forward mode, with one vector and with two together.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(like: Tensor, k: int) -> Tensor:
        drawn = torch.randn(k, *like.shape, generator=generator, dtype=torch.float64, device="cpu")
        return drawn.to(like.device, like.dtype)

    plain, _, leaves = recorder.forward(sample)
    dtype = next(iter(leaves.values())).dtype
    tolerance = 5e-2 if dtype in LOW_PRECISION else 1e-3 if dtype == torch.float32 else 1e-8
    for k in (1, 2):
        tangents, signals = {name: noise(leaf, k) for name, leaf in leaves.items()}, noise(plain, k)
        try:
            changes, backs = _derivatives(recorder, sample, tangents, signals, keep)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever torch or the model raises where there is no rule; the products then do without
            return False
        for i in range(k):
            truth = _flat(leaf_gradients(plain, leaves, signals[i], keep=True).values())
            v, u, change = _flat(t[i] for t in tangents.values()), _flat([signals[i]]), _flat([changes[i]])
            gap, scale = (u @ change - truth @ v).abs(), u.norm() * change.norm() + truth.norm() * v.norm()
            back_gap = (_flat(back[i] for back in backs) - truth).abs().max()
            if not (gap <= tolerance * scale and back_gap <= tolerance * truth.abs().max()):  # also where one is NaN
                return False
    return True


def _derivatives(
    recorder: Recorder, sample: Batch, tangents: dict[str, Tensor], signals: Tensor, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """J v ``(K, *outputs)`` and Jᵀ u ``(K, *shape)`` per parameter, as streamed products take them."""
    leaves = recorder.leaves()
    if keep:
        graph = Graph(recorder.outputs_with_graph(sample, leaves), leaves, keep=True)
        return graph.derivatives(tangents), graph.pull_backs(signals)
    graph, changes = forward_derivatives(lambda values: recorder.outputs_with_graph(sample, values), leaves, tangents)
    return changes, graph.pull_backs(signals)


def _flat(pieces: Iterable[Tensor]) -> Tensor:
    return torch.cat([piece.reshape(-1).double() for piece in pieces])
