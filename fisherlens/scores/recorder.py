"""Record what each layer reads and writes in one forward pass, and check that this explains its parameters' gradients."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle

from fisherlens.errors import NO_GRADIENT, FisherLensError, InputError
from fisherlens.layout import ROOT, FunctionModel, LayerInfo, Layout
from fisherlens.linalg.memory import Workspace
from fisherlens.scores.checks import LOW_PRECISION, check_outputs, random_module
from fisherlens.scores.conv import ConvGeometry, conv_rows
from fisherlens.scores.embedding import embedding_rows
from fisherlens.scores.forward_rules import ForwardRules
from fisherlens.scores.held import held_bytes
from fisherlens.scores.norm import norm_rows
from fisherlens.scores.source import Batch, call, describe, output_tensor, tensors_of

_PASS_THROUGH = ("Relu", "Clone", "Alias", "Dropout", "Tanh", "Sigmoid", "Gelu", "Elu", "Silu", "Softplus", "ToCopy")
# Outputs of one batch that differ by less than this share of the largest are the same but for rounding (our choice).
_SAME = 1e-5


@dataclass
class Use:
    """One call of a layer's module: its input, and the place in the graph where its output score arrives."""

    module: nn.Module
    inputs: Tensor
    version: int
    edge: GradientEdge | None
    output_shape: torch.Size
    statistics: tuple[Tensor, Tensor] | None = None  # of a batch normalisation, as they were in this call

    def of_examples(self, size: int) -> bool:
        """Whether the first axis of input and output counts the examples of a batch of this size."""
        return bool(self.inputs.ndim and self.output_shape) and self.inputs.shape[0] == self.output_shape[0] == size

    @property
    def modified(self) -> bool:
        """Whether the input was changed in place after the module had read it."""
        return self.inputs._version != self.version


def computed_by(output: Tensor) -> Tensor:
    """What a layer computed, whose place in the graph stays when the output is written over, as by an in-place activation.

    A dense layer with a bias makes the output on sequences as a view, which an in-place operation takes out of the graph.
    """
    base = output._base if output._is_view() else None
    if base is None or base.grad_fn is None or base.numel() != output.numel():
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output


class Unexplained(Exception):
    """Layers that later data use in another way than the sample did, so that their rule does not hold."""

    def __init__(self, layers: Sequence[str]):
        super().__init__(f"no rule explains {layers}")
        self.layers = tuple(layers)


def _has_rule(layer: LayerInfo) -> bool:
    """Whether a rule covers all parameters of a layer: its kind's weight and bias, and nothing the user added."""
    if layer.kind == "embedding":
        return len(layer.parameters) == 1
    return layer.kind != "other" and all(p in (layer.weight, layer.bias) for p in layer.parameters)


