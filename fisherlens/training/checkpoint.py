"""A run in the middle: everything that the steps to come depend on, for optimizers that are known to continue to the bit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from fisherlens.errors import NumericalWarning, user_level
from fisherlens.optim.base import NaturalGradient
from fisherlens.training.record import Run
from fisherlens.training.states import NotStorableError, read_state, write_state

# Others may keep something outside their state_dict, and nothing could tell.
_EXACT = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)

_NOT_KEPT = (
    "A run could not be kept in {folder} ({why}); the comparison goes on, and its result is complete. Only if it is stopped now, what was not kept is done "
    "again. Make room there."
)


@dataclass(frozen=True)
class Checkpoint:
    """Where a run is stored while it runs, and after how many steps each."""

    path: Path
    every: int

    def load(self, run: Run, model: nn.Module, optimizer: Optimizer, scheduler: Any) -> tuple[int, float]:
        """Put the stored state back; the steps taken and their seconds, (0, 0.0) where nothing is stored."""
        if not self.path.exists():
            return 0, 0.0
        state = read_state(self.path)
        with torch.no_grad():
            for name, tensor in _tensors(model).items():
                tensor.copy_(state["model"][name])
        optimizer.load_state_dict(state["optimizer"])
        if scheduler is not None:
            scheduler.load_state_dict(state["scheduler"])
        _set_random(state["random"])
        run.metrics, run.steps_taken = state["metrics"], state["step"]
        return state["step"], state["seconds"]

    def save(self, step: int, seconds: float, run: Run, model: nn.Module, optimizer: Optimizer, scheduler: Any) -> None:
        """Store the state, if ``step`` is one to store and the state is known to say all."""
        if step % self.every or not continues_exactly(optimizer, scheduler):
            return
        state = {
            "step": step,
            "seconds": seconds,
            "metrics": run.metrics,
            "model": dict(_tensors(model)),
            "optimizer": optimizer.state_dict(),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "random": _random(),
        }
        try:
            write_state(self.path, state)
        except NotStorableError:  # a function in the state of a scheduler, say: the run is then done again as a whole
            self.path.unlink(missing_ok=True)
        except OSError as error:
            not_kept(self.path.parent, error)

    def drop(self) -> None:
        """Remove what is stored, as the run is over."""
        self.path.unlink(missing_ok=True)


def not_kept(folder: Path, error: OSError) -> None:
    """Warn that a folder takes no more files: hours of training are worth more than what is not stored of them."""
    text = _NOT_KEPT.format(folder=folder, why=error.strerror or error)
    warnings.warn(text, NumericalWarning, stacklevel=user_level())


def continues_exactly(optimizer: Optimizer, scheduler: Any) -> bool:
    """Whether state dicts of these say all: SGD, Adam and AdamW of torch, all methods of fisherlens, schedulers of torch."""
    own = isinstance(optimizer, NaturalGradient) and type(optimizer).__module__.startswith("fisherlens.optim.")
    known = scheduler is None or type(scheduler).__module__ == lr_scheduler.__name__
    return (own or type(optimizer) in _EXACT) and known


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, those too that a state_dict leaves out."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _random() -> dict[str, Any]:
    """The state of the generators that layers draw from."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.default_generator.get_state(), "cuda": list(devices)}


def _set_random(state: Mapping[str, Any]) -> None:
    torch.default_generator.set_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
