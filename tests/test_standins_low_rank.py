"""LowRank against the leading eigenpairs of the dense matrix."""

from __future__ import annotations

import pytest
import torch
from fisher_checks import KINDS, QUIET, case, error, in_float32
from standin_checks import check_standin
from test_fisher_streamed import of_path
from torch import nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.errors import ConvergenceWarning, InputError, MemoryBudgetError

pytestmark = pytest.mark.filterwarnings(QUIET)
NAMES = [
    "fewer_parameters_than_examples",
    "softmax_regression",
    "mlp_tanh",
    "lenet",
    "conv_groups",
    "batchnorm_2d",
    "root_parameter",
]


@pytest.mark.parametrize("remainder", [False, True])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_leading_pairs(name, k, remainder, unchanged):
    c = case(name)
    F = c.fisher()
    with unchanged(c.model):
        A = fl.LowRank(F, k, remainder=remainder)
        check_standin(A, c.matrix, reference.low_rank(c.matrix, k, remainder), c.vectors(), tol=1e-9)
    assert A.rank == min(k, int(torch.linalg.matrix_rank(c.matrix, hermitian=True)))
    assert error(A.values, reference.spectrum(c.matrix)[: A.rank]) < 1e-12
    assert A.partition.num_blocks == 1
    if remainder:
        assert A.trace() == pytest.approx(F.trace(), rel=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind):
    c = case("mlp_tanh", kind)
    check_standin(fl.LowRank(c.fisher(), 4), c.matrix, reference.low_rank(c.matrix, 4), c.vectors(), tol=1e-9)


@pytest.mark.parametrize("name", ["mlp_tanh", "lenet", "fewer_parameters_than_examples", "softmax_regression"])
def test_more_pairs_than_the_rank(name):
    c = case(name)
    F = c.fisher()
    for k in {min(F.rank_bound, F.n_params), F.n_params}:
        A = fl.LowRank(F, k)
        assert A.rank <= F.rank_bound
        check_standin(A, c.matrix, c.matrix, c.vectors(), tol=1e-9)
        assert A.within_block_error() < 1e-12 * F.frobenius_norm() ** 2


def test_nothing_to_keep():
    c = case("one_class")
    A = fl.LowRank(c.fisher(), 2, remainder=True)
    assert A.rank == 0
    assert not A.dense().any()
    assert torch.equal(A.solve(c.vectors(), 0.5), 2 * c.vectors())
    assert A.within_block_error() == A.log_determinant(0.1) == 0


@pytest.mark.parametrize("name", ["mlp_tanh", "lenet", "fewer_parameters_than_examples", "batchnorm_2d"])
def test_by_lanczos(name):
    c = case(name)
    F = c.fisher()
    k = min(4, F.n_params - 1)
    A = fl.LowRank(F, k, method="lanczos", tol=1e-11)
    check_standin(A, c.matrix, reference.low_rank(c.matrix, k), c.vectors(), tol=1e-7)
    assert error(A.dense(), fl.LowRank(F, k, method="exact").dense()) < 1e-8
    assert torch.equal(A.vectors, fl.LowRank(F, k, method="lanczos", tol=1e-11).vectors)


def test_lanczos_with_more_pairs_than_the_rank():
    c = case("mlp_tanh")
    A = fl.LowRank(c.fisher(), 30, method="lanczos")
    assert A.rank == 14
    assert error(A.dense(), c.matrix) < 1e-7


@pytest.mark.parametrize("path", ["streamed", "linearised"])
@pytest.mark.parametrize("method", ["exact", "lanczos"])
def test_scores_that_are_not_kept(path, method):
    c = case("mlp_tanh")
    A = fl.LowRank(of_path(c, path), 3, method=method, tol=1e-10)
    check_standin(A, c.matrix, reference.low_rank(c.matrix, 3), c.vectors(), tol=1e-8)


