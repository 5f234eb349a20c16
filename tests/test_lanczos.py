"""Block Lanczos on matrices with known spectra: no ghosts, no inventions, bounds that hold, errors that name the cause."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse.linalg
import torch
from matrices import low_rank, sample
from torch import Tensor

from fisherlens.errors import InputError, NonFiniteError
from fisherlens.linalg.krylov import Krylov, Metric
from fisherlens.linalg.lanczos import LanczosResult, Selection, block_lanczos
from fisherlens.linalg.ritz import bounds, rayleigh_ritz, rounding

DTYPES = [torch.float32, torch.float64]


def run(matrix: Tensor, k: int, **options: object) -> LanczosResult:
    return block_lanczos(lambda v: matrix @ v, len(matrix), k, dtype=matrix.dtype, **options)


def random_matrix(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def definite(n: int, seed: int = 0) -> Tensor:
    x = random_matrix(n, seed)
    return x @ x.T / n + 0.1 * torch.eye(n, dtype=torch.float64)


# --- low rank, repeated values, nothing at all -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [8, 20, 60])
@pytest.mark.parametrize("n", [60, 200])
def test_low_rank_has_no_ghosts_and_no_inventions(n, steps, dtype):
    """The set-up at which peers return copies, wrong values, or fail."""
    matrix = low_rank(n, 4, dtype)
    truth = torch.linalg.eigvalsh(matrix.double()).flip(0)
    noise = n * torch.finfo(dtype).eps * truth[0]
    for block in (1, 2, 4):
        found = run(matrix, 10, block=block, max_products=steps)
        assert found.products <= steps
        values = found.values
        above = values[values > noise]
        assert len(above) <= 4
        # a Ritz value is never above the eigenvalue of its rank
        assert (values <= truth[: len(values)] + noise).all()
        assert (values[len(above) :].abs() <= noise).all()
        x = found.vectors.double()
        assert (x @ x.T - torch.eye(len(x))).abs().max() < 100 * torch.finfo(dtype).eps
        if steps >= 20:
            assert len(above) == 4
            assert (above - truth[:4]).abs().max() <= noise
    found = run(matrix, 10, block=2)
    assert found.settled
    assert len(found.values) == 10
    assert found.products <= 40


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 3, 12])
def test_zero_identity_and_repeated_eigenvalues(block, dtype):
    tol = 50 * torch.finfo(dtype).eps
    zero = run(torch.zeros(50, 50, dtype=dtype), 12, block=block)
    assert zero.settled
    assert (zero.values == 0).all()
    assert len(zero.values) == 12
    assert zero.scale == 0
    identity = run(torch.eye(50, dtype=dtype), 12, block=block)
    assert identity.settled
    assert (identity.values - 1).abs().max() < tol
    levels = torch.tensor([5.0] * 7 + [3.0] * 5 + [1.0] * 4 + [0.5] * 30, dtype=dtype)
    repeated = run(torch.diag(levels), 14, block=block)
    assert repeated.settled
    assert (repeated.values - levels[:14]).abs().max() < 5 * tol


@pytest.mark.parametrize("block", [1, 2, 3, 4, 5])
def test_copies_beyond_the_block_are_searched_for(block):
    """Two close levels of 25 copies each at the wanted end: a block finds as many copies as it has vectors, the search the others."""
    levels = torch.tensor([-10.3, -10.2, -4.0, 30.0, 130.0], dtype=torch.float64).repeat_interleave(25)
    found = run(torch.diag(levels), 6, block=block, selection=Selection("smallest"), seed=15)
    assert found.settled
    assert (found.values + 10.3).abs().max() < 1e-9


@pytest.mark.parametrize("n", [1, 2, 3])
def test_tiny_orders_and_more_pairs_than_there_are(n):
    matrix = definite(n)
    found = run(matrix, 10)
    assert found.complete
    assert found.settled
    assert (found.values - torch.linalg.eigvalsh(matrix).flip(0)).abs().max() < 1e-14


def test_the_last_directions_of_a_space_are_found():
    """A block that is wider than what is left of the space, with directions that have broken down among it."""
    for seed in range(20):
        matrix = low_rank(32, 31, torch.float32, seed) * 100
        found = run(matrix, 17, block=6, seed=seed, tol=1e-7)
        truth = torch.linalg.eigvalsh(matrix.double()).flip(0)[:17]
        assert (found.values - truth).abs().max() < 1e-4 * truth[0]
        assert found.skew < 1e-5 * found.scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-30, 2.0**80])
def test_breakdown_is_relative_to_the_norm(scale, dtype):
    """Also where the squares of the entries leave the range of float32."""
    matrix = low_rank(80, dtype=dtype)
    one, other = run(matrix, 6, block=2), run(matrix * scale, 6, block=2)
    assert one.products == other.products
    assert torch.allclose(other.values[:4] / scale, one.values[:4], rtol=20 * torch.finfo(dtype).eps)
    pairs = rayleigh_ritz(other.vectors, other.images)
    assert (pairs.residual_norm <= 1e-6 * other.scale).all()
    assert torch.allclose(other.images, (matrix * scale @ other.vectors.T).T, rtol=1e-5, atol=1e-5 * other.scale)


# --- the ends of the spectrum ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_basis", [None, 30])
@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_ends_against_scipy(which, max_basis):
    """With and without restarts, to the same eigenvalues as ARPACK."""
    matrix = random_matrix(300)
    matrix = (matrix + matrix.T) / 2
    found = run(matrix, 6, block=2, selection=Selection(which), max_basis=max_basis, tol=1e-8)
    name = {"largest": "LA", "smallest": "SA", "magnitude": "LM"}[which]
    theirs = scipy.sparse.linalg.eigsh(matrix.numpy(), k=6, which=name, v0=np.ones(300), return_eigenvectors=False)
    assert found.settled
    assert np.allclose(np.sort(found.values.numpy()), np.sort(theirs), rtol=0, atol=1e-10 * np.abs(theirs).max())
    assert torch.equal(found.images, (matrix @ found.vectors.T).T)


def test_smallest_above_zero_passes_over_the_null_space():
    matrix = low_rank(60, 25)
    truth = torch.linalg.eigvalsh(matrix).flip(0)[:25]
    selection = Selection("positive", 60 * 2.3e-16)
    found = run(matrix, 5, block=5, selection=selection, relative=True)
    assert found.settled
    assert (found.values - truth[-5:].flip(0)).abs().max() < 1e-10 * truth[0]
    # fewer than were asked for: zeros come behind them
    few = run(low_rank(60, 3), 5, block=5, selection=selection, relative=True)
    assert (few.values[3:].abs() < 1e-13 * few.scale).all()
    assert (few.values[:3] > 1).all()


def test_smallest_above_zero_under_restarts():
    values = torch.cat([torch.zeros(40), torch.linspace(1, 50, 260)]).double()
    found = run(torch.diag(values), 3, block=3, selection=Selection("positive", 1e-12), relative=True, max_basis=60)
    assert found.settled
    assert torch.allclose(found.values, values[40:43], rtol=1e-10)


def test_products_beside_arpack():
    """To equal accuracy as many as ARPACK takes, and for what it does not do, search for copies and recompute residuals, 60 % more."""
    values = torch.arange(1, 1201, dtype=torch.float64) ** -1.0
    count = 0

    def matvec(v: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return values.numpy() * v.reshape(-1)

    operator = scipy.sparse.linalg.LinearOperator((1200, 1200), matvec=matvec, dtype=np.float64)
    scipy.sparse.linalg.eigsh(operator, k=10, v0=np.random.default_rng(0).standard_normal(1200), tol=1e-6)
    found = run(torch.diag(values), 10, block=1, tol=1e-6)
    assert found.settled
    assert (found.values - values[:10]).abs().max() < 1e-12
    assert found.products <= 1.6 * count


# --- the decomposition itself ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_krylov_relation_survives_restarts(dtype):
    """A V = V T + Q S and VᵀV = 1 after growth, restart, refresh and more growth."""
    matrix = definite(90).to(dtype)
    krylov = Krylov(90, dtype, torch.device("cpu"), capacity=60, metric=None, seed=3)
    krylov.start(3)
    eps = torch.finfo(dtype).eps

    def check(slack: float = 0.0) -> None:
        v = krylov._v[: krylov.size]
        q = krylov.pending
        basis = torch.cat([v, q]).double()
        assert (basis @ basis.T - torch.eye(len(basis))).abs().max() < 30 * eps
        left = (matrix.double() @ v.T.double()) - v.T.double() @ krylov.T - q.T.double() @ krylov.S
        assert torch.linalg.matrix_norm(left, 2) <= 200 * eps * krylov.scale + slack

    for _ in range(8):
        krylov.absorb(matrix @ krylov.pending.T)
        check()
    theta, y = krylov.ritz()
    krylov.restart(theta[-6:], y[:, -6:])
    check()
    krylov.absorb(matrix @ krylov.pending.T)
    check()
    krylov.refresh(2)
    lost = torch.linalg.matrix_norm(krylov.lost, 2).item()
    assert lost > 0
    check(lost)
    krylov.absorb(matrix @ krylov.pending.T)
    check(lost)
    assert krylov.skew < 100 * eps * krylov.scale
    theta, y = krylov.ritz()
    x = krylov.vectors(y[:, -2:])
    images = x @ matrix
    krylov.correct(theta[-2:], x, images)
    assert len(krylov.pending) == 2
    assert krylov.lost.numel() == 0
    residual = krylov.residual_norms(theta[-2:], x, images)
    assert torch.allclose(residual, torch.linalg.vector_norm(krylov.S, dim=0), rtol=1e-3)


def test_estimates_are_the_residuals():
    matrix = definite(120)
    found = run(matrix, 5, block=2, tol=1e-4)
    truth = torch.linalg.vector_norm(found.images - found.values[:, None] * found.vectors, dim=1)
    assert truth.max() <= 1e-4 * found.scale


def test_equal_seeds_give_equal_bits(unchanged):
    matrix = definite(70)
    with unchanged():
        one, two = run(matrix, 4, seed=5), run(matrix, 4, seed=5)
    assert torch.equal(one.vectors, two.vectors)
    assert not torch.equal(one.vectors, run(matrix, 4, seed=6).vectors)


# --- a metric --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [2, 6])
@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_generalised_problem_against_lapack(which, block):
    a, b = random_matrix(80), definite(80, 1)
    a = (a + a.T) / 2
    metric = Metric(lambda v: b @ v, lambda v: torch.linalg.solve(b, v))
    found = run(a, 5, block=block, selection=Selection(which), metric=metric, tol=1e-8)
    truth = scipy.linalg.eigh(a.numpy(), b.numpy(), eigvals_only=True)
    truth = truth[::-1][:5] if which == "largest" else truth[:5]
    assert found.settled
    assert np.allclose(found.values, truth, rtol=1e-10)
    x = found.vectors
    assert (x @ b @ x.T - torch.eye(5)).abs().max() < 1e-10
    pairs = rayleigh_ritz(x, found.images, metric)
    residual = x @ a - found.values[:, None] * (x @ b)
    dual = (residual * torch.linalg.solve(b, residual.T).T).sum(1).sqrt()
    assert pairs.residual_norm.max() < 2 * dual.max() + 1e-12


def test_a_metric_that_is_none():
    a = definite(40)
    b = torch.diag(torch.linspace(-1, 1, 40, dtype=torch.float64))
    with pytest.raises(InputError, match=r"B must be symmetric positive definite.*xᵀB x = -.*with a damping > 0"):
        run(a, 3, metric=Metric(lambda v: b @ v, lambda v: torch.linalg.solve(b, v)))
    good = definite(40, 2)
    with pytest.raises(InputError, match=r"The solve of B must be its inverse; B \(B⁻¹ x\) differs from x by"):
        run(a, 3, metric=Metric(lambda v: good @ v, lambda v: v))
    with pytest.raises(NonFiniteError, match="A solve with B holds NaN or infinity"):
        run(a, 3, metric=Metric(lambda v: good @ v, lambda v: v * float("nan")))


# --- budget, interruption, errors ------------------------------------------------------------------------------------


def test_a_budget_is_kept_and_the_rest_returned():
    matrix = definite(400)
    for budget in (2, 3, 7, 20):
        found = run(matrix, 5, block=4, max_products=budget)
        assert found.products <= budget
        assert not found.settled
        assert 1 <= len(found.values) <= 5
        assert torch.equal(found.images, (matrix @ found.vectors.T).T)
    told: list[int] = []
    found = run(matrix, 3, block=2, max_products=30, on_products=told.append)
    assert told[-1] == found.products
    assert told == sorted(told)


@pytest.mark.parametrize("at", [3, 12])
def test_control_c_returns_what_is_there(at):
    matrix, calls = definite(300), 0

    def product(v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return matrix @ v

    found = block_lanczos(product, 300, 2, block=1)
    assert found.interrupted
    assert not found.settled
    assert found.products == calls - 1 + len(found.values) - 1
    assert torch.equal(found.images, (matrix @ found.vectors.T).T)
    calls = at - 1  # nothing is there yet
    with pytest.raises(KeyboardInterrupt):
        block_lanczos(product, 300, 2, block=1)


def test_control_c_while_residuals_are_recomputed():
    matrix, calls = torch.diag(torch.arange(30.0, dtype=torch.float64)), 0

    def product(v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if v.shape[1] == 3:  # the three wanted
            raised.append(calls)
            if len(raised) == 1:
                raise KeyboardInterrupt
        return matrix @ v

    raised: list[int] = []
    found = block_lanczos(product, 30, 3, block=4)
    assert len(raised) == 2
    assert found.interrupted
    assert torch.allclose(found.values, torch.tensor([29.0, 28.0, 27.0], dtype=torch.float64))


@pytest.mark.parametrize("n", [2, 5, 300])
def test_an_asymmetric_operator_is_refused(n):
    matrices = [random_matrix(n), torch.triu(torch.ones(n, n, dtype=torch.float64), 1) + torch.eye(n)]
    for matrix in matrices:
        with pytest.raises(InputError, match=r"must be symmetric; uᵀ\(A v\) and vᵀ\(A u\) differ by"):
            run(matrix, 1, block=4)
    generator = torch.Generator().manual_seed(0)

    def noisy(v: Tensor) -> Tensor:
        noise = torch.randn(n, n, generator=generator, dtype=torch.float64)
        return (noise @ noise.T) @ v

    with pytest.raises(InputError, match="changes between calls"):
        block_lanczos(noisy, n, 1, block=1)


def test_rounding_that_is_not_symmetric_widens_the_bounds():
    matrix = definite(60)
    skew = random_matrix(60, 4)
    noisy = matrix + 1e-7 * (skew - skew.T)
    found = run(noisy, 3)
    assert 1e-8 < found.skew < 1e-4
    assert rounding(60, torch.float64, found.scale, found.skew) == found.skew


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_products_that_are_not_finite(value):
    matrix = definite(40)
    matrix[7, 7] = value
    with pytest.raises(NonFiniteError, match="A product with the operator holds NaN or infinity"):
        run(matrix, 3)


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_bounds_use_the_gap_only_where_it_is_certified():
    values, residual = np.array([10.0, 9.0, 5.0]), np.array([0.1, 0.1, 0.1])
    overlap = np.diag(residual**2)
    lower, upper = bounds(values, overlap, 0.01, [(-np.inf, 5.1)])
    assert np.allclose(upper - values, [0.01 + 0.01 / 0.89, 0.01 + 0.01 / 0.89, 1.01])
    assert np.allclose(values - lower, upper - values)
    lower, upper = bounds(values, overlap, 0.01, [(-np.inf, 5.1)], end="largest", resolution=3.0)
    assert np.allclose(values - lower, 0.01)
    assert upper[2] == pytest.approx(8.01)
    # intervals that touch are one cluster, bounded by the norm of its residuals
    lower, upper = bounds(np.array([9.1, 9.0]), np.full((2, 2), 0.01), 0.0, [])
    assert np.allclose(upper, [9.1, 9.0])  # nothing else exists
    lower, upper = bounds(np.array([9.1, 9.0]), np.full((2, 2), 0.01), 0.0, [(-np.inf, 8.9)])
    assert np.allclose(lower, np.array([9.1, 9.0]) - 0.02**0.5)
    lower, upper = bounds(np.array([9.1, 9.0]), np.full((2, 2), 0.01), 0.0, [(-np.inf, 9.0)], end="smallest")
    assert np.allclose(upper, [9.1, 9.0])
    assert np.allclose(lower, np.array([9.1, 9.0]) - 10 * 0.02**0.5)
    empty = bounds(np.zeros(0), np.zeros((0, 0)), 0.0, [])
    assert all(len(side) == 0 for side in empty)


def check_bounds(i: int, indefinite: bool) -> None:
    """The i-th largest eigenvalue lies within the bounds of the i-th pair."""
    s = sample(i, indefinite=indefinite)
    found = run(s.matrix, s.k, block=s.block, seed=i, max_products=4000)
    assert found.settled, i
    pairs = rayleigh_ritz(found.vectors, found.images)
    k, values = min(s.k, s.n), pairs.values.numpy()
    assert len(values) == k
    slack = rounding(s.n, s.matrix.dtype, found.scale, found.skew)
    rest = [] if k == s.n else [(-np.inf, values[-1] + 1e-6 * found.scale + slack)]
    lower, upper = bounds(values, pairs.overlap.numpy(), slack, rest, end="largest", resolution=1e-6 * found.scale)
    truth = s.truth[:k].numpy()
    assert (lower <= truth).all(), i
    assert (truth <= upper).all(), i
    # and they say something: the tolerance, or rounding
    assert (upper - lower).max() <= 1.2e-5 * found.scale + 20 * slack, i
    residual = torch.linalg.vector_norm(
        pairs.vectors.double() @ s.matrix.double() - pairs.values[:, None] * pairs.vectors.double(), dim=1
    )
    assert (residual <= 1e-6 * found.scale + slack).all(), i


@pytest.mark.parametrize("indefinite", [False, True])
def test_random_matrices_stay_within_their_bounds(indefinite):
    for i in range(30):
        check_bounds(i, indefinite)


@pytest.mark.slow
@pytest.mark.parametrize("indefinite", [False, True])
def test_300_random_matrices_stay_within_their_bounds(indefinite):
    for i in range(300):
        check_bounds(i, indefinite)
