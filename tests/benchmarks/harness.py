"""Interleaved timings in one process: every round runs each contestant once, ratios are taken within a round."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock sees the whole work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def full_float32() -> None:
    """No tensor-core rounding of float32 on a GPU, for anybody: products are compared to 1e-4."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def interleaved(
    contestants: Mapping[str, Callable[[], Any]], *, unit: str, rounds: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Median seconds and median ratio to ``unit`` of the same round, with the quartiles of that ratio."""
    for run in contestants.values():  # warm-up, not counted
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            seconds[name].append(steadily(run, device))
    found = {}
    for name, values in seconds.items():
        ratios = [value / one for value, one in zip(values, seconds[unit], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        found[name] = {"seconds": statistics.median(values), "ratio": middle, "ratio_low": low, "ratio_high": high}
    return found


def once(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


# Shorter calls are repeated for so long, and their mean counts: one call of 10 ms is the clock's luck, and pays for what its predecessor did
# to the caches (our choice).
SHORT = 0.05


def steadily(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run; of a short one, the mean over 50 ms."""
    spent = [once(run, device)]
    while sum(spent) < SHORT:
        spent.append(once(run, device))
    return statistics.mean(spent)


# A unit timed longer ago than this is timed again before the next contestant (our choice).
_STALE = 1.0


def paced(
    contestants: Mapping[str, Callable[[], Any]],
    *,
    unit: Callable[[], Any],
    rounds: Mapping[str, int],
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """As :func:`interleaved`, with its own number of rounds for each contestant, spread evenly over the rounds.

    Every ratio is to a ``unit`` timed at most a second before. Contestants are expected to be warm. The unit itself is
    found under ``"unit"``.
    """
    total = max(rounds.values(), default=0)
    units: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    ratios: dict[str, list[float]] = {name: [] for name in contestants}
    timed = float("-inf")
    for k in range(total):
        for name, run in contestants.items():
            if (k + 1) * rounds[name] // total == k * rounds[name] // total:
                continue
            if time.perf_counter() - timed > _STALE or name == next(iter(contestants)):
                units.append(steadily(unit, device))
                timed = time.perf_counter()
            seconds[name].append(steadily(run, device))
            ratios[name].append(seconds[name][-1] / units[-1])
    found = {"unit": {"seconds": statistics.median(units) if units else math.nan, "rounds": len(units)}}
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        found[name] = {
            "seconds": statistics.median(seconds[name]),
            "ratio": middle,
            "ratio_low": low,
            "ratio_high": high,
            "rounds": len(values),
        }
    return found


def machine(device: torch.device) -> str:
    """One line that says where the figures were taken."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    where = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{name}, {torch.get_num_threads()} threads"
    )
    load = f"load {os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else ""
    return f"{where}; torch {torch.__version__}; Python {platform.python_version()}; {datetime.now(UTC):%Y-%m-%d %H:%M} UTC; {load}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Plain text table that is also Markdown."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (head, *rows)
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def write_json(path: str | None, payload: dict[str, Any]) -> None:
    """Store the figures, if a path was given."""
    if path:
        Path(path).write_text(json.dumps(payload, indent=1))
