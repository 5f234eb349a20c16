"""What a problem is: a model factory, training and test data, the likelihood, and what training tools may suggest for it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from fisherlens import errors
from fisherlens.errors import InputError, NonFiniteError
from fisherlens.likelihoods import Likelihood, as_likelihood
from fisherlens.training.loss import mean_loss

Pair = tuple[Tensor, Tensor]

TARGETS = ("train_loss", "test_loss", "test_accuracy")  # what a problem may set a target for


def check_pair(data: object, what: str) -> Pair:
    """Return ``(inputs, targets)`` after a look at their types, lengths and finiteness; ``what`` names them in errors."""
    if not (isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)):
        got = f"{type(data).__name__} of {len(data)}" if isinstance(data, tuple | list) else type(data).__name__
        raise TypeError(
            f"The {what} data must be a pair (inputs, targets) of tensors; got {got}. "
            "Stack a data set first, for example with torch.stack over its examples."
        )
    inputs, targets = data
    if inputs.ndim == 0 or targets.ndim == 0 or len(inputs) != len(targets) or len(inputs) == 0:
        raise InputError(
            f"The {what} data must hold one target per example and at least one example; got inputs of shape "
            f"{tuple(inputs.shape)} and targets of shape {tuple(targets.shape)}. Examples are counted along the first axis of both."
        )
    for name, tensor in (("inputs", inputs), ("targets", targets)):
        # NaN passes through both extremes; a mask of 150 million entries would take ten times as long
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            bad = (~torch.isfinite(tensor)).reshape(len(tensor), -1).any(1).nonzero()[0].item()
            raise NonFiniteError(
                f"The {what} {name} hold NaN or infinity, first in example {bad}. Clean or drop those examples first."
            )
    return inputs, targets


@dataclass(frozen=True, eq=False)
class Problem:
    """A model factory with the data and the likelihood that belong to it.

    Parameters
    ----------
    name
        A short name for tables and figures.
    description
        One sentence: which data, which network, how many parameters.
    factory
        Builds a new network, ``factory() -> nn.Module``, from the global random state, which :meth:`model` seeds and restores.
    train, test
        Pairs ``(inputs, targets)`` of tensors with the examples along the first axis.
    likelihood
        A name or a fisherlens likelihood; a loss is refused.
    batch_size
        Examples per step that suit the problem: a suggestion, which no tool is bound to.
    targets
        What a training run should reach, for tools that count the steps to it: any of ``"train_loss"``, ``"test_loss"`` (nat) and
        ``"test_accuracy"`` (share), each with a number.
    known_fisher
        Where the Fisher on the training data is known in closed form: a function ``model -> (P, P)`` tensor in the order of
        ``named_parameters()``. ``fisherlens.training.synthetic.known_fisher`` calls it.

    Raises
    ------
    InputError: pairs of unequal length, or empty; a target of another name, or not finite. NonFiniteError: NaN or infinity in the
    data. TypeError: a loss given as likelihood, a batch size that is no int.

    Examples
    --------
    >>> x = torch.linspace(-1, 1, 20)[:, None]
    >>> line = Problem("line", "A straight line.", lambda: nn.Linear(1, 1), (x, 2 * x), (x, 2 * x), "gaussian")
    >>> torch.equal(line.model(seed=3).weight, line.model(seed=3).weight)
    True
    """

    name: str
    description: str
    factory: Callable[[], nn.Module]
    train: Pair
    test: Pair
    likelihood: str | Likelihood = "categorical"
    batch_size: int = 64
    targets: Mapping[str, float] = field(default_factory=dict)
    known_fisher: Callable[[nn.Module], Tensor] | None = None

    def __post_init__(self) -> None:
        """Check the parts, so that a mistake shows here and not in the middle of a run."""
        as_likelihood(self.likelihood)
        check_pair(self.train, "training")
        check_pair(self.test, "test")
        object.__setattr__(self, "batch_size", check_count(self.batch_size, "batch_size"))
        for name, value in self.targets.items():
            if name not in TARGETS:
                hint = errors.nearest(name, TARGETS)
                raise InputError(errors.UNKNOWN_NAME.format(what="target", name=name, hint=hint))
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"The target for {name} must be a number; got {type(value).__name__} {value!r}.")
            if not math.isfinite(value):
                raise InputError(f"The target for {name} must be a finite number; got {value}. Leave it out instead.")

    def model(self, seed: int = 0) -> nn.Module:
        """Build a new network whose initial parameters depend on ``seed`` only; global random state is restored.

        The network stands as the factory left it, on the factory's device and in its mode.
        """
        with (
            seeded(check_seed(seed)),
            torch.inference_mode(False),
        ):  # a network made in inference mode could not be trained
            model = self.factory()
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"The factory of problem {self.name!r} must return a torch.nn.Module; got {type(model).__name__}. "
                "Give a function without arguments that builds and returns a new network."
            )
        return model

    def loss_fn(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean negative log-likelihood of the targets, in nat: the loss whose Fisher ``fl.Fisher`` describes."""
        return mean_loss(as_likelihood(self.likelihood), outputs, targets)

    def __repr__(self) -> str:
        return f"Problem({self.name!r}: {self.description})"


def check_count(value: object, name: str) -> int:
    """Return a number of examples or steps as an int, after a look at its type and sign; those out of numpy arrays are numbers too."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int; got {type(value).__name__} {value!r}.")
    if value < 1:
        raise InputError(f"{name} must be at least 1; got {value}.")
    return int(value)


def check_seeds(seeds: object) -> list[int]:
    """Return the seeds 0, 1, … of a number of them, or the seeds that are given, after a look at their types."""
    number = isinstance(seeds, numbers.Integral) and not isinstance(seeds, bool)
    if not number and (isinstance(seeds, str) or not isinstance(seeds, Sequence | np.ndarray)):
        raise TypeError(
            f"seeds must be a number of seeds or a sequence of them; got {type(seeds).__name__} {seeds!r}. "
            "Pass seeds=3 for 0, 1 and 2, or seeds=[3, 7]."
        )
    found = list(range(seeds)) if number else list(seeds)  # type: ignore[call-overload]
    return [check_seed(seed, f" in {seeds!r}") for seed in found]


def check_seed(seed: object, where: str = "") -> int:
    """Return a seed as an int, after a look at its type and size."""
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise TypeError(f"Every seed must be an int; got {type(seed).__name__} {seed!r}{where}.")
    if abs(seed) >= 2**48:
        raise InputError(f"Every seed must lie below 2**48, as others are made of it; got {seed}. Small numbers do.")
    return int(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generators for the length of a block, and give their state back afterwards.

    ``torch.manual_seed`` is avoided: it would also queue a seed for CUDA devices that nobody has touched yet.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield


@contextmanager
def trainable() -> Iterator[None]:
    """Compute gradients, whatever mode the caller is in: what is made in inference mode could not be trained."""
    with torch.inference_mode(False), torch.enable_grad():
        yield
