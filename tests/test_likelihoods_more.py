"""Normally distributed outputs whose variance differs between examples, or is predicted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from likelihood_checks import (
    DTYPE,
    assert_unbiased,
    dense_twin,
    empirical_twin,
    error,
    generator,
    image,
    mlp,
    network,
    randn,
    splits,
)
from torch import Tensor, nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.training.loss import mean_loss

# --- variance per example --------------------------------------------------------------------------------------------


def spread(*shape: int, seed: int = 7) -> Tensor:
    """Variances between 0.1 and 3."""
    return 0.1 + 2.9 * torch.rand(shape, generator=generator(seed), dtype=DTYPE)


@pytest.mark.parametrize("shape", [(), (2,), (1,), (9, 1), (9, 2), (1, 2)])
def test_gaussian_variance_by_its_number_of_axes(shape):
    """A scalar, one per output, one per example, one each; (1, 2) counts a data set of one example."""
    model, x, y = mlp(), randn(9, 3), randn(9, 2, seed=2)
    if shape == (1, 2):
        x, y = x[:1], y[:1]
    likelihood = fl.Gaussian(spread(*shape))
    for kind in ("exact", "empirical"):
        truth = reference.fisher(model, (x, y), likelihood, kind)
        for data in ((x, y), splits(x, y) if len(x) > 1 else [(x, y)]):
            F = fl.Fisher(model, data, likelihood=likelihood, kind=kind)
            assert error(F.dense(), truth) < 1e-12
            assert error(F.gradient(), reference.gradient(model, (x, y), likelihood)) < 1e-12


def test_gaussian_variance_per_example_follows_the_data_order():
    model, x, y = mlp(), randn(9, 3), randn(9, 2, seed=2)
    variance = spread(9, 1)
    F = fl.Fisher(model, (x, y), likelihood=fl.Gaussian(variance))
    order = torch.randperm(9, generator=generator())
    moved = fl.Fisher(model, (x[order], y[order]), likelihood=fl.Gaussian(variance[order]))
    assert error(moved.dense(), F.dense()) < 1e-12
    wrong = fl.Fisher(model, (x[order], y[order]), likelihood=fl.Gaussian(variance))
    assert error(wrong.dense(), F.dense()) > 1e-3


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # of forward mode in torch
@pytest.mark.parametrize(
    ("path", "outputs", "hidden", "memory"), [("linearised", 40, 4, 20_000), ("streamed", 2, 64, 4_000)]
)
def test_gaussian_variance_per_example_where_no_scores_are_kept(path, outputs, hidden, memory):
    model, x, y = mlp(outputs, hidden), randn(30, 3), randn(30, outputs, seed=2)
    likelihood = fl.Gaussian(spread(30, 1))
    truth = reference.fisher(model, (x, y), likelihood)
    F = fl.Fisher(model, splits(x, y), likelihood=likelihood, memory=memory)
    assert {entry.path for entry in F.plan} == {path}
    v = randn(F.n_params, 4, seed=3)
    for k in (1, 4):
        assert error(F @ v[:, :k], truth @ v[:, :k]) < 1e-12
    assert error(F.diagonal(), truth.diagonal()) < 1e-12


def test_gaussian_variance_per_example_in_pieces(monkeypatch):
    monkeypatch.setattr("fisherlens.scores.collector._TRANSIENT", 2_000)  # a few examples at a time
    model, x, y = mlp(), randn(30, 3), randn(30, 2, seed=2)
    likelihood = fl.Gaussian(spread(30, 1))
    assert (
        error(fl.Fisher(model, (x, y), likelihood=likelihood).dense(), reference.fisher(model, (x, y), likelihood))
        < 1e-12
    )


@pytest.mark.parametrize("shape", [(5, 1, 1, 1), (5, 2, 3, 3), (5, 1, 3, 1), (2, 1, 1), (3,), (3, 3)])
def test_gaussian_variance_of_maps(shape):
    model, x = image(2), randn(5, 2, 4, 4)
    y = randn(5, 2, 3, 3, seed=4)
    likelihood = fl.Gaussian(spread(*shape))
    assert (
        error(
            fl.Fisher(model, splits(x, y), likelihood=likelihood).dense(), reference.fisher(model, (x, y), likelihood)
        )
        < 1e-12
    )


def test_gaussian_variance_of_one_number_per_example():
    """Outputs (N,): a variance of shape (N,) has as many axes."""
    model, x, y = network(nn.Linear(3, 1), nn.Flatten(0)), randn(9, 3), randn(9)
    likelihood = fl.Gaussian(spread(9))
    assert (
        error(
            fl.Fisher(model, splits(x, y), likelihood=likelihood).dense(), reference.fisher(model, (x, y), likelihood)
        )
        < 1e-12
    )


def test_gaussian_variance_per_example_sampled_is_unbiased():
    model, x, y = mlp(), randn(9, 3), randn(9, 2, seed=2)
    likelihood = fl.Gaussian(spread(9, 2))
    assert_unbiased(model, splits(x, y), likelihood, reference.fisher(model, (x, y), likelihood))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((8, 1), r"variance of shape \(8, 1\) gives 8 examples a variance, but the data hold 9"),
        (
            (10, 1),
            r"variance of shape \(10, 1\) gives 10 examples a variance, but the data hold 9\. .* leave it out: \(2,\)",
        ),
        (
            (1, 2),
            r"variance of shape \(1, 2\) gives 1 examples a variance, but the data hold 9\. .* leave it out: \(2,\)",
        ),
        (
            (9,),
            r"broadcast against one example's outputs of shape \(2,\), .* got shape \(9,\) .* per example give variance of shape \(N, 1\)",
        ),
        ((9, 3), r"or have a first axis for the examples, \(N, …\) with 2 axes; got shape \(9, 3\)"),
        ((9, 1, 1), r"got shape \(9, 1, 1\)"),
    ],
)
def test_gaussian_variance_that_does_not_fit_is_named(shape, message, unchanged):
    model, x, y = mlp(), randn(9, 3), randn(9, 2, seed=2)
    for data in ((x, y), splits(x, y)):
        with unchanged(model), pytest.raises(fl.InputError, match=message):
            fl.Fisher(model, data, likelihood=fl.Gaussian(torch.ones(shape)))


def test_gaussian_variance_per_example_needs_to_know_the_examples():
    likelihood, outputs, y = fl.Gaussian(spread(4, 1)), randn(4, 2), randn(4, 2, seed=1)
    message = r"A variance per example, of shape \(4, 1\), belongs to one data set in its order"
    with pytest.raises(fl.InputError, match=message):
        likelihood.bind(outputs, y)
    with pytest.raises(fl.InputError, match=message):
        mean_loss(likelihood, outputs, y)
    bound = likelihood.bind(outputs[1:3], y[1:3], at=slice(1, 3))
    assert error(bound.observed_score(), (outputs - y)[1:3] / likelihood.variance[1:3]) < 1e-12
    with pytest.raises(fl.InputError, match=r"but the data holds 3 outputs for examples 1\.\.2"):
        likelihood.bind(outputs[:3], y[:3], at=slice(1, 3))
    with pytest.raises(fl.InputError, match=r"variance must be finite and > 0; got -1\.0 at \(1, 0\)"):
        fl.Gaussian([[1.0], [-1.0]])
    with pytest.raises(fl.InputError, match=r"variance must be finite and > 0; got 0\.0\. It is a variance"):
        fl.Gaussian(0)


# --- predicted variance ----------------------------------------------------------------------------------------------


def nll(outputs: Tensor, targets: Tensor, axis: int = 1) -> Tensor:
    mean, h = outputs.chunk(2, axis)
    return ((h + (targets - mean).square() * (-h).exp()) / 2).sum()


def expected_hessian(f: Tensor) -> Tensor:
    """E_y of the autograd Hessian of -log p(y | f) for one example's f = (μ, log v), exact by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    half = len(f) // 2
    total = torch.zeros(len(f), len(f), dtype=DTYPE)
    for z, w in zip(nodes, weights / math.sqrt(2 * math.pi), strict=True):
        y = f[:half] + z * (f[half:] / 2).exp()  # the labels are independent, and H holds no products of them
        total += w * torch.autograd.functional.hessian(lambda g, y=y: nll(g[None], y[None]), f)
    return total


