"""Exceptions and warnings of fisherlens, and the texts that more than one module shows.

A message has four parts: what was expected, what came, the probable cause, what to do.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable


class FisherLensError(Exception):
    """Root of every error that fisherlens raises on purpose."""


class InputError(FisherLensError, ValueError):
    """An argument that cannot be right: shape, dtype, range, name, mode."""


class NonFiniteError(FisherLensError, ValueError):
    """NaN or infinity in a parameter, an input, a target, an output or a matrix."""


class UnsupportedModuleError(FisherLensError):
    """A module, or a use of a parameter, for which no exact rule exists yet."""


class MemoryBudgetError(FisherLensError):
    """The result would not fit the memory budget; the message says what would."""


class FileFormatError(FisherLensError):
    """A file that is damaged, truncated, or not written by fisherlens."""


class ConvergenceWarning(UserWarning):
    """An iteration ended before its tolerance; the partial result is returned."""


class NumericalWarning(UserWarning):
    """A result that stands, with a caveat on its precision."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which known name is closest to an unknown one, then list the known ones."""
    known = [str(entry) for entry in known]
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    shown = ", ".join(repr(entry) for entry in known[:20]) + (", …" if len(known) > 20 else "")
    return f"{hint}Known: {shown}."


def readable_bytes(count: float) -> str:
    """A byte count with a binary unit, ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


UNKNOWN_NAME = "Unknown {what} {name!r}. {hint}"
DAMPING = (
    "damping must be a finite number > 0; got {damping!r}. It is added to F, in the units of its eigenvalues (nat): "
    "1e-3 times the largest eigenvalue is a common start."
)
NO_SCORE_ROWS = (
    "This needs score rows, the rows of U in F = UᵀU/W, but the operator was built with kind='hessian': a Hessian is no such product and may be "
    "indefinite. Use kind='exact', 'mc' or 'empirical'. With 'hessian' there are F @ v, solve, diagonal, dense, block and fl.spectrum."
)
NO_DIVERGENCE = (
    "The divergence KL(p(y | f) ‖ p(y | f')) between two outputs is needed here, but {name} does not say it. Give it a method: divergence(outputs, moved) of "
    "an ElementwiseLikelihood, divergence(moved) of a BoundLikelihood. Or leave out model= and data=, which leaves the quadratic model alone."
)
NO_GRADIENT = (
    "The backward pass of the model failed: {error}. Its outputs were computed, so an operation of its forward cannot be differentiated. Where torch "
    "speaks of an in-place operation, one of them wrote over what a gradient needs: write x = x + 1 for x += 1, leave out inplace=True behind an "
    "operation that keeps its output (exp, sigmoid, softmax, normalisation), or clone() first. model(inputs).sum().backward() shows the same error, and "
    "under torch.autograd.detect_anomaly() the line."
)


def user_level() -> int:
    """The ``stacklevel`` at which a warning names the line of the user: the first frame outside of this package and of torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INNER:
        level, frame = level + 1, frame.f_back
    return level


_INNER = ("fisherlens", "torch", "contextlib", "concurrent", "threading")