def test_ignored_labels_are_left_out():
    c = case("mlp_tanh")
    weights = fl.Categorical(weight=[0.0, 1.0, 2.0])
    F = fl.Fisher(c.model, c.data, likelihood=weights)
    T = reference.fisher(c.model, c.data, weights)
    for method in ("exact", "lanczos"):
        assert error(fl.LowRank(F, 3, method=method, tol=1e-10).dense(), reference.low_rank(T, 3)) < 1e-8


@pytest.mark.parametrize("name", ["mlp_tanh", "lenet"])
def test_float32(name):
    c = case(name)
    for remainder in (False, True):
        A = fl.LowRank(in_float32(name), 3, remainder=remainder)
        twin = reference.low_rank(c.matrix, 3, remainder)
        check_standin(A, c.matrix, twin, c.vectors(), tol=3e-5, split=1e-4, layers=False)


def test_a_spent_budget_is_told():
    F = case("lenet").fisher()
    with pytest.warns(
        ConvergenceWarning,
        match=r"LowRank: \d of 4 eigenpairs met tol=1e-12 within \d+ products.* Raise max_matvecs or tol",
    ):
        A = fl.LowRank(F, 4, method="lanczos", tol=1e-12, max_matvecs=8)
    T = A.dense()
    assert error(T, T.T) < 1e-14
    # a projection all the same: the error is what the pairs leave of F
    assert A.within_block_error() == pytest.approx((F.dense() - T).square().sum().item(), rel=1e-8)


def test_larger_side_goes_by_lanczos(monkeypatch):
    monkeypatch.setattr("fisherlens.approximations.low_rank._EXACT_ORDER", 5)
    c = case("mlp_tanh")
    called = []
    monkeypatch.setattr("fisherlens.approximations.low_rank._decomposed", lambda *_: called.append(1))
    assert error(fl.LowRank(c.fisher(), 2, tol=1e-9).dense(), reference.low_rank(c.matrix, 2)) < 1e-7
    assert not called


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        (
            {"k": 0},
            InputError,
            r"k must be between 1 and the number of parameters, 79; got 0\. F has at most that many",
        ),
        ({"k": 80}, InputError, r"k must be between 1 and the number of parameters, 79; got 80"),
        ({"k": -3}, InputError, r"k must be between 1 .* got -3"),
        ({"k": 2.0}, TypeError, r"k must be an int, the number of eigenpairs; got 2\.0 of type float"),
        ({"k": True}, TypeError, r"k must be an int"),
        ({"method": "lancsos"}, InputError, r"Unknown method 'lancsos'\. Did you mean 'lanczos'\?"),
        ({"remainder": 1}, TypeError, r"remainder must be True or False; got 1\."),
        ({"tol": 0}, InputError, r"tol must be a number between 0 and 1, .* got 0\."),
        ({"max_matvecs": 1}, InputError, r"max_matvecs must be an integer >= 2, the budget of products; got 1\."),
        ({"method": "lanczos", "seed": -1}, InputError, r"seed must be an integer >= 0; got -1"),
    ],
)
def test_what_is_refused(options, kind, text, unchanged):
    c = case("mlp_tanh")
    options = {"k": 2} | options
    with unchanged(c.model), pytest.raises(kind, match=text):
        fl.LowRank(c.fisher(), options.pop("k"), **options)


def test_what_does_not_fit():
    F = fl.Fisher(nn.Linear(50, 60), (torch.ones(3, 50), torch.tensor([0, 1, 2])), likelihood="categorical")
    F.memory = 10**6
    with pytest.raises(
        MemoryBudgetError,
        match=r"100 eigenvectors of 3060 parameters take 7\.0 MiB with workspace, .* Take k <= 13, or raise memory=",
    ):
        fl.LowRank(F, 100)
    x = torch.randn(2100, 60, generator=torch.Generator().manual_seed(0))
    F = fl.Fisher(
        nn.Linear(60, 40), (x, torch.zeros(2100, dtype=torch.long)), likelihood="categorical", kind="empirical"
    )
    F.memory = 10**6
    with pytest.raises(
        MemoryBudgetError, match=r"method='exact' decomposes a matrix of order 2100, .* Use method='lanczos'"
    ):
        fl.LowRank(F, 1, method="exact")
