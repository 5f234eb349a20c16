"""Forward passes of a whole model, kept until the step so that they can be made once more after it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fisherlens.errors import InputError
from fisherlens.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from fisherlens.optim import texts
from fisherlens.optim.secant import random_states, set_random_states
from fisherlens.optim.tap import ScoreTap, _Hook, at_least_single
from fisherlens.scores.source import tensors_of


@dataclass(eq=False)
class Run:
    """One forward pass: what the model was given, how it ran, what it returned, and the gradient of the loss there."""

    number: int
    inputs: tuple[Any, ...]
    versions: list[int]
    random: tuple[Tensor, Tensor | None]
    autocast: tuple[bool, torch.dtype]
    outputs: Tensor | None = None
    signal: Tensor | None = None


class Replay:
    r"""Makes the backpropagated forward passes of a model once more, with the gradient that the same loss has at the new outputs.

    The loss itself is not known. But where it is the mean negative log-likelihood of a family in its natural parameters, or of a Gaussian,
    the labels drop out of the change of its gradient: p - e_y changes by the change of p. So the gradient at the new outputs is the one
    that arrived at the old ones plus that change.

    Parameters
    ----------
    model, tap
        The network, and the tap on it, whose count of passes is used and whose list takes the hooks.
    likelihood
        Categorical, Bernoulli or Gaussian without weights; with another one nothing is kept.
    """

    def __init__(self, model: nn.Module, tap: ScoreTap, likelihood: Likelihood):
        self._model, self._tap, self._likelihood = weakref.ref(model), tap, likelihood
        self._device = next(model.parameters()).device
        self._current: Run | None = None
        self._pending: dict[int, list[tuple[Run, Tensor]]] = {}
        self.runs: dict[int, Run] = {}
        self.listening = type(likelihood) in (Categorical, Bernoulli, Gaussian) and not likelihood.needs_targets
        tap.handles.append(model.register_forward_pre_hook(_Hook(self, "_enter"), with_kwargs=True))
        tap.handles.append(model.register_forward_hook(_Hook(self, "_leave")))
        for p in model.parameters():
            if p.requires_grad:
                tap.handles.append(p.register_post_accumulate_grad_hook(_Hook(self, "_confirm")))

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._current = None
        self._pending.clear()  # of backward passes that added to no .grad
        if self.listening and torch.is_grad_enabled():
            versions = [x._version for x in _tensors((args, kwargs))]
            kind = self._device.type
            autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
            self._current = Run(self._tap._number, (args, kwargs), versions, random_states(self._device), autocast)

    def _leave(self, _module: nn.Module, _args: Any, outputs: Any) -> None:
        run, self._current = self._current, None
        if run is not None and isinstance(outputs, Tensor) and outputs.requires_grad:
            run.outputs = outputs.detach()
            outputs.register_hook(partial(self._receive, run))  # the graph keeps the run alive, and nothing else does

    def _receive(self, run: Run, signal: Tensor) -> None:
        self._pending.setdefault(torch._C._current_graph_task_id(), []).append((run, signal.detach()))

    def _confirm(self, _parameter: Tensor) -> None:
        """Count the gradient of this backward pass at the outputs, now that it adds to ``.grad``."""
        for run, signal in self._pending.pop(torch._C._current_graph_task_id(), ()):
            run.signal = signal if run.signal is None else run.signal + signal
            self.runs[run.number] = run

    def clear(self) -> None:
        """Forget what backward passes have brought."""
        self.runs = {}
        self._pending.clear()

    def kept(self, numbers: Sequence[int], name: str) -> list[Run]:
        """Runs with these numbers, all of which must be there as they were; ``name`` is the method's."""
        runs = [self.runs.get(number) for number in numbers]
        if any(run is None for run in runs):
            raise InputError(texts.NO_CLOSURE.format(name=name))
        if any([x._version for x in _tensors(run.inputs)] != run.versions for run in runs):
            raise InputError(texts.WRITTEN_OVER.format(layer="(the model)"))
        return runs

    def again(self, runs: Sequence[Run], *, mean: bool, scale: float) -> None:
        """Backpropagate the passes once more, with the ``scale`` of the loss; ``.grad`` is put back afterwards, the tap has listened."""
        model = self._model()
        if model is None:
            raise InputError(texts.MODEL_GONE.format(name="An optimizer"))
        total = sum(self._bound(run.outputs).weight.sum().item() for run in runs) if mean else 1
        kept = [(p, p.grad) for p in model.parameters()]
        listening, self.listening = self.listening, False
        try:
            for p, _ in kept:
                p.grad = None
            for run in runs:
                set_random_states(run.random, self._device)
                enabled, dtype = run.autocast
                with torch.enable_grad(), torch.autocast(self._device.type, dtype=dtype, enabled=enabled):
                    outputs = model(*run.inputs[0], **run.inputs[1])
                change = self._bound(outputs).loss_gradient() - self._bound(run.outputs).loss_gradient()
                outputs.backward((run.signal + change * (scale / total)).to(outputs.dtype))
        finally:
            self.listening = listening
            for p, grad in kept:
                p.grad = grad

    def _bound(self, outputs: Tensor) -> Any:
        """The likelihood at some outputs, with labels that do not matter."""
        outputs = at_least_single(outputs)
        if isinstance(self._likelihood, Categorical):
            targets = torch.zeros_like(outputs.detach().select(self._likelihood.class_axis, 0), dtype=torch.int64)
        else:
            targets = torch.zeros_like(outputs.detach())
        return self._likelihood.bind(outputs, targets, "this forward pass")


def _tensors(inputs: Any) -> list[Tensor]:
    """Tensors among the arguments of a call, if there are any."""
    try:
        return tensors_of(inputs)
    except InputError:
        return []
