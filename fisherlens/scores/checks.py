"""What a network must be before anything is computed: values of one real dtype on one device, and a fixed function of each example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from fisherlens.errors import InputError, NonFiniteError, UnsupportedModuleError
from fisherlens.layout import ROOT, Layout

LOW_PRECISION = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, torch.float64, *LOW_PRECISION)


def check_model(model: nn.Module, layout: Layout) -> None:
    """Refuse what has no fixed per-example Fisher, naming the module or parameter."""
    for name, module in model.named_modules():
        _check_module(f"{name or ROOT!r} ({type(module).__name__})", module)
    parameters = dict(model.named_parameters())
    _check_selected({name: parameters[name] for name in layout})
    for what, named in (("Parameter", parameters), ("Buffer", dict(model.named_buffers()))):
        for name, tensor in named.items():
            if is_lazy(tensor) or tensor.is_meta:
                raise InputError(
                    f"{what} {name!r} is on the meta device, or of a lazy module that has seen no input: it has a name and no values. Load the model's state "
                    "on a real device, or run one forward pass, before the analysis."
                )
    for name, parameter in parameters.items():
        if parameter.is_inference():
            raise InputError(
                f"Parameter {name!r} was made under torch.inference_mode(), where tensors can never be differentiated. Build or load the model outside of it, "
                "or under torch.no_grad()."
            )
        values = parameter if parameter.dtype in _DTYPES or parameter.is_complex() else parameter.float()
        if not torch.isfinite(values).all():
            raise NonFiniteError(
                f"Parameter {name!r} holds NaN or infinity. Training probably diverged; load an earlier state or lower the learning rate."
            )


def _check_module(label: str, module: nn.Module) -> None:
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
        how = "is in training mode" if module.training else "has no running statistics"
        raise InputError(
            f"Module {label} {how}, so it couples the examples of a batch and no per-example Fisher exists. "
            "Call model.eval() before the analysis (and keep track_running_stats=True)."
        )
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and (module.max_norm or module.scale_grad_by_freq):
        option = (
            "max_norm rewrites the table"
            if module.max_norm
            else "scale_grad_by_freq rescales its gradient by the batch"
        )
        raise InputError(
            f"Module {label}: {option} in every forward pass, so its gradient is not a derivative of the outputs. Build the table without it."
        )
    if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
        raise InputError(
            f"Module {label} is in training mode with p={module.p}, so two passes differ and F is not one fixed matrix. Call model.eval()."
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedModuleError(
            f"Module {label} is compiled TorchScript, in which no parameter can be replaced by a differentiable one. Pass the module from which it was "
            "scripted or traced."
        )


def _check_selected(parameters: dict[str, Tensor]) -> None:
    """Refuse selected parameters of no real dtype, of several ones, or on several devices."""
    for name, parameter in parameters.items():
        if parameter.dtype not in _DTYPES:
            kind = "complex" if parameter.dtype.is_complex else str(parameter.dtype).removeprefix("torch.")
            raise InputError(
                f"The selected parameters must share one device and one real dtype (float64, float32, bfloat16 or float16); {name!r} is {kind}. Write a "
                "complex parameter as two real ones, or select others with params=[...]."
            )
        if not parameter.numel():
            raise InputError(
                f"Parameter {name!r} has no entries (shape {tuple(parameter.shape)}): its layer has no inputs or no outputs. Check the sizes with which it "
                "was built, or select others with params=[...]."
            )
    kinds = sorted({f"{str(p.dtype).removeprefix('torch.')} on {p.device}" for p in parameters.values()})
    if len(kinds) > 1:
        raise InputError(
            f"The selected parameters must share one device and one real dtype; got {', '.join(kinds)}. "
            "Use model.float() or model.double(), model.to(device), or select parameters with params=[...]."
        )


def check_outputs(outputs: Tensor, size: int) -> None:
    """Refuse outputs of a model for which there is no likelihood: a loss, labels, complex numbers, none at all, other examples."""
    if outputs.layout != torch.strided or outputs.is_nested:
        raise InputError(
            "The model's outputs are sparse or nested; a likelihood needs a dense tensor. Return outputs.to_dense(), or pad examples to one size."
        )
    if not outputs.ndim:
        raise InputError(
            f"The model returned one number for {size} examples; expected outputs with the examples on their first axis. Return logits or means, not "
            "the loss."
        )
    if outputs.shape[0] != size or not outputs.numel():
        raise InputError(
            f"The model's outputs for {size} examples have shape {tuple(outputs.shape)}; expected ({size}, …), with at least one output each. Check that inputs "
            "have a batch axis, that the model keeps it first, and its last layer."
        )
    if not outputs.is_floating_point():
        raise InputError(
            f"The model's outputs have dtype {outputs.dtype}; a likelihood needs real logits or means. Return those, not labels (argmax) and not "
            "complex numbers (torch.view_as_real)."
        )


def random_module(model: nn.Module, run: Callable[[], Any]) -> str:
    """Name the innermost module whose output differs between two runs on the same inputs."""
    runs: list[list[tuple[str, Any]]] = []

    def hook_for(name: str) -> Any:
        return lambda module, args, output: runs[-1].append((f"{name or ROOT!r} ({type(module).__name__})", output))

    handles: list[RemovableHandle] = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_hook(hook_for(name)))
        for _ in range(2):
            runs.append([])
            run()
    finally:
        for handle in handles:
            handle.remove()
    for (label, first), (_, second) in zip(*runs, strict=False):  # in the order in which modules end: inner ones first
        if isinstance(first, Tensor) and not (first.shape == second.shape and torch.equal(first, second)):
            return f"Module {label}"
    return "A module"
