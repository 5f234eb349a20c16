"""A problem on another device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from fisherlens.errors import InputError
from fisherlens.training.base import Problem


def check_device(device: torch.device | str) -> torch.device:
    """Return a device that is there, by itself or by name."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"Unknown device {device!r}. Known: 'cpu', 'cuda', 'cuda:0', …") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"Device {str(found)!r} was asked for, but torch finds no CUDA device here. Use 'cpu', or leave it out."
        )
    return found


def on_device(problem: Problem, device: torch.device | str) -> Problem:
    """The same problem with its data and its networks on ``device``; initial weights are those of the CPU, moved.

    Examples
    --------
    >>> import fisherlens as fl
    >>> on_device(fl.problem("digits-mlp", num_train=50), "cpu").model(0)[0].weight.device
    device(type='cpu')
    """
    device = torch.device(device)
    moved = {half: tuple(part.to(device) for part in getattr(problem, half)) for half in ("train", "test")}
    return replace(problem, factory=partial(_built, problem.factory, device), **moved)


def _built(factory: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    return factory().to(device)
