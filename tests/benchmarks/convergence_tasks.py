"""What is trained in convergence.py: networks and data, optimizers with the learning rates that are tried, and what papers say of them.

Published numbers are those of the authors' code and logs, as far as they are public; none is read off a paper's text that we do not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

import fisherlens as fl

STEP = 10**0.5  # between the learning rates that are tried
CWNGD_LOGS = "github.com/tranvansang/cw-ngd-results, means over 5 seeds"
MBF_DEMO = "the released demo of MBF (github.com/achrafba96/mbf), one seed, training loss after 500 s"
TENGRAD_CODE = "github.com/saeedsoori/k-fac"


def torch_optimizer(model: nn.Module, /, name: str, **options: Any) -> torch.optim.Optimizer:
    """One of torch's."""
    return getattr(torch.optim, name)(model.parameters(), **options)


def our_optimizer(model: nn.Module, /, name: str, **options: Any) -> torch.optim.Optimizer:
    """One of ours."""
    return getattr(fl.optim, name)(model, **options)


@dataclass(frozen=True)
class Entrant:
    """An optimizer: its class, options that are fixed, and the learning rate in the middle of those that are tried."""

    name: str
    lr: float
    options: Mapping[str, Any] = field(default_factory=dict)

    def entry(self, likelihood: str, epoch: int) -> Any:
        """A function ``(model, lr) -> Optimizer`` that worker processes can import."""
        if hasattr(torch.optim, self.name):
            return partial(torch_optimizer, name=self.name, **self.options)
        own = {"epoch_steps": epoch} if self.name == "FNGD" else {}
        return partial(our_optimizer, name=self.name, likelihood=likelihood, **(own | dict(self.options)))

    def rates(self, count: int) -> list[float]:
        """Learning rates around the middle one, √10 apart."""
        return [float(f"{self.lr * STEP ** (place - count // 2):.3g}") for place in range(count)]


@dataclass(frozen=True)
class Size:
    """How much of a task is done."""

    num_train: int | None
    num_test: int | None
    num_steps: int
    batch: int
    num_eval: int | None = None
    record_every: int = 1
    rates: int = 5


@dataclass(frozen=True)
class Claim:
    """What a source reports: ``better`` needs less of ``measure`` than ``worse`` (an accuracy is taken as its error)."""

    measure: str  # "own" (steps), "seconds_own", "train_loss" or "test_error" at the end
    better: str
    worse: str
    published: str
    source: str


@dataclass(frozen=True)
class Task:
    """A problem with its optimizers, sizes and claims."""

    title: str
    problem: str
    entrants: Mapping[str, Entrant]
    sizes: Mapping[str, Size]
    targets: Mapping[str, Mapping[str, float]]  # by size
    claims: tuple[Claim, ...] = ()
    about: str = ""
    shown: str = "test_accuracy"  # in the figure


