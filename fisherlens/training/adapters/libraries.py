"""Libraries that are imported when they are asked for, and named when they are missing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

MISSING = (
    "{what} needs {names}, which cannot be imported here ({error}). fisherlens does not bring it: pip install {package}"
)


def require(what: str, modules: Sequence[str], package: str) -> ModuleType:
    """The first of some modules that can be imported, one that the program uses already before any other.

    Raises ImportError with the command that installs ``package``.
    """
    first: ImportError | None = None
    for name in sorted(modules, key=lambda name: name not in sys.modules):  # a stable sort keeps their order
        try:
            return importlib.import_module(name)
        except ImportError as error:
            first = first or error
    names = " or ".join(modules)
    raise ImportError(MISSING.format(what=what, names=names, error=first, package=package)) from first
