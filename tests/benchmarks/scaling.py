"""How the cost of our products and of the capture grows with N, P, C and the number K of vectors in a block.

Run with ``python tests/benchmarks/scaling.py``; ``--help`` lists the options. One thing is varied at a time, by factors of two or
four, on a dense and on a convolutional network. Each size is timed in every round, and the median of the rounds is fitted:
the slope of log time against log size, by least squares on the upper half of the range, with its standard error. Slope 1 is
linear growth. Small sizes show the fixed cost of a call.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from contestants import Task, budgets
from fit import fit
from harness import full_float32, machine, once, write_json
from peaks import vectors
from scaling_text import markdown
from torch import nn

import fisherlens as fl

N_CLASSES = 10
_SHORTEST = 5e-3  # seconds that one timing takes at least, by repetition (our choice)


@dataclass(frozen=True)
class Family:
    """A network whose sizes can be varied, with the sizes."""

    name: str
    build: Callable[[int, int], nn.Module]  # width, classes
    input_shape: tuple[int, ...]
    width: int
    n: int
    ns: tuple[int, ...]
    widths: tuple[int, ...]
    classes: tuple[int, ...]
    ks: tuple[int, ...]

    def task(self, n: int | None = None, width: int | None = None, classes: int = N_CLASSES) -> Task:
        """The network in evaluation mode on random data."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.build(width or self.width, classes).eval()
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(n or self.n, *self.input_shape, generator=generator)
        return Task(model, x, torch.randint(0, classes, (n or self.n,), generator=generator))


def _mlp(width: int, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(256, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)
    )


def _conv(width: int, classes: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, classes)),
    )


FAMILIES = {
    "mlp": Family(
        *("mlp", _mlp, (256,), 256, 512),
        ns=(32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
        widths=(32, 64, 128, 256, 512, 1024, 1448, 2048),
        classes=(2, 4, 8, 16, 32, 64, 128),
        ks=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    ),
    "conv": Family(
        *("conv", _conv, (3, 16, 16), 16, 128),
        ns=(8, 16, 32, 64, 128, 256, 512, 1024),
        widths=(8, 16, 32, 48, 64, 96, 128),
        classes=(2, 4, 8, 16, 32, 64),
        ks=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    ),
}
SMOKE = Family("mlp", _mlp, (256,), 32, 64, (16, 32, 64, 128), (8, 16, 32, 64), (2, 4, 8, 16), (1, 2, 4, 8))


def fisher(task: Task, device: torch.device, memory: str | float) -> Any:
    """Ours on that device."""
    model, data = task.model.to(device), (task.x.to(device), task.y.to(device))
    return fl.Fisher(model, data, likelihood="categorical", memory=memory, progress=False)


def timed(runs: dict[float, Callable[[], Any]], device: torch.device, budget: float, rounds: int) -> dict[str, Any]:
    """Median seconds for each size; rounds go over all sizes until the budget is spent, at least three."""
    repeats = {}
    start = time.perf_counter()
    for size, run in runs.items():
        once(run, device)
        repeats[size] = max(1, math.ceil(_SHORTEST / max(once(run, device), 1e-6)))
    seconds: dict[float, list[float]] = {size: [] for size in runs}
    done = 0
    while done < rounds and (done < 3 or time.perf_counter() - start < budget):
        for size, run in runs.items():
            several = repeats[size]
            once(run, device)  # gives back to the system what a larger size left in the pool of buffers: up to 30 ms
            seconds[size].append(
                once(lambda run=run, several=several: [run() for _ in range(several)], device) / several
            )
        done += 1
    medians = [statistics.median(values) for values in seconds.values()]
    slope, error, points = fit(list(runs), medians)
    return {
        "sizes": list(runs),
        "seconds": medians,
        "slope": slope,
        "slope_error": error,
        "points": points,
        "rounds": done,
    }


def measure(family: Family, device: torch.device, budget: float, rounds: int, memory: str) -> dict[str, dict[str, Any]]:
    """``{variable: {quantity: figures}}`` of one network; ``budget`` seconds for each quantity."""
    found: dict[str, dict[str, Any]] = {}
    varied = {
        "N": [(n, family.task(n=n)) for n in family.ns],
        "P": [(task.size, task) for task in (family.task(width=w) for w in family.widths)],
        "C": [(c, family.task(classes=c)) for c in family.classes],
    }
    for variable, tasks in varied.items():
        captures = {size: lambda task=task: fisher(task, device, memory) for size, task in tasks}
        operators = {size: fisher(task, device, memory) for size, task in tasks}
        products = {size: _product(F, 1) for size, F in operators.items()}
        found[variable] = {
            "single": {**timed(products, device, budget, rounds), "paths": [_paths(F) for F in operators.values()]},
            "capture": timed(captures, device, budget, rounds),
        }
        del operators, products
    smallest = varied["N"][0][1]
    limit = budgets(Task(smallest.model.to(device), smallest.x.to(device), smallest.y.to(device), memory)).get(
        "streamed"
    )
    if limit is not None:
        streams = {size: fisher(task, device, limit) for size, task in varied["N"]}
        products = {size: _product(F, 1) for size, F in streams.items()}
        found["N"]["streamed"] = {
            **timed(products, device, budget, rounds),
            "memory": limit,
            "paths": [_paths(F) for F in streams.values()],
        }
    F = fisher(family.task(), device, memory)
    found["K"] = {"block": timed({k: _product(F, k) for k in family.ks}, device, budget, rounds)}
    return found


def _product(F: Any, k: int) -> Callable[[], Any]:
    v = vectors(F.n_params, k, F.device)
    return lambda: F @ v


def _paths(F: Any) -> str:
    """Which ways the layers take, as ``"2 explicit, 1 factors"``."""
    paths = [entry.path for entry in F.plan]
    return ", ".join(f"{paths.count(path)} {path}" for path in sorted(set(paths)))


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--budget", type=float, default=160.0, help="seconds in all, about (default 160)")
    parser.add_argument("--rounds", type=int, default=15, help="most rounds; at least 3 are made")
    parser.add_argument("--memory", default="2GiB", help="memory= of our Fisher (default 2GiB)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="one small network, few sizes: does it run?")
    parser.add_argument("--json", help="write all figures to this file")
    parser.add_argument("--markdown", help="write the section of docs/benchmarks.md to this file")
    parser.add_argument("--figure", help="draw the curves to this file")
    options = parser.parse_args()
    device = torch.device(options.device)
    families = [SMOKE] if options.smoke else [FAMILIES[name] for name in options.networks]
    budget = 0.0 if options.smoke else options.budget / (8 * len(families))
    full_float32()
    where = machine(device)
    print(where)
    settings = {key: getattr(options, key) for key in ("budget", "rounds", "memory", "device")}
    payload: dict[str, Any] = {"machine": where, "settings": settings, "networks": {}}
    for family in families:
        payload["networks"][family.name] = measure(family, device, budget, options.rounds, options.memory)
        write_json(options.json, payload)
    text = markdown(payload)
    print("\n" + text)
    if options.markdown:
        Path(options.markdown).write_text(text + "\n", encoding="utf-8")
    if options.figure:
        from figures import draw_scaling

        draw_scaling(payload, options.figure)


if __name__ == "__main__":
    main()
