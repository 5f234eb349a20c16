"""Scores that do not fit the budget: the kept graph and the streamed data must give the answers of the kept scores."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import pytest
import torch
from cases import fill
from fisher_checks import QUIET, case, error
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import fisherlens as fl
from fisherlens import reference
from fisherlens.errors import InputError, MemoryBudgetError, NonFiniteError

pytestmark = pytest.mark.filterwarnings(QUIET)
TOLERANCE = 1e-10
NAMES = [
    *("mlp_tanh", "mlp_inplace_relu", "frozen_first_layer", "dense_on_positions", "bernoulli_two_outputs"),
    *("gaussian_three_outputs", "conv_everything", "conv_same", "lenet", "batchnorm_2d", "layer_norm", "residual"),
    *("module_used_twice", "root_parameter", "tied_weights", "lstm", "two_inputs"),
]


@cache
def small_budget(c) -> int:
    """Too little for the scores in any representation."""
    budget = c.fisher().plan.nbytes
    while True:
        budget = budget * 2 // 3
        plan = c.fisher(memory=budget).plan
        if plan.streamed or plan.linearised:
            return budget


def of_path(c, path: str, **options) -> fl.Fisher:
    """Built in too small a budget, which is taken to hold the graph of the network or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fisherlens.scores.plan._GRAPHS", 1e-9 if path == "linearised" else 1e9)
        patch.setattr("fisherlens.scores.plan._SLOW_TWICE", frozenset())
        F = c.fisher(memory=small_budget(c), **options)
    assert {entry.path for entry in F.plan} == {path}
    return F


def streamed(c) -> fl.Fisher:
    F = of_path(c, "streamed")
    assert F.plan.nbytes == 0
    return F


@pytest.mark.parametrize("name", NAMES)
def test_streamed_products(name, unchanged):
    c = case(name, "mc" if name in ("conv_everything", "gaussian_three_outputs", "two_inputs") else "exact")
    V, T = c.vectors(5), c.matrix
    with unchanged(c.model):
        F = streamed(c)
        for k in (1, 2, 5):
            assert error(F @ V[:, :k], T @ V[:, :k]) < TOLERANCE
        assert error(F @ V[:, 0], T @ V[:, 0]) < TOLERANCE
        assert torch.equal(F @ V, F @ V)
        assert torch.equal(F @ V[:, 0], F @ V[:, 0])


@pytest.mark.parametrize("name", ["mlp_inplace_relu", "lenet", "gaussian_three_outputs", "lstm"])
def test_streamed_members(name, unchanged):
    c = case(name)
    V, T = c.vectors(), c.matrix
    with unchanged(c.model):
        F, whole = streamed(c), c.fisher()
        assert error(F.diagonal(), T.diagonal()) < TOLERANCE
        assert error(F.dense(), T) < TOLERANCE
        assert F.frobenius_norm() == pytest.approx(T.norm().item(), rel=TOLERANCE)
        assert error(F.gram(), whole.gram()) < TOLERANCE
        assert error(F.gradient(), c.gradient) < TOLERANCE
        assert error(F.solve(V, 0.1), reference.solve(T, V, 0.1)) < TOLERANCE
        assert error(F.natural_gradient(0.1), reference.solve(T, c.gradient, 0.1)) < TOLERANCE
        layer = F.layout.layers[-1]
        at = slice(layer.start, layer.stop)
        assert error(F.block(layer.name), T[at, at]) < TOLERANCE
        part = F.restrict(layer.name)
        assert error(part @ V[at], T[at, at] @ V[at]) < TOLERANCE
        assert error(part @ V[at, 0], T[at, at] @ V[at, 0]) < TOLERANCE
        assert error(part.diagonal(), T.diagonal()[at]) < TOLERANCE
        assert error(part.dense(), T[at, at]) < TOLERANCE
        F.memory = whole.memory
        for scheme in ("unit", "layer"):
            blocks, truth = fl.BlockDiagonal(F, scheme), fl.BlockDiagonal(whole, scheme)
            assert error(blocks.dense(), truth.dense()) < TOLERANCE
            assert error(blocks.solve(V, 0.1), truth.solve(V, 0.1)) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_linearised_products(name, unchanged):
    """A budget that holds the network's graph, though not its scores."""
    c = case(name, "mc" if name in ("lenet", "lstm") else "exact")
    V, T = c.vectors(5), c.matrix
    with unchanged(c.model):
        F = of_path(c, "linearised")
        for k in (1, 2, 5):
            assert error(F @ V[:, :k], T @ V[:, :k]) < TOLERANCE
        assert torch.equal(F @ V[:, 0], F @ V[:, 0])
        assert error(F.diagonal(), T.diagonal()) < TOLERANCE


