"""Mixed precision: a ``torch.amp.GradScaler``, whose scale gradients and captured scores carry, and which may skip a step; autocast."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch

from fisherlens.errors import InputError
from fisherlens.optim import texts


class AskedByScaler:
    """``_step_supports_amp_scaling``, which a scaler reads first thing in ``scaler.step(opt)``: it is remembered as it asks.

    Torch then hands over its scale as ``opt.grad_scale``, and whether a gradient overflowed as ``opt.found_inf``. After
    ``scaler.unscale_(opt)`` it keeps the scale to itself, although the scores that were captured before still carry it.
    """

    def __get__(self, opt: Any, owner: type | None = None) -> bool:
        frame = inspect.currentframe()
        asking = None if frame is None or frame.f_back is None else frame.f_back.f_locals.get("self")
        if opt is not None and isinstance(asking, torch.amp.GradScaler):
            opt._scaler = weakref.ref(asking)
        return True


def stepped_by_scaler(opt: Any) -> bool:
    """Whether a scaler is calling ``opt.step``."""
    return getattr(opt, "found_inf", None) is not None


def overflowed(opt: Any) -> bool:
    """Whether that scaler has seen a gradient with NaN or infinity."""
    return stepped_by_scaler(opt) and bool(opt.found_inf.item())


def loss_scale(opt: Any) -> float:
    """The factor of the loss in this step; 1 without a scaler."""
    if not stepped_by_scaler(opt):
        return 1.0
    if getattr(opt, "grad_scale", None) is not None:
        return float(opt.grad_scale)
    scaler = None if opt._scaler is None else opt._scaler()
    if scaler is None:
        raise InputError(texts.HIDDEN_SCALE.format(name=opt.name))
    return scaler.get_scale()


def unscale(opt: Any) -> None:
    """Divide every ``.grad`` by the scale, unless ``scaler.unscale_`` has done so."""
    if stepped_by_scaler(opt) and getattr(opt, "grad_scale", None) is not None:
        for group in opt.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(1 / float(opt.grad_scale))
