"""What each parameter, unit, channel and layer tells: parameter space seen without forming the matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fisherlens import errors
from fisherlens.approximations import BlockDiagonal
from fisherlens.errors import InputError, MemoryBudgetError
from fisherlens.fisher import DIRECT_LIMIT, Fisher, check_damping, require_fisher
from fisherlens.partitions import partition as make_partition
from fisherlens.results import make_dataset

if TYPE_CHECKING:
    import xarray as xr

_DIM = {"parameter": "param", "unit": "unit", "channel": "channel", "layer": "layer"}
_SCHEME = {"parameter": "diagonal", "unit": "unit", "channel": "channel", "layer": "layer"}


def information(F: Fisher, by: str = "layer", *, damping: float = 1e-3) -> xr.Dataset:
    r"""Measure what each part of the parameters tells about the data, without forming F.

    Parameters
    ----------
    F
        The Fisher operator.
    by
        ``"layer"``, ``"unit"``, ``"channel"`` or ``"parameter"`` (every single entry).
    damping
        λ > 0 in nat, for the effective dimension and the standard bound.

    Returns
    -------
    Dataset over ``layer``, ``unit``, ``channel`` or ``param``: ``information`` tr F_bb in nat; ``share`` of tr F; ``saliency`` ½ Σ θ_i² F_ii in nat, the
    divergence that removing the part would cause if F were diagonal (LeCun, Denker and Solla 1990 with the Fisher for the Hessian);
    ``effective_dimension`` tr F_bb (F_bb + λ)⁻¹; ``std_bound`` √(((F + λ)⁻¹)_ii / N), the Cramér–Rao width with a Gaussian prior of precision Nλ (root mean
    square over the part), in units of the parameter; ``dead``, no information at all; ``size``.

    Raises
    ------
    MemoryBudgetError: the inverse needs an order above 6,000 on both sides; use fewer examples.

    Notes
    -----
    Cost: the diagonal, one Gram matrix and its Cholesky factor, and one triangular solve with explicit columns in chunks, 2 (N R)² P operations.

    Examples
    --------
    >>> import fisherlens as fl
    >>> F = fl.Fisher(torch.nn.Linear(3, 2), (torch.eye(3), torch.tensor([0, 1, 0])), likelihood="categorical")
    >>> float(fl.information(F, "unit")["share"].sum().round(6))
    1.0
    """
    require_fisher(F)
    if by not in _DIM:
        raise InputError(errors.UNKNOWN_NAME.format(what="option by=", name=by, hint=errors.nearest(by, _DIM)))
    damping = check_damping(damping)
    dim, parts = _DIM[by], make_partition(F, _SCHEME[by])
    block = parts.block_of.to(F.device)
    sizes = torch.tensor(parts.sizes.tolist(), dtype=torch.float64, device=F.device)

    def summed(values: Tensor) -> Tensor:
        return torch.zeros(parts.num_blocks, dtype=torch.float64, device=F.device).index_add_(0, block, values.double())

    diagonal = F.diagonal().double().clamp(min=0)
    trace = diagonal.sum()
    told = summed(diagonal)
    if not F.solver.direct:
        raise MemoryBudgetError(
            f"The diagonal of the damped inverse needs a Cholesky factor of order {F.solver.order}; the limit is {DIRECT_LIMIT}. "
            "Use fewer examples, or kind='mc'."
        )
    inverse = F.solver.inverse_diagonal(damping)
    values: dict[str, tuple[Any, str, str]] = {
        "information": (told, "Fisher information", "nat"),
        "share": (told / trace if trace > 0 else torch.zeros_like(told), "share of the trace of F", "1"),
        "saliency": (summed(F.parameters.double().square() * diagonal) / 2, "saliency ½ Σ θ² F", "nat"),
        "effective_dimension": (BlockDiagonal(F, parts).effective_dimension(damping), "effective dimension", "1"),
        "std_bound": ((summed(inverse) / sizes / F.n_data).sqrt(), "Cramér–Rao width of a parameter", "1"),
        "dead": (told == 0, "tells nothing", "1"),
        "size": (parts.sizes, "parameters", "1"),
    }
    variables = {
        name: (dim, value, {"long_name": long_name, "units": units})
        for name, (value, long_name, units) in values.items()
    }
    coords: dict[str, Any] = {dim: list(parts.layers) if by == "layer" else list(parts.labels)}
    if by != "layer":
        coords["layer"] = (dim, np.array([name or "(several)" for name in parts.layers]))
    if by == "parameter":
        coords = {
            "param": np.arange(F.n_params),
            "param_name": ("param", F.layout.parameter_labels()),
            "layer": ("param", F.layout.parameter_layers()),
        }
    method = "exact: diagonal, block Cholesky factors and the diagonal of the damped inverse"
    return make_dataset(variables, coords, operator=F, method=method, settings={"by": by}, damping=damping)
