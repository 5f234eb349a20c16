"""Pieces of work side by side on the CPU, where each is too small to keep several cores busy: factors of many small matrices, say."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import torch

Piece, Found = TypeVar("Piece"), TypeVar("Found")


class _Alone:
    """Keeps the BLAS of scipy to the threads that call it, while anybody is inside.

    Threads of OpenBLAS wait for each other actively, which for small matrices costs many times what these do.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._limits = threading.Lock(), 0, None

    @staticmethod
    @cache
    def _controller() -> Any:
        import scipy.linalg.cython_lapack  # noqa: F401 - its BLAS must be there; here, as it would double the time of ``import fisherlens``
        from threadpoolctl import ThreadpoolController

        return ThreadpoolController()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._limits = self._controller().limit(limits=1, user_api="blas")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._limits.restore_original_limits()


#: around calls of scipy's LAPACK for small matrices; may be entered again inside, and by several threads
alone = _Alone()


def side_by_side(work: Callable[[Piece], Found], pieces: Sequence[Piece], device: torch.device) -> list[Found]:
    """What ``work`` finds for each piece, in their order: on the CPU as many at a time as torch uses threads, else one after another.

    Every piece runs on a single thread, so that answers do not depend on how many there are. torch lets go of Python's lock inside its
    operators. Threads live as long as the call: what forks this process later finds none.
    """
    count = min(torch.get_num_threads(), len(pieces))
    if device.type != "cpu" or count < 2:
        return [work(piece) for piece in pieces]
    threads, enabled = torch.get_num_threads(), torch.is_grad_enabled()

    def begin() -> None:
        torch.set_num_threads(1)  # of this thread alone, but also what a new thread begins with
        torch.set_grad_enabled(enabled)

    with alone, ThreadPoolExecutor(count, "fisherlens", begin) as pool:
        try:
            return list(pool.map(work, pieces))
        finally:
            torch.set_num_threads(threads)
