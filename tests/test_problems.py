import random
import re

import numpy as np
import pytest
import torch
from torch import nn

from fisherlens.errors import InputError, NonFiniteError
from fisherlens.likelihoods import Bernoulli, Categorical, Gaussian
from fisherlens.training import Problem, problem, problems

NAMES = [
    "digits-mlp",
    "digits-cnn",
    "digits-autoencoder",
    "fashion-mlp",
    "fashion-cnn",
    "mnist-lenet",
    "mnist-autoencoder",
    "cifar-vgg",
    "cifar-resnet",
    "linear-gaussian",
    "logistic",
    "softmax-regression",
]


def random_states():
    return torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes(), random.getstate()  # noqa: NPY002


def line(**changes):
    x = torch.linspace(-1, 1, 6)[:, None]
    settings = {"factory": lambda: nn.Linear(1, 1), "train": (x, 2 * x), "test": (x, 2 * x), "likelihood": "gaussian"}
    return Problem("line", "A straight line.", **(settings | changes))


@pytest.mark.parametrize(("name", "shape", "n_params"), [("digits-cnn", (1, 8, 8), 5530), ("digits-mlp", (64,), 2410)])
def test_digits_are_complete_scaled_and_split_by_class(name, shape, n_params):
    before = random_states()
    digits = problem(name)
    model = digits.model(seed=0)
    assert random_states() == before
    (x, y), (test_x, test_y) = digits.train, digits.test
    assert x.shape == (1437, *shape)
    assert test_x.shape == (360, *shape)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert (x.min(), x.max()) == (0, 1)
    assert torch.equal(x * 16, (x * 16).round())  # the sixteen grey levels, scaled exactly
    every = y.bincount() + test_y.bincount()
    assert every.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as scikit-learn describes the set
    assert (test_y.bincount() / every - 0.2).abs().max() < 0.005
    assert sum(p.numel() for p in model.parameters()) == n_params
    assert model(x[:3]).shape == (3, 10)
    assert digits.likelihood == "categorical"
    assert f"{n_params:,} parameters" in digits.description


def test_the_split_never_changes():
    digits = problem("digits-mlp")
    assert digits.train[1][:20].tolist() == [3, 9, 1, 3, 1, 9, 4, 4, 2, 8, 3, 5, 1, 1, 9, 3, 8, 7, 7, 3]
    assert digits.test[1][:20].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6, 6, 4, 5, 8, 1, 3, 5, 6]
    assert torch.equal(problem("digits-cnn").train[0].flatten(1), digits.train[0])
    rows = torch.cat([digits.train[0], digits.test[0]]).unique(dim=0)
    assert len(rows) == 1797  # no picture twice, none on both sides


def test_the_autoencoder_is_asked_for_the_grey_levels_it_sees():
    digits = problem("digits-autoencoder")
    x, targets = digits.train
    assert torch.equal(x, problem("digits-mlp").train[0])
    assert torch.equal(x, targets)
    assert digits.likelihood == "bernoulli"
    model = digits.model(0)
    assert model(x[:3]).shape == (3, 64)
    assert sum(p.numel() for p in model.parameters()) == 4744
    x.zero_()
    assert targets.sum() > 0


def test_a_subset_is_balanced_and_fixed():
    few = problem("digits-cnn", num_train=50, num_test=30)
    assert few.train[1].bincount().tolist() == [5] * 10
    assert few.test[1].bincount().tolist() == [3] * 10
    assert few.description.startswith("Handwritten digits 8 x 8 (scikit-learn), 50 to train on and 30 to test: ")
    assert few.batch_size == 50
    assert torch.equal(few.train[0], problem("digits-cnn", num_train=50).train[0])
    whole = problem("digits-cnn")
    assert torch.equal(problem("digits-cnn", num_train=1437).train[0], whole.train[0])
    rows = {bytes(image.numpy()) for image in whole.train[0]}
    assert {bytes(image.numpy()) for image in few.train[0]} < rows
    assert torch.equal(problem("digits-autoencoder", num_train=50).train[0], few.train[0].flatten(1))
    assert whole.targets == {"train_loss": 0.1, "test_accuracy": 0.95}
    assert few.targets == {}  # what was reached with all data says nothing about fifty examples


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"num_train": 1438},
            InputError,
            "num_train must be at most 1,437, the train examples of the digits; got 1,438. ",
        ),
        ({"num_test": 0}, InputError, "num_test must be at least 1; got 0."),
        ({"num_test": 2.0}, TypeError, "num_test must be an int; got float 2.0."),
        ({"num_train": True}, TypeError, "num_train must be an int; got bool True."),
        (
            {"version": "jpeg"},
            InputError,
            "version goes with data that come in several forms, those of 'cifar-vgg' and 'cifar-resnet'; got 'jpeg' for 'digits-cnn'.",
        ),
    ],
)
def test_wrong_options_are_named(options, error, text):
    with pytest.raises(error, match=f"^{re.escape(text)}"):
        problem("digits-cnn", **options)


