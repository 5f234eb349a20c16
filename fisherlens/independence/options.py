"""The options that all judgements share, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fisherlens import errors
from fisherlens.errors import InputError
from fisherlens.fisher import check_damping
from fisherlens.spectrum.intervals import check_count

METHODS = ("auto", "exact", "estimate")
# Leading eigenpairs that are found first where a determinant must be estimated; those of fl.log_determinant.
DEFLATE = 10
# Lanczos steps after which a condition number is given up (our choice; about 20 are usual at 1 %).
MAX_STEPS = 500
# Steps that are made before a value is believed; up to so many parameters steps cost nothing, and more of them are made (our choice).
_LEAST_STEPS, SMALL, _LEAST_STEPS_SMALL = 8, 20_000, 20
# Steps in a row in which its error must be small.
_IN_A_ROW = 3
# The same of a run that begins near the end it looks for. Four steps and one estimate left 0.28 % at worst on 432 such runs on two kinds of networks
# (half of the 1 % that is asked for), but 0.9 % on a wide tanh network after training; this leaves 0.55 % there.
_LEAST_STEPS_PREPARED, _IN_A_ROW_PREPARED = 5, 2


@dataclass(frozen=True)
class Options:
    """How numbers are found that are too expensive to compute exactly.

    Attributes
    ----------
    method
        ``"auto"``, ``"exact"`` or ``"estimate"``.
    num_probes, num_matvecs, seed
        Random probes of an estimate, Lanczos steps of each, and the seed of their generator.
    tol
        Relative accuracy of condition numbers.
    """

    method: str = "auto"
    num_probes: int = 10
    num_matvecs: int = 80
    seed: int = 0
    tol: float = 1e-2


def check_options(method: Any, num_probes: Any, num_matvecs: Any, seed: Any, tol: Any) -> Options:
    """Refuse options that are out of range."""
    if method not in METHODS:
        hint = errors.nearest(str(method), METHODS)
        raise InputError(errors.UNKNOWN_NAME.format(what="method", name=method, hint=hint))
    check_count("num_probes", num_probes, 1, "the random probes of an estimate")
    check_count("num_matvecs", num_matvecs, 2, "the Lanczos steps of each probe")
    check_count("seed", seed, 0, "of the probes")
    number = isinstance(tol, int | float) and not isinstance(tol, bool)
    if not number or not 1e-10 <= tol <= 0.5:
        raise InputError(
            f"tol must be a number between 1e-10 and 0.5, the relative accuracy of condition numbers; got {tol!r}. 0.01 is the default."
        )
    return Options(method, num_probes, num_matvecs, seed, float(tol))


def run_options(options: Options, n_params: int, *, prepared: bool = False) -> dict[str, Any]:
    """Keywords of a Lanczos run: half the relative accuracy of condition numbers for each end; fewer steps suffice where its start was prepared."""
    least, in_a_row = (_LEAST_STEPS_PREPARED, _IN_A_ROW_PREPARED) if prepared else (_LEAST_STEPS, _IN_A_ROW)
    least = _LEAST_STEPS_SMALL if n_params <= SMALL else least
    return {"tol": options.tol / 2, "max_steps": MAX_STEPS, "least_steps": least, "in_a_row": in_a_row}


def check_grid(damping: Any) -> tuple[list[float], bool]:
    """Dampings as a list, and whether it was a single number; empty and repeated ones are refused."""
    single = np.ndim(damping) == 0
    if not single and not isinstance(damping, Sequence | np.ndarray):
        damping = list(damping)
    grid = [check_damping(damping)] if single else [check_damping(lam) for lam in damping]
    if not grid:
        raise InputError("damping is an empty list; give one number > 0 or several.")
    if len(set(grid)) < len(grid):
        twice = next(lam for lam in grid if grid.count(lam) > 1)
        raise InputError(f"damping holds {twice:g} twice; results are looked up by it, so give each value once.")
    return grid, single
