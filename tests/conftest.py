"""What every test shares: one thread, and a witness that nothing outside a call was changed by it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

torch.set_num_threads(1)  # bits are compared, and sums depend on the number of threads

_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))


def _bits(tensor: Tensor | None) -> bytes | None:
    """The bytes of a tensor: NaN equals NaN, and -0 is not 0."""
    if tensor is None:
        return None
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def snapshot(*models: nn.Module) -> dict[str, Any]:
    """Everything that a call must leave alone, by name: the models, global random states and global settings."""
    seen: dict[str, Any] = {
        "torch generator": _bits(torch.get_rng_state()),
        "cuda generators": [_bits(state) for state in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_available()
        else [],
        "numpy generator": repr(np.random.get_state(legacy=False)["state"]["key"].tobytes())  # noqa: NPY002
        + repr(np.random.get_state(legacy=False)["state"]["pos"]),  # noqa: NPY002
        "python generator": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "numpy errors": np.geterr(),
    }
    for k, model in enumerate(models):
        for name, module in model.named_modules():
            seen[f"{k} {name} training"] = module.training
            seen[f"{k} {name} attributes"] = sorted(vars(module))
            for hooks in _HOOKS:
                seen[f"{k} {name} {hooks}"] = [(key, id(hook)) for key, hook in (getattr(module, hooks) or {}).items()]
        for name, parameter in model.named_parameters(remove_duplicate=False):
            seen[f"{k} {name} identity"] = id(parameter)
            seen[f"{k} {name} value"] = (parameter.dtype, parameter.device, tuple(parameter.shape), _bits(parameter))
            seen[f"{k} {name} storage"] = parameter.data_ptr()
            seen[f"{k} {name} grad"] = (id(parameter.grad), _bits(parameter.grad))
            seen[f"{k} {name} requires_grad"] = parameter.requires_grad
            seen[f"{k} {name} hooks"] = len(parameter._backward_hooks or ())
            seen[f"{k} {name} accumulation hooks"] = len(getattr(parameter, "_post_accumulate_grad_hooks", None) or ())
        for name, buffer in model.named_buffers(remove_duplicate=False):
            seen[f"{k} {name} buffer"] = (id(buffer), buffer.requires_grad, _bits(buffer))
    return seen


@pytest.fixture
def unchanged() -> Callable[..., AbstractContextManager[None]]:
    """A context that fails if the models, global random states or settings differ after it, also after an error.

    ``with unchanged(model): ...``, or ``with unchanged(model), pytest.raises(InputError): ...``.
    """

    @contextmanager
    def watch(*models: nn.Module) -> Iterator[None]:
        before = snapshot(*models)
        try:
            yield
        finally:
            after = snapshot(*models)
            changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
            assert not changed, f"changed by the call: {changed}"

    return watch


def pytest_configure(config: pytest.Config) -> None:
    """Let torch say that "same" padding of even kernels copies its input: the zoo holds such a layer on purpose."""
    config.addinivalue_line("filterwarnings", "ignore:Using padding='same' with even kernel:UserWarning")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
