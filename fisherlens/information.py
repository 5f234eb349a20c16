"""What each parameter, kernel, unit, channel and layer tells: parameter space seen without forming the matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fisherlens import errors
from fisherlens.approximations.pieces import homogeneous_inputs, structure_of
from fisherlens.errors import InputError, MemoryBudgetError, readable_bytes
from fisherlens.fisher import Fisher, check_damping, require_fisher
from fisherlens.linalg.dense import damped_cholesky
from fisherlens.linalg.precision import own_precision
from fisherlens.linalg.probes import MIN_PROBES, Probes, orthonormal_range, split
from fisherlens.partitions import BlockGroup, Partition
from fisherlens.partitions import partition as make_partition
from fisherlens.results import make_dataset
from fisherlens.scores.base import CHUNK_BYTES
from fisherlens.spectrum.functions import effective_dimension
from fisherlens.spectrum.intervals import check_count

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

# What by= may say, with the dim of the result and the scheme of the partition.
_BY = {
    "parameter": ("param", "diagonal"),
    "unit": ("unit", "unit"),
    "kernel": ("kernel", "kernel"),
    "filter": ("kernel", "kernel"),
    "channel": ("channel", "channel"),
    "layer": ("layer", "layer"),
}
# A matrix of this order is factored whatever the budget says (as for spectra).
_ALWAYS = 2000
# Conjugate gradients of the probes: their error in a diagonal entry of λ(F + λ)⁻¹, which lies in (0, 1], is of this size (our choice).
_TOL, _STEPS = 1e-5, 2000
# Up to this tr F/λ the rounding of contractions, ε tr F/λ, stays below 1e-9 (our choice); beyond it triangular solves lose less.
_CONTRACTED = 4e6


@own_precision
def information(
    F: Fisher, by: str = "layer", *, damping: float = 1e-3, num_probes: int = 30, seed: int = 0
) -> xr.Dataset:
    r"""Measure what each part of the parameters tells about the data, without forming F.

    Parameters
    ----------
    F
        The Fisher operator.
    by
        ``"layer"``; ``"unit"``: incoming weights and bias of an output, in a convolution all kernels of an output channel; ``"kernel"`` or ``"filter"``: one
        kernel of a convolution, of an (output, input) pair of channels, other layers by unit; ``"channel"``: all weights from one source channel; or
        ``"parameter"``: every single entry.
    damping
        λ > 0 in nat, for the effective dimension and the standard bound.
    num_probes, seed
        Solves with random vectors that estimate the standard bound where both sides of F are too large to factor; elsewhere unused. Default 30: with the
        range sketched by a third of them, errors of single parameters stay near or below 0.2 of what is estimated, 1 - λ((F + λ)⁻¹)_ii (our choice).

    Returns
    -------
    Dataset over ``layer``, ``unit``, ``kernel``, ``channel`` or ``param``: ``information`` tr F_bb in nat; ``share`` of tr F; ``saliency`` ½ Σ θ_i² F_ii in
    nat, the divergence that removing the part would cause if F were diagonal (LeCun, Denker and Solla 1990 with the Fisher for the Hessian);
    ``effective_dimension`` tr F_bb (F_bb + λ)⁻¹ of the part alone; ``determined`` Σ_i [F (F + λ)⁻¹]_ii, how many directions of the whole live here,
    couplings to all other parts included: its sum over all parts is the effective dimension of F, and of a parameter it is the part of the prior variance
    1/(Nλ) that the data remove; ``std_bound`` √(((F + λ)⁻¹)_ii / N), the Cramér–Rao width with a Gaussian prior of precision Nλ (root mean square over the
    part), in units of the parameter; ``dead``, no information at all; ``num_dead``, parameters of the part with F_ii = 0, on which no output depends: they
    cannot be identified; ``size``; ``value`` of a parameter. Standard errors ``std_bound_sem``, ``determined_sem`` and ``effective_dimension_sem`` are 0
    where exact. Parameters that can be identified only together show in :func:`directions`.

    Raises
    ------
    InputError: an unknown ``by``, a damping that is not finite and positive, too few probes. MemoryBudgetError: a block of which neither side fits.

    Warns
    -----
    ConvergenceWarning: conjugate gradients of the probes ended early.

    Notes
    -----
    Cost: the diagonal; the smaller side of each block, in chunks; one Gram matrix and its Cholesky factor; by layer, and by unit or input of dense
    layers of one position, a product of matrices of its order; else one triangular solve with explicit columns in chunks, (N R)² operations per parameter.
    Above an order of 6,000 on both sides the diagonal of F (F + λ)⁻¹ is estimated: exact on a sketched range, random signs on the rest, each by conjugate
    gradients; then 1/(F_ii + λ) ≤ ((F + λ)⁻¹)_ii ≤ 1/λ holds the bound to its range. Effective dimensions of whole layers of such an order, where their
    Gram matrices exceed the budget, are estimated as by :func:`effective_dimension`.

    Examples
    --------
    >>> import fisherlens as fl
    >>> F = fl.Fisher(torch.nn.Linear(3, 2), (torch.eye(3), torch.tensor([0, 1, 0])), likelihood="categorical")
    >>> float(fl.information(F, "unit")["share"].sum().round(6))
    1.0
    """
    require_fisher(F)
    if not isinstance(by, str) or by not in _BY:
        raise InputError(errors.UNKNOWN_NAME.format(what="option by=", name=by, hint=errors.nearest(str(by), _BY)))
    damping = check_damping(damping)
    check_count("num_probes", num_probes, 2 * MIN_PROBES, "the solves that estimate a diagonal")
    check_count("seed", seed, 0, "of the probes")
    dim, parts = _BY[by][0], make_partition(F, _BY[by][1])
    block = parts.block_of.to(F.device)
    sizes = torch.from_numpy(np.array(parts.sizes)).to(F.device, torch.float64)

    def summed(values: Tensor) -> Tensor:
        """Sums over the parts of what each parameter has, ``(P,)`` or ``(P, K)``."""
        out = torch.zeros(parts.num_blocks, *values.shape[1:], dtype=torch.float64, device=F.device)
        return out.index_add_(0, block, values.double())

    diagonal = F.diagonal().double().clamp(min=0)
    told, trace = summed(diagonal), diagonal.sum()
    determined, free, determined_sem, words = _determined(F, parts, damping, diagonal, summed, num_probes, seed)
    # what is possible: λ/(F_ii + λ) ≤ λ((F + λ)⁻¹)_ii ≤ 1
    determined = determined.clamp(min=0).minimum(summed(diagonal / (diagonal + damping)))
    free = free.minimum(sizes).maximum(summed(damping / (diagonal + damping)))
    width = (free / sizes / (damping * F.n_data)).sqrt()
    width_sem = determined_sem / sizes / (2 * damping * F.n_data) / width
    dimension, dimension_sem, more = _dimensions(F, parts, damping, diagonal, seed)
    values: dict[str, tuple[Any, str, str]] = {
        "information": (told, "Fisher information", "nat"),
        "share": (told / trace if trace > 0 else torch.zeros_like(told), "share of the trace of F", "1"),
        "saliency": (summed(F.parameters.double().square() * diagonal) / 2, "saliency ½ Σ θ² F", "nat"),
        "effective_dimension": (dimension, "effective dimension", "1"),
        "effective_dimension_sem": (dimension_sem, "standard error of the effective dimension", "1"),
        "determined": (determined, "directions of the whole determined here", "1"),
        "determined_sem": (determined_sem, "standard error of the directions determined here", "1"),
        "std_bound": (width, "Cramér–Rao width of a parameter", "1"),
        "std_bound_sem": (width_sem, "standard error of the Cramér–Rao width", "1"),
        "dead": (told == 0, "tells nothing", "1"),
        "num_dead": (summed(diagonal == 0).long(), "parameters that tell nothing", "1"),
        "size": (np.array(parts.sizes), "parameters", "1"),
    }
    if by == "parameter":
        values["value"] = (F.parameters, "value of the parameter", "1")
    variables = {
        name: (dim, value, {"long_name": long_name, "units": units})
        for name, (value, long_name, units) in values.items()
    }
    return make_dataset(
        variables,
        _coords(F, dim, parts),
        operator=F,
        method=f"{words}; {more}",
        settings={"by": by, "num_probes": num_probes, "probe_seed": seed},
        damping=damping,
    )


@own_precision
def information_table(
    dataset: xr.Dataset, key: str = "information", num: int = 20, *, ascending: bool = False
) -> pd.DataFrame:
    """List the parts that tell most, or least, as a sorted table.

    Parameters
    ----------
    dataset
        What :func:`information` returns; of several steps or stages select one first.
    key
        The variable to sort by, such as ``"share"``, ``"saliency"`` or ``"std_bound"``.
    num
        Rows, at most; entries that are NaN come last.
    ascending
        The smallest first.

    Returns
    -------
    pandas DataFrame: the variables as columns, labels as the index, ``layer`` as first column where it is known.

    Raises
    ------
    TypeError: not a Dataset. InputError: an unknown key, or one that runs over more than one dim.

    Examples
    --------
    >>> import fisherlens as fl
    >>> F = fl.Fisher(torch.nn.Linear(3, 2), (torch.eye(3), torch.tensor([0, 1, 0])), likelihood="categorical")
    >>> table = fl.information_table(fl.information(F, "unit"), "share", 1)
    >>> list(table.columns[:3])
    ['layer', 'information', 'share']
    """
    import xarray as xr

    if not isinstance(dataset, xr.Dataset):
        raise TypeError(f"information_table takes the Dataset of fl.information; got {type(dataset).__name__}.")
    if key not in dataset:
        hint = errors.nearest(str(key), [str(name) for name in dataset.data_vars])
        raise InputError(errors.UNKNOWN_NAME.format(what="variable key=", name=key, hint=hint))
    check_count("num", num, 1, "the rows of the table")
    dataset = dataset.squeeze(drop=True)
    dims = dataset[key].dims
    if len(dims) != 1:
        raise InputError(
            f"information_table sorts along one dim; {key!r} runs over {dims}. Select one entry of the others first: dataset.isel(step=-1), say."
        )
    dim = dims[0]
    kept = [name for name, array in dataset.data_vars.items() if array.dims == dims]
    label = "param_name" if "param_name" in dataset.coords else dim
    columns: dict[str, Any] = (
        {} if dim == "layer" or "layer" not in dataset.coords else {"layer": dataset["layer"].values}
    )
    columns |= {str(name): dataset[name].values for name in kept}
    import pandas as pd

    frame = pd.DataFrame(columns, index=pd.Index(dataset[label].values, name=str(label)))
    return frame.sort_values(key, ascending=ascending, kind="stable", na_position="last").head(num)


def _coords(F: Fisher, dim: str, parts: Partition) -> dict[str, Any]:
    """Names of the parts, their layers, and of kernels the channels they join."""
    if dim == "layer":
        return {"layer": list(parts.layers)}
    if dim == "param":
        return {
            "param": np.arange(F.n_params),
            "param_name": ("param", F.layout.parameter_labels()),
            "layer": ("param", F.layout.parameter_layers()),
        }
    coords: dict[str, Any] = {dim: list(parts.labels)}
    coords["layer"] = (dim, np.array([name or "(several)" for name in parts.layers]))
    if dim == "kernel":
        first = parts.flat.numpy()[np.cumsum(parts.sizes) - parts.sizes]
        outputs, inputs = np.full((2, len(first)), -1)
        for layer in F.layout.layers:
            if layer.kind != "conv" or layer.weight is None or len(layer.weight.shape) < 3:
                continue
            d_o, d_i = layer.weight.shape[:2]
            here = (first >= layer.weight.start) & (first < layer.weight.stop)
            place = (first[here] - layer.weight.start) // (layer.weight.numel // (d_o * d_i))
            outputs[here] = place // d_i
            inputs[here] = (
                place % d_i + outputs[here] // max(1, d_o // layer.groups) * d_i
            )  # of group j: its own channels
        coords["out_channel"], coords["in_channel"] = (dim, outputs), (dim, inputs)
    return coords


# --- the diagonal of F (F + λ)⁻¹ -------------------------------------------------------------------------------------


def _determined(
    F: Fisher,
    parts: Partition,
    damping: float,
    diagonal: Tensor,
    summed: Callable[[Tensor], Tensor],
    num_probes: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, str]:
    """Sums over the parts of the diagonals of F (F + λ)⁻¹ and of λ(F + λ)⁻¹, their standard error, and how they were found."""
    if F.solver.direct:
        total, free = _exact(F, parts, damping, diagonal, summed)
        return total, free, torch.zeros_like(total), "exact: diagonal of the damped inverse"
    jacobi = _Jacobi(diagonal)

    def kept(v: Tensor) -> Tensor:
        v = v.to(F.dtype)
        solved = F.solve(v, damping, preconditioner=jacobi, tol=_TOL, max_steps=_STEPS)
        return v.double() - damping * solved.double()

    probes = Probes(F.n_params, F.dtype, F.device, seed)
    sketch, k = split(num_probes)
    known, q = 0.0, None
    if sketch:
        q = orthonormal_range(kept, probes.gaussian(min(sketch, F.n_params)))
        image = kept(q)
        known = summed((q * (2 * image - q @ (q.T @ image))).sum(1))
    z = probes.signs(k).double()
    y = kept(z if q is None else z - q @ (q.T @ z))
    if q is not None:
        y -= q @ (q.T @ y)
    samples = summed((z * y).where((diagonal > 0)[:, None], 0))
    words = (
        f"estimated: diagonal of the damped inverse, {2 * sketch + k} solves, {sketch} vectors sketched and {k} probes"
    )
    total = known + samples.mean(1)
    return total, summed(torch.ones_like(diagonal)) - total, samples.std(1) / k**0.5, words


def _exact(
    F: Fisher, parts: Partition, damping: float, diagonal: Tensor, summed: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The same two sums, exactly: on the row side ⟨(K/W + λ)⁻¹, K_b/W⟩ where K_b is a contraction, else from the columns of U."""
    solver = F.solver
    if solver.dense_side:
        inverse = damping * solver.inverse_diagonal(damping)
        return summed((1 - inverse).where(diagonal > 0, 0)), summed(inverse)
    factor = solver.factor(damping)
    kernel = torch.cholesky_inverse(factor) / F.total_weight if diagonal.sum() < _CONTRACTED * damping else None
    total = torch.zeros(parts.num_blocks, dtype=torch.float64, device=F.device)
    block = parts.block_of.to(F.device)
    for layer, scores in zip(F.layout.layers, F.scores.layers, strict=True):
        groups = [group for group in parts.groups if group.layer == layer.name]
        found = [None if kernel is None else _contracted(F, group, kernel) for group in groups]
        if all(values is not None for values in found):
            for group, values in zip(groups, found, strict=True):
                total[group.block_ids.to(F.device)] = values
            continue
        for chunk in scores.column_chunks():
            half = torch.linalg.solve_triangular(factor, scores.columns(chunk).double(), upper=False)
            total.index_add_(0, block[layer.start + chunk], half.square().sum(0) / F.total_weight)
    return total, summed(torch.ones_like(diagonal)) - total


