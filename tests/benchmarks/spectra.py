"""Spectra beside peers: leading eigenvalues, trace and density to stated accuracy, and the complete exact spectrum.

Run with ``python tests/benchmarks/spectra.py``; ``--help`` lists the options. The unit of time is one gradient evaluation (forward
and backward of the mean loss) on the same data, timed before and after each contestant; our fast ones run three times, and the median
counts. Ours start from the network (the capture is part of the time), the peers from their operator. Errors are against the complete
spectrum of a float64 copy. A peer that would take longer than ``--seconds`` is cut short, and its time to the end is then extrapolated from its
own products in this run; such figures carry "≈". The default run takes under fifteen minutes on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contestants import Task, Unavailable, curvlinops, torch_func
from harness import machine, once, write_json
from names import CURVLINOPS
from networks import NETWORKS, REFERENCES
from scipy.stats import wasserstein_distance
from spectra_peers import (
    Counted,
    arpack,
    hutchinson,
    lanczos_once,
    lanczos_plain,
    power_iteration,
    settling_trace,
)
from spectra_text import draw, markdown, short

import fisherlens as fl

TOP = 10
ACCURACY = 1e-4  # of the ten eigenvalues, relative to the largest
TRACE_ACCURACY = 0.01
GOALS = {"mlp": 60, "lenet": 30, "conv6": 40}  # complete spectrum at N = 128, in gradients
DENSITY_GOAL = {128: {"mlp": 30, "lenet": 30, "conv6": 30}, 1024: {"mlp": 15, "lenet": 5, "conv6": 5}}  # times faster
PYHESSIAN = "PyHessian's algorithm"
_UNIT_SECONDS = 0.1  # a gradient faster than this is timed in groups


@dataclass
class Truth:
    """What the contestants are measured by, from a float64 copy."""

    values: np.ndarray
    size: int
    trace: float
    probes_for_trace: int  # of Hutchinson, for a standard error of 1 %

    def distance(self, nodes: np.ndarray, weights: np.ndarray) -> float:
        """Wasserstein distance of a density to the spectrum, zeros included, in units of the mean eigenvalue."""
        own = np.full(len(self.values) + 1, 1 / self.size)
        own[-1] = (self.size - len(self.values)) / self.size
        found = wasserstein_distance([*self.values, 0.0], nodes, own, np.clip(weights, 0, None))
        return float(found / (self.trace / self.size))


def truth_of(task: Task) -> Truth:
    """The complete spectrum in float64."""
    double = task.in_double()
    F = fl.Fisher(double.model, (double.x, double.y), likelihood="categorical", memory="8GiB", progress=False)
    values = fl.spectrum(F)["eigenvalue"].values.clip(min=0)
    variance = 2 * (np.square(values).sum() - F.diagonal().square().sum().item())
    return Truth(values, task.size, values.sum(), int(np.ceil(variance / (TRACE_ACCURACY * values.sum()) ** 2)))


class Stage:
    """Times contestants one after the other, each between two timings of the gradient."""

    def __init__(self, task: Task, seconds: float):
        self.task, self.seconds = task, seconds
        self.task.gradient()
        self.group = max(1, int(_UNIT_SECONDS / once(task.gradient, task.device)))
        self.units: list[float] = []
        self.rows: list[dict[str, Any]] = []

    def _unit(self) -> float:
        found = once(lambda: [self.task.gradient() for _ in range(self.group)], self.task.device) / self.group
        self.units.append(found)
        return found

    def run(
        self, what: str, name: str, function: Callable[[], dict[str, Any]], *, rounds: int = 1, **facts: Any
    ) -> dict[str, Any]:
        """Add a row: seconds, gradients, and what the contestant says of itself.

        A contestant that was cut short returns ``scale``, by which its time and products are multiplied, and is marked.
        """
        seconds, ratios, found = [], [], {}
        for _ in range(rounds):
            before = self._unit()
            start = time.perf_counter()
            found = function()
            elapsed = time.perf_counter() - start
            seconds.append(elapsed)
            ratios.append(2 * elapsed / (before + self._unit()))
            if sum(seconds) > self.seconds:
                break  # a second look at something so slow would tell little more
        scale = found.pop("scale", 1.0)
        row = {"what": what, "contestant": name, "seconds": scale * statistics.median(seconds)}
        row |= {"gradients": scale * statistics.median(ratios), "extrapolated": scale > 1, **facts, **found}
        self.rows.append(row)
        print(f"  {what}, {name}: {row['gradients']:.4g} gradients", file=sys.stderr, flush=True)
        return row

    def product(self, build: Callable[[Task], Any]) -> Counted:
        """A peer's product with the clock of this run."""
        return Counted(build(self.task).apply, self.task.size, self.seconds)


