"""Score rows of any parameter: one gradient per example and column, for what no layer rule explains."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import grad, vmap

from fisherlens.layout import LayerInfo
from fisherlens.scores.batch import Batch, map_tensors, tensors_of

# Examples that one vectorised pass takes at most: it holds every activation of each of them.
_CHUNK = 64


class Runner(Protocol):
    """Runs the model on a batch with some parameters replaced."""

    def leaves(self) -> dict[str, Tensor]: ...

    def outputs(self, batch: Batch, values: Mapping[str, Tensor]) -> Tensor: ...


class PerExample:
    """Rows of U for layers without a rule: attention, recurrent cells, tied weights, parameters used in functional calls.

    Vectorised over examples with ``torch.func``; where an operation has no batching rule, one example at a time with
    plain automatic differentiation. Both are exact.

    Parameters
    ----------
    recorder
        Runs the model with replaced parameters.
    layers
        The layers whose rows are wanted.
    """

    def __init__(self, recorder: Runner, layers: Sequence[LayerInfo]):
        self._recorder = recorder
        self.layers = tuple(layers)
        self._names = [p.name for layer in layers for p in layer.parameters]
        self._vectorised = True

    def rows(self, batch: Batch, signal: Tensor) -> dict[str, list[Tensor]]:
        """Per layer, one ``(n, numel)`` piece per parameter: the gradient of ⟨signal_n, f(x_n)⟩ for every example n."""
        found = self._all(batch, signal)
        return {layer.name: [found[p.name].reshape(batch.size, -1) for p in layer.parameters] for layer in self.layers}

    def _leaves(self) -> dict[str, Tensor]:
        leaves = self._recorder.leaves()
        return {name: leaves[name].detach() for name in self._names}

    def _all(self, batch: Batch, signal: Tensor) -> Mapping[str, Tensor]:
        if self._vectorised:
            try:
                return self._vmapped(batch, signal)
            except torch.OutOfMemoryError:
                raise
            except (
                Exception
            ):  # an operation without a batching rule, or control flow that depends on data; the plain way tells more
                self._vectorised = False
        pieces = [self._one(batch.part(i, i + 1), signal[i : i + 1]) for i in range(batch.size)]
        return {name: torch.stack([piece[name] for piece in pieces]) for name in self._names}

    def _vmapped(self, batch: Batch, signal: Tensor) -> Mapping[str, Tensor]:
        leaves, rebuild = _split(batch)
        axes = tuple(0 if batched else None for _, batched in leaves)

        def inner(values: dict[str, Tensor], s: Tensor, *tensors: Tensor) -> Tensor:
            whole = [x[None] if axis == 0 else x for x, axis in zip(tensors, axes, strict=True)]
            return (self._recorder.outputs(replace(batch, inputs=rebuild(whole)), values)[0] * s).sum()

        # no_grad concerns the surrounding graph, that of parameters which are not asked for; grad() records its own
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "There is a performance drop"
            )  # right all the same, and nothing to be done
            rows = vmap(grad(inner), in_dims=(None, 0, *axes), chunk_size=_CHUNK)
            return rows(self._leaves(), signal, *(x for x, _ in leaves))

    def _one(self, batch: Batch, signal: Tensor) -> Mapping[str, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            values = {name: value.requires_grad_() for name, value in self._leaves().items()}
            outputs = self._recorder.outputs(batch, values)
            if not outputs.requires_grad:
                return {name: torch.zeros_like(value) for name, value in values.items()}
            grads = torch.autograd.grad(outputs, list(values.values()), signal, allow_unused=True)
        return {
            name: torch.zeros_like(value) if g is None else g.to_dense() if g.is_sparse else g
            for (name, value), g in zip(values.items(), grads, strict=True)
        }


def _split(batch: Batch) -> tuple[list[tuple[Tensor, bool]], Callable[[Sequence[Tensor]], Any]]:
    """Tensors of the inputs with "has the example axis", and how to put others in their places."""
    leaves = [(x, batch.counts_examples(x)) for x in tensors_of(batch.inputs)]

    def rebuild(tensors: Sequence[Tensor]) -> Any:
        following = iter(tensors)
        return map_tensors(batch.inputs, lambda _: next(following))

    return leaves, rebuild
