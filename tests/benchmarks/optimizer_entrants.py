"""The methods whose steps are measured, at which periods, and the libraries that have KFAC too.

Periods are ``(refresh, inverse_refresh)``: steps from one statistic to the next, and from one inverse, root or basis to the next.
``(0, 0)`` takes none. Those of the sources stand first; others are named in the text of the results.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from optimizer_tasks import Subject, Task
from torch import nn

from fisherlens import optim

Rate = tuple[int, int]
SGD, KFAC, PROJECTED = "SGD with momentum", "KFAC", "ProjectedKFAC"
SINGD, ASDL = "singd, inverse-free KFAC", "ASDL, KFAC"
PEERS = (SINGD, ASDL)


class Unavailable(Exception):
    """A contestant that cannot take part, and why."""


@dataclass(frozen=True)
class Entrant:
    """A method: ``make(task, refresh, inverse_refresh)``, and its periods for convolutional and dense networks."""

    make: Callable[[Task, int, int], Subject]
    conv: tuple[Rate, ...]
    dense: tuple[Rate, ...] = ()

    def rates(self, kind: str) -> tuple[Rate, ...]:
        """The periods for a kind of network."""
        return self.dense or self.conv if kind == "dense" else self.conv

    def cycle(self, kind: str) -> Rate:
        """Short periods within which every kind of step that the rates need occurs."""
        rates = self.rates(kind)
        refresh = 0 if rates == ((0, 0),) else 1 if all(r == 1 for r, _ in rates) else 2
        return refresh, refresh if all(i == r for r, i in rates) else 2 * refresh


def kind_of_step(number: int, cycle: Rate) -> str:
    """``"plain"``, ``"statistics"``, or ``"inverses"``, which takes statistics too."""
    refresh, inverses = cycle
    if not refresh or number % refresh:
        return "plain"
    return "statistics" if number % inverses else "inverses"


def amortised(kinds: dict[str, float], rate: Rate) -> float:
    """Mean over a period; a rate whose inverses fall between statistics (2/25) is charged for both then."""
    refresh, inverses = rate
    if not refresh:
        return kinds["plain"]
    shares = {"plain": 1 - 1 / refresh, "statistics": 1 / refresh - 1 / inverses, "inverses": 1 / inverses}
    return sum(share * kinds[kind] for kind, share in shares.items() if share > 0)


def _ours(method: type[torch.optim.Optimizer], *, periods: bool = False, **options: Any) -> Callable[..., Subject]:
    def make(task: Task, refresh: int, inverses: int) -> Subject:
        own = {"refresh": max(1, refresh), "likelihood": task.likelihood} | options
        own |= {"inverse_refresh": inverses} if periods else {}
        return Subject(task, lambda model: method(model, **own))

    return make


def _sgd(task: Task, refresh: int, inverses: int) -> Subject:
    return Subject(task, lambda model: torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9))


class _Peer(Subject):
    """An optimizer of another library, which does not say what it keeps."""

    def kept(self) -> None:
        return None


def _singd(task: Task, refresh: int, inverses: int) -> Subject:
    """Dense factors, their inverses updated without inverting (arXiv:2312.05705); observed labels."""
    try:
        optimizer = import_module("singd.optim.optimizer").SINGD
    except ImportError:
        raise Unavailable("not installed") from None
    return _Peer(task, lambda m: optimizer(m, T=refresh, kfac_like=True, alpha1=0.0, warn_unsupported=False))


class _Asdl(_Peer):
    """ASDL (of the package asdfghjkl) wraps the passes and writes the direction into ``.grad`` (its documentation).

    Sampled labels, averages of 0.95, and factors that are damped apart, as in "KFAC, factored".
    """

    def __init__(self, task: Task, refresh: int, inverses: int):
        try:
            library = import_module("asdl.precondition")
        except ImportError:
            raise Unavailable("not installed") from None
        if task.likelihood != "categorical":
            raise Unavailable("cross-entropy only")
        super().__init__(task, lambda model: torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9))
        config = library.PreconditioningConfig(
            data_size=task.batch,
            damping=3e-2,
            ema_decay=0.05,
            curvature_upd_interval=refresh,
            preconditioner_upd_interval=inverses,
            ignore_modules=[nn.BatchNorm2d],
        )
        if not torch.cuda.is_available():  # its marks for a profiler need a build of torch with CUDA
            library.natural_gradient.nvtx = SimpleNamespace(range=nullcontext)
        self.maker = library.KfacGradientMaker(self.model, config)

    def step(self) -> None:
        """As its documentation has it."""
        self.optimizer.zero_grad()
        outputs = self.maker.setup_model_call(self.model, self.task.x)
        self.maker.setup_loss_call(nn.functional.cross_entropy, outputs, self.task.y)
        self.maker.forward_and_backward()
        self.optimizer.step()


EVERY: tuple[Rate, ...] = ((1, 1),)
KRONECKER: tuple[Rate, ...] = ((1, 5), (20, 100))  # kfac-jax; the baselines of TENGraD
ENTRANTS: dict[str, Entrant] = {
    SGD: Entrant(_sgd, ((0, 0),)),
    "FNGD, after epoch 1": Entrant(_ours(optim.FNGD, epoch_steps=1), ((0, 0),)),
    "FNGD, epoch 1": Entrant(_ours(optim.FNGD, epoch_steps=10**9), EVERY),
    "TENGraD": Entrant(_ours(optim.TENGraD), ((100, 100),)),
    "MBF": Entrant(_ours(optim.MBF, periods=True), ((10, 100),), ((2, 25),)),
    KFAC: Entrant(_ours(optim.KFAC, periods=True), KRONECKER),
    "KFAC, factored": Entrant(_ours(optim.KFAC, periods=True, preset="paper"), KRONECKER),
    PROJECTED: Entrant(_ours(optim.ProjectedKFAC, periods=True), ((1, 50), (20, 100))),
    SINGD: Entrant(_singd, ((1, 1), (10, 10), (20, 20))),
    ASDL: Entrant(_Asdl, KRONECKER),
    "EKFAC": Entrant(_ours(optim.EKFAC, periods=True), ((1, 50),)),
    "K-BFGS": Entrant(_ours(optim.KBFGS), EVERY),
    "Shampoo": Entrant(_ours(optim.Shampoo, periods=True), ((1, 1), (1, 20))),
    "TNT": Entrant(_ours(optim.TNT, periods=True), ((10, 100),), ((1, 20),)),
    "CWNGD": Entrant(_ours(optim.CWNGD), EVERY),
    "UnitWise": Entrant(_ours(optim.UnitWise), EVERY),
    "QuasiDiagonal": Entrant(_ours(optim.QuasiDiagonal), EVERY),
    "NGD": Entrant(_ours(optim.NGD), EVERY),
}
# Measured in the same rounds, since they are compared with each other; all others have rounds of their own.
TOGETHER = (KFAC, "KFAC, factored", PROJECTED, SINGD, ASDL)

# What design.md asks for at batch 128, over SGD with momentum; of ProjectedKFAC: no more than KFAC with the same statistics.
GOALS: dict[tuple[str, str, Rate], float] = {
    ("FNGD, after epoch 1", "conv6", (0, 0)): 1.2,
    ("FNGD, after epoch 1", "lenet", (0, 0)): 1.2,
    ("MBF", "conv6", (10, 100)): 1.4,
    ("MBF", "lenet", (10, 100)): 1.4,
    ("TENGraD", "conv6", (100, 100)): 1.6,
    ("TENGraD", "lenet", (100, 100)): 1.6,
    (KFAC, "conv6", (20, 100)): 1.15,
    (KFAC, "lenet", (20, 100)): 2.0,
    ("CWNGD", "conv6", (1, 1)): 3.0,
    ("CWNGD", "lenet", (1, 1)): 2.0,
}
GOAL_BATCH = 128
