"""The Fisher information of a network on data, as an operator that never forms the matrix."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fisherlens import errors
from fisherlens.errors import InputError, MemoryBudgetError, NonFiniteError, readable_bytes
from fisherlens.fisher.checks import check_arguments, check_cap, check_iteration, check_seed, finite
from fisherlens.fisher.damped import DampedFisher, Vector, check_damping, to_scipy
from fisherlens.fisher.solve import Preconditioner, Solver
from fisherlens.layout import Layout, named
from fisherlens.likelihoods import Likelihood, as_likelihood
from fisherlens.linalg.precision import OwnPrecision
from fisherlens.scores import KINDS, Plan, ScoreMatrix, capture, parse_memory

if TYPE_CHECKING:
    import scipy.sparse.linalg


def require_fisher(F: Any, *, rows: bool = True) -> None:
    """Refuse anything but a Fisher where an analysis takes one, the model or the matrix, say; and a Hessian where score rows are needed."""
    if not isinstance(F, Fisher):
        raise TypeError(
            f"The analysis takes a fisherlens.Fisher; got {type(F).__name__}. Build the operator first: "
            "F = fl.Fisher(model, data, likelihood=...)."
        )
    if rows and F.kind == "hessian":
        raise InputError(errors.NO_SCORE_ROWS)


class Fisher(OwnPrecision):
    r"""Fisher information matrix of a network on a data set, matrix-free.

    .. math:: F = \frac{\sum_n w_n J_n^\top H_n J_n}{\sum_n w_n} = \frac{1}{W} U^\top U

    with the Jacobian J_n of the outputs of example n and H_n the Fisher of the output distribution. It is that of the *mean*
    negative log-likelihood over the whole data set; units are nat. Inputs and output scores of each layer are captured once,
    here; every member is a contraction of them, so later changes of the model do not reach this object.

    Parameters
    ----------
    model
        Any ``nn.Module``, used as it stands and left as it was, that returns one tensor, or an object or dict that holds it as
        ``logits``. ``Linear``, ``Conv1d/2d/3d`` and normalisation layers have closed
        rules; every other parameter (attention, recurrent cells, tied weights, functional calls) is exact too, through one
        gradient per example and column, which costs more time and memory (see :attr:`plan`).
    data
        ``(inputs, targets)`` tensors, or a re-iterable of such batches, the same in every pass. ``inputs`` may be a tensor, tuple or
        dict, whose tensors count examples on their first axis or are shared by all; ``targets`` may be None for the exact and mc kinds
        without class weights. A batch may also be one dict with the targets under ``"labels"``, taken as they stand (not shifted).
    likelihood
        ``"categorical"``, ``"bernoulli"``, ``"gaussian"``, or an instance of :class:`Categorical`, :class:`Bernoulli`, :class:`Gaussian`.
    kind
        ``"exact"``: expectation over labels in closed form. ``"mc"``: labels sampled from the model, drawn once and kept.
        ``"empirical"``: observed labels; not the Fisher, but common in optimizers. ``"hessian"``: the Hessian of the mean loss, to
        compare with; symmetric, not positive semi-definite, without score rows, from second derivatives.
    params
        None for all that require grad, or a list of names, layers or glob patterns. Where ``model`` is a function ``f(params, inputs)``,
        its dict name → tensor.
    mc_samples
        Label draws per example of the mc kind. Default 1, as KFAC's authors use (Martens and Grosse 2015).
    mc_sampling
        ``"independent"`` draws, or ``"stratified"``: the S = ``mc_samples`` draws of a term come from S equal slices of its distribution
        function, one each, in random order. Unbiased too, and with a smaller variance where labels have many values (our choice).
    rows
        Of the empirical kind where an example has several terms: ``"term"``, one row per term, so that every term of the mean counts
        alike; or ``"example"``, one row per example, the sum Σ_t √w_t s_t of its terms' scores, still divided by Σ w_t. The two are
        different matrices.
    seed
        Seeds generators of its own for the labels; global random state is neither read nor changed.
    memory
        Budget for what is kept, bytes or text; decides per layer between factors and explicit rows (see :attr:`plan`). Beside it, a pass
        over the data holds ``plan.transient_nbytes``: at most about 192 MiB however small the budget is, or a few vectors of all parameters where that is more.
    progress
        Show a bar while capturing; None for "if standard error is a terminal".
    check_deterministic
        Refuse batches that differ between two passes over ``data`` (a shuffling loader, augmentation), and a model that answers one
        batch in two ways: F would be no fixed matrix. False trusts both, and F is that of the pass in which it was captured; where
        scores are not kept, each product then is that of its own pass.

    Attributes
    ----------
    shape, n_params, n_data, n_columns
        ``(P, P)``, P, examples N, score columns R per example.
    origins
        Where each layer starts in the network's own flat vector; differs from ``layout`` after :meth:`restrict`.
    layout, plan
        Names, shapes and places of the parameters; how each layer's scores are kept and what a product costs.

    Raises
    ------
    InputError
        Train-mode BatchNorm or dropout, empty or one-shot data, targets that do not fit, outputs that vary between passes.
    NonFiniteError
        NaN or infinity in a parameter, an input or an output; names it and the batch.
    MemoryBudgetError
        Scores over the memory budget; says what would fit.

    Notes
    -----
    Cost: R + 1 backward passes without weight gradients once; then about one gradient evaluation or less per product.

    Model and data are referred to only where a later pass may be needed: scores that are not kept, and convolutions kept as explicit rows, of
    which :class:`KFAC` takes inputs and output scores once more.

    Examples
    --------
    >>> model = torch.nn.Linear(3, 2)
    >>> x, y = torch.eye(3), torch.tensor([0, 1, 0])
    >>> F = Fisher(model, (x, y), likelihood="categorical")
    >>> F.shape, F.n_columns, (F @ torch.ones(8)).shape
    ((8, 8), 1, torch.Size([8]))
    """

    def __new__(cls, *_: Any, kind: str = "exact", **__: Any) -> Fisher:
        if cls is Fisher and kind == "hessian":
            from fisherlens.fisher.hessian import Hessian  # which is a Fisher

            cls = Hessian
        return super().__new__(cls)

    def __init__(
        self,
        model: nn.Module | Callable[[dict[str, Tensor], Any], Tensor],
        data: Any,
        *,
        likelihood: str | Likelihood,
        kind: str = "exact",
        params: Sequence[str] | str | Mapping[str, Tensor] | None = None,
        mc_samples: int = 1,
        mc_sampling: str = "independent",
        rows: str = "term",
        seed: int = 0,
        memory: str | float = "2GiB",
        progress: bool | None = None,
        check_deterministic: bool = True,
    ):
        self.likelihood = as_likelihood(likelihood)
        if kind not in KINDS:
            hint = errors.nearest(kind, (*KINDS, "hessian"))
            raise InputError(errors.UNKNOWN_NAME.format(what="kind", name=kind, hint=hint))
        mc_samples, seed = check_arguments(kind, mc_samples, mc_sampling, rows, seed, check_deterministic)
        self.kind, self.mc_samples, self.mc_sampling, self.rows, self.seed = kind, mc_samples, mc_sampling, rows, seed
        self.memory = parse_memory(memory)
        found = capture(
            model,
            data,
            self.likelihood,
            kind,
            params=params,
            mc_samples=mc_samples,
            mc_sampling=mc_sampling,
            rows=rows,
            seed=seed,
            budget=self.memory,
            progress=progress,
            check_deterministic=check_deterministic,
        )
        self.layout: Layout = found.layout
        self.plan: Plan = found.plan
        self.scores: ScoreMatrix = found.scores
        self.total_weight: float = found.total_weight
        self._kept_terms, self._rank_per_term = found.kept_terms, found.rank_per_term
        self._gradient, self._gradient_coefficients = found.gradient, found.gradient_coefficients
        self._bound = found.bound
        self.origins: tuple[int, ...] = tuple(layer.start for layer in self.layout.layers)
        self.solver = Solver(self.scores, self.total_weight)
        self.parameters = found.parameters
        self.replay = found.replay

    # --- facts -------------------------------------------------------------------------------------------------------

    @property
    def n_params(self) -> int:
        """Selected parameters, P."""
        return self.layout.n_params

    @property
    def shape(self) -> tuple[int, int]:
        """``(P, P)``."""
        return (self.n_params, self.n_params)

    @property
    def n_data(self) -> int:
        """Examples, N."""
        return self.scores.n

    @property
    def n_columns(self) -> int:
        """Score columns per example, R."""
        return self.scores.r

    @property
    def n_rows(self) -> int:
        """Kept rows of the score matrix, the order of :meth:`gram`."""
        return self.scores.rows if self.scores.kept is None else int(self.scores.kept.sum())

    @property
    def rank_bound(self) -> int:
        """No more eigenvalues than this are non-zero."""
        rank = self._kept_terms * self._rank_per_term if self.kind == "exact" else self.n_rows
        return min(self.n_params, rank)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters, and of every answer."""
        return self.scores.dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters, and of every answer."""
        return self.scores.device

    def __repr__(self) -> str:
        options = "".join(
            f", {name}={value!r}"
            for name, value, default in (("mc_sampling", self.mc_sampling, "independent"), ("rows", self.rows, "term"))
            if value != default
        )
        return (
            f"Fisher(kind={self.kind!r}{options}, likelihood={self.likelihood.name!r}, P={self.n_params}, N={self.n_data}, R={self.n_columns}, "
            f"rank<={self.rank_bound}, {str(self.dtype).removeprefix('torch.')}, {self.device}, {readable_bytes(self.plan.nbytes)})"
        )

    # --- products ----------------------------------------------------------------------------------------------------

    def __matmul__(self, v: Vector) -> Vector:
        """F v for a flat ``(P,)``, a block ``(P, K)`` or a dict name → tensor; the answer has the form of the question."""
        return self._answer(v, self._product, self._checked_product if self.plan.kept else None)

    def _product(self, v: Tensor) -> Tensor:
        return self.scores.product(v, 1 / self.total_weight)

    def _checked_product(self, v: Tensor) -> tuple[Tensor, bool]:
        return self.scores.checked_product(v, 1 / self.total_weight)

    def _answer(
        self,
        v: Vector,
        function: Callable[[Tensor], Tensor],
        checked: Callable[[Tensor], tuple[Tensor, bool]] | None = None,
    ) -> Vector:
        """Apply a map of ``(P, K)`` to a vector in any of its three forms; ``checked`` also tells whether all is finite for certain."""
        if isinstance(v, Mapping):
            flat = self.layout.flatten(v)
            return self.layout.unflatten(self._answer(flat, function, checked))
        if not isinstance(v, Tensor):
            raise TypeError(
                f"A vector must be a tensor or a dict name → tensor; got {type(v).__name__}. Use torch.as_tensor(v)."
            )
        if v.ndim not in (1, 2) or v.shape[0] != self.n_params:
            raise InputError(
                f"F @ v takes v of shape ({self.n_params},) or ({self.n_params}, K), or a dict with the keys of F.layout; got a tensor of shape "
                f"{tuple(v.shape)}.\nF covers {len(self.layout)} parameters with {self.n_params} entries. If v was made for another model, rebuild F; "
                "print(F.layout) lists names and shapes."
            )
        if v.layout != torch.strided:
            raise InputError(f"F @ v takes a dense vector; got one of layout {v.layout}. Use v.to_dense().")
        if v.dtype != self.dtype or v.device != self.device:
            raise InputError(
                f"F @ v takes v of dtype {self.dtype} on {self.device}; got {v.dtype} on {v.device}. Convert it: v.to(F.device, F.dtype)."
            )
        v = v.detach()
        block = v if v.ndim == 2 else v[:, None]
        if not block.shape[1]:
            return v.clone()
        answer, certain = (None, False) if checked is None else checked(block)
        if certain:
            return answer if v.ndim == 2 else answer[:, 0]
        # one sum is a cheap first look; only where it overflows does every entry get looked at
        if not torch.isfinite(v.sum()) and not torch.isfinite(v).all():
            raise NonFiniteError(
                "The vector handed to F holds NaN or infinity, and so would the product. Look at where it was computed."
            )
        if answer is None:
            answer = function(block)
        finite(answer, "The product or solve with this vector", self.dtype)
        return answer if v.ndim == 2 else answer[:, 0]

    def diagonal(self) -> Tensor:
        """Diagonal of F, flat ``(P,)``, exact and without the matrix."""
        return finite(self.scores.diagonal() / self.total_weight, "F.diagonal()", self.dtype)

    def trace(self) -> float:
        """Trace of F in nat: the mean squared length of the scores."""
        return finite(self.scores.trace().item() / self.total_weight, "F.trace()", self.dtype)

    def frobenius_norm(self) -> float:
        """Frobenius norm of F, √Σ F_ij², through the Gram matrix or the dense one, whichever is smaller."""
        self._require_room("The Frobenius norm needs", min(self.n_params, self.scores.rows))
        smaller = self.scores.dense() if self.n_params <= self.scores.rows else self.scores.full_gram()
        norm = torch.linalg.matrix_norm(smaller.double()).item() / self.total_weight
        return finite(norm, "F.frobenius_norm()", self.dtype)

    def gram(self) -> Tensor:
        """U Uᵀ / W, one row per kept score row: the same non-zero spectrum as F."""
        self._require_room("F.gram() is", self.scores.rows)
        return finite(self.scores.gram() / self.total_weight, "F.gram()", self.dtype)

    def _require_room(self, what: str, order: int) -> None:
        """Refuse a matrix of this order that would not fit the budget, before the memory is asked for."""
        needed = 2 * order**2 * self.dtype.itemsize
        if order > 2000 and needed > self.memory:
            raise MemoryBudgetError(
                f"{what} a matrix of order {order}, {readable_bytes(needed)} with workspace, over the budget of {readable_bytes(self.memory)}. F @ v, "
                "F.diagonal() and F.trace() need none; else use fewer examples, kind='mc' with one column each, or raise memory=."
            )

    def gradient(self) -> Tensor:
        """Mean gradient of the negative log-likelihood on the same data, flat ``(P,)``; needs targets."""
        if self._gradient is None:
            raise InputError(
                "The gradient needs observed labels, but this Fisher was built with targets=None. Rebuild it with (inputs, targets)."
            )
        return finite(self._gradient.clone(), "F.gradient()", self.dtype)

    # --- small matrices ----------------------------------------------------------------------------------------------

    def dense(self, max_params: int = 5000) -> Tensor:
        """The matrix itself, ``(P, P)``; refused above ``max_params`` with the size it would have."""
        if self.n_params > check_cap(max_params):
            size = readable_bytes(self.n_params**2 * self.dtype.itemsize)
            raise MemoryBudgetError(
                f"F.dense() of {self.n_params} parameters would take {size}; the cap is {max_params} parameters. Use F @ v, F.block(names) or "
                "fl.spectrum(F), which need no matrix, or raise max_params."
            )
        return finite(self.scores.dense() / self.total_weight, "F.dense()", self.dtype)

    def block(self, names: str | Sequence[str], max_params: int = 5000) -> Tensor:
        """The diagonal block of some layers or parameters (names or patterns), in layout order."""
        index = self.layout.index_of(names).to(self.device)
        if len(index) > check_cap(max_params):
            size = readable_bytes(len(index) ** 2 * self.dtype.itemsize)
            raise MemoryBudgetError(
                f"The block {names!r} of {len(index)} parameters would take {size}; the cap is {max_params}. Raise max_params."
            )
        return finite(self.scores.dense(index) / self.total_weight, f"The block {names!r} of F", self.dtype)

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
        """(F + λI)⁻¹ v, exact through the smaller of dense and Gram matrix, else by conjugate gradients.

        Parameters
        ----------
        v
            Flat, block or dict; the answer has the same form.
        damping
            λ > 0, in the units of the eigenvalues (nat).
        preconditioner
            An object with ``solve(v, damping)``; used, and conjugate gradients chosen, where given.
        return_info
            Also return a dict with ``method``, ``residual`` (relative, recomputed from F; one entry per vector), ``steps``, ``converged``.
        tol, max_steps
            Of conjugate gradients: relative residual (default 1e-10 in float64, 1e-5 in float32) and limit of steps.

        Notes
        -----
        Direct below an order of 6,000: Woodbury (1/λ)[v - Uᵀ(K + WλI)⁻¹ U v] with a float64 Cholesky factor that is kept for the same λ.
        A solve that misses its tolerance returns what it has with a ConvergenceWarning.
        """
        damping = check_damping(damping)
        check_iteration(tol, max_steps, preconditioner)
        info: dict[str, Any] = {}

        def damped(x: Tensor) -> Tensor:
            return self._product(x) + damping * x

        def apply(flat: Tensor) -> Tensor:
            if preconditioner is not None or not self.solver.direct:
                solution, found = self.solver.iterate(damped, flat, damping, preconditioner, tol, max_steps)
                info.update(found)
                return solution
            solution = self.solver.solve(flat, damping)
            info.update(method="dense" if self.solver.dense_side else "woodbury", steps=0)
            if return_info:
                norm = torch.linalg.vector_norm(flat, dim=0)
                info["residual"] = torch.linalg.vector_norm(damped(solution) - flat, dim=0) / norm.where(norm > 0, 1)
                info["converged"] = bool((info["residual"] < 1e-2).all())
            return solution

        solution = self._answer(v, apply)
        return (solution, info) if return_info else solution

    def natural_gradient(self, damping: float) -> Tensor:
        """(F + λI)⁻¹ g for the mean gradient g, flat ``(P,)``.

        For the exact and empirical kinds g lies in the row space, g = Uᵀd/W, and Uᵀ(K/W + λI)⁻¹d/W has none of Woodbury's
        cancellation: in float32 its error stays near 1e-7 however small λ is. The mc kind falls back to :meth:`solve`.
        """
        damping = check_damping(damping)
        gradient = self.gradient()
        d = self._gradient_coefficients
        if d is None or self.solver.dense_side or not self.solver.direct or not torch.isfinite(d).all():
            return self.solve(gradient, damping)
        return finite(self.solver.solve_row_space(d, damping), "F.natural_gradient()", self.dtype)

    def single_sample(self, seed: int) -> ScoreMatrix:
        """Score rows with R = 1: at labels drawn from the model for the exact kind, the first draw for mc, as they are for empirical.

        For the exact kind this is a combination of the captured columns, not another pass over the data.
        """
        c = torch.zeros(self.n_data, self.n_columns, dtype=self.dtype, device=self.device)
        if self.kind == "exact" and self._bound:  # without, the scores are not kept, and contract says so
            generator = torch.Generator().manual_seed(check_seed(seed))
            drawn = [
                bound.sampled_coefficients(
                    torch.rand(
                        len(bound.weight), bound.num_uniforms, generator=generator, dtype=torch.float64, device="cpu"
                    )
                )
                for bound in self._bound
            ]
            c = torch.cat(drawn)
        elif self.kind == "mc":
            c[:, 0] = self.n_columns**0.5
        else:
            c[:] = 1
        return self.scores.contract(c)

    # --- views -------------------------------------------------------------------------------------------------------

    def restrict(self, layers: str | Sequence[str]) -> Fisher:
        """The Fisher of some layers alone (a diagonal block of F, couplings between them included), sharing the captured scores."""
        names = named(layers)
        if not names:
            raise InputError("restrict takes at least one layer name; print(F.layout) lists them.")
        kept = [layer for layer in self.layout.layers if layer in {self.layout.layer(name) for name in names}]
        index = torch.cat([torch.arange(layer.start, layer.stop, device=self.device) for layer in kept])
        part = copy.copy(self)
        part.layout = self.layout.restrict([layer.name for layer in kept])
        part.plan = Plan([self.plan[layer.name] for layer in kept], self.n_data, self.n_columns, self.plan.budget)
        part.scores = self.scores.restrict([layer.name for layer in kept])
        part.parameters = self.parameters[index]
        part.origins = tuple(
            origin for origin, layer in zip(self.origins, self.layout.layers, strict=True) if layer in kept
        )
        part._gradient = None if self._gradient is None else self._gradient[index]
        part.solver = Solver(part.scores, part.total_weight)
        return part

    def damped(self, damping: float) -> DampedFisher:
        """F + λI as a lazy operator; F itself stays as it is."""
        return DampedFisher(self, check_damping(damping))

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """F as a ``scipy.sparse.linalg.LinearOperator`` on numpy vectors."""
        return to_scipy(self, self)


# ``help(Fisher)`` shows the arguments of __init__ rather than those that __new__ looks at.
Fisher.__signature__ = inspect.signature(Fisher.__init__).replace(
    parameters=list(inspect.signature(Fisher.__init__).parameters.values())[1:]
)
