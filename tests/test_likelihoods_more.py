"""Likelihoods beyond the three of the loss functions: variance per example, predicted variance, and one's own."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import fill
from torch import Tensor, nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.likelihoods import as_likelihood
from fisherlens.training.loss import mean_loss

DTYPE = torch.float64
HOWTO = Path(__file__).parents[1] / "docs" / "howto" / "own_likelihood.md"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=DTYPE)


def network(*layers: nn.Module) -> nn.Module:
    return fill(nn.Sequential(*layers).double(), generator(1))


def mlp(outputs: int = 2, hidden: int = 4) -> nn.Module:
    return network(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def image(channels: int = 2) -> nn.Module:
    return network(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, channels, 1))


def error(found: Tensor, truth: Tensor) -> float:
    assert truth.norm() > 0
    return ((found - truth).norm() / truth.norm()).item()


def splits(x: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    """The data in three unequal batches."""
    sizes = [1, len(x) - 4, 3]
    return list(zip(*(values.split(sizes) for values in (x, *others)), strict=True))


def dense_twin(model: nn.Module, x: Tensor, H: Tensor) -> Tensor:
    """(1/N) Σ_n J_nᵀ H_n J_n for H ``(N, E, E)``."""
    J = reference.jacobian(model, x).reshape(len(x), -1, sum(p.numel() for p in model.parameters()))  # (N, E, P)
    return torch.einsum("nep,nef,nfq->pq", J, H, J) / len(x)


def empirical_twin(model: nn.Module, x: Tensor, y: Tensor, loss: Any) -> tuple[Tensor, Tensor]:
    """(1/N) Σ_n g_n g_nᵀ and (1/N) Σ_n g_n from the gradient of each example's loss, one backward pass each."""
    rows = []
    for n in range(len(x)):
        grads = torch.autograd.grad(loss(model(x[n : n + 1]), y[n : n + 1]), list(model.parameters()))
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    rows = torch.stack(rows)
    return rows.T @ rows / len(x), rows.mean(0)


def assert_unbiased(
    model: nn.Module, data: Any, likelihood: Any, truth: Tensor, draws: int = 150, **options: Any
) -> None:
    """The sampled Fisher meets the exact one in the mean of several directions, within 5 standard errors."""
    v = randn(len(truth), 4, seed=9)
    found = []
    for seed in range(draws):
        F = fl.Fisher(model, data, likelihood=likelihood, kind="mc", seed=seed, progress=False, **options)
        found.append(((F @ v) * v).sum(0))
    found = torch.stack(found)
    sem = found.std(0) / math.sqrt(draws)
    assert (sem > 0).all()
    assert ((found.mean(0) - (v * (truth @ v)).sum(0)).abs() < 5 * sem).all()


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


# --- one's own -------------------------------------------------------------------------------------------------------


