"""Blocks of the Fisher: all layer couplings once the Grams exist, and the complete table of independence.

Run with ``python tests/benchmarks/blocks.py``; ``--help`` lists the options. The unit of time is one gradient evaluation (forward
and backward of the mean loss) on the same data, timed before and after each run of ours; ratios are medians. The table is
``fl.independence`` with its default partitions: energy, cosine, decrease, divergence and condition numbers to 1 % of five segmentations, for
every layer and the whole network. Its Gram matrices are part of its time, the capture of the scores stands beside it. Then each
segmentation alone, which says what is dear.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from blocks_text import markdown, short
from contestants import Task
from harness import full_float32, machine, once, write_json
from networks import NETWORKS, REFERENCES

import fisherlens as fl

# What design.md and the plan of the package ask of us, in gradient evaluations.
GOALS = {"couplings": dict.fromkeys(REFERENCES, 2.0), "table": {"lenet": 60.0}}
# What fl.independence judges by default.
PARTITIONS = inspect.signature(fl.independence).parameters["partitions"].default
_UNIT_SECONDS = 0.1  # a gradient faster than this is timed in groups


def in_gradients(task: Task, prepare: Callable[[], Any], run: Callable[[Any], Any], rounds: int) -> dict[str, float]:
    """Median seconds and gradient evaluations of ``run``, each between two timings of the gradient; ``prepare`` is nobody's time."""
    task.gradient()
    group = max(1, int(_UNIT_SECONDS / once(task.gradient, task.device)))

    def unit() -> float:
        return once(lambda: [task.gradient() for _ in range(group)], task.device) / group

    seconds, ratios, units = [], [], []
    for _ in range(rounds):
        ready = prepare()
        before = unit()
        elapsed = once(lambda ready=ready: run(ready), task.device)
        after = unit()
        seconds.append(elapsed)
        units += [before, after]
        ratios.append(2 * elapsed / (before + after))
    found = {"seconds": statistics.median(seconds), "gradients": statistics.median(ratios)}
    return found | {
        "low": min(ratios),
        "high": max(ratios),
        "rounds": rounds,
        "gradient_seconds": statistics.median(units),
    }


def fisher(task: Task) -> fl.Fisher:
    """Ours, from the network."""
    return fl.Fisher(task.model, (task.x, task.y), likelihood="categorical", memory=task.memory, progress=False)


def with_grams(task: Task) -> fl.Fisher:
    """The same with the Gram matrix of every layer."""
    F = fisher(task)
    F.gram()
    return F


def truth_of_couplings(F: fl.Fisher) -> torch.Tensor:
    """Couplings of layers from the Gram matrices in float64."""
    grams = [F.scores.layer_gram(name).double() for name in F.layout.layer_names]
    inner = torch.stack([torch.stack([(a * b).sum() for b in grams]) for a in grams])
    own = inner.diagonal()
    return (inner / own.outer(own).sqrt()).sqrt()


def couplings(task: Task, rounds: int) -> dict[str, Any]:
    """All layer couplings, the Grams being there."""
    F = with_grams(task)
    found = torch.from_numpy(fl.coupling(F, "layer", num_null=0)["coupling"].values)
    row = in_gradients(task, lambda: F, lambda F: fl.coupling(F, "layer", num_null=0), rounds)
    return row | {"error": (found - truth_of_couplings(F)).abs().max().item(), "layers": len(found)}


def table(task: Task, rounds: int, check: bool) -> dict[str, Any]:
    """The complete table, and where asked for the error of its condition numbers against a hundred times the accuracy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fl.NumericalWarning)  # of partitions that do not fit, which are counted
        found: list[Any] = []
        row = in_gradients(
            task, lambda: fisher(task), lambda F: found.append(fl.independence(F, progress_bar=False)), rounds
        )
        first = found[0]
        row["left_out"] = int(first["kl_divergence"].isnull().sum())
        if check:
            close = fl.independence(fisher(task), tol=1e-4, progress_bar=False)
            gap = abs(first["condition_number"] / close["condition_number"] - 1)
            row["condition_error"] = float(gap.max())
    row["parts"] = {name: part(task, name) for name in PARTITIONS}
    return row


def part(task: Task, name: str) -> dict[str, float]:
    """The table of a single partition, the Grams being there; what several share is in each of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fl.NumericalWarning)
        return in_gradients(task, lambda: with_grams(task), lambda F: fl.independence(F, [name], progress_bar=False), 1)


def measure(network: str, options: Any) -> dict[str, Any]:
    """All figures of one network."""
    model, (x, y) = NETWORKS[network].make(options.n)
    task = Task(model, x, y, options.memory)
    fl.independence(
        fisher(task.part(2)), ["layer", "unit"], progress_bar=False
    )  # what is loaded on first use is nobody's time
    capture = in_gradients(task, lambda: None, lambda _: fisher(task), options.rounds)
    found = {"n": len(y), "params": task.size, "capture": capture, "couplings": couplings(task, options.rounds)}
    if network in options.tables:
        found["table"] = table(task, min(options.rounds, options.table_rounds), options.check)
    return found


def parse() -> Any:
    """The options, ``--smoke`` applied."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(REFERENCES), choices=list(NETWORKS))
    parser.add_argument(
        "--tables", nargs="*", default=["lenet"], choices=list(NETWORKS), help="networks whose table is made"
    )
    parser.add_argument("--n", type=int, default=128, help="examples (default 128)")
    parser.add_argument("--memory", default="2GiB", help="memory= of our Fisher (default 2GiB)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each (default 7)")
    parser.add_argument("--table-rounds", type=int, default=3, help="most rounds of a table (default 3)")
    parser.add_argument(
        "--check", action="store_true", help="also the error of the condition numbers, from a slower table"
    )
    parser.add_argument("--smoke", action="store_true", help="one tiny network: does it run?")
    parser.add_argument("--json", help="write all figures to this file")
    parser.add_argument("--markdown", help="write the section of docs/benchmarks.md to this file")
    options = parser.parse_args()
    if options.smoke:
        options.networks, options.tables, options.n, options.rounds, options.check = ["tiny"], ["tiny"], 8, 2, True
    return options


def main() -> None:
    """Measure, print, and write what was asked for."""
    options = parse()
    full_float32()
    where = machine(torch.device("cpu"))
    print(where)
    payload: dict[str, Any] = {
        "machine": where,
        "settings": {key: getattr(options, key) for key in ("n", "memory", "rounds", "tables")},
        "goals": GOALS,
        "networks": {},
    }
    for name in options.networks:
        payload["networks"][name] = measure(name, options)
        print("\n" + short(name, payload["networks"][name], GOALS), flush=True)
        write_json(options.json, payload)  # after each network: a run that is stopped leaves what it has
    text = markdown(payload)
    print("\n" + text)
    if options.markdown:
        Path(options.markdown).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
