"""EKFAC: the eigenbases of KFAC's factors with the exact second moments in them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fisherlens.approximations.kronecker_sums import kronecker_pairs, rotated_moments
from fisherlens.approximations.layerwise import FORMS, Layerwise, check_choice
from fisherlens.fisher import Fisher
from fisherlens.layout import LayerInfo
from fisherlens.linalg.kronecker import KroneckerPair, RotatedDiagonal


class EKFAC(Layerwise):
    r"""KFAC with its eigenvalues replaced by the best ones for its eigenvectors.

    .. math:: \hat F_l = (Q_G \otimes Q_A)\, \mathrm{diag}(S)\, (Q_G \otimes Q_A)^\top, \qquad
       S = \frac{1}{W} \sum_{nr} \big( Q_G^\top U_{nr} Q_A \big)^2, \qquad U_{nr} = \sum_t g_{nrt} a_{nt}^\top

    with the eigenvectors Q of KFAC's factors G and A. Positions are summed before squaring, so S is the diagonal of the layer's exact block in
    these bases: the trace is that of F, and no other diagonal in them, KFAC's included, is nearer to F.

    Parameters
    ----------
    F
        The Fisher operator, of any kind but the Hessian.
    form
        ``"expand"`` or ``"reduce"``, from which factors the bases come; see :class:`KFAC`.
    others
        What layers without factors get: ``"raise"``, ``"diagonal"`` or ``"block"``; see :class:`KFAC`.

    Attributes
    ----------
    basis_g, basis_a : dict of Tensor
        Q_G ``(d_o, d_o)`` and Q_A ``(d_i, d_i)`` by layer, eigenvectors in columns, largest eigenvalue of the factor first, float64; with groups
        ``(groups, d, d)``. Of a factor with fewer rows than half its order (few examples, a wide layer) only the columns that span these: S is 0 in
        the other directions.
    scales : dict of Tensor
        S ``(d_o, d_i)``, or as many as there are columns.

    Raises
    ------
    UnsupportedModuleError, InputError, MemoryBudgetError: as for :class:`KFAC`.

    Notes
    -----
    Where an eigenvalue of a factor occurs several times, its eigenvectors, and so F̂, are not unique: zeros of A in the reduce form with fewer
    examples than inputs are the usual case.

    Cost: that of KFAC, two eigendecompositions per layer, and one more look at the score rows (where F keeps neither these nor inputs and output
    scores, a pass).

    Source: George et al. 2018 (arXiv 1806.03884); here S comes from the rows of F itself, not from averages of mean gradients.

    Examples
    --------
    >>> import torch, fisherlens as fl
    >>> F = fl.Fisher(torch.nn.Linear(3, 2), (torch.eye(3), torch.tensor([0, 1, 0])), likelihood="categorical")
    >>> E = fl.EKFAC(F)
    >>> abs(E.trace() - F.trace()) < 1e-6 * F.trace(), E.within_block_error() <= fl.KFAC(F).within_block_error()
    (True, True)
    """

    def __init__(self, F: Fisher, *, form: str = "expand", others: str = "raise"):
        self.form = check_choice("form", form, FORMS)
        super().__init__(F, "EKFAC" if form == "expand" else f"EKFAC {form}", others)

    def _build(self, names: list[str]) -> Mapping[str, RotatedDiagonal]:
        pairs = kronecker_pairs(self._fisher, names, self.form)
        if self.form == "reduce":  # rows of F leave the span of sums over positions, so the bases must be complete
            pairs = {name: KroneckerPair(pair.G, pair.A, pair.what) for name, pair in pairs.items()}
        self._flops = {name: pair.eigen_flops for name, pair in pairs.items()}
        bases = {name: pairs.pop(name).eigen for name in names}
        moments = rotated_moments(self._fisher, bases)
        return {name: RotatedDiagonal(bases[name].q_g, bases[name].q_a, moments[name]) for name in names}

    @property
    def basis_g(self) -> dict[str, Tensor]:
        """Q_G of each layer."""
        return self._by_layer(lambda part: part.q_g)

    @property
    def basis_a(self) -> dict[str, Tensor]:
        """Q_A of each layer."""
        return self._by_layer(lambda part: part.q_a)

    @property
    def scales(self) -> dict[str, Tensor]:
        """S of each layer."""
        return self._by_layer(lambda part: part.s)

    def _invert(self, part: RotatedDiagonal, w: Tensor, damping: float) -> Tensor:
        return part.solve(w, damping)

    def _log_det(self, part: RotatedDiagonal, damping: float) -> float:
        return part.log_determinant(damping)

    def _held(self, d_o: int, d: int) -> int:
        return (d_o**2 + d**2 + d_o * d) * 8  # float64

    def _part_bytes(self, _: LayerInfo, part: RotatedDiagonal) -> int:
        return part.nbytes

    def _part_flops(self, layer: LayerInfo, _: RotatedDiagonal) -> float:
        return self._flops[layer.name]

    def _structure_errors(self, names: list[str]) -> dict[str, float]:
        """‖F_l‖² - ΣS²: the diagonal in these bases is a projection of F_l."""
        return {name: self._norm2(name) - self._parts[name].squared_norm() for name in names}
