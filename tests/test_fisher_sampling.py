"""What the three kinds mean: sampled labels, observed labels, and the divergence that the exact kind measures."""

from __future__ import annotations

import pytest
import torch
from fisher_checks import QUIET, ZOO, case, drawn_labels, error

import fisherlens as fl
from fisherlens import reference

pytestmark = pytest.mark.filterwarnings(QUIET)


def mc(name: str, seed: int = 0, draws: int = 1, data=None) -> fl.Fisher:
    model, own, likelihood = ZOO[name]()
    return fl.Fisher(model, data or own, likelihood=likelihood, kind="mc", mc_samples=draws, seed=seed)


@pytest.mark.parametrize("name", ["mlp_tanh", "segmentation", "bernoulli_two_outputs", "gaussian_three_outputs"])
def test_labels_are_drawn_once_and_follow_the_seed(name):
    F, again, other = mc(name, 3), mc(name, 3), mc(name, 4)
    V = case(name).vectors()
    assert torch.equal(F @ V, F @ V)
    assert torch.equal(F @ V, again @ V)
    assert error(other.dense(), F.dense()) > 1e-2
    assert error(mc(name, 3, draws=2).dense(), F.dense()) > 1e-3


@pytest.mark.parametrize("name", ["mlp_tanh", "segmentation", "bernoulli_two_outputs", "gaussian_three_outputs"])
def test_labels_do_not_depend_on_the_split_into_batches(name, monkeypatch):
    _, (x, y), _ = ZOO[name]()
    whole = mc(name, 1, draws=3).dense()
    for step in (1, 2, 3):
        batches = list(zip(x.split(step), y.split(step), strict=True))
        assert error(mc(name, 1, draws=3, data=batches).dense(), whole) < 1e-12
    monkeypatch.setattr("fisherlens.scores.collector._TRANSIENT", 1)
    assert error(mc(name, 1, draws=3).dense(), whole) < 1e-12


def test_mc_neither_reads_nor_moves_the_global_generator():
    state = torch.get_rng_state()
    first = mc("mlp_tanh").dense()
    assert torch.equal(torch.get_rng_state(), state)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        assert torch.equal(mc("mlp_tanh").dense(), first)


@pytest.mark.parametrize(
    "name", ["softmax_regression", "segmentation", "bernoulli_two_outputs", "gaussian_three_outputs"]
)
def test_mean_over_seeds_is_the_exact_fisher(name):
    """Every entry within 5 standard errors, and the errors small enough to see a wrong factor."""
    seeds = 150
    samples = torch.stack([mc(name, seed, draws=2).dense() for seed in range(seeds)])
    exact = case(name).matrix
    sem = samples.std(0) / seeds**0.5
    assert ((samples.mean(0) - exact).abs() <= 5 * sem + 1e-12).all()
    assert error(samples.mean(0), exact) < 0.16
    trace = samples.diagonal(dim1=1, dim2=2).sum(1)
    assert trace.std() / seeds**0.5 < 0.05 * exact.trace()


@pytest.mark.parametrize("name", ["softmax_regression", "bernoulli_two_outputs", "gaussian_three_outputs"])
def test_draws_narrow_the_estimate(name):
    exact = case(name).matrix
    far = sum(error(mc(name, seed).dense(), exact) for seed in range(10)) / 10
    near = sum(error(mc(name, seed, draws=100).dense(), exact) for seed in range(10)) / 10
    assert 0.05 < near / far < 0.2  # 1 / sqrt(100), within a factor of two


@pytest.mark.parametrize("draws", [1, 3])
def test_weighted_structured_labels_match_the_rule(draws):
    model, (x, y), _ = ZOO["segmentation"]()
    y = y.clone()
    y[0, 0, 0] = y[2] = -100
    likelihood = fl.Categorical(weight=[0.5, 2.0, 1.0])
    labels = drawn_labels(model, (x, y), likelihood, draws=draws, seed=8)
    F = fl.Fisher(model, (x, y), likelihood=likelihood, kind="mc", mc_samples=draws, seed=8)
    assert error(F.dense(), reference.mc_fisher(model, (x, y), likelihood, labels)) < 1e-12


@pytest.mark.parametrize("name", ["mlp_tanh", "conv_stride", "bernoulli_two_outputs", "gaussian_three_outputs"])
def test_empirical_is_not_the_fisher(name):
    """Nor the square of the mean gradient, nor a rescaled Fisher."""
    exact, empirical = case(name).fisher().dense(), case(name, "empirical").fisher().dense()
    assert error(empirical, exact) > 0.1
    g = case(name).gradient
    assert error(empirical, torch.outer(g, g)) > 0.1
    best = (empirical * exact).sum() / exact.square().sum()
    assert error(empirical, best * exact) > 0.1


def test_empirical_holds_the_mean_gradient():
    F = case("mlp_tanh", "empirical").fisher()
    weights = torch.full((F.n_rows,), 1 / F.n_data, dtype=F.dtype)
    assert error(F.scores.rmatmat(weights[:, None])[:, 0], F.gradient()) < 1e-12


@pytest.mark.parametrize(
    "name",
    [
        "softmax_regression",
        "mlp_tanh",
        "conv_stride",
        "segmentation",
        "bernoulli_two_outputs",
        "gaussian_three_outputs",
    ],
)
def test_fisher_is_the_curvature_of_the_divergence(name):
    """KL(p_θ ‖ p_θ+δ) → ½ δᵀFδ: the relative gap shrinks in proportion to δ, down to where KL itself is rounded."""
    c = case(name)
    F = c.fisher()
    inputs, targets = c.data
    direction = c.vectors(3)[:, 2]
    gaps = []
    for size in (1e-2, 1e-3, 1e-4):
        delta = size * direction / direction.norm()
        kl = reference.kl_divergence(c.model, None, delta, inputs, c.likelihood, targets)
        quadratic = (delta @ (F @ delta)).item() / 2
        assert quadratic > 0
        gaps.append(abs(kl / quadratic - 1))
    assert gaps[0] < 0.2
    assert gaps[1] < 0.2 * gaps[0]
    assert gaps[2] < 2e-3


def test_one_sample_scores():
    """The rows behind the permutation test: one per example, with the exact Fisher as their mean."""
    c = case("mlp_tanh")
    F = c.fisher()
    total = torch.zeros_like(c.matrix)
    for seed in range(400):
        sample = F.single_sample(seed)
        assert (sample.rows, sample.r) == (7, 1)
        total += sample.dense() / F.total_weight / 400
    assert error(total, c.matrix) < 0.15
    empirical = case("mlp_tanh", "empirical")
    assert error(empirical.fisher().single_sample(0).dense() / 7, empirical.matrix) < 1e-12
    sampled = case("mlp_tanh", "mc").fisher(mc_samples=1)
    assert error(sampled.single_sample(0).dense() / 7, sampled.dense()) < 1e-12
