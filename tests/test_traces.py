"""Traces and diagonals from products: unbiased, exact where they must be, and with errors that hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import stdtrit
from scipy.stats import binom

from fisherlens.errors import NonFiniteError
from fisherlens.linalg.diagonals import DIAGONAL_METHODS, diagonal
from fisherlens.linalg.probes import Probes, split
from fisherlens.linalg.traces import TRACE_METHODS, trace

DTYPE = torch.float64
CPU = torch.device("cpu")
N = 120


def matrix(spectrum: torch.Tensor, seed: int = 0) -> torch.Tensor:
    n = len(spectrum)
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=DTYPE))[0]
    return (q * spectrum.double()) @ q.T


j = torch.arange(1.0, N + 1)
MATRICES = {
    "rank one": matrix(torch.cat([torch.ones(1), torch.zeros(N - 1)])),
    "rank four": matrix(torch.cat([torch.tensor([4.0, 3, 2, 1]), torch.zeros(N - 4)])),
    "falling": matrix(j**-1.5),
    "geometric": matrix(0.8**j),
    "flat": matrix(1 + j / N),
    "indefinite": matrix(torch.linspace(-1, 2, N)),
}


class Counted:
    """A product that counts the vectors it is asked for."""

    def __init__(self, A: torch.Tensor):
        self.A, self.vectors = A, 0

    def __call__(self, v: torch.Tensor) -> torch.Tensor:
        assert v.dtype == self.A.dtype
        self.vectors += v.shape[1]
        return self.A @ v


def run(A: torch.Tensor, method: str, k: int, seed: int = 0, what=trace, **options):
    product = Counted(A)
    found = what(product, Probes(len(A), A.dtype, CPU, seed), k, method, **options)
    assert found.num_matvecs == product.vectors
    return found


def covered(found, truth, slack: float = 0.0) -> float:
    quantile = stdtrit(found.dof, 0.975)
    return ((found.value - truth).abs() <= quantile * found.sem + slack).double().mean().item()


def bounds(count: int) -> tuple[float, float]:
    """Shares that ``count`` intervals of 95 % leave with a chance of 1 in 1000, on either side."""
    return binom.ppf(1e-3, count, 0.95) / count, binom.ppf(1 - 1e-3, count, 0.95) / count


# --- traces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("method", TRACE_METHODS)
def test_unbiased(method, name):
    if method == "xnystrace" and name == "indefinite":
        return
    A = MATRICES[name]
    values = torch.stack([run(A, method, 12, seed).value for seed in range(200)])
    error = values.mean() - A.trace()
    assert error.abs() <= 4.5 * values.std() / 200**0.5 + 1e-10 * A.trace()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", TRACE_METHODS)
def test_exact_for_low_rank(method, dtype):
    """Rank 4: 12 products suffice for the sketches, 6 do not, and the error must show that."""
    A = MATRICES["rank four"].to(dtype)
    eps = torch.finfo(dtype).eps
    if method != "hutchinson":
        found = run(A, method, 12)
        assert found.value.dtype == torch.float64
        assert abs(found.value.item() - 10) < 300 * eps
        assert found.sem.item() < 300 * eps
        assert run(A, method, 60).value.item() == pytest.approx(10, rel=300 * eps)
    few = [run(A, method, 6 if method != "xnystrace" else 3, seed) for seed in range(100)]
    error = np.array([abs(found.value.item() - 10) for found in few])
    sem = np.array([found.sem.item() for found in few])
    assert np.sqrt((error**2).mean()) > 0.3  # they are off,
    assert np.sqrt((sem**2).mean()) > 0.6 * np.sqrt((error**2).mean())  # and say so


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize(("method", "k"), [("hutchinson", 4), ("hutchinson", 10), ("hutch++", 6), ("hutch++", 15)])
def test_intervals_hold_the_truth(method, k, name):
    """The smaller test of the calibration, with bounds for 300 seeds; a spread of skewed numbers would give 80 to 92 %."""
    A = MATRICES[name]
    low, high = bounds(300)
    hits = [covered(run(A, method, k, seed), A.trace()) for seed in range(300)]
    if run(A, method, k).sem < 1e-10:
        return  # exact, up to rounding
    assert low <= np.mean(hits) <= high
    assert low > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize(
    ("method", "k"),
    [("hutchinson", 4), ("hutchinson", 12), ("hutchinson", 40), ("hutch++", 6), ("hutch++", 15), ("hutch++", 60)],
)
def test_intervals_hold_the_truth_in_93_to_97_percent(method, k, name):
    """3,000 seeds, so that chance alone moves the share by 0.4 %."""
    A = MATRICES[name]
    found = [run(A, method, k, seed) for seed in range(3000)]
    if found[0].sem < 1e-10:
        assert all(abs(one.value - A.trace()) < 1e-10 for one in found)
        return
    assert 0.93 <= np.mean([covered(one, A.trace()) for one in found]) <= 0.97


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_the_error_is_that_of_the_estimator(method):
    """The standard error is, on average over seeds, the deviation over seeds, and falls like 1/√k for Hutchinson."""
    A = MATRICES["falling"]
    for k in (6, 24):
        found = [run(A, method, k, seed) for seed in range(400)]
        deviation = torch.stack([one.value for one in found]).std().item()
        assert np.sqrt(np.mean([one.sem.item() ** 2 for one in found])) == pytest.approx(deviation, rel=0.15)
    off = 2 * (A.square().sum() - A.diagonal().square().sum())
    assert run(A, "hutchinson", 5000).sem.item() == pytest.approx((off / 5000).sqrt().item(), rel=0.1)


def test_signs_see_no_error_in_a_diagonal_matrix():
    A = torch.diag(j.double())
    found = run(A, "hutchinson", 5)
    assert found.value.item() == pytest.approx(A.trace().item(), rel=1e-14)
    assert found.sem.item() < 1e-6 * found.value.item()


def test_accuracy_on_falling_spectra():
    """Root-mean-square errors over seeds: a sketch gains orders of magnitude, and XNysTrace most."""
    A, error = MATRICES["geometric"], {}
    for method in TRACE_METHODS:
        values = torch.stack([run(A, method, 60, seed).value for seed in range(20)])
        error[method] = (values - A.trace()).square().mean().sqrt().item() / A.trace().item()
    assert error["hutchinson"] > 0.03
    assert error["hutch++"] < 5e-3
    assert error["xtrace"] < 1e-3
    assert error["xnystrace"] < 3e-5


@pytest.mark.parametrize("method", TRACE_METHODS)
def test_zero_and_identity(method):
    zero, one = torch.zeros(9, 9, dtype=DTYPE), torch.eye(9, dtype=DTYPE)
    found = run(zero, method, 6)
    assert (found.value.item(), found.sem.item()) == (0, 0)
    found = run(one, method, 12)  # flat: a sketch is no help, and adds noise
    assert found.value.item() == pytest.approx(9, abs=1e-6 if method in ("hutchinson", "xnystrace") else 2)
    assert run(one, method, 100).value.item() == pytest.approx(9, rel=1e-12)  # more products than the order
    assert run(2 * one[:1, :1], method, 12).value.item() == pytest.approx(2, rel=1e-12)


@pytest.mark.parametrize("method", TRACE_METHODS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_products_that_are_not_finite(method, value):
    A = MATRICES["flat"].clone()
    A[3, 3] = value
    with pytest.raises(NonFiniteError, match="A product with the operator holds NaN or infinity"):
        run(A, method, 12)


def test_nystrom_of_an_indefinite_matrix():
    with pytest.raises(NonFiniteError, match="XNysTrace met an operator that is not positive semi-definite"):
        run(-MATRICES["flat"], "xnystrace", 12)


@pytest.mark.parametrize("k", [1, 2])
def test_too_few_probes_have_no_error(k):
    assert math.isnan(run(MATRICES["flat"], "hutchinson", k).sem.item())
    assert math.isnan(run(MATRICES["flat"], "hutch++", k).sem.item())
    assert math.isnan(run(MATRICES["flat"], "xtrace", 2 * k).sem.item())


def test_split_of_the_products():
    for k in range(1, 200):
        sketch, probes = split(k)
        assert 2 * sketch + probes == k
        assert probes >= min(4, k)
    assert [split(k) for k in (3, 5, 6, 9, 12, 30, 60)] == [(0, 3), (0, 5), (1, 4), (2, 5), (4, 4), (10, 10), (20, 20)]


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_target_error(method):
    A = MATRICES["falling"]
    target = 0.02 * A.trace().item()
    found = run(A, method, 12, target_sem=target, limit=100_000)
    assert found.sem.item() <= target
    assert found.num_matvecs < 3000
    short = run(A, method, 12, target_sem=1e-6, limit=100)
    assert short.num_matvecs == 100
    assert short.sem.item() > 1e-6
    enough = run(A, method, 12, target_sem=1e9, limit=100)
    assert enough.num_matvecs == 12
    # added probes count as if they had been there from the start
    whole = torch.stack(
        [run(A, "hutchinson", 8, s, target_sem=0.1 * A.trace().item(), limit=64).value for s in range(50)]
    )
    assert (whole.mean() - A.trace()).abs() < 4.5 * whole.std() / 50**0.5


def test_stopping_at_a_target_keeps_the_calibration():
    A = MATRICES["geometric"]
    target = 0.08 * A.trace().item()
    low, _ = bounds(300)
    hits = [covered(run(A, "hutchinson", 6, s, target_sem=target, limit=10_000), A.trace()) for s in range(300)]
    assert np.mean(hits) >= low


@pytest.mark.parametrize("method", TRACE_METHODS)
def test_seeds(method, unchanged):
    A = MATRICES["falling"]
    with unchanged():
        first, again, other = (run(A, method, 12, seed) for seed in (1, 1, 2))
    assert torch.equal(first.value, again.value)
    assert torch.equal(first.sem, again.sem)
    assert first.value != other.value


# --- diagonals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("method", DIAGONAL_METHODS)
def test_diagonal_unbiased(method, name):
    A = MATRICES[name]
    values = torch.stack([run(A, method, 12, seed, diagonal).value for seed in range(150)])
    z = (values.mean(0) - A.diagonal()) / (values.std(0) / 150**0.5 + 1e-13)
    assert z.abs().max() < 5.5  # of 120 entries
    assert z.square().mean() < 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", ["hutch++", "xdiag"])
def test_diagonal_exact_for_low_rank(method, dtype):
    A = MATRICES["rank four"].to(dtype)
    found = run(A, method, 12, what=diagonal)
    assert (found.value - A.diagonal()).abs().max() < 300 * torch.finfo(dtype).eps
    assert found.sem.max() < 300 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize(("method", "k"), [("hutchinson", 3), ("hutchinson", 10), ("hutch++", 15)])
def test_diagonal_intervals_hold_the_truth(method, k, name):
    """Exact t distributions: of 100 seeds and 120 entries, which are correlated within a seed, very nearly 95 %."""
    A = MATRICES[name]
    found = [run(A, method, k, seed, diagonal) for seed in range(100)]
    if found[0].sem.max() < 1e-10:
        return
    assert np.mean([covered(one, A.diagonal()) for one in found]) == pytest.approx(0.95, abs=0.012)


@pytest.mark.slow
@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize(
    ("method", "k"), [("hutchinson", 3), ("hutchinson", 10), ("hutchinson", 40), ("hutch++", 6), ("hutch++", 30)]
)
def test_diagonal_intervals_hold_the_truth_in_93_to_97_percent(method, k, name):
    A = MATRICES[name]
    found = [run(A, method, k, seed, diagonal) for seed in range(1000)]
    if found[0].sem.max() < 1e-10:
        assert all((one.value - A.diagonal()).abs().max() < 1e-10 for one in found)
        return
    entries = torch.stack([(one.value - A.diagonal()).abs() <= stdtrit(one.dof, 0.975) * one.sem for one in found])
    share = entries.double().mean(0)
    assert 0.945 <= share.mean() <= 0.955
    low, high = binom.ppf(1e-6, 1000, 0.95) / 1000, binom.ppf(1 - 1e-6, 1000, 0.95) / 1000
    assert low <= share.min() <= share.max() <= high  # every single entry


@pytest.mark.parametrize("method", DIAGONAL_METHODS)
def test_diagonal_of_zero_identity_and_diagonal(method):
    zero, one = torch.zeros(9, 9, dtype=DTYPE), torch.eye(9, dtype=DTYPE)
    assert (run(zero, method, 6, what=diagonal).value == 0).all()
    assert torch.allclose(run(one, method, 100, what=diagonal).value, one.diagonal(), rtol=1e-12)
    assert torch.allclose(run(one[:1, :1], method, 12, what=diagonal).value, one[0, :1], rtol=1e-12)
    if method == "hutchinson":
        d = torch.diag(torch.arange(1.0, 10, dtype=DTYPE))
        assert torch.allclose(run(d, method, 3, what=diagonal).value, d.diagonal(), rtol=1e-12)


@pytest.mark.parametrize("method", DIAGONAL_METHODS)
def test_diagonal_errors_and_seeds(method, unchanged):
    A = MATRICES["falling"].clone()
    with unchanged():
        first, again = (run(A, method, 12, 1, diagonal) for _ in range(2))
    assert torch.equal(first.value, again.value)
    assert torch.isnan(run(A, method, 2, what=diagonal).sem).all()
    A[0, 1] = math.nan
    with pytest.raises(NonFiniteError, match="A product with the operator holds NaN or infinity"):
        run(A, method, 12, what=diagonal)
