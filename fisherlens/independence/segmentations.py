"""What dropping the couplings between blocks costs, for segmentations of the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fisherlens.approximations import BlockDiagonal
from fisherlens.approximations.shelf import Shelf
from fisherlens.errors import InputError, MemoryBudgetError
from fisherlens.fisher import Fisher, require_fisher
from fisherlens.independence.judge import energy
from fisherlens.independence.options import check_grid, check_options
from fisherlens.independence.standin import Parts, StandIn, inside_layers, on_layers
from fisherlens.independence.table import Table
from fisherlens.independence.target import Target
from fisherlens.linalg.pencil import DENSE_ORDER
from fisherlens.linalg.precision import own_precision
from fisherlens.partitions import Partition
from fisherlens.partitions import partition as make_partition
from fisherlens.spectrum import WHOLE

if TYPE_CHECKING:
    import xarray as xr

FIXED = {
    "energy_captured": ("share of ‖F‖² inside the blocks", "1"),
    "energy_captured_sem": ("standard error of that share over probes", "1"),
    "energy_noise_floor": ("share expected of random blocks of the same sizes", "1"),
    "energy_noise_floor_sem": ("standard error of the expected share over probes", "1"),
    "num_blocks": ("number of blocks", "1"),
    "largest_block": ("parameters in the largest block", "1"),
    "storage_bytes": ("bytes of all blocks", "B"),
}


@own_precision
def independence(
    F: Fisher,
    partitions: Sequence[Any] = ("layer", "unit", "cw-ngd", "mbf", "diagonal"),
    *,
    damping: float | Sequence[float] = 1e-3,
    method: str = "auto",
    num_probes: int = 10,
    num_matvecs: int = 80,
    seed: int = 0,
    tol: float = 1e-2,
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
    method
        ``"auto"``: exact wherever the Gram matrix or F can be factored within the memory budget (order up to 6,000), else estimated with
        standard errors. ``"exact"`` or ``"estimate"``: always the one or the other.
    num_probes, num_matvecs, seed
        Of estimates: random probes, Lanczos steps of each, and the seed of their generator.
    tol
        Relative accuracy of condition numbers above an order of 256, as estimated from the last Lanczos steps of each end. Default 1 %.
    progress_bar
        Show progress; None for "if standard error is a terminal".

    Returns
    -------
    Dataset over ``partition, layer`` (the last layer is ``"all"``, the whole network with the couplings between layers):

    - ``energy_captured`` and ``energy_noise_floor`` (random blocks of the same sizes);
    - ``natural_gradient_cosine`` (Euclidean); ``metric_cosine``, in the inner product of F + λ; ``decrease_ratio`` η in (0, 1] at the best
      step length, which is its square;
    - ``kl_divergence`` in nat, the total correlation between blocks of a Gaussian score with covariance F + λ;
    - ``mu_max``, ``mu_min`` and ``condition_number`` μ_max/μ_min of M = (F_b+λ)^-½ (F+λ) (F_b+λ)^-½: a block step of rate r is stable if
      r < 2/μ_max; ``predicted_steps`` per factor e at the best fixed rate;
    - ``num_blocks``, ``largest_block``, ``storage_bytes``.

    Variables that end in ``_sem`` are standard errors over probes, 0 where the value is exact.

    Raises
    ------
    InputError: a damping that is no number > 0, no partitions, one of another model, options out of range, no targets.
    MemoryBudgetError: ``method="exact"`` where the Gram matrix does not fit.

    Warns
    -----
    NumericalWarning: a partition whose blocks do not fit the memory budget; it is NaN. ConvergenceWarning: a condition number that did
    not converge is NaN; or Ctrl-C, after which the result holds what was finished, NaN elsewhere, and an attribute ``interrupted``.

    Notes
    -----
    Formulae: Gaussian KL and Stein loss; Concus and Golub for μ. Cost: one Gram matrix per layer, one Cholesky factor per λ and layer, the
    blocks of each partition (those that several have in common once), and 4 to 8 products for each end of M in a layer and in the whole
    network, which all partitions share in blocks. The blocks of a dense layer's inputs are factored one after another and not
    kept, so that μ_max comes from products with them (LOBPCG); whole layers are treated among their Gram matrices alone. Estimates: ‖F‖²
    and log det by one deflated Lanczos quadrature per layer, p by conjugate gradients, both ends of M by Lanczos.

    Examples
    --------
    >>> import torch, fisherlens as fl
    >>> F = fl.Fisher(torch.nn.Linear(3, 2), (torch.eye(3), torch.tensor([0, 1, 0])), likelihood="categorical")
    >>> fl.independence(F, ["layer", "diagonal"])["energy_captured"].sel(partition="layer", layer="all").item()
    1.0
    """
    require_fisher(F)
    dampings, single = check_grid(damping)
    options = check_options(method, num_probes, num_matvecs, seed, tol)
    if isinstance(partitions, (str, Partition, dict)):
        partitions = [partitions]
    if not isinstance(partitions, Sequence):
        raise TypeError(
            f"partitions must be a sequence of schemes, Partition objects and dicts of blocks; got {type(partitions).__name__}. "
            "Leave it out for the usual ones."
        )
    if not len(partitions):
        raise InputError("partitions is empty; give at least one scheme, Partition or dict of blocks.")
    schemes = [make_partition(F, p) for p in partitions]
    F.gradient()  # fails here, not after the work, where targets are missing
    table = Table(F, "partition", _unique_names(schemes), dampings, single, FIXED, options, progress_bar)
    table.fill(_Segments(F, schemes, table))
    return table.dataset(partitions=table.names)


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


