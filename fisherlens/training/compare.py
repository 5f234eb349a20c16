"""Optimizers side by side: equal starts, equal batches, several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fisherlens._progress import progress as progress_bar
from fisherlens.errors import InputError
from fisherlens.likelihoods import as_likelihood
from fisherlens.training.loop import MakeOptimizer, build_optimizer, run_training
from fisherlens.training.problems import Problem, seeded
from fisherlens.training.problems import problem as problem_by_name
from fisherlens.training.record import Run, Setting, default_record_every, describe, to_dataset

if TYPE_CHECKING:
    import xarray as xr


def compare_optimizers(
    problem: Problem | str,
    optimizers: Mapping[str, MakeOptimizer],
    *,
    num_steps: int,
    seeds: int | Sequence[int],
    batch_size: int = 64,
    record_every: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """Train a problem with several optimizers from equal initial weights, in equal batch order, once per seed.

    Parameters
    ----------
    problem
        A :class:`Problem`, or the name of one.
    optimizers
        Label → function ``model -> torch.optim.Optimizer``.
    num_steps, batch_size, record_every
        As in :func:`train`.
    seeds
        How many seeds, 0, 1, …, or the seeds themselves. A seed fixes initial weights and batch order for every optimizer, so that
        differences between optimizers are paired.
    progress
        True draws a progress bar, None only in a terminal.

    Returns
    -------
    Dataset with ``train_loss``, ``test_loss`` (nat), ``test_accuracy`` and ``seconds`` over (optimizer, seed, step), and
    ``steps_taken``, ``diverged``, ``interrupted``, ``ended_by`` over (optimizer, seed), as :func:`train` describes them. A run that
    diverges does not stop the others. Ctrl-C stops all and keeps what was recorded.

    Raises
    ------
    InputError: no optimizer, no seed or a repeated one, an unknown problem, numbers below 1, an optimizer of another model.
    TypeError: an optimizer instead of a function. Both before the first step of any run.

    Notes
    -----
    Cost: optimizers × seeds × ``num_steps`` gradient evaluations, and what each optimizer adds. Learning rates are those of the entries:
    a comparison is only as fair as their choice.

    Examples
    --------
    >>> import torch
    >>> entries = {"sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1)}
    >>> result = compare_optimizers("digits-mlp", entries, num_steps=20, seeds=2, record_every=10)
    >>> dict(result.train_loss.sizes)
    {'optimizer': 1, 'seed': 2, 'step': 3}
    """
    problem = problem_by_name(problem) if isinstance(problem, str) else problem
    if not isinstance(problem, Problem):
        raise TypeError(f"problem must be a fl.Problem or the name of one; got {type(problem).__name__}.")
    if not isinstance(optimizers, Mapping):
        raise TypeError(f"optimizers must be a dict label -> (model -> Optimizer); got {type(optimizers).__name__}.")
    every = default_record_every(num_steps) if record_every is None else record_every
    setting = Setting(problem.train, problem.test, as_likelihood(problem.likelihood), num_steps, batch_size, every)
    seeds = list(range(seeds)) if isinstance(seeds, int) else [int(seed) for seed in seeds]
    if not optimizers or not seeds or len(set(seeds)) < len(seeds):
        raise InputError(
            f"A comparison needs at least one optimizer and at least one seed, each once; got {list(optimizers)} and seeds {seeds}."
        )
    probe = problem.model(seeds[0])
    with seeded(seeds[0]):
        for label, make_optimizer in optimizers.items():
            build_optimizer(make_optimizer, probe, label)  # a wrong entry shows before the first run, not after it

    runs: dict[tuple[str, int], Run] = {}
    stopped = False
    with progress_bar(len(optimizers) * len(seeds) * num_steps, desc="Compare optimizers", enabled=progress) as bar:
        for done, (label, seed) in enumerate((label, seed) for seed in seeds for label in optimizers):
            run = Run(label, seed, setting.steps, interrupted=True, ended_by="not started")
            if not stopped:
                bar.set_description(f"{label}, seed {seed}")
                run = run_training(
                    problem.model(seed), setting, optimizers[label], label=label, seed=seed, callbacks=(), bar=bar
                )
                bar.update((done + 1) * num_steps - bar.n)  # a run that ended early gives up the rest of its share
                stopped = run.interrupted
            runs[label, seed] = run
    return to_dataset(runs, setting, problem=problem.name, **describe(probe))
