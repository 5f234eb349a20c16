"""Small problems and optimizers for tests of training, all by name, so that other processes can import them."""

import os
from functools import partial

import torch
from torch import nn

import fisherlens as fl


def network():
    """Two layers, with a dropout that draws in every step, and a norm whose statistics are no parameters."""
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 3))


def plain_network():
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))


def double_network():
    return network().double()


def clouds(n=30, factory=plain_network, dtype=torch.float32, **settings):
    """Three Gaussian clouds in the plane, far enough apart to be learnt in a few steps."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 3
    centres = torch.tensor([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]], dtype=dtype)
    inputs = centres[labels] + 0.3 * torch.randn(n, 2, generator=generator, dtype=dtype)
    half = (inputs[: n // 2], labels[: n // 2])
    return fl.Problem("clouds", "Three clouds.", factory, (inputs, labels), half, **settings)


def sgd(model, lr=0.1, **options):
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def adam(model, lr=0.01):
    return torch.optim.Adam(model.parameters(), lr=lr)


def scheduled(model, lr=0.1):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, amsgrad=True)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=1000)


def method(model, name, **options):
    return getattr(fl.optim, name)(model, **options)


class Hidden(torch.optim.SGD):
    """Keeps something outside its state, so that its state_dict does not say all."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        self.param_groups[0]["lr"] = 0.1 / self.steps
        return super().step(closure)


def hidden(model):
    return Hidden(model.parameters(), lr=0.1)


# What a killed run is compared with: every kind of state, noise in every step, a search.
ENTRIES = {
    "sgd": partial(sgd, momentum=0.9),
    "scheduled": scheduled,
    "cw-ngd": partial(method, name="CWNGD", damping=1e-3, labels="sampled"),
    "hidden": hidden,
}
SETTING = {
    "num_steps": 6,
    "seeds": 2,
    "batch_size": 7,
    "record_every": 2,
    "tune": {"sgd": {"lr": [0.01, 0.1]}, "cw-ngd": {"lr": [0.01, 0.03]}},
}


def comparison(folder, **options):
    """The comparison of the tests of resuming."""
    return fl.compare_optimizers(clouds(factory=network), ENTRIES, resume=folder, progress=False, **(SETTING | options))


class Breaking(torch.optim.SGD):
    def step(self, closure=None):
        raise RuntimeError("the step's own bug")


def breaking(model):
    return Breaking(model.parameters(), lr=0.1)


class Dying(torch.optim.SGD):
    def step(self, closure=None):
        os._exit(3)


def dying(model):
    return Dying(model.parameters(), lr=0.1)
