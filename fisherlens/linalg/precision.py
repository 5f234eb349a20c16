"""The dtype that is computed in: that of the parameters, whatever reduced precision is in force around a call.

Under ``torch.autocast`` a product of float32 matrices is one of bfloat16 or float16, and answers in that dtype or, worse, is cast back
without a word. So it is on some CPUs after ``torch.set_float32_matmul_precision("medium")``. F is that of the model in its own dtype, so
nothing here is computed so. An autocast that the model's own forward opens is part of the model, and stays. Inference mode is left for
the length of a call too.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

Parameters, Answer = ParamSpec("Parameters"), TypeVar("Answer")

# Every kind of device may have an autocast of its own in force.
_KINDS = tuple(
    kind for kind in ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "xla") if torch.amp.is_autocast_available(kind)
)
# Torch's own look at all of them at once, in a tenth of the time; but for one kind, and it is not documented.
_quick, _others = getattr(torch._C, "_is_any_autocast_enabled", None), tuple(kind for kind in _KINDS if kind == "mps")
_MAGIC = ("__init__", "__call__", "__matmul__", "__setstate__")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Compute in the dtypes of the tensors themselves, also where a ``torch.autocast`` is in force, of any kind of device."""
    with ExitStack() as stack:
        for kind in filter(torch.is_autocast_enabled, _KINDS):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _autocast() -> bool:
    """Whether an autocast is in force, of any kind of device."""
    if _quick is not None and _quick():
        return True
    return any(map(torch.is_autocast_enabled, _KINDS if _quick is None else _others))


def _reduced() -> bool:
    """Whether products of float32 matrices may be taken in bfloat16."""
    try:
        return torch.get_float32_matmul_precision() == "medium"
    except RuntimeError:  # torch refuses to sum up in one word what was set for kinds of devices apart
        return torch.backends.mkldnn.matmul.fp32_precision == "bf16"


class _Lifted:
    """Takes "medium" for "high" while anybody is inside: a setting of the whole process, so threads are counted."""

    def __init__(self) -> None:
        self.inside, self._lock, self._back = 0, threading.Lock(), lambda: None

    def __enter__(self) -> None:
        with self._lock:
            if not self.inside and _reduced():
                try:
                    torch.get_float32_matmul_precision()
                    torch.set_float32_matmul_precision("high")
                    self._back = functools.partial(torch.set_float32_matmul_precision, "medium")
                except RuntimeError:
                    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
                    self._back = functools.partial(setattr, torch.backends.mkldnn.matmul, "fp32_precision", "bf16")
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.inside -= 1
            if not self.inside:
                self._back()
                self._back = lambda: None


_lifted = _Lifted()


def own_precision(function: Callable[Parameters, Answer]) -> Callable[Parameters, Answer]:
    """Decorate a function of the public interface: it computes in full precision, and ordinary tensors. Where no other is in force that costs half a microsecond."""

    @functools.wraps(function)
    def guarded(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Answer:
        if not (_lifted.inside or _reduced() or _autocast() or torch.is_inference_mode_enabled()):
            return function(*args, **kwargs)
        with ExitStack() as stack:
            # what is made in inference mode can neither be written into later nor be part of a graph
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
            stack.enter_context(without_autocast())
            stack.enter_context(_lifted)
            return function(*args, **kwargs)

    guarded.own_precision = True  # type: ignore[attr-defined]
    return guarded


class OwnPrecision:
    """Base of what computes: every method of the interface, also one that a subclass defines, is decorated with :func:`own_precision`."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, member in list(vars(cls).items()):
            public = not name.startswith("_") or name in _MAGIC
            if public and inspect.isfunction(member) and not hasattr(member, "own_precision"):
                setattr(cls, name, own_precision(member))
