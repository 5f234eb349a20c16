"""Networks, rows by a slow loop and one step, for the tests of optimizers that keep the rows of a batch."""

import torch
from test_cwngd import NETWORKS, flat, make, rows_of
from torch import nn
from torch.nn import functional

from fisherlens import Fisher

__all__ = [
    "NETWORKS",
    "flat",
    "layer_blocks",
    "make",
    "mc_rows",
    "mean_loss",
    "moved",
    "rows_of",
    "take_step",
    "unit_blocks",
]


def mean_loss(model, x, y):
    return functional.cross_entropy(model(x), y)


def take_step(opt, model, x, y, loss=mean_loss):
    value = loss(model, x, y)
    opt.zero_grad()
    value.backward()
    opt.step()
    return value.item()


def moved(factory, name, dtype=torch.float64, steps=1, n=7, **options):
    """How far the parameters of a sample network move."""
    model, x, y = make(name, n)
    model, x = model.to(dtype), x.to(dtype)
    before = flat(model)
    opt = factory(model, **options)
    for _ in range(steps):
        take_step(opt, model, x, y)
    return (flat(model) - before).double(), opt


def mc_rows(model, x, seed):
    """Rows at the labels that an optimizer with this seed draws first: (M, P)."""
    F = Fisher(model, (x, None), likelihood="categorical", kind="mc", seed=seed)
    values, vectors = torch.linalg.eigh(F.dense() * len(x))
    return (vectors * values.clamp(min=0).sqrt()).T[-len(x) :]


def layer_blocks(model):
    blocks, start = {}, 0
    for name, p in model.named_parameters():
        if p.requires_grad:
            blocks.setdefault(name.rpartition(".")[0], []).append(torch.arange(start, start + p.numel()))
            start += p.numel()
    return [torch.cat(pieces) for pieces in blocks.values()]


def unit_blocks(model):
    """Flat indices of each output unit, its bias last, and where that is; None without one."""
    units, biases, start = [], [], 0
    for module in model.modules():
        if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            continue
        count = len(module.weight)
        weight = torch.arange(start, start + module.weight.numel()).view(count, -1)
        start += weight.numel()
        for o in range(count):
            bias = None if module.bias is None else start + o
            units.append(weight[o] if bias is None else torch.cat([weight[o], torch.tensor([bias])]))
            biases.append(bias)
        start += 0 if module.bias is None else count
    return units, biases
