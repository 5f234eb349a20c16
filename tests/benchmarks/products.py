"""Exact Fisher-vector products beside peers: time, peak memory and error.

Run with ``python tests/benchmarks/products.py``; ``--help`` lists the options. The unit of time is one gradient evaluation (forward
and backward of the mean loss) on the same data, timed at most a second before what it is compared with; ratios are medians of
interleaved rounds, per vector for blocks. Peak memory is taken in a fresh process per contestant. Errors are relative to the plain
``torch.func`` recipe in float64. A peer that is not installed, or that does not know a layer, gets "-" and a note.
"""

from __future__ import annotations

import argparse
import re
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from contestants import ALL, COMPILED, PEERS, Product, Task, Unavailable, attempt, budgets, truth
from harness import SHORT, full_float32, machine, once, paced, write_json
from names import HESSIAN, LINEARISED, OURS, STREAMED
from networks import MORE, NETWORKS, REFERENCES
from peaks import elsewhere, vectors
from products_text import markdown, short

BLOCKS = (4, 8, 16, 64)
KEY = (1, 16)  # the columns of design.md's table, measured before all others
# What design.md asks of us, in gradient evaluations: single, per vector in a block of 16, streamed single.
GOALS = {"mlp": (1.05, 0.95, 1.8), "lenet": (0.6, 0.16, 2.0), "conv6": (1.0, 0.17, 2.0)}
_LEAST = 3  # rounds of a slow contestant
_ONCE = 45.0  # seconds; a run beyond the budget still takes part, with one round, if it is no longer
_STRETCH = 2.5  # times the budget that the columns of design.md's table may take, if they must
_WARM = 2.0  # seconds; what takes longer needs no run only to warm up


def available(device: torch.device) -> float:
    """Bytes that can still be taken."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text()) if meminfo.exists() else None
    return int(found[1]) * 1024.0 if found else float("inf")


def entrants(task: Task, memory: dict[str, int], repeats: int) -> dict[str, Task]:
    """Each contestant with a task of its own; ours that stream or keep the graph under the budgets that make them."""
    names = [OURS, LINEARISED, STREAMED, HESSIAN, *PEERS, *(COMPILED if task.device.type == "cuda" else ())]
    found = {}
    for name in names:
        own = task.copy()
        if name in (LINEARISED, STREAMED):
            if name.split()[-1] not in memory:
                continue
            own.memory = memory[name.split()[-1]]
        if name == STREAMED:
            own.memory, own.repeats = own.memory * repeats, repeats
        found[name] = own
    return found


def columns_of(name: str, product: Product, blocks: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers of vectors with which a contestant is measured."""
    if not product.blocks:
        return (1,)
    return tuple(k for k in (1, *blocks) if k in KEY or name not in {LINEARISED, STREAMED, HESSIAN, *COMPILED})


def all_peaks(network: str, tasks: dict[str, Task], ready: dict[str, Product], options: Any) -> dict[str, dict]:
    """Peak memory of every contestant, single and in a block of 16, two at a time."""
    single_only = {LINEARISED, HESSIAN, *COMPILED, *(name for name, product in ready.items() if not product.blocks)}
    jobs = [(name, k) for k in KEY for name in ready if k == 1 or name not in single_only]
    if options.smoke:
        jobs = [(OURS, 1)]
    with ThreadPoolExecutor(1 if options.device.startswith("cuda") else min(2, torch.get_num_threads())) as pool:
        futures = {
            (name, k): pool.submit(
                elsewhere,
                network=network,
                contestant=name,
                columns=k,
                device=options.device,
                memory=tasks[name].memory,
                repeats=tasks[name].repeats,
                n=options.n,
            )
            for name, k in jobs
        }
        found: dict[str, dict] = {name: {} for name in tasks}
        for (name, k), future in futures.items():
            found[name][str(k)] = future.result()
    return found


