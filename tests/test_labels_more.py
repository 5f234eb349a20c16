"""How sampled labels are drawn, and what a row of the empirical kind is."""

from __future__ import annotations

import math

import pytest
import torch
from likelihood_checks import DTYPE, error, generator, network, randn, splits
from torch import Tensor, nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.scores.draws import Draws


def classifier(classes: int) -> nn.Module:
    return network(nn.Linear(2, classes))


def segmentation() -> tuple[nn.Module, Tensor, Tensor]:
    """Nine labels of three classes per example."""
    model = network(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 3, 1))
    return model, randn(6, 2, 4, 4), torch.randint(3, (6, 3, 3), generator=generator(2))


# --- stratified draws ------------------------------------------------------------------------------------------------


def test_every_stratum_is_drawn_from_once():
    u = Draws(5, 7, "stratified", seed=3).take(40)
    assert u.shape == (40, 5, 7)
    strata = (u * 7).floor().long()
    assert torch.equal(strata.sort(dim=-1).values, torch.arange(7).expand(40, 5, 7))
    assert len({tuple(order) for order in strata.reshape(-1, 7).tolist()}) > 190  # each term has an order of its own
    # the place within the stratum is uniform, and has nothing to do with which one it is
    inside = u * 7 - strata
    assert (inside.mean() - 0.5).abs() < 5 * math.sqrt(1 / 12 / inside.numel())
    together = ((strata.double() / 3 - 1) * (inside - 0.5)).mean()
    assert together.abs() < 5 * math.sqrt(4 / 9 / 12 / inside.numel())


@pytest.mark.parametrize("sampling", ["independent", "stratified"])
def test_uniform_numbers_do_not_depend_on_the_split(sampling):
    whole = Draws(3, 4, sampling, seed=1).take(20)
    parts = Draws(3, 4, sampling, seed=1)
    assert torch.equal(torch.cat([parts.take(n) for n in (1, 8, 0, 5, 6)]), whole)
    assert not torch.equal(Draws(3, 4, sampling, seed=2).take(20), whole)
    assert (whole >= 0).all()
    assert (whole < 1).all()


def test_the_last_stratum_stays_below_one(monkeypatch):
    draws = Draws(1, 3, "stratified", seed=0)
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, 1 - 2.0**-53, dtype=DTYPE))
    assert draws.take(1).max() == 1 - 2.0**-53