def _contracted(F: Fisher, group: BlockGroup, kernel: Tensor) -> Tensor | None:
    """Σ kernel ∘ K_b of every block b of a group, ``(B,)``, where no column of U is needed for it: whole layers, units and inputs of dense layers; else None."""
    layer, scores = F.layout.layer(group.layer), F.scores[group.layer]
    if group.size == layer.size:
        return (kernel * F.scores.layer_gram(layer.name)).sum()[None]
    structure = structure_of(scores, (group.index - layer.start).to(F.device))
    if structure is None or scores.t != 1:
        return None
    a, g = homogeneous_inputs(scores)[:, 0].double(), scores.g[:, :, 0].flatten(0, 1).double()  # (n, d), (n r, d_o)
    n, r = scores.n, scores.r
    if structure == "units":  # K_o = (a·a') g_o g_o'
        spread = (kernel.view(n, r, n, r) * (a @ a.T)[:, None, :, None]).view(n * r, n * r)
        return (g * (spread @ g)).sum(0)
    small = (kernel * (g @ g.T)).view(n, r, n, r).sum((1, 3))  # K_i = a_i a_i' (g·g')
    return (a * (small @ a)).sum(0)


class _Jacobi:
    """The diagonal as a preconditioner."""

    def __init__(self, diagonal: Tensor):
        self._diagonal = diagonal

    def solve(self, v: Tensor, damping: float) -> Tensor:
        return v / (self._diagonal + damping).to(v.dtype)[:, None]


