"""The claim on convergence, on quadratic problems in which the order of the optimizers is known; and how its target is read off runs."""

from __future__ import annotations

import math
from functools import partial

import pytest
import scipy.linalg
import torch
from test_verify_training import line, pairs, rows_of, subject
from torch import nn

import fisherlens as fl
from fisherlens.training.verify.convergence import blockwise, convergence, steps_to_target, whole
from fisherlens.training.verify.movable import Movable, batches
from fisherlens.training.verify.treatment import judge_treatments, treatment

RIGHT = {"a": [0, 1], "b": [2, 3], "c": [4, 5]}
WRONG = {"a": [0, 2], "b": [1, 4], "c": [3, 5]}
LOOSE = {"a": [0, 1], "b": [2, 4], "c": [3, 5]}
CUTS = {"right": RIGHT, "loose": LOOSE, "wrong": WRONG}
RATES = [0.1, 0.3, 0.9]


def slow_line():
    """Pairs of inputs that are nearly one, and weights that tell them apart."""
    return line(pairs([0.98, 0.6, 0.6]), [4.0, -4.0, 3.0, -3.0, 5.0, -5.0])


def swapped(F):
    """Claims that the wrong pairs are the coupled ones."""
    order = torch.tensor([0, 2, 1, 4, 3, 5])
    inverse = order.argsort()
    return F.dense()[inverse][:, inverse]


def test_order_of_optimizers_is_that_of_condition_numbers():
    options = {"partitions": CUTS, "num_steps": 12, "rates": RATES}
    claim = convergence([subject(slow_line(), damping=1e-3)], **options)
    rows = rows_of(claim)
    assert rows["condition-number"].holds
    assert rows["decrease-ratio"].holds
    kappa, steps = (claim.curves[f"convergence_{name}"].values for name in ("condition_number", "steps"))
    assert (kappa[:, 0] == 1).all()
    assert 1 < kappa[0, 1] < kappa[0, 2] < 20 < kappa[0, 3]
    assert steps[0, 1] < steps[0, 2] < steps[0, 3]
    assert rows["exact"].measured == steps[0, 0]
    false = rows_of(convergence([subject(slow_line(), damping=1e-3, operator=swapped)], **options))
    assert not false["condition-number"].holds
    assert false["condition-number"].decided


def test_unreached_targets_rank_last():
    def diverging(model):
        return torch.optim.SGD(model.parameters(), lr=1e6)

    entries = {"good": lambda m: torch.optim.SGD(m.parameters(), lr=0.3), "bad": diverging}
    runs = fl.compare_optimizers(line(torch.eye(3)), entries, num_steps=8, seeds=1, record_every=2, progress=False)
    good, bad = steps_to_target(runs.isel(seed=0), 0.5)
    assert 0 < good < 8
    assert bad == math.inf


# --- parameters that no method has statistics of -----------------------------------------------------------------------


