"""A copy of the network that is being trained: in eval mode, without the hooks of whoever else watches it."""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fisherlens.errors import InputError, UnsupportedModuleError

_FORWARD = ("_forward_hooks", "_forward_pre_hooks")
_SILENT = ("_backward_hooks", "_backward_pre_hooks")
_NO_COPY = (
    "The network cannot be copied ({type}: {error}), and the Monitor analyses a copy. A module that keeps tensors of an earlier forward pass in a list or "
    "dict, an open file or a lock has no copy: keep such things outside of the module, or detach the tensors."
)


def unwrap(model: nn.Module) -> nn.Module:
    """The network behind torch.compile, DataParallel and DistributedDataParallel: their parameters are its own."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := model.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def eval_copy(model: nn.Module, *, keep_hooks: bool = False) -> tuple[nn.Module, list[str]]:
    """A copy in eval mode that shares no memory, and what was left out of it, in words.

    Hooks that torch itself placed belong to the function that the network computes (weight norm, spectral norm, pruning) and
    stay. All others stay only with ``keep_hooks``: they would tell their owner of passes that are not part of the training.
    """
    model = unwrap(model)
    memo: dict[int, Any] = {}
    left_out: list[str] = []
    for name, module in model.named_modules():
        where = f"{name or '(root)'!r} ({type(module).__name__})"
        for kept, what in _replacements(module, keep_hooks):
            memo[id(kept[0])] = kept[1]
            if what:
                left_out.append(f"{what} of {where}")
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:  # whatever an attribute of a user's module raises when it is copied
        raise UnsupportedModuleError(_NO_COPY.format(type=type(error).__name__, error=error)) from error
    for module in twin.modules():
        own = module.__dict__
        if not keep_hooks and _is_foreign_forward(own.get("forward")):
            del own["forward"]
        if own.get("_compiled_call_impl", 0) is None:
            del own["_compiled_call_impl"]
    return twin.eval(), left_out


def _replacements(module: nn.Module, keep_hooks: bool) -> Iterator[tuple[tuple[Any, Any], str]]:
    """What takes the place of some attributes in the copy, with words for what is thereby left out."""
    own = module.__dict__
    for name in (*_FORWARD, *_SILENT):
        hooks = own.get(name)
        if hooks:
            kept = {key: hook for key, hook in hooks.items() if name in _FORWARD and (keep_hooks or _is_torchs(hook))}
            unknown = [hook for key, hook in hooks.items() if key not in kept and not _is_ours(hook)]
            what = "a forward hook" if unknown and name in _FORWARD else ""
            yield (hooks, OrderedDict(kept)), what
    if _is_foreign_forward(own.get("forward")):
        what = "" if keep_hooks else "a replaced forward"
        yield (own["forward"], own["forward"]), what  # a function is copied as itself; it is taken off afterwards
    if own.get("_compiled_call_impl") is not None:
        yield (own["_compiled_call_impl"], None), ""
    for value in own.values():
        if isinstance(value, Tensor) and not value.is_leaf:  # of an earlier forward pass, which deepcopy refuses
            yield (value, value.detach().clone()), ""


def _is_torchs(hook: Any) -> bool:
    """Whether a hook was written by torch, or derives from what torch wrote (a pruning method)."""
    if isinstance(hook, types.FunctionType | types.MethodType):
        return (getattr(hook, "__module__", None) or "").startswith("torch.nn.")
    return any(parent.__module__.startswith("torch.nn.") for parent in type(hook).__mro__)


def _is_ours(hook: Any) -> bool:
    """Whether a hook is that of an optimizer of this package, which only listens."""
    return type(hook).__module__.startswith("fisherlens.")


def _is_foreign_forward(forward: Any) -> bool:
    """Whether a module's own ``forward`` is a plain function: one bound to the module would be bound to its copy."""
    return forward is not None and not isinstance(forward, types.MethodType)


def select(twin: nn.Module, names: tuple[str, ...], n_params: int) -> None:
    """Let those parameters of a copy require grad that were chosen at the start, whatever was frozen or released since."""
    wanted, found = set(names), 0
    for name, parameter in twin.named_parameters():
        chosen = name in wanted
        if parameter.requires_grad != chosen:
            parameter.requires_grad_(chosen)
        found += parameter.numel() if chosen else 0
    if found != n_params:
        raise InputError(
            f"The network has {found} of the monitored parameters, and had {n_params} when the Monitor was built: it was changed since. Build a new Monitor."
        )
