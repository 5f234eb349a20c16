"""What one comparison fixes, what each of its runs leaves, and how the runs become one labelled Dataset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fisherlens.errors import InputError
from fisherlens.likelihoods import Likelihood
from fisherlens.training.problems import Pair

if TYPE_CHECKING:
    import xarray as xr

METRICS: dict[str, dict[str, str]] = {
    "train_loss": {"long_name": "mean negative log-likelihood, training set", "units": "nat"},
    "test_loss": {"long_name": "mean negative log-likelihood, test set", "units": "nat"},
    "test_accuracy": {"long_name": "share of test labels met", "units": "1"},
    "seconds": {"long_name": "training time so far, evaluation excluded", "units": "s"},
}


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


@dataclass(frozen=True)
class Setting:
    """What all runs of one comparison share."""

    train: Pair
    test: Pair | None
    likelihood: Likelihood
    num_steps: int
    batch_size: int
    record_every: int

    def __post_init__(self) -> None:
        """Check the numbers, all of them at least 1."""
        for name in ("num_steps", "batch_size", "record_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int; got {type(value).__name__} {value!r}.")
            if value < 1:
                raise InputError(f"{name} must be at least 1; got {value}.")

    @property
    def steps(self) -> np.ndarray:
        """The recorded steps: 0, every ``record_every``-th, and the last."""
        return np.unique(np.append(np.arange(0, self.num_steps, self.record_every), self.num_steps))

    def batches(self, seed: int) -> Iterator[Tensor]:
        """Yield index batches without end: each pass takes every example once, in an order drawn from ``seed``."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield from torch.randperm(len(self.train[0]), generator=generator).split(self.batch_size)


def to_dataset(runs: Mapping[tuple[str, int], Run], setting: Setting, **attrs: Any) -> xr.Dataset:
    """Arrange runs on the grid optimizer × seed × step; a run that never started is NaN and counts as interrupted."""
    from fisherlens.results import make_dataset

    optimizers = list(dict.fromkeys(name for name, _ in runs))
    seeds = list(dict.fromkeys(seed for _, seed in runs))
    grid = [[runs[name, seed] for seed in seeds] for name in optimizers]
    variables: dict[str, Any] = {
        name: (
            ("optimizer", "seed", "step"),
            np.array([[run.metrics[name] for run in row] for row in grid]),
            dict(attributes),
        )
        for name, attributes in METRICS.items()
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
    settings = {
        "optimizers": {name: runs[name, seeds[0]].options for name in optimizers},
        "num_steps": setting.num_steps,
        "batch_size": setting.batch_size,
        "record_every": setting.record_every,
        "n_test": 0 if setting.test is None else len(setting.test[0]),
    }
    return make_dataset(
        variables,
        {
            "optimizer": ("optimizer", optimizers, {"long_name": "optimizer"}),
            "seed": ("seed", seeds, {"long_name": "seed of initial weights and batch order"}),
            "step": ("step", setting.steps, {"long_name": "optimizer steps", "units": "1"}),
        },
        method="mini-batch training",
        settings=settings,
        likelihood=setting.likelihood.name,
        n_data=len(setting.train[0]),
        seed=seeds[0] if len(seeds) == 1 else np.array(seeds),
        **attrs,
    )


def default_record_every(num_steps: int) -> int:
    """About fifty records per run."""
    return max(1, num_steps // 50) if isinstance(num_steps, int) else num_steps


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
