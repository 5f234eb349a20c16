"""Kronecker products by themselves: one pair, a batch of pairs, and as many vectors as one likes."""

from __future__ import annotations

import pytest
import torch
from fisher_checks import error
from torch import Tensor

from fisherlens.errors import NonFiniteError
from fisherlens.linalg.kronecker import KroneckerPair, RotatedDiagonal, factored_damping


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spd(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(*shape[:-1], shape[-1] + 2, generator=rng(seed), dtype=torch.float64)
    return x @ x.mT


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("leading", [(), (4,), (2, 2)])
def test_a_pair_and_a_batch_of_pairs(batch, leading):
    G, A = spd(*batch, 3, 3), spd(*batch, 4, 4, seed=1)
    W = torch.randn(*leading, *batch, 3, 4, generator=rng(2), dtype=torch.float64)
    pair = KroneckerPair(G, A)
    dense = pair.dense()
    singles = [torch.kron(g, a) for g, a in zip(G.view(-1, 3, 3), A.view(-1, 4, 4), strict=True)]
    assert error(dense.view(-1, 12, 12), torch.stack(singles)) < 1e-14

    def by_dense(matrix: Tensor, w: Tensor) -> Tensor:
        return (matrix @ w.reshape(*w.shape[:-2], 12, 1)).view(w.shape)

    eye = torch.eye(12, dtype=torch.float64)
    assert error(pair.product(W), by_dense(dense, W)) < 1e-13
    assert error(pair.eigen.dense(), dense) < 1e-13
    assert error(pair.solve(W, 0.3), by_dense(torch.linalg.inv(dense + 0.3 * eye), W)) < 1e-12
    gamma_a, gamma_g = factored_damping(A, G, 0.3)
    assert gamma_a.shape == gamma_g.shape == batch
    left, right = G + gamma_g[..., None, None] * torch.eye(3), A + gamma_a[..., None, None] * torch.eye(4)
    damped = KroneckerPair(left, right).dense()
    assert error(pair.solve(W, 0.3, "factored"), by_dense(torch.linalg.inv(damped), W)) < 1e-12
    assert error(pair.damped_product(W, 0.3, "factored"), by_dense(damped, W)) < 1e-13
    assert error(pair.damped_product(W, 0.3), by_dense(dense + 0.3 * eye, W)) < 1e-13
    assert pair.log_determinant(0.3) == pytest.approx(torch.logdet(eye + dense / 0.3).sum().item(), rel=1e-12)
    assert pair.log_determinant(0.3, "factored") == pytest.approx(torch.logdet(damped / 0.3).sum().item(), rel=1e-12)
    assert pair.squared_norm() == pytest.approx(dense.square().sum().item(), rel=1e-13)
    assert error(pair.diagonal().reshape(*batch, 12), dense.diagonal(dim1=-2, dim2=-1)) < 1e-14
    rotated = RotatedDiagonal(
        pair.eigen.q_g, pair.eigen.q_a, torch.rand(*batch, 3, 4, generator=rng(5), dtype=torch.float64)
    )
    truth = rotated.dense()
    assert error(rotated.product(W), by_dense(truth, W)) < 1e-13
    assert error(rotated.solve(W, 0.2), by_dense(torch.linalg.inv(truth + 0.2 * eye), W)) < 1e-12
    assert error(rotated.rotate_back(rotated.rotate(W)), W) < 1e-13
    assert rotated.log_determinant(0.2) == pytest.approx(torch.logdet(eye + truth / 0.2).sum().item(), rel=1e-12)
    assert rotated.squared_norm() == pytest.approx(truth.square().sum().item(), rel=1e-12)
    assert error(rotated.diagonal().reshape(*batch, 12), truth.diagonal(dim1=-2, dim2=-1)) < 1e-13
    assert pair.count == (batch[0] if batch else 1)


def test_factored_damping_of_unequal_factors_and_of_zeros():
    A, G = 9 * torch.eye(2, dtype=torch.float64), torch.eye(3, dtype=torch.float64) / 4
    gamma_a, gamma_g = factored_damping(A, G, 0.04)
    assert gamma_a.item() == pytest.approx(6 * 0.2)
    assert gamma_g.item() == pytest.approx(0.2 / 6)
    for zero_a, zero_g in ((0 * A, G), (A, 0 * G), (0 * A, 0 * G)):
        assert [x.item() for x in factored_damping(zero_a, zero_g, 0.04)] == pytest.approx([0.2, 0.2])


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("leading", [(), (4,)])
def test_rows_of_a_factor_of_low_rank(batch, leading):
    """Two rows, the second the same as the first but for the last digits, as a factor of order 7."""
    X = torch.randn(*batch, 3, 7, generator=rng(0), dtype=torch.float64)
    X[..., 2, :] = X[..., 1, :] * (1 + 1e-14)
    G, A = spd(*batch, 4, 4), X.mT @ X
    pair, plain = KroneckerPair(G, A, rows=(None, X)), KroneckerPair(G, A)
    W = torch.randn(*leading, *batch, 4, 7, generator=rng(2), dtype=torch.float64)
    assert pair.eigen.q_a.shape == (*batch, 7, 3)
    assert not pair.eigen.complete
    identity = torch.eye(3, dtype=torch.float64).expand(*batch, 3, 3)
    assert error(pair.eigen.q_a.mT @ pair.eigen.q_a, identity) < 1e-13
    assert error(pair.eigen.dense(), plain.dense()) < 1e-13
    assert error(pair.eigen.product(W), plain.product(W)) < 1e-13
    for lam in (1e-3, 0.3):
        assert error(pair.solve(W, lam), plain.solve(W, lam)) < 1e-9
        assert pair.log_determinant(lam) == pytest.approx(plain.log_determinant(lam), rel=1e-9)
    assert error(pair.eigen.diagonal(), plain.diagonal()) < 1e-13
    assert pair.eigen_flops < plain.eigen_flops


def test_rows_with_nan_are_refused():
    X = torch.full((1, 2, 7), float("nan"))
    with pytest.raises(NonFiniteError, match=r"layer 'x': factor A holds NaN or infinity"):
        _ = KroneckerPair(torch.eye(2)[None], torch.zeros(1, 7, 7), "layer 'x'", (None, X)).eigen
