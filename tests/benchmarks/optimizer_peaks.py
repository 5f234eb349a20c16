"""Peak memory of some steps of one optimizer in a fresh process, beyond the network, a copy of its parameters, and the data."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import warnings
from typing import Any

import torch
from optimizer_entrants import ENTRANTS
from optimizer_tasks import Task
from peaks import _ENVIRONMENT, Peak


def here(network: str, batch: int, entrant: str, device: str) -> dict[str, Any]:
    """Peak bytes of the optimizer's first steps, in this very process."""
    warnings.simplefilter("ignore")  # of parameters that a method does not cover: the results name them
    where, contestant = torch.device(device), ENTRANTS[entrant]
    first, task = Task("tiny", 16, where), Task(network, batch, where)
    few = contestant.make(first, *contestant.cycle(first.kind))
    for _ in range(6):  # what is loaded and prepared on first use belongs to no contestant
        few.step()
    model = task.model()
    task.loss_of(model(task.x)).backward()
    sizes = [t.numel() * t.element_size() for t in (*model.parameters(), *model.parameters(), *model.buffers())]
    del few, model
    gc.collect()
    peak, cycle = Peak(where), contestant.cycle(task.kind)
    subject = contestant.make(task, *cycle)
    for _ in range(cycle[1] + 1 if cycle[1] else 2):
        subject.step()
    return {"peak": peak.bytes() - sum(sizes)}


def elsewhere(timeout: float, **spec: Any) -> dict[str, Any]:
    """The same in a fresh process on one thread; ``{"note": why}`` where it failed."""
    command = [sys.executable, __file__, json.dumps(spec)]
    environment = {**os.environ, **_ENVIRONMENT}
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=timeout, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"note": f"some steps took more than {timeout:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"note": lines[-1] if lines else f"exit status {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(here(**json.loads(sys.argv[1]))))
