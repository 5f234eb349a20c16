"""Small networks under a Monitor, their data, and the loop that a user writes."""

import copy
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import fisherlens as fl

ROOT = Path(__file__).parents[1]
HOWTO = ROOT / "docs" / "howto" / "diagnose_your_training.md"
TIMES = ["seconds", "monitor_seconds", "share_of_time"]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def numbers(n=12, dtype=torch.float64):
    x, y = points(n, dtype)
    return x[:, :1], y


def seeded(build, seed=3):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build()


def regularised():
    """Batch statistics and dropout, both at work in training."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 2),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(18, 4),
        nn.Tanh(),
        nn.Linear(4, 3),
    )


def small():
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3))


def tiny():
    """Fewer parameters than score rows."""
    return nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 3))


def images(n=12, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 4, 4, generator=generator, dtype=torch.float64).to(dtype), torch.arange(n) % 3


def points(n=12, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, generator=generator, dtype=torch.float64).to(dtype), torch.arange(n) % 3


def advance(model, opt, data, steps, monitor=None, seen=None):
    """The loop that a user writes, with what it draws from the global generator."""
    for _ in range(steps):
        loss = functional.cross_entropy(model(data[0]), data[1])
        opt.zero_grad()
        loss.backward()
        opt.step()
        if monitor is not None and monitor.step() and seen is not None:
            seen.append(copy.deepcopy(model).eval())
    return model


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1} | options)


def watched(model, data, steps, **options):
    """A Monitor that measures at the start and at each of some steps."""
    monitor = fl.Monitor(model, data, likelihood="categorical", every=1, **options)
    for _ in range(steps):
        monitor.step()
    return monitor


def close(measured, expected, tolerance):
    np.testing.assert_allclose(
        np.asarray(measured, float), np.asarray(expected, float), rtol=tolerance, atol=tolerance * 1e-2
    )
