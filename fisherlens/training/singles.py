"""A batch of one example, of which batch normalisation in training mode has no statistics."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fisherlens.errors import InputError, NumericalWarning, user_level
from fisherlens.training.base import seeded
from fisherlens.training.record import Setting, device_of

_LEFT_OUT = (
    "The last batch of each pass would hold one example ({n:,} of them in batches of {size:,}), and module {name!r} ({type}), in training mode, "
    "normalises by the statistics of a batch, which one example does not have. That batch is left out; each pass draws anew which example it is. "
    "Another batch_size avoids this."
)
_ALL = (
    "Every batch would hold one example ({n:,} of them in batches of {size:,}), and module {name!r} ({type}), in training mode, normalises by the "
    "statistics of a batch, which one example does not have. Use batch_size >= 2 and at least two examples, or put the module into eval mode."
)
_REFUSAL = "more than 1 value per channel"  # as torch says it


def skip_singles(setting: Setting, model: nn.Module) -> Setting:
    """The same setting, without last batches of one example where the network refuses them in its mode; told by a warning.

    The network is asked, on a copy: a convolution's batch normalisation takes its statistics over positions too.

    Raises
    ------
    InputError: no batch would be left.
    """
    n, size = len(setting.train[0]), setting.batch_size
    if n % size != 1 and size != 1:
        return setting
    norms = {
        name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm) and module.training
    }
    if not norms or not _refuses_one(model, setting):
        return setting
    name, module = next(iter(norms.items()))
    words = {"n": n, "size": size, "name": name or "(root)", "type": type(module).__name__}
    if size == 1 or n == 1:
        raise InputError(_ALL.format(**words))
    warnings.warn(_LEFT_OUT.format(**words), NumericalWarning, stacklevel=user_level())
    return replace(setting, skip_single=True)


def _refuses_one(model: nn.Module, setting: Setting) -> bool:
    try:
        with seeded(0), torch.no_grad():
            copy.deepcopy(model)(setting.train[0][:1].to(device_of(model)))
    except ValueError as error:
        return _REFUSAL in str(error)
    except Exception:
        return False  # whatever else is wrong with the network shows in its first step
    return False