# --- effective dimension of each block -------------------------------------------------------------------------------


def _dimensions(F: Fisher, parts: Partition, damping: float, diagonal: Tensor, seed: int) -> tuple[Tensor, Tensor, str]:
    """Tr F_bb (F_bb + λ)⁻¹ of every block, with no more than a chunk of blocks in memory, and its standard error."""
    out = torch.zeros(parts.num_blocks, dtype=torch.float64, device=F.device)
    sem, estimated = torch.zeros_like(out), []
    for group in parts.groups:
        ids = group.block_ids.to(F.device)
        if group.size == 1:
            own = diagonal[group.index[:, 0].to(F.device)]
            out[ids] = own / (own + damping)
            continue
        order = min(group.size, F.scores.rows)
        if order > _ALWAYS and 24 * order**2 > F.memory:
            name = _whole_layer(F, group)
            found = effective_dimension(F.restrict(name), damping, seed=seed)
            out[ids], sem[ids] = float(found), float(found.coords["sem"]) if "sem" in found.coords else 0.0
            estimated.append(name)
            continue
        start = 0
        for matrices in _smaller_sides(F, group):
            out[ids[start : start + len(matrices)]] = _kept_trace(matrices, damping)
            start += len(matrices)
    words = "exact: Cholesky factors of the blocks"
    if estimated:
        words += f"; effective dimension estimated by Lanczos quadrature for {', '.join(estimated)}"
    return out, sem, words


