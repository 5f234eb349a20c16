"""All eigenvalues of a symmetric operator, exact, as a whole or block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fisherlens.approximations import BlockDiagonal
from fisherlens.errors import InputError
from fisherlens.fisher import Fisher
from fisherlens.linalg.dense import eigenpairs, eigenvalues, noise_floor
from fisherlens.linalg.precision import own_precision
from fisherlens.partitions import Partition
from fisherlens.partitions import partition as make_partition
from fisherlens.results import make_dataset
from fisherlens.spectrum.blocks import BlockTable, block_spectra, sub_spectra
from fisherlens.spectrum.bootstrap import bootstrap_spectrum, check_replicates
from fisherlens.spectrum.operators import Symmetric, as_symmetric
from fisherlens.spectrum.smaller import is_dense_side, lift_rows, smaller_matrix

if TYPE_CHECKING:
    import xarray as xr

WHOLE = "all"
_WORDS = {
    "eigenvalue": ("eigenvalue of F", "nat"),
    "residual_norm": ("", "nat"),
    "above_noise": ("eigenvalue above the noise floor", "1"),
    "noise_floor": ("noise floor n ε λ_max", "nat"),
    "trace": ("trace of F", "nat"),
    "rank_bound": ("upper bound of the rank", "1"),
    "num_above_noise": ("eigenvalues above the noise floor", "1"),
    "eigenvector": ("eigenvector of F", "1"),
}


@own_precision
def spectrum(
    F: Any, *, by: Any = None, vectors: bool = False, bootstrap: int = 0, confidence: float = 0.95, seed: int = 0
) -> xr.Dataset:
    r"""Compute the complete non-zero spectrum of F, exactly.

    .. math:: F v_i = \lambda_i v_i, \qquad \lambda_1 \ge \lambda_2 \ge \dots

    The Gram matrix U Uᵀ/W has the same non-zero eigenvalues as F = UᵀU/W; the smaller of the two is decomposed, in float64.
    The remaining P - len(rank) eigenvalues are exactly zero. Of a Hessian (``kind="hessian"``) the matrix itself is decomposed, from P
    products; its negative eigenvalues are kept, and noise is judged by \|λ\|.

    Parameters
    ----------
    F
        A Fisher of any kind, a Hessian, an approximation, or an :class:`Operator`. A :class:`BlockDiagonal` is decomposed block by block;
        what offers nothing but products is made a matrix, up to 5000 parameters.
    by
        None for the whole matrix; ``"layer"`` for each layer's diagonal block, with the whole as ``"all"``; or any other scheme of
        :func:`partition`, a :class:`Partition`, or a dict label → indices, for the diagonal block of each of its blocks.
    vectors
        Also return the eigenvectors, ``(rank, param)``; two products per vector, never a P × P matrix.
    bootstrap
        Replicates of a bootstrap over the examples of a Fisher, 0 for none, else at least 20; 200 are customary.
    confidence, seed
        Of the bootstrap's intervals, and of its generator.

    Returns
    -------
    Dataset with ``eigenvalue (rank)`` in nat, descending, ``above_noise (rank)``, ``residual_norm (rank)`` and, on request,
    ``eigenvector (rank, param)``; with ``by=`` a dim ``layer`` or ``block`` in front, padded with NaN. ``rank`` has length
    min(P, order of the Gram). ``noise_floor`` is n ε λ_max, n the order of the decomposed matrix and ε of the dtype in which its
    entries were accumulated: eigenvalues below it are kept and flagged. ``residual_norm`` is ‖F v - λ v‖ recomputed from the
    operator with ``vectors=True``; without vectors it is the floor, which bounds the error of every eigenvalue.
    Also ``trace``, ``rank_bound`` and ``num_above_noise``, and the attribute ``precision``, which says how far the values can be trusted.
    With ``bootstrap`` also ``eigenvalue_low``, ``eigenvalue_high``, ``eigenvalue_sem``, the same for ``trace``, and ``..._label_share``: the
    part of that variance that comes from labels drawn for kind mc (NaN for one draw per example, which cannot tell).

    Raises
    ------
    MemoryBudgetError: neither matrix fits the memory budget of F; says what would. InputError: an operator that is not symmetric, an
    unknown scheme, or ``by=`` for an operator without named parameters. NonFiniteError: NaN or infinity in the matrix.

    Notes
    -----
    Cost: one Gram matrix and (4/3) n³ floating-point operations. Blocks of one size are decomposed in one batch, each through the smaller
    of its parameters and its score rows. A bootstrap decomposes one matrix more per replicate, of the 63 % of the rows that it draws, and
    for several label draws another; no pass over the data. Its intervals are for what infinitely many examples would give. They are
    indicative: nominal 95 % hold 90 to 95 % for the trace and the five largest eigenvalues from N = 20 on, less for eigenvalues that
    few examples determine (22 to 90 %, see "Choosing an estimator"), and are NaN where a replicate has no such eigenvalue.

    Examples
    --------
    >>> import fisherlens as fl
    >>> F = fl.Fisher(torch.nn.Linear(3, 2), (torch.eye(3), torch.tensor([0, 1, 0])), likelihood="categorical")
    >>> fl.spectrum(F)["eigenvalue"].sizes
    Frozen({'rank': 3})
    >>> fl.spectrum(F, by="unit")["eigenvalue"].shape
    (2, 3)
    """
    view = as_symmetric(F)
    check_replicates(bootstrap)
    parts: Partition | None = None
    if by is None:
        columns, spent, method = _whole(view, vectors)
        lead: str | None = None
        names: Any = None
    else:
        parts = _partition_of(F, by)
        by_layer = isinstance(by, str) and by == "layer"
        lead = "layer" if by_layer else "block"
        names = [*F.layout.layer_names, WHOLE] if by_layer else list(parts.labels)
        columns, spent, method = _by_layer(view, parts, vectors) if by_layer else _by_block(view, parts, vectors)
    coords: dict[str, Any] = {"rank": np.arange(columns["eigenvalue"].shape[-1])}
    if lead is not None:
        coords[lead] = names
    if lead == "block" and parts is not None:
        coords["layer"] = ("block", np.array([name or "(several)" for name in parts.layers]))
        coords["size"] = ("block", np.array(parts.sizes))
    if vectors:
        coords |= label_coords(F, view.n)
    variables = {}
    for name, (long_name, units) in _WORDS.items():
        if name not in columns:
            continue
        dims = ["rank"] if name in ("eigenvalue", "residual_norm", "above_noise") else []
        dims = ["rank", "param"] if name == "eigenvector" else dims
        if name == "residual_norm":
            long_name = "residual norm of the eigenpair" if vectors else "error bound of the eigenvalue"
        values = columns[name][0] if lead is None else columns[name]
        variables[name] = ((*([lead] if lead else []), *dims), values, {"long_name": long_name, "units": units})
    if bootstrap:
        blocks = None if parts is None else [*parts.blocks, *([None] if lead == "layer" else [])]
        values = variables["eigenvalue"][1]
        told = bootstrap_spectrum(F, values, bootstrap, seed, confidence, blocks)
        variables |= {name: ((*([lead] if lead else []), *dims), *rest) for name, (dims, *rest) in told.items()}
    scheme = by if by is None or isinstance(by, str) else {"scheme": parts.scheme, **parts.options}
    again = {"bootstrap": bootstrap, "confidence": confidence, "bootstrap_seed": seed} if bootstrap else {}
    return make_dataset(
        variables,
        coords,
        operator=F,
        method=f"exact: eigenvalues of the {method} in float64",
        num_matvecs=spent,
        settings={"by": scheme, "vectors": vectors, **again},
        n_params=view.n,
        precision=_precision(view, columns),
    )


def label_coords(F: Any, n: int) -> dict[str, Any]:
    """Coordinates of the dim ``param``: names and layers, where the operator has them."""
    coords: dict[str, Any] = {"param": np.arange(n)}
    layout = getattr(F, "layout", None)
    if layout is not None:
        coords["param_name"] = ("param", layout.parameter_labels())
        coords["param_layer"] = ("param", layout.parameter_layers())
    return coords


def _precision(view: Symmetric, columns: dict[str, Any]) -> str:
    """How far the eigenvalues can be trusted, and what would help."""
    dtype = str(view.dtype).removeprefix("torch.")
    known, total = int(columns["num_above_noise"].sum()), int(np.isfinite(columns["eigenvalue"]).sum())
    worst = float(np.max(columns["noise_floor"], initial=0.0))
    text = f"entries in {dtype}: absolute error up to the noise floor (at most {worst:.1e} nat); {known} of {total} eigenvalues stand above it"
    if view.dtype == torch.float64:
        return text
    return f"{text}. For smaller ones build the operator in float64: model.double() and inputs in float64"


def _partition_of(F: Any, by: Any) -> Partition:
    if getattr(F, "layout", None) is None:
        raise InputError(
            f"by= cuts named parameters into blocks, but {type(F).__name__} has no layout. Leave by= out, or make one operator per block."
        )
    return make_partition(F, by)


# --- the whole -------------------------------------------------------------------------------------------------------


def _whole(view: Symmetric, vectors: bool) -> tuple[dict[str, Any], int | None, str]:
    """Columns for one operator (with a leading axis of one), products spent, and what was decomposed."""
    if isinstance(view.source, BlockDiagonal) and not vectors:
        blocks = view.source
        order = np.arange(blocks.partition.num_blocks)
        return _merged(block_spectra(blocks, vectors=False), [order], view), 0, "blocks"
    F, found = view.source, smaller_matrix(view)
    order = len(found.matrix)
    table = BlockTable(1, order, view.n, vectors=vectors)
    eps, what = torch.finfo(view.dtype).eps, f"The {found.words} of F"
    bound, spent = min(view.rank_bound, view.n), found.spent
    if vectors:
        values, basis = eigenpairs(found.matrix, what)
    else:
        values = eigenvalues(found.matrix, what)
    trace = F.trace() if isinstance(F, Fisher) else found.matrix.trace().item()
    above = table.fill(np.array([0]), values.cpu().numpy()[None], eps, bound, view.psd, np.array([trace]))
    if vectors:
        floor = noise_floor(values, order, view.dtype)
        v = basis.to(view.dtype) if found.dense else _right_vectors(view, values, basis, floor)
        residual = torch.linalg.vector_norm(view.product(v) - v * values.to(view.dtype), dim=0).double()
        spent += order if found.dense else 2 * order
        places = np.arange(view.n)[None]
        table.fill_vectors(np.array([0]), places, v.double()[None], residual[None], above)
    counted = spent or (0 if isinstance(F, Fisher) and F.kind != "hessian" else None)
    return table.columns, counted, found.words


def _right_vectors(view: Symmetric, values: Tensor, basis: Tensor, floor: float) -> Tensor:
    """v_i = Uᵀ q_i / √k_i for K q_i = k_i q_i, then one QR against rounding."""
    v = lift_rows(view, basis.to(view.dtype))
    v = v / torch.linalg.vector_norm(v, dim=0).clamp(min=torch.finfo(view.dtype).tiny)
    good = int((values > floor).sum())
    orthogonal, triangle = torch.linalg.qr(v[:, :good])
    v = v.clone()
    v[:, :good] = orthogonal * triangle.diagonal().sign()
    return v


# --- blocks ----------------------------------------------------------------------------------------------------------


def _by_layer(view: Symmetric, parts: Partition, vectors: bool) -> tuple[dict[str, Any], int | None, str]:
    """Every layer's block, and the whole behind them."""
    F = view.source
    if not isinstance(F, Fisher):
        each, spent, method = _by_block(view, parts, vectors)
        whole, more, _ = _whole(view, vectors)
        return _stacked([each, whole]), spent if more == spent else (spent or 0) + (more or 0), method
    found = []
    for name, layer in zip(F.layout.layer_names, F.layout.layers, strict=True):
        columns, spent, _ = _whole(as_symmetric(F.restrict(name)), vectors)
        if vectors:
            wide = np.full((1, columns["eigenvalue"].shape[1], view.n), np.nan)
            wide[..., layer.start : layer.stop] = columns["eigenvector"]
            columns["eigenvector"] = wide
        found.append((columns, spent))
    found.append(_whole(view, vectors)[:2])
    total = [spent for _, spent in found if spent is not None]
    side = "dense matrix" if is_dense_side(view) else "Gram matrix"
    return _stacked([columns for columns, _ in found]), sum(total) if total else None, side


