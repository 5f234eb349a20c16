"""The Hessian of the mean loss, as an operator with the interface of the Fisher, to compare the two."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fisherlens import errors
from fisherlens.errors import (
    ConvergenceWarning,
    InputError,
    MemoryBudgetError,
    NonFiniteError,
    readable_bytes,
    user_level,
)
from fisherlens.fisher.checks import check_arguments, check_cap, check_iteration, finite
from fisherlens.fisher.damped import Vector, check_damping
from fisherlens.fisher.operator import Fisher
from fisherlens.fisher.solve import Preconditioner
from fisherlens.likelihoods import Likelihood, as_likelihood
from fisherlens.linalg.minres import minres
from fisherlens.scores import LossCurvature, Plan, parse_memory

# As for Fisher.dense: parameters up to which P products are taken for granted.
DENSE_LIMIT = 5000
# Bytes of identity columns and their products that are held at once (our choice).
_COLUMNS = 64 * 2**20


class Hessian(Fisher):
    r"""Hessian of the mean negative log-likelihood, matrix-free; made by ``Fisher(..., kind="hessian")``.

    .. math:: H = \frac{\sum_n w_n \nabla^2 l_n}{\sum_n w_n}
                = \frac{1}{W} \sum_n w_n \Big[ J_n^\top (\nabla_f^2 l_n) J_n + \sum_c \frac{\partial l_n}{\partial f_c} \nabla^2 f_{nc} \Big]

    at the observed labels, in nat. It is symmetric but not positive semi-definite. Where :math:`\nabla_f^2 l` is the Fisher of the output
    distribution (categorical, bernoulli, gaussian), the first term is F, and H = F for a model that is linear in its parameters.
    Second derivatives of ReLU and max-pooling are 0 away from their kinks, as in torch.

    The interface is that of :class:`Fisher`, but there are no score rows: ``gram()``, ``scores`` and every analysis that needs them raise
    InputError. Parameters, data and budget as there; an eighth of ``memory`` bounds what a pass holds, and the graph of the gradient
    is kept where it fits (see ``plan``).

    Notes
    -----
    Cost of ``H @ v``: 2 gradient evaluations by FLOP count where the graph is kept, 3 where it is not; further vectors of a block 2.
    ``dense()``, ``diagonal()``, ``trace()`` and ``frobenius_norm()`` take P products in blocks, once where the matrix fits a quarter of
    ``memory``, and are refused above 5000 parameters.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[dict[str, Tensor], Any], Tensor],
        data: Any,
        *,
        likelihood: str | Likelihood,
        kind: str = "hessian",
        params: Sequence[str] | str | Mapping[str, Tensor] | None = None,
        mc_samples: int = 1,
        mc_sampling: str = "independent",
        rows: str = "term",
        seed: int = 0,
        memory: str | float = "2GiB",
        progress: bool | None = None,
        check_deterministic: bool = True,
    ):
        self.likelihood, self.memory = as_likelihood(likelihood), parse_memory(memory)
        mc_samples, seed = check_arguments(kind, mc_samples, mc_sampling, rows, seed, check_deterministic)
        self.kind, self.mc_samples, self.mc_sampling, self.rows, self.seed = kind, mc_samples, mc_sampling, rows, seed
        self.curvature = LossCurvature(
            model,
            data,
            self.likelihood,
            params=params,
            budget=self.memory,
            progress=progress,
            check_deterministic=check_deterministic,
        )
        self.layout, self.plan = self.curvature.layout, self.curvature.plan
        self.total_weight, self.parameters = self.curvature.total_weight, self.curvature.parameters
        self._gradient, self._gradient_coefficients = self.curvature.gradient, None
        self.origins = tuple(layer.start for layer in self.layout.layers)
        self._kept: Tensor | None = None  # the matrix, float64
        self._factor: tuple[float, Tensor, Tensor] | None = None

    def _no_scores(self) -> NoReturn:
        raise InputError(errors.NO_SCORE_ROWS)

    # --- facts -------------------------------------------------------------------------------------------------------

    @property
    def scores(self) -> NoReturn:  # type: ignore[override]
        """Not defined: InputError. Every analysis of score rows comes through here."""
        self._no_scores()

    @property
    def solver(self) -> NoReturn:  # type: ignore[override]
        """Not defined: InputError, as factors of a Fisher are Cholesky factors."""
        self._no_scores()

    @property
    def n_data(self) -> int:
        """Examples, N."""
        return self.curvature.n_data

    @property
    def n_columns(self) -> int:
        """Score columns per example: none."""
        return 0

    @property
    def rank_bound(self) -> int:
        """P: neither N nor the number of outputs bounds the rank of a Hessian."""
        return self.n_params

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters, and of every answer."""
        return self.curvature.dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters, and of every answer."""
        return self.curvature.device

    def __repr__(self) -> str:
        return (
            f"Fisher(kind='hessian', likelihood={self.likelihood.name!r}, P={self.n_params}, N={self.n_data}, indefinite, "
            f"{str(self.dtype).removeprefix('torch.')}, {self.device}, {self.plan.layers[0].path}, {readable_bytes(self.plan.nbytes)})"
        )

    # --- products ----------------------------------------------------------------------------------------------------

    def _product(self, v: Tensor) -> Tensor:
        return self.curvature.product(v, self.layout.names).mul_(1 / self.total_weight).to(self.dtype)

    def _columns(self, names: Sequence[str]) -> Tensor:
        """The diagonal block of some parameters, float64, from products with identity columns; symmetrised against rounding."""
        size = sum(self.layout[name].numel for name in names)
        out = torch.empty(size, size, dtype=torch.float64, device=self.device)
        step = max(1, min(self.memory // 8, _COLUMNS) // (16 * size))
        for start in range(0, size, step):
            stop = min(start + step, size)
            identity = torch.zeros(size, stop - start, dtype=self.dtype, device=self.device)
            identity[start:stop].fill_diagonal_(1)
            out[:, start:stop] = self.curvature.product(identity, names) / self.total_weight
        return (out + out.T) / 2

    def _cast(self, answer: Tensor, what: str) -> Tensor:
        """A copy in the dtype of every answer, which may be too small for it."""
        return finite(answer.to(self.dtype, copy=True), what, self.dtype)

    def matrix(self, max_params: int = DENSE_LIMIT, what: str = "dense()") -> Tensor:
        """H itself in float64, ``(P, P)``, P products; kept where it fits a quarter of the memory budget."""
        if self.n_params > check_cap(max_params) and self._kept is None:
            size = readable_bytes(self.n_params**2 * 8)
            raise MemoryBudgetError(
                f"{what} of kind='hessian' takes {self.n_params} products with H, one per parameter, and {size}; the cap is {max_params} parameters. "
                "Use H @ v, H.block(names) or H.restrict(layers), or raise max_params."
            )
        if self._kept is not None:
            return self._kept
        matrix = self._columns(self.layout.names)
        if matrix.nbytes <= self.memory // 4:
            self._kept = matrix
        return matrix

    def diagonal(self, max_params: int = DENSE_LIMIT) -> Tensor:
        """Diagonal of H, flat ``(P,)``, exact; P products, refused above ``max_params``. Entries may be negative."""
        return self._cast(self.matrix(max_params, "diagonal()").diagonal(), "The diagonal of H")

    def trace(self, max_params: int = DENSE_LIMIT) -> float:
        """Trace of H in nat, exact; P products, refused above ``max_params``."""
        return self.matrix(max_params, "trace()").trace().item()

    def frobenius_norm(self, max_params: int = DENSE_LIMIT) -> float:
        """Frobenius norm of H, √Σ H_ij², exact; P products, refused above ``max_params``."""
        return torch.linalg.matrix_norm(self.matrix(max_params, "frobenius_norm()")).item()

    def gram(self) -> Tensor:
        """Not defined: InputError. A Hessian has no score rows."""
        self._no_scores()

    def dense(self, max_params: int = DENSE_LIMIT) -> Tensor:
        """The matrix itself, ``(P, P)``; P products, refused above ``max_params``."""
        return self._cast(self.matrix(max_params), "H.dense()")

    def block(self, names: str | Sequence[str], max_params: int = DENSE_LIMIT) -> Tensor:
        """The diagonal block of some layers or parameters (names or patterns), in layout order; one product per entry."""
        index = self.layout.index_of(names).to(self.device)
        if self._kept is not None:
            return self._cast(self._kept[index][:, index], f"The block {names!r} of H")
        if len(index) > check_cap(max_params):
            size = readable_bytes(len(index) ** 2 * 8)
            raise MemoryBudgetError(
                f"The block {names!r} takes {len(index)} products with H, one per parameter, and {size}; the cap is {max_params}. Raise max_params."
            )
        starts = set(index.tolist())
        found = self._columns([p.name for p in self.layout.parameters if p.start in starts])
        return self._cast(found, f"The block {names!r} of H")

    # --- solves ------------------------------------------------------------------------------------------------------

    def solve(
        self,
        v: Vector,
        damping: float,
        *,
        preconditioner: Preconditioner | None = None,
        return_info: bool = False,
        tol: float | None = None,
        max_steps: int = 1000,
    ) -> Any:
        """(H + λI)⁻¹ v, by an LU factorisation where the matrix is kept or costs no more than the iteration may, else by MINRES.

        H + λI may be indefinite, so neither Cholesky factors nor conjugate gradients apply, and the answer need not be a descent direction.

        Parameters
        ----------
        v
            Flat, block or dict; the answer has the same form.
        damping
            λ > 0, in the units of the eigenvalues (nat).
        preconditioner
            An object with ``solve(v, damping)`` that is symmetric positive definite, such as an approximation of the Fisher; used, and
            MINRES chosen, where given.
        return_info
            Also return a dict with ``method`` ("dense" or "minres"), ``residual`` (relative, recomputed from H; one entry per vector),
            ``steps``, ``converged``.
        tol, max_steps
            Of MINRES: relative residual (default 1e-10 in float64, 1e-5 in float32) and limit of steps.

        Notes
        -----
        Dense where P ≤ 5000 and P products are no more than ``max_steps`` per vector. A solve that misses its tolerance returns what it has
        with a ConvergenceWarning: -λ may be close to an eigenvalue.
        """
        damping = check_damping(damping)
        check_iteration(tol, max_steps, preconditioner)
        goal = tol if tol is not None else (1e-10 if self.dtype == torch.float64 else 1e-5)
        info: dict[str, Any] = {}

        def damped(x: Tensor) -> Tensor:
            return self._product(x.to(self.dtype)).double() + damping * x

        def apply(flat: Tensor) -> Tensor:
            wide = flat.double()
            direct = self._kept is not None or self.n_params <= min(DENSE_LIMIT, max_steps * flat.shape[1])
            if direct and preconditioner is None:
                solution = torch.linalg.lu_solve(*self._factors(damping), wide)
                norm = torch.linalg.vector_norm(wide, dim=0)
                residual = torch.linalg.vector_norm(self.matrix() @ solution + damping * solution - wide, dim=0)
                residual = residual / norm.where(norm > 0, 1)
                info.update(method="dense", steps=0, residual=residual, converged=bool((residual <= goal).all()))
            else:
                precondition = None
                if preconditioner is not None:

                    def precondition(r: Tensor) -> Tensor:
                        return preconditioner.solve(r.to(self.dtype), damping).double()

                found = minres(damped, wide, precondition=precondition, tol=goal, max_steps=max_steps)
                solution = found.solution
                info.update(method="minres", steps=found.steps, residual=found.residual, converged=found.converged)
            if not info["converged"]:
                warnings.warn(
                    f"The solve with the Hessian ({info['method']}, {info['steps']} steps) has relative residual {info['residual'].max().item():.1e} "
                    f"(wanted {goal:.0e}). The partial solution is returned. H + λI may be close to singular, as eigenvalues of H can be near -λ: "
                    "change the damping, pass a preconditioner or raise max_steps.",
                    ConvergenceWarning,
                    stacklevel=user_level(),
                )
            return solution.to(self.dtype)

        solution = self._answer(v, apply)
        return (solution, info) if return_info else solution

    def _factors(self, damping: float) -> tuple[Tensor, Tensor]:
        """LU factors of H + λI in float64, kept for the last damping."""
        if self._factor is None or self._factor[0] != damping:
            matrix = self.matrix().clone()
            matrix.diagonal().add_(damping)
            factor, pivots, singular = torch.linalg.lu_factor_ex(matrix)
            if singular.item():
                raise NonFiniteError(
                    f"H + {damping:g} I is singular: -{damping:g} is an eigenvalue of the Hessian, so no solution exists. Change the damping."
                )
            self._factor = (damping, factor, pivots)
        return self._factor[1:]

    # --- views -------------------------------------------------------------------------------------------------------

    def restrict(self, layers: str | Sequence[str]) -> Hessian:
        """The Hessian of some layers alone, the others held fixed: a diagonal block of H."""
        names = [layers] if isinstance(layers, str) else list(layers)
        if not names:
            raise InputError("restrict takes at least one layer name; print(F.layout) lists them.")
        wanted = {self.layout.layer(name).name for name in names}
        kept = [layer for layer in self.layout.layers if layer.name in wanted]
        index = torch.cat([torch.arange(layer.start, layer.stop, device=self.device) for layer in kept])
        part = copy.copy(self)
        part.layout = self.layout.restrict([layer.name for layer in kept])
        part.plan = Plan([self.plan[layer.name] for layer in kept], self.n_data, 0, self.plan.budget)
        part.parameters, part._gradient = self.parameters[index], self._gradient[index]
        part.origins = tuple(
            origin for origin, layer in zip(self.origins, self.layout.layers, strict=True) if layer.name in wanted
        )
        part._kept = None if self._kept is None else self._kept[index][:, index]
        part._factor = None
        return part