def fisher(task: Task) -> fl.Fisher:
    """Ours, from the network."""
    return fl.Fisher(task.model, (task.x, task.y), likelihood="categorical", memory=task.memory, progress=False)


def leading(stage: Stage, truth: Truth, peer: Callable[[Task], Any], label: str, tol: float) -> None:
    """Ten largest eigenvalues."""
    top = truth.values[:TOP]

    def judged(values: np.ndarray, **facts: Any) -> dict[str, Any]:
        found = len(values)
        error = float(np.abs(values - top[:found]).max(initial=0.0) / top[0]) if found else float("nan")
        return {"error": error, "found": found, **facts}

    def complete() -> dict[str, Any]:
        return judged(fl.spectrum(fisher(stage.task))["eigenvalue"].values[:TOP], products=0)

    def lanczos() -> dict[str, Any]:
        result = fl.top_eigenvalues(fisher(stage.task), TOP, tol=tol)
        note = result.attrs["method"]
        return judged(result["eigenvalue"].values, products=int(result.attrs["num_matvecs"]), note=note)

    def theirs() -> dict[str, Any]:
        product = stage.product(peer)
        values = arpack(product, TOP, tol)
        return judged(values, products=product.count)

    def power() -> dict[str, Any]:
        product = stage.product(peer)
        values = power_iteration(product, top, ACCURACY * top[0])
        missing = len(values) < TOP
        note = f"stopped after {stage.seconds:.0f} s with {len(values)} of {TOP}; a lower bound" if missing else ""
        return judged(values, products=product.count, note=note, bound=missing)

    stage.run("top 10", "fisherlens: all eigenvalues, exact", complete, rounds=3)
    stage.run("top 10", "fisherlens: top_eigenvalues", lanczos, rounds=3)
    stage.run("top 10", f"{label} + scipy eigsh", theirs)
    stage.run("top 10", f"{PYHESSIAN} on {label}", power, favour="stops by the truth")


def trace(stage: Stage, truth: Truth, peer: Callable[[Task], Any], label: str) -> None:
    """The trace to 1 %."""

    def exact() -> dict[str, Any]:
        return {"error": abs(fisher(stage.task).trace() / truth.trace - 1), "products": 0}

    def sketched() -> dict[str, Any]:
        found = fl.estimate_trace(fisher(stage.task), num_matvecs=60)
        sem = float(found["trace_sem"]) / truth.trace
        return {
            "error": abs(float(found["trace"]) / truth.trace - 1),
            "sem": sem,
            "products": int(found.attrs["num_matvecs"]),
        }

    def theirs() -> dict[str, Any]:
        product = stage.product(peer)
        value, done = hutchinson(product, truth.probes_for_trace)
        share = truth.probes_for_trace / done
        note = f"from {done} of {truth.probes_for_trace} products" if share > 1 else ""
        sem = TRACE_ACCURACY * share**0.5
        return {
            "error": abs(value / truth.trace - 1),
            "sem": sem,
            "products": truth.probes_for_trace,
            "scale": share,
            "note": note,
        }

    def settling() -> dict[str, Any]:
        product = stage.product(peer)
        value, done = settling_trace(product)
        sem = TRACE_ACCURACY * (truth.probes_for_trace / done) ** 0.5
        return {
            "error": abs(value / truth.trace - 1),
            "sem": sem,
            "products": done,
            "note": "stops where the mean settles",
        }

    stage.run("trace to 1 %", "fisherlens: exact", exact, rounds=3)
    stage.run("trace to 1 %", "fisherlens: estimate_trace, 60 products", sketched, rounds=3)
    stage.run("trace to 1 %", f"Hutchinson on {label}", theirs)
    stage.run("trace to 1 %", f"{PYHESSIAN} on {label}", settling)


