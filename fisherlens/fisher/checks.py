"""What goes into an operator and what comes out of it: arguments in their range, answers that are finite."""

from __future__ import annotations

import math
import numbers
from typing import Any, TypeVar

import torch
from torch import Tensor

from fisherlens.errors import InputError, NonFiniteError
from fisherlens.scores.draws import check_options

Answer = TypeVar("Answer", Tensor, float)


def check_arguments(
    kind: str, mc_samples: Any, mc_sampling: str, rows: str, seed: Any, check_deterministic: Any
) -> tuple[int, int]:
    """Refuse arguments out of their range, also those that the kind at hand does not use; returns mc_samples and seed."""
    if not isinstance(mc_samples, numbers.Integral) or isinstance(mc_samples, bool) or mc_samples < 1:
        raise InputError(f"mc_samples must be an integer >= 1, the label draws per example; got {mc_samples!r}.")
    if not isinstance(check_deterministic, bool):
        raise TypeError(f"check_deterministic must be True or False; got {check_deterministic!r}.")
    check_options(kind, mc_sampling, rows)
    return int(mc_samples), check_seed(seed)


def check_seed(seed: Any) -> int:
    """Refuse what no generator takes as a seed."""
    if not isinstance(seed, numbers.Integral) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise InputError(f"seed must be an integer >= 0; got {seed!r}. Generators take seeds below 2**63.")
    return int(seed)


def check_iteration(tol: Any, max_steps: Any, preconditioner: Any) -> None:
    """Refuse options of an iterative solve out of their range, also where the solve is direct."""
    number = isinstance(tol, numbers.Real) and not isinstance(tol, bool)
    if tol is not None and not (number and 0 < tol < 1):
        raise InputError(f"tol must be a number between 0 and 1, the relative residual, or None; got {tol!r}.")
    if not isinstance(max_steps, numbers.Integral) or isinstance(max_steps, bool) or max_steps < 1:
        raise InputError(
            f"max_steps must be an integer >= 1, the most steps of conjugate gradients; got {max_steps!r}."
        )
    if preconditioner is not None and not callable(getattr(preconditioner, "solve", None)):
        raise TypeError(
            f"preconditioner must have solve(v, damping), as fl.BlockDiagonal(F, 'layer') and fl.KFAC(F) do; got {type(preconditioner).__name__}."
        )


def check_cap(max_params: Any) -> float:
    """Refuse a cap that is no number."""
    if not isinstance(max_params, numbers.Real) or isinstance(max_params, bool) or math.isnan(max_params):
        raise TypeError(
            f"max_params must be a number, the most parameters of which a matrix is formed; got {max_params!r}."
        )
    return max_params


def finite(answer: Answer, what: str, dtype: torch.dtype) -> Answer:
    """The answer itself; NaN or infinity in it is a NonFiniteError that names the member and the dtype that was too small."""
    if isinstance(answer, Tensor):
        # one sum is a cheap first look; only where it overflows does every entry get looked at
        good = bool(torch.isfinite(answer.sum())) or bool(torch.isfinite(answer).all())
    else:
        good = abs(answer) < float("inf")
    if not good:
        raise NonFiniteError(
            f"{what} is NaN or infinite although the scores are finite: their squares or sums exceed what {str(dtype).removeprefix('torch.')} holds "
            f"({torch.finfo(dtype).max:.0e}). Use model.double(), or look for very large weights, inputs or class weights."
        )
    return answer