def hetero_case() -> tuple[nn.Module, Tensor, Tensor]:
    return mlp(4), randn(9, 3), randn(9, 2, seed=2)


def test_predicted_variance_is_the_expected_hessian():
    model, x, y = hetero_case()
    H = torch.stack([expected_hessian(f) for f in model(x).detach()])
    truth = dense_twin(model, x, H)
    F = fl.Fisher(model, (x, y), likelihood=fl.HeteroscedasticGaussian())
    assert error(F.dense(), truth) < 1e-12
    assert error(F @ torch.eye(F.n_params, dtype=DTYPE), truth) < 1e-12
    assert F.n_columns == 4
    assert F.rank_bound == min(F.n_params, 36)
    named = fl.Fisher(model, splits(x, y), likelihood="heteroscedastic_gaussian")
    assert error(named.dense(), truth) < 1e-12
    without = fl.Fisher(model, (x, None), likelihood=fl.HeteroscedasticGaussian())
    assert torch.equal(without.dense(), F.dense())


def test_predicted_variance_scores_and_gradient():
    model, x, y = hetero_case()
    truth, gradient = empirical_twin(model, x, y, nll)
    F = fl.Fisher(model, (x, y), likelihood=fl.HeteroscedasticGaussian(), kind="empirical")
    assert error(F.dense(), truth) < 1e-12
    assert error(F.gradient(), gradient) < 1e-12
    exact = fl.Fisher(model, (x, y), likelihood=fl.HeteroscedasticGaussian())
    assert error(exact.gradient(), gradient) < 1e-12
    truth = torch.linalg.solve(exact.dense() + 1e-2 * torch.eye(exact.n_params, dtype=DTYPE), gradient)
    assert error(exact.natural_gradient(1e-2), truth) < 1e-10


