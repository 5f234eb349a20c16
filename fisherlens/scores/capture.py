"""Capture once: inputs and output scores of every layer over the whole data set, in the representation that the plan chose."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisherlens._progress import progress as progress_bar
from fisherlens.errors import InputError, NonFiniteError
from fisherlens.layout import Layout
from fisherlens.likelihoods import BoundLikelihood, Likelihood
from fisherlens.linalg.memory import Workspace
from fisherlens.scores.matrix import ScoreMatrix
from fisherlens.scores.per_example import PerExample
from fisherlens.scores.plan import Plan, make_plan
from fisherlens.scores.recorder import (
    Recorder,
    Use,
    backward,
    check_model,
    flattened_map,
    preserved_randomness,
    probe,
    unexplained,
)
from fisherlens.scores.source import Source
from fisherlens.scores.writers import Writer

# Larger passes gain nothing on a CPU and lose the caches; on a GPU this still fills the device (our choice).
_TRANSIENT = 192 * 2**20
KINDS = ("exact", "mc", "empirical")


@dataclass
class Capture:
    """All that a Fisher needs to know of a network on data.

    ``gradient`` is the mean gradient of the negative log-likelihood and ``gradient_coefficients`` (rows,) its row-space form
    W g = Uᵀ d; both are None where targets are missing, the second also for sampled labels.
    ``bound`` is the likelihood at the outputs of each batch, from which labels can be drawn again.
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


def _signals(bound: BoundLikelihood, kind: str, uniforms: Tensor | None) -> Iterator[Tensor]:
    """The score columns of one batch at the network's outputs, one after another."""
    if kind == "exact":
        for r in range(bound.num_columns):
            yield bound.column(r)
    elif kind == "mc":
        draws = uniforms.shape[-1]
        for s in range(draws):
            yield bound.sampled_score(uniforms[..., s]) / math.sqrt(draws)
    elif bound.num_terms == 1:
        yield bound.observed_score()
    else:
        for t in range(bound.num_terms):
            yield bound.observed_score(t)


def _num_columns(bound: BoundLikelihood, kind: str, mc_samples: int) -> int:
    return {"exact": bound.num_columns, "mc": mc_samples, "empirical": bound.num_terms}[kind]


def _kept(bound: BoundLikelihood, kind: str, mc_samples: int) -> Tensor:
    if kind == "exact":
        return bound.kept_rows()
    if kind == "mc":
        return (bound.weight > 0).any(1, keepdim=True).expand(-1, mc_samples)
    return bound.weight > 0


def capture(
    model: nn.Module,
    data: Any,
    likelihood: Likelihood,
    kind: str,
    *,
    params: Any = None,
    mc_samples: int = 1,
    seed: int = 0,
    budget: int,
    progress: bool | None = None,
) -> Capture:
    """Pass over the data once and keep every layer's scores; see :class:`fisherlens.Fisher` for the arguments."""
    layout = Layout.from_model(model, params)
    check_model(model, layout)
    first_parameter = dict(model.named_parameters())[layout.names[0]]
    with preserved_randomness(first_parameter.device):
        source = Source(data, first_parameter.device)
        return _capture(model, layout, source, likelihood, kind, mc_samples, seed, budget, first_parameter, progress)


