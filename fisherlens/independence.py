"""What dropping the couplings between blocks costs: energy, direction, step, divergence and conditioning."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fisherlens._progress import progress
from fisherlens.approximations import BlockDiagonal
from fisherlens.errors import ConvergenceWarning, InputError, MemoryBudgetError, NumericalWarning
from fisherlens.fisher import Fisher, check_damping, require_fisher
from fisherlens.linalg.pencil import DENSE_ORDER, dense_extremes, largest_ratio
from fisherlens.partitions import Partition
from fisherlens.partitions import partition as make_partition
from fisherlens.results import make_dataset
from fisherlens.spectrum import WHOLE

if TYPE_CHECKING:
    import xarray as xr

_PER_DAMPING = {
    "natural_gradient_cosine": ("cosine of block-wise and exact natural gradient", "1"),
    "decrease_ratio": ("decrease of the quadratic model, share of the exact step's", "1"),
    "condition_number": ("condition number of the block-preconditioned Fisher", "1"),
    "kl_divergence": ("total correlation between blocks", "nat"),
}
_FIXED = {
    "energy_captured": ("share of ‖F‖² inside the blocks", "1"),
    "energy_noise_floor": ("share expected of random blocks of the same sizes", "1"),
    "num_blocks": ("number of blocks", "1"),
    "largest_block": ("parameters in the largest block", "1"),
    "storage_bytes": ("bytes of all blocks", "B"),
}


def independence(
    F: Fisher,
    partitions: Sequence[Any] = ("layer", "unit", "cw-ngd", "mbf", "diagonal"),
    *,
    damping: float | Sequence[float] = 1e-3,
    progress_bar: bool | None = None,
) -> xr.Dataset:
    r"""Judge segmentations of the parameters: what is lost if their blocks are treated as independent.

    With F_b the block-diagonal part of F, λ the damping, g the mean gradient, p = (F + λ)⁻¹ g and p_b = (F_b + λ)⁻¹ g:

    .. math::
        \text{energy} = \frac{\sum_b \|F_{bb}\|^2}{\|F\|^2}, \quad
        \eta = \frac{(g \cdot p_b)^2}{(p_b^\top (F+\lambda) p_b)(g \cdot p)}, \quad
        \mathrm{KL} = \tfrac12 \Big[\sum_b \log\det(F_{bb}+\lambda) - \log\det(F+\lambda)\Big]

    Parameters
    ----------
    F
        The Fisher operator, with targets (the gradient is needed).
    partitions
        Schemes, :class:`Partition` objects or dicts; within a layer each is intersected with it.
    damping
        λ > 0 in nat, or several, which adds the dim ``damping``. Default 1e-3 (our choice; sensible values scale with λ_max).
    progress_bar
        Show progress; None for "if standard error is a terminal".

    Returns
    -------
    Dataset over ``partition, layer`` (the last layer is ``"all"``, the whole network with the couplings between layers):
    ``energy_captured`` and ``energy_noise_floor`` (random blocks of the same sizes); ``natural_gradient_cosine`` (Euclidean);
    ``decrease_ratio`` η in (0, 1] at the best step length; ``kl_divergence`` in nat, the total correlation between blocks of a Gaussian score with
    covariance F + λ; ``condition_number`` μ_max/μ_min of (F_b+λ)^-½ (F+λ) (F_b+λ)^-½, exact up to an order of 256 and to 0.1 % by Lanczos above;
    ``num_blocks``, ``largest_block``, ``storage_bytes``. A partition whose blocks do not fit the memory budget is NaN, with a warning.

    Notes
    -----
    Formulae: Gaussian KL and Stein loss; Concus and Golub for μ. Cost: one Gram matrix per layer, one Cholesky factor per λ and layer, the
    blocks of each partition, and about 50 products per condition number.

    Examples
    --------
    >>> import fisherlens as fl
    >>> F = fl.Fisher(torch.nn.Linear(3, 2), (torch.eye(3), torch.tensor([0, 1, 0])), likelihood="categorical")
    >>> fl.independence(F, ["layer", "diagonal"])["energy_captured"].sel(partition="layer", layer="all").item()
    1.0
    """
    require_fisher(F)
    single = np.ndim(damping) == 0
    dampings = [check_damping(damping)] if single else [check_damping(lam) for lam in damping]
    if not dampings:
        raise InputError("damping is an empty list; give one number > 0 or several.")
    if isinstance(partitions, (str, Partition, dict)):
        partitions = [partitions]
    if not len(partitions):
        raise InputError("partitions is empty; give at least one scheme, Partition or dict of blocks.")
    schemes = [make_partition(F, p) for p in partitions]
    names = _unique_names(schemes)
    layers = [*F.layout.layer_names, WHOLE]
    F.gradient()  # fails here, not after the work, where targets are missing
    fixed = {name: np.full((len(schemes), len(layers)), np.nan) for name in _FIXED}
    varying = {name: np.full((len(dampings), len(schemes), len(layers)), np.nan) for name in _PER_DAMPING}
    targets = {layer: F if layer == WHOLE else F.restrict(layer) for layer in layers}
    with progress(len(schemes) * len(layers) * len(dampings), desc="independence", enabled=progress_bar) as bar:
        for j, layer in enumerate(layers):
            target = targets[layer]
            norm2, diagonal = target.frobenius_norm() ** 2, target.diagonal().double()
            exact = {lam: (target.natural_gradient(lam), target.solver.log_determinant(lam)) for lam in dampings}
            for i, scheme in enumerate(schemes):
                try:
                    blocks = BlockDiagonal(F, scheme) if layer == WHOLE else BlockDiagonal.part_of(F, scheme, layer)
                except MemoryBudgetError as error:
                    warnings.warn(
                        f"independence: {names[i]!r} on {layer!r} is left out. {error}", NumericalWarning, stacklevel=2
                    )
                    bar.update(len(dampings))
                    continue
                for name, value in _energy(blocks, norm2, diagonal).items():
                    fixed[name][i, j] = value
                for k, lam in enumerate(dampings):
                    for name, value in _judge(target, blocks, lam, *exact[lam]).items():
                        varying[name][k, i, j] = value
                    bar.update(1)
    dims = ("partition", "layer")
    variables: dict[str, Any] = {}
    for name, (long_name, units) in _FIXED.items():
        values = fixed[name]
        whole = name in ("num_blocks", "largest_block", "storage_bytes") and np.isfinite(values).all()
        variables[name] = (dims, values.astype(np.int64) if whole else values, {"long_name": long_name, "units": units})
    for name, (long_name, units) in _PER_DAMPING.items():
        attrs = {"long_name": long_name, "units": units}
        variables[name] = (dims, varying[name][0], attrs) if single else (("damping", *dims), varying[name], attrs)
    coords: dict[str, Any] = {"partition": names, "layer": layers}
    extra = {}
    if single:
        extra["damping"] = dampings[0]
    else:
        coords["damping"] = dampings
    method = "exact in the Gram space; condition numbers by dense or Lanczos generalised eigenvalues"
    settings = {"partitions": names, "damping": dampings}
    return make_dataset(variables, coords, operator=F, method=method, settings=settings, **extra)


def _unique_names(schemes: Sequence[Partition]) -> list[str]:
    """Scheme names; where one occurs twice its options tell the two apart, and after that a number."""
    plain = [scheme.scheme for scheme in schemes]
    names: list[str] = []
    for scheme in schemes:
        name = scheme.scheme
        if plain.count(name) > 1:
            name = " ".join([name, *(str(value) for value in scheme.options.values() if value is not None)])
        taken = sum(known == name or known.startswith(f"{name} #") for known in names)
        names.append(f"{name} #{taken + 1}" if taken else name)
    return names


def _energy(blocks: BlockDiagonal, norm2: float, diagonal: torch.Tensor) -> dict[str, float]:
    sizes = blocks.partition.sizes.astype(float)
    pairs = (sizes * (sizes - 1)).sum() / max(sizes.sum() * (sizes.sum() - 1), 1)
    on_diagonal = diagonal.square().sum().item()
    whole = blocks.partition.num_blocks == 1
    nothing = norm2 == 0
    return {
        "energy_captured": 1.0 if whole or nothing else min(blocks.squared_norm() / norm2, 1.0),
        "energy_noise_floor": 1.0 if nothing else (on_diagonal + (norm2 - on_diagonal) * pairs) / norm2,
        "num_blocks": blocks.partition.num_blocks,
        "largest_block": blocks.partition.largest_block,
        "storage_bytes": blocks.partition.storage_bytes(blocks.dtype),
    }


def _judge(F: Fisher, blocks: BlockDiagonal, damping: float, p: torch.Tensor, log_det: float) -> dict[str, float]:
    if blocks.partition.num_blocks == 1:
        return {"natural_gradient_cosine": 1.0, "decrease_ratio": 1.0, "condition_number": 1.0, "kl_divergence": 0.0}
    g = F.gradient()
    p_b = blocks.solve(g, damping)
    g, p, p_b64 = g.double(), p.double(), p_b.double()
    curvature = (
        F.scores.matmat(p_b[:, None]).double().square().sum() / F.total_weight + damping * p_b64.square().sum()
    ).item()
    lengths = (p.norm() * p_b64.norm()).item()
    best, found = (g @ p).item(), (g @ p_b64).item()
    return {
        "natural_gradient_cosine": (p @ p_b64).item() / lengths if lengths else np.nan,
        "decrease_ratio": min(found**2 / (curvature * best), 1.0) if curvature * best > 0 else np.nan,
        "condition_number": condition_number(F, blocks, damping),
        "kl_divergence": max((blocks.log_determinant(damping) - log_det) / 2, 0.0),
    }


def condition_number(F: Fisher, blocks: Any, damping: float, *, tol: float = 1e-3) -> float:
    """Compute μ_max/μ_min of (F̂+λ)^-½ (F+λ) (F̂+λ)^-½ for a stand-in F̂ with ``@``, ``solve`` and ``dense``.

    Both ends come as largest eigenvalues, of the pencil (F+λ, F̂+λ) and of its inverse, where Lanczos converges fast. Dense up to an
    order of 256. Without convergence the value is NaN, with a ConvergenceWarning.
    """
    if F.n_params <= DENSE_ORDER:
        identity = damping * torch.eye(F.n_params, dtype=torch.float64, device=F.device)
        low, high = dense_extremes(F.dense().double() + identity, blocks.dense().double() + identity)
        return high / low

    def ours(v: torch.Tensor) -> torch.Tensor:
        return (F @ v) + damping * v

    def theirs(v: torch.Tensor) -> torch.Tensor:
        return (blocks @ v) + damping * v

    like = F.parameters
    high, first = largest_ratio(ours, theirs, lambda v: blocks.solve(v, damping), F.n_params, like, tol=tol)
    inverse, second = largest_ratio(theirs, ours, lambda v: F.solve(v, damping), F.n_params, like, tol=tol)
    if not (first and second):
        warnings.warn(
            f"The condition number of {blocks!r} did not converge to {tol:g}; it is NaN. A larger damping makes the problem easier.",
            ConvergenceWarning,
            stacklevel=3,
        )
        return float("nan")
    return high * inverse
