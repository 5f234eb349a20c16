"""Capture once: inputs and output scores of every layer over the whole data set, in the representation that the plan chose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisherlens._progress import progress as progress_bar
from fisherlens.errors import InputError
from fisherlens.layout import FunctionModel, Layout
from fisherlens.likelihoods import BoundLikelihood, Likelihood
from fisherlens.scores.checks import LOW_PRECISION, check_model
from fisherlens.scores.collector import Collector, require_finite_scores, warn_of_underflow
from fisherlens.scores.matrix import ScoreMatrix
from fisherlens.scores.plan import Plan, Sizes, make_plan
from fisherlens.scores.recorder import Recorder, Unexplained, leaf_gradients, preserved_randomness
from fisherlens.scores.replay import Replay
from fisherlens.scores.source import Batch, Source
from fisherlens.scores.streamed import StreamedMatrix
from fisherlens.scores.tangents import joins, settle_products
from fisherlens.scores.witness import Witness, add

# Examples on which a model is checked: enough that a wrong order of them shows (our choice).
_SAMPLE = 8
KINDS = ("exact", "mc", "empirical")


@dataclass
class Capture:
    """All that a Fisher needs to know of a network on data.

    ``gradient`` is the mean gradient of the negative log-likelihood and ``gradient_coefficients`` (rows,) its row-space form
    W g = Uᵀ d; both are None where targets are missing, the second also for sampled labels.
    ``bound`` is the likelihood at the outputs of each batch, from which labels can be drawn again; empty where scores are not kept.
    ``replay`` is the pass once more, for the inputs and output scores of layers that are kept as something else.
    """

    layout: Layout
    plan: Plan
    scores: ScoreMatrix
    total_weight: float
    kept_terms: int
    rank_per_term: int
    gradient: Tensor | None
    gradient_coefficients: Tensor | None
    bound: list[BoundLikelihood]
    parameters: Tensor
    replay: Replay


def capture(
    model: nn.Module | Callable[[dict[str, Tensor], Any], Tensor],
    data: Any,
    likelihood: Likelihood,
    kind: str,
    *,
    params: Any = None,
    mc_samples: int = 1,
    mc_sampling: str = "independent",
    rows: str = "term",
    seed: int = 0,
    budget: int,
    progress: bool | None = None,
    check_deterministic: bool = True,
) -> Capture:
    """Pass over the data once and keep every layer's scores; see :class:`fisherlens.Fisher` for the arguments."""
    model, params = as_module(model, params)
    layout = Layout.from_model(model, params)
    check_model(model, layout)
    first = dict(model.named_parameters())[layout.names[0]]
    like = torch.empty(0, dtype=torch.float32 if first.dtype in LOW_PRECISION else first.dtype, device=first.device)
    with torch.inference_mode(False), preserved_randomness(like.device):
        source = Source(data, like.device, check=check_deterministic)
        sample = first_examples(source)
        without_rule: set[str] = set()
        while True:
            recorder = Recorder(model, layout, check=check_deterministic)
            recorder.release(without_rule)
            collector = Collector(
                recorder, likelihood, kind, mc_samples, sample, like, source.n_data, mc_sampling, rows
            )
            sizes = Sizes(source.n_data, collector.r, like.dtype, collector.graph_bytes)
            plan = make_plan(collector.layout.layers, collector.uses, sizes, budget)
            matrix_type = None
            if plan.streamed or plan.linearised:
                plan, matrix_type = settle_products(collector, plan, sizes, sample, budget)
            if matrix_type is not None:
                collector.joins = joins(recorder, source, sample)
            collector.prepare(plan, budget, source.sizes)
            try:
                return _first_pass(collector, source, matrix_type, seed, budget, progress)
            except (
                Unexplained
            ) as found:  # a layer was not used as on the sample: once more, with one gradient per example
                without_rule.update(found.layers)


