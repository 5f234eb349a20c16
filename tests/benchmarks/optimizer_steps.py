"""Steps of the optimizers beside SGD with momentum: time and peak memory, amortised at each method's published periods.

Run with ``python tests/benchmarks/optimizer_steps.py``; ``--help`` lists the options. A step is forward, backward and ``opt.step()`` on
one batch that stays the same. Plain steps, steps with statistics, and steps with statistics and inverses are timed apart, in short
periods that hold all of them, each over a step of SGD with momentum timed at most a second before; the median ratios are then weighted
as in a period of the published length. KFAC and what is compared with it run in the same rounds. Parameters go back to their start
after every step, off the clock. Peak memory is taken in a fresh process per method. A library that is not installed gets "-" and a note.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from harness import full_float32, machine, once, write_json
from optimizer_entrants import (
    ENTRANTS,
    GOAL_BATCH,
    GOALS,
    KFAC,
    PROJECTED,
    SGD,
    TOGETHER,
    Subject,
    Unavailable,
    amortised,
    kind_of_step,
)
from optimizer_peaks import elsewhere
from optimizer_steps_text import draw, markdown, short
from optimizer_tasks import NETWORKS, ON_CPU, ON_GPU, Task

_STALE = 1.0  # seconds after which the unit is timed again, as in harness.py
_LEAST = 3  # periods of a slow method
_LIMIT = 540.0  # seconds of a run without arguments on a CPU, so that it ends within ten minutes
_LATE = "not begun, as the time of the run was over (--limit)"


class Runner:
    """One method on one task, its kinds of steps timed in turn."""

    def __init__(self, name: str, task: Task, longest: float):
        self.task, self.cycle = task, ENTRANTS[name].cycle(task.kind)
        self.subject: Subject = ENTRANTS[name].make(task, *self.cycle)
        self.length = max(1, self.cycle[1])
        self.number, self.ratios, self.seconds = 0, {}, {}
        for _ in range(self.length + 1):  # the first ones allocate and prepare
            took = self._step()
            if took > longest:
                raise Unavailable(f"one step took {took:.0f} s")
        start = time.perf_counter()
        for _ in range(self.length):
            self._step()
        self.expected = time.perf_counter() - start

    def _step(self) -> float:
        seconds = once(self.subject.step, self.task.device)
        self.subject.restore()
        self.number += 1
        return seconds

    def run(self, unit: Unit) -> None:
        """Time one short period."""
        for _ in range(self.length):
            kind, one = kind_of_step(self.number, self.cycle), unit.recent()
            took = self._step()
            self.seconds.setdefault(kind, []).append(took)
            self.ratios.setdefault(kind, []).append(took / one)

    def found(self) -> dict[str, Any]:
        """Ratios and seconds by kind of step, what is kept, and what did not go smoothly."""
        kinds = {}
        for kind, values in self.ratios.items():
            low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
            kinds[kind] = {"ratio": middle, "low": low, "high": high, "seconds": statistics.median(self.seconds[kind])}
            kinds[kind]["steps"] = len(values)
        diagnostics = getattr(self.subject.optimizer, "diagnostics", {})
        events = {what: n for what, n in diagnostics.items() if n and what in ("retries", "fallbacks", "skipped")}
        return {"kinds": kinds, "kept": self.subject.kept(), "events": events}


class Unit:
    """SGD with momentum on the same task."""

    def __init__(self, task: Task):
        self.task, self.subject = task, ENTRANTS[SGD].make(task, 0, 0)
        for _ in range(3):
            self._time()
        self.all: list[float] = []
        self.last = float("-inf")

    def _time(self) -> float:
        seconds = once(self.subject.step, self.task.device)
        self.subject.restore()
        return seconds

    def recent(self) -> float:
        """Seconds of a step, taken at most a second ago."""
        if time.perf_counter() - self.last > _STALE:
            self.renew()
        return self.all[-1]

    def renew(self) -> None:
        """Time a step now."""
        self.all.append(self._time())
        self.last = time.perf_counter()


def timed(names: list[str], task: Task, unit: Unit, options: Any) -> dict[str, dict[str, Any]]:
    """Methods in the same rounds: the unit, then a short period of each."""
    runners, found = {}, {}
    for name in names:
        if time.perf_counter() > options.deadline:
            found[name] = {"note": _LATE}
            continue
        try:
            runners[name] = Runner(name, task, options.longest)
        except Unavailable as reason:
            found[name] = {"note": str(reason)}
        except Exception as error:  # out of memory, or a peer that does not know a layer: said in the results
            found[name] = {"note": f"{type(error).__name__}: {error}".splitlines()[0]}
    round_seconds = sum(runner.expected for runner in runners.values())
    allowed = options.budget * len(runners) / max(round_seconds, 1e-9)
    for k in range(min(options.rounds, max(_LEAST, int(allowed)))):
        if k and time.perf_counter() > options.deadline:
            break
        unit.renew()
        for runner in runners.values():
            runner.run(unit)
    return found | {name: runner.found() for name, runner in runners.items()}


def rates_of(name: str, task: Task, found: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of a method at each of its periods."""
    rows = []
    for rate in ENTRANTS[name].rates(task.kind):
        row = {"rate": list(rate)}
        for what in ("ratio", "low", "high", "seconds"):
            row[what] = amortised({kind: one[what] for kind, one in found["kinds"].items()}, rate)
        row["goal"] = GOALS.get((name, task.network, rate)) if task.batch == GOAL_BATCH else None
        rows.append(row)
    return rows


def projected_goals(methods: dict[str, Any]) -> None:
    """ProjectedKFAC's goal is what KFAC needs with the same statistics."""
    known = {row["rate"][0]: row["ratio"] for row in methods.get(KFAC, {}).get("rates", [])}
    for row in methods.get(PROJECTED, {}).get("rates", []):
        row["goal"] = known.get(row["rate"][0])