class Recorder:
    """Forward pass of a model with the selected parameters as leaves of the graph and every use of a layer recorded.

    The user's parameters are not part of the graph, so neither their ``grad`` nor their flags can change, and what a forward pass
    writes into its modules (counters, weights computed by hooks) is undone. Wrappers (DataParallel, compiled modules) are called
    without their wrapping: kernels that were compiled before do not call hooks.

    Parameters
    ----------
    model, layout
        The network, and its selected parameters.
    check
        Whether :func:`probe` runs the model twice on the same batch.
    """

    def __init__(self, model: nn.Module, layout: Layout, *, check: bool = True):
        self.model, self.layout, self.check = model, layout, check
        modules = dict(model.named_modules())
        with_rule = [layer.name for layer in layout.layers if _has_rule(layer)]
        self.modules = {name: modules["" if name == ROOT else name] for name in with_rule}
        self.copy_inputs, self.layer_rules = False, True
        self._frozen: dict[str, Tensor] | None = None
        self._modes: dict[nn.Module, bool] = {}
        bare, self._prefix = unwrapped(model)
        self._caller = Caller(bare)

    def freeze(self) -> None:
        """Keep copies of parameters, buffers and modes: later passes must not see what training does to the model meanwhile."""
        if self._frozen is None:
            self._modes = {module: module.training for module in self.model.modules()}
            self._frozen = {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}
            self._buffers = {name: tensor.detach().clone() for name, tensor in self.model.named_buffers()}

    def leaves(self) -> dict[str, Tensor]:
        """The selected parameters as leaves of a new graph; the user's own tensors are not part of it."""
        values = self._frozen if self._frozen is not None else dict(self.model.named_parameters())
        return {name: values[name].detach().requires_grad_() for name in self.layout}

    def outputs(self, batch: Batch, values: Mapping[str, Tensor]) -> Tensor:
        """Outputs with some parameters replaced, and the rest as they were frozen; at least in float32."""
        with self._borrowed_modules(), _uncompiled():
            return self._outputs(batch, values)

    @contextmanager
    def _borrowed_modules(self) -> Iterator[None]:
        """Modules in the mode in which they were frozen, with dense gradients of tables; after the call as they were."""
        before = [(module, module.__dict__.copy()) for module in self.model.modules()]
        try:
            for module, _ in before:
                if module in self._modes:
                    module.training = self._modes[module]
                if isinstance(
                    module, (nn.Embedding, nn.EmbeddingBag)
                ):  # a sparse gradient has the same entries, but no forward-mode rule
                    module.sparse = False
            yield
        finally:
            for module, attributes in before:
                now = module.__dict__
                for name in [name for name in now if name not in attributes]:
                    del now[name]
                now.update((name, value) for name, value in attributes.items() if now.get(name, now) is not value)

    def _outputs(self, batch: Batch, values: Mapping[str, Tensor]) -> Tensor:
        # a forward may write into its buffers (power iterations, counters), so it is given copies
        buffers = dict(self.model.named_buffers()) if self._frozen is None else self._buffers
        copies = {name: buffer.clone() for name, buffer in buffers.items()}
        replaced = {**(self._frozen or {}), **copies, **values}
        if isinstance(self.model, FunctionModel):
            outputs = output_tensor(self.model.function({**self.model.values, **replaced}, batch.inputs))
        else:
            inner = {f"model.{name.removeprefix(self._prefix)}": value for name, value in replaced.items()}
            outputs = functional_call(self._caller, inner, (batch.inputs,))
        return outputs.float() if outputs.dtype in LOW_PRECISION else outputs

    def graph_bytes(
        self, batch: Batch, run: Callable[[dict[str, Tensor]], Any] | None = None, known: Iterable[Tensor] = ()
    ) -> int:
        """Bytes per example that the graph of a forward pass, or of what ``run`` makes of the leaves, holds beside known tensors."""
        leaves = self.leaves()
        run = run or (lambda values: self.outputs_with_graph(batch, values))
        known = (*leaves.values(), *tensors_of(batch.inputs), *known)
        return held_bytes(lambda: run(leaves), known) // batch.size

    def outputs_with_graph(self, batch: Batch, leaves: Mapping[str, Tensor]) -> Tensor:
        """Outputs as a twice differentiable function of the leaves, whatever gradient mode surrounds the call."""
        # fused attention kernels have neither a forward-mode rule nor a second derivative; the plain one has both
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            sdpa_kernel(SDPBackend.MATH),
            ForwardRules(self.layer_rules),
        ):
            return self.outputs(batch, leaves)

    def release(self, names: Iterable[str]) -> None:
        """Stop recording these layers: their inputs and outputs do not explain their parameters."""
        for name in names:
            self.modules.pop(name, None)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, list[Use]], dict[str, Tensor]]:
        """Outputs, the uses of each layer, and the leaf parameters of the graph."""
        outputs, uses, leaves = self._forward(batch)
        if any(use.modified for layer_uses in uses.values() for use in layer_uses):
            self.copy_inputs = True  # a later in-place operation wrote over an input; keep copies from now on
            outputs, uses, leaves = self._forward(batch)
        return outputs, uses, leaves

    def _forward(self, batch: Batch) -> tuple[Tensor, dict[str, list[Use]], dict[str, Tensor]]:
        uses: dict[str, list[Use]] = {name: [] for name in self.modules}
        handles: list[RemovableHandle] = []
        leaves = self.leaves()

        def hook_for(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
                inputs = args[0] if args else next(iter(kwargs.values()))
                edge = get_gradient_edge(computed_by(output)) if output.requires_grad else None
                kept = (
                    inputs.clone() if self.copy_inputs else inputs
                )  # still attached: its history tells the flattened map
                mean = getattr(module, "running_mean", None)
                statistics = None if mean is None else (mean, module.running_var)
                uses[name].append(Use(module, kept, kept._version, edge, output.shape, statistics))

            return hook

        try:
            for name, module in self.modules.items():
                handles.append(module.register_forward_hook(hook_for(name), with_kwargs=True))
            with torch.inference_mode(False), torch.enable_grad():
                outputs = self.outputs(batch, leaves)
        finally:
            for handle in handles:
                handle.remove()
        return outputs, uses, leaves


class Caller(nn.Module):
    """Lets ``functional_call`` pass tuples and dicts of inputs the way :func:`call` does."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, inputs: Any) -> Tensor:
        return call(self.model, inputs)


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """The module inside of wrappers that compute the same function, and the prefix of its parameters' names."""
    prefix = ""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model, prefix = model.module, f"{prefix}module."
        elif type(model).__name__ == "OptimizedModule" and isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model, prefix = model._orig_mod, f"{prefix}_orig_mod."
        else:
            return model, prefix


def _uncompiled() -> Any:
    """Compiled parts of a model run as they were written: what was compiled before knows nothing of hooks set now."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def backward(
    outputs: Tensor, uses: Mapping[str, list[Use]], signal: Tensor, *, keep: bool = True
) -> dict[str, list[Tensor | None]]:
    """Score at the output of every use, for one signal at the network's outputs; None where nothing arrives."""
    edges = [use.edge for layer_uses in uses.values() for use in layer_uses if use.edge is not None]
    if not edges or not outputs.requires_grad:
        return {name: [None] * len(layer_uses) for name, layer_uses in uses.items()}
    grads = iter(_gradients(outputs, edges, signal, retain_graph=keep, allow_unused=True))
    return {
        name: [_arrived(next(grads), use) if use.edge is not None else None for use in layer_uses]
        for name, layer_uses in uses.items()
    }


def _arrived(score: Tensor | None, use: Use) -> Tensor | None:
    return None if score is None else score.reshape(use.output_shape)


def _gradients(outputs: Tensor, inputs: Sequence[Any], signal: Tensor, **options: Any) -> tuple[Tensor | None, ...]:
    """Derivatives of ⟨signal, outputs⟩; what torch says of a graph that has none, as after an in-place operation, becomes an InputError."""
    try:
        return torch.autograd.grad(outputs, inputs, signal, **options)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise InputError(NO_GRADIENT.format(error=error)) from error


def leaf_gradients(
    outputs: Tensor, leaves: Mapping[str, Tensor], signal: Tensor, *, keep: bool = False
) -> dict[str, Tensor]:
    """Gradient of ⟨signal, outputs⟩ by every leaf, zero where there is none, and never sparse; uses the graph up unless ``keep``."""
    if not outputs.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    options = {"retain_graph": keep, "allow_unused": True, "materialize_grads": True}
    grads = _gradients(outputs, list(leaves.values()), signal, **options)
    return {name: g.to_dense() if g.is_sparse else g for name, g in zip(leaves, grads, strict=True)}


def parameter_rows(
    layer: LayerInfo,
    use: Use,
    g: Tensor,
    out: Sequence[Tensor | None] = (None, None),
    workspace: Workspace | None = None,
) -> list[Tensor]:
    """Explicit rows that one use contributes, ``(n, r, numel)`` per parameter; ``g`` is (n, r, …) at the module's output."""
    x = use.inputs.detach()
    x = x.to(g.dtype) if x.is_floating_point() else x  # low-precision activations are accumulated in float32
    if layer.kind == "conv":
        return conv_rows(ConvGeometry.of(use.module), layer, x, g, out, workspace)
    if layer.kind == "embedding":
        pieces = embedding_rows(use.module, x, g)
    elif layer.kind == "norm":
        pieces = norm_rows(use.module, layer, x, g, use.statistics)
    else:
        g = g.reshape(g.shape[0], g.shape[1], -1, g.shape[-1])
        pieces = []
        if layer.weight:
            pieces.append(torch.matmul(g.mT, x.reshape(x.shape[0], 1, -1, x.shape[-1])).flatten(2))
        if layer.bias:
            pieces.append(g.sum(2))
    for piece, target in zip(pieces, out, strict=False):
        if target is not None:
            target.copy_(piece)
    return pieces


def use_rows(layer: LayerInfo, use: Use, g: Tensor) -> Tensor:
    """The same rows over all parameters of the layer, ``(n, r, p)``."""
    return torch.cat(parameter_rows(layer, use, g), dim=2)


def flattened_map(use: Use) -> tuple[int, int, int] | None:
    """(channels, height, width) of the map that was flattened to give a dense layer's input, from the graph; None if plain."""
    node = use.inputs.grad_fn
    for _ in range(8):
        if node is None:
            return None
        name = type(node).__name__
        if "View" in name or "Reshape" in name:
            sizes = getattr(node, "_saved_self_sym_sizes", None)
            if sizes is not None and 3 <= len(sizes) <= 5 and math.prod(sizes[1:]) == use.inputs.shape[-1]:
                channels, *spatial = sizes[1:]  # a line counts as height 1, a volume as depth x height
                return (channels, math.prod(spatial[:-1]), spatial[-1])
        elif not any(part in name for part in _PASS_THROUGH):
            return None
        node = node.next_functions[0][0] if node.next_functions else None
    return None


def probe(recorder: Recorder, batch: Batch) -> Tensor:
    """Run a few examples: the model must work, be deterministic, and not couple the examples of a batch."""
    outputs = _run(recorder, batch)
    check_outputs(outputs, batch.size)
    if not torch.isfinite(outputs).all():
        return outputs  # the likelihood names what is wrong
    scale = outputs.detach().abs().max().item() or 1.0
    if recorder.check:
        _require_repeatable(recorder, batch, outputs, scale)
    if batch.size > 1:
        gap = _gap(outputs[:1], _run(recorder, batch.part(0, 1)))
        coarse = any(p.dtype in LOW_PRECISION for p in recorder.leaves().values())
        if gap > (5e-2 if coarse else 1e-3) * scale:
            if recorder.check:
                _require_repeatable(recorder, batch, outputs, scale)  # two draws can agree by chance; three hardly
            elif _gap(outputs, _run(recorder, batch)) > _SAME * scale:
                return outputs  # an output that differs from itself too says nothing of other examples
            raise InputError(
                f"The output of an example depends on the other examples of its batch (difference {gap:.3g}), so no per-example Fisher exists. "
                "Look for statistics over the batch axis in the model's forward."
            )
    return outputs


def _require_repeatable(recorder: Recorder, batch: Batch, outputs: Tensor, scale: float) -> None:
    """Refuse a model whose outputs differ when it is run again."""
    gap = _gap(outputs, _run(recorder, batch))
    if gap > _SAME * scale:
        found = random_module(recorder.model, lambda: recorder.forward(batch))
        raise InputError(
            f"The same batch gave two different outputs (largest difference {gap:.3g}), so F is not one fixed matrix. {found} draws random "
            "numbers in its forward, or counts its calls; call model.eval() or fix its randomness. check_deterministic=False skips this test."
        )


def _run(recorder: Recorder, batch: Batch) -> Tensor:
    """Outputs of the model; whatever it raises becomes an InputError that shows what it was given."""
    try:
        return recorder.forward(batch)[0]
    except FisherLensError:
        raise
    except Exception as error:
        raise InputError(
            f"The model failed on {batch.where}: {type(error).__name__}: {error}. Inputs: {describe(batch.inputs)}; parameters: "
            f"{next(iter(recorder.model.parameters())).dtype}. Check the inputs' shape, dtype (inputs.to(dtype)) and device by calling the model on them."
        ) from error


def _gap(outputs: Tensor, others: Tensor) -> float:
    return (outputs - others).detach().abs().max().item() if others.shape == outputs.shape else float("inf")


def unexplained(recorder: Recorder, batch: Batch) -> list[str]:
    """Layers whose recorded inputs and outputs do not give their parameters' gradient, example by example.

    Such a parameter is tied to another module or used in a functional call, or its module reads something else than one example
    per entry of the first axis (sequence first, a shared table, a subset, another order). The test is a random signal at the
    outputs of a few examples: the rows of the examples, summed with random weights, must be the gradient from automatic
    differentiation of the outputs with these weights. It is made in two orders, as a model that sorts its examples changes
    nothing where they come sorted.
    """
    found = _unexplained(recorder, batch)
    if batch.size > 1:
        order = torch.randperm(batch.size, generator=torch.Generator().manual_seed(1), device="cpu")
        found += [name for name in _unexplained(recorder, batch.take(order)) if name not in found]
    return found


def _unexplained(recorder: Recorder, batch: Batch) -> list[str]:
    outputs, uses, leaves = recorder.forward(batch)
    if not outputs.requires_grad or not torch.isfinite(outputs).all():
        return []
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(outputs.shape, generator=generator, dtype=torch.float64, device="cpu").to(
        outputs.device, outputs.dtype
    )
    weight = 0.5 + torch.rand(len(outputs), generator=generator, dtype=torch.float64, device="cpu").to(
        outputs.device, outputs.dtype
    )
    scores = backward(outputs, uses, signal)
    weighted = signal * weight.view(-1, *[1] * (signal.ndim - 1))
    truth = leaf_gradients(outputs, leaves, weighted)
    coarse = next(iter(leaves.values())).dtype in LOW_PRECISION
    tolerance = 5e-2 if coarse else 1e-3 if outputs.dtype == torch.float32 else 1e-8
    found = []
    for layer in recorder.layout.layers:
        if layer.name not in recorder.modules:
            continue
        if not all(use.of_examples(batch.size) for use in uses[layer.name]):
            found.append(layer.name)
            continue
        expected = torch.cat([truth[p.name].reshape(-1) for p in layer.parameters])
        rebuilt = torch.zeros_like(expected)
        for use, g in zip(uses[layer.name], scores[layer.name], strict=True):
            if g is None:
                continue
            g = g * weight.view(-1, *[1] * (g.ndim - 1)).to(g.dtype)
            for one, part in _one_by_one(layer, replace(use, inputs=use.inputs.detach()), g):
                rebuilt += use_rows(layer, one, part[:, None])[0, 0]
        if (rebuilt - expected).abs().max() > tolerance * expected.abs().max().clamp(
            min=torch.finfo(expected.dtype).tiny
        ):
            found.append(layer.name)
    return found


def _one_by_one(layer: LayerInfo, use: Use, g: Tensor) -> Iterator[tuple[Use, Tensor]]:
    """A use and its output scores, cut into examples: rows of a wide layer are large. Where a row is a sum over positions, all at once."""
    if layer.kind in ("dense", "embedding"):
        width = use.inputs.shape[-1:] if layer.kind == "dense" else ()
        yield replace(use, inputs=use.inputs.reshape(1, -1, *width)), g.reshape(1, -1, g.shape[-1])
        return
    for i in range(len(g)):
        yield replace(use, inputs=use.inputs[i : i + 1]), g[i : i + 1]


@contextmanager
def preserved_randomness(device: torch.device) -> Iterator[None]:
    """Put the global random states back as they were: loaders and user code may draw from them during a pass."""
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    cuda_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state, device)