class _Segments:
    """Builds the blocks of every partition, layer by layer, and has them judged; blocks that occur twice are built once.

    What fits the memory budget beside the scores is judged together, and kept for the whole network.
    """

    def __init__(self, F: Fisher, schemes: Sequence[Partition], table: Table):
        self.F, self.schemes, self.table = F, schemes, table
        self.room = max(F.memory - F.plan.nbytes, F.memory / 4)
        self._kept: dict[tuple[int, str], BlockDiagonal] = {}
        self._kept_bytes = 0

    def __call__(self, target: Target, place: int) -> None:
        batch: dict[int, StandIn] = {}
        known = _Known()
        shelf = Shelf(target.diagonal.to(self.F.dtype))
        held = 0
        for row, scheme in enumerate(self.schemes):
            own = scheme if target.name == WHOLE else scheme.restrict(target.name)
            matrix = known.find(own)
            if matrix is None:
                try:
                    matrix = known.add(own, self._matrix(own, row, target.name, shelf))
                except MemoryBudgetError as error:
                    where = f"{self.table.names[row]!r} on {target.name!r}"
                    self.table.note(f"independence: {where} is left out. {error}")
                    self.table.advance(len(self.table.dampings))
                    continue
                held += _bytes(matrix)
            self._keep(row, target.name, matrix)
            by_layers = target.name == WHOLE and on_layers(self.F, own)
            batch[row] = StandIn(self.table.names[row], matrix, own.sizes, exact_blocks=True, by_layers=by_layers)
            self.table.put(row, place, energy(target, own.sizes, matrix.squared_norm()))
            facts = {"num_blocks": own.num_blocks, "largest_block": own.largest_block}
            self.table.put(row, place, facts | {"storage_bytes": own.storage_bytes(self.F.dtype)})
            if held > self.room:
                self.table.judge(target, place, batch)
                batch, known, held = {}, _Known(), 0
                shelf = Shelf(shelf.diagonal)
        self.table.judge(target, place, batch)

    def _matrix(self, own: Partition, row: int, layer: str, shelf: Shelf) -> BlockDiagonal | Parts:
        names = self.F.layout.layer_names
        if layer == WHOLE and inside_layers(own) and all((row, name) in self._kept for name in names):
            return Parts(self.F, {name: self._kept[row, name] for name in names})
        whole = layer == WHOLE
        matrix = BlockDiagonal(self.F, own) if whole else BlockDiagonal.part_of(self.F, own, layer, shelf)
        if matrix.n_params > DENSE_ORDER:  # Lanczos will ask for many solves
            matrix.prefer_inverses()
        return matrix

    def _keep(self, row: int, layer: str, matrix: Any) -> None:
        if layer == WHOLE or not inside_layers(self.schemes[row]):
            return
        new = 0 if any(matrix is other for other in self._kept.values()) else _bytes(matrix)
        if self._kept_bytes + new <= self.room:
            self._kept[row, layer] = matrix
            self._kept_bytes += new


def _bytes(matrix: Any) -> int:
    return 0 if isinstance(matrix, Parts) else matrix.held_bytes


class _Known:
    """Matrices of partitions, found again for one with the same blocks in the same order."""

    def __init__(self) -> None:
        self._found: list[tuple[Partition, Any]] = []

    def find(self, own: Partition) -> Any:
        for other, matrix in self._found:
            if np.array_equal(own.sizes, other.sizes) and torch.equal(own.flat, other.flat):
                return matrix
        return None

    def add(self, own: Partition, matrix: Any) -> Any:
        self._found.append((own, matrix))
        return matrix
