"""A small network, its data and a loop, for the tests of what brings a Monitor into other programs."""

import sys

import torch
from monitor_samples import seeded
from torch import nn
from torch.nn import functional

__all__ = ["OPTIONS", "advance", "hide", "network", "points", "seeded"]

OPTIONS = {"likelihood": "categorical", "every": 2, "k": 2}


def network():
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3))


def points(n=12):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 3


def advance(model, steps, after):
    x, y = points()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1, steps + 1):
        loss = functional.cross_entropy(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        after(step)


def hide(monkeypatch, *names):
    """Make libraries fail to import, also where they are installed."""
    for name in list(sys.modules):
        if name.split(".")[0] in names or name in names:
            monkeypatch.delitem(sys.modules, name)
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
