"""What one comparison fixes, what each of its runs leaves, and how the runs become one labelled Dataset."""

from __future__ import annotations

import json
import numbers
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fisherlens.likelihoods import Likelihood
from fisherlens.training.base import Pair, check_count
from fisherlens.training.targets import OWN_SHARE, target_variables

if TYPE_CHECKING:
    import xarray as xr

METRICS: dict[str, dict[str, str]] = {
    "train_loss": {"long_name": "mean negative log-likelihood, training set", "units": "nat"},
    "test_loss": {"long_name": "mean negative log-likelihood, test set", "units": "nat"},
    "test_accuracy": {"long_name": "share of test labels met", "units": "1"},
    "seconds": {"long_name": "training time so far, evaluation excluded", "units": "s"},
}

NUMBERS = ("num_steps", "batch_size", "record_every", "num_eval", "skip_single")  # of a Setting


@dataclass
class Run:
    """What one training run leaves: a value of each metric at each recorded step, and how it ended."""

    optimizer: str
    seed: int
    steps: np.ndarray
    options: dict[str, Any] = field(default_factory=dict)  # class and defaults of the optimizer
    metrics: dict[str, np.ndarray] = field(init=False)
    steps_taken: int = 0
    diverged: bool = False
    interrupted: bool = False
    ended_by: str = ""

    def __post_init__(self) -> None:
        """Start with nothing recorded: NaN everywhere."""
        self.metrics = {name: np.full(len(self.steps), np.nan) for name in METRICS}
        self.options = plain(self.options)


@dataclass(frozen=True)
class Setting:
    """What all runs of one comparison share.

    Losses are measured on ``num_eval`` examples of each set, None for all. ``skip_single`` leaves out a last batch of one example.
    """

    train: Pair
    test: Pair | None
    likelihood: Likelihood
    num_steps: int
    batch_size: int
    record_every: int
    num_eval: int | None = None
    skip_single: bool = False

    def __post_init__(self) -> None:
        """Check the numbers, all of them at least 1."""
        for name in ("num_steps", "batch_size", "record_every", "num_eval"):
            value = getattr(self, name)
            if name != "num_eval" or value is not None:
                object.__setattr__(self, name, check_count(value, name))

    @property
    def numbers(self) -> dict[str, Any]:
        """All of it but data and likelihood, as keywords of a Setting."""
        return {name: getattr(self, name) for name in NUMBERS}

    @property
    def steps(self) -> np.ndarray:
        """The recorded steps: 0, every ``record_every``-th, and the last."""
        return recorded_steps(self.num_steps, self.record_every)

    @cached_property
    def eval_train(self) -> Pair:
        """The training examples that losses are measured on."""
        return self._measured(self.train)

    @cached_property
    def eval_test(self) -> Pair | None:
        """The test examples that losses are measured on."""
        return None if self.test is None else self._measured(self.test)

    def _measured(self, pair: Pair) -> Pair:
        """All examples, or a subset that is the same in every run, in data order."""
        if self.num_eval is None or self.num_eval >= len(pair[0]):
            return pair
        order = torch.randperm(len(pair[0]), generator=torch.Generator().manual_seed(0), device="cpu")
        index = order[: self.num_eval].sort().values
        return pair[0][index.to(pair[0].device)], pair[1][index.to(pair[1].device)]

    def batches(self, seed: int) -> Iterator[Tensor]:
        """Yield index batches without end: each pass takes every example once, in an order drawn from ``seed``.

        With ``skip_single`` a pass leaves out the one example that would make a last batch of its own.
        """
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.train[0]), generator=generator, device="cpu")
            yield from (index for index in order.split(self.batch_size) if len(index) > 1 or not self.skip_single)


def to_dataset(
    runs: Mapping[tuple[str, int], Run],
    setting: Setting,
    *,
    targets: Mapping[str, float] | None = None,
    further: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {}),
    settings: Mapping[str, Any] | None = None,
    **attrs: Any,
) -> xr.Dataset:
    """Arrange runs on the grid optimizer × seed × step; a run that never started is NaN and counts as interrupted.

    ``targets`` adds how long each took to them, ``further`` variables and coordinates of a search, ``settings`` to what is recorded.
    """
    from fisherlens.results import make_dataset

    optimizers = list(dict.fromkeys(name for name, _ in runs))
    seeds = list(dict.fromkeys(seed for _, seed in runs))
    grid = [[runs[name, seed] for seed in seeds] for name in optimizers]
    metrics = {name: np.array([[run.metrics[name] for run in row] for row in grid]) for name in METRICS}
    variables: dict[str, Any] = {
        name: (("optimizer", "seed", "step"), metrics[name], dict(attributes)) for name, attributes in METRICS.items()
    }
    flags = {
        "steps_taken": ("optimizer steps taken", np.int64),
        "diverged": ("whether the loss or a matrix became non-finite", np.bool_),
        "interrupted": ("whether the run was cut short from outside", np.bool_),
        "ended_by": ("what ended the run early, empty if nothing did", np.str_),
    }
    for name, (long_name, dtype) in flags.items():
        values = np.array([[getattr(run, name) for run in row] for row in grid], dtype=dtype)
        variables[name] = (("optimizer", "seed"), values, {"long_name": long_name, "units": "1"})
    coords: dict[str, Any] = {
        "optimizer": ("optimizer", optimizers, {"long_name": "optimizer"}),
        "seed": ("seed", seeds, {"long_name": "seed of initial weights and batch order"}),
        "step": ("step", setting.steps, {"long_name": "optimizer steps", "units": "1"}),
    }
    if targets is not None:
        extra, places = target_variables(setting.steps, metrics, targets)
        variables, coords = variables | extra, coords | places
        attrs |= {"step_resolution": setting.record_every, "own_accuracy_share": OWN_SHARE}
    made = {
        "optimizers": {name: runs[name, seeds[0]].options for name in optimizers},
        "num_steps": setting.num_steps,
        "batch_size": setting.batch_size,
        "record_every": setting.record_every,
        "n_test": 0 if setting.test is None else len(setting.test[0]),
    }
    made |= {} if setting.num_eval is None else {"num_eval": setting.num_eval}
    made |= {"skip_single": True} if setting.skip_single else {}
    return make_dataset(
        variables | dict(further[0]),
        coords | dict(further[1]),
        method="mini-batch training",
        settings=made | dict(settings or {}),
        likelihood=setting.likelihood.name,
        n_data=len(setting.train[0]),
        seed=seeds[0] if len(seeds) == 1 else np.array(seeds),
        **attrs,
    )


def default_record_every(num_steps: int) -> int:
    """About fifty records per run."""
    return max(1, int(num_steps) // 50) if isinstance(num_steps, numbers.Integral) else num_steps


def plain(value: Any) -> Any:
    """A nested value as JSON gives it back: what is stored in a file and what is not are then the same."""

    def other(entry: Any) -> Any:
        return entry.tolist() if hasattr(entry, "tolist") else str(entry)

    return json.loads(json.dumps(value, default=other))


def describe(model: nn.Module) -> dict[str, Any]:
    """Facts about a network for the attributes of a result."""
    first = next(model.parameters(), None)
    return {
        "n_params": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "dtype": "" if first is None else str(first.dtype).removeprefix("torch."),
        "device": str(device_of(model)),
    }


def device_of(model: nn.Module) -> torch.device:
    """Where a network's parameters are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def recorded_steps(num_steps: int, record_every: int) -> np.ndarray:
    """The steps that are recorded: 0, every ``record_every``-th, and the last."""
    return np.unique(np.append(np.arange(0, num_steps, record_every), num_steps))
