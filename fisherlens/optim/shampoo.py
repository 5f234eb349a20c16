"""Shampoo: roots of the contractions of the mean gradient, one per axis of a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fisherlens.likelihoods import Likelihood
from fisherlens.linalg.dense import eigenpairs
from fisherlens.optim.checks import choice, whole
from fisherlens.optim.groups import Groups
from fisherlens.optim.mean_gradient import MeanGradient
from fisherlens.optim.modes import AxisAverages, Cut, along, contraction, cuts

GRAFTS = ("sgd", "none")


class Shampoo(MeanGradient):
    r"""Shampoo of Gupta, Koren and Singer, as its authors' scalable release has it.

    A tensor with k ≥ 2 axes is cut into blocks of at most 128 entries per axis. For each block, with mean gradient Ḡ,

    .. math::
        L_i \leftarrow L_i + \bar G_{(i)} \bar G_{(i)}^\top, \qquad
        u = \bar G \times_1 (L_1 + \lambda I)^{-1/2k} \cdots \times_k (L_k + \lambda I)^{-1/2k},

    where Ḡ_(i) has axis i as rows and all others as columns. The direction of the whole tensor is then given the length of its
    gradient (grafting from SGD), and Nesterov's momentum. Vectors (biases, norm layers) move along their gradient. All layers are covered,
    embeddings and recurrent ones too.

    Parameters
    ----------
    model
        The network itself, with a Linear or convolution layer. Trains all parameters that require grad, of one device and dtype.
    lr, damping
        Step length, of SGD's size with grafting; the ridge λ, added to every L.
    ema
        None, as in the source, sums; ρ in [0, 1) takes L ← ρL + (1 - ρ) Ḡ_(i) Ḡ_(i)ᵀ, divided by 1 - ρ^t. 0 is this batch alone.
    momentum, nesterov, weight_decay
        μ in [0, 1), m ← μm + u; the step is u + μm, or m without ``nesterov``. Decay is decoupled: θ is first multiplied by
        1 - lr * weight_decay.
    labels, seed, likelihood
        Whose mean gradient L is made of: ``"true"``: that of the user's loss, as in the source. ``"sampled"``: at labels drawn from the
        likelihood, for Linear and convolution layers.
    graft
        ``"sgd"``, or ``"none"``, which leaves the length as it is.
    block
        Most entries of a block per axis.
    reduction
        How the loss combines examples, ``"mean"`` or ``"sum"`` (the steps are the same).
    refresh, inverse_refresh
        Steps from one update of L, and of its roots, to the next. A changed damping takes effect with the next roots.
    kl_clip
        κ: the direction of Linear and convolution layers is multiplied by ν = min(1, √(κ / (lr² ⟨u, ḡ⟩))). None clips nothing.
    param_groups, preset
        Options of single parameters, see :mod:`fisherlens.optim`. None, or ``"paper"``, which sets ``inverse_refresh=1``.

    Attributes
    ----------
    diagnostics : dict
        Counts: ``steps`` and ``refreshes`` of L; nothing can fail to factorise, so ``retries`` and ``fallbacks`` stay 0.

    Raises
    ------
    InputError: an option out of range, nothing to train, ``step()`` without a backward pass. NonFiniteError, from ``step()``: NaN or
    infinity in a gradient (named) or in its products; parameters and state stay as they were.

    Notes
    -----
    Source: arXiv 1802.09568, github.com/google-research/google-research (scalable_shampoo). lr and the period of the roots are our choice.
    Every axis counts, also one of length 1. Cost: 2 P Σ n_i operations per update, 4 P Σ n_i per step for axes of n_i < 128, and an
    eigendecomposition (float64) of each L per ``inverse_refresh`` steps; 2 P Σ_i n_i² / Π n floats.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> x, y = torch.randn(32, 4), torch.arange(32) % 3
    >>> opt = Shampoo(model, lr=0.1)
    >>> for _ in range(40):
    ...     loss = nn.functional.cross_entropy(model(x), y)
    ...     opt.zero_grad()
    ...     loss.backward()
    ...     opt.step()
    >>> bool(loss < 1.0), opt.diagnostics["refreshes"]
    (True, 40)
    """

    scalar_kinds = ("norm", "embedding", "other", "dense", "conv")  # every tensor has its rule
    nullable = ("kl_clip", "ema")

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        damping: float = 1e-12,
        *,
        likelihood: str | Likelihood = "categorical",
        ema: float | None = None,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        labels: str = "true",
        graft: str = "sgd",
        block: int = 128,
        reduction: str = "mean",
        refresh: int = 1,
        inverse_refresh: int = 20,
        kl_clip: float | None = None,
        seed: int = 0,
        param_groups: Groups = None,
        preset: str | None = None,
    ):
        self.graft, self.block, self.nesterov = choice("graft", graft, GRAFTS), whole("block", block), nesterov
        inverse_refresh = inverse_refresh if preset is None else 1
        super().__init__(model, locals())

    def _made(self) -> dict[str, Any]:
        made = {}
        for info in self.layout.parameters:
            for k, cut in enumerate(self._cuts(info.shape)):
                for axis, n in enumerate(cut.sizes):
                    like = self._parameters[0].new_zeros(torch.Size(cut.counts).numel(), n, n)
                    made[f"{info.name} {k} {axis}"] = AxisAverages(info.layer, like, like.clone())
        return made

    def _cuts(self, shape: tuple[int, ...]) -> list[Cut]:
        return cuts(shape, self.block) if len(shape) > 1 else []

    def _axes(self, name: str, k: int, order: int) -> list[AxisAverages]:
        return [self._records[f"{name} {k} {axis}"] for axis in range(order)]

    def _precondition(self, gradient: Tensor, active: set[str], scale: float, out: Tensor) -> None:
        if self._records is None:
            self._records = self._made()
        out.copy_(gradient)  # vectors are done
        blocks = {}
        for info in self.layout.parameters:
            if info.layer in active:
                G = gradient[info.start : info.stop].view(info.shape)
                for k, cut in enumerate(self._cuts(info.shape)):
                    blocks[info, k] = cut, cut.take(G)
        if self._due:
            flat, known = self._statistic(gradient, active, scale)
            covered = {layer.name for layer in self.covered}
            fresh = {}
            for (info, k), (cut, x) in blocks.items():
                if info.layer in known:
                    x = cut.take(flat[info.start : info.stop].view(info.shape))
                if info.layer in known or info.layer not in covered:
                    fresh[info, k] = [contraction(x, axis) for axis in range(len(info.shape))]
            self._require_finite_parts((info.layer, L) for (info, _), L in fresh.items())  # before anything is changed
            for (info, k), contractions in fresh.items():
                for record, L in zip(self._axes(info.name, k, len(contractions)), contractions, strict=True):
                    _add(record, L, self._options(info.layer)["ema"])
        for (info, k), (cut, x) in blocks.items():
            for axis, record in enumerate(self._axes(info.name, k, len(info.shape))):
                if record.weight and (self._inverse_due or not record.inversions):
                    record.root = self._root(record, -1 / (2 * len(info.shape)))
                    record.inversions += 1
                x = along(x, record.root, axis) if record.inversions else x
            cut.put(x, out[info.start : info.stop].view(info.shape))
        if self.graft == "sgd":
            for info in dict.fromkeys(info for info, _ in blocks):
                at = slice(info.start, info.stop)
                length = torch.linalg.vector_norm(out[at])
                if length > 0:
                    out[at] *= torch.linalg.vector_norm(gradient[at]) / length

    def _root(self, record: AxisAverages, exponent: float) -> Tensor:
        options = self._options(record.layer)
        L = record.L if options["ema"] is None else record.L / record.weight
        values, vectors = eigenpairs(L, f"A contraction of layer {record.layer!r}")
        values = (values.clamp(min=0) + options["damping"]) ** exponent
        return (vectors * values[:, None, :] @ vectors.mT).to(L.dtype)


def _add(record: AxisAverages, L: Tensor, ema: float | None) -> None:
    """Take one contraction into the sum, or into the average."""
    if ema is None:
        record.L += L
        record.weight += 1.0
    else:
        record.L.lerp_(L, 1 - ema)
        record.weight = ema * record.weight + (1 - ema)