def our_measure(result: Any) -> tuple[np.ndarray, np.ndarray]:
    """Atoms of one of our densities: what is known exactly, the probes' nodes, and zeros."""
    size = int(result["size"])
    known = result["deflated_eigenvalue"].values
    known = known[np.isfinite(known)]
    nodes, weights = [known], [np.full(len(known), 1 / size)]
    if "nodes" in result:
        count = result.sizes["probe"]
        mass = result["weights"] * result["probe_norm"] ** 2 / (count * size)
        nodes.append(result["nodes"].values.ravel())
        weights.append(mass.transpose(*result["nodes"].dims).values.ravel())
    nodes, weights = np.concatenate(nodes), np.nan_to_num(np.concatenate(weights))
    return np.append(np.nan_to_num(nodes), 0.0), np.append(weights, max(0.0, 1 - weights.sum()))


def density(
    stage: Stage, truth: Truth, peer: Callable[[Task], Any], label: str, probes: int, steps: int, full: bool
) -> None:
    """The density from ``probes`` × ``steps`` products, and PyHessian's own 1 × 100."""

    def ours(deflate: Any) -> Callable[[], dict[str, Any]]:
        def run() -> dict[str, Any]:
            F = fisher(stage.task)
            result = fl.spectral_density(F, num_probes=probes, num_matvecs=steps, deflate=deflate, progress=False)
            return {
                "error": truth.distance(*our_measure(result)),
                "products": int(result.attrs["num_matvecs"]),
                "note": result.attrs["method"],
            }

        return run

    def theirs(lanczos: Any, wanted: int, length: int) -> Callable[[], dict[str, Any]]:
        def run() -> dict[str, Any]:
            product = stage.product(peer)
            rules = []
            for probe in range(wanted):
                rules.append(lanczos(product, length, probe))
                elapsed = time.perf_counter() - product.start
                if not full and elapsed * (len(rules) + 1) / len(rules) > stage.seconds:
                    break
            nodes, weights = (np.concatenate(part) for part in zip(*rules, strict=True))
            share = wanted / len(rules)
            note = f"from {len(rules)} of {wanted} probes" if share > 1 else ""
            return {"error": truth.distance(nodes, weights), "products": wanted * length, "scale": share, "note": note}

        return run

    stage.run("density", "fisherlens: as it comes", ours("auto"), rounds=3)
    stage.run("density", f"fisherlens: {probes} × {steps}, nothing exact", ours(None))
    stage.run("density", f"{label}'s Lanczos, {probes} × {steps}", theirs(lanczos_plain, probes, steps))
    own = 100 if probes > 3 else steps
    stage.run("density", f"{PYHESSIAN} on {label}, 1 × {own}", theirs(lanczos_once, 1, own))


def large_density(stage: Stage, peer: Callable[[Task], Any], label: str, probes: int, steps: int, full: bool) -> None:
    """The density of many examples: ours against the peers' products, of which as many are timed as fit the limit."""

    def ours() -> dict[str, Any]:
        result = fl.spectral_density(fisher(stage.task), num_probes=probes, num_matvecs=steps, progress=False)
        return {"products": int(result.attrs["num_matvecs"]), "note": result.attrs["method"]}

    def theirs() -> dict[str, Any]:
        product = stage.product(peer)
        wanted, v = probes * steps, torch.randn(stage.task.size, generator=torch.Generator().manual_seed(0))
        while product.count < wanted and (full or not product.spent):
            v = product(v / v.norm())
        share = wanted / product.count
        note = f"from {product.count} of {wanted} products, without the recurrence" if share > 1 else ""
        return {"products": wanted, "scale": share, "note": note}

    stage.run("density, large", "fisherlens", ours, rounds=3)
    stage.run("density, large", f"{label}, {probes} × {steps}", theirs)


