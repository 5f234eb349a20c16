"""Exact natural gradient: all layers coupled, through the kernel of the batch or by conjugate gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisherlens.errors import NonFiniteError
from fisherlens.likelihoods import Likelihood
from fisherlens.linalg.cg import conjugate_gradients
from fisherlens.optim import texts
from fisherlens.optim.adaptive import AdaptiveDamping
from fisherlens.optim.checks import choice, number, whole
from fisherlens.optim.groups import Groups
from fisherlens.optim.kernels import KernelSolve, RowMethod

SOLVERS = ("auto", "kernel", "cg")


class NGD(AdaptiveDamping, RowMethod):
    r"""Natural gradient descent with the Fisher matrix of the batch, all layers coupled.

    With u_n the score of example n over all covered layers, ḡ the mean gradient and M examples

    .. math::
        F = \tfrac{1}{M} \sum_n u_n u_n^\top, \qquad
        d = (F + \lambda I)^{-1} \bar g
          = \tfrac{1}{\lambda} \big[\bar g - U^\top (U U^\top + M \lambda I)^{-1} U \bar g \big], \qquad
        \theta \leftarrow \theta - \eta \nu d.

    With true labels ḡ = Uᵀ1/M lies in the row space, so that d = Uᵀ (U Uᵀ/M + λI)⁻¹ 1/M, which does not cancel; what else is in
    ``.grad`` (a penalty in the loss, clipping) goes through the first form. All other parameters: d = ḡ / (1 + λ).

    Parameters
    ----------
    model
        The network itself. Trains all parameters that require grad, of one device and dtype, float32 or float64.
    lr, damping
        η and λ, both > 0, λ in the units of F. F has at most M non-zero eigenvalues: most of the space sees ḡ / λ.
    likelihood, labels, seed
        ``"sampled"``: labels drawn from the model, an unbiased estimate of the Fisher (one more backward pass per step).
        ``"true"``: those of the loss, the empirical Fisher.
    momentum, weight_decay
        μ in [0, 1), of the directions; decoupled decay, θ is first multiplied by 1 - lr * weight_decay.
    kl_clip
        κ: ν = min(1, √(κ / (lr² ⟨d, ḡ⟩))) over the covered layers. None clips nothing.
    solver, max_rows
        ``"kernel"``: Cholesky factor of the M x M kernel, float64. ``"cg"``: conjugate gradients on products with F. ``"auto"``: the
        kernel up to ``max_rows`` examples.
    cg_tol, cg_steps, warm_start
        Relative residual and limit of the steps; they start from ``warm_start`` times the last d.
    adapt_damping
        Levenberg and Marquardt: every 5 steps λ is multiplied by 0.9⁵ where the loss on the batch fell by more than 3/4 of what the
        quadratic model had predicted, divided by it where by less than 1/4. Needs ``step(closure)``; the closure is called again after
        such a step, so that ``.grad`` then belongs to the new parameters.
    reduction, refresh
        How the loss combines examples, ``"mean"`` or ``"sum"``; steps between new rows (U of an old batch in between, first form).
    param_groups, preset
        Options of single parameters, see :mod:`fisherlens.optim`. None or ``"paper"``, which agree: there is no one source.

    Attributes
    ----------
    diagnostics : dict
        Counts: ``steps``, ``refreshes``, ``retries`` (factorisations repeated with 10, 100, …, 10⁶ λ), ``fallbacks`` (steps along
        ḡ / (10⁶ λ), with a NumericalWarning), ``cg_steps``.

    Raises
    ------
    InputError: an option out of range, nothing to train, ``step()`` without a backward pass or, with ``adapt_damping``, without a
    closure. NonFiniteError, from ``step()``: NaN or infinity in a gradient (named) or in the statistics; nothing has changed.

    Notes
    -----
    Defaults are our choice, κ that of TENGraD; the damping schedule is that of kfac-jax. Cost per step: 2 M² (d_i + d_o) operations
    per dense layer for the kernel (convolutions: the cheaper of two exact ways), M³/3 for the factor, 4 M P for the solve; conjugate
    gradients 4 M P per step. Memory: inputs and output scores, rows of convolutions up to 256 MiB per layer, M².

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> x, y = torch.randn(32, 4), torch.arange(32) % 3
    >>> opt = NGD(model, lr=0.5, damping=1e-2)
    >>> for _ in range(20):
    ...     loss = nn.functional.cross_entropy(model(x), y)
    ...     opt.zero_grad()
    ...     loss.backward()
    ...     opt.step()
    >>> bool(loss < 0.9), opt.diagnostics["steps"]
    (True, 20)
    """

    crosses_layers = True

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.0,
        damping: float = 1e-2,
        *,
        likelihood: str | Likelihood = "categorical",
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        labels: str = "sampled",
        kl_clip: float | None = 1e-2,
        solver: str = "auto",
        max_rows: int = 4096,
        cg_tol: float = 1e-2,
        cg_steps: int = 50,
        warm_start: float = 0.95,
        adapt_damping: bool = False,
        reduction: str = "mean",
        refresh: int = 1,
        seed: int = 0,
        param_groups: Groups = None,
        preset: str | None = None,
    ):
        self.solver, self.adapt_damping = choice("solver", solver, SOLVERS), bool(adapt_damping)
        self.max_rows, self.cg_steps = whole("max_rows", max_rows), whole("cg_steps", cg_steps)
        self.cg_tol = number("cg_tol", cg_tol, strict=True)
        self.warm_start = number("warm_start", warm_start)
        self._last: Tensor | None = None  # d of the last step, flat
        super().__init__(model, locals())
        self.diagnostics["cg_steps"] = 0

    def _precondition(self, gradient: Tensor, active: set[str], scale: float, out: Tensor) -> None:
        fresh = self._tap.listening
        if fresh:
            scores = [self._scores(layer) for layer in self.covered if layer.name in active]
            few = self.solver == "kernel" or (self.solver == "auto" and self._examples <= self.max_rows)
            self._kept = {"all": self._kernel_solve(scores, scale, factorised=few)} if scores else {}
        for block in self._kept.values():
            g = block.of(gradient)
            if block.gram is None:
                d = self._by_products(block, g)
            elif fresh and self.labels == "true" and block.factor is not None:
                d = self._in_row_space(block, g)
            else:
                d = block.solve(g)
            block.write(d, out, active)

    def _in_row_space(self, block: KernelSolve, g: Tensor) -> Tensor:
        """Uᵀ (scale · U Uᵀ + λI)⁻¹ 1, and what of the gradient is no sum of rows through Woodbury's identity."""
        ones = torch.ones(block.rows.rows, dtype=block.factor.dtype, device=block.factor.device)
        d, explained = block.spread(torch.stack([block.weights(ones), ones], dim=1) * self._share()).unbind(1)
        rest = self._beyond_rows(block, g, explained)
        return d if rest is None else d + block.solve(rest)

    def _by_products(self, block: KernelSolve, g: Tensor) -> Tensor:
        """Conjugate gradients on what the last direction leaves of the gradient."""
        start = torch.zeros_like(g) if self._last is None else self.warm_start * block.of(self._last)
        rest = g - block.product(start[:, None])[:, 0] if start.any() else g
        if not (torch.isfinite(rest).all() and torch.isfinite(block.rows.matmat(g[:, None]) * block.scale).all()):
            raise NonFiniteError(texts.BAD_STATISTICS.format(layer="(all)"))
        goal, size = self.cg_tol * torch.linalg.vector_norm(g).item(), torch.linalg.vector_norm(rest).item()
        if size <= goal:
            return start
        found = conjugate_gradients(block.product, rest[:, None].clone(), tol=goal / size, max_steps=self.cg_steps)
        self.diagnostics["cg_steps"] += found.steps
        d = start + found.solution[:, 0]
        last = torch.zeros(self.layout.n_params, dtype=g.dtype, device=g.device)
        block.write(d, last, {layer.name for layer in block.layers})
        self._last = last if torch.isfinite(d).all() else self._last
        return d

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "last": self._last}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        super()._load_state(state)
        self._last = state["last"]
