"""The user's own network and data, found by name: ``package.module:factory``."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from torch import nn

from fisherlens.errors import InputError, nearest
from fisherlens.training import Problem

_FORM = (
    "--{option} takes package.module:factory, the name of a module and of a function in it that is called without "
    "arguments; got {got!r}. For example --{option} my_project.nets:make."
)
_NO_MODULE = (
    "--{option} {path}: there is no module {module!r}{hint}. It is looked for in the current folder, {here}, and among "
    "the installed packages."
)
_NOT_CALLABLE = (
    "--{option} {path}: {name!r} is of type {type}, not a function. Give a function without arguments that returns it."
)


def call(path: str, option: str) -> Any:
    """What the named function returns; modules of the current folder are found too.

    Parameters
    ----------
    path
        ``package.module:factory``.
    option
        The option of the command line that it came from, for errors.

    Raises
    ------
    InputError: another form, no such module or function, or not a function. What the user's own code raises passes through.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise InputError(_FORM.format(option=option, got=path))
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the user's module is there, and something that it imports is not
        hint = _similar(module_name)
        text = _NO_MODULE.format(option=option, path=path, module=module_name, hint=hint, here=here)
        raise InputError(text) from None
    if not hasattr(module, name):
        known = nearest(name, [entry for entry in vars(module) if not entry.startswith("_")])
        raise InputError(f"--{option} {path}: module {module_name!r} has no {name!r}. {known}")
    factory = getattr(module, name)
    if not callable(factory):
        text = _NOT_CALLABLE.format(option=option, path=path, name=name, type=type(factory).__name__)
        raise InputError(text)
    return factory()


def network(path: str) -> nn.Module:
    """The network that ``--model`` names."""
    found = call(path, "model")
    if not isinstance(found, nn.Module):
        raise InputError(
            f"--model {path}: the function must return a torch.nn.Module; it returned {type(found).__name__}. "
            "Return the network itself."
        )
    return found


def own_problem(path: str) -> Problem:
    """The user's own problem that ``--problem`` names."""
    found = call(path, "problem")
    if not isinstance(found, Problem):
        raise InputError(
            f"--problem {path}: the function must return a fl.Problem; it returned {type(found).__name__}. "
            "Return fl.Problem(name, description, factory, train, test, likelihood)."
        )
    return found


def _similar(module_name: str) -> str:
    known = sorted(entry.stem for entry in Path.cwd().glob("*.py"))
    close = difflib.get_close_matches(module_name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
