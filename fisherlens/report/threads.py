"""One thread where several would only wait for each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from fisherlens.report.subject import device_of

_SMALL = 200_000  # parameters; our choice, by measurement on two cores


@contextmanager
def one_thread(model: nn.Module) -> Iterator[None]:
    """Run on one thread for the length of the block if the network is small and on a CPU.

    Training, Lanczos steps and solves of such a network are many thousands of small operations: a second thread saves a quarter of the
    time where the cores are free, and multiplies it where they are not, as each operation then waits for the busier core.
    """
    small = sum(p.numel() for p in model.parameters()) <= _SMALL and device_of(model).type == "cpu"
    before = torch.get_num_threads()
    if small:
        torch.set_num_threads(1)
    try:
        with _one_blas_thread() if small else nullcontext():
            yield
    finally:
        if small:
            torch.set_num_threads(before)


def _one_blas_thread() -> Any:
    """The same for the BLAS of numpy and scipy, which has threads of its own; scikit-learn brings what can set it."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return nullcontext()
    return threadpool_limits(limits=1, user_api="blas")
