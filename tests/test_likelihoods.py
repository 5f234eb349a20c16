"""Likelihoods in output space: roots, scores, coefficients and draws, from moderate to extreme logits."""

from __future__ import annotations

import math

import pytest
import torch
from fisher_checks import error
from torch import Tensor
from torch.nn import functional

import fisherlens as fl
from fisherlens import reference
from fisherlens.errors import NonFiniteError
from fisherlens.likelihoods import BoundLikelihood, HeteroscedasticGaussian, as_likelihood

TOLERANCE = 1e-12
EXTREME = [-80.0, -40.0, -3.0, 0.0, 3.0, 40.0, 80.0]


def normal(*shape: int, seed: int = 0, scale: float = 1.5) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(*shape: int, c: int = 4, seed: int = 1) -> Tensor:
    return torch.randint(c, shape, generator=torch.Generator().manual_seed(seed))


def binary(*shape: int) -> Tensor:
    return classes(*shape, c=2).double()


CASES = {
    "softmax": (fl.Categorical(), normal(6, 4), classes(6)),
    "softmax of two": (fl.Categorical(), normal(6, 2), classes(6, c=2)),
    "softmax, weights": (fl.Categorical(weight=[0.5, 2.0, 1.0, 3.0]), normal(6, 4), classes(6)),
    "softmax, zero weight": (fl.Categorical(weight=[0.5, 0.0, 1.0, 3.0]), normal(6, 4), classes(6)),
    "softmax, ignored": (fl.Categorical(ignore_index=2), normal(6, 4), classes(6)),
    "softmax by position": (fl.Categorical(), normal(3, 4, 2, 2), classes(3, 2, 2)),
    "softmax by position, all settings": (
        fl.Categorical(weight=[0.5, 2.0, 1.0, 3.0], ignore_index=1, class_axis=-1),
        normal(3, 5, 4),
        classes(3, 5),
    ),
    "bernoulli": (fl.Bernoulli(), normal(5, 3), binary(5, 3)),
    "bernoulli, one": (fl.Bernoulli(), normal(5, 1), binary(5, 1)),
    "bernoulli, flat": (fl.Bernoulli(), normal(5), binary(5)),
    "bernoulli, image": (fl.Bernoulli(), normal(4, 1, 2, 3), binary(4, 1, 2, 3)),
    "bernoulli, pos_weight": (fl.Bernoulli([0.5, 2.0, 7.0]), normal(5, 3), binary(5, 3)),
    "bernoulli, soft": (fl.Bernoulli(3.0), normal(5, 3), normal(5, 3, seed=4).sigmoid()),
    "gaussian": (fl.Gaussian(), normal(5, 3), normal(5, 3, seed=2)),
    "gaussian, variance": (fl.Gaussian(0.2), normal(5, 3), normal(5, 3, seed=2)),
    "gaussian, variances": (fl.Gaussian([0.2, 3.0, 1.0]), normal(5, 3), normal(5, 3, seed=2)),
    "gaussian, image": (fl.Gaussian(torch.tensor([[0.2], [2.0]])), normal(5, 2, 3), normal(5, 2, 3, seed=2)),
}


def bound_of(name: str, dtype: torch.dtype = torch.float64):
    likelihood, outputs, targets = CASES[name]
    targets = targets.to(dtype) if targets.is_floating_point() else targets
    return likelihood.bind(outputs.to(dtype), targets)


def flat(x: Tensor) -> Tensor:
    """``(N, E)``, also for one element without an axis."""
    return x.reshape(len(x), -1)


def root(bound) -> Tensor:
    """All columns, ``(N, E, R)``."""
    return torch.stack([flat(bound.column(r)) for r in range(bound.num_columns)], dim=-1)


def output_fisher(name: str) -> Tensor:
    """Σ_t w_t H_t of each example in the plain shape of the outputs, ``(N, E, E)``."""
    likelihood, outputs, targets = CASES[name]
    t = reference.terms(outputs, likelihood, targets)
    H = t.weight[..., None, None] * reference.output_fisher(outputs, likelihood, targets)  # (N, T, C, C)
    n, e = len(outputs), outputs[0].numel()
    places = reference.by_term(torch.arange(n * e).reshape(outputs.shape), outputs, likelihood) % e  # (N, T, C)
    out = torch.zeros(n, e, e, dtype=outputs.dtype)
    for k in range(n):
        for here, block in zip(places[k], H[k], strict=True):
            out[k][here[:, None], here] = block
    return out


