"""The report: train, analyse, and write one page, one data file and the figures."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fisherlens._progress import progress as progress_bar
from fisherlens.errors import UNKNOWN_NAME, InputError, NonFiniteError, nearest
from fisherlens.fisher import Fisher, check_damping
from fisherlens.likelihoods import Likelihood
from fisherlens.linalg.precision import own_precision
from fisherlens.report import stages
from fisherlens.report import train as training
from fisherlens.report.folder import FIGURES, PAGE, OutputFolder
from fisherlens.report.store import DATA_FILE, Store
from fisherlens.report.subject import Subject, default_examples, device_of, find_subject, take_examples
from fisherlens.report.threads import one_thread
from fisherlens.scores import KINDS, parse_memory
from fisherlens.training import Problem, verify
from fisherlens.training.devices import find_device
from fisherlens.training.loop import MakeOptimizer

if TYPE_CHECKING:
    import xarray as xr

AS_GIVEN = "as given"
_TRAIN_WEIGHT, _SEGMENT_WEIGHT, _VERIFY_WEIGHT, _PAGE_WEIGHT = 3.0, 9.0, 4.0, 6.0
_CLAIMS = ("metric", "one_step")  # those that take seconds; `fisherlens verify` checks all


@own_precision
def report(
    subject: nn.Module | Problem | str = "digits-cnn",
    out: str | os.PathLike[str] = "report/",
    *,
    data: Any = None,
    likelihood: str | Likelihood | None = None,
    kind: str = "exact",
    mc_samples: int = 1,
    num_examples: int | None = None,
    damping: float | None = None,
    num_null: int = 200,
    num_steps: int = 120,
    num_seeds: int = 2,
    batch_size: int = 64,
    optimizers: Mapping[str, MakeOptimizer] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    memory: str | float = "2GiB",
    name: str | None = None,
    command: str | None = None,
    progress: bool | None = None,
) -> xr.DataTree:
    r"""Analyse a network in all respects, and write one page, one data file and the figures.

    The page says, in words and pictures, how large the Fisher information is and where it sits, what its complete spectrum looks like,
    which layers and segments are coupled and by how much above chance, what each segmentation keeps of the natural gradient, and
    whether steps and training behave as that predicts. Every number on it is in the data file.

    Parameters
    ----------
    subject
        A problem or its name: a network is trained with CW-NGD and with SGD, and analysed at the start, half way and at the end of
        the first run. Or your own network, which is analysed as it stands (a copy of it, in evaluation mode) and not trained.
    out
        Folder for ``report.html``, ``report.nc`` and ``figures/*.png``; created if missing, files of the same names replaced.
    data, likelihood
        Of your own network, as for :class:`Fisher`; a problem brings both.
    kind, mc_samples, memory
        As for :class:`Fisher`.
    num_examples
        Examples N that F is taken on: drawn at random from tensors, the first ones of batches. None is at most 128, and fewer where
        many outputs would make complete spectra slow (N R ≤ 2,500).
    damping
        λ > 0 in nat; None is 1e-3 of each stage's largest eigenvalue (our choice).
    num_null
        Permutations per chance level, at most 99 of them for segments; 0 skips the p-values.
    num_steps, batch_size, num_seeds
        Of training. The seeds are ``seed``, ``seed + 1``, …; the comparison of segmentations trains on the first.
    optimizers
        Label → function ``model -> Optimizer``; the first one's run is analysed. Default: CW-NGD and SGD with momentum.
    seed
        Of initial weights, batch order, the choice of examples, sampled labels, permutations and random blocks, each by a generator
        of its own.
    device
        ``"cpu"``, ``"cuda"``, ``"auto"``; None leaves a network where it is.
    name
        What to call the network on the page; by default the problem's name, or the class of your own network.
    command
        What to print on the page as the way to make it again; None writes the call.
    progress
        True draws a progress bar, None only in a terminal.

    Returns
    -------
    DataTree, as ``fl.load(out / "report.nc")`` gives it back: ``fisher``, ``spectrum``, ``information``, ``units``, ``coupling``,
    ``segments/<layer>``, ``segment_relations``, ``independence``, ``one_step`` (each along the dim ``stage``), ``training``, ``segment_training``, ``verify``,
    ``key_numbers`` and ``log``.

    Raises
    ------
    InputError: anything that cannot be right, before the work starts: an unknown problem, missing data or likelihood, numbers out of
    range, a folder that cannot be written. NonFiniteError, UnsupportedModuleError, MemoryBudgetError: of :class:`Fisher`, before
    anything is written. KeyboardInterrupt: after Ctrl-C, when what was finished is saved and on a page that says so.

    Notes
    -----
    An analysis that fails on its own, such as a spectrum over the memory budget, does not stop the others; its section says
    what happened. ``report.nc`` is saved after every few seconds of work, so a killed run keeps what it had.

    Networks of up to 200,000 parameters on a CPU are analysed on one thread, and the number of threads is put back afterwards.

    Cost: about 45 seconds on two cores for ``"digits-cnn"``.

    Examples
    --------
    >>> import tempfile, fisherlens as fl
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    >>> x, y = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tree = fl.report(model, folder, data=(x, y), likelihood="categorical", num_null=20)
    >>> tree["coupling"].coupling.sizes["block_i"]
    2
    """
    for option, value, least in (
        ("num_examples", num_examples, 1),
        ("num_null", num_null, 0),
        ("num_steps", num_steps, 1),
        ("num_seeds", num_seeds, 1),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
    ):
        _check_whole(option, value, least)
    if kind not in KINDS:
        raise InputError(UNKNOWN_NAME.format(what="kind", name=kind, hint=nearest(str(kind), KINDS)))
    damping = None if damping is None else check_damping(damping)
    parse_memory(memory)
    chosen = find_subject(subject, data, likelihood, find_device(device), seed)
    chosen = chosen if name is None else replace(chosen, name=str(name))
    folder = OutputFolder(out)
    bars = (
        progress if chosen.problem is None else False
    )  # a user's network may be large, so that its parts need bars of their own
    setting = stages.Setting(kind, mc_samples, memory, damping, num_null, seed, bars)
    plan = _Training(num_steps, batch_size, tuple(range(seed, seed + num_seeds)), find_device(device))
    store = Store(folder.path, _facts(chosen, setting, command or _call(chosen, out), num_steps))
    status, reason = "complete", ""
    with one_thread(chosen.model), _meter(chosen, progress) as meter:
        try:
            _work(store, chosen, setting, plan, num_examples, optimizers, meter)
        except BaseException as error:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            reason = "Ctrl-C" if status == "interrupted" else f"{type(error).__name__}: {error}"
            if store.empty:
                folder.abandon()
                raise
            _publish(store, folder, status, reason)
            if status == "interrupted":
                raise KeyboardInterrupt(
                    f"interrupted; what was finished is saved in {folder.path / DATA_FILE} and shown on {folder.path / PAGE}"
                ) from None
            raise
        meter("page", 0.0)
        tree = _publish(store, folder, status, reason)
        meter("done", _PAGE_WEIGHT)
    return tree


def _check_whole(name: str, value: Any, least: int) -> None:
    if value is None and name == "num_examples":
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {type(value).__name__} {value!r}.")
    if value < least:
        raise InputError(f"{name} must be at least {least}; got {value}.")


class _Training:
    """Settings of the training runs."""

    def __init__(self, num_steps: int, batch_size: int, seeds: Sequence[int], device: torch.device | None):
        self.options = {"num_steps": num_steps, "batch_size": batch_size, "seeds": seeds, "device": device}
        self.num_steps, self.seeds = num_steps, seeds


def _call(subject: Subject, out: Any) -> str:
    if subject.problem is not None:
        return f"fl.report({subject.name!r}, {os.fspath(out)!r})"
    return f"fl.report(model, {os.fspath(out)!r}, data=..., likelihood={subject.likelihood.name!r})"


def _facts(subject: Subject, setting: stages.Setting, command: str, num_steps: int) -> dict[str, Any]:
    rule = (
        f"{stages.DAMPING_SHARE:g} times the largest eigenvalue of the stage" if setting.damping is None else "as given"
    )
    return {
        "subject": subject.name,
        "description": subject.description,
        "trained": "yes" if subject.problem is not None else "no",
        "command": command,
        "kind": setting.kind,
        "likelihood": subject.likelihood.name,
        "device": str(device_of(subject.model)),
        "seed": setting.seed,
        "num_null": setting.num_null,
        "damping_rule": rule,
        "platform": f"{sys.platform}, {os.cpu_count()} CPU cores",
    }


def _work(
    store: Store,
    subject: Subject,
    setting: stages.Setting,
    plan: _Training,
    num_examples: int | None,
    optimizers: Mapping[str, MakeOptimizer] | None,
    meter: Any,
) -> None:
    count = num_examples or default_examples(subject, setting.kind)
    data, total = take_examples(subject.data, count, setting.seed, device_of(subject.model))
    options = {"likelihood": subject.likelihood, "kind": setting.kind, "mc_samples": setting.mc_samples}
    options |= {"seed": setting.seed, "memory": setting.memory, "progress": False}
    F = Fisher(subject.model, data, **options)  # what cannot be analysed at all shows here, before anything is trained
    store.attrs |= {"n_params": F.n_params, "n_data": F.n_data, "n_total": total, "plan": F.plan.to_json()}
    store.attrs |= {"dtype": str(F.dtype).removeprefix("torch."), "n_columns": F.n_columns}
    if subject.problem is None:
        stages.analyse(store, AS_GIVEN, F, subject.model, data, setting, meter)
        return
    states = _train(store, subject, F, plan, optimizers, meter)
    for stage in training.STAGES:
        if stage not in states:
            store.log("stage", stage, "left out", "training ended before this stage was reached")
            meter(stage, stages.STAGE_WEIGHT)
            continue
        model = subject.model
        model.load_state_dict(states[stage])
        try:
            F = Fisher(model, data, **options)
        except NonFiniteError as error:
            store.log("stage", stage, "failed", f"{type(error).__name__}: {error}")
            meter(stage, stages.STAGE_WEIGHT)
            continue
        stages.analyse(store, stage, F, model, data, setting, meter)
    _verify(store, subject.problem, setting, plan, count)
    meter("claims", _VERIFY_WEIGHT)


def _verify(store: Store, problem: Problem, setting: stages.Setting, plan: _Training, count: int) -> None:
    """Check the claims that take seconds, on the seeds of training."""
    with store.task("claims against training"):
        options = {"seeds": list(plan.seeds), "kind": setting.kind, "num_examples": count}
        found = verify(problem, _CLAIMS, **options, device=plan.options["device"], progress=False)
        store.put("verify", found)
        if bool(found.interrupted):  # what was finished is kept; the report ends here all the same
            raise KeyboardInterrupt


def _train(
    store: Store,
    subject: Subject,
    F: Fisher,
    plan: _Training,
    optimizers: Mapping[str, MakeOptimizer] | None,
    meter: Any,
) -> dict[str, Any]:
    """Train with every optimizer, then with CW-NGD on every segmentation; the states of the first run by stage."""
    problem = subject.problem
    initial = copy.deepcopy(subject.model.state_dict())
    entries = training.default_optimizers(problem) if optimizers is None else dict(optimizers)
    snapshots = training.Snapshots(plan.num_steps)
    store.attrs |= {"analysed_run": f"{next(iter(entries))}, seed {plan.seeds[0]}", "num_steps": plan.num_steps}

    def into(node: str) -> Any:
        return lambda result: store.put(node, result.assign_attrs(problem=problem.name))

    with store.task("training"):
        training.train_all(
            problem,
            entries,
            **plan.options,
            snapshots=snapshots,
            done=into("training"),
            tick=lambda s: meter("training", s * _TRAIN_WEIGHT),
        )
    for stage, step in snapshots.steps.items():
        store.at_step(stage, step)
    if optimizers is None:
        with store.task("training on every segmentation"):
            training.train_all(
                problem,
                training.segment_optimizers(problem, F, store, plan.seeds[0]),
                **(plan.options | {"seeds": plan.seeds[:1]}),
                done=into("segment_training"),
                tick=lambda s: meter("training with other blocks", s * _SEGMENT_WEIGHT),
            )
    return {"start": initial} | snapshots.states


def _publish(store: Store, folder: OutputFolder, status: str, reason: str) -> xr.DataTree:
    """Derive the key numbers, save everything, draw, and write the page."""
    from fisherlens.report.figures import FIGURE_NAMES, draw_all
    from fisherlens.report.findings import key_numbers
    from fisherlens.report.page import page

    store.attrs |= {"status": status, "status_reason": reason}
    found = key_numbers(store.tree())
    if found is not None:
        store.put("key_numbers", found)
    tree = store.save(force=True)
    pictures = draw_all(tree)
    folder.drop_figures({name for name in FIGURE_NAMES if name not in pictures})
    for picture in pictures.values():
        folder.write(f"{FIGURES}/{picture.name}.png", picture.png)
    folder.write(PAGE, page(tree, pictures).encode())
    return tree


@contextmanager
def _meter(subject: Subject, progress: bool | None) -> Iterator[Any]:
    """One bar over the whole report, in per cent of its usual time."""
    trained = subject.problem is not None
    total = stages.STAGE_WEIGHT * (len(training.STAGES) if trained else 1) + _PAGE_WEIGHT
    total += (_TRAIN_WEIGHT + _SEGMENT_WEIGHT + _VERIFY_WEIGHT) if trained else 0.0
    with progress_bar(100, desc="report", enabled=progress) as bar:
        bar.bar_format = "{desc:<28.28s} {percentage:3.0f}%|{bar}| {elapsed}"

        def meter(what: str, weight: float) -> None:
            bar.set_description(what, refresh=False)
            bar.update(min(100 * weight / total, max(100 - bar.n, 0)))

        yield meter
