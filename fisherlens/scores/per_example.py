"""Score rows of any parameter: one gradient per example and column, for what no layer rule explains."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import grad, vmap

from fisherlens.errors import InputError
from fisherlens.layout import LayerInfo
from fisherlens.scores.source import Batch

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
        return {layer.name: [found[p.name].flatten(1) for p in layer.parameters] for layer in self.layers}

    def _leaves(self) -> dict[str, Tensor]:
        leaves = self._recorder.leaves()
        return {name: leaves[name].detach() for name in self._names}

    def _all(self, batch: Batch, signal: Tensor) -> Mapping[str, Tensor]:
        if self._vectorised:
            try:
                return self._vmapped(batch, signal)
            except (RuntimeError, NotImplementedError, ValueError, TypeError):
                self._vectorised = False  # an operation without a batching rule, or control flow that depends on data
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
            name: torch.zeros_like(value) if g is None else g
            for (name, value), g in zip(values.items(), grads, strict=True)
        }


def _split(batch: Batch) -> tuple[list[tuple[Tensor, bool]], Any]:
    """Tensors of the inputs with "has the example axis", and how to put others in their places."""
    inputs = batch.inputs
    if isinstance(inputs, Tensor):
        return [(inputs, True)], lambda tensors: tensors[0]
    keys = list(inputs) if isinstance(inputs, Mapping) else list(range(len(inputs)))
    values = [inputs[key] for key in keys]
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    if not places:
        raise InputError("The inputs of a batch must hold at least one tensor.")
    leaves = [(values[i], values[i].ndim > 0 and values[i].shape[0] == batch.size) for i in places]

    def rebuild(tensors: Sequence[Tensor]) -> Any:
        filled = list(values)
        for i, tensor in zip(places, tensors, strict=True):
            filled[i] = tensor
        return dict(zip(keys, filled, strict=True)) if isinstance(inputs, Mapping) else tuple(filled)

    return leaves, rebuild
