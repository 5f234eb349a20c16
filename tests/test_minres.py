"""Minimal residuals against dense solves and against scipy."""

from __future__ import annotations

import pytest
import torch
from fisher_checks import error
from hessian_checks import vectors
from scipy.sparse.linalg import minres as scipy_minres
from torch import Tensor

from fisherlens.linalg.minres import minres


@pytest.mark.parametrize("definite", [True, False])
def test_minres_against_dense_and_scipy(definite):
    q, _ = torch.linalg.qr(vectors(40, 40))
    values = torch.linspace(0.5, 3, 40, dtype=torch.float64)
    if not definite:
        values[::3] *= -1
    a = q * values @ q.T
    b = vectors(40, 3, seed=8)
    b[:, 2] = q[:, 0] + q[:, 1]  # an invariant subspace: done after two steps
    count = [0]

    def product(v: Tensor) -> Tensor:
        count[0] += 1
        return a @ v

    found = minres(product, b, tol=1e-11)
    assert found.converged
    assert found.steps <= 60
    assert error(found.solution, torch.linalg.solve(a, b)) < 1e-9
    scipys = scipy_minres(a.numpy(), b[:, 0].numpy(), rtol=1e-13)[0]
    assert error(found.solution[:, 0], torch.as_tensor(scipys)) < 1e-9
    few = minres(lambda v: a @ v, b[:, :1], tol=1e-11, max_steps=7)
    theirs = scipy_minres(a.numpy(), b[:, 0].numpy(), rtol=1e-13, maxiter=7)[0]
    assert error(few.solution[:, 0], torch.as_tensor(theirs)) < 1e-10  # the same iterate
    assert not few.converged
    diagonal = a.diagonal().abs()[:, None]
    helped = minres(lambda v: a @ v, b, precondition=lambda r: r / diagonal, tol=1e-11)
    assert error(helped.solution, torch.linalg.solve(a, b)) < 1e-9


def test_minres_on_a_singular_system_ends():
    a = torch.diag(torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64))
    found = minres(lambda v: a @ v, torch.ones(3, 1, dtype=torch.float64), tol=1e-10)
    assert not found.converged
    assert found.steps < 1000
    assert found.residual.item() == pytest.approx(3**-0.5, rel=1e-6)  # least squares leave the third entry
    zero = minres(lambda v: a @ v, torch.zeros(3, 1, dtype=torch.float64))
    assert zero.converged
    assert zero.steps == 0