def _by_block(view: Symmetric, parts: Partition, vectors: bool) -> tuple[dict[str, Any], int | None, str]:
    """Every block of a partition."""
    F = view.source
    if isinstance(F, Fisher) and F.kind != "hessian":
        return block_spectra(BlockDiagonal(F, parts), vectors=vectors), 0, "blocks, the smaller side of each,"
    if isinstance(F, BlockDiagonal) and not vectors and F.partition.refines(parts):
        first = torch.stack([block[0] for block in F.partition.blocks])
        owner = parts.block_of[first].numpy()
        members = [np.flatnonzero(owner == block) for block in range(parts.num_blocks)]
        return _merged(block_spectra(F, vectors=False), members, view), 0, "blocks, the smaller side of each,"
    found = smaller_matrix(view)
    eps, memory = torch.finfo(view.dtype).eps, getattr(F, "memory", 2 * 2**30)
    columns = sub_spectra(found.matrix, parts.blocks, eps, psd=view.psd, vectors=vectors, memory=memory)
    return columns, found.spent, "blocks of the dense matrix"


def _merged(columns: dict[str, Any], members: list[np.ndarray], view: Symmetric) -> dict[str, Any]:
    """Join the eigenvalues of several blocks into those of their direct sum, for each list of members."""
    counts = np.isfinite(columns["eigenvalue"]).sum(1)
    length = max((int(counts[own].sum()) for own in members), default=0)
    table = BlockTable(len(members), length, view.n, vectors=False, memory=np.inf)
    eps = torch.finfo(view.dtype).eps
    for block, own in enumerate(members):
        values = columns["eigenvalue"][own]
        values = np.sort(values[np.isfinite(values)])[::-1]
        bound, trace = int(columns["rank_bound"][own].sum()), columns["trace"][own].sum()
        ids = np.array([block])
        table.fill(ids, values[None], eps, bound, True, np.array([trace]))
        # what was decomposed are the blocks, so the order in the floor is the largest of theirs
        floor = counts[own].max(initial=0) * eps * np.abs(values).max(initial=0.0)
        above = values > floor
        row = table.columns
        row["noise_floor"][block], row["num_above_noise"][block] = floor, above.sum()
        row["above_noise"][block, : len(values)], row["residual_norm"][block, : len(values)] = above, floor
    return table.columns


def _stacked(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Put blocks of different lengths one after the other, padded with NaN (False in flags)."""
    length = max(part["eigenvalue"].shape[1] for part in parts)
    out = {}
    for name in parts[0]:
        pieces = []
        for part in parts:
            column = part[name]
            if column.ndim > 1:
                wide = [(0, 0), (0, length - column.shape[1]), *[(0, 0)] * (column.ndim - 2)]
                column = np.pad(column, wide, constant_values=False if column.dtype == bool else np.nan)
            pieces.append(column)
        out[name] = np.concatenate(pieces)
    return out