def test_a_budget_for_the_graph_alone_is_used_for_it():
    c = case("mlp_tanh")
    F = c.fisher(memory=2000)
    assert {entry.path for entry in F.plan} == {"linearised"}
    assert 0 < F.plan.nbytes <= 2000
    assert "do not fit" in repr(F.plan)
    assert error(F @ c.vectors(), c.matrix @ c.vectors()) < TOLERANCE


def test_later_training_does_not_reach_streamed_products():
    """Parameters, statistics and modes are those of the time when the operator was built."""
    with torch.random.fork_rng(devices=[]):
        layers = [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)]
        model = fill(nn.Sequential(*layers).double(), torch.Generator().manual_seed(0)).eval()
    x, y = case("mlp_tanh").data
    whole = fl.Fisher(model, (x, y), likelihood="categorical")
    F = fl.Fisher(model, (x, y), likelihood="categorical", memory=whole.plan.nbytes // 5)
    assert F.plan.streamed
    V = torch.ones(F.n_params, 4, dtype=torch.float64).cumsum(0)
    model.train()
    model(x).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.5 * parameter.grad)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for k in (1, 4):
        assert error(F @ V[:, :k], whole @ V[:, :k]) < TOLERANCE
    assert error(F.diagonal(), whole.diagonal()) < TOLERANCE
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_data_that_change_between_passes_are_refused(unchanged):
    c = case("mlp_tanh")
    budget = small_budget(c)
    shuffled = DataLoader(TensorDataset(*c.data), batch_size=3, shuffle=True)
    for memory in ("2GiB", budget):
        with (
            unchanged(c.model),
            pytest.raises(InputError, match=r"differs from what it was in an earlier pass.*Turn off shuffling"),
        ):
            c.fisher(data=shuffled, memory=memory)
    kept = c.fisher(data=shuffled, check_deterministic=False)  # any order of all examples gives the same matrix
    assert error(kept.dense(), c.fisher().dense()) < 1e-12
    grown = [c.data]
    F = c.fisher(data=grown, memory=budget)
    grown.append(c.data)
    with (
        unchanged(c.model),
        pytest.raises(InputError, match=r"differs from what it was|in the first pass and 14 in a later"),
    ):
        F @ c.vectors()
    x, y = (t.clone() for t in c.data)
    F = c.fisher(data=(x, y), memory=budget)
    x[2, 1] += 1e-3
    with pytest.raises(InputError, match="differs from what it was in an earlier pass"):
        F @ c.vectors()


class Root(nn.Module):
    """|W x|^½: its derivative is infinite where W x = 0."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3, bias=False)

    def forward(self, x):
        return self.layer(x).abs().sqrt()


class Restless:
    """Batches whose reading draws from every global generator."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __iter__(self):
        for i in range(0, len(self.x), 2):
            torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002, S311
            yield self.x[i : i + 2], self.y[i : i + 2]


