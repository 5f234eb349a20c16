"""One run of a comparison as something that can be named, stored, sent to another process and done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fisherlens.likelihoods import as_likelihood
from fisherlens.training.base import Problem
from fisherlens.training.checkpoint import Checkpoint
from fisherlens.training.loop import MakeOptimizer, Ticker, run_training
from fisherlens.training.record import Run, Setting, recorded_steps

Done = Callable[["Job", Run], object]


@dataclass(frozen=True)
class Job:
    """A run: which optimizer with which options, which seed, how long. ``name`` is that of its file."""

    name: str
    label: str
    seed: int
    numbers: Mapping[str, Any]  # of the Setting: num_steps, batch_size, record_every, num_eval
    options: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None

    @property
    def num_steps(self) -> int:
        """How many steps it takes."""
        return int(self.numbers["num_steps"])

    def not_started(self) -> Run:
        """The record of a run that was not begun."""
        steps = recorded_steps(self.num_steps, self.numbers["record_every"])
        return Run(self.label, self.seed, steps, interrupted=True, ended_by="not started")


def setting_of(problem: Problem, numbers: Mapping[str, Any]) -> Setting:
    """What the runs of a problem share."""
    return Setting(problem.train, problem.test, as_likelihood(problem.likelihood), **numbers)


def perform(job: Job, problem: Problem, optimizers: Mapping[str, MakeOptimizer], bar: Ticker) -> Run:
    """Do one run."""
    try:
        return run_training(
            problem.model(job.seed),
            setting_of(problem, job.numbers),
            optimizers[job.label],
            label=job.label,
            seed=job.seed,
            callbacks=(),
            bar=bar,
            options=job.options,
            checkpoint=job.checkpoint,
            forgiving=True,
        )
    except Exception as error:
        with_options = f" with {dict(job.options)}" if job.options else ""
        error.add_note(f"This was in the run of optimizer {job.label!r}{with_options}, seed {job.seed}.")
        raise


class Counter:
    """Passes steps on to a progress bar and knows how many they were, so that a run that ends early can give up the rest."""

    def __init__(self, bar: Ticker, describe: str = ""):
        self.bar, self.count = bar, 0.0
        if describe and hasattr(bar, "set_description"):
            bar.set_description(describe)

    def update(self, n: float, /) -> None:
        """Count ``n`` more steps."""
        self.count += n
        self.bar.update(n)

    def finish(self, total: int) -> None:
        """Count what is missing to ``total``."""
        self.bar.update(total - self.count)


class Here:
    """Does runs one after the other in this process."""

    def __init__(self, problem: Problem, optimizers: Mapping[str, MakeOptimizer]):
        self.problem, self.optimizers = problem, optimizers
        self.threads = torch.get_num_threads()

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def run(self, jobs: Sequence[Job], done: Done, bar: Ticker) -> bool:
        """Do the runs in order and hand each to ``done``; False where Ctrl-C ended it."""
        try:
            for job in jobs:
                counter = Counter(bar, describe(job))
                run = perform(job, self.problem, self.optimizers, counter)
                counter.finish(job.num_steps)
                done(job, run)
                if run.interrupted:
                    return False
        except KeyboardInterrupt:
            return False
        return True


def describe(job: Job) -> str:
    """What the progress bar says of a run."""
    options = ", ".join(
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in job.options.items()
    )
    return f"{job.label}{f' ({options})' if options else ''}, seed {job.seed}"
