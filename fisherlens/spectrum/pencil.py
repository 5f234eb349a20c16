"""B of the generalised problem A x = λ B x: from what users have at hand to a product and an inverse."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fisherlens.errors import InputError
from fisherlens.fisher import check_damping
from fisherlens.linalg.krylov import Metric
from fisherlens.linalg.lanczos import block_lanczos
from fisherlens.spectrum.operators import Symmetric


@dataclass(frozen=True)
class Pencil(Metric):
    """B with its damping, if that is known to be part of it."""

    damping: float = 0.0
    words: str = ""
    _kept: dict[str, float] = field(default_factory=dict)

    def inverse_norm(self, view: Symmetric) -> float:
        """Norm of B⁻¹: 1/damping bounds it, else a few Lanczos steps with the solve find it."""
        if "norm" not in self._kept:
            if self.damping:
                self._kept["norm"] = 1 / self.damping
            else:
                found = block_lanczos(
                    self.solve, view.n, 1, dtype=view.dtype, device=view.device, block=2, tol=0.1, max_products=40
                )
                self._kept["norm"] = 1.2 * found.scale
        return self._kept["norm"]


def metric_of(B: Any, damping: Any, view: Symmetric) -> Pencil | None:
    """Read B and its damping in any of the forms that users may give."""
    if B is None:
        if damping is not None:
            raise InputError(
                f"damping={damping!r} belongs to B in A x = λ B x; got B=None. Pass B=approximation too, or F.damped(λ) as the operator."
            )
        return None
    if isinstance(B, tuple):
        if len(B) != 2 or damping is not None:
            raise InputError("B as a tuple is (approximation, damping); give the damping once, there or as damping=.")
        B, damping = B
    missing = [name for name in ("solve", "__matmul__") if not hasattr(B, name)]
    if missing or isinstance(B, Tensor):
        raise TypeError(
            f"B must be an approximation with a damping, or an object with @ and solve(v), such as F.damped(λ); got {type(B).__name__}. "
            "B=fl.BlockDiagonal(F, 'layer'), damping=1e-3 is the common case."
        )
    if hasattr(B, "shape") and int(B.shape[0]) != view.n:
        raise InputError(
            f"B must be of the same parameters as F; got {int(B.shape[0])} for {view.n}. Build it from the same operator."
        )
    words = type(B).__name__
    if damping is None:
        if _needs_damping(B):
            raise InputError(
                f"B={words} is only semi-definite and solves with a damping: pass B=(approximation, damping), or damping=, a number > 0."
            )
        return Pencil(lambda v: B @ v, lambda v: B.solve(v), words=words)
    lam = check_damping(damping)
    return Pencil(lambda v: (B @ v) + lam * v, lambda v: B.solve(v, lam), damping=lam, words=f"{words} + {lam:g} I")


def _needs_damping(B: Any) -> bool:
    try:
        parameters = inspect.signature(B.solve).parameters.values()
    except (TypeError, ValueError):
        return False
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return len(required) > 1


def allowance(pencil: Pencil, view: Symmetric, vectors: Tensor, images: Tensor, values: Tensor) -> float:
    """What rounding of A x and B x adds to a residual in the norm of B⁻¹: 4 √n ε of their lengths, times the root of ‖B⁻¹‖."""
    b = torch.linalg.vector_norm(pencil.rows(vectors), dim=1).cpu().double() * values.abs()
    lengths = torch.linalg.vector_norm(images, dim=1).cpu().double() + b
    return 4 * view.n**0.5 * torch.finfo(view.dtype).eps * lengths.max().item() * pencil.inverse_norm(view) ** 0.5