def test_infinite_derivatives_are_named_and_leave_no_trace(unchanged):
    model = fill(Root().double(), torch.Generator().manual_seed(0))
    x, y = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64), torch.zeros(6).long()
    x[4] = 0
    with unchanged(model), pytest.raises(NonFiniteError, match="a derivative overflowed"):
        fl.Fisher(model, Restless(x, y), likelihood="categorical")
    with unchanged(model):
        F = fl.Fisher(model, Restless(x, y), likelihood="categorical", memory=250)
    assert F.plan.streamed
    V = torch.ones(9, 4, dtype=torch.float64)
    acts = (lambda: F @ V, lambda: F @ V[:, 0], F.diagonal, F.dense, F.trace, F.gram, lambda: F.solve(V, 1.0))
    for act in acts:
        with unchanged(model), pytest.raises(NonFiniteError, match=r"batch 2.*overflowed"):
            act()


def test_budget_too_small_for_one_example():
    c = case("lenet")
    with pytest.raises(
        MemoryBudgetError,
        match=r"scores of a single example x 3 columns need .* over the budget of 100 B; the largest layer is '9'|'3'|'7'",
    ):
        c.fisher(memory=100)


def test_one_sample_of_streamed_scores_says_what_would_help():
    F = streamed(case("mlp_tanh"))
    with pytest.raises(MemoryBudgetError, match=r"num_null=0.*memory="):
        fl.coupling(F, num_null=10)
    shown = fl.coupling(F, num_null=0)
    assert (
        error(
            torch.from_numpy(shown["coupling"].values),
            torch.from_numpy(fl.coupling(case("mlp_tanh").fisher(), num_null=0)["coupling"].values),
        )
        < TOLERANCE
    )


class Force(nn.Module):
    """A network whose output is a derivative of another one by its input, as in energy-based models."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.outer(self.inner(x).tanh()).square()
            forces = [torch.autograd.grad(e.sum(), x, create_graph=True)[0][:, 0] for e in energy.T]
        return torch.stack(forces, dim=1)


def test_derivatives_inside_the_network():
    """The short rules for layers do not know of gradients that the network takes itself; then torch's own are used."""
    model = fill(Force().double(), torch.Generator().manual_seed(0))
    x, y = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64), torch.zeros(6).long()
    F = fl.Fisher(model, (x, y), likelihood="categorical", memory=600)
    assert {entry.path for entry in F.plan} == {"streamed"}
    assert not F.scores.collector.recorder.layer_rules
    truth = reference.fisher(model, (x, y), "categorical")
    assert error(F @ torch.eye(F.n_params, dtype=torch.float64), truth) < TOLERANCE
    assert error(F @ torch.ones(F.n_params, dtype=torch.float64), truth.sum(1)) < TOLERANCE


def test_the_input_of_the_first_layer_is_not_differentiated():
    """Torch multiplies the derivative of the data, which is zero, by the weights of the first layer; a third of the pass."""
    model = fill(
        nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 4)).double(), torch.Generator().manual_seed(0)
    )
    x = torch.randn(20, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    F = fl.Fisher(model, (x, torch.zeros(20).long()), likelihood="categorical", memory=3000)
    assert {entry.path for entry in F.plan} == {"streamed"}
    v = torch.ones(F.n_params, dtype=torch.float64)
    F @ v
    with FlopCounterMode(display=False) as counter:
        F @ v
    first, second = 20 * 40 * 30, 20 * 30 * 4
    forward, along, back = first + second, first + 2 * second, first + 2 * second
    assert counter.get_total_flops() == 2 * (forward + along + back)


@pytest.mark.parametrize("batch", [1, 3, 20])
def test_small_batches_give_the_same_products(batch):
    c = case("mlp_tanh")
    x, y = c.data
    F = c.fisher(data=[(x[i : i + batch], y[i : i + batch]) for i in range(0, len(x), batch)], memory=small_budget(c))
    assert F.plan.streamed or F.plan.linearised
    V = c.vectors(3)
    assert error(F @ V, c.matrix @ V) < TOLERANCE
    assert error(F.diagonal(), c.matrix.diagonal()) < TOLERANCE
