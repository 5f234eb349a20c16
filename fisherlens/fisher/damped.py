"""F + λI, and both operators as scipy sees them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fisherlens import errors
from fisherlens.errors import InputError
from fisherlens.linalg.precision import OwnPrecision

if TYPE_CHECKING:
    import numpy as np
    import scipy.sparse.linalg

    from fisherlens.fisher.operator import Fisher

Vector = Tensor | Mapping[str, Tensor]


def check_damping(damping: float) -> float:
    """Return a finite damping > 0 as a float; anything else is an InputError."""
    try:
        value = float("nan") if isinstance(damping, bool) else float(damping)
    except (TypeError, ValueError):
        value = float("nan")
    if not 0 < value < float("inf"):
        raise InputError(errors.DAMPING.format(damping=damping))
    return value


class DampedFisher(OwnPrecision):
    """F + λI, lazily: products, solves, diagonal, dense; damping twice by a and b equals a + b."""

    def __init__(self, fisher: Fisher, damping: float):
        self.fisher, self.damping = fisher, damping
        self.shape, self.dtype, self.device, self.layout = fisher.shape, fisher.dtype, fisher.device, fisher.layout

    def __matmul__(self, v: Vector) -> Vector:
        """(F + λI) v in the form of v."""
        product = self.fisher @ v
        if isinstance(v, Mapping):
            return {name: product[name] + self.damping * v[name] for name in product}
        return product + self.damping * v

    def solve(self, v: Vector, **options: Any) -> Any:
        """(F + λI)⁻¹ v; options as for :meth:`Fisher.solve`."""
        return self.fisher.solve(v, self.damping, **options)

    def diagonal(self) -> Tensor:
        """Diagonal of F + λI."""
        return self.fisher.diagonal() + self.damping

    def dense(self, max_params: int = 5000) -> Tensor:
        """F + λI as a matrix, under the cap of :meth:`Fisher.dense`."""
        matrix = self.fisher.dense(max_params)
        matrix.diagonal().add_(self.damping)
        return matrix

    def damped(self, damping: float) -> DampedFisher:
        """F + (λ + damping) I."""
        return DampedFisher(self.fisher, self.damping + check_damping(damping))

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """F + λI as a ``scipy.sparse.linalg.LinearOperator``."""
        return to_scipy(self, self.fisher)

    def __repr__(self) -> str:
        return f"{self.fisher!r} + {self.damping:g} I"


def to_scipy(operator: Any, fisher: Fisher) -> scipy.sparse.linalg.LinearOperator:
    """An operator of fisherlens on numpy vectors; copies to the device of F and back."""
    import numpy as np
    import scipy.sparse.linalg

    def product(v: np.ndarray) -> np.ndarray:
        if np.iscomplexobj(v):
            return product(v.real) + 1j * product(v.imag)
        # torch refuses to look at read-only memory without a warning
        tensor = torch.as_tensor(np.require(v, requirements=["C", "W"]), dtype=fisher.dtype, device=fisher.device)
        flat = tensor.reshape(-1) if tensor.ndim == 2 and tensor.shape[1] == 1 else tensor
        return (operator @ flat).cpu().numpy().reshape(v.shape)

    dtype = np.float64 if fisher.dtype == torch.float64 else np.float32
    return scipy.sparse.linalg.LinearOperator(
        fisher.shape, matvec=product, rmatvec=product, matmat=product, rmatmat=product, dtype=dtype
    )