def test_a_problem_of_ones_own_goes_where_names_go():
    own = line()
    assert problem(own) is own
    expected = (
        "num_train chooses data of a ready problem, and 'line' brings its own. Leave it out, or choose the data where the problem is "
        "built."
    )
    with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
        problem(own, num_train=3, version="jpeg")


def test_suggestions_are_checked():
    assert (line().batch_size, line().targets, line().known_fisher) == (64, {}, None)
    assert line(targets={"train_loss": 1.0}, batch_size=3).targets == {"train_loss": 1.0}
    with pytest.raises(
        InputError, match=r"^Unknown target 'train_los'\. Did you mean 'train_loss'\? Known: 'train_loss', "
    ):
        line(targets={"train_los": 1.0})
    with pytest.raises(InputError, match=r"^The target for test_loss must be a finite number; got nan\. "):
        line(targets={"test_loss": float("nan")})
    with pytest.raises(InputError, match=r"^batch_size must be at least 1; got 0\.$"):
        line(batch_size=0)


def test_each_call_gives_its_own_tensors():
    problem("digits-mlp").train[0].fill_(7)
    assert problem("digits-mlp").train[0].max() == 1


def test_the_dense_layer_of_the_cnn_is_fed_by_sixteen_positions():
    model = problem("digits-cnn").model()
    seen = {}
    model.pool.register_forward_hook(lambda module, args, out: seen.update(shape=out.shape))
    model(problem("digits-cnn").train[0][:2])
    assert seen["shape"] == (2, 16, 4, 4)
    assert model.hidden.in_features == 16 * 4 * 4


def test_a_model_depends_on_its_seed_only():
    digits = problem("digits-cnn")
    first = digits.model(seed=3).state_dict()
    generator = torch.Generator().manual_seed(1)
    torch.set_rng_state(generator.get_state())
    again, other = digits.model(seed=3).state_dict(), digits.model(seed=4).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_a_factory_that_fails_leaves_the_random_state():
    def broken():
        torch.rand(3)
        raise RuntimeError("no network today")

    before = random_states()
    with pytest.raises(RuntimeError, match="no network today"):
        line(factory=broken).model()
    assert random_states() == before