class Recorded(fl.ElementwiseLikelihood):
    """Uniform labels around f, which remembers the numbers that they were drawn from."""

    def __init__(self):
        self.seen: list[Tensor] = []

    def fisher_root(self, outputs: Tensor) -> Tensor:
        return torch.ones_like(outputs)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs - targets

    def sample(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        self.seen.append(uniforms)
        return outputs + uniforms


@pytest.mark.parametrize("sampling", ["independent", "stratified"])
def test_labels_are_bit_equal_under_any_split(sampling, monkeypatch):
    model, x = classifier(3), randn(12, 2)

    def seen(data, size: int = 12) -> Tensor:
        likelihood = Recorded()
        fl.Fisher(model, data, likelihood=likelihood, kind="mc", mc_samples=4, mc_sampling=sampling, seed=5)
        # the second four of a piece are drawn to test its scores
        return torch.cat([torch.stack(likelihood.seen[k : k + 4]) for k in range(0, len(likelihood.seen), 8)], dim=1)

    whole = seen((x, None))
    assert whole.shape == (4, 12, 3)
    assert torch.equal(seen([(part, None) for (part,) in splits(x)]), whole)
    monkeypatch.setattr("fisherlens.scores.collector._TRANSIENT", 400)
    assert torch.equal(seen((x, None)), whole)


def drawn(model: nn.Module, x: Tensor, draws: int, seed: int) -> Tensor:
    """Labels of a categorical output at the stratified numbers, by the cumulative distribution: ``(N, d1, …, S)``."""
    p = model(x).detach().softmax(1).movedim(1, -1)  # (N, d1, ..., C)
    u = Draws(p[0, ..., 0].numel(), draws, "stratified", seed).take(len(x)).reshape(*p.shape[:-1], draws)
    return (u[..., None] >= p.cumsum(-1)[..., None, :-1]).sum(-1)


@pytest.mark.parametrize("draws", [1, 5])
def test_stratified_fisher_against_the_reference(draws):
    model, x, y = segmentation()
    labels = drawn(model, x, draws, seed=4)
    truth = reference.mc_fisher(model, (x, y), "categorical", labels)
    options = {"likelihood": "categorical", "kind": "mc", "mc_samples": draws, "mc_sampling": "stratified", "seed": 4}
    F = fl.Fisher(model, (x, y), **options)
    assert error(F.dense(), truth) < 1e-12
    assert error(fl.Fisher(model, splits(x, y), **options).dense(), truth) < 1e-12
    assert F.mc_sampling == "stratified"
    assert "kind='mc', mc_sampling='stratified'" in repr(F)
    attrs = fl.spectrum(F).attrs
    assert (attrs["mc_samples"], attrs["mc_sampling"]) == (draws, "stratified")


def test_one_draw_is_the_same_either_way():
    model, x, y = segmentation()
    one = [
        fl.Fisher(model, (x, y), likelihood="categorical", kind="mc", seed=2, mc_sampling=sampling).dense()
        for sampling in ("independent", "stratified")
    ]
    assert torch.equal(*one)


def sampled(model: nn.Module, x: Tensor, likelihood: object, sampling: str, draws: int, seeds: int) -> Tensor:
    """Dense sampled Fishers of many seeds."""
    options = {"likelihood": likelihood, "kind": "mc", "mc_samples": draws, "mc_sampling": sampling, "progress": False}
    return torch.stack([fl.Fisher(model, (x, None), seed=seed, **options).dense() for seed in range(seeds)])


@pytest.mark.parametrize(
    ("build", "likelihood"),
    [
        (segmentation, "categorical"),
        (lambda: (classifier(12), randn(5, 2)), "categorical"),
        (lambda: (classifier(3), randn(5, 2)), fl.Gaussian([0.5, 1.0, 2.0])),
    ],
    ids=["nine terms", "many classes", "gaussian"],
)
def test_stratified_is_unbiased(build, likelihood):
    """vᵀF v within 5 standard errors, and F within 12 %: terms that shared their order of strata would be off by a factor.

    Single entries are no measure: those of rare classes are not normally distributed over 150 seeds.
    """
    model, x = build()[:2]
    found = sampled(model, x, likelihood, "stratified", draws=2, seeds=150)
    exact = reference.fisher(model, (x, None), likelihood)
    v = randn(len(exact), 6, seed=9)
    forms = ((found @ v) * v).sum(1)
    sem = forms.std(0) / math.sqrt(len(found))
    assert ((forms.mean(0) - (v * (exact @ v)).sum(0)).abs() < 5 * sem).all()
    assert error(found.mean(0), exact) < 0.12


def test_stratified_is_closer_for_many_classes():
    model, x = classifier(40), randn(4, 2)
    exact = fl.Fisher(model, (x, None), likelihood="categorical").dense()
    far, near = (
        (sampled(model, x, "categorical", sampling, draws=20, seeds=12) - exact).square().sum((1, 2)).mean()
        for sampling in ("independent", "stratified")
    )
    assert near < 0.6 * far


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "mc", "mc_sampling": "stratifed"}, "Unknown mc_sampling 'stratifed'. Did you mean 'stratified'?"),
        ({"kind": "mc", "mc_sampling": None}, "Unknown mc_sampling None"),
        ({"kind": "empirical", "rows": "examples"}, "Unknown rows 'examples'. Did you mean 'example'?"),
        ({"kind": "exact", "rows": "example"}, r"rows='example' goes with kind='empirical', .* got kind='exact'"),
        ({"kind": "mc", "rows": "example"}, r"rows='example' goes with kind='empirical', .* got kind='mc'"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message, unchanged):
    model, x, y = segmentation()
    with unchanged(model), pytest.raises(fl.InputError, match=message):
        fl.Fisher(model, (x, y), likelihood="categorical", **options)