@pytest.mark.parametrize("name", CASES)
def test_columns_are_a_root_of_the_output_fisher(name):
    S = root(bound_of(name))
    assert error(S @ S.mT, output_fisher(name)) < TOLERANCE
    assert error(root(bound_of(name, torch.float32)), S) < 1e-6


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_curvature_is_the_output_fisher(name, dtype):
    bound, H = bound_of(name, dtype), output_fisher(name)
    changes = torch.randn(3, *bound.outputs.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = bound.curvature(changes.to(dtype))
    assert found.shape == changes.shape
    expected = torch.einsum("nij,knj->kni", H, changes.reshape(3, len(H), -1)).view_as(changes)
    assert error(found, expected) < (TOLERANCE if dtype == torch.float64 else 2e-6)
    default = BoundLikelihood.curvature(bound, changes.to(dtype))
    assert error(default, expected) < (TOLERANCE if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("name", CASES)
def test_rows_and_terms(name):
    bound = bound_of(name)
    n, (likelihood, outputs, _) = len(bound.outputs), CASES[name]
    kept = bound.kept_rows()
    assert kept.shape == (n, bound.num_columns)
    assert bound.weight.dtype == torch.float64
    assert bound.weight.shape == (n, bound.num_terms)
    empty = root(bound).square().sum(1) == 0
    assert not (empty & kept).any()
    assert empty[~kept].all()
    rank = torch.linalg.matrix_rank(output_fisher(name), rtol=1e-9).max()
    assert rank <= likelihood.rank_per_term(outputs.shape) * bound.num_terms


@pytest.mark.parametrize("name", CASES)
def test_loss_gradient_is_that_of_the_torch_loss(name):
    likelihood, outputs, targets = CASES[name]
    leaf = outputs.clone().requires_grad_()
    if isinstance(likelihood, fl.Categorical):
        logits = leaf.movedim(likelihood.class_axis, 1)
        loss = functional.cross_entropy(
            logits, targets, weight=likelihood.weight, ignore_index=likelihood.ignore_index, reduction="sum"
        )
    elif isinstance(likelihood, fl.Bernoulli):
        loss = functional.binary_cross_entropy_with_logits(
            leaf, targets, pos_weight=likelihood.pos_weight, reduction="sum"
        )
    else:
        loss = functional.gaussian_nll_loss(leaf, targets, likelihood.variance.expand_as(leaf), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, leaf)
    bound = bound_of(name)
    assert error(bound.loss_gradient(), gradient) < TOLERANCE
    # the same as a combination of the columns, and of the observed scores
    assert error(torch.einsum("ner,nr->ne", root(bound), bound.gradient_coefficients()), flat(gradient)) < TOLERANCE
    d = bound.observed_coefficients()
    if d is None:
        assert isinstance(likelihood, fl.Bernoulli)
        assert likelihood.pos_weight is not None
    else:
        terms = torch.stack([flat(bound.observed_score(t)) for t in range(bound.num_terms)], dim=-1)
        assert error(torch.einsum("net,nt->ne", terms, d), flat(gradient)) < TOLERANCE
        assert error(terms.sum(-1), flat(bound.observed_score())) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_sampled_scores(name):
    bound = bound_of(name)
    g = torch.Generator().manual_seed(3)
    n = len(bound.outputs)
    S = root(bound)
    draws, total = 1500, torch.zeros_like(output_fisher(name))
    mean = torch.zeros_like(bound.outputs)
    for k in range(draws):
        uniforms = torch.rand(n, bound.num_uniforms, generator=g, dtype=torch.float64)
        score = bound.sampled_score(uniforms)
        if k < 20:
            c = bound.sampled_coefficients(uniforms)
            assert c.shape == (n, bound.num_columns)
            assert error(torch.einsum("ner,nr->ne", S, c), flat(score)) < TOLERANCE
        mean += score / draws
        each = flat(score)
        total += each[:, :, None] * each[:, None] / draws
    truth = output_fisher(name)
    assert error(total, truth) < 0.2
    assert mean.square().sum() < 25 * truth.diagonal(dim1=1, dim2=2).sum() / draws


def test_draws_are_the_inverse_of_the_distribution_function():
    """u in [0, 1) picks the first class whose cumulative probability exceeds it; the ends are safe."""
    p = torch.tensor([[0.2, 0.0, 0.5, 0.3]], dtype=torch.float64)
    bound = fl.Categorical().bind(p.log().clamp(min=-800), None)
    for u, label in ((0.0, 0), (0.1, 0), (0.199, 0), (0.2001, 2), (0.699, 2), (0.7001, 3), (1 - 2**-53, 3)):
        score = bound.sampled_score(torch.tensor([[u]], dtype=torch.float64))
        assert error(score, p - functional.one_hot(torch.tensor([label]), 4)) < 1e-12, u
    bound = fl.Bernoulli().bind(torch.zeros(1, 3, dtype=torch.float64), None)
    u = torch.tensor([[0.0, 0.499, 0.501]], dtype=torch.float64)
    assert error(bound.sampled_score(u), torch.tensor([[-0.5, -0.5, 0.5]], dtype=torch.float64)) < TOLERANCE
    bound = fl.Gaussian(4.0).bind(torch.zeros(1, 3, dtype=torch.float64), None)
    u = torch.tensor([[0.0, 0.5, 0.975]], dtype=torch.float64)
    score = bound.sampled_score(u)
    assert torch.isfinite(score).all()
    assert score[0, 1] == 0
    assert score[0, 2].item() == pytest.approx(-1.959963984540054 / 2)


# --- extremes --------------------------------------------------------------------------------------------------------


def all_pairs() -> Tensor:
    """Logits of three classes with every combination of extreme values, ``(343, 3)``."""
    grid = torch.tensor(EXTREME, dtype=torch.float64)
    return torch.cartesian_prod(grid, grid, grid)


def test_extreme_softmax_in_float32():
    logits = all_pairs()
    exact = fl.Categorical().bind(logits, None)
    single = fl.Categorical().bind(logits.float(), None)
    for r in range(2):
        a, b = exact.column(r), single.column(r)
        assert torch.isfinite(b).all()
        assert error(b, a) < 1e-6
        # each entry by itself, as small ones meet large coefficients
        assert ((b.double() - a).abs() <= 2e-5 * a.abs() + 1e-44).all()
    # the curvature too: what is left of classes of probability 1 is not a difference of rounded numbers
    v = torch.randn(1, len(logits), 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    a, b = exact.curvature(v), single.curvature(v.float())
    assert (b.double() - a).abs().le(1e-4 * a.abs().amax(-1, keepdim=True) + 1e-44).all()
    labels = torch.arange(len(logits)) % 3
    exact, single = (fl.Categorical().bind(x, labels) for x in (logits, logits.float()))
    assert error(single.observed_score(), exact.observed_score()) < 1e-6
    a, b = exact.observed_score(), single.observed_score()
    assert ((b.double() - a).abs() <= 2e-5 * a.abs() + 1e-44).all()
    S, d = root(exact), exact.gradient_coefficients()
    assert torch.isfinite(d).all()
    assert error(torch.einsum("ner,nr->ne", S, d), exact.loss_gradient()) < 1e-9
    S, d = root(single), single.gradient_coefficients()
    usable = torch.isfinite(d).all(1)  # a label of probability exp(-160) has none in float32, and is seen
    assert usable.float().mean() > 0.8
    found = torch.einsum("ner,nr->ne", S[usable], d[usable])
    assert error(found, exact.loss_gradient()[usable]) < 1e-5


def test_extreme_bernoulli_in_float32():
    logits = torch.tensor(EXTREME, dtype=torch.float64)[:, None]
    for y in (0.0, 1.0):
        targets = torch.full_like(logits, y)
        a, b = fl.Bernoulli().bind(logits, targets), fl.Bernoulli().bind(logits.float(), targets.float())
        for exact, single in (
            (a.column(0), b.column(0)),
            (a.observed_score(), b.observed_score()),
            (a.loss_gradient(), b.loss_gradient()),
            (a.column(0) * a.gradient_coefficients(), b.column(0) * b.gradient_coefficients()),
        ):
            assert torch.isfinite(single).all()
            assert ((single.double() - exact).abs() <= 1e-5 * exact.abs() + 1e-44).all()
        p = (-(-logits).abs()).exp()
        assert error(a.column(0), (p / (1 + p) ** 2).sqrt()) < 1e-12


def test_extreme_float64():
    for size in (300.0, 700.0, 1e4, 1e300):
        logits = torch.tensor([[size, 0.0, -size], [-size, -size, size], [size, size, size]], dtype=torch.float64)
        bound = fl.Categorical().bind(logits, torch.tensor([2, 0, 1]))
        S = root(bound)
        assert torch.isfinite(S).all()
        H = torch.diag_embed(logits.softmax(-1)) - logits.softmax(-1)[:, :, None] * logits.softmax(-1)[:, None]
        assert error(S @ S.mT, H) < TOLERANCE
        assert torch.isfinite(bound.loss_gradient()).all()
        one = fl.Bernoulli().bind(logits, torch.ones_like(logits))
        assert torch.isfinite(root(one)).all()
        assert torch.isfinite(one.loss_gradient()).all()


def test_natural_gradient_at_labels_that_seem_impossible():
    """The row-space coefficients overflow; the answer must come by the other way."""
    model = torch.nn.Linear(1, 3).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[900.0], [0.0], [-900.0]]))
        model.bias.zero_()
    data = (torch.tensor([[1.0], [0.001], [-0.5]], dtype=torch.float64), torch.tensor([2, 0, 0]))
    F = fl.Fisher(model, data, likelihood="categorical")
    T = reference.fisher(model, data, "categorical")
    g = reference.gradient(model, data, "categorical")
    assert error(F.gradient(), g) < TOLERANCE
    assert error(F.natural_gradient(0.1), reference.solve(T, g, 0.1)) < 1e-10