def test_loss_is_the_mean_negative_log_likelihood():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (5, 3), generator=generator)
    labels[0, 0] = -100
    weight = torch.tensor([0.5, 1.0, 3.0, 2.0], dtype=torch.float64)
    log_p = logits.log_softmax(1)
    terms = [(weight[labels[n, t]], log_p[n, labels[n, t], t]) for n in range(5) for t in range(3) if (n, t) != (0, 0)]
    expected = -sum(w * lp for w, lp in terms) / sum(w for w, _ in terms)
    loss = line(likelihood=Categorical(weight=weight)).loss_fn(logits, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    moved = line(likelihood=Categorical(weight=weight, class_axis=-1)).loss_fn(logits.movedim(1, -1), labels)
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=0)

    outputs = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    values = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    variance = torch.tensor([0.5, 2.0], dtype=torch.float64)
    normal = torch.distributions.Normal(outputs, variance.sqrt())
    loss = line(likelihood=Gaussian(variance)).loss_fn(outputs, values)
    torch.testing.assert_close(loss, -normal.log_prob(values).sum(1).mean(), rtol=1e-12, atol=0)

    bits = (values > 0).double()
    bernoulli = torch.distributions.Bernoulli(logits=outputs)
    loss = line(likelihood="bernoulli").loss_fn(outputs, bits)
    torch.testing.assert_close(loss, -bernoulli.log_prob(bits).sum(1).mean(), rtol=1e-12, atol=0)
    loss = line(likelihood=Bernoulli(pos_weight=3.0)).loss_fn(outputs, bits)
    expected = -(bernoulli.log_prob(bits) * (1 + 2 * bits)).sum(1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_the_gradient_of_the_loss_is_that_of_the_bound_likelihood():
    generator = torch.Generator().manual_seed(2)
    outputs = torch.randn(7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (7,), generator=generator)
    cases = [
        (Categorical(weight=[1.0, 0.5, 4.0]), labels),
        (Bernoulli(pos_weight=2.0), torch.randint(0, 2, (7, 3), generator=generator).double()),
        (Gaussian(0.3), torch.randn(7, 3, generator=generator, dtype=torch.float64)),
    ]
    for likelihood, targets in cases:
        (gradient,) = torch.autograd.grad(line(likelihood=likelihood).loss_fn(outputs, targets), outputs)
        bound = likelihood.bind(outputs, targets)
        torch.testing.assert_close(gradient, bound.loss_gradient() / bound.weight.sum(), rtol=1e-10, atol=1e-14)


def test_problems_lists_names_and_descriptions():
    listed = problems()
    assert set(listed) == set(NAMES)
    for name in ("digits-cnn", "digits-autoencoder", "logistic"):
        assert listed[name] == problem(name).description
    assert repr(problem("digits-mlp")) == f"Problem('digits-mlp': {listed['digits-mlp']})"


def test_an_unknown_problem_names_the_nearest():
    expected = (
        f"Unknown problem 'digits-cn'. Did you mean 'digits-cnn'? Known: {', '.join(map(repr, NAMES))}. "
        "For your own network and data build fl.Problem(...)."
    )
    with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
        problem("digits-cn")
    with pytest.raises(InputError, match=r"^Unknown problem 'cifar-vg'\. Did you mean 'cifar-vgg'\? "):
        problem("cifar-vg")
    with pytest.raises(TypeError, match=r"^A problem is a fl\.Problem or the name of a ready one; got int\.$"):
        problem(3)


X = torch.zeros(4, 2)
BAD = X.clone()
BAD[2, 1] = torch.nan


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        (
            {"train": (X, X[:3])},
            InputError,
            "The training data must hold one target per example and at least one example; got inputs of shape (4, 2) and targets of "
            "shape (3, 2). Examples are counted along the first axis of both.",
        ),
        (
            {"test": (X[:0], X[:0])},
            InputError,
            "The test data must hold one target per example and at least one example; got inputs of shape (0, 2) and targets of "
            "shape (0, 2). Examples are counted along the first axis of both.",
        ),
        (
            {"train": (BAD, X)},
            NonFiniteError,
            "The training inputs hold NaN or infinity, first in example 2. Clean or drop those examples first.",
        ),
        (
            {"test": [X, X, X]},
            TypeError,
            "The test data must be a pair (inputs, targets) of tensors; got list of 3. Stack a data set first, for example with "
            "torch.stack over its examples.",
        ),
        (
            {"train": X},
            TypeError,
            "The training data must be a pair (inputs, targets) of tensors; got Tensor. Stack a data set first, for example with "
            "torch.stack over its examples.",
        ),
    ],
    ids=["lengths", "empty", "nan", "three", "no pair"],
)
def test_a_problem_checks_its_data(changes, error, text):
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        line(**changes)


def test_a_problem_checks_likelihood_and_factory():
    with pytest.raises(TypeError, match=r"got MSELoss\. .* use likelihood='gaussian'"):
        line(likelihood=nn.MSELoss())
    expected = (
        "The factory of problem 'line' must return a torch.nn.Module; got int. "
        "Give a function without arguments that builds and returns a new network."
    )
    with pytest.raises(TypeError, match=f"^{re.escape(expected)}$"):
        line(factory=lambda: 3).model()
