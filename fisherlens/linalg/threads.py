"""Pieces of work side by side on the CPU, where each is too small to keep several cores busy: factors of many small matrices, say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Piece, Found = TypeVar("Piece"), TypeVar("Found")


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

    with ThreadPoolExecutor(count, "fisherlens", begin) as pool:
        try:
            return list(pool.map(work, pieces))
        finally:
            torch.set_num_threads(threads)
