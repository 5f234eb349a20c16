"""What the claims are about: a network of a problem at some parameters, the data that F is taken on, and the operator that predicts."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fisherlens.errors import InputError, NonFiniteError, NumericalWarning, user_level
from fisherlens.fisher import Fisher
from fisherlens.layout import Layout
from fisherlens.likelihoods import Bernoulli, BoundLikelihood, Categorical, Gaussian, Likelihood, as_likelihood
from fisherlens.training.base import Pair, Problem, seeded
from fisherlens.training.loss import mean_loss
from fisherlens.training.record import Setting, device_of

OPERATOR = (
    "operator must be an operator with @ (a fl.Fisher, an approximation, fl.Operator), or a function of three arguments (model, data, likelihood) or "
    "of one, the fl.Fisher that it replaces, that returns one; got {got}."
)
_TRAINED = (Categorical, Bernoulli, Gaussian)  # whose loss training knows
_LOSS = "The claim needs the loss of {name!r}, and training knows that of Categorical, Bernoulli and Gaussian. Claims on the metric alone take any likelihood with a divergence."


@dataclass(frozen=True)
class Budget:
    """How much is spent, by preset; our choice, so that "quick" verifies digits-cnn with all claims in under three minutes on two cores.

    Attributes
    ----------
    num_examples
        Examples that F, losses and divergences are taken on.
    train_steps
        Mini-batch steps of Adam that lead to the parameters at which the analysis is made.
    gd_steps
        Full-batch steps by which a rate proves stable.
    num_steps
        Steps of each training run that is compared with others.
    rates
        Learning rates that are tried for each optimizer.
    """

    num_examples: int
    train_steps: int
    gd_steps: int
    num_steps: int
    rates: int


BUDGETS = {"quick": Budget(128, 100, 24, 60, 5), "full": Budget(256, 400, 100, 300, 9)}
_MOST_ROWS = {"quick": 2500, "full": 5000}  # of the score matrix, whose Gram matrix is decomposed
_OF_PARAMETERS = (
    "model",
    "layout",
    "theta",
    "true_fisher",
    "fisher",
    "gradient",
    "largest_eigenvalue",
    "damping",
    "_bound",
    "initial",
)


class Subject:
    """One seed of a problem; everything is computed once, on first use, and the user's own network and operator are never touched.

    Parameters
    ----------
    problem
        The problem.
    seed
        Seeds the initial parameters, the choice of examples, the batch order and what the claims draw.
    kind
        Of the Fisher that predicts.
    num_examples
        Examples that F is taken on, never more than there are; None for those of the preset, for all where there are at most twice as many,
        and for fewer where each has so many score columns that complete spectra would take long.
    operator
        Takes the place of the Fisher in every prediction: see :data:`OPERATOR`.
    preset
        ``"quick"`` or ``"full"``.
    budget
        In place of the preset's.
    damping
        λ of the claims that need one, in nat; None for a hundredth of the largest eigenvalue of the Fisher (our choice).
    device
        None leaves the network where the problem puts it.
    tick
        Called as ``tick(words)`` whenever some work is done.

    Attributes
    ----------
    problem, seed, kind, operator, preset, budget
        As given.
    """

    def __init__(
        self,
        problem: Problem,
        seed: int = 0,
        *,
        kind: str = "exact",
        num_examples: int | None = None,
        operator: Any = None,
        preset: str = "quick",
        budget: Budget | None = None,
        damping: float | None = None,
        device: torch.device | str | None = None,
        tick: Callable[[str], object] | None = None,
    ):
        self.problem, self.seed, self.kind, self.operator, self.preset = problem, seed, kind, operator, preset
        self.budget = BUDGETS[preset] if budget is None else budget
        self._num_examples = num_examples
        self.given_damping, self._device = damping, device
        self._tick = tick

    def tick(self, words: str = "") -> None:
        """Tell the progress bar that some work is done."""
        if self._tick is not None:
            self._tick(words)

    def generator(self, purpose: int = 0) -> torch.Generator:
        """A new CPU generator that depends on the seed and on what it is for; global random state is not read."""
        return torch.Generator().manual_seed(7919 * self.seed + purpose)

    @cached_property
    def initial(self) -> Subject:
        """The same before any training: parameters of ``problem.model(seed)``, same data, same operator."""
        other = copy.copy(self)
        for name in _OF_PARAMETERS:
            other.__dict__.pop(name, None)
        other.budget = Budget(**{**vars(self.budget), "train_steps": 0})
        return other

    # --- network and data --------------------------------------------------------------------------------------------

    @cached_property
    def likelihood(self) -> Likelihood:
        """Of the problem."""
        return as_likelihood(self.problem.likelihood)

    @cached_property
    def model(self) -> nn.Module:
        """A copy in eval mode and float64, after ``budget.train_steps`` mini-batch steps of Adam from ``problem.model(seed)``."""
        model = copy.deepcopy(self.problem.model(self.seed)).eval()
        model = model if self._device is None else model.to(self._device)
        if self.budget.train_steps and isinstance(self.likelihood, _TRAINED):
            _train(model, self.problem, self.likelihood, self.budget.train_steps, self.seed)
        return _in_float64(model, self.problem.train[0][:1])

    @cached_property
    def num_examples(self) -> int:
        """How many examples F is taken on."""
        inputs, targets = self.problem.train
        if self._num_examples is not None:
            return min(self._num_examples, len(inputs))
        few = self.budget.num_examples
        count = len(inputs) if len(inputs) <= 2 * few else few
        example, label = (_to(part[:1], self.model) for part in (inputs, targets))
        with torch.no_grad():
            columns = self.likelihood.bind(_logits(self.model(example)), label, at=slice(0, 1)).num_columns
        return max(min(count, 4), min(count, _MOST_ROWS[self.preset] // max(columns, 1)))

    @cached_property
    def data(self) -> Pair:
        """``num_examples`` of the training data, drawn by the seed, on the network's device and in its dtype."""
        inputs, targets = self.problem.train
        index = (
            torch.randperm(len(inputs), generator=self.generator(1), device="cpu")[: self.num_examples].sort().values
        )
        return _to(inputs[index.to(inputs.device)], self.model), _to(targets[index.to(targets.device)], self.model)

    @cached_property
    def layout(self) -> Layout:
        """Names, shapes and places of the parameters in flat vectors."""
        return Layout.from_model(self.model)

    @cached_property
    def theta(self) -> Tensor:
        """All parameters that require grad, flat ``(P,)``."""
        named = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        return self.layout.flatten(named).clone()

    def outputs(self, theta: Tensor) -> Tensor:
        """Outputs on the data at flat parameters; may hold NaN or infinity where those are far off."""
        with torch.no_grad():
            return _logits(functional_call(self.model, self.layout.unflatten(theta), (self.data[0],)))

    def loss(self, theta: Tensor) -> float:
        """Mean negative log-likelihood on the data at flat parameters, in nat; NaN or infinity where it has none."""
        self.require_loss()
        with torch.no_grad():
            return float(mean_loss(self.likelihood, self.outputs(theta), self.data[1]))

    def gradient_at(self, theta: Tensor) -> Tensor:
        """Gradient of :meth:`loss`, flat ``(P,)``."""
        return self.loss_and_gradient(theta)[1]

    def loss_and_gradient(self, theta: Tensor) -> tuple[float, Tensor]:
        """Both, for the price of the gradient."""
        self.require_loss()
        leaves = {name: value.clone().requires_grad_() for name, value in self.layout.unflatten(theta).items()}
        with torch.enable_grad():
            outputs = _logits(functional_call(self.model, leaves, (self.data[0],)))
            loss = mean_loss(self.likelihood, outputs, self.data[1])
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        pairs = zip(leaves.items(), found, strict=True)
        flat = self.layout.flatten({name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs})
        return loss.item(), flat

    @cached_property
    def gradient(self) -> Tensor:
        """Gradient at :attr:`theta`."""
        return self.gradient_at(self.theta)

    def require_loss(self) -> None:
        """Refuse a likelihood whose loss training does not know."""
        if not isinstance(self.likelihood, _TRAINED):
            raise InputError(_LOSS.format(name=self.likelihood.name))

    @cached_property
    def _bound(self) -> BoundLikelihood:
        return self.likelihood.bind(self.outputs(self.theta), self.data[1], "the data of the claims")

    def kl(self, theta: Tensor, other: Tensor) -> float:
        """Mean over the data of KL(p(y | f(x; θ)) ‖ p(y | f(x; θ'))) in nat, with the weights of F; infinite where an output is not finite."""
        bound = self._bound
        if theta is not self.theta:
            bound = self.likelihood.bind(self.outputs(theta), self.data[1], "the data of the claims")
        moved = self.outputs(other)
        if not torch.isfinite(moved).all():
            return float("inf")
        return float(bound.divergence(moved).sum() / bound.weight.sum())

    # --- operators ---------------------------------------------------------------------------------------------------

    @cached_property
    def true_fisher(self) -> Fisher:
        """The exact Fisher on the data at :attr:`theta`: what steps, solves and quadratic models are made of. ``operator`` never replaces it."""
        return Fisher(self.model, self.data, likelihood=self.likelihood, progress=False)

    @cached_property
    def fisher(self) -> Any:
        """What predicts: the Fisher of ``kind``, or the user's operator in its place."""
        if self.operator is None:
            if self.kind == "exact":
                return self.true_fisher
            return Fisher(
                self.model, self.data, likelihood=self.likelihood, kind=self.kind, seed=self.seed, progress=False
            )
        return resolve_operator(self.operator, self)

    def product(self, v: Tensor) -> Tensor:
        """``fisher @ v`` for a flat vector, whatever dtype and device the operator has."""
        F = self.fisher
        found = F @ v.to(getattr(F, "device", v.device), getattr(F, "dtype", v.dtype))
        found = found.to(v.device, v.dtype)
        if not torch.isfinite(found).all():
            raise NonFiniteError("The operator gave NaN or infinity. Look at where it was made.")
        return found

    @cached_property
    def largest_eigenvalue(self) -> float:
        """λ_max of the true Fisher, in nat."""
        from fisherlens.spectrum import top_eigenvalues

        return float(top_eigenvalues(self.true_fisher, 1, progress=False)["eigenvalue"][0])

    @cached_property
    def damping(self) -> float:
        """λ in nat."""
        if self.given_damping is not None:
            return self.given_damping
        return max(0.01 * self.largest_eigenvalue, 1e-12)


