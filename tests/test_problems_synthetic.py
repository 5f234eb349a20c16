"""The synthetic problems: the closed form of their Fisher against the operator and against the definition."""

import re

import pytest
import torch
from torch import nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.training.synthetic import SYNTHETIC, VARIANCE, known_fisher

NAMES = list(SYNTHETIC)


def filled(problem, seed, scale=1.0):
    model = problem.model(0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


@pytest.mark.parametrize("scale", [0.3, 5.0])
@pytest.mark.parametrize("name", NAMES)
def test_the_closed_form_is_the_fisher(name, scale, unchanged):
    problem = fl.problem(name, num_train=40)
    model = filled(problem, 1, scale)
    with unchanged(model):
        known = known_fisher(problem, model)
    F = fl.Fisher(model, problem.train, likelihood=problem.likelihood).dense()
    assert known.dtype == torch.float64
    torch.testing.assert_close(F, known, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        reference.fisher(model, problem.train, problem.likelihood), known, rtol=1e-10, atol=1e-14
    )


def test_the_formulae_of_the_textbook():
    line, logistic = fl.problem("linear-gaussian"), fl.problem("logistic")
    x = torch.cat([line.train[0], torch.ones(200, 1, dtype=torch.float64)], 1)
    known = known_fisher(line, line.model(0))
    rows = [0, 1, 2, 3, 4, 5, 12]  # the weights of the first output, and its bias
    torch.testing.assert_close(known[rows][:, rows], x.T @ x / (200 * VARIANCE), rtol=1e-12, atol=1e-14)
    assert (known[rows][:, [6, 7, 8, 9, 10, 11, 13]] == 0).all()
    model = filled(logistic, 3)
    x = torch.cat([logistic.train[0], torch.ones(200, 1, dtype=torch.float64)], 1)
    p = torch.sigmoid(model(logistic.train[0])[:, 0]).detach()
    torch.testing.assert_close(
        known_fisher(logistic, model), x.T @ torch.diag(p * (1 - p)) @ x / 200, rtol=1e-10, atol=1e-14
    )


def test_the_closed_form_holds_for_saturated_outputs():
    logistic = fl.problem("logistic")
    model = filled(logistic, 0, 0.0)
    with torch.no_grad():
        model.bias.fill_(60.0)
    known = known_fisher(logistic, model)
    assert known[-1, -1].item() == pytest.approx(torch.tensor(-60.0, dtype=torch.float64).exp().item(), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_data_are_drawn_from_the_model_and_never_change(name):
    problem = fl.problem(name)
    again = fl.problem(name)
    for part, other in zip((*problem.train, *problem.test), (*again.train, *again.test), strict=True):
        assert torch.equal(part, other)
    x = problem.train[0]
    assert x.dtype == torch.float64
    assert not torch.equal(x[:100], problem.test[0])
    assert (len(x), len(problem.test[0])) == (200, 100)
    large = fl.problem(name, num_train=20_000, num_test=5)
    assert len(large.train[0]) == 20_000
    eigenvalues = torch.linalg.eigvalsh(large.train[0].T @ large.train[0] / 20_000)
    expected = torch.logspace(-2, 0, 6, dtype=torch.float64)
    torch.testing.assert_close(eigenvalues, expected, rtol=0.05, atol=0)
    # at the parameters that the labels were drawn from, the empirical Fisher agrees with the exact one
    model = _fitted(large)
    gap = _fisher(large, model, "empirical") - _fisher(large, model, "exact")
    assert torch.linalg.matrix_norm(gap) < 0.05 * torch.linalg.matrix_norm(_fisher(large, model, "exact"))


def _fisher(problem, model, kind):
    return fl.Fisher(model, problem.train, likelihood=problem.likelihood, kind=kind).dense()


def _fitted(problem):
    model = problem.model(0)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = problem.loss_fn(model(problem.train[0]), problem.train[1])
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_the_target_lies_a_hundredth_of_a_nat_above_the_optimum(name):
    problem = fl.problem(name)
    best = problem.loss_fn(_fitted(problem)(problem.train[0]), problem.train[1]).item()
    start = problem.loss_fn(problem.model(0)(problem.train[0]), problem.train[1]).item()
    assert best + 0.009 < problem.targets["train_loss"] < best + 0.011
    assert start > problem.targets["train_loss"] + 0.1
    assert fl.problem(name, num_train=100).targets == {}


def test_unknown_fishers_and_other_networks_are_refused():
    expected = (
        "The Fisher of problem 'digits-mlp' is not known in closed form. It is for 'linear-gaussian', 'logistic', 'softmax-regression', "
        "and for a fl.Problem that is given known_fisher=."
    )
    digits = fl.problem("digits-mlp")
    with pytest.raises(fl.InputError, match=f"^{re.escape(expected)}$"):
        known_fisher(digits, digits.model(0))
    line = fl.problem("linear-gaussian")
    for wrong in (nn.Linear(5, 2), nn.Linear(6, 2, bias=False), nn.Linear(6, 3), nn.Sequential(nn.Linear(6, 2))):
        with pytest.raises(
            TypeError, match=r"^The closed form is that of a linear layer with bias, 6 inputs and 2 outputs; got "
        ):
            known_fisher(line, wrong)


def test_ones_own_problem_may_know_its_fisher():
    x = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]
    own = fl.Problem(
        "own",
        "One weight.",
        lambda: nn.Linear(1, 1, bias=False, dtype=torch.float64),
        (x, 2 * x),
        (x, 2 * x),
        "gaussian",
        known_fisher=lambda model: x.T @ x / len(x),
    )
    model = own.model(0)
    torch.testing.assert_close(known_fisher(own, model), fl.Fisher(model, own.train, likelihood="gaussian").dense())