def test_predicted_variance_on_a_named_axis():
    model, x = network(nn.Linear(3, 4), nn.Unflatten(1, (2, 2))), randn(8, 3)
    flat = network(nn.Linear(3, 4))
    y = randn(8, 2, 1, seed=3)  # (N, 2, 2) with the halves on axis 2
    loss = lambda f, t: nll(f, t, axis=2)  # noqa: E731
    for axis in (2, -1):
        F = fl.Fisher(model, (x, y), likelihood=fl.HeteroscedasticGaussian(axis), kind="empirical")
        assert error(F.dense(), empirical_twin(model, x, y, loss)[0]) < 1e-12
    f = flat(x).detach()  # μ0 h0 μ1 h1
    H = torch.diag_embed(torch.stack([(-f[:, 1]).exp(), 0.5 + 0 * f[:, 0], (-f[:, 3]).exp(), 0.5 + 0 * f[:, 0]], dim=1))
    assert (
        error(fl.Fisher(model, (x, y), likelihood=fl.HeteroscedasticGaussian(2)).dense(), dense_twin(flat, x, H))
        < 1e-12
    )


def test_predicted_variance_on_maps():
    model, x = image(2), randn(5, 2, 4, 4)
    y = randn(5, 1, 3, 3, seed=4)
    truth, gradient = empirical_twin(model, x, y, nll)
    F = fl.Fisher(model, (x, y), likelihood=fl.HeteroscedasticGaussian(), kind="empirical")
    assert error(F.dense(), truth) < 1e-12
    assert error(F.gradient(), gradient) < 1e-12
    h = model(x).detach()[:, 1].flatten(1)
    H = torch.diag_embed(torch.cat([(-h).exp(), 0.5 + 0 * h], dim=1))
    assert (
        error(fl.Fisher(model, (x, y), likelihood=fl.HeteroscedasticGaussian()).dense(), dense_twin(model, x, H))
        < 1e-12
    )


def test_predicted_variance_sampled_is_unbiased():
    model, x, _ = hetero_case()
    truth = fl.Fisher(model, (x, None), likelihood=fl.HeteroscedasticGaussian()).dense()
    assert_unbiased(model, (x, None), fl.HeteroscedasticGaussian(), truth)


@pytest.mark.parametrize(
    "likelihood", [fl.HeteroscedasticGaussian(), fl.Gaussian([0.3, 2.0, 1.0, 0.1]), fl.Bernoulli()]
)
def test_sampled_coefficients_rebuild_the_sampled_scores(likelihood):
    outputs = randn(6, 4)
    bound = likelihood.bind(outputs, None)
    u = torch.rand(6, bound.num_uniforms, generator=generator(), dtype=DTYPE)
    columns = torch.stack([bound.column(r) for r in range(bound.num_columns)], dim=-1)
    rebuilt = (columns * bound.sampled_coefficients(u)[:, None]).sum(-1)
    assert error(rebuilt, bound.sampled_score(u)) < 1e-12


def test_predicted_variance_float32():
    model, x, y = hetero_case()
    truth = fl.Fisher(model, (x, y), likelihood=fl.HeteroscedasticGaussian()).dense()
    found = fl.Fisher(model.float(), (x.float(), y.float()), likelihood=fl.HeteroscedasticGaussian()).dense()
    assert found.dtype == torch.float32
    assert error(found.double(), truth) < 1e-4


def test_predicted_variance_refuses_what_does_not_fit():
    x, y = randn(6, 3), randn(6, 1)
    for outputs, axis in ((3, 1), (2, 0), (2, 2), (2, -2)):
        with pytest.raises(
            fl.InputError, match=rf"two halves of axis {axis}; the data.* gave outputs of shape \(6, {outputs}\)"
        ):
            fl.Fisher(mlp(outputs), (x, y), likelihood=fl.HeteroscedasticGaussian(axis))
    message = r"shape of the means, \(6, 1\), for outputs of shape \(6, 2\); the data.* holds \(6,\)\. .*unsqueeze\(1\)"
    with pytest.raises(fl.InputError, match=message):
        fl.Fisher(mlp(2), (x, y[:, 0]), likelihood=fl.HeteroscedasticGaussian())
    with pytest.raises(TypeError, match="axis must be an integer"):
        fl.HeteroscedasticGaussian(axis=1.0)
    outputs = torch.zeros(3, 2)
    outputs[1, 1] = -200
    with pytest.raises(
        fl.NonFiniteError, match=r"overflows in the data, first at its example 1, .* log-variance is -200"
    ):
        fl.HeteroscedasticGaussian().bind(outputs, None)
    with pytest.raises(fl.NonFiniteError, match="HeteroscedasticGaussian targets hold NaN"):
        fl.HeteroscedasticGaussian().bind(torch.zeros(3, 2), torch.full((3, 1), torch.nan))
