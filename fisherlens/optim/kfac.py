"""KFAC: layer blocks as Kronecker products of two small matrices, one of inputs and one of output scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fisherlens.layout import LayerInfo
from fisherlens.likelihoods import Likelihood
from fisherlens.linalg.kronecker import factored_damping
from fisherlens.optim.averages import Averages
from fisherlens.optim.checks import choice
from fisherlens.optim.factors import damped_direction, factor_basis, factor_sums, matrix_of, matrix_shape, write_matrix
from fisherlens.optim.groups import Groups
from fisherlens.optim.layerwise import LayerWise, accumulate
from fisherlens.optim.tap import Pass

DAMPINGS, FORMS = ("exact", "factored"), ("expand", "reduce")


@dataclass(eq=False)
class KroneckerAverages(Averages):
    """Averages of the two factors of B blocks, and what was last made of them.

    ``right`` and ``left`` are the eigenvectors of A and G, whose eigenvalues are ``a`` and ``g``; or the damped inverses.
    """

    layer: str
    A: Tensor  # (B, d_i, d_i)
    G: Tensor  # (B, d_o, d_o)
    right: Tensor  # (B, d_i, d_i)
    left: Tensor  # (B, d_o, d_o)
    a: Tensor  # (B, d_i)
    g: Tensor  # (B, d_o)
    steps: int = 0
    weight: float = 0.0
    inversions: int = 0


class KFAC(LayerWise):
    r"""Kronecker-factored approximate curvature (KFAC) of Martens and Grosse.

    The block of a layer with gradients u_n = Σ_t g_nt a_ntᵀ of example n over T positions t (a: inputs, with a 1 for the bias; g: scores
    at the output) is G ⊗ A:

    .. math::
        A \leftarrow \rho A + (1 - \rho) \tfrac{1}{M} \sum_{nt} a_{nt} a_{nt}^\top, \qquad
        G \leftarrow \rho G + (1 - \rho) \tfrac{1}{M T} \sum_{nt} g_{nt} g_{nt}^\top,

    both divided by 1 - ρ^t when used. With Ḡ = [∂W, ∂b] the mean gradient, the direction is

    .. math::
        Q_G \frac{Q_G^\top \bar G Q_A}{d_G d_A^\top + \lambda} Q_A^\top \quad\text{(exact)} \qquad\text{or}\qquad
        (G + \gamma_G I)^{-1} \bar G (A + \gamma_A I)^{-1} \quad\text{(factored)},

    with the eigenvectors Q and eigenvalues d of the factors, γ_A = π √λ, γ_G = √λ / π, π² = (tr A / d_i) / (tr G / d_o).
    A convolution in groups has one pair per group; a module called twice has its calls side by side as positions.
    Parameters without factors (norm layers, embeddings, …): ḡ / (1 + λ), announced once.

    Parameters
    ----------
    model
        The network itself. Trains all parameters that require grad, of one device and dtype, float32 or float64.
    lr, damping
        Step length and λ, both > 0.
    likelihood
        Name or fisherlens likelihood; draws sampled labels. With true labels the loss says all.
    ema
        ρ of both factors, in [0, 1); 0 averages nothing.
    momentum, weight_decay
        Of the directions, in [0, 1); decoupled decay, θ is first multiplied by 1 - lr * weight_decay.
    labels, seed
        ``"sampled"``: labels drawn from the model, so that the factors are those of the Fisher, as in the source. ``"true"``: the loss's.
    damping_form
        ``"exact"``: λ is added to G ⊗ A itself; eigenvectors, 9 d³ operations per factor. ``"factored"``: each factor is
        damped apart; Cholesky factors, d³ operations.
    form
        ``"expand"``: every position is a row. ``"reduce"``: one row per example, the mean of its a and the sum of its g.
    reduction
        How the loss combines examples, ``"mean"`` or ``"sum"`` (the steps are the same).
    refresh, inverse_refresh
        Steps from one update of the factors, and of what is made of them, to the next. A changed damping reaches the factored
        form at the next one.
    kl_clip
        κ: the direction of Linear and convolution layers is multiplied by ν = min(1, √(κ / (lr² ⟨u, ḡ⟩))). None clips nothing; 1e-2 is TENGraD's.
    param_groups, preset
        Options of single parameters, see :mod:`fisherlens.optim`. ``"paper"`` sets ``damping_form="factored"``; ours inverts F̂ + λI itself.

    Attributes
    ----------
    diagnostics : dict
        Counts: ``steps``, ``refreshes`` of the factors, ``retries`` (factors inverted once more, with 10, 100, …, 10⁶ γ, because
        rounding had cost them their definiteness) and ``fallbacks`` (factors for which that failed too: their inverse is I / (10⁶ γ)).

    Raises
    ------
    InputError: an option out of range, nothing to train, ``step()`` without a backward pass. NonFiniteError, from ``step()``: NaN or
    infinity in a gradient (named) or in the statistics; parameters and state stay as they were.

    Notes
    -----
    Source: Martens and Grosse (2015), arXiv 1503.05671; averages, periods and labels of github.com/google-deepmind/kfac-jax. Its λ and
    lr are adapted or tuned; ours are those of the KFAC baselines of github.com/saeedsoori/k-fac, which has periods of 20 and 100. Cost per
    layer: 2 M T (d_i² + d_o²) operations for the factors, 2 P (d_i + d_o) per step, twice that in the exact form; 2 (d_i² + d_o²) floats.

    Examples
    --------
    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> x, y = torch.randn(32, 4), torch.arange(32) % 3
    >>> opt = KFAC(model, lr=0.05)
    >>> for _ in range(20):
    ...     loss = nn.functional.cross_entropy(model(x), y)
    ...     opt.zero_grad()
    ...     loss.backward()
    ...     opt.step()
    >>> bool(loss < 1.0), opt.diagnostics["refreshes"]
    (True, 20)
    """

    meanings = ("damping_form", "form")

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        damping: float = 3e-2,
        *,
        likelihood: str | Likelihood = "categorical",
        ema: float = 0.95,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        labels: str = "sampled",
        damping_form: str = "exact",
        form: str = "expand",
        reduction: str = "mean",
        refresh: int = 1,
        inverse_refresh: int = 5,
        kl_clip: float | None = 1e-2,
        seed: int = 0,
        param_groups: Groups = None,
        preset: str | None = None,
    ):
        self.damping_form = choice("damping_form", damping_form if preset is None else "factored", DAMPINGS)
        self.form = choice("form", form, FORMS)
        super().__init__(model, locals())

    def _new(self, layer: LayerInfo, like: Tensor) -> KroneckerAverages:
        B, d_o, d_i = matrix_shape(layer)
        shapes = (B, d_i, d_i), (B, d_o, d_o), (B, d_i, d_i), (B, d_o, d_o), (B, d_i), (B, d_o)
        return KroneckerAverages(layer.name, *(like.new_zeros(shape) for shape in shapes))

    def _absorb(self, one: Pass, examples: int) -> None:
        for layer, calls in self._layers(one):
            dtype = self._parameters[0].dtype
            accumulate(self._sums, layer, factor_sums(layer, calls, dtype, self._workspace, self.form))

    def _precondition(self, gradient: Tensor, active: set[str], scale: float, out: Tensor) -> None:
        fresh = {name: (s.A / s.examples, s.G * scale) for name, s in self._sums.items() if name in active}
        self._require_finite_parts(fresh.items())  # before anything is changed
        known = []
        for layer in self.covered:
            if layer.name in active:
                pair = self._record_of(layer)
                if layer.name in fresh:
                    A, G = fresh[layer.name]
                    pair.update(self._options(layer.name)["ema"], A=A, G=G)
                if pair.steps:  # else the rule for parameters without statistics stands
                    known.append((layer, pair))
        self._invert([pair for _, pair in known if self._inverse_due or not pair.inversions])
        for layer, pair in known:
            write_matrix(layer, self._direction_of(pair, matrix_of(layer, gradient)), out)

    def _invert(self, pairs: Sequence[KroneckerAverages]) -> None:
        """Make of the factors what the directions need."""
        jobs = []
        for pair in pairs:
            options = self._options(pair.layer)
            A, G = (pair.corrected(side) for side in ("A", "G"))
            pair.inversions += 1
            if self.damping_form == "exact":
                pair.a, pair.right = factor_basis(A, "A", pair.layer)
                pair.g, pair.left = factor_basis(G, "G", pair.layer)
            else:
                gamma_a, gamma_g = factored_damping(A, G, options["damping"])
                jobs += [(A, gamma_a), (G, gamma_g)]
        if jobs:
            found = iter(self._inverted(jobs))
            for pair in pairs:
                pair.right, pair.left = next(found), next(found)

    def _direction_of(self, pair: KroneckerAverages, gradient: Tensor) -> Tensor:
        if self.damping_form == "factored":
            return pair.left @ gradient @ pair.right
        return damped_direction(pair.left, pair.right, pair.g, pair.a, gradient, self._options(pair.layer)["damping"])
