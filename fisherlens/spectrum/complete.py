"""All eigenvalues of the Fisher, exact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fisherlens import errors
from fisherlens.errors import InputError, MemoryBudgetError, readable_bytes
from fisherlens.fisher import Fisher, require_fisher
from fisherlens.linalg.dense import eigenpairs, eigenvalues, noise_floor
from fisherlens.results import make_dataset

if TYPE_CHECKING:
    import xarray as xr

WHOLE = "all"


def spectrum(F: Fisher, *, by: str | None = None, vectors: bool = False) -> xr.Dataset:
    r"""Compute the complete non-zero spectrum of F, exactly.

    .. math:: F v_i = \lambda_i v_i, \qquad \lambda_1 \ge \lambda_2 \ge \dots

    The Gram matrix U Uᵀ/W has the same non-zero eigenvalues as F = UᵀU/W; the smaller of the two is decomposed, in float64.
    The remaining P - len(rank) eigenvalues are exactly zero. Of a Hessian (``kind="hessian"``) the matrix itself is decomposed, from P
    products; its negative eigenvalues are kept, and noise is judged by \|λ\|.

    Parameters
    ----------
    F
        The Fisher operator, of any kind.
    by
        None for the whole matrix, or ``"layer"`` for each layer's diagonal block, with the whole as ``"all"``.
    vectors
        Also return the eigenvectors, ``(rank, param)``; two products per vector, never a P × P matrix.

    Returns
    -------
    Dataset with ``eigenvalue (rank)`` in nat, descending, ``above_noise (rank)``, ``residual_norm (rank)`` and, on request,
    ``eigenvector (rank, param)``; with ``by="layer"`` a dim ``layer`` in front, padded with NaN. ``rank`` has length
    min(P, order of the Gram). ``noise_floor`` is n ε λ_max, n the order of the decomposed matrix and ε of the dtype in which its
    entries were accumulated: eigenvalues below it are kept and flagged. ``residual_norm`` is ‖F v - λ v‖ recomputed from the
    operator with ``vectors=True``; without vectors it is the floor, which bounds the error of every eigenvalue.
    Also ``trace``, ``rank_bound`` and ``num_above_noise``.

    Raises
    ------
    MemoryBudgetError: neither matrix fits the memory budget of F; says what would.

    Notes
    -----
    Cost: one Gram matrix and (4/3) n³ floating-point operations.

    Examples
    --------
    >>> import fisherlens as fl
    >>> F = fl.Fisher(torch.nn.Linear(3, 2), (torch.eye(3), torch.tensor([0, 1, 0])), likelihood="categorical")
    >>> fl.spectrum(F)["eigenvalue"].sizes
    Frozen({'rank': 3})
    """
    require_fisher(F, rows=False)
    if by not in (None, "layer"):
        raise InputError(
            errors.UNKNOWN_NAME.format(
                what="option by=", name=by, hint=errors.nearest(str(by), ["layer"]) + " None is the whole."
            )
        )
    whole = slice(0, F.n_params)
    if by is None:
        parts, names, places = [_decompose(F, vectors)], None, [whole]
    else:
        names = [*F.layout.layer_names, WHOLE]
        everything = _decompose(F, vectors)
        parts = [*(_decompose(F.restrict(name), vectors) for name in F.layout.layer_names), everything]
        places = [*(slice(layer.start, layer.stop) for layer in F.layout.layers), whole]
    length = max(len(part["eigenvalue"]) for part in parts)
    words = {
        "eigenvalue": {"long_name": "eigenvalue of F", "units": "nat"},
        "residual_norm": {
            "long_name": "residual norm of the eigenpair" if vectors else "error bound of the eigenvalue",
            "units": "nat",
        },
        "above_noise": {"long_name": "eigenvalue above the noise floor", "units": "1"},
        "noise_floor": {"long_name": "noise floor n ε λ_max", "units": "nat"},
        "trace": {"long_name": "trace of F", "units": "nat"},
        "rank_bound": {"long_name": "upper bound of the rank", "units": "1"},
        "num_above_noise": {"long_name": "eigenvalues above the noise floor", "units": "1"},
    }
    lead = () if names is None else ("layer",)
    variables: dict[str, Any] = {}
    for name, attrs in words.items():
        values = [part[name] for part in parts]
        if np.ndim(values[0]) == 1:
            fill = False if name == "above_noise" else np.nan
            padded = np.stack([np.pad(v, (0, length - len(v)), constant_values=fill) for v in values])
            variables[name] = ((*lead, "rank"), padded[0] if names is None else padded, attrs)
        else:
            variables[name] = (lead, values[0] if names is None else np.array(values), attrs)
    coords: dict[str, Any] = {"rank": np.arange(length)}
    if names is not None:
        coords["layer"] = names
    if vectors:
        full = np.full((len(parts), length, F.n_params), np.nan)
        for row, part, place in zip(full, parts, places, strict=True):
            row[: len(part["eigenvalue"]), place] = part["eigenvector"]
        variables["eigenvector"] = (
            (*lead, "rank", "param"),
            full[0] if names is None else full,
            {"long_name": "eigenvector of F", "units": "1"},
        )
        coords["param"] = np.arange(F.n_params)
        coords["param_name"] = ("param", F.layout.parameter_labels())
        coords["param_layer"] = ("param", F.layout.parameter_layers())
    method = "exact: eigenvalues of the " + ("dense matrix" if _dense_side(F) else "Gram matrix") + " in float64"
    return make_dataset(
        variables,
        coords,
        operator=F,
        method=method,
        num_matvecs=2 * length if vectors else None if F.kind == "hessian" else 0,
        settings={"by": by, "vectors": vectors},
    )


def _dense_side(F: Fisher) -> bool:
    """Whether the matrix itself is decomposed: it is the smaller, or a Hessian, which has no Gram matrix."""
    return F.kind == "hessian" or F.n_params <= F.n_rows


def _decompose(F: Fisher, vectors: bool) -> dict[str, Any]:
    dense = _dense_side(F)
    order = F.n_params if dense else F.n_rows
    _require_memory(F, order)
    if F.kind == "hessian":
        matrix = F.matrix(what="The complete spectrum")
    else:
        matrix = (F.scores.dense() if dense else F.scores.gram()).double() / F.total_weight
    what = f"The {'dense' if dense else 'Gram'} matrix of F"
    found: dict[str, Any] = {}
    if vectors:
        values, basis = eigenpairs(matrix, what)
        floor = noise_floor(values, order, F.dtype)
        v = basis.to(F.dtype) if dense else _right_vectors(F, values, basis, floor)
        residual = torch.linalg.vector_norm((F @ v) - v * values.to(F.dtype), dim=0).double()
        noise = _noise(F, values, floor)
        residual[noise] = floor
        v[:, noise] = float("nan")  # the direction of a zero eigenvalue is arbitrary
        found["eigenvector"] = v.T.cpu().numpy()
    else:
        values = eigenvalues(matrix, what)
        floor = noise_floor(values, order, F.dtype)
        residual = torch.full_like(values, floor)
    above = ~_noise(F, values, floor)
    return found | {
        "eigenvalue": values.cpu().numpy(),
        "residual_norm": residual.cpu().numpy(),
        "above_noise": above.cpu().numpy(),
        "noise_floor": floor,
        "trace": F.trace(),
        "rank_bound": F.rank_bound,
        "num_above_noise": int(above.sum()),
    }


def _noise(F: Fisher, values: Tensor, floor: float) -> Tensor:
    """Which eigenvalues cannot be told from zero; negative ones are rounding in a Fisher, and real in a Hessian."""
    return (values.abs() if F.kind == "hessian" else values) <= floor


def _right_vectors(F: Fisher, values: Tensor, basis: Tensor, floor: float) -> Tensor:
    """v_i = Uᵀ q_i / √k_i for K q_i = k_i q_i, then one QR against rounding."""
    q = torch.zeros(F.scores.rows, basis.shape[1], dtype=F.dtype, device=F.device)
    rows = slice(None) if F.scores.kept is None else F.scores.kept
    q[rows] = basis.to(F.dtype)
    v = F.scores.rmatmat(q)
    v = v / torch.linalg.vector_norm(v, dim=0).clamp(min=torch.finfo(F.dtype).tiny)
    good = int((values > floor).sum())
    orthogonal, triangle = torch.linalg.qr(v[:, :good])
    v = v.clone()
    v[:, :good] = orthogonal * triangle.diagonal().sign()
    return v


def _require_memory(F: Fisher, order: int) -> None:
    needed = 3 * order**2 * 8  # the matrix, its symmetric copy and the solver's workspace
    if needed > F.memory and order > 2000 and F.kind == "hessian":
        raise MemoryBudgetError(
            f"The complete spectrum of a Hessian needs the matrix itself, {order} x {order}, {readable_bytes(needed)} with workspace, over the budget of "
            f"{readable_bytes(F.memory)}. Look at one layer with F.restrict(name), or raise memory=."
        )
    if needed > F.memory and order > 2000:
        fit = int((F.memory / 24) ** 0.5)
        raise MemoryBudgetError(
            f"The complete spectrum needs the smaller of {F.n_params} x {F.n_params} (dense) and {F.n_rows} x {F.n_rows} (Gram), {readable_bytes(needed)} with "
            f"workspace, over the budget of {readable_bytes(F.memory)}. An order of {fit} would fit: about {max(1, fit // F.n_columns)} examples, or "
            "kind='mc' with one column each, or raise memory=."
        )
