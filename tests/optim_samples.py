"""A small network, its data and the ordinary loop, for the tests of optimizers."""

import torch
from torch import nn
from torch.nn import functional

from fisherlens.optim import CWNGD

OPTIONS = {"lr": 0.05, "damping": 1e-2}


def seeded(factory, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        return factory().to(dtype)


def network(dtype=torch.float64):
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 5), nn.Tanh(), nn.Linear(5, 3)
        ),
        dtype,
    )


def data(n=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 4, 4, generator=generator).to(dtype), torch.randint(0, 3, (n,), generator=generator)


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def loss_of(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def step(opt, model, batch):
    loss = loss_of(model, batch)
    opt.zero_grad()
    loss.backward()
    opt.step()
    return loss.item()


def stepped(change=lambda opt, model, batch: None, batch=None, **options):
    """Parameters after two steps, with something done between the backward pass and each step."""
    model, batch = network(), batch or data()
    opt = CWNGD(model, **OPTIONS | options)
    for _ in range(2):
        loss = loss_of(model, batch)
        opt.zero_grad()
        loss.backward()
        change(opt, model, batch)
        opt.step()
    return flat(model)


def count_hooks(model):
    modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return modules + sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())
