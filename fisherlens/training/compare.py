"""Optimizers side by side: equal starts, equal batches, equal searches, several seeds."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from fisherlens._progress import progress as progress_bar
from fisherlens.errors import InputError
from fisherlens.likelihoods import Bernoulli, Categorical
from fisherlens.linalg.precision import own_precision
from fisherlens.training.base import check_count, check_seeds
from fisherlens.training.jobs import Counter, Here, Job, setting_of
from fisherlens.training.loop import MakeOptimizer, Ticker, build
from fisherlens.training.problems import Problem, seeded
from fisherlens.training.problems import problem as problem_by_name
from fisherlens.training.record import Run, Setting, default_record_every, describe, plain, to_dataset
from fisherlens.training.resume import Store, facts_of, optimizer_facts
from fisherlens.training.search import Trial, best, judge, search_variables
from fisherlens.training.singles import skip_singles
from fisherlens.training.starts import checked_start, refuse_if_none_began
from fisherlens.training.targets import check_targets
from fisherlens.training.tune import LogUniform, Tuning, as_tuning
from fisherlens.training.workers import Crew, make_crew

if TYPE_CHECKING:
    import xarray as xr


@own_precision
def compare_optimizers(
    problem: Problem | str,
    optimizers: Mapping[str, MakeOptimizer],
    *,
    num_steps: int,
    seeds: int | Sequence[int],
    batch_size: int = 64,
    record_every: int | None = None,
    num_eval: int | None = None,
    tune: Tuning | Mapping[str, Any] | None = None,
    targets: Mapping[str, float] | None = None,
    workers: int = 0,
    resume: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """Train a problem with several optimizers from equal initial weights, in equal batch order, once per seed.

    Parameters
    ----------
    problem
        A :class:`Problem`, or the name of one.
    optimizers
        Label → function ``model -> torch.optim.Optimizer``, or one that returns a pair (optimizer, learning-rate scheduler of torch).
        One that is tuned takes the options as keywords: ``lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr)``.
    num_steps, batch_size, record_every
        As in :func:`train`.
    seeds
        How many seeds, 0, 1, …, or the seeds themselves. A seed fixes initial weights and batch order for every optimizer, so that
        differences between optimizers are paired.
    num_eval
        Measure losses and accuracy on so many examples of each set, always the same ones, instead of on all.
    tune
        A :class:`Tuning`, or its dict ``{label: {option: values}}``, as in ``{"sgd": {"lr": [0.01, 0.1]}}``: options are searched first, on
        seeds that are not reported, and the best trial of each optimizer is what is then run.
    targets
        Metric → number that a run should reach: any of ``"train_loss"``, ``"test_loss"``, ``"test_accuracy"``. By default those of the
        problem.
    workers
        0 does the runs here, one after the other. A number starts so many processes, each on ``max(1, torch.get_num_threads() // workers)``
        threads; entries and the model factory must then be functions of a module. Runs on equal numbers of threads are equal to
        the bit.
    resume
        A folder that every finished run is kept in. The same call takes up the runs in it and does the others: on the CPU the result is
        then the same to the bit, but for ``seconds``. Other settings, data, options or versions are refused, with what differs. A run that
        was cut short starts again, from its last checkpoint where there is one.
    checkpoint_every
        Steps between checkpoints of a run, for long ones; None stores finished runs only, which is always right. Checkpoints are
        taken with SGD, Adam, AdamW and all of :mod:`fisherlens.optim`, perhaps with a scheduler of torch, whose state dicts are known
        to say all; any other optimizer starts its run again. Of the network they hold parameters, buffers and the global random state.
    progress
        True draws a progress bar, None only in a terminal.

    Returns
    -------
    Dataset with ``train_loss``, ``test_loss`` (nat), ``test_accuracy`` and ``seconds`` over (optimizer, seed, step), and
    ``steps_taken``, ``diverged``, ``interrupted``, ``ended_by`` over (optimizer, seed), as :func:`train` describes them. A run that
    diverges does not stop the others, nor does one whose network is not finite before its first step. Ctrl-C stops all and keeps what was recorded.

    ``steps_to_target``, ``seconds_to_target`` and ``reached`` over (target, optimizer, seed): the first recorded step at which the metric
    ``target`` is at least as good as ``target_value``, NaN where none is; it is known to within ``record_every`` steps (attribute
    ``step_resolution``). ``steps_to_own_accuracy`` and ``seconds_to_own_accuracy`` over (optimizer, seed): the same for 90 % of the test
    accuracy at the run's own last step, the measure of the follow-up of CW-NGD; it favours runs that end low.

    With ``tune``, over (optimizer, trial): ``trial_options``, ``trial_score`` (lower is better), ``trial_diverged``, ``trial_seconds``,
    ``trial_chosen`` and ``option_<name>`` of each numeric option; ``at_edge`` over optimizer.

    Raises
    ------
    InputError: no optimizer, no seed or a repeated one, an unknown problem, target or label, numbers below 1, an optimizer of another
    model, options that an entry does not take, functions that a worker cannot import, a factory that returns one network twice, batches of one
    example where batch normalisation trains, a ``resume`` folder of other settings or in use. TypeError: an optimizer instead of a function.
    All before the first step of any run. NonFiniteError: no run could begin. FileFormatError: a damaged file in ``resume``.

    Warns
    -----
    NumericalWarning: different numbers of trials, a best trial at the edge of its search, searches of which every trial diverged, seeds
    that are both searched and reported; initial weights that differ between two networks of one seed; a last batch of one example, which is
    left out where batch normalisation in training mode has no statistics of it; a ``resume`` folder that takes no more files, as of a full
    disk: the runs go on.

    Notes
    -----
    Cost: optimizers × seeds × ``num_steps`` gradient evaluations, and what each optimizer adds; a search adds trials × its seeds × its
    steps for each optimizer. Without a search learning rates are those of the entries: a comparison is only as fair as their choice.

    Examples
    --------
    >>> import torch
    >>> entries = {"sgd": lambda model, lr=0.1: torch.optim.SGD(model.parameters(), lr=lr)}
    >>> result = compare_optimizers("digits-mlp", entries, num_steps=20, seeds=2, record_every=10)
    >>> dict(result.train_loss.sizes)
    {'optimizer': 1, 'seed': 2, 'step': 3}
    >>> search = {"sgd": {"lr": [0.01, 0.3, 100.0]}}
    >>> result = compare_optimizers("digits-mlp", entries, num_steps=20, seeds=1, tune=search, targets={"train_loss": 2.0})
    >>> result.trial_options.values[result.trial_chosen.values].tolist(), int(result.steps_to_target[0, 0, 0]) <= 20
    (['lr=0.3'], True)
    """
    problem = problem_by_name(problem) if isinstance(problem, str) else problem
    if not isinstance(problem, Problem):
        raise TypeError(f"problem must be a fl.Problem or the name of one; got {type(problem).__name__}.")
    if not isinstance(optimizers, Mapping):
        raise TypeError(f"optimizers must be a dict label -> (model -> Optimizer); got {type(optimizers).__name__}.")
    every = default_record_every(num_steps) if record_every is None else record_every
    given = {"num_steps": num_steps, "batch_size": batch_size, "record_every": every, "num_eval": num_eval}
    setting = setting_of(problem, given)
    seeds = check_seeds(seeds)
    if not optimizers or not seeds or len(set(seeds)) < len(seeds):
        raise InputError(
            f"A comparison needs at least one optimizer and at least one seed, each once; got {list(optimizers)} and seeds {seeds}."
        )
    if checkpoint_every is not None:
        checkpoint_every = check_count(checkpoint_every, "checkpoint_every")
        if resume is None:
            raise InputError(
                "checkpoint_every says how often to store a run in the folder of resume=; give that folder too."
            )
    has_accuracy = isinstance(setting.likelihood, Categorical | Bernoulli)
    if targets is None:
        targets = {name: goal for name, goal in problem.targets.items() if has_accuracy or name != "test_accuracy"}
    goals = check_targets(targets, has_test=True, has_accuracy=has_accuracy)
    probe = checked_start(problem, seeds[0])
    setting = skip_singles(setting, probe)
    search = _search(as_tuning(tune, list(optimizers)), optimizers, setting, seeds, goals, has_accuracy)
    made = _probe(probe, optimizers, search, seeds[0], problem)
    numbers = setting.numbers
    total = len(optimizers) * len(seeds) * setting.num_steps + (search.total if search else 0)
    jobs = len(optimizers) * len(seeds)
    crew = make_crew(problem, optimizers, workers, max(jobs, search.count if search else 0))
    facts = {**numbers, "seeds": seeds, "threads": crew.threads, "search": search.facts() if search else None}
    with (
        _storing(resume, checkpoint_every, lambda: facts_of(problem, probe, made, **facts)) as store,
        progress_bar(total, desc="Compare optimizers", enabled=progress) as bar,
        crew,
    ):
        further: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        places: dict[str, int] = {}
        options: dict[str, Mapping[str, Any]] = {}
        going_on = True
        if search is not None:
            trials, going_on = search.run(crew, store, bar, goals)
            places = best(search.tuning, trials)
            further = search_variables(search.tuning, trials, places)
            options = {label: trials[label][place].options for label, place in places.items()}
        plan = {
            (label, seed): Job(_run_name(place, places.get(label), seed), label, seed, numbers, options.get(label, {}))
            for seed in seeds
            for place, label in enumerate(optimizers)
        }
        runs = {key: job.not_started() for key, job in plan.items()}
        if going_on:  # after Ctrl-C in the search nothing is run with options that nobody chose
            _run(crew, plan, runs, store, bar)
    refuse_if_none_began(runs.values())
    ordered = {(label, seed): runs[label, seed] for label in optimizers for seed in seeds}
    return to_dataset(
        ordered,
        setting,
        targets=goals,
        further=further,
        settings={"tune": search.facts()} if search else None,
        problem=problem.name,
        threads=crew.threads,
        **describe(probe),
    )


@dataclass(frozen=True)
class _Search:
    """A search, with everything that it needs from the comparison."""

    tuning: Tuning
    setting: Setting
    seeds: list[int]
    labels: list[str]

    @property
    def count(self) -> int:
        """How many runs it takes."""
        return sum(len(self.tuning.trials(label)) for label in self.tuning.options) * len(self.seeds)

    @property
    def total(self) -> int:
        """How many steps it takes."""
        return self.count * self.setting.num_steps

    def facts(self) -> dict[str, Any]:
        """How the search is made, for files and attributes."""
        tuning, spaces = self.tuning, {}
        for label, options in self.tuning.options.items():
            spaces[label] = {
                name: {"low": values.low, "high": values.high}
                if isinstance(values, LogUniform)
                else plain(list(values))
                for name, values in options.items()
            }
        names = ("num_trials", "criterion", "metric", "seed")
        return {name: getattr(tuning, name) for name in names} | {
            "options": spaces,
            "num_steps": self.setting.num_steps,
            "record_every": self.setting.record_every,
            "seeds": self.seeds,
        }

    def run(
        self, crew: Here | Crew, store: Store | None, bar: Ticker, targets: Mapping[str, float]
    ) -> tuple[dict[str, list[Trial]], bool]:
        """Do all trials; label → judged trials, none for optimizers that are not tuned, and whether all were done."""
        options = {label: self.tuning.trials(label) if label in self.tuning.options else [] for label in self.labels}
        plan = {
            (label, trial, seed): Job(f"trial-{place}-{trial}-{seed}", label, seed, self.setting.numbers, one)
            for seed in self.seeds
            for place, label in enumerate(self.labels)
            for trial, one in enumerate(options[label])
        }
        runs = {key: job.not_started() for key, job in plan.items()}
        finished = _run(crew, plan, runs, store, bar)
        judged = {
            label: [
                judge(self.tuning, one, [runs[label, trial, seed] for seed in self.seeds], targets)
                for trial, one in enumerate(options[label])
            ]
            for label in self.labels
        }
        return judged, finished


def _search(
    tuning: Tuning | None,
    optimizers: Mapping[str, MakeOptimizer],
    setting: Setting,
    seeds: Sequence[int],
    targets: Mapping[str, float],
    has_accuracy: bool,
) -> _Search | None:
    """Fit a search to the comparison."""
    if tuning is None:
        return None
    if tuning.metric == "test_accuracy" and not has_accuracy:
        raise InputError(
            "The targets of this problem are no labels, so that it has no test_accuracy to tune for. Tune for train_loss."
        )
    if tuning.criterion == "target" and tuning.metric not in targets:
        raise InputError(
            f"criterion='target' counts the steps to the target of {tuning.metric}, and there is none. Give targets={{{tuning.metric!r}: …}}."
        )
    if tuning.num_steps is not None:
        setting = replace(
            setting,
            num_steps=tuning.num_steps,
            record_every=min(setting.record_every, default_record_every(tuning.num_steps)),
        )
    return _Search(tuning, setting, tuning.seeds_beside(seeds), list(optimizers))


def _probe(
    model: nn.Module, optimizers: Mapping[str, MakeOptimizer], search: _Search | None, seed: int, problem: Problem
) -> dict[str, Any]:
    """Build every optimizer once: a wrong entry shows before the first run, not after it. Label → facts about it."""
    found = {}
    with seeded(seed):
        for label, entry in optimizers.items():
            trials = search.tuning.trials(label) if search else [{}]
            for options in trials if callable(entry) else ():
                _check_takes(entry, model, label, options)
            found[label] = optimizer_facts(entry, build(entry, model, label, trials[0]))
    return found


def _check_takes(entry: MakeOptimizer, model: nn.Module, label: str, options: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(entry)
    except (TypeError, ValueError):  # written in C
        return
    try:
        signature.bind(model, **options)
    except TypeError as error:
        names = ", ".join(options)
        remedy = f"Write it as lambda model, {names}: ..." if options else "Its further arguments need defaults"
        raise InputError(
            f"Optimizer {label!r} is called with the model{f' and the options {names}' if options else ' alone'}, which its signature "
            f"{signature} does not take: {error}. {remedy}."
        ) from None


@contextmanager
def _storing(path: str | os.PathLike[str] | None, every: int | None, facts: Any) -> Iterator[Store | None]:
    if path is None:
        yield None
        return
    store = Store(path, facts(), every)
    try:
        yield store
    finally:
        store.close()


def _run(crew: Here | Crew, plan: Mapping[Any, Job], runs: dict[Any, Run], store: Store | None, bar: Ticker) -> bool:
    """Fill in the runs: those that are stored, then the others, each stored when it is over; False where Ctrl-C ended it."""
    missing, keys = [], {}
    for key, job in plan.items():
        found = None if store is None else store.get(job)
        if found is not None:
            runs[key] = found
            Counter(bar).finish(job.num_steps)
            continue
        if store is not None:
            job = replace(job, checkpoint=store.checkpoint(job.name))
        missing.append(job)
        keys[job.name] = key

    def done(job: Job, run: Run) -> None:
        runs[keys[job.name]] = run
        if store is not None:
            store.put(job, run)

    return crew.run(missing, done, bar)


def _run_name(place: int, trial: int | None, seed: int) -> str:
    """The name of a reported run's file: runs with the options of different trials are different runs."""
    return f"run-{place}-{seed}" if trial is None else f"run-{place}-trial-{trial}-{seed}"
