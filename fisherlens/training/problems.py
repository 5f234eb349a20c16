"""Ready problems: a model factory, training and test data, and the likelihood, under one name."""

from __future__ import annotations

import functools
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fisherlens import errors
from fisherlens.errors import InputError, NonFiniteError
from fisherlens.likelihoods import Likelihood, as_likelihood
from fisherlens.training.loss import mean_loss

Pair = tuple[Tensor, Tensor]


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
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
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

    Raises
    ------
    InputError: pairs of unequal length, or empty. NonFiniteError: NaN or infinity in the data. TypeError: a loss given as likelihood.

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

    def __post_init__(self) -> None:
        """Check the parts, so that a mistake shows here and not in the middle of a run."""
        as_likelihood(self.likelihood)
        check_pair(self.train, "training")
        check_pair(self.test, "test")

    def model(self, seed: int = 0) -> nn.Module:
        """Build a new network whose initial parameters depend on ``seed`` only; global random state is restored.

        The network stands as the factory left it, on the factory's device and in its mode.
        """
        with seeded(seed):
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


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Load scikit-learn's 1,797 handwritten digits as (train x, test x, train y, test y), always split the same way."""
    state = random.getstate()
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    random.setstate(state)  # something that scikit-learn imports draws a number when it is first imported
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)  # grey levels 0..16 become 0..1, exactly
    return tuple(train_test_split(images, labels, test_size=360, stratify=labels, random_state=0))


def _digits_problem(name: str, factory: Callable[[], nn.Module], shape: tuple[int, ...]) -> Problem:
    train_x, test_x, train_y, test_y = _digits()
    pairs = [
        (torch.tensor(x).reshape(-1, *shape), torch.tensor(y, dtype=torch.int64))  # copies: nobody can spoil the cache
        for x, y in ((train_x, train_y), (test_x, test_y))
    ]
    return Problem(name, _PROBLEMS[name][0], factory, *pairs, likelihood="categorical")


def _digits_mlp() -> nn.Module:
    layers = [("hidden", nn.Linear(64, 32)), ("tanh", nn.Tanh()), ("output", nn.Linear(32, 10))]
    return nn.Sequential(OrderedDict(layers))


def _digits_cnn() -> nn.Module:
    # The dense layer is fed by a flattened 16 x 4 x 4 map: with 16 positions CW-NGD still cuts it per source channel.
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(1, 8, 3, padding=1)),
        ("relu1", nn.ReLU()),
        ("conv2", nn.Conv2d(8, 16, 3, padding=1)),
        ("relu2", nn.ReLU()),
        ("pool", nn.MaxPool2d(2)),
        ("flatten", nn.Flatten()),
        ("hidden", nn.Linear(256, 16)),
        ("relu3", nn.ReLU()),
        ("output", nn.Linear(16, 10)),
    ]
    return nn.Sequential(OrderedDict(layers))


_PROBLEMS: dict[str, tuple[str, Callable[[], Problem]]] = {
    "digits-cnn": (
        "Handwritten digits 8 x 8 (scikit-learn, 1,437 to train on and 360 to test), 10 classes: two convolutions and two dense "
        "layers with ReLU, 5,530 parameters.",
        lambda: _digits_problem("digits-cnn", _digits_cnn, (1, 8, 8)),
    ),
    "digits-mlp": (
        "The same digits as rows of 64 grey levels: 64-32-10 with tanh, 2,410 parameters.",
        lambda: _digits_problem("digits-mlp", _digits_mlp, (64,)),
    ),
}


def problem(name: str) -> Problem:
    """Build one of the ready problems: a model factory, training and test data, and the likelihood.

    Parameters
    ----------
    name
        One of :func:`problems`, such as ``"digits-cnn"`` or ``"digits-mlp"``.

    Returns
    -------
    A :class:`Problem`. Inputs are float32 in [0, 1], shape ``(N, 1, 8, 8)`` for the CNN and ``(N, 64)`` for the MLP; targets are
    class indices. The split is stratified by class and never changes.

    Raises
    ------
    InputError: an unknown name, with the nearest known one.

    Notes
    -----
    The digits are those that scikit-learn installs with itself (UCI "Optical Recognition of Handwritten Digits", test part):
    nothing is downloaded. Networks and split are our choice.

    Examples
    --------
    >>> digits = problem("digits-mlp")
    >>> digits.train[0].shape, digits.test[1].shape
    (torch.Size([1437, 64]), torch.Size([360]))
    """
    if name not in _PROBLEMS:
        raise InputError(
            errors.UNKNOWN_NAME.format(what="problem", name=name, hint=errors.nearest(name, _PROBLEMS))
            + " For your own network and data build fl.Problem(...)."
        )
    return _PROBLEMS[name][1]()


def problems() -> dict[str, str]:
    """List the ready problems as a dict name → description, without loading any data.

    Examples
    --------
    >>> list(problems())
    ['digits-cnn', 'digits-mlp']
    """
    return {name: description for name, (description, _) in _PROBLEMS.items()}