class Timing:
    """Chooses what is timed and how often, so that a network takes about ``budget`` seconds."""

    def __init__(self, task: Task, ready: dict[str, Product], peaks: dict[str, dict], options: Any):
        self.task, self.ready, self.peaks, self.options = task, ready, peaks, options
        self.expected: dict[tuple[str, int], float] = {}
        self.once: set[tuple[str, int]] = set()  # beyond the budget: one round
        self.skipped: dict[tuple[str, int], str] = {}
        self.blocks: dict[int, torch.Tensor] = {}

    def run(self) -> dict[str, dict[str, float]]:
        """Figures by ``"contestant|K"``, and those of the gradient under ``"unit"``."""
        wanted = {name: columns_of(name, product, self.options.blocks) for name, product in self.ready.items()}
        order = [k for k in (*KEY, *self.options.blocks) if k == 1 or k in self.options.blocks]
        for k in dict.fromkeys(order):
            for name, columns in wanted.items():
                if k in columns:
                    self._enter(name, k)
        spare = max(0.0, self.options.budget - self._planned()) / max(1, len(self.expected))
        rounds = {
            f"{name}|{k}": 1 if (name, k) in self.once else min(self.options.rounds, _LEAST + int(spare / seconds))
            for (name, k), seconds in self.expected.items()
        }
        runs = {f"{name}|{k}": self._runner(name, k) for name, k in sorted(self.expected, key=lambda e: e[1])}
        return paced(runs, unit=self.task.gradient, rounds=rounds, device=self.task.device)

    def _planned(self) -> float:
        return sum((1 if entry in self.once else _LEAST) * seconds for entry, seconds in self.expected.items())

    def _runner(self, name: str, k: int) -> Any:
        if k not in self.blocks:
            self.blocks[k] = vectors(self.task.size, k, self.task.device)
        product, v = self.ready[name], self.blocks[k]
        return lambda: product.apply(v)

    def _enter(self, name: str, k: int) -> None:
        """Take part with K vectors, unless time or memory do not allow it."""
        smaller = [j for (other, j) in self.expected if other == name and j < k]
        guess = self.expected[name, max(smaller)] * k / max(smaller) if smaller else 0.0
        planned = self._planned() + _LEAST * guess
        important = name == OURS or (k in KEY and name not in (LINEARISED, HESSIAN))
        if planned > self.options.budget * (_STRETCH if important else 1):
            if guess > _ONCE:
                self.skipped[name, k] = "time"
                return
            self.once.add((name, k))
        known = self.peaks.get(name, {}).get("16", {}).get("peak", 0) if k > 16 else 0
        needed = max(known * k / 16, 6.0 * self.task.size * k * 4)
        if needed > 0.8 * available(self.task.device):
            self.skipped[name, k] = "memory"
            self.once.discard((name, k))
            return
        if guess < _WARM:
            run = self._runner(name, k)
            guess = once(run, self.task.device)
            if guess < _WARM:
                guess = once(run, self.task.device)
        self.expected[name, k] = guess


def errors(task: Task, ready: dict[str, Product]) -> dict[str, float]:
    """Largest relative difference from the truth, over a single product and, where there are blocks, one of three."""
    block = vectors(task.size, 3, task.device)
    exact, found = {}, {}
    for name, product in ready.items():
        if product.matrix not in exact:
            exact[product.matrix] = truth(task, block[:, [0, 2]], product.matrix)
        first, last = exact[product.matrix].T
        pairs = [(product.apply(block[:, 0].contiguous()), first)]
        if product.blocks and name not in COMPILED:  # which would compile for three vectors
            answer = product.apply(block)
            pairs += [(answer[:, 0], first), (answer[:, 2], last)]
        found[name] = max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)
    return found


