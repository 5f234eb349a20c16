"""KFAC: each layer's block as the Kronecker product of two small matrices."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fisherlens.approximations.kronecker_sums import best_pairs, inner_products, kronecker_pairs
from fisherlens.approximations.layerwise import FORMS, Layerwise, check_choice
from fisherlens.errors import InputError
from fisherlens.fisher import Fisher, check_damping
from fisherlens.fisher.damped import Vector
from fisherlens.layout import LayerInfo
from fisherlens.linalg.kronecker import KroneckerPair

DAMPINGS, FACTORS = ("exact", "factored"), ("kfac", "optimal")


class KFAC(Layerwise):
    r"""Kronecker-factored approximation of the Fisher, layer by layer.

    .. math:: \hat F_l = G \otimes A, \qquad G = \frac{1}{W} \sum_{nrt} g_{nrt} g_{nrt}^\top, \qquad
       A = \frac{\sum_n w_n \sum_t a_{nt} a_{nt}^\top}{\sum_n w_n T_n}

    with the inputs a of the layer (patches of a convolution; a 1 appended for the bias), the output scores g of the score columns r, which
    carry :math:`\sqrt{w_n}`, and T positions per example: the *expand* form. The *reduce* form takes one position instead, the mean of a
    and the sum of g over t. G ⊗ A acts on the row-major matrix [weight, bias] of the layer: :math:`\hat F_l V = G V A`.

    Parameters
    ----------
    F
        The Fisher operator, of any kind but the Hessian.
    form
        ``"expand"`` or ``"reduce"``, how positions are treated (Eschenhagen et al. 2023).
    factors
        ``"kfac"``, the formulae above; or ``"optimal"``, the G and A with the smallest ‖F_l - G ⊗ A‖, by alternating least squares from
        KFAC's: what a Kronecker product could do at best. It takes a pass over the score rows per half-step, some ten to a hundred.
    damping
        ``"exact"``: solves are (G ⊗ A + λI)⁻¹, by two eigendecompositions. ``"factored"``: (G + γ_g I)⁻¹ V (A + γ_a I)⁻¹ with
        γ_a = π√λ, γ_g = √λ/π, π² = (tr A/d_i)/(tr G/d_o), as in the paper; cheaper, and another matrix.
    others
        What layers without factors get (normalisation, embeddings, attention, parameters of the root, tied weights): ``"raise"`` an error, their
        exact ``"diagonal"``, or their exact ``"block"``. One call for a ResNet or a transformer: ``KFAC(F, others="diagonal")``.

    Attributes
    ----------
    factor_g, factor_a : dict of Tensor
        G ``(d_o, d_o)`` and A ``(d_i, d_i)`` by layer; ``(groups, d, d)`` for a convolution with groups, which has a pair per group.

    Raises
    ------
    UnsupportedModuleError: a layer without factors. InputError: an unknown option; model or data that changed since F was built (where F keeps
    explicit rows, the factors take another pass). MemoryBudgetError: factors over the budget of F.

    Notes
    -----
    Exact where g does not depend on the example (a deep linear network with Gaussian likelihood, one position, no reuse) and for one
    example with one position; elsewhere it takes a and g for independent, and even the trace differs. A module that is called several times
    has its uses concatenated along the positions, in both forms: all uses share one G and one A.

    Weights count as repetitions, in G and in A: an example of weight 2 is that example given twice.

    Cost: nothing for layers that F keeps as factors, else one more forward and R backward passes; 2 N T (d² + R d_o²) FLOPs per layer.

    Sources: Martens and Grosse 2015 (arXiv 1503.05671), factored damping section 6.3; Grosse and Martens 2016 (arXiv 1602.01407),
    convolutions; Eschenhagen et al. 2023 (arXiv 2311.00636), expand and reduce; Van Loan and Pitsianis 1993, the best Kronecker product.

    Examples
    --------
    >>> import torch, fisherlens as fl
    >>> F = fl.Fisher(torch.nn.Linear(3, 2), (torch.eye(3), torch.tensor([0, 1, 0])), likelihood="categorical")
    >>> K = fl.KFAC(F)
    >>> K.factor_g["(root)"].shape, K.factor_a["(root)"].shape
    (torch.Size([2, 2]), torch.Size([4, 4]))
    >>> K.solve(F.gradient(), damping=1e-3).shape
    torch.Size([8])
    """

    def __init__(
        self, F: Fisher, *, form: str = "expand", factors: str = "kfac", damping: str = "exact", others: str = "raise"
    ):
        self.form = check_choice("form", form, FORMS)
        self.factors = check_choice("value of factors", factors, FACTORS)
        if not isinstance(damping, str):
            raise InputError(
                f"damping of KFAC is how solves are damped, 'exact' or 'factored'; got {damping!r}. The amount λ is given to each solve: "
                "KFAC(F).solve(v, damping=1e-3)."
            )
        self.damping = check_choice("way of damping", damping, DAMPINGS)
        named = [word for word, usual in ((form, "expand"), (factors, "kfac"), (damping, "exact")) if word != usual]
        super().__init__(F, " ".join(["KFAC", *named]), others)

    def _build(self, names: list[str]) -> Mapping[str, KroneckerPair]:
        pairs = kronecker_pairs(self._fisher, names, self.form)
        return best_pairs(self._fisher, pairs) if self.factors == "optimal" else pairs

    @property
    def factor_g(self) -> dict[str, Tensor]:
        """G of each layer."""
        return self._by_layer(lambda pair: pair.G)

    @property
    def factor_a(self) -> dict[str, Tensor]:
        """A of each layer, with the 1 of the bias last."""
        return self._by_layer(lambda pair: pair.A)

    def damped_product(self, v: Vector, damping: float) -> Vector:
        """What :meth:`solve` inverts, times v: F̂ + λI, or (G + γ_g) ⊗ (A + γ_a) layer by layer for factored damping."""
        lam = check_damping(damping)

        def act(flat: Tensor) -> Tensor:
            return self._apply(
                flat,
                lambda pair, w: pair.damped_product(w, lam, self.damping),
                lambda part, own: part._product(own) + lam * own,
            )

        return self._fisher._answer(v, act)

    def _invert(self, part: KroneckerPair, w: Tensor, damping: float) -> Tensor:
        return part.solve(w, damping, self.damping)

    def _log_det(self, part: KroneckerPair, damping: float) -> float:
        return part.log_determinant(damping, self.damping)

    def _held(self, d_o: int, d: int) -> int:
        return (d_o**2 + d**2) * self.dtype.itemsize

    def _part_flops(self, _: LayerInfo, part: KroneckerPair) -> float:
        return part.cholesky_flops if self.damping == "factored" else part.eigen_flops

    def _structure_errors(self, names: list[str]) -> dict[str, float]:
        """‖F_l‖² - 2 ⟨F_l, G ⊗ A⟩ + ‖G‖²‖A‖², nothing of order P_l × P_l formed for the last two."""
        pairs = {name: self._parts[name] for name in names}
        crossed = inner_products(self._fisher, pairs)
        return {name: self._norm2(name) - 2 * crossed[name] + pairs[name].squared_norm() for name in names}
