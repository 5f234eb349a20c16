"""CW-NGD: natural gradient with one small block per kernel or per segment of a unit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisherlens.errors import InputError
from fisherlens.likelihoods import Likelihood
from fisherlens.optim import texts
from fisherlens.optim.averages import BlockAverages, EntryAverages, joined, moved_weight
from fisherlens.optim.base import NaturalGradient
from fisherlens.optim.groups import Groups
from fisherlens.optim.moments import BlockMoments, digest, restrict
from fisherlens.optim.tap import Pass, found_maps
from fisherlens.partitions import Partition
from fisherlens.partitions import partition as make_partition

NORM_FLOOR = 1e-8  # added to the root of a norm layer's rule; the release divides by the bare root


class CWNGD(NaturalGradient):
    r"""Component-wise natural gradient descent (CW-NGD), as its authors released it.

    Every block b (a kernel, a segment of a unit, a bias) has a damped empirical Fisher of its own. With g_n the gradient of
    example n, ḡ their mean and t = 1, 2, … (no square root)

    .. math::
        H_b &\leftarrow \rho H_b + (1 - \rho) \tfrac{1}{M} \sum_{n=1}^{M} g_{nb} g_{nb}^\top, \qquad
        m_b \leftarrow \beta m_b + (1 - \beta) \bar g_b, \\
        u_b &\leftarrow \Big(\frac{H_b}{1 - \rho^t} + \lambda I\Big)^{-1} \frac{m_b}{1 - \beta^t} + \mu u_b, \qquad
        \theta_b \leftarrow \theta_b - \eta u_b.

    Normalisation layers: h ← ρ h + (1 - ρ) ḡ², u = m̂ / (√ĥ + 1e-8). All other parameters: u = ḡ / (1 + λ).
    What the gradients of examples are and which backward passes count is said, for all methods, in :mod:`fisherlens.optim`.

    Parameters
    ----------
    model
        The network itself. Trains all parameters that require grad, of one device and dtype, float32 or float64.
    lr, damping
        η and λ, both > 0. The released λ is small beside H: the first step, from one batch alone, is large.
    likelihood
        Name or fisherlens likelihood; draws sampled labels. With true labels the loss says all.
    ema, momentum_ema
        ρ of H and β of m, in [0, 1); 0 averages nothing.
    momentum, weight_decay
        μ in [0, 1), of the directions; decoupled decay, θ is first multiplied by 1 - lr * weight_decay.
    labels, seed
        ``"true"``: the user's loss, as released. ``"sampled"``: labels drawn from the model, so that H estimates the Fisher.
    partition
        Scheme of :func:`fisherlens.partition`, dict label -> flat indices, or Partition of this model. The maps flattened into
        dense layers are read off the first forward pass, where a trainable layer must come before them.
    reduction, refresh
        How the loss combines examples, ``"mean"`` or ``"sum"`` (the steps are the same); steps from one update of H to the next.
    kl_clip
        κ: the direction of Linear and convolution layers is multiplied by ν = min(1, √(κ / (lr² ⟨u, ḡ⟩))). None clips nothing.
    param_groups, preset
        Options of single parameters, see :mod:`fisherlens.optim`. None or ``"paper"``, which agree: the defaults are those of the released code.

    Attributes
    ----------
    partition : Partition or None
        The blocks, from the first backward pass on.
    diagnostics : dict
        Counts: ``steps``, ``refreshes`` of H, ``retries`` (blocks factorised once more, with 10, 100, …, 10⁶ λ, because rounding had
        cost them their definiteness), ``fallbacks`` (blocks for which that failed too: m̂ / (10⁶ λ), with a NumericalWarning).

    Raises
    ------
    InputError: an option out of range, nothing to train, ``step()`` without a backward pass. NonFiniteError, from ``step()``: NaN or
    infinity in a gradient (named) or in the statistics; parameters and state stay as they were.

    Notes
    -----
    Source: github.com/tranvansang/cw-ngd (arXiv 2210.05268); the retries are our choice. The paper of 2022 is, by our reading,
    ``partition=fl.partition(model, "cw-ngd", variant="2022"), ema=0, momentum_ema=0, lr=0.05, damping=0.1``. Cost: H keeps P s
    floats for blocks of size s. A step forms the rows of convolutions once, 16 MiB at a time, takes a product of the size of the
    backward pass in dense layers, and one float64 Cholesky factor per block.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> x, y = torch.randn(32, 4), torch.arange(32) % 3
    >>> opt = CWNGD(model, lr=0.01, damping=1e-3)
    >>> for _ in range(20):
    ...     loss = nn.functional.cross_entropy(model(x), y)
    ...     opt.zero_grad()
    ...     loss.backward()
    ...     opt.step()
    >>> bool(loss < 1.0), opt.diagnostics["steps"]
    (True, 20)
    """

    scalar_kinds = ("norm",)

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        damping: float = 1e-7,
        *,
        likelihood: str | Likelihood = "categorical",
        ema: float = 0.99,
        momentum_ema: float = 0.9,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        labels: str = "true",
        partition: str | Mapping[str, Any] | Partition = "cw-ngd",
        reduction: str = "mean",
        refresh: int = 1,
        kl_clip: float | None = None,
        seed: int = 0,
        param_groups: Groups = None,
        preset: str | None = None,
    ):
        self.partition: Partition | None = None
        self._scheme: Any = partition
        self._drop()
        super().__init__(model, locals())

    def _check_method(self) -> None:
        checked = make_partition(self.layout, self._scheme)  # a wrong scheme shows here
        self._scheme = self._scheme if isinstance(self._scheme, str) else checked
        if len(self.param_groups) > 1:
            self.crosses_layers = any(group.layer is None for group in restrict(checked, self.covered).groups)

    def _precondition(self, gradient: Tensor, active: set[str], scale: float, out: Tensor) -> None:
        sums = self._sums or [None] * len(self._blocks)
        self._require_finite_moments(self._blocks, sums, scale)  # before anything is changed
        due: dict[tuple[int, float], list[BlockAverages]] = {}
        for blocks, total in zip(self._blocks, sums, strict=True):
            if blocks.layer is not None and blocks.layer not in active:
                continue
            options = self._options(blocks.layer)
            if self._tap.listening:
                moment = torch.zeros_like(blocks.H) if total is None else total.mul_(scale)  # (1/M) sum_n g_n g_n^T
                blocks.H.lerp_(moment, 1 - options["ema"])  # H <- rho H + (1 - rho) moment
                blocks.H_steps, blocks.H_weight = blocks.H_steps + 1, moved_weight(blocks.H_weight, options["ema"])
            blocks.m.lerp_(blocks.of(gradient), 1 - options["momentum_ema"])
            blocks.m_steps, blocks.m_weight = blocks.m_steps + 1, moved_weight(blocks.m_weight, options["momentum_ema"])
            if blocks.H_steps:  # else the rule for parameters without statistics stands
                due.setdefault((blocks.m.shape[1], options["damping"]), []).append(blocks)
        for (size, damping), alike in due.items():  # blocks of one size are one batch
            rest, left = [x.H_weight for x in alike], [x.m_weight for x in alike]  # H_hat = H / (1 - rho^t)
            if size == 1:  # m_hat / (H_hat + lambda)
                for x, r, s in zip(alike, rest, left, strict=True):
                    out[x.at] = x.m.view(-1) / (x.H.view(-1) * (s / r)).add_(s * damping)
                continue
            H_hat = joined([x.H / r for x, r in zip(alike, rest, strict=True)])
            m_hat = joined([x.m / s for x, s in zip(alike, left, strict=True)])
            u = self._solve(H_hat, damping, m_hat).split([len(x.m) for x in alike])
            for blocks, part in zip(alike, u, strict=True):
                out[blocks.at] = part.reshape(-1)
        for norm in self._norms:
            if norm.layer in active:
                rho, beta = (self._options(norm.layer)[name] for name in ("ema", "momentum_ema"))
                out[norm.at] = norm.adapted(gradient[norm.at], rho, beta, NORM_FLOOR)

    def _absorb(self, one: Pass, examples: int) -> None:
        if self.partition is None:
            self._begin(*self._averages(self._tap.maps))
        found = self._moments(one.calls, examples, self._parameters[0])
        olds = self._sums or [None] * len(found)
        self._sums = [a if b is None else b if a is None else a + b for a, b in zip(olds, found, strict=True)]

    def _drop(self) -> None:
        self._sums: list[Tensor | None] = []  # of outer products, per group of blocks, since the last step

    def _averages(self, maps: Mapping[str, Any]) -> tuple[Any, ...]:
        """Cut the blocks, now that the flattened maps are known, and start all averages at zero."""
        like, layout = self._parameters[0], self.layout.with_input_maps(found_maps(maps))
        partition = make_partition(layout, self._scheme)
        groups = restrict(partition, self.covered).groups
        blocks = [BlockAverages.of_group(group, like) for group in groups]
        norms = [EntryAverages.of(layer.name, layer, like) for layer in layout.layers if layer.kind == "norm"]
        return partition, blocks, norms, BlockMoments(groups, self.covered, layout, like.device)

    def _begin(self, partition: Partition, *averages: Any) -> None:
        self.partition, self.layout = partition, partition.layout
        self._blocks, self._norms, self._moments = averages

    def _state(self) -> dict[str, Any]:
        started = self.partition is not None
        averages = [one.state() for one in [*self._blocks, *self._norms]] if started else None
        return {"averages": averages, "blocks": digest(self.partition) if started else None}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        if state["averages"] is None:
            self.partition = None
            return
        partition, blocks, norms, moments = self._averages(state["maps"])
        self._restore([*blocks, *norms], state["averages"], f"partition {partition.scheme!r}")
        if state.get("blocks") not in (None, digest(partition)):
            raise InputError(texts.OTHER_BLOCKS.format(name=self.name, scheme=partition.scheme))
        self._begin(partition, blocks, norms, moments)