def measure(network: str, options: Any) -> dict[str, Any]:
    """All figures of one network."""
    model, (x, y) = NETWORKS[network].make(options.n)
    task = Task(model, x, y)
    peer, label = curvlinops, CURVLINOPS
    try:
        first = peer(task.copy())
    except Unavailable:
        peer, label = torch_func, "torch.func GGN"
        first = peer(task.copy())
    first.apply(torch.ones(task.size))  # what is loaded on first use is nobody's time
    fl.spectrum(fisher(task.part(2)))
    stage, truth = Stage(task, options.seconds), truth_of(task)

    def complete() -> dict[str, Any]:
        result = fl.spectrum(fisher(task))
        values = result["eigenvalue"].values
        return {"error": float(np.abs(values - truth.values[: len(values)]).max() / truth.values[0]), "products": 0}

    stage.run("complete spectrum", "fisherlens: spectrum", complete, rounds=3)
    leading(stage, truth, peer, label, options.tol)
    trace(stage, truth, peer, label)
    density(stage, truth, peer, label, options.probes, options.steps, options.full)
    found = {"n": len(y), "params": task.size, "order": len(truth.values), "rows": stage.rows}
    found["gradient_seconds"] = statistics.median(stage.units)
    if options.large:
        model, (x, y) = NETWORKS[network].make(options.large)
        big = Stage(Task(model, x, y, memory=options.memory), options.seconds)
        large_density(big, peer, label, options.probes, options.steps, options.full)
        found["large"] = {"n": options.large, "rows": big.rows, "gradient_seconds": statistics.median(big.units)}
    found["goals"] = {"complete": GOALS.get(network), "density": DENSITY_GOAL.get(options.n or 0, {}).get(network)}
    found["goals"]["large"] = DENSITY_GOAL.get(options.large or 0, {}).get(network)
    return found


def parse() -> Any:
    """The options, ``--smoke`` applied."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(REFERENCES), choices=list(NETWORKS))
    parser.add_argument("--n", type=int, default=128, help="examples (default 128)")
    parser.add_argument(
        "--large", type=int, nargs="?", const=1024, help="also the density of this many examples (1024)"
    )
    parser.add_argument("--memory", default="4GiB", help="memory= of our Fisher with --large (default 4GiB)")
    parser.add_argument("--probes", type=int, default=10)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--tol", type=float, default=1e-3, help="of eigsh and top_eigenvalues (default 1e-3)")
    parser.add_argument("--seconds", type=float, default=60.0, help="longest run of a peer (default 60)")
    parser.add_argument("--full", action="store_true", help="let the peers' densities run to their end, however long")
    parser.add_argument("--smoke", action="store_true", help="one tiny network: does it run?")
    parser.add_argument("--json", help="write all figures to this file")
    parser.add_argument("--markdown", help="write the section of docs/benchmarks.md to this file")
    parser.add_argument("--figure", help="draw time against accuracy to this file")
    options = parser.parse_args()
    if options.smoke:
        options.networks, options.n, options.probes, options.steps, options.seconds = ["tiny"], 16, 3, 8, 0.5
        options.large = options.large and 32
    return options


def main() -> None:
    """Measure, print, and write what was asked for."""
    options = parse()
    where = machine(torch.device("cpu"))
    print(where)
    settings = {
        key: getattr(options, key) for key in ("n", "probes", "steps", "tol", "seconds", "full", "large", "memory")
    }
    payload: dict[str, Any] = {"machine": where, "settings": settings, "accuracy": ACCURACY, "networks": {}}
    for name in options.networks:
        payload["networks"][name] = measure(name, options)
        print("\n" + short(name, payload["networks"][name]), flush=True)
        write_json(options.json, payload)  # after each network: a run that is stopped leaves what it has
    text = markdown(payload)
    print("\n" + text)
    if options.markdown:
        Path(options.markdown).write_text(text + "\n", encoding="utf-8")
    if options.figure:
        draw(payload, options.figure)


if __name__ == "__main__":
    main()
