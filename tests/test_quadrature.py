"""Lanczos rules and Chebyshev moments of matrices whose spectrum is known."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from fisherlens.errors import InputError, NonFiniteError
from fisherlens.linalg.chebyshev import chebyshev_moments, delta_moments, jackson, mass_below, rule_of
from fisherlens.linalg.quadrature import gauss_rules

DTYPES = (torch.float32, torch.float64)


def rotated(eigenvalues, seed=0, dtype=torch.float64):
    """A symmetric matrix with these eigenvalues in a random basis."""
    n = len(eigenvalues)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    matrix = (basis * torch.as_tensor(eigenvalues, dtype=torch.float64)) @ basis.T
    return ((matrix + matrix.T) / 2).to(dtype)


def signs(count, n, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randint(0, 2, (count, n), generator=generator) - 1).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [2, 7, 20])
def test_moments_of_each_probe(dtype, steps):
    """Mass 1, and the first moments vᵀAv and ‖Av‖² of the unit vector, whatever the number of steps (traps: case 25)."""
    matrix, probes = rotated(np.geomspace(1e-3, 2, 50), dtype=dtype), signs(4, 50, dtype=dtype)
    rules = gauss_rules(lambda v: matrix @ v, probes, steps)
    assert rules.nodes.shape == rules.weights.shape == (4, steps)
    assert (np.diff(rules.nodes) > 0).all()
    assert (rules.weights >= 0).all()
    v = (probes / probes.norm(dim=1, keepdim=True)).double()
    image = v @ matrix.double()
    rel = 1e-12 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(rules.weights.sum(1), 1, rtol=1e-13)
    np.testing.assert_allclose((rules.weights * rules.nodes).sum(1), (v * image).sum(1), rtol=rel)
    np.testing.assert_allclose((rules.weights * rules.nodes**2).sum(1), image.square().sum(1), rtol=rel)
    np.testing.assert_allclose(rules.squared_norms, 50, rtol=1e-6)
    assert rules.products == 4 * steps


def test_rules_are_exact_for_polynomials_below_degree_twice_the_steps():
    matrix, probes = rotated(np.linspace(-1, 2, 40)), signs(3, 40)
    rules = gauss_rules(lambda v: matrix @ v, probes, 6)
    for degree in range(12):
        truth = torch.einsum("pi,ij,pj->p", probes, torch.linalg.matrix_power(matrix, degree), probes)
        found = rules.squared_norms * (rules.weights * rules.nodes**degree).sum(1)
        np.testing.assert_allclose(found, truth, rtol=1e-10)
    truth = torch.einsum("pi,ij,pj->p", probes, torch.linalg.matrix_power(matrix, 12), probes)
    assert not np.allclose(rules.squared_norms * (rules.weights * rules.nodes**12).sum(1), truth, rtol=1e-10)


def test_all_steps_give_the_spectrum():
    values = np.sort(np.random.default_rng(0).uniform(0.1, 3, 25))
    matrix = rotated(values)
    rules = gauss_rules(lambda v: matrix @ v, signs(2, 25), 25)
    np.testing.assert_allclose(rules.nodes, np.tile(values, (2, 1)), rtol=1e-10)
    assert rules.exact.all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [8, 20, 60])
@pytest.mark.parametrize("n", [60, 200])
def test_low_rank_stops_with_the_right_values_and_no_copies(n, steps, dtype):
    """Traps, case 26: rank 4."""
    true = np.array([236.5, 130.1, 88.2, 4.0])
    matrix = rotated(np.concatenate([true, np.zeros(n - 4)]), dtype=dtype)
    rules = gauss_rules(lambda v: matrix @ v, signs(5, n, dtype=dtype), steps)
    assert rules.exact.all()
    assert (rules.steps <= 6).all()
    eps = torch.finfo(dtype).eps
    for nodes in rules.nodes:
        np.testing.assert_allclose(nodes[np.nan_to_num(nodes) > 1][::-1], true, rtol=0, atol=100 * eps * 236.5)
    # the weight at zero and the values themselves: any function is exact
    truth = torch.einsum("pi,ij,pj->p", signs(5, n), rotated([*np.log1p(true), *np.zeros(n - 4)]), signs(5, n))
    found = rules.squared_norms * np.nansum(rules.weights * np.log1p(np.abs(rules.nodes)), axis=1)
    np.testing.assert_allclose(found, truth, rtol=1e4 * eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_identity_and_repeated_eigenvalues(dtype):
    probes = signs(3, 30, dtype=dtype)
    zero = gauss_rules(lambda v: 0 * v, probes, 10)
    assert zero.steps.tolist() == [1, 1, 1]
    assert (zero.nodes == 0).all()
    assert (zero.weights == 1).all()
    one = gauss_rules(lambda v: v.clone(), probes, 10)
    assert one.steps.tolist() == [1, 1, 1]
    np.testing.assert_allclose(one.nodes, 1, rtol=1e-6)
    matrix = rotated(np.repeat([1.0, 2.0, 5.0], 10), dtype=dtype)
    repeated = gauss_rules(lambda v: matrix @ v, probes, 10)
    assert (repeated.steps <= 4).all()
    assert repeated.exact.all()
    heavy = repeated.weights > 1e-6
    np.testing.assert_allclose(repeated.nodes[heavy].reshape(3, 3), np.tile([1.0, 2.0, 5.0], (3, 1)), rtol=1e-5)


def test_probes_stop_one_by_one():
    """A probe in an invariant subspace of two dimensions beside one that needs all of them."""
    d = torch.arange(1.0, 11.0, dtype=torch.float64)
    probes = torch.zeros(2, 10, dtype=torch.float64)
    probes[0, [2, 7]] = 1
    probes[1] = 1
    widths = []

    def product(v):
        widths.append(v.shape[1])
        return d[:, None] * v

    rules = gauss_rules(product, probes, 10)
    assert rules.steps.tolist() == [2, 10]
    assert widths == [2] * 2 + [1] * 8
    assert rules.products == 12
    np.testing.assert_allclose(rules.nodes[0, :2], [3, 8])
    assert np.isnan(rules.nodes[0, 2:]).all()
    np.testing.assert_allclose(rules.weights[0, :2], 0.5)


def test_groups_that_fit_memory_give_the_same_rules():
    matrix, probes = rotated(np.geomspace(1e-3, 2, 50)), signs(5, 50)
    whole = gauss_rules(lambda v: matrix @ v, probes, 10)
    parts = gauss_rules(lambda v: matrix @ v, probes, 10, max_bytes=2 * 10 * 50 * 8)
    np.testing.assert_allclose(parts.nodes, whole.nodes, rtol=1e-9)
    assert parts.products == whole.products == 50


@pytest.mark.parametrize("f", [lambda x: np.log1p(x / 0.01), lambda x: x / (x + 0.01)], ids=["log", "ratio"])
def test_gauss_and_radau_rules_bracket_each_probe(f):
    values = np.concatenate([np.geomspace(1e-5, 3, 80), np.zeros(20)])
    matrix, probes = rotated(values), signs(6, 100)
    truth = torch.einsum("pi,ij,pj->p", probes, rotated(f(values)), probes).numpy()
    gaps = []
    for steps in (3, 6, 12):
        rules = gauss_rules(lambda v: matrix @ v, probes, steps)
        upper = rules.squared_norms * np.nansum(rules.weights * f(rules.nodes), axis=1)
        lower = rules.squared_norms * np.nansum(rules.radau_weights * f(rules.radau_nodes), axis=1)
        assert (lower <= truth + 1e-9).all()
        assert (truth <= upper + 1e-9).all()
        gaps.append((upper - lower).max())
        np.testing.assert_allclose(np.nansum(rules.radau_weights, axis=1), 1)
    assert gaps[0] > gaps[1] > gaps[2] > 0


def test_residuals_and_extent_hold_eigenvalues():
    values = np.sort(np.random.default_rng(1).uniform(-1, 3, 60))
    matrix = rotated(values)
    rules = gauss_rules(lambda v: matrix @ v, signs(3, 60), 12)
    distance = np.abs(rules.nodes[..., None] - values).min(-1)
    assert (distance <= rules.residuals + 1e-12).all()
    low, high = rules.extent
    assert low <= values[0]
    assert values[-1] <= high <= values[-1] + 0.5


def test_deflation_leaves_the_complement():
    values = np.array([50.0, 20.0, *np.geomspace(1e-2, 1, 30)])
    matrix = rotated(values)
    basis = torch.linalg.eigh(matrix)[1][:, -2:]
    probes = signs(4, 32)
    rules = gauss_rules(lambda v: matrix @ v, probes, 32, deflated=basis)
    assert np.nanmax(rules.nodes) == pytest.approx(1.0, rel=1e-9)
    rest = probes - probes @ basis @ basis.T
    np.testing.assert_allclose(rules.squared_norms, rest.square().sum(1), rtol=1e-12)
    truth = torch.einsum("pi,ij,pj->p", rest, matrix, rest)
    np.testing.assert_allclose(rules.squared_norms * np.nansum(rules.weights * rules.nodes, axis=1), truth, rtol=1e-10)
    full = gauss_rules(lambda v: matrix @ v, probes, 5, deflated=torch.linalg.eigh(matrix)[1])
    assert (full.squared_norms == 0).all()
    assert full.steps.tolist() == [1] * 4


def test_interrupt_keeps_finished_steps():
    matrix, probes = rotated(np.geomspace(1e-3, 2, 50)), signs(3, 50)
    calls = []

    def product(v):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(1)
        return matrix @ v

    rules = gauss_rules(product, probes, 20)
    assert rules.interrupted
    assert rules.steps.tolist() == [4, 4, 4]
    four = gauss_rules(lambda v: matrix @ v, probes, 4)
    np.testing.assert_array_equal(rules.nodes, four.nodes)
    with pytest.raises(KeyboardInterrupt):
        gauss_rules(product, probes, 20)


def test_non_finite_products_raise():
    def product(v):
        return v * float("nan")

    message = (
        "^A product in Lanczos step 1 holds NaN or infinity. The operator probably overflowed: look for very large"
    )
    with pytest.raises(NonFiniteError, match=message):
        gauss_rules(product, signs(2, 10), 5)
    with pytest.raises(NonFiniteError, match=r"^A product in Chebyshev step 1 holds NaN or infinity\."):
        chebyshev_moments(product, signs(2, 10), 5, -1.0, 1.0)


# --- Chebyshev ----------------------------------------------------------------------------------------------------


def test_moments_equal_those_of_the_eigenvalues():
    values = np.random.default_rng(2).uniform(-0.5, 3, 40)
    matrix = rotated(values)
    probes = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    moments = chebyshev_moments(lambda v: matrix @ v, probes, 8, -1.0, 3.5)
    assert moments.values.shape == (40, 16)
    assert moments.products == 40 * 8
    np.testing.assert_allclose(moments.values.sum(0), delta_moments(moments.scaled(values), 16), atol=1e-10)


def test_jackson_density_of_one_eigenvalue_is_a_bell_of_the_stated_width():
    """Methods, 2.4: standard deviation π/L √(1 - x² + (4x² - 3)/L); no negative mass."""
    count, x = 120, np.linspace(-1, 1, 20001)
    for place in (-0.6, 0.0, 0.9):
        mass = np.diff(mass_below(delta_moments(np.array([place]), count), x))
        middle = (x[1:] + x[:-1]) / 2
        assert mass.min() > -1e-12
        assert mass.sum() == pytest.approx(1, abs=1e-12)
        mean = (mass * middle).sum()
        spread = np.sqrt((mass * (middle - mean) ** 2).sum())
        wanted = np.pi / count * np.sqrt(1 - place**2 + (4 * place**2 - 3) / count)
        assert spread == pytest.approx(wanted, rel=5e-3)
    assert jackson(count)[0] == pytest.approx(1)


def test_chebyshev_rule_integrates_polynomials_below_the_number_of_moments():
    values = np.random.default_rng(3).uniform(0, 2, 30)
    matrix, probes = rotated(values), signs(3, 30)
    moments = chebyshev_moments(lambda v: matrix @ v, probes, 5, -0.1, 2.1)
    nodes, weights = rule_of(moments)
    for degree in range(10):
        truth = torch.einsum("pi,ij,pj->p", probes, torch.linalg.matrix_power(matrix, degree), probes)
        np.testing.assert_allclose(moments.squared_norms * (weights @ nodes**degree), truth, rtol=1e-10)


def test_an_operator_that_is_not_symmetric_is_found_by_its_moments():
    matrix = torch.triu(torch.ones(30, 30, dtype=torch.float64))
    message = r"^Chebyshev moment \d+ is .+ times the zeroth; at most 1 was expected of a symmetric operator .+ use method='slq'\.$"
    with pytest.raises(InputError, match=message):
        chebyshev_moments(lambda v: matrix @ v, signs(3, 30), 20, -1.0, 2.0)


def test_interrupted_moments_are_those_of_fewer_products():
    matrix, probes = rotated(np.linspace(0, 1, 20)), signs(2, 20)
    calls = []

    def product(v):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return matrix @ v

    found = chebyshev_moments(product, probes, 9, -0.1, 1.1)
    assert found.interrupted
    np.testing.assert_array_equal(found.values, chebyshev_moments(lambda v: matrix @ v, probes, 3, -0.1, 1.1).values)
    with pytest.raises(KeyboardInterrupt):
        chebyshev_moments(product, probes, 9, -0.1, 1.1)


def test_lanczos_and_chebyshev_see_the_same_distribution():
    """Two independent methods on one matrix: the Wasserstein distance between them is within their resolution."""
    values = np.concatenate([np.random.default_rng(4).uniform(0, 1, 150), [3.0, 4.0]])
    matrix, probes = rotated(values), signs(4, 152)
    rules = gauss_rules(lambda v: matrix @ v, probes, 40)
    moments = chebyshev_moments(lambda v: matrix @ v, probes, 80, -0.05, 4.1)
    x = np.linspace(-0.05, 4.1, 3001)
    mass = np.diff(mass_below(moments.values.mean(0), moments.scaled(x)))
    distance = scipy.stats.wasserstein_distance(
        (x[1:] + x[:-1]) / 2, rules.nodes.ravel(), np.clip(mass, 0, None), rules.weights.ravel()
    )
    assert distance < moments.resolution
