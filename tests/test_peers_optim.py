"""KFAC beside ASDL, a library that nobody here wrote.

Its factors of a convolution with T positions are A / T and T G, which changes neither their product nor their damped inverses. It damps
the factors apart, gives a bias the factor G alone, and does not correct averages for their start. So no network here has a bias.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from cases import make_case
from fisher_checks import error
from torch import Tensor, nn
from torch.nn import functional

import fisherlens as fl
from fisherlens.optim import KFAC

pytestmark = [
    pytest.mark.peers,
    # what the peer's own code and imports warn about
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
TOLERANCE = 1e-8
DAMPING, DECAY, BATCHES = 0.03, 0.05, 3
NETWORKS = {
    "dense": (lambda: nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False)), (5,)),
    "convolutions": (
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(3, 4, (2, 3), stride=2, bias=False)),
            *(nn.Tanh(), nn.Flatten(), nn.Linear(16, 3, bias=False)),
        ),
        (2, 5, 6),
    ),
}


def asdl() -> ModuleType:
    """The library, which asdfghjkl installs; a parser has the same name."""
    return pytest.importorskip("asdl.fisher", reason="asdfghjkl, which holds ASDL, is not installed")


@pytest.fixture
def preconditioned(monkeypatch):
    """Its preconditioned gradients, without the marks for a profiler that a build of torch without CUDA does not have."""
    asdl()
    from asdl import precondition

    monkeypatch.setattr(precondition.natural_gradient, "nvtx", SimpleNamespace(range=nullcontext))
    return precondition


def make(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, and a few batches in one."""
    model, (x, y), _ = make_case(f"{name} beside ASDL", *NETWORKS[name], n=4 * BATCHES)
    return model, x, y


def twin(name: str, model: nn.Module) -> nn.Module:
    """The same network for the peer, which leaves its matrices in the modules."""
    other = NETWORKS[name][0]().double()
    other.load_state_dict(model.state_dict())
    return other


def pass_through(maker: Any, model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> None:
    """Let the peer make a forward and a backward pass."""
    model.zero_grad()
    outputs = maker.setup_model_call(model, x)
    maker.setup_loss_call(functional.cross_entropy, outputs, y)
    maker.forward_and_backward(**options)


def directions(model: nn.Module, x: Tensor, y: Tensor, dampings: list[float], ema: float) -> list[list[Tensor]]:
    """What our steps over some batches subtract, each from the same parameters."""
    start = [p.detach().clone() for p in model.parameters()]
    opt = KFAC(model, lr=1.0, ema=ema, momentum=0.0, labels="true", preset="paper", inverse_refresh=1, kl_clip=None)
    found = []
    for damping, xs, ys in zip(dampings, x.chunk(len(dampings)), y.chunk(len(dampings)), strict=True):
        opt.param_groups[0]["damping"] = damping
        opt.zero_grad()
        functional.cross_entropy(model(xs), ys).backward()
        opt.step()
        found.append([old - p.detach() for old, p in zip(start, model.parameters(), strict=True)])
        with torch.no_grad():
            for old, p in zip(start, model.parameters(), strict=True):
                p.copy_(old)
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_factors_of_the_exact_fisher(name):
    library = asdl()
    model, x, y = make(name)
    other = twin(name, model)
    config = library.FisherConfig(fisher_type="fisher_exact", fisher_shapes="kron", loss_type="cross_entropy")
    pass_through(library.get_fisher_maker(other, config), other, x, y, data_size=len(x))
    ours = fl.KFAC(fl.Fisher(model, (x, y), likelihood="categorical")).dense()
    blocks = [torch.kron(m.fisher.kron.B, m.fisher.kron.A) for m in other.modules() if hasattr(m, "fisher")]
    assert len(blocks) == len(list(model.parameters()))
    assert error(ours, torch.block_diag(*blocks)) < TOLERANCE


@pytest.mark.parametrize("name", NETWORKS)
def test_the_direction_of_one_batch(name, preconditioned):
    model, x, y = make(name)
    other = twin(name, model)
    config = preconditioned.PreconditioningConfig(data_size=len(x), damping=DAMPING)
    pass_through(preconditioned.KfacGradientMaker(other, config, fisher_type="fisher_emp"), other, x, y)
    [ours] = directions(model, x, y, [DAMPING], ema=0.0)
    for mine, p in zip(ours, other.parameters(), strict=True):
        assert error(mine, p.grad) < TOLERANCE


@pytest.mark.parametrize("name", NETWORKS)
def test_directions_of_averages(name, preconditioned):
    """Without the correction for the start, both factors are c times ours: 1/c² times our inverse with λ/c²."""
    model, x, y = make(name)
    other = twin(name, model)
    config = preconditioned.PreconditioningConfig(data_size=len(x) // BATCHES, damping=DAMPING, ema_decay=DECAY)
    maker = preconditioned.KfacGradientMaker(other, config, fisher_type="fisher_emp")
    short = [1 - (1 - DECAY) ** t for t in range(1, BATCHES + 1)]
    ours = directions(model, x, y, [DAMPING / c**2 for c in short], ema=1 - DECAY)
    for c, mine, xs, ys in zip(short, ours, x.chunk(BATCHES), y.chunk(BATCHES), strict=True):
        pass_through(maker, other, xs, ys)
        for direction, p in zip(mine, other.parameters(), strict=True):
            assert error(direction / c**2, p.grad) < TOLERANCE
