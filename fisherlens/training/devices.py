"""Devices by name, and a problem on another device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from fisherlens.errors import InputError
from fisherlens.training.base import Problem

_UNKNOWN = "Unknown device {name!r}. Known: 'auto', 'cpu', 'cuda', 'cuda:0', …"
_NOT_HERE = "Device {name!r} was asked for, but torch {why} here. Use 'auto' or 'cpu'."


def find_device(device: torch.device | str | None) -> torch.device | None:
    """A device that can be used here, by itself or by name; ``"auto"`` is CUDA where there is one, else the CPU; None stays None.

    Raises
    ------
    InputError: an unknown name, or a device that is not here; nothing was computed yet.
    """
    if device is None:
        return None
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(_UNKNOWN.format(name=device)) from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InputError(_NOT_HERE.format(name=str(found), why="finds no CUDA device"))
    if found.type == "meta":
        raise InputError(_NOT_HERE.format(name="meta", why="keeps no numbers on it, so that nothing can be computed"))
    if found.type != "cpu":
        try:
            torch.empty(1, device=found)
        except (RuntimeError, AssertionError) as error:  # another number than there are, or another build of torch
            why = f"cannot use it ({str(error).partition(chr(10))[0]})"
            raise InputError(_NOT_HERE.format(name=str(found), why=why)) from None
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
