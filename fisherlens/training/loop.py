"""The ordinary training loop, with its own batch order and a labelled record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fisherlens._progress import progress as progress_bar
from fisherlens.errors import InputError, NonFiniteError
from fisherlens.likelihoods import Likelihood, as_likelihood
from fisherlens.linalg.precision import own_precision
from fisherlens.training.base import check_seed, trainable
from fisherlens.training.checkpoint import Checkpoint
from fisherlens.training.loss import count_correct, mean_loss, summed_loss
from fisherlens.training.problems import Pair, Problem, check_pair, seeded
from fisherlens.training.record import METRICS, Run, Setting, default_record_every, describe, device_of, to_dataset
from fisherlens.training.singles import skip_singles

if TYPE_CHECKING:
    import xarray as xr


MakeOptimizer = Callable[..., Any]  # (model, **options) -> Optimizer, or (Optimizer, LRScheduler)
Callback = Callable[[int, nn.Module, Optimizer], object]

_EVALUATE_AT_ONCE = 1024  # examples per forward pass of an evaluation
# what an optimizer raises where numbers have left their range: ours, and a matrix without factors or eigenvalues in torch, numpy and scipy
_DIVERGED = (NonFiniteError, torch.linalg.LinAlgError, np.linalg.LinAlgError)
BEFORE = "before the first step: "


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode and switch gradients off; afterwards each module has its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def evaluate(model: nn.Module, data: Pair, likelihood: Likelihood, what: str) -> tuple[float, float]:
    """Return the mean loss in nat and the share of labels met (NaN where the likelihood has none), in eval mode."""
    device = device_of(model)
    loss = weight = 0.0
    correct = labels = 0
    with _evaluating(model):
        pieces = zip(*(part.split(_EVALUATE_AT_ONCE) for part in data), strict=True)
        for number, (inputs, targets) in enumerate(pieces):
            outputs, targets = model(inputs.to(device)), targets.to(device)
            first = number * _EVALUATE_AT_ONCE
            likelihood.bind(outputs, targets, f"the {what} data, examples {first}..{first + len(inputs) - 1}")
            total, count = summed_loss(likelihood, outputs, targets)
            loss, weight = loss + float(total), weight + float(count)
            hits, seen = count_correct(likelihood, outputs, targets)
            correct, labels = correct + hits, labels + seen
    if weight == 0:
        raise InputError(
            f"Every label of the {what} data is ignored or has class weight 0, so its mean loss is not defined."
        )
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"The mean loss over the {what} data is {loss}, though every output is finite: the outputs are too large for "
            "their dtype. A smaller learning rate, or float64, keeps them in range."
        )
    return loss / weight, (correct / labels if labels else math.nan)


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


class Ticker(Protocol):
    """What counts steps: a progress bar, or anything with its ``update``."""

    def update(self, n: float, /) -> object:
        """Count ``n`` more steps."""


def build(
    make_optimizer: MakeOptimizer, model: nn.Module, label: str, options: Mapping[str, Any] | None = None
) -> tuple[Optimizer, LRScheduler | None]:
    """Call ``make_optimizer(model, **options)`` and check that the answer is an optimizer of this model, perhaps with a scheduler."""
    if isinstance(make_optimizer, Optimizer) or not callable(make_optimizer):
        raise TypeError(
            f"Optimizer {label!r} must be a function model -> torch.optim.Optimizer, because every run trains a new model; "
            f"got {type(make_optimizer).__name__}. For example: lambda model: torch.optim.SGD(model.parameters(), lr=0.1)."
        )
    if isinstance(make_optimizer, type) and make_optimizer.__module__.startswith("torch.optim"):
        raise TypeError(
            f"Optimizer {label!r} is the class {make_optimizer.__name__} of torch, which takes parameters and not a network. Write a function: "
            f"lambda model: torch.optim.{make_optimizer.__name__}(model.parameters(), lr=0.1)."
        )
    made = make_optimizer(model, **(options or {}))
    pair = isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], LRScheduler)
    optimizer, scheduler = made if pair else (made, None)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"Optimizer {label!r} must return a torch.optim.Optimizer; got {type(optimizer).__name__}.")
    if isinstance(optimizer, torch.optim.LBFGS) or getattr(optimizer, "adapt_damping", False):
        raise InputError(
            f"Optimizer {label!r} ({type(optimizer).__name__}) computes the loss several times in a step, through step(closure), and the loop here computes it once. "
            "Write that loop yourself, with fl.Monitor beside it; NGD does without if adapt_damping=False."
        )
    if scheduler is not None and (isinstance(scheduler, ReduceLROnPlateau) or scheduler.optimizer is not optimizer):
        raise InputError(
            f"The scheduler of optimizer {label!r} must be one of that optimizer which steps by itself, after each optimizer step; got "
            f"{type(scheduler).__name__}. ReduceLROnPlateau waits for a metric: give another one, or write the loop yourself."
        )
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise InputError(
            f"Optimizer {label!r} holds no parameter of the model that it was given, so it would train nothing. "
            "Use the argument: lambda model: SGD(model.parameters(), ...), not a model from outside."
        )
    return optimizer, scheduler


def build_optimizer(make_optimizer: MakeOptimizer, model: nn.Module, label: str) -> Optimizer:
    """Call ``make_optimizer(model)`` and check that the answer is an optimizer of this model."""
    return build(make_optimizer, model, label)[0]


def run_training(
    model: nn.Module,
    setting: Setting,
    make_optimizer: MakeOptimizer,
    *,
    label: str | None,
    seed: int,
    callbacks: Sequence[Callback],
    bar: Ticker,
    options: Mapping[str, Any] | None = None,
    checkpoint: Checkpoint | None = None,
    forgiving: bool = False,
) -> Run:
    """Train ``model`` in place and record; divergence and Ctrl-C end the run early and are noted, not raised.

    ``options`` go to ``make_optimizer``; a ``checkpoint`` is continued if there is one, and written on the way. A network that is not finite before
    its first step raises, or is noted as diverged where the caller is ``forgiving``.
    """
    # Dropout and the like draw from the global generators; inside they are seeded, outside they are as before.
    with seeded(seed), trainable():
        optimizer, scheduler = build(make_optimizer, model, label or "optimizer", options)
        kind = type(optimizer).__name__
        made = {"class": kind, **optimizer.defaults}
        made |= {} if scheduler is None else {"scheduler": type(scheduler).__name__}
        run = Run(label or kind, seed, setting.steps, options=made)
        try:
            begun, seconds = 0, 0.0
            if checkpoint is not None:
                begun, seconds = checkpoint.load(run, model, optimizer, scheduler)
            if begun > 0:
                bar.update(begun)
            elif _begin(run, setting, model, forgiving):
                for callback in callbacks:
                    callback(0, model, optimizer)
            if not run.diverged:
                _steps(run, setting, model, (optimizer, scheduler), callbacks, bar, (begun, seconds), checkpoint)
        except KeyboardInterrupt:
            run.interrupted, run.ended_by = True, f"interrupted after step {run.steps_taken}"
    model.zero_grad(set_to_none=True)
    return run


def _begin(run: Run, setting: Setting, model: nn.Module, forgiving: bool) -> bool:
    """Record what there is before the first step; False where that is not finite, which the run then notes."""
    try:
        _record(run, setting, model, 0, 0.0)
    except NonFiniteError as error:
        if not forgiving:
            raise
        run.diverged, run.ended_by = True, f"{BEFORE}{error}"
    return not run.diverged


def _steps(
    run: Run,
    setting: Setting,
    model: nn.Module,
    optimizers: tuple[Optimizer, LRScheduler | None],
    callbacks: Sequence[Callback],
    bar: Ticker,
    begun: tuple[int, float],
    checkpoint: Checkpoint | None,
) -> None:
    inputs, targets = setting.train
    optimizer, scheduler = optimizers
    device = device_of(model)
    first, seconds = begun
    batches = islice(setting.batches(run.seed), first, None)
    for step in range(first + 1, setting.num_steps + 1):
        started = _now(device)
        index = next(batches)
        try:
            x, y = inputs[index.to(inputs.device)].to(device), targets[index.to(targets.device)].to(device)
            loss = mean_loss(setting.likelihood, model(x), y)
            if not torch.isfinite(loss):
                run.diverged, run.ended_by = True, f"the batch loss was {loss.item()} in step {step}"
                return
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            seconds += _now(device) - started
            run.steps_taken = step
            if step % setting.record_every == 0 or step == setting.num_steps:
                _record(run, setting, model, step, seconds)
        except _DIVERGED as error:
            run.diverged, run.ended_by = True, f"in step {step}: {error}"
            return
        for callback in callbacks:
            callback(step, model, optimizer)
        if checkpoint is not None and step < setting.num_steps:
            checkpoint.save(step, seconds, run, model, optimizer, scheduler)
        bar.update(1)


def _record(run: Run, setting: Setting, model: nn.Module, step: int, seconds: float) -> None:
    train_loss, _ = evaluate(model, setting.eval_train, setting.likelihood, "training")
    test_loss = accuracy = math.nan
    if setting.eval_test is not None:
        test_loss, accuracy = evaluate(model, setting.eval_test, setting.likelihood, "test")
    at = int(np.searchsorted(run.steps, step))
    for name, value in zip(METRICS, (train_loss, test_loss, accuracy, seconds), strict=True):
        run.metrics[name][at] = value


@own_precision
def train(
    model: nn.Module,
    data: Problem | Pair,
    make_optimizer: MakeOptimizer,
    *,
    num_steps: int,
    batch_size: int = 64,
    seed: int = 0,
    likelihood: str | Likelihood | None = None,
    test: Pair | None = None,
    name: str | None = None,
    callbacks: Sequence[Callback] = (),
    record_every: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    r"""Train a network in place with the ordinary loop, and return the record.

    Each step is ``zero_grad``, ``backward`` of the mean negative log-likelihood of a batch

    .. math:: \ell_B(\theta) = -\frac{1}{\sum_{n \in B} w_n} \sum_{n \in B} w_n \log p(y_n \mid f(x_n; \theta)),

    and ``step``. Each pass over the data takes every example once, in a new order.

    Parameters
    ----------
    model
        The network to train, on its own device and in its own mode; evaluation is done in eval mode and the mode restored.
    data
        A :class:`Problem`, or a pair ``(inputs, targets)`` of tensors.
    make_optimizer
        A function ``model -> torch.optim.Optimizer``, or one that returns a pair (optimizer, learning-rate scheduler of torch); the
        scheduler then steps after each optimizer step.
    num_steps
        Optimizer steps.
    batch_size
        Examples per step; the last batch of a pass may be smaller. Default 64, our choice.
    seed
        Seeds the batch order, and what the network itself draws (dropout). The global random state is given back as it was.
    likelihood
        Needed with a pair; taken from a problem.
    test
        A pair to judge on; taken from a problem. Without one ``test_loss`` and ``test_accuracy`` are NaN.
    name
        Label of the optimizer in the result; the name of its class by default.
    callbacks
        Functions ``(step, model, optimizer)``, called before the first step with 0 and then after each one, off the clock.
    record_every
        Steps between records; by default a fiftieth of the run. Step 0 and the last are always recorded.
    progress
        True draws a progress bar, None only in a terminal.

    Returns
    -------
    Dataset with ``train_loss``, ``test_loss`` (nat), ``test_accuracy`` and ``seconds`` over (optimizer, seed, step), the first two
    of length 1; losses are means over the whole set, ``seconds`` is training time without evaluation and callbacks.
    ``steps_taken``, ``diverged``, ``interrupted`` and ``ended_by`` over (optimizer, seed) say how the run ended: a non-finite loss, or a
    matrix of the optimizer without factors, stops it, Ctrl-C stops it, and what was recorded stays. Steps not reached are NaN, and so is an accuracy of real-valued targets.

    Raises
    ------
    InputError: targets that do not fit the outputs, numbers below 1, an optimizer of another model. NonFiniteError: NaN or infinity in
    the data, or in the outputs before the first step. TypeError: a loss instead of a likelihood, an optimizer instead of a function.

    Warns
    -----
    NumericalWarning: a last batch of one example, which is left out where batch normalisation in training mode has no statistics of it.

    Notes
    -----
    Cost: one gradient evaluation per step and one forward pass over both sets per record.

    Examples
    --------
    >>> x = torch.linspace(-1, 1, 20)[:, None]
    >>> line = Problem("line", "A straight line.", lambda: nn.Linear(1, 1), (x, 2 * x), (x, 2 * x), "gaussian")
    >>> record = train(line.model(), line, lambda model: torch.optim.SGD(model.parameters(), lr=0.5), num_steps=40)
    >>> bool(record.train_loss[0, 0, -1] < record.train_loss[0, 0, 0])
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}. Pass problem.model(seed).")
    if isinstance(data, Problem):
        pair, test = data.train, data.test if test is None else test
        likelihood = data.likelihood if likelihood is None else likelihood
    else:
        pair = check_pair(data, "training")
        if likelihood is None:
            raise InputError(
                "likelihood is missing: a pair of tensors does not say what its targets mean. Give likelihood='categorical', "
                "'bernoulli' or 'gaussian', or pass a fl.Problem."
            )
    if test is not None:
        test = check_pair(test, "test")
    every = default_record_every(num_steps) if record_every is None else record_every
    seed = check_seed(seed)
    setting = skip_singles(Setting(pair, test, as_likelihood(likelihood), num_steps, batch_size, every), model)
    with progress_bar(setting.num_steps, desc=f"Train {name or ''}".strip(), enabled=progress) as bar:
        run = run_training(model, setting, make_optimizer, label=name, seed=seed, callbacks=callbacks, bar=bar)
    return to_dataset({(run.optimizer, seed): run}, setting, **describe(model))