def _capture(
    model: nn.Module,
    layout: Layout,
    source: Source,
    likelihood: Likelihood,
    kind: str,
    mc_samples: int,
    seed: int,
    budget: int,
    like: Tensor,
    progress: bool | None,
) -> Capture:
    recorder = Recorder(model, layout)
    first = next(source.batches())
    sample = first.part(0, 3)
    outputs = probe(recorder, sample)
    recorder.release(unexplained(recorder, sample))
    uses = recorder.forward(sample)[1]
    bound = likelihood.bind(outputs, _checked_targets(likelihood, kind, sample.targets), sample.where)
    n, r = source.n_data, _num_columns(bound, kind, mc_samples)
    maps = {name: flattened_map(u[0]) for name, u in uses.items() if u and layout.layer(name).kind == "dense"}
    layout = layout.with_input_maps({name: found for name, found in maps.items() if found})
    recorder.layout = layout
    plan = make_plan(layout.layers, uses, n, r, budget, like.dtype)
    like = like.detach()
    workspace = Workspace(limit=budget // 4)
    writers = {
        layer.name: Writer(layer, entry, uses.get(layer.name, []), n, r, like, workspace)
        for layer, entry in zip(layout.layers, plan, strict=True)
    }
    ruleless = [layer for layer in layout.layers if plan[layer.name].storage == "per example"]
    per_example = PerExample(recorder.model, ruleless) if ruleless else None
    step = _micro_batch(uses, r, sample.size, budget, like.dtype)
    rank_per_term, output_shape = likelihood.rank_per_term(outputs.shape), outputs.shape[1:]

    generator = torch.Generator().manual_seed(seed)
    gradient: Tensor | None = torch.zeros(layout.n_params, dtype=torch.float64, device=like.device)
    coefficients, bounds, weights, kept = [], [], [], []
    done = 0
    with progress_bar(n, desc="Fisher scores", enabled=progress) as bar:
        for whole in source.batches():
            for begin in range(0, whole.size, step):
                batch = whole.part(begin, begin + step)
                outputs, uses, leaves = recorder.forward(batch)
                if outputs.shape[1:] != output_shape or outputs.shape[0] != batch.size:
                    raise InputError(
                        f"The outputs of {batch.where} have shape {tuple(outputs.shape)}; expected ({batch.size}, …) with {tuple(output_shape)} per "
                        "example as in the first batch. Pad examples to one size, and keep the batch on the first axis."
                    )
                bound = likelihood.bind(outputs, _checked_targets(likelihood, kind, batch.targets), batch.where)
                uniforms = torch.rand(
                    batch.size, bound.num_uniforms, mc_samples, generator=generator, dtype=torch.float64
                )
                at = slice(done, done + batch.size)
                for name, writer in writers.items():
                    writer.start(uses.get(name, []), at)
                for column, signal in enumerate(_signals(bound, kind, uniforms)):
                    for name, scores in backward(outputs, uses, signal).items():
                        writers[name].take(column, scores)
                    if per_example is not None:
                        for name, pieces in per_example.rows(batch, signal).items():
                            writers[name].take_rows(column, pieces)
                for writer in writers.values():
                    writer.finish_batch()
                if batch.targets is None:
                    gradient = None
                if gradient is not None:
                    gradient += _batch_gradient(outputs, leaves, bound)
                    coefficients.append(_gradient_coefficients(bound, kind))
                bounds.append(bound)
                weights.append(bound.weight)
                kept.append(_kept(bound, kind, mc_samples))
                done += batch.size
                bar.update(batch.size)
    weight = torch.cat(weights)
    total = weight.sum().item()
    if not total > 0:
        raise InputError(
            "Every term has weight 0 (all labels are ignored, or their class weights are 0), so F is not defined. Check ignore_index and weight."
        )
    mask = torch.cat(kept).reshape(-1)
    matrix = ScoreMatrix([writer.scores() for writer in writers.values()], None if mask.all() else mask)
    if not torch.isfinite(matrix.matmat(torch.ones(layout.n_params, 1, dtype=like.dtype, device=like.device))).all():
        raise NonFiniteError(
            "The scores hold NaN or infinity although parameters, inputs and outputs are finite: a derivative overflowed. Look for square roots or "
            "logarithms at 0 in the model's forward, or use a float64 model."
        )
    return Capture(
        layout,
        plan,
        matrix,
        total,
        int((weight > 0).sum().item()),
        rank_per_term,
        None if gradient is None else (gradient / total).to(like.dtype),
        torch.cat(coefficients).reshape(-1) if gradient is not None and kind != "mc" else None,
        bounds,
    )


def _checked_targets(likelihood: Likelihood, kind: str, targets: Any) -> Any:
    if targets is None and (kind == "empirical" or likelihood.needs_targets):
        why = (
            "the empirical kind takes scores at observed labels"
            if kind == "empirical"
            else "class weights follow the observed label"
        )
        raise InputError(f"targets are None, but {why}. Give data as (inputs, targets), or use kind='exact'.")
    return targets


def _batch_gradient(outputs: Tensor, leaves: dict[str, Tensor], bound: BoundLikelihood) -> Tensor:
    if not outputs.requires_grad:
        return torch.zeros((), dtype=torch.float64, device=outputs.device)
    grads = torch.autograd.grad(outputs, list(leaves.values()), bound.loss_gradient(), allow_unused=True)
    flat = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves.values(), grads, strict=True)]
    return torch.cat([g.reshape(-1) for g in flat]).double()


def _gradient_coefficients(bound: BoundLikelihood, kind: str) -> Tensor:
    if kind == "exact":
        return bound.gradient_coefficients()
    return bound.weight.sqrt().to(bound.outputs.dtype)


def _micro_batch(uses: dict[str, list[Use]], r: int, size: int, budget: int, dtype: torch.dtype) -> int:
    """Examples per pass such that the graph and the score buffers stay under 192 MiB and an eighth of the budget."""
    per_example = 0
    for layer_uses in uses.values():
        for use in layer_uses:
            kernel = math.prod(getattr(use.module, "kernel_size", (1,)))
            per_example += use.inputs.numel() // size * kernel + (r + 4) * use.output_shape.numel() // size
    return max(1, min(4096, min(budget // 8, _TRANSIENT) // max(1, per_example * dtype.itemsize)))
