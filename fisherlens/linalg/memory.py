"""CPU memory for large tensors: huge pages where the system offers them, and buffers that are used again.

A fresh allocation of 50 MB costs 12,000 page faults, on virtual machines more time than the matrix product that fills
it. Other devices have caching allocators of their own, so there this module only calls ``torch.empty``.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Below this size the C library's allocator recycles memory by itself (glibc's dynamic mmap threshold starts there).
SMALL = 1 << 20


def _reserve(nbytes: int) -> np.ndarray:
    """Zeroed bytes from anonymous pages, huge ones if the kernel grants the request."""
    pages = mmap.mmap(-1, nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages: ordinary ones serve
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype=np.uint8)


def _as_tensor(buffer: np.ndarray, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    nbytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(buffer[:nbytes]).view(dtype).view(*shape)


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Like ``torch.zeros``, from huge pages for a large tensor on the CPU."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < SMALL:
        return torch.zeros(*shape, dtype=dtype, device=device)
    return _as_tensor(_reserve(nbytes), shape, dtype)


def _reference_counts(buffers: list[np.ndarray]) -> list[int]:
    return [sys.getrefcount(buffer) for buffer in buffers]


# The count of a buffer that only its list refers to. Measured, because interpreters differ in the references that counting adds.
_IDLE = _reference_counts([np.empty(0)])[0]


class Workspace:
    """Hands out uninitialised tensors and takes their memory back by itself once nobody refers to them.

    Parameters
    ----------
    limit
        Bytes that idle buffers may hold together; beyond it the oldest idle one is given back.
    """

    def __init__(self, limit: int = 256 * 2**20):
        self.limit = limit
        self._buffers: list[np.ndarray] = []
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return Workspace, (self.limit,)  # a copy starts without buffers

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Like ``torch.empty``; on the CPU large tensors come from idle buffers of this workspace."""
        nbytes = math.prod(shape) * dtype.itemsize
        if device.type != "cpu" or nbytes < SMALL:
            return torch.empty(*shape, dtype=dtype, device=device)
        with self._lock:
            fitting = [b for b in self._idle() if nbytes <= b.nbytes <= 2 * nbytes]
            if fitting:
                return _as_tensor(min(fitting, key=lambda b: b.nbytes), shape, dtype)
            buffer = _reserve(nbytes)
            self._trim(nbytes)
            if nbytes <= self.limit:
                self._buffers.append(buffer)
            return _as_tensor(buffer, shape, dtype)

    def _idle(self) -> list[np.ndarray]:
        """Buffers without a tensor on them: a tensor keeps a view, whose base counts as a reference."""
        counts = _reference_counts(self._buffers)
        return [b for b, count in zip(self._buffers, counts, strict=True) if count <= _IDLE]

    def _trim(self, incoming: int) -> None:
        idle = self._idle()
        total = sum(b.nbytes for b in idle) + incoming
        while idle and total > self.limit:
            oldest = idle.pop(0)
            total -= oldest.nbytes
            self._buffers = [b for b in self._buffers if b is not oldest]