def as_module(model: nn.Module | Callable[[dict[str, Tensor], Any], Tensor], params: Any) -> tuple[nn.Module, Any]:
    """A plain function ``f(params, inputs)`` and its dict of tensors as a module; a module and its selection as they are."""
    if isinstance(params, Mapping):
        if isinstance(model, nn.Module):
            raise InputError(
                "params is a dict of tensors, which goes with a function f(params, inputs); for a module give names or patterns."
            )
        return FunctionModel(model, params), None
    if not isinstance(model, nn.Module) and callable(model) and not isinstance(model, type):
        raise InputError(
            f"model is a plain function ({getattr(model, '__name__', type(model).__name__)}); pass its parameters too: fl.Fisher(f, data, params={{'w': ...}}, …) "
            "with f(params, inputs)."
        )
    return model, params


def first_examples(source: Source) -> Batch:
    """The first few examples of the first batch that has more than one: with one alone, no mix-up of examples shows."""
    several = [size > 1 for size in source.sizes if size]
    skip = several.index(True) if any(several) else 0
    return next(batch for k, batch in enumerate(source.batches()) if k == skip).part(0, _SAMPLE)


def _first_pass(
    collector: Collector,
    source: Source,
    matrix_type: type[StreamedMatrix] | None,
    seed: int,
    budget: int,
    progress: bool | None,
) -> Capture:
    """Pass over the data: scores if they are kept, and in any case weights, gradient and outputs."""
    like, n, plan = collector.like, source.n_data, collector.plan
    writers = collector.writers(n) if matrix_type is None else None
    witness = Witness(collector) if matrix_type is None else None
    gradient, labelled = torch.zeros(collector.layout.n_params, dtype=torch.float64, device=like.device), True
    coefficients, bounds, weights, kept = [], [], [], []
    with progress_bar(n, desc="Fisher scores", enabled=progress) as bar:
        for piece in collector.pieces(source, seed):
            outputs, uses, leaves = collector.forward(piece.batch)
            bound = collector.bind(outputs, piece.batch, piece.at)
            if writers is not None:
                collector.collect(piece, bound, outputs, uses, writers, piece.at)
            labelled = labelled and piece.batch.targets is not None
            d = collector.gradient_coefficients(bound) if labelled else None
            # coefficients of a label that the model takes for impossible are infinite
            known = d is not None and bool(torch.isfinite(d).all())
            if witness is not None:
                witness.know(d) if known else witness.ask(piece, bound, outputs, leaves)
            if labelled:
                of_loss = leaf_gradients(outputs, leaves, bound.loss_gradient())
                add(gradient, of_loss)
                coefficients.append(d)
                if witness is not None and not known:
                    witness.leave_out(of_loss)
            if writers is not None:  # outputs may be as large as the data, so without scores they are not kept either
                bounds.append(bound)
            weights.append(bound.weight)
            kept.append(collector.kept_rows(bound))
            bar.update(piece.batch.size)
    weight = torch.cat(weights)
    total = weight.sum().item()
    if not total > 0:
        raise InputError(
            "Every term has weight 0 (all labels are ignored, or their class weights are 0), so F is not defined. Check ignore_index and weight."
        )
    in_row_space = labelled and all(d is not None for d in coefficients)
    mask = torch.cat(kept).reshape(-1)
    mask = None if mask.all() else mask
    if matrix_type is not None:
        matrix: ScoreMatrix = matrix_type(collector, source, seed, budget, mask)
    else:
        matrix = ScoreMatrix([writer.scores() for writer in writers.values()], mask, budget)
        require_finite_scores(matrix)
        witness.require(matrix, gradient)
        warn_of_underflow(matrix)
    leaves = collector.recorder.leaves()
    parameters = torch.cat([leaf.detach().reshape(-1).to(like.dtype) for leaf in leaves.values()]).clone()
    return Capture(
        collector.layout,
        plan,
        matrix,
        total,
        int((weight > 0).sum().item()),
        collector.rank_per_term,
        (gradient / total).to(like.dtype) if labelled else None,
        torch.cat(coefficients).reshape(-1) if in_row_space else None,
        bounds,
        parameters,
        Replay(collector, source, seed, parameters, weight.double().sum(1)),
    )