def peaks_of(network: str, batch: int, options: Any) -> dict[str, dict[str, Any]]:
    """Peak memory of every method, two processes at a time on a CPU."""
    names = [name for name in (SGD, KFAC) if name in options.methods] if options.smoke else options.methods
    workers = 1 if options.device.startswith("cuda") else min(2, torch.get_num_threads())
    with ThreadPoolExecutor(2 if options.smoke else workers) as pool:
        spec = {"timeout": options.timeout, "network": network, "batch": batch, "device": options.device}
        jobs = {name: pool.submit(elsewhere, entrant=name, **spec) for name in names}
        return {name: job.result() for name, job in jobs.items()}


def measure(network: str, batch: int, options: Any) -> dict[str, Any]:
    """All figures of one network at one batch size."""
    task = Task(network, batch, torch.device(options.device))
    peaks = peaks_of(network, batch, options) if options.peaks and time.perf_counter() < options.deadline else {}
    unit = Unit(task)
    together = [name for name in TOGETHER if name in options.methods]
    groups = [together] if together else []
    groups += [[name] for name in options.methods if name not in (*TOGETHER, SGD)]
    measured: dict[str, Any] = {}
    for group in groups:
        slow = [name for name in group if "some steps took" in peaks.get(name, {}).get("note", "")]
        measured |= {name: {"note": peaks[name]["note"]} for name in slow}
        measured |= timed([name for name in group if name not in slow], task, unit, options)
    methods = {name: measured[name] for name in options.methods if name in measured}
    for name, found in methods.items():
        if "kinds" in found:
            found["rates"] = rates_of(name, task, found)
    if batch == GOAL_BATCH:
        projected_goals(methods)
    base = peaks.get(SGD, {}).get("peak")
    for name, one in peaks.items():
        if name in methods and "peak" in one:
            methods[name]["peak"], methods[name]["peak_ratio"] = one["peak"], one["peak"] / base if base else None
        elif name in methods and "note" not in methods[name]:
            methods[name]["peak_note"] = one["note"]
    return {
        "network": network,
        "batch": batch,
        "params": sum(p.numel() for p in unit.subject.model.parameters()),
        "sgd_seconds": statistics.median(unit.all),
        "sgd_peak": base,
        "methods": methods,
    }


def parse() -> Any:
    """The options, ``--smoke`` applied."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", choices=list(NETWORKS), help="in place of the usual ones")
    parser.add_argument(
        "--batch",
        nargs="*",
        type=int,
        help="batch sizes for all networks; default on a CPU: 128, and 1024 for LeNet; with cuda: both for all",
    )
    parser.add_argument("--methods", nargs="*", choices=list(ENTRANTS), help="some of the methods in place of all")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds of timing per method, about (default 3)")
    parser.add_argument("--rounds", type=int, default=15, help="most rounds; slow methods get fewer, at least 3")
    parser.add_argument("--longest", type=float, default=20.0, help="seconds; a method with a longer step is left out")
    parser.add_argument(
        "--timeout", type=float, default=120.0, help="seconds for the first steps of a method where peaks are taken"
    )
    parser.add_argument("--device", default="cpu", help="with cuda also VGG-16 and ResNet-18")
    parser.add_argument(
        "--limit",
        type=float,
        help=f"seconds after which nothing new is begun; default {_LIMIT:g} for the usual run on a CPU",
    )
    parser.add_argument("--no-peaks", dest="peaks", action="store_false", help="leave peak memory out")
    parser.add_argument("--smoke", action="store_true", help="one tiny network, few rounds: does it run?")
    parser.add_argument("--json", help="write all figures to this file")
    parser.add_argument("--markdown", help="write the section of docs/benchmarks.md to this file")
    parser.add_argument("--figure", help="draw the amortised times to this file")
    options = parser.parse_args()
    options.methods = list(dict.fromkeys([SGD, *(options.methods or ENTRANTS)]))
    if options.smoke:
        options.networks, options.budget, options.rounds = ["tiny"], 0.2, 3
    options.runs = runs_of(options)
    limit = _LIMIT if options.runs == list(ON_CPU) and options.limit is None else options.limit or math.inf
    options.deadline = time.perf_counter() + limit
    return options


def runs_of(options: Any) -> list[tuple[str, int]]:
    """Networks and batch sizes: the usual ones, or what was asked for."""
    usual = ON_GPU if options.device.startswith("cuda") else ON_CPU
    if options.networks is None and options.batch is None:
        return list(usual)
    networks = options.networks or dict.fromkeys(network for network, _ in usual)
    return [(name, batch) for name in networks for batch in NETWORKS[name].batches or options.batch or (GOAL_BATCH,)]


def main() -> None:
    """Measure, print, and write what was asked for."""
    options = parse()
    full_float32()
    warnings.simplefilter("ignore")  # of parameters that a method does not cover; refusals become notes
    where = machine(torch.device(options.device))
    print(where)
    settings = {key: getattr(options, key) for key in ("budget", "rounds", "longest", "device")}
    payload: dict[str, Any] = {"machine": where, "settings": settings, "runs": []}
    for network, batch in options.runs:
        payload["runs"].append(measure(network, batch, options))
        print("\n" + short(payload["runs"][-1]), flush=True)
        write_json(options.json, payload)  # after each: a run that is stopped leaves what it has
    text = markdown(payload)
    if options.markdown:
        Path(options.markdown).write_text(text + "\n", encoding="utf-8")
    if options.figure:
        draw(payload, options.figure)


if __name__ == "__main__":
    main()