def _whole_layer(F: Fisher, group: BlockGroup) -> str:
    layer = F.layout.layer(group.layer)
    if group.size == layer.size:
        return layer.name
    order = min(group.size, F.scores.rows)
    raise MemoryBudgetError(
        f"A block of {group.size} parameters of layer {layer.name!r} has {order} on its smaller side, and its Cholesky factor would take "
        f"{readable_bytes(24 * order**2)} with workspace, over the budget of {readable_bytes(F.memory)}. Use by='layer' or 'parameter', fewer examples, "
        "kind='mc', or raise memory=."
    )


def _smaller_sides(F: Fisher, group: BlockGroup) -> Any:
    """Blocks of one layer, or the Gram matrices of their rows where these are fewer, ``(B, m, m)`` in chunks."""
    layer, scores = F.layout.layer(group.layer), F.scores[group.layer]
    index = (group.index - layer.start).to(F.device)
    rows = scores.block_row_count(index)
    if group.size > rows and group.size == layer.size:
        yield F.scores.layer_gram(layer.name)[None] / F.total_weight
        return
    by_rows = group.size > rows
    each = 24 * (rows * (group.size + rows) if by_rows else group.size**2)
    # where each chunk is a pass over the data, chunks are as large as the budget allows
    room = max(CHUNK_BYTES, F.memory // 4) if F.plan.streamed or F.plan.linearised else CHUNK_BYTES
    for chunk in index.split(max(1, int(room // each))):
        if by_rows:
            x = scores.block_rows(chunk).double()
            yield torch.bmm(x, x.mT) / F.total_weight
        else:
            yield scores.moments(chunk) / F.total_weight


def _kept_trace(matrices: Tensor, damping: float) -> Tensor:
    """Tr M (M + λ)⁻¹ = n - λ tr (M + λ)⁻¹ of a batch ``(B, n, n)``; zero eigenvalues add nothing."""
    n = matrices.shape[-1]
    factor = damped_cholesky(matrices, damping, f"A block of order {n}")
    identity = torch.eye(n, dtype=factor.dtype, device=factor.device).expand(factor.shape)
    half = torch.linalg.solve_triangular(factor, identity, upper=False)
    return (n - damping * half.square().sum((-2, -1))).clamp(min=0)  # rounding of a zero block