SGD, ADAM, CWNGD, KFAC, TENGRAD, MBF = "SGD", "Adam", "CW-NGD", "KFAC", "TENGraD", "MBF"
# Dampings are the sources' where the scale of the problem allows it: CW-NGD's own 1e-7 is for float64 here, and its authors' best region reaches
# to 1e-2; those of TENGraD and KFAC are its scripts' for Fashion-MNIST. Middle learning rates are the sources' or a coarse choice of ours.
_COMMON: dict[str, Entrant] = {
    SGD: Entrant("SGD", 0.1, {"momentum": 0.9}),
    ADAM: Entrant("Adam", 3e-3),
    CWNGD: Entrant("CWNGD", 3e-3, {"damping": 1e-4}),
    MBF: Entrant("MBF", 1e-4, {"damping": 3e-3}),
    TENGRAD: Entrant("TENGraD", 3e-2, {"damping": 0.1, "refresh": 20}),
    "FNGD": Entrant("FNGD", 1e-2, {"damping": 0.1}),
    KFAC: Entrant("KFAC", 1e-2, {"damping": 3e-2}),
    "ProjectedKFAC": Entrant("ProjectedKFAC", 1e-2, {"damping": 3e-2, "inverse_refresh": 10}),
}
_DECAY = {"weight_decay": 1e-3}  # of TENGraD's scripts for Fashion-MNIST
TASKS: dict[str, Task] = {
    "mnist": Task(
        "MNIST, LeNet-5",
        "mnist-lenet",
        _COMMON,
        {
            "quick": Size(640, 500, 16, 128, num_eval=200, rates=3),
            "cpu": Size(10_240, 2000, 40, 1024, num_eval=500),
            "full": Size(None, None, 1180, 1024, num_eval=2000),
        },
        {"quick": {"test_accuracy": 0.8}, "cpu": {"test_accuracy": 0.95}, "full": {"test_accuracy": 0.98}},
        (
            Claim("own", CWNGD, ADAM, "10.6 against 14 steps", CWNGD_LOGS),
            Claim("own", ADAM, SGD, "14 against 21.8 steps", CWNGD_LOGS),
            Claim("own", SGD, KFAC, "21.8 against 182.8 steps, KFAC untuned", CWNGD_LOGS),
            Claim("seconds_own", ADAM, CWNGD, "0.0091 against 0.160 s per step", CWNGD_LOGS),
        ),
        "The follow-up of CW-NGD trains two convolutions and two dense layers for 100 epochs of 59 steps, its rivals untuned.",
    ),
    "fashion": Task(
        "Fashion-MNIST, 784-120-120-10",
        "fashion-mlp",
        _COMMON,
        {
            "quick": Size(2560, 1000, 24, 512, num_eval=500, rates=3),
            "cpu": Size(20_480, 5000, 120, 1024, num_eval=1000),
            "full": Size(None, None, 1180, 1024, num_eval=5000),
        },
        {"quick": {"test_accuracy": 0.7}, "cpu": {"test_accuracy": 0.82}, "full": {"test_accuracy": 0.87}},
        (
            Claim("own", CWNGD, ADAM, "42.4 against 71.8 steps", CWNGD_LOGS),
            Claim("own", CWNGD, SGD, "42.4 against 56.4 steps", CWNGD_LOGS),
            Claim("own", SGD, KFAC, "56.4 against 413.4 steps, KFAC untuned", CWNGD_LOGS),
            Claim("seconds_own", ADAM, CWNGD, "0.0021 against 0.0148 s per step", CWNGD_LOGS),
        ),
        "The network is that of the follow-up of CW-NGD, which trains for 100 epochs of 59 steps, its rivals untuned. As its inputs are more than "
        "16, the released rule cuts every weight matrix into single entries: the method is diagonal here, but for the biases.",
    ),
    "autoencoder": Task(
        "MNIST autoencoder 784-1000-500-250-30 and back",
        "mnist-autoencoder",
        {
            SGD: Entrant("SGD", 3e-3, {"momentum": 0.9}),
            ADAM: Entrant("Adam", 1e-3),
            CWNGD: Entrant("CWNGD", 1e-3, {"damping": 1e-4}),
            MBF: Entrant(
                "MBF", 1e-5, {"damping": 3e-4, "refresh": 2, "inverse_refresh": 25}
            ),  # the demo's, for 1,000 images
            "Shampoo": Entrant("Shampoo", 3e-3),
            KFAC: Entrant("KFAC", 1e-2, {"damping": 0.3, "inverse_refresh": 20}),
            "ProjectedKFAC": Entrant("ProjectedKFAC", 1e-2, {"damping": 0.3, "inverse_refresh": 10}),
        },
        {
            "quick": Size(1000, 250, 8, 100, num_eval=250, rates=3, record_every=2),
            "cpu": Size(5000, 1000, 40, 250, num_eval=500, record_every=4),
            "full": Size(None, None, 3000, 1000, num_eval=5000, record_every=50),
        },
        {"quick": {"train_loss": 300.0}, "cpu": {"train_loss": 200.0}, "full": {"train_loss": 70.0}},
        (
            Claim("train_loss", MBF, ADAM, "51.7 against 53.8 nat", MBF_DEMO),
            Claim("train_loss", MBF, SGD, "51.7 against 55.5 nat", MBF_DEMO),
            Claim("train_loss", MBF, KFAC, "51.7 against 54.4 nat", MBF_DEMO),
            Claim("train_loss", MBF, "Shampoo", "51.7 against 53.3 nat", MBF_DEMO),
        ),
        "A fixed number of steps. The demo of MBF trains 300 epochs of 60 steps of 1,000 images; its log has 172.8 nat after one epoch, 67.5 after "
        "ten.",
        shown="train_loss",
    ),
    "epochs": Task(
        "Fashion-MNIST, three convolutions, ten epochs",
        "fashion-cnn",
        {
            SGD: Entrant("SGD", 3e-2, {"momentum": 0.9} | _DECAY),
            ADAM: Entrant("AdamW", 3e-3, _DECAY),
            CWNGD: Entrant("CWNGD", 3e-3, {"damping": 1e-4} | _DECAY),
            MBF: Entrant("MBF", 3e-5, {"damping": 3e-3} | _DECAY),
            TENGRAD: Entrant("TENGraD", 3e-3, {"damping": 0.1} | _DECAY),
            "FNGD": Entrant("FNGD", 1e-2, {"damping": 0.1} | _DECAY),
            KFAC: Entrant("KFAC", 3e-3, {"damping": 0.1, "refresh": 20, "inverse_refresh": 100} | _DECAY),
            "ProjectedKFAC": Entrant("ProjectedKFAC", 1e-2, {"damping": 0.1, "inverse_refresh": 10} | _DECAY),
        },
        {
            "quick": Size(128, 250, 20, 64, num_eval=128, record_every=2, rates=3),
            "cpu": Size(1024, 2000, 80, 128, num_eval=400, record_every=2),
            "full": Size(None, None, 4690, 128, num_eval=5000, record_every=50),
        },
        {"quick": {"test_accuracy": 0.6}, "cpu": {"test_accuracy": 0.75}, "full": {"test_accuracy": 0.87}},
        (
            Claim("test_error", TENGRAD, KFAC, "better than other natural-gradient methods (abstract)", TENGRAD_CODE),
            Claim("test_error", TENGRAD, SGD, "often better than SGD (abstract)", TENGRAD_CODE),
        ),
        "Damping, decay, momentum, periods and the middle learning rates of SGD, TENGraD and KFAC are those of TENGraD's scripts; their crops and "
        "flips of the images are left out, and ten epochs of a part of the images are fewer steps.",
    ),
    "smoke": Task(
        "Digits, 64-32-10",
        "digits-mlp",
        {name: _COMMON[name] for name in (SGD, ADAM, CWNGD)},
        {"smoke": Size(100, 50, 4, 32, rates=2, record_every=2)},
        {"smoke": {"test_accuracy": 0.2, "train_loss": -1.0}},
        (Claim("own", CWNGD, ADAM, "fewer steps", "nobody"), Claim("test_error", SGD, CWNGD, "lower", "nobody")),
    ),
}