class Beside(nn.Module):
    """A dense layer beside a normalisation layer with fixed statistics: linear in all nine parameters."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(3, 1, bias=False, dtype=torch.float64)
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64)

    def forward(self, x):
        return self.dense(x[:, :3]) + self.norm(x[:, 3:]).sum(1, keepdim=True)


def beside(n=40):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64) @ torch.triu(torch.ones(6, 6, dtype=torch.float64))
    y = x.sum(1, keepdim=True) + 0.3 * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    return fl.Problem("beside", "Linear.", lambda: Beside().eval(), (x, y), (x, y), "gaussian", batch_size=n)


def known(problem, lam):
    """The empirical Fisher and the gradient at the start, and what each method divides by, straight from the formulae."""
    (x, y), model = problem.train, problem.model(0)
    z = torch.cat([x[:, :3], x[:, 3:] / math.sqrt(1 + model.norm.eps), torch.ones(len(x), 3, dtype=x.dtype)], dim=1)
    with torch.no_grad():
        r = model(x) - y
    F, g = (r * z).T @ (r * z) / len(x), (r * z).mean(0)
    block = F[:3, :3] + lam * torch.eye(3, dtype=x.dtype)
    rules = {
        "full": (block, torch.full((6,), 1 + lam)),
        "layer": (block, torch.ones(6)),  # TENGraD takes the gradient as it is
        "unit": (block, torch.full((6,), 1 + lam)),
        "single": (
            torch.diag(block.diagonal()),
            g[3:].abs() + 1e-8,
        ),  # CW-NGD: root of the averaged square, of one step
    }
    return (
        F,
        g,
        {name: torch.block_diag(inside, torch.diag(rest.to(x.dtype))) for name, (inside, rest) in rules.items()},
    )


@pytest.mark.parametrize("operator", [None, lambda F: F.dense()], ids=["Fisher", "written out"])
def test_parameters_without_statistics_are_predicted_as_the_method_treats_them(operator):
    problem, lam = beside(), 0.2
    F, g, methods = known(problem, lam)
    whole = F + lam * torch.eye(9, dtype=F.dtype)
    one = subject(problem, kind="empirical", damping=lam, operator=operator)
    cuts = {"layer": "layer", "unit": "unit", "single": "diagonal"}
    claim = convergence([one], partitions=cuts, num_steps=2, rates=[0.01])
    kappa, eta = (claim.curves[f"convergence_{name}"].values[0] for name in ("condition_number", "decrease_ratio"))
    for place, (name, P) in enumerate(methods.items()):
        values = scipy.linalg.eigh(whole.numpy(), P.numpy(), eigvals_only=True)
        assert kappa[place] == pytest.approx(values[-1] / values[0], rel=1e-7), name
        q = torch.linalg.solve(P, g)
        share = (g @ q) ** 2 / ((q @ whole @ q) * (g @ torch.linalg.solve(whole, g)))
        assert eta[place] == pytest.approx(float(share), rel=1e-7), name
    assert kappa[0] > 2  # exact natural gradient is none for what it has no statistics of
    rows = rows_of(claim)
    for name in ("condition-number", "decrease-ratio", "exact"):
        assert (
            "parameters without statistics: norm (66.7% of all), each in predictions as the method treats it"
            in rows[name].note
        )


def test_a_network_that_is_covered_is_predicted_as_before():
    claim = convergence([subject(slow_line(), damping=1e-3)], partitions=CUTS, num_steps=2, rates=[0.1])
    assert claim.curves["convergence_condition_number"].values[0, 0] == 1
    assert "without statistics" not in rows_of(claim)["exact"].note


def test_a_larger_network_is_predicted_by_products_as_by_the_matrix():
    """Above an order of 256 both ends of the spectrum are found by Lanczos, to a per cent."""
    generator = torch.Generator().manual_seed(6)
    x, y = torch.randn(60, 20, generator=generator), torch.arange(60) % 3

    def factory():
        return nn.Sequential(nn.Linear(20, 14), nn.BatchNorm1d(14), nn.Tanh(), nn.Linear(14, 3)).eval()

    start = subject(fl.Problem("normed", "Noise.", factory, (x, y), (x, y), batch_size=60)).initial
    batch, lam = batches(start, 60, 1, 51)[0], 0.01
    F = Movable(start).fisher(batch, "exact")
    cuts = {
        "layer": fl.partition(F, "layer"),
        "unit": fl.partition(F, "unit"),
        "cut": fl.partition(F, "random", size=40),
    }
    makes = {name: partial(blockwise, start=start, damping=lam, kl_clip=None, part=one) for name, one in cuts.items()}
    treated = [treatment(start, make, cuts[name], batch) for name, make in makes.items()]
    treated.append(treatment(start, partial(whole, start=start, damping=lam, kl_clip=None), None, batch))
    assert F.n_params == 367
    assert [int(one.inside.sum()) for one in treated] == [339] * 4
    plain = fl.Operator(lambda v: F @ v, F.n_params, F.dtype, block=True)
    fast, slow = (judge_treatments(operator, treated, F.gradient(), lam) for operator in (F, plain))
    for one, other in zip(fast, slow, strict=True):
        assert one.condition_number == pytest.approx(other.condition_number, rel=0.02)
        assert one.decrease_ratio == pytest.approx(other.decrease_ratio, rel=1e-8)
        assert one.natural_gradient_cosine == pytest.approx(other.natural_gradient_cosine, rel=1e-8)