# --- rows of the empirical kind --------------------------------------------------------------------------------------


def summed_rows(model: nn.Module, x: Tensor, y: Tensor, likelihood: object) -> tuple[Tensor, float]:
    """One row Σ_t √w_t s_t per example, from the reference's rows per term, and W."""
    U, total = reference.score_matrix(model, (x, y), likelihood, "empirical")
    return U.reshape(len(x), -1, U.shape[1]).sum(1), total


def weighted(y: Tensor) -> tuple[Tensor, fl.Categorical]:
    y = y.clone()
    y[1] = y[0, 0, 0] = -100
    return y, fl.Categorical(weight=[0.5, 2.0, 1.0])


@pytest.mark.parametrize("weights", ["none", "ignored", "classes"])
def test_rows_per_example_are_summed_scores(weights):
    model, x, y = segmentation()
    likelihood: object = "categorical"
    if weights != "none":
        y, likelihood = weighted(y)
        likelihood = likelihood if weights == "classes" else "categorical"
    U, total = summed_rows(model, x, y, likelihood)
    truth = U.T @ U / total
    by_term = fl.Fisher(model, (x, y), likelihood=likelihood, kind="empirical")
    assert error(by_term.dense(), reference.fisher(model, (x, y), likelihood, "empirical")) < 1e-12
    assert error(by_term.dense(), truth) > 0.1
    for data in ((x, y), splits(x, y)):
        F = fl.Fisher(model, data, likelihood=likelihood, kind="empirical", rows="example")
        assert F.total_weight == by_term.total_weight
        assert (F.n_columns, F.n_rows) == (1, 6 if weights == "none" else 5)
        assert error(F.dense(), truth) < 1e-12
        assert error(F @ torch.eye(F.n_params, dtype=DTYPE), truth) < 1e-12
        assert error(F.gradient(), by_term.gradient()) < 1e-12
        solution = torch.linalg.solve(truth + 0.01 * torch.eye(F.n_params, dtype=DTYPE), F.gradient())
        assert error(F.natural_gradient(0.01), solution) < 1e-9
    # the row-space form is used where it holds, and only there
    assert (F._gradient_coefficients is None) == (weights == "classes")


def test_rows_per_example_in_results_and_where_no_scores_are_kept():
    model, x, y = segmentation()
    F = fl.Fisher(model, (x, y), likelihood="categorical", kind="empirical", rows="example")
    assert "kind='empirical', rows='example'" in repr(F)
    assert fl.spectrum(F).attrs["rows"] == F.rows == "example"
    assert fl.spectrum(fl.Fisher(model, (x, y), likelihood="categorical", kind="empirical")).attrs["rows"] == "term"
    assert "rows" not in fl.spectrum(fl.Fisher(model, (x, y), likelihood="categorical")).attrs
    U, total = summed_rows(model, x, y, "categorical")
    assert error(F.single_sample(0).rows_at(torch.arange(6)), U) < 1e-12
    v = randn(F.n_params, 4, seed=3)
    streamed = fl.Fisher(
        model, splits(x, y), likelihood="categorical", kind="empirical", rows="example", memory=F.plan.nbytes // 3
    )
    assert {entry.path for entry in streamed.plan} <= {"streamed", "linearised"}
    assert error(streamed @ v, U.T @ (U @ v) / total) < 1e-12


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_rows_make_no_difference_where_an_example_is_one_term(likelihood):
    model, x = classifier(3), randn(6, 2)
    y = (randn(6, 3, seed=1) > 0).double()
    found = [
        fl.Fisher(model, (x, y), likelihood=likelihood, kind="empirical", rows=rows).dense()
        for rows in ("term", "example")
    ]
    assert torch.equal(*found)
