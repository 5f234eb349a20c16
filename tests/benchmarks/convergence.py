"""Optimizers to fixed targets, after searches with equal budgets: steps, seconds, and what of it agrees with the papers.

Run with ``python tests/benchmarks/convergence.py``; ``--help`` lists the options. Every optimizer of a task may try as many learning rates as every other,
√10 apart, for as many steps as are then reported, on a seed that is not reported; the one with the lowest final training loss is run on at least three seeds. All of the
search is in the results. Measured are the steps and the training time to a fixed target, and to 90 % of the run's own final test accuracy, which is the
measure of the follow-up of CW-NGD. MNIST and Fashion-MNIST are read from the folder that FISHERLENS_DATA names.

The default is a part of the data that two cores do in under 25 minutes, ``--quick`` takes about two, ``--full`` all data, on a GPU. With ``--resume DIR`` finished runs are kept,
and the same command goes on where it was stopped. Seconds are those of runs that shared the machine with each other (``--workers``).
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from convergence_tasks import TASKS, Task
from convergence_text import draw, markdown, short
from harness import machine, write_json

import fisherlens as fl
from fisherlens.training.devices import on_device

MEASURES = ("steps_to_own_accuracy", "seconds_to_own_accuracy")


def measure(task: Task, size_name: str, options: Any) -> dict[str, Any]:
    """All figures of one task."""
    size = task.sizes[size_name]
    problem = fl.problem(task.problem, num_train=size.num_train, num_test=size.num_test)
    problem = on_device(problem, options.device)
    epoch = -(-len(problem.train[0]) // size.batch)
    entries = {label: one.entry(problem.likelihood, epoch) for label, one in task.entrants.items()}
    rates = {label: {"lr": one.rates(size.rates)} for label, one in task.entrants.items()}
    folder = None if options.resume is None else Path(options.resume) / f"{task.problem}-{size_name}"
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # edges of the search are columns of the tables
        found = fl.compare_optimizers(
            problem,
            entries,
            num_steps=size.num_steps,
            seeds=options.seeds,
            batch_size=size.batch,
            record_every=size.record_every,
            num_eval=size.num_eval,
            tune=rates,
            targets=task.targets[size_name],
            workers=options.workers,
            resume=folder,
        )
    if bool(found.interrupted.any()):
        raise KeyboardInterrupt
    return {
        "title": task.title,
        "about": task.about,
        "shown": task.shown,
        "description": problem.description,
        "num_steps": size.num_steps,
        "batch": size.batch,
        "record_every": size.record_every,
        "epochs": size.num_steps / epoch,
        "rates": size.rates,
        "seeds": options.seeds,
        "threads": int(found.attrs["threads"]),
        "wall_seconds": time.perf_counter() - started,
        "targets": dict(task.targets[size_name]),
        "optimizers": {label: figures(found, label, one.lr) for label, one in task.entrants.items()},
        "claims": [judged(claim, found) for claim in task.claims],
    }


def figures(found: Any, label: str, middle: float) -> dict[str, Any]:
    """What is reported of one optimizer; lists run over seeds, None is never."""
    one, last = found.sel(optimizer=label), found.sel(optimizer=label).isel(step=-1)
    taken = np.maximum(one.steps_taken.values, 1)
    rows: dict[str, Any] = {name: listed(one[name].values) for name in MEASURES}
    rows |= {name: listed(last[name].values) for name in ("train_loss", "test_loss", "test_accuracy")}
    rows["targets"] = {
        str(name): {
            "steps": listed(one.steps_to_target.sel(target=name).values),
            "seconds": listed(one.seconds_to_target.sel(target=name).values),
        }
        for name in found.target.values
    }
    spent = np.nanmax(one.seconds.values, axis=1)
    rows |= {"seconds_per_step": float(np.median(spent / taken)), "diverged": int(one.diverged.sum())}
    rows["search"] = {
        "rates": listed(one.option_lr.values),
        "scores": listed(one.trial_score.values),
        "diverged": [bool(value) for value in one.trial_diverged.values],
        "seconds": float(one.trial_seconds.sum()),
        "chosen": float(one.option_lr.values[one.trial_chosen.values][0]),
        "middle": middle,
        "at_edge": bool(one.at_edge),
    }
    rows["curves"] = {name: listed(one[name].median("seed").values) for name in ("train_loss", "test_accuracy")} | {
        "step": found.step.values.tolist()
    }
    return rows


def listed(values: np.ndarray) -> list[float | None]:
    """Numbers as JSON has them."""
    return [float(value) if np.isfinite(value) else None for value in values]


def judged(claim: Any, found: Any) -> dict[str, Any]:
    """Whether our runs agree with a claim, seed by seed: equal starts make pairs."""

    def values(label: str) -> np.ndarray:
        one = found.sel(optimizer=label)
        if claim.measure == "own":
            return one.steps_to_own_accuracy.values
        if claim.measure == "seconds_own":
            return one.seconds_to_own_accuracy.values
        last = one.isel(step=-1)
        return last.train_loss.values if claim.measure == "train_loss" else 1 - last.test_accuracy.values

    better, worse = (np.where(np.isfinite(v), v, np.inf) for v in (values(claim.better), values(claim.worse)))
    below, above = int((better < worse).sum()), int((better > worse).sum())
    verdict = "agrees" if below == len(better) else "disagrees" if above == len(better) else "not decided"
    return {
        "measure": claim.measure,
        "better": claim.better,
        "worse": claim.worse,
        "published": claim.published,
        "source": claim.source,
        "ours": [float(np.median(one)) if np.isfinite(np.median(one)) else None for one in (better, worse)],
        "seeds_below": below,
        "seeds_above": above,
        "seeds": len(better),
        "verdict": verdict,
    }


def parse() -> Any:
    """The options, ``--smoke`` applied."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=[name for name in TASKS if name != "smoke"], choices=list(TASKS))
    sizes = parser.add_mutually_exclusive_group()
    for name, words in (
        ("quick", "few steps on few images: about two minutes"),
        ("full", "all images: for a GPU"),
        ("smoke", "one tiny task without files: does it run?"),
    ):
        sizes.add_argument(f"--{name}", action="store_true", help=words)
    parser.add_argument("--seeds", type=int, default=3, help="of the reported runs (default 3)")
    parser.add_argument("--workers", type=int, default=2, help="processes, 0 for none (default 2)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--resume", help="keep finished runs in this folder, and go on with those in it")
    parser.add_argument("--json", help="write all figures to this file")
    parser.add_argument("--markdown", help="write the section of docs/benchmarks.md to this file")
    parser.add_argument("--figure", help="draw the curves and the steps to the targets to this file")
    options = parser.parse_args()
    options.size = "quick" if options.quick else "full" if options.full else "smoke" if options.smoke else "cpu"
    options.tasks = ["smoke"] if options.smoke else [name for name in options.tasks if name != "smoke"]
    if options.seeds < 3 and not options.smoke:
        print("Fewer than three seeds decide nothing.", file=sys.stderr)
    return options


def main() -> None:
    """Measure, print, and write what was asked for."""
    options = parse()
    where = machine(torch.device(options.device))
    print(where)
    payload: dict[str, Any] = {"machine": where, "size": options.size, "workers": options.workers, "tasks": {}}
    for name in options.tasks:
        try:
            payload["tasks"][name] = measure(TASKS[name], options.size, options)
        except fl.InputError as error:
            if "FISHERLENS_DATA" not in str(error):
                raise
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        print("\n" + short(name, payload["tasks"][name]), flush=True)
        write_json(options.json, payload)  # after each task: a run that is stopped leaves what it has
    if not payload["tasks"]:
        sys.exit("No task could be done.")
    if options.figure:
        draw(payload, options.figure)
    text = markdown(payload, options.figure and Path(options.figure).name)
    if options.markdown:
        Path(options.markdown).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
