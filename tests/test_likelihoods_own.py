"""A likelihood of one's own: the how-to's Poisson, mistakes in such a class, and one that is not elementwise."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from likelihood_checks import DTYPE, assert_unbiased, dense_twin, empirical_twin, error, generator, mlp, randn, splits
from torch import Tensor, nn

import fisherlens as fl
from fisherlens.likelihoods import as_likelihood

HOWTO = Path(__file__).parents[1] / "docs" / "howto" / "own_likelihood.md"


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
        assert outputs.dtype == uniforms.dtype == DTYPE
        assert outputs.device.type == "cpu"
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
    assert Wrong().bind(outputs, None).sampled_score(u).dtype == torch.float32
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

    class Narrow(fl.Gaussian):
        """A family by another constructor."""

    assert Narrow(0.1).name == "gaussian"
    assert Wrong().name == "wrong"
    assert Quantile().name == "pinball"
    assert fl.ElementwiseLikelihood.name == ""
