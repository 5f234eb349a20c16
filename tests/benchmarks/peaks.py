"""Peak memory of one contestant in a fresh process: how far it grows beyond the network, its data and one gradient."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from contestants import ALL, COMPILED, Product, Task
from networks import NETWORKS

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**16),
    "MALLOC_TRIM_THRESHOLD_": str(2**16),
}
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """Growth of this process's memory beyond what it was when this was made.

    On a CUDA device what torch allocated there. On Linux the high-water mark of resident memory, set back at the start;
    elsewhere that of the whole process, which cannot be set back, so that a peak below an earlier one is not seen.
    """

    def __init__(self, device: torch.device):
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free goes back, so that using it again counts
            _CLEAR.write_text("5")
            self.resettable = True
            self.before = _resident("VmRSS")
        except OSError:
            self.resettable = False
            self.before = _maximum()

    def bytes(self) -> int:
        """The growth until now."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return (_resident("VmHWM") if self.resettable else _maximum()) - self.before


def _resident(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+)", _STATUS.read_text())[1]) * 1024


def _maximum() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def vectors(size: int, columns: int, device: torch.device) -> torch.Tensor:
    """A vector for one column, a block for more, drawn on the device."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (size,) if columns == 1 else (size, columns)
    return torch.randn(shape, generator=generator, device=device)


def here(
    network: str, contestant: str, columns: int, device: str, memory: str | float, n: int | None, repeats: int = 1
) -> dict[str, Any]:
    """Peak of building the contestant and of one product, in bytes beyond the baseline, in this very process."""
    where = torch.device(device)
    model, (x, y) = NETWORKS[network].make(n)
    task = Task(model.to(where), x.to(where), y.to(where), memory, repeats)
    v = vectors(task.size, columns, where)
    task.gradient()
    # what is loaded and prepared on first use belongs to no contestant
    few = task.copy() if contestant in COMPILED else task.part(2).copy()  # compiled code holds for one shape
    ALL[contestant](replace(few, memory="2GiB", repeats=1)).apply(v)
    del few
    peak = Peak(where)
    product: Product = ALL[contestant](task)
    built = peak.bytes()
    answer = product.apply(v)
    del answer
    return {"built": built, "peak": peak.bytes(), "predicted": product.facts.get("predicted_peak")}


def elsewhere(timeout: float = 600.0, **spec: Any) -> dict[str, Any]:
    """The same in a fresh process on one thread; ``{"note": why}`` where it failed.

    Its allocator returns at once what is freed (glibc), so that the peak is of what is alive and not of holes between.
    """
    environment = {**os.environ, **_ENVIRONMENT}
    command = [sys.executable, __file__, json.dumps(spec)]
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=timeout, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"note": f"no answer within {timeout:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"note": lines[-1] if lines else f"exit status {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(here(**json.loads(sys.argv[1]))))