def measure(network: str, options: Any) -> dict[str, Any]:
    """All figures of one network."""
    device = torch.device(options.device)
    torch.compiler.reset()  # nothing compiled for the network before
    model, (x, y) = NETWORKS[network].make(options.n)
    task = Task(model.to(device), x.to(device), y.to(device), options.memory)
    task.gradient()
    limits = budgets(task)
    ready: dict[str, Product] = {}
    notes: dict[str, str] = {}
    tasks = entrants(task, limits, NETWORKS[network].streamed)
    for name, own in tasks.items():
        try:
            ready[name] = attempt(ALL[name], own, first_small=name not in COMPILED)
        except Unavailable as reason:
            notes[name] = str(reason)
    for name, product in ready.items():
        seconds = product.facts.get("capture_seconds", _WARM)
        if seconds < _WARM:  # again, now that everything is warm
            again = [ALL[name](tasks[name]).facts["capture_seconds"] for _ in range(_LEAST)]
            product.facts["capture_seconds"] = statistics.median(again)
    peaks = all_peaks(network, tasks, ready, options) if options.peaks else {}
    difference = errors(task, ready)
    timing = Timing(task, ready, peaks, options)
    figures = timing.run()
    contestants: dict[str, Any] = {name: {"note": note} for name, note in notes.items()}
    for name, product in ready.items():
        capture = product.facts.get("capture_seconds")
        contestants[name] = {
            **product.facts,
            "matrix": product.matrix,
            "capture": capture / figures["unit"]["seconds"] / tasks[name].repeats if capture else None,
            "columns": {
                str(k): {
                    **figures[f"{name}|{k}"],
                    "per_vector": figures[f"{name}|{k}"]["ratio"] / k / tasks[name].repeats,
                }
                for k in columns_of(name, product, options.blocks)
                if f"{name}|{k}" in figures
            },
            "skipped": {str(k): why for (other, k), why in timing.skipped.items() if other == name},
            "error": difference[name],
            "peaks": peaks.get(name, {}),
        }
    return {
        "n": len(task.y),
        "streamed": NETWORKS[network].streamed,
        "params": task.size,
        "gradient_seconds": figures["unit"]["seconds"],
        "goals": dict(zip(("single", "block", "streamed"), GOALS[network], strict=True)) if network in GOALS else None,
        "contestants": {name: contestants[name] for name in tasks},
    }


def parse() -> Any:
    """The options, ``--smoke`` applied."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=[*REFERENCES, *MORE], choices=list(NETWORKS))
    parser.add_argument("--blocks", nargs="*", type=int, default=list(BLOCKS), help="numbers of vectors in a block")
    parser.add_argument("--budget", type=float, default=80.0, help="seconds of timing per network, about (default 80)")
    parser.add_argument("--rounds", type=int, default=15, help="most rounds; slow contestants get fewer, at least 3")
    parser.add_argument("--memory", default="2GiB", help="memory= of our Fisher (default 2GiB)")
    parser.add_argument("--n", type=int, help="examples, in place of each network's own number")
    parser.add_argument("--device", default="cpu", help="with cuda, compiled peers take part too")
    parser.add_argument("--no-peaks", dest="peaks", action="store_false", help="leave peak memory out")
    parser.add_argument("--plans", action="store_true", help="also print how each layer is kept")
    parser.add_argument("--smoke", action="store_true", help="one tiny network, few rounds: does it run?")
    parser.add_argument("--json", help="write all figures to this file")
    parser.add_argument("--markdown", help="write the section of docs/benchmarks.md to this file")
    parser.add_argument("--figure", help="draw time and memory to this file")
    options = parser.parse_args()
    if options.smoke:
        options.networks, options.blocks, options.n, options.budget, options.rounds = ["tiny"], [4], None, 20.0, 3
    options.blocks = tuple(options.blocks)
    return options


def main() -> None:
    """Measure, print, and write what was asked for."""
    options = parse()
    full_float32()
    where = machine(torch.device(options.device))
    print(where)
    settings = {key: getattr(options, key) for key in ("budget", "rounds", "memory", "blocks", "device")}
    settings["short"] = SHORT
    payload: dict[str, Any] = {"machine": where, "settings": settings, "networks": {}}
    for name in options.networks:
        payload["networks"][name] = measure(name, options)
        print("\n" + short(name, payload["networks"][name]), flush=True)
        if options.plans:
            print(payload["networks"][name]["contestants"][OURS].get("plan", ""))
        write_json(options.json, payload)  # after each network: a run that is stopped leaves what it has
    text = markdown(payload)
    print("\n" + text)
    if options.markdown:
        Path(options.markdown).write_text(text + "\n", encoding="utf-8")
    if options.figure:
        from figures import draw_products

        draw_products(payload, options.figure)


if __name__ == "__main__":
    main()
