"""What every stand-in refuses, and in which words."""

from __future__ import annotations

import copy

import pytest
import torch
from fisher_checks import case
from torch import nn

import fisherlens as fl
from fisherlens.errors import InputError, MemoryBudgetError

MAKE = {
    "Diagonal": fl.Diagonal,
    "QuasiDiagonal": fl.QuasiDiagonal,
    "LowRank": lambda F: fl.LowRank(F, 3),
    "ProjectedKFAC": lambda F: fl.ProjectedKFAC(F, 2),
    "shared": lambda F: fl.BlockDiagonal(F, "mbf", shared=True),
}


@pytest.fixture(scope="module")
def F() -> fl.Fisher:
    return case("mlp_tanh").fisher()


@pytest.mark.parametrize("name", MAKE)
def test_what_is_no_fisher(name):
    with pytest.raises(
        TypeError, match=r"The analysis takes a fisherlens\.Fisher; got Linear\. Build the operator first"
    ):
        MAKE[name](nn.Linear(2, 2))


@pytest.mark.parametrize("name", MAKE)
def test_a_hessian_has_no_score_rows(name):
    c = case("softmax_regression")
    with pytest.raises(InputError, match=r"This needs score rows, .* built with kind='hessian'"):
        MAKE[name](c.fisher(kind="hessian"))


@pytest.mark.parametrize("damping", [0, -1.0, float("nan"), float("inf"), "much"])
@pytest.mark.parametrize("name", MAKE)
def test_dampings(name, damping, F):
    A = MAKE[name](F)
    v = torch.ones(F.n_params, dtype=torch.float64)
    for call in (lambda: A.solve(v, damping), lambda: A.log_determinant(damping)):
        with pytest.raises(InputError, match=r"damping must be a finite number > 0; got "):
            call()


@pytest.mark.parametrize("name", MAKE)
def test_vectors(name, F):
    A = MAKE[name](F)
    with pytest.raises(InputError, match=r"takes v of shape \(79,\) or \(79, K\)"):
        A @ torch.ones(78, dtype=torch.float64)
    with pytest.raises(InputError, match=r"takes v of dtype torch\.float64"):
        A.solve(torch.ones(79), 0.1)
    with pytest.raises(InputError, match=r"A dict vector must hold exactly the keys of the layout"):
        A @ {"0.weight": torch.ones(6, 5, dtype=torch.float64)}
    with pytest.raises(fl.NonFiniteError, match=r"The vector handed to F holds NaN or infinity"):
        A @ torch.full((79,), float("nan"), dtype=torch.float64)
    assert (A @ torch.ones(79, 0, dtype=torch.float64)).shape == (79, 0)


@pytest.mark.parametrize("name", MAKE)
def test_vectors_are_left_alone(name, F):
    A, v = MAKE[name](F), torch.randn(79, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept, diagonal = v.clone(), A.diagonal()
    A @ v
    A.solve(v, 0.1)
    diagonal.zero_()
    assert torch.equal(v, kept)
    assert A.trace() > 0


@pytest.mark.parametrize("name", MAKE)
def test_other_layouts_of_memory(name, F):
    A = MAKE[name](F)
    v = torch.randn(5, 79, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(A @ v.T, A @ v.T.contiguous(), rtol=1e-13, atol=1e-15)
    assert torch.allclose(A.solve(v.T, 0.1), A.solve(v.T.contiguous(), 0.1), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", MAKE)
def test_copies(name, F):
    A = MAKE[name](F)
    v = torch.ones(79, dtype=torch.float64)
    assert torch.equal(copy.deepcopy(A).solve(v, 0.1), A.solve(v, 0.1))
    assert type(copy.copy(A)) is type(A)


@pytest.mark.parametrize("name", MAKE)
def test_dense_is_capped(name, F):
    with pytest.raises(MemoryBudgetError, match=r"\.dense\(\) of 79 parameters would take 48\.8 KiB; raise max_params"):
        MAKE[name](F).dense(max_params=10)
