"""Listen to the forward and backward passes that the user runs: what each layer reads, and the scores that reach its output."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from fisherlens.errors import InputError
from fisherlens.layout import ROOT, LayerInfo
from fisherlens.likelihoods import Likelihood
from fisherlens.optim import texts
from fisherlens.optim.graph import Ends, used_past_modules
from fisherlens.scores.recorder import Use, computed_by, flattened_map


@dataclass(eq=False)
class Call:
    """One call of a layer's module in one forward pass, and the score that its output received."""

    layer: LayerInfo
    number: int  # of the forward pass
    use: Use
    sampled: Tensor | None = None
    weight: float | None = None  # total weight W of the sampled labels of this forward pass
    score: Tensor | None = None


@dataclass(eq=False)
class Pass:
    """One forward pass of which a part, at least, was backpropagated into ``.grad``.

    Attributes
    ----------
    calls
        Layer name -> the calls of its module whose output received a score, (n, ...) at the output.
    weight
        Total weight W of the terms of sampled labels; None for the user's own loss.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    weight: float | None = None

    def count_examples(self) -> int:
        """Count the examples, on which all layers must agree."""
        counts: dict[str, int] = {}
        for name, calls in self.calls.items():
            for call in calls:
                kernel = getattr(call.use.module, "kernel_size", None)
                shape, wanted = call.use.inputs.shape, 2 if kernel is None else len(kernel) + 2
                if len(shape) < 2 or (kernel is not None and len(shape) != wanted):
                    least = f"at least {wanted}" if kernel is None else str(wanted)
                    raise InputError(
                        texts.NOT_BATCHED.format(layer=name, type=call.layer.type_name, wanted=least, got=tuple(shape))
                    )
                counts.setdefault(name, shape[0])
                if shape[0] != next(iter(counts.values())):
                    counts[name] = shape[0]
                    listed = ", ".join(f"{count} at {layer!r}" for layer, count in counts.items())
                    raise InputError(texts.OTHER_COUNT.format(counts=listed))
        return next(iter(counts.values()))


class _Hook:
    """A hook that knows the tap only weakly: a copied or pickled model carries one that does nothing."""

    def __init__(self, tap: ScoreTap | None = None, method: str = "", *arguments: Any):
        self._tap = (lambda: None) if tap is None else weakref.ref(tap)
        self._method, self._arguments = method, arguments

    def __call__(self, *received: Any) -> Any:
        tap = self._tap()
        return None if tap is None else getattr(tap, self._method)(*self._arguments, *received)

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Hook, ()


class ScoreTap:
    """Collects the passes that end up in the ``.grad`` of a model's parameters, and hands them over one by one.

    A pass counts where a backward pass adds to ``.grad``: evaluations, ``torch.autograd.grad`` and an analysis of the
    same model by a Fisher leave nothing here. Calls of one module within one forward pass of the model are one use of
    its parameters; two forward passes are different examples.

    Parameters
    ----------
    model
        The network; each layer's module gets a forward hook, one of its parameters a hook on accumulation.
    layers
        The layers to listen to, dense and convolutions.
    receive
        Called with each finished :class:`Pass`, at the next forward pass or by :meth:`flush`; a bound method, known weakly.
    likelihood, generator
        For sampled labels: the score at labels drawn from the model replaces that of the loss. None for the loss itself.

    Attributes
    ----------
    listening : bool
        False keeps no scores, only the number of examples.
    maps : dict
        Dense layer -> (C, H, W) flattened to feed it, or None, as its first forward pass showed.
    past : set of str
        Layers with a parameter that the first forward pass with gradients used past its module too, tied weights for instance.
    weigh : WeakMethod or None
        Called with layer, module, input and output of each call that records gradients; a tensor that it returns takes the
        place of the output.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[LayerInfo],
        receive: Callable[[Pass], None],
        likelihood: Likelihood | None = None,
        generator: torch.Generator | None = None,
    ):
        self.listening = True
        self.maps: dict[str, tuple[int, int, int] | None] = {}
        self.past: set[str] = set()
        self._ends: dict[str, list[Ends]] | None = {}  # of the calls of the first forward pass, None when it is over
        self.weigh: weakref.WeakMethod | None = None
        self._receive_pass = weakref.WeakMethod(receive)
        self._likelihood, self._generator = likelihood, generator
        self._number, self._inside, self._sampling = 0, False, False
        self._pending: dict[tuple[int, str], list[tuple[Call, Tensor]]] = {}
        self._passes: dict[int, Pass] = {}
        self._edges: list[tuple[Call, GradientEdge]] = []  # not in a Call: the graph holds those, and would hold itself
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
        self.handles: list[RemovableHandle] = [model.register_forward_pre_hook(_Hook(self, "_enter"))]
        self._own: dict[str, list[tuple[str, weakref.ref[nn.Parameter]]]] = {}
        for layer in layers:
            module = modules["" if layer.name == ROOT else layer.name]
            self._own[layer.name] = [(info.leaf, weakref.ref(parameters[info.name])) for info in layer.parameters]
            # first of all hooks: what others make of the output is no part of the layer
            hook = _Hook(self, "_record", layer)
            self.handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))
            first = parameters[layer.parameters[0].name]
            self.handles.append(first.register_post_accumulate_grad_hook(_Hook(self, "_confirm", layer.name)))
        self.handles.append(model.register_forward_hook(_Hook(self, "_leave")))

    # --- forward -----------------------------------------------------------------------------------------------------

    def _enter(self, _module: nn.Module, _inputs: Any) -> None:
        if torch.is_grad_enabled():
            self._inside = False
            self._begin()
            self._inside = True

    def _begin(self) -> None:
        """Start a new pass, unless this is a recomputation within a backward pass (activation checkpointing)."""
        if torch._C._current_graph_task_id() == -1:
            self.flush()
            self._pending.clear()  # of backward passes that added to no .grad
            self._edges.clear()
            self._number += 1
            if self._ends:  # a forward pass that failed
                self._ends.clear()

    def _record(
        self, layer: LayerInfo, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        if not output.requires_grad:
            return None
        if any(getattr(module, leaf) is not parameter() for leaf, parameter in self._own[layer.name]):
            return None  # a functional call with other parameters: not what the optimizer moves
        if not self._inside and self._passes:
            self._begin()
        x = args[0] if args else next(iter(kwargs.values()))
        if layer.kind == "dense" and layer.name not in self.maps:
            self.maps[layer.name] = flattened_map(Use(module, x, x._version, None, output.shape))
        weigh = None if self.weigh is None else self.weigh()
        instead = None if weigh is None else weigh(layer, module, x, output)
        output = output if instead is None else instead
        if self._ends is not None and self._inside and not torch.compiler.is_compiling():
            self._ends.setdefault(layer.name, []).append((output.grad_fn, x.grad_fn))
        source = output if torch.compiler.is_compiling() else computed_by(output)
        kept = x.detach()  # without history, but it shares the version counter
        call = Call(layer, self._number, Use(module, kept, kept._version, None, output.shape))
        if self._likelihood is not None and self._inside and self.listening:
            self._edges.append((call, get_gradient_edge(source)))
        source.register_hook(partial(self._receive, call))
        return instead

    def _leave(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        inside, self._inside = self._inside, False
        edges, self._edges = self._edges, []
        compiling = torch.compiler.is_compiling()
        if inside and self._ends is not None and (compiling or self._ends):
            ends, self._ends = self._ends, None  # a compiled graph does not show what is used where
            if not compiling:
                owners = {parameter(): name for name, own in self._own.items() for _, parameter in own}
                self.past = used_past_modules(output, ends, owners)
        if inside and edges and torch.is_grad_enabled():
            self._sample(output, edges)

    def _sample(self, outputs: Any, edges: list[tuple[Call, GradientEdge]]) -> None:
        """Backpropagate the scores of sampled labels while the graph is there."""
        if not isinstance(outputs, Tensor):
            raise InputError(texts.NO_TENSOR.format(got=type(outputs).__name__))
        bound = self._likelihood.bind(at_least_single(outputs), None, "this forward pass")
        uniforms = draw_uniforms(len(outputs), bound.num_uniforms, self._generator)
        signal, weight = bound.sampled_score(uniforms).to(outputs.dtype), bound.weight.sum().item()
        self._sampling = True
        try:
            places = [edge for _, edge in edges]
            scores = torch.autograd.grad(outputs, places, signal, retain_graph=True, allow_unused=True)
        finally:
            self._sampling = False
        for (call, _), score in zip(edges, scores, strict=True):
            none = torch.zeros((), dtype=signal.dtype, device=signal.device)
            call.sampled = none if score is None else score.reshape(call.use.output_shape)
            call.weight = weight

    # --- backward ----------------------------------------------------------------------------------------------------

    def _receive(self, call: Call, score: Tensor) -> None:
        if not self._sampling:
            key = (torch._C._current_graph_task_id(), call.layer.name)
            self._pending.setdefault(key, []).append((call, score.detach().reshape(call.use.output_shape)))

    def _confirm(self, name: str, _parameter: Tensor) -> None:
        """Count what this backward pass brought to a layer, now that it has been added to ``.grad``."""
        for call, score in self._pending.pop((torch._C._current_graph_task_id(), name), ()):
            one = self._passes.setdefault(call.number, Pass(weight=call.weight))
            if call.sampled is None:  # of a part of the model, or within a reentrant checkpoint
                one.weight = None
            calls = one.calls.setdefault(name, [])
            if call not in calls:
                calls.append(call)
            if not self.listening:  # only the shape counts, and activations need not wait for the step
                call.use.inputs = call.use.inputs.new_empty(()).expand(call.use.inputs.shape)
                continue
            if call.layer.weight is not None and call.use.modified:
                raise InputError(texts.WRITTEN_OVER.format(layer=name))
            if self._likelihood is None:
                call.score = score if call.score is None else at_least_single(call.score) + score
            elif call.sampled is not None:
                call.score = call.sampled.expand(score.shape)

    # --- for the optimizer -------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Hand over the passes so far."""
        passes, self._passes = self._passes, {}
        receive = self._receive_pass()
        for number in sorted(passes):
            if receive is not None:
                receive(passes[number])

    def clear(self) -> None:
        """Forget what backward passes have brought; forward passes that await theirs stay valid."""
        self._passes.clear()
        self._pending.clear()

    def remove(self) -> None:
        """Take every hook off the model."""
        remove_handles(self.handles)
        self.clear()


def remove_handles(handles: list[RemovableHandle]) -> None:
    """Remove hooks, each once."""
    while handles:
        handles.pop().remove()


def found_maps(maps: Mapping[str, tuple[int, int, int] | None]) -> dict[str, tuple[int, int, int]]:
    """Keep the layers that are fed by a flattened map."""
    return {name: shape for name, shape in maps.items() if shape is not None}


def at_least_single(x: Tensor) -> Tensor:
    """The same in float32 where autocast made it shorter."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def draw_uniforms(n: int, count: int, generator: torch.Generator) -> Tensor:
    """Numbers in [0, 1) that sampled labels are made of, ``(n, count)``, on the CPU whatever the default device is."""
    return torch.rand(n, count, generator=generator, dtype=torch.float64, device="cpu")