def test_one_class_tells_nothing():
    bound = fl.Categorical().bind(normal(4, 1), torch.zeros(4, dtype=torch.long))
    assert bound.num_columns == 1
    assert bound.column(0).abs().max() == 0
    assert bound.loss_gradient().abs().max() == 0
    assert bound.gradient_coefficients().abs().max() == 0
    u = torch.rand(4, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert bound.sampled_score(u).abs().max() == 0
    assert bound.sampled_coefficients(u).abs().max() == 0
    assert fl.Categorical().rank_per_term(torch.Size([4, 1])) == 0


def test_two_classes_are_one_bernoulli():
    f = normal(5, 1)
    two = fl.Categorical().bind(torch.cat([torch.zeros_like(f), f], 1), None)
    one = fl.Bernoulli().bind(f, None)
    assert error(two.column(0)[:, 1].abs(), one.column(0)[:, 0]) < TOLERANCE


def test_ndtri_is_precise_in_the_tails():
    u = torch.tensor([[1e-300, 1e-16, 0.3, 1 - 1e-16]], dtype=torch.float64)
    z = -fl.Gaussian().bind(torch.zeros(1, 4, dtype=torch.float64), None).sampled_score(u)
    assert torch.isfinite(z).all()
    assert z[0, 0].item() == pytest.approx(-37.0471, abs=1e-3)
    assert torch.special.ndtr(z[0, 1]).item() == pytest.approx(1e-16, rel=1e-6)


def test_names_and_repr():
    assert [as_likelihood(n).name for n in ("categorical", "bernoulli", "gaussian")] == [
        "categorical",
        "bernoulli",
        "gaussian",
    ]
    assert repr(fl.Gaussian(2.0)).startswith("Gaussian(variance=tensor(2.")
    assert "ignore_index=3" in repr(fl.Categorical(ignore_index=3))
    assert repr(fl.Bernoulli()) == "Bernoulli(pos_weight=None)"
    own = fl.Categorical(class_axis=-1)
    assert as_likelihood(own) is own
    assert fl.Categorical().needs_targets is False
    assert fl.Categorical(weight=[1.0]).needs_targets
    assert fl.Categorical(ignore_index=0).needs_targets


def test_settings_are_copies_of_what_was_given():
    weight = torch.ones(3)
    likelihood = fl.Categorical(weight=weight)
    weight[0] = 7
    bound = likelihood.bind(torch.zeros(1, 3), torch.tensor([0]))
    assert bound.weight.item() == 1


def test_predicted_variance():
    """Outputs (μ, log v): H = diag(1/v, ½), and the gradient of torch's own loss."""
    outputs, targets = normal(6, 4), normal(6, 2, seed=3)
    bound = HeteroscedasticGaussian().bind(outputs, targets)
    S = root(bound)
    H = torch.diag_embed(torch.cat([(-outputs[:, 2:]).exp(), torch.full((6, 2), 0.5)], 1))
    assert error(S @ S.mT, H) < TOLERANCE
    leaf = outputs.clone().requires_grad_()
    loss = functional.gaussian_nll_loss(leaf[:, :2], targets, leaf[:, 2:].exp(), reduction="sum", eps=1e-300)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert error(bound.loss_gradient(), gradient) < TOLERANCE
    assert error(torch.einsum("ner,nr->ne", S, bound.gradient_coefficients()), gradient) < TOLERANCE
    g = torch.Generator().manual_seed(0)
    total = torch.zeros_like(H)
    for _ in range(4000):
        s = bound.sampled_score(torch.rand(6, bound.num_uniforms, generator=g, dtype=torch.float64))
        total += s[:, :, None] * s[:, None] / 4000
    assert error(total, H) < 0.15
    with pytest.raises(NonFiniteError, match=r"1/v = exp\(-log v\).*overflows"):
        HeteroscedasticGaussian().bind(torch.tensor([[0.0, -math.inf]]).clamp(min=-1e4), None)
