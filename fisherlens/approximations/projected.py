"""KFAC with factors that are free on a small basis and flat outside it, as projected Kronecker optimizers keep them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fisherlens.approximations.kronecker import DAMPINGS
from fisherlens.approximations.kronecker_sums import inner_products, kronecker_factors
from fisherlens.approximations.layerwise import EIGH, FORMS, Layerwise, check_choice
from fisherlens.errors import InputError
from fisherlens.fisher import Fisher, check_damping
from fisherlens.fisher.checks import check_seed
from fisherlens.fisher.damped import Vector
from fisherlens.linalg.kronecker import KroneckerPair
from fisherlens.linalg.spiked import SpikedPair, spiked

BASES = ("power", "exact")


class ProjectedKFAC(Layerwise):
    r"""KFAC with each factor kept on a basis of dimension r, and one level outside it.

    .. math:: \hat F_l = \hat G \otimes \hat A, \qquad \hat A = P (P^\top A P) P^\top + s (I - P P^\top), \qquad
       s = \frac{\mathrm{tr} A - \mathrm{tr} P^\top A P}{d - r}

    and Ĝ likewise, with the factors A and G of :class:`KFAC`. Traces are preserved. Where r ≥ d a factor is itself, so that with r at least
    every width this is KFAC.

    This is the matrix that projected Kronecker natural gradient with recursive inverses converges to where its statistics stand still; the
    optimizer sees it through sketches and an exponential average.

    Parameters
    ----------
    F
        The Fisher operator, of any kind but the Hessian.
    rank
        r, at least 1, for both factors. Default 32 (our choice, as for the optimizer).
    basis
        ``"power"``: P from a random start by ``power_steps`` products with the factor, orthonormalised after each; or ``"exact"``: the leading
        eigenvectors, which power steps approach.
    power_steps
        Products with the factor, at least 1; the optimizer takes one more each time that it renews its basis.
    form
        ``"expand"`` or ``"reduce"``, as for :class:`KFAC`.
    damping
        ``"exact"``: solves are (Ĝ ⊗ Â + λI)⁻¹. ``"factored"``: (Ĝ + γ_g I)⁻¹ V (Â + γ_a I)⁻¹, as for :class:`KFAC`.
    others
        What layers without factors get: ``"raise"``, ``"diagonal"`` or ``"block"``, as for :class:`KFAC`.
    seed
        Of an own generator of the random start; ``"exact"`` does not use it.

    Attributes
    ----------
    basis_g, basis_a : dict of Tensor
        Bases ``(d, r)`` by layer, float64, turned so that PᵀAP is diagonal, largest first; with groups ``(groups, d, r)``.
    level_g, level_a : dict of Tensor
        s of each factor, ``(groups,)``; of a factor without anything outside its basis the largest eigenvalue, which is not used.

    Raises
    ------
    InputError: a rank or number of steps below 1, an unknown option. UnsupportedModuleError, MemoryBudgetError: as for :class:`KFAC`.

    Notes
    -----
    Cost: the factors of KFAC, formed for a moment; then 2 d² r per power step. Kept are d r + r + 1 numbers per factor, and a solve is
    6 P (r_A + r_G) operations per vector, without a decomposition of order d.

    No published text of the method is at hand: basis, level and damping are our reading and our choice.

    Examples
    --------
    >>> import torch, fisherlens as fl
    >>> F = fl.Fisher(torch.nn.Linear(3, 2), (torch.eye(3), torch.tensor([0, 1, 0])), likelihood="categorical")
    >>> K = fl.ProjectedKFAC(F, rank=2)
    >>> K.basis_a["(root)"].shape, bool(abs(K.trace() - fl.KFAC(F).trace()) < 1e-6)
    (torch.Size([4, 2]), True)
    """

    def __init__(
        self,
        F: Fisher,
        rank: int = 32,
        *,
        basis: str = "power",
        power_steps: int = 1,
        form: str = "expand",
        damping: str = "exact",
        others: str = "raise",
        seed: int = 0,
    ):
        self.rank, self.power_steps = _at_least_one("rank", rank), _at_least_one("power_steps", power_steps)
        self.basis, self.form = check_choice("basis", basis, BASES), check_choice("form", form, FORMS)
        if not isinstance(damping, str):
            raise InputError(
                f"damping of ProjectedKFAC is how solves are damped, 'exact' or 'factored'; got {damping!r}. The amount λ is given to each solve: "
                "ProjectedKFAC(F).solve(v, damping=1e-3)."
            )
        self.damping, self.seed = check_choice("way of damping", damping, DAMPINGS), check_seed(seed)
        named = [word for word, usual in ((form, "expand"), (damping, "exact"), (basis, "power")) if word != usual]
        super().__init__(F, " ".join(["projected KFAC", str(self.rank), *named]), others)

    def _build(self, names: list[str]) -> Mapping[str, SpikedPair]:
        found, parts = kronecker_factors(self._fisher, names, self.form), {}
        generator = torch.Generator().manual_seed(self.seed)
        steps = self.power_steps if self.basis == "power" else None
        for name in names:
            made = [
                spiked(matrix, self.rank, power_steps=steps, generator=generator, what=f"Layer {name!r}: factor {word}")
                for word, matrix in zip("GA", found.pop(name), strict=True)
            ]
            parts[name] = SpikedPair(*made)
        return parts

    @property
    def basis_g(self) -> dict[str, Tensor]:
        """Basis of G of each layer."""
        return self._by_layer(lambda pair: pair.G.basis)

    @property
    def basis_a(self) -> dict[str, Tensor]:
        """Basis of A of each layer."""
        return self._by_layer(lambda pair: pair.A.basis)

    @property
    def level_g(self) -> dict[str, Tensor]:
        """Level of G outside its basis, of each layer and group."""
        return {name: pair.G.level for name, pair in self._parts.items() if isinstance(pair, SpikedPair)}

    @property
    def level_a(self) -> dict[str, Tensor]:
        """Level of A outside its basis, of each layer and group."""
        return {name: pair.A.level for name, pair in self._parts.items() if isinstance(pair, SpikedPair)}

    def damped_product(self, v: Vector, damping: float) -> Vector:
        """What :meth:`solve` inverts, times v: F̂ + λI, or (Ĝ + γ_g) ⊗ (Â + γ_a) layer by layer for factored damping."""
        lam = check_damping(damping)

        def act(flat: Tensor) -> Tensor:
            return self._apply(
                flat,
                lambda pair, w: pair.damped_product(w, lam, self.damping),
                lambda part, own: part._product(own) + lam * own,
            )

        return self._fisher._answer(v, act)

    def _invert(self, part: SpikedPair, w: Tensor, damping: float) -> Tensor:
        return part.solve(w, damping, self.damping)

    def _log_det(self, part: SpikedPair, damping: float) -> float:
        return part.log_determinant(damping, self.damping)

    def _held(self, d_o: int, d: int) -> int:
        return sum(size * min(self.rank, size) + min(self.rank, size) + 1 for size in (d_o, d)) * 8  # float64

    def _prepare_flops(self, d_o: int, d: int) -> float:
        """What a renewed statistic takes: the small matrix PᵀAP of each factor, decomposed. A solve itself divides by its values."""
        return sum(EIGH * min(self.rank, size) ** 3 for size in (d_o, d))

    def _structure_errors(self, names: list[str]) -> dict[str, float]:
        """‖F_l‖² - 2 ⟨F_l, Ĝ ⊗ Â⟩ + ‖Ĝ‖²‖Â‖², with the factors formed for a moment."""
        errors = {}
        pairs = {name: self._parts[name] for name in names}
        dense = {
            name: KroneckerPair(pair.G.dense().to(self.dtype), pair.A.dense().to(self.dtype), f"Layer {name!r}")
            for name, pair in pairs.items()
        }
        crossed = inner_products(self._fisher, dense)
        for name, pair in pairs.items():
            errors[name] = self._norm2(name) - 2 * crossed[name] + pair.squared_norm()
        return errors


def _at_least_one(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int; got {value!r} of type {type(value).__name__}.")
    if value < 1:
        raise InputError(
            f"{name} must be at least 1; got {value}. The basis of a factor needs a direction, and a product to find it."
        )
    return int(value)