def blocks_of(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The names that the how-to's code defines."""
    names: dict[str, Any] = {"print": lambda *_: None}
    blocks = blocks_of(HOWTO)
    assert len(blocks) == 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for block in blocks:
            exec(compile(block, str(HOWTO), "exec"), names)  # noqa: S102 - the page's own code is what is tested
    return names


def test_the_how_to_is_short_and_says_what_it_prints(page):
    definition = blocks_of(HOWTO)[0]
    assert len(definition.strip().splitlines()) <= 26
    assert repr(page["F"]).startswith("Fisher(kind='exact', likelihood='poisson', P=26, N=40, R=2, ")
    assert 0.003 < page["error"] < 0.03


def poisson_nll(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.poisson_nll_loss(outputs, targets, log_input=True, reduction="sum")


def test_poisson_against_its_dense_twin(page):
    model, x, y, F = (page[name] for name in ("model", "x", "y", "F"))
    truth = dense_twin(model, x, torch.diag_embed(model(x).detach().exp()))
    assert error(F.dense(), truth) < 1e-12
    assert error(F @ torch.eye(26, dtype=DTYPE), truth) < 1e-12
    empirical, gradient = empirical_twin(model, x, y, poisson_nll)
    assert error(F.gradient(), gradient) < 1e-12
    F_empirical = fl.Fisher(model, splits(x, y), likelihood=page["Poisson"](), kind="empirical")
    assert error(F_empirical.dense(), empirical) < 1e-12
    assert (
        error(F.natural_gradient(1e-3), torch.linalg.solve(truth + 1e-3 * torch.eye(26, dtype=DTYPE), gradient)) < 1e-9
    )
    assert error(page["step"], F.natural_gradient(1e-3)) < 1e-9


def test_poisson_sampled_is_unbiased(page):
    model, x = page["model"], page["x"]
    truth = dense_twin(model, x, torch.diag_embed(model(x).detach().exp()))
    assert_unbiased(model, (x, None), page["Poisson"](), truth)


def test_poisson_in_other_analyses(page):
    """Scores at sampled labels come from the captured columns."""
    F = page["F"]
    coupling = fl.coupling(F, "layer", num_null=20, seed=1)
    assert 0 < coupling["p_value"].values[0, 1] <= 1
    bound = page["Poisson"]().bind(page["model"](page["x"]), page["y"])
    u = torch.rand(40, 2, generator=generator(), dtype=DTYPE)
    assert error(bound.column(0)[:, 0] * bound.sampled_coefficients(u)[:, 0], bound.sampled_score(u)[:, 0]) < 1e-12


def test_poisson_labels_do_not_depend_on_device_dtype_or_ends_of_the_interval(page):
    outputs = torch.tensor([[0.3], [1.7]])
    bound = page["Poisson"]().bind(outputs, None)
    ends = torch.tensor([[0.0], [1 - 2.0**-53]], dtype=DTYPE)
    labels = bound.draw(ends)
    assert labels.dtype == torch.float32
    assert labels[0] == 0
    assert 20 < labels[1] < 100


def test_poisson_refuses(page):
    Poisson = page["Poisson"]
    outputs = torch.zeros(3, 2)
    with pytest.raises(fl.InputError, match="Counts must be whole numbers >= 0; the data holds others"):
        Poisson().bind(outputs, torch.full((3, 2), 0.5))
    with pytest.raises(
        fl.InputError, match=r"Poisson targets must have the shape of the outputs, \(3, 2\); the data holds \(3,\)"
    ):
        Poisson().bind(outputs, torch.zeros(3))
    with pytest.raises(fl.NonFiniteError, match="Poisson targets hold NaN"):
        Poisson().bind(outputs, torch.full((3, 2), torch.nan))
    with pytest.raises(
        fl.NonFiniteError,
        match=r"Poisson\.fisher_root gave NaN or infinity, first at \(0, 0\) of its batch, where the output is 200",
    ):
        Poisson().bind(outputs + 200, None)
    with pytest.raises(fl.NonFiniteError, match="output is NaN or infinite"):
        Poisson().bind(outputs / 0, None)
    with pytest.raises(fl.InputError, match="The observed labels are needed here, but the targets are None"):
        Poisson().bind(outputs, None).observed_score()
    with pytest.raises(fl.InputError, match="targets are None, but the empirical kind"):
        fl.Fisher(page["model"], (page["x"], None), likelihood=Poisson(), kind="empirical")


class Wrong(fl.ElementwiseLikelihood):
    """Answers with what it is given."""

    def __init__(self, root: Any = 1.0, score: Any = 1.0, sample: Any = 1.0):
        self.given = {"fisher_root": root, "score": score, "sample": sample}

    def _answer(self, name: str, outputs: Tensor) -> Any:
        value = self.given[name]
        return torch.full_like(outputs, value) if isinstance(value, float) else value

    def fisher_root(self, outputs: Tensor) -> Tensor:
        return self._answer("fisher_root", outputs)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._answer("score", outputs)

    def sample(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        assert (uniforms > 0).all()
        assert (uniforms < 1).all()
        return self._answer("sample", outputs)


def test_mistakes_in_an_own_likelihood_are_named():
    outputs, u = torch.zeros(3, 2), torch.zeros(3, 2, dtype=DTYPE)
    with pytest.raises(TypeError, match=r"Wrong\.fisher_root must return a tensor; it returned list"):
        Wrong(root=[1]).bind(outputs, None)
    with pytest.raises(
        fl.InputError,
        match=r"Wrong\.fisher_root must return one value per output element, shape \(3, 2\); it returned \(2,\)",
    ):
        Wrong(root=torch.ones(2)).bind(outputs, None)
    with pytest.raises(fl.InputError, match=r"Wrong\.fisher_root must be >= 0, .* it gave -1 in the data"):
        Wrong(root=-1.0).bind(outputs, None)
    with pytest.raises(fl.NonFiniteError, match=r"Wrong\.score gave NaN"):
        Wrong(score=math.nan).bind(outputs, outputs).observed_score()
    with pytest.raises(fl.InputError, match=r"Wrong\.sample must return one value .* returned \(2, 3\)"):
        Wrong(sample=torch.ones(2, 3)).bind(outputs, None).sampled_score(u)
    with pytest.raises(fl.InputError, match=r"Wrong\.fisher_root is 0 where the score at a sampled label is not"):
        Wrong(root=0.0).bind(outputs, None).sampled_coefficients(u)
    assert Wrong(root=0.0).bind(outputs, outputs).gradient_coefficients().isnan().all()
    assert (Wrong(root=0.0, score=0.0).bind(outputs, outputs).gradient_coefficients() == 0).all()
    with pytest.raises(TypeError, match=r"got the class Wrong\. Make one of it: Wrong\(\)"):
        fl.Fisher(mlp(), (randn(4, 3), None), likelihood=Wrong)
    with pytest.raises(TypeError, match=r"got PoissonNLLLoss\. .*docs/howto/own_likelihood\.md has Poisson"):
        as_likelihood(nn.PoissonNLLLoss())
    with pytest.raises(TypeError, match=r"got GaussianNLLLoss\. .*use likelihood='heteroscedastic_gaussian'"):
        as_likelihood(nn.GaussianNLLLoss())


class Correlated(fl.Likelihood):
    """y ~ N(f, Σ) with a full Σ, and a weight per example: what is not elementwise, with all the defaults."""

    def __init__(self, covariance: Tensor, weight: float = 1.0, columns: int | None = None):
        self.covariance, self.weight, self.columns = covariance, weight, columns

    def bind(self, outputs, targets, where="the data", at=None):
        return BoundCorrelated(self, outputs, targets)


class BoundCorrelated(fl.BoundLikelihood):
    def __init__(self, likelihood, outputs, targets):
        n, C = outputs.shape
        columns = likelihood.columns or C
        weight = torch.full((n, 1), likelihood.weight, dtype=DTYPE)
        super().__init__(outputs, num_columns=columns, num_uniforms=C, weight=weight)
        self.precision = torch.linalg.inv(likelihood.covariance)
        self.root = torch.linalg.cholesky(self.precision) * likelihood.weight**0.5
        self.scale, self.std, self.targets = (
            likelihood.weight**0.5,
            torch.linalg.cholesky(likelihood.covariance),
            targets,
        )

    def column(self, r):
        return self.root[:, r].expand_as(self.outputs)

    def sampled_score(self, uniforms):
        return -self.scale * torch.special.ndtri(uniforms) @ self.std.T @ self.precision

    def observed_score(self, term=None):
        return self.scale * (self.outputs - self.targets) @ self.precision


def test_a_likelihood_that_is_not_elementwise():
    model, x, y = mlp(3), randn(8, 3), randn(8, 3, seed=5)
    A = randn(3, 3, seed=6)
    covariance = A @ A.T + torch.eye(3, dtype=DTYPE)
    precision = torch.linalg.inv(covariance)
    truth = dense_twin(model, x, precision.expand(8, 3, 3))
    loss = lambda f, t: ((f - t) @ precision * (f - t)).sum() / 2  # noqa: E731
    empirical, gradient = empirical_twin(model, x, y, loss)
    for weight in (1.0, 2.5):  # a weight that all examples share leaves the mean as it is
        likelihood = Correlated(covariance, weight)
        F = fl.Fisher(model, (x, y), likelihood=likelihood)
        assert F.likelihood.name == "correlated"
        assert error(F.dense(), truth) < 1e-12
        assert error(F.gradient(), gradient) < 1e-12
        assert (
            error(F.natural_gradient(0.01), torch.linalg.solve(truth + 0.01 * torch.eye(31, dtype=DTYPE), gradient))
            < 1e-10
        )
        assert error(fl.Fisher(model, (x, y), likelihood=likelihood, kind="empirical").dense(), empirical) < 1e-12
        bound = likelihood.bind(model(x), y)
        u = torch.rand(8, 3, generator=generator(), dtype=DTYPE)
        columns = torch.stack([bound.column(r) for r in range(3)], dim=-1)
        rebuilt = (columns * bound.sampled_coefficients(u)[:, None]).sum(-1)
        assert error(rebuilt, bound.sampled_score(u)) < 1e-12
    assert_unbiased(model, (x, None), likelihood, truth)


def test_columns_that_miss_a_direction_are_named():
    likelihood = Correlated(torch.eye(3, dtype=DTYPE), columns=2)
    bound = likelihood.bind(randn(4, 3), randn(4, 3, seed=1))
    with pytest.raises(fl.InputError, match="A sampled score of BoundCorrelated is not a combination of its columns"):
        bound.sampled_coefficients(torch.rand(4, 3, generator=generator(), dtype=DTYPE))
    assert bound.gradient_coefficients().isnan().all()


def test_names_of_own_likelihoods():
    class Quantile(Wrong):
        name = "pinball"

    assert Wrong().name == "wrong"
    assert Quantile().name == "pinball"
    assert fl.ElementwiseLikelihood.name == ""