# --- helpers ---------------------------------------------------------------------------------------------------------


def resolve_operator(operator: Any, subject: Subject) -> Any:
    """The operator that a user gave, or that their function makes for this subject; checked for its order."""
    found = operator
    if not hasattr(operator, "__matmul__"):
        arity = _arity(operator)
        if arity not in (1, 3):
            raise TypeError(OPERATOR.format(got=type(operator).__name__))
        given = (subject.true_fisher,) if arity == 1 else (subject.model, subject.data, subject.likelihood)
        found = operator(*given)
    if isinstance(found, Tensor):
        from fisherlens.spectrum import Operator

        matrix = found
        found = Operator(lambda v: matrix @ v, len(matrix), matrix.dtype, matrix.device, block=True)
    if not hasattr(found, "__matmul__") or not hasattr(found, "shape"):
        raise TypeError(OPERATOR.format(got=f"a function that returns {type(found).__name__}"))
    if tuple(found.shape) != (len(subject.theta),) * 2:
        raise InputError(
            f"The operator must be of shape {(len(subject.theta),) * 2}, that of the Fisher of {subject.problem.name!r}; got {tuple(found.shape)}. "
            "Build it for the network of the problem: operator=lambda model, data, likelihood: ..."
        )
    return found


def _arity(function: Any) -> int:
    """Positional arguments that a function must be given; -1 where it is none, or none can be told."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return -1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


def _logits(answer: Any) -> Tensor:
    """The one tensor that a network returned, as ``fl.Fisher`` takes it."""
    if isinstance(answer, Tensor):
        return answer
    return answer["logits"] if isinstance(answer, dict) else answer.logits


def _to(part: Tensor, model: nn.Module) -> Tensor:
    """A part of the data where the network is, and real numbers in its dtype."""
    part = part.to(device_of(model))
    return part.to(next(model.parameters()).dtype) if part.is_floating_point() else part


def _in_float64(model: nn.Module, example: Tensor) -> nn.Module:
    """The network in float64, in which a divergence of 1e-16 nat can still be seen; as it is where it does not run so."""
    wide = copy.deepcopy(model).double()
    x = example.to(device_of(model))
    try:
        with torch.no_grad():
            wide(x.double() if x.is_floating_point() else x)
    except RuntimeError as error:
        warnings.warn(
            f"The network does not run in float64 ({error}), so the claims are checked in its own dtype: small divergences are then rounding.",
            NumericalWarning,
            stacklevel=user_level(),
        )
        return model
    return wide


def _train(model: nn.Module, problem: Problem, likelihood: Likelihood, steps: int, seed: int) -> None:
    """Mini-batch steps of Adam at rate 0.005 (our choice), in eval mode, in a batch order of their own."""
    inputs, targets = problem.train
    device, dtype = device_of(model), next(model.parameters()).dtype
    setting = Setting(problem.train, None, likelihood, steps, problem.batch_size, steps)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    batches = setting.batches(seed)
    with seeded(seed), torch.enable_grad():
        for _ in range(steps):
            index = next(batches)
            x, y = inputs[index.to(inputs.device)].to(device), targets[index.to(targets.device)].to(device)
            optimizer.zero_grad()
            outputs = _logits(model(x.to(dtype) if x.is_floating_point() else x))
            likelihood.bind(outputs.detach(), y, "the training data")  # labels that do not fit are told, not met
            mean_loss(likelihood, outputs, y).backward()
            optimizer.step()
    model.zero_grad(set_to_none=True)
