"""What the reference says of a matrix, of blocks and of one optimizer, against closed forms, brute force and scipy."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from cases import ALL_CASES
from torch.distributions import MultivariateNormal, kl_divergence

from fisherlens import reference
from fisherlens.layout import Layout

LAMBDA = 1e-2


def close(ours, theirs, rtol=1e-10):
    atol = rtol * max(theirs.abs().max().item(), 1e-300)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def network():
    """The Fisher of a small network, its gradient, its blocks by layer, its score rows and their weight."""
    model, data, likelihood = ALL_CASES["mlp_tanh"]()
    U, W = reference.score_matrix(model, data, likelihood)
    return SimpleNamespace(
        F=reference.fisher(model, data, likelihood),
        g=reference.gradient(model, data, likelihood),
        theta=torch.cat([p.detach().reshape(-1) for p in model.parameters()]),
        blocks=[torch.arange(layer.start, layer.stop) for layer in Layout.from_model(model).layers],
        U=U,
        W=W,
        n=len(data[1]),
    )


def random_matrix(P, rank, seed=0):
    A = torch.randn(rank, P, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return A.T @ A / rank


# --- a matrix --------------------------------------------------------------------------------------------------------


def test_simple_numbers_of_a_matrix_written_out():
    F = torch.tensor([[4.0, 2.0], [2.0, 1.0]], dtype=torch.float64)  # rank one, eigenvalues 5 and 0
    assert reference.diagonal(F).tolist() == [4, 1]
    assert reference.trace(F) == 5
    assert reference.frobenius_norm(F) == pytest.approx(5)
    close(reference.spectrum(F), torch.tensor([5.0, 0.0], dtype=F.dtype), 1e-15)
    assert reference.effective_dimension(F, 5.0) == pytest.approx(1 / 2)
    assert reference.log_determinant(F, 5.0) == pytest.approx(math.log(2))
    v = torch.tensor([2.0, 1.0], dtype=F.dtype)
    close(reference.solve(F, v, 3.0), v / 8)
    close(reference.solve(F, torch.stack([v, 2 * v], 1), 3.0), torch.stack([v, 2 * v], 1) / 8)


def test_the_spectrum_is_that_of_the_symmetric_part():
    """Symmetric eigensolvers read one triangle only and would call these eigenvalues 1 and 1."""
    F = torch.tensor([[1.0, 5.0], [0.0, 1.0]], dtype=torch.float64)
    close(reference.spectrum(F), torch.tensor([3.5, -1.5], dtype=F.dtype))


def test_traces_of_functions_agree_with_the_spectrum(network):
    values = torch.as_tensor(scipy.linalg.eigvalsh(network.F.numpy())).clamp(min=0)
    assert reference.effective_dimension(network.F, LAMBDA) == pytest.approx((values / (values + LAMBDA)).sum().item())
    assert reference.log_determinant(network.F, LAMBDA) == pytest.approx((values / LAMBDA).log1p().sum().item())
    assert reference.trace(network.F) == pytest.approx(values.sum().item(), rel=1e-10)
    assert reference.frobenius_norm(network.F) == pytest.approx(values.square().sum().sqrt().item(), rel=1e-10)


def test_the_number_of_known_directions_is_bounded_by_the_data(network):
    """Seven examples with two free logits each determine fourteen directions, however small the damping is."""
    assert reference.effective_dimension(network.F, 1e-9) == pytest.approx(14, abs=1e-3)


# --- blocks ----------------------------------------------------------------------------------------------------------


def test_block_diagonal_keeps_the_blocks_and_nothing_else(network):
    F_b = reference.block_diagonal(network.F, network.blocks)
    close(F_b, torch.block_diag(*[reference.block(network.F, b) for b in network.blocks]))
    close(reference.block_diagonal(network.F, [torch.arange(len(network.F))]), network.F)
    singles = torch.arange(len(network.F)).split(1)
    close(reference.block_diagonal(network.F, singles), network.F.diagonal().diag())
    # a block need not be contiguous, nor in order
    mixed = [torch.tensor([4, 0]), torch.tensor([3, 1, 2])]
    F = random_matrix(5, 3)
    together = torch.tensor([[0, 4], [1, 2], [1, 3], [2, 3]])
    mask = torch.eye(5, dtype=F.dtype)
    mask[together[:, 0], together[:, 1]] = mask[together[:, 1], together[:, 0]] = 1
    assert torch.equal(reference.block_diagonal(F, mixed), F * mask)


def test_squared_coupling_is_the_kernel_alignment_of_the_blocks(network):
    K = [network.U[:, b] @ network.U[:, b].T for b in network.blocks]
    expected = torch.tensor([[((a * b).sum() / (a.norm() * b.norm())).item() for b in K] for a in K], dtype=K[0].dtype)
    rho = reference.coupling(network.F, network.blocks)
    close(rho**2, expected)
    assert rho.max() <= 1 + 1e-12
    assert rho.diagonal().tolist() == pytest.approx([1, 1, 1])
    assert 0.05 < rho[0, 1] < 0.95


def test_a_block_that_is_zero_is_coupled_to_nothing():
    F = torch.block_diag(random_matrix(3, 3), torch.zeros(2, 2, dtype=torch.float64))
    blocks = [torch.arange(2), torch.tensor([2]), torch.arange(3, 5)]
    rho, floor = reference.coupling(F, blocks), reference.coupling_noise_floor(F, blocks, 4, 1)
    for matrix in (rho, floor):
        assert torch.isfinite(matrix).all()
        assert not matrix[2].any()
        assert not matrix[:, 2].any()
    assert rho[0, 1] > 0
    dropped = reference.block_diagonal(F, blocks)
    assert reference.coupling(dropped, blocks)[0, 1] == 0


def test_noise_floor_is_the_mean_over_all_signed_permutations_of_the_rows():
    """Those have the first two moments of a random rotation, and can be listed: 6! orders by cyclic shifts, 2⁶ signs."""
    U = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    N, blocks = 3, [torch.tensor([0, 2]), torch.tensor([1, 3, 4])]  # three examples, two rows each
    squares = []
    for shift in range(6):
        for signs in itertools.product([-1.0, 1.0], repeat=6):
            V = U.roll(shift, 0) * torch.tensor(signs, dtype=U.dtype)[:, None]
            squares.append((U[:, blocks[0]].T @ V[:, blocks[1]] / N).square().sum())
    F = U.T @ U / N
    own = [reference.frobenius_norm(reference.block(F, b)) for b in blocks]
    expected = (torch.stack(squares).mean() / (own[0] * own[1])).sqrt()
    assert reference.coupling_noise_floor(F, blocks, N, 2)[0, 1].item() == pytest.approx(expected.item(), rel=1e-10)


def test_permuted_blocks_have_the_mean_square_of_the_closed_form():
    """All 5! permutations; R = 1. Identity gives the block itself."""
    U = torch.randn(5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    i, j, N = torch.tensor([0, 3]), torch.tensor([1, 2, 5]), 5
    F = U.T @ U / N
    close(reference.permuted_block(U, N, i, j, torch.arange(5)), reference.block(F, i, j))
    orders = [torch.tensor(order) for order in itertools.permutations(range(5))]
    mean = sum(reference.permuted_block(U, N, i, j, order).square().sum() for order in orders) / len(orders)
    K_i, K_j = U[:, i] @ U[:, i].T, U[:, j] @ U[:, j].T
    diagonals = K_i.trace() * K_j.trace() / N
    others = (K_i.sum() - K_i.trace()) * (K_j.sum() - K_j.trace()) / (N * (N - 1))
    assert mean.item() == pytest.approx(((diagonals + others) / N**2).item(), rel=1e-10)


@pytest.mark.parametrize("scheme", ["layers", "thirds", "singles", "whole"])
def test_energy_lies_between_one_over_the_blocks_and_one(network, scheme):
    P = len(network.F)
    blocks = {
        "layers": network.blocks,
        "thirds": [torch.arange(k, P, 3) for k in range(3)],
        "singles": list(torch.arange(P).split(1)),
        "whole": [torch.arange(P)],
    }[scheme]
    energy = reference.energy_captured(network.F, blocks)
    assert 1 / len(blocks) <= energy <= 1 + 1e-12
    dropped = network.F - reference.block_diagonal(network.F, blocks)
    assert energy == pytest.approx(
        1 - reference.frobenius_norm(dropped) ** 2 / reference.frobenius_norm(network.F) ** 2
    )
    if scheme == "whole":
        assert energy == pytest.approx(1)


def test_energy_reaches_its_lower_bound_where_all_blocks_are_the_same():
    F = torch.ones(6, 6, dtype=torch.float64)
    assert reference.energy_captured(F, torch.arange(6).split(2)) == pytest.approx(1 / 3)


def test_energy_noise_floor_is_the_mean_over_all_partitions_of_these_sizes():
    F, sizes = random_matrix(5, 3), [2, 3]
    energies = [reference.energy_captured(F, torch.tensor(o).split(sizes)) for o in itertools.permutations(range(5))]
    floor = reference.energy_noise_floor(F, torch.arange(5).split(sizes))
    assert floor == pytest.approx(sum(energies) / len(energies), rel=1e-10)
    assert min(energies) < floor < max(energies)


def test_nothing_is_lost_of_a_zero_matrix():
    F, blocks = torch.zeros(4, 4, dtype=torch.float64), torch.arange(4).split(2)
    assert reference.energy_captured(F, blocks) == reference.energy_noise_floor(F, blocks) == 1


# --- stand-ins -------------------------------------------------------------------------------------------------------


def test_a_perfect_stand_in_is_perfect_in_every_measure(network):
    F, g = network.F, network.g
    assert reference.natural_gradient_cosine(F, F, g, LAMBDA) == pytest.approx(1, rel=1e-12)
    assert reference.decrease_ratio(F, F, g, LAMBDA) == pytest.approx(1, rel=1e-12)
    assert reference.condition_number(F, F, LAMBDA) == pytest.approx(1, rel=1e-10)
    assert reference.gaussian_kl(F, F, LAMBDA) == pytest.approx(0, abs=1e-10)


def test_natural_gradient_cosine_is_that_of_the_two_solutions(network):
    F, g, F_b = network.F, network.g, reference.block_diagonal(network.F, network.blocks)
    identity = LAMBDA * np.eye(len(F))
    p, p_b = (scipy.linalg.solve(A.numpy() + identity, g.numpy(), assume_a="pos") for A in (F, F_b))
    expected = p @ p_b / (np.linalg.norm(p) * np.linalg.norm(p_b))
    assert reference.natural_gradient_cosine(F, F_b, g, LAMBDA) == pytest.approx(expected, rel=1e-10)
    assert 0 < expected < 0.999


def test_decrease_ratio_is_what_a_line_search_on_the_quadratic_model_keeps(network):
    F, g, F_b = network.F, network.g, reference.block_diagonal(network.F, network.blocks)

    def model_value(p):
        return -(g @ p) + p @ (F @ p + LAMBDA * p) / 2

    p, p_b = reference.solve(F, g, LAMBDA), reference.solve(F_b, g, LAMBDA)
    a, b, c = (model_value(t * p_b).item() for t in (0.0, 1.0, 2.0))  # a parabola through three points
    curvature, slope = a - 2 * b + c, (4 * b - 3 * a - c) / 2
    best = a - slope**2 / (2 * curvature)
    ratio = reference.decrease_ratio(F, F_b, g, LAMBDA)
    assert ratio == pytest.approx(best / model_value(p).item(), rel=1e-8)
    mu = reference.preconditioned_spectrum(F, F_b, LAMBDA)
    assert 4 * mu[0] * mu[-1] / (mu[0] + mu[-1]) ** 2 <= ratio < 1  # Kantorovich


def test_preconditioned_spectrum_is_that_of_the_pencil(network):
    F, F_b = network.F, reference.block_diagonal(network.F, network.blocks)
    identity = LAMBDA * np.eye(len(F))
    expected = scipy.linalg.eigh(F.numpy() + identity, F_b.numpy() + identity, eigvals_only=True)[::-1]
    mu = reference.preconditioned_spectrum(F, F_b, LAMBDA)
    close(mu, torch.as_tensor(expected.copy()))
    assert reference.condition_number(F, F_b, LAMBDA) == pytest.approx(expected[0] / expected[-1], rel=1e-10)
    assert mu.mean() == pytest.approx(1, rel=1e-10)
    assert 1 < mu[0] <= len(network.blocks)


@pytest.mark.parametrize("stand_in", ["block diagonal", "any matrix"])
def test_gaussian_divergence_agrees_with_torch_distributions(stand_in):
    F, blocks = random_matrix(6, 4), torch.arange(6).split(2)
    F_hat = reference.block_diagonal(F, blocks) if stand_in == "block diagonal" else random_matrix(6, 3, seed=5)
    zero, identity = torch.zeros(6, dtype=F.dtype), 0.1 * torch.eye(6, dtype=F.dtype)
    expected = kl_divergence(
        MultivariateNormal(zero, precision_matrix=F_hat + identity),
        MultivariateNormal(zero, precision_matrix=F + identity),
    ).item()
    assert expected > 0.1
    assert reference.gaussian_kl(F, F_hat, 0.1) == pytest.approx(expected, rel=1e-9)
    if stand_in == "block diagonal":  # what is left is the total correlation between the blocks
        parts = sum(reference.log_determinant(reference.block(F, b), 0.1) for b in blocks)
        assert (parts - reference.log_determinant(F, 0.1)) / 2 == pytest.approx(expected, rel=1e-9)


def test_a_finer_partition_never_keeps_more(network):
    finer = [half for b in network.blocks for half in b.chunk(2)]
    coarse, fine = (reference.block_diagonal(network.F, blocks) for blocks in (network.blocks, finer))
    assert reference.energy_captured(network.F, finer) < reference.energy_captured(network.F, network.blocks)
    assert reference.gaussian_kl(network.F, fine, LAMBDA) > reference.gaussian_kl(network.F, coarse, LAMBDA)


# --- information -----------------------------------------------------------------------------------------------------


def test_information_of_linear_regression_has_the_classical_standard_errors():
    """With many more examples than parameters: var(θ̂) = σ² (XᵀX)⁻¹."""
    model, (x, y), _ = ALL_CASES["gaussian_linear"]()
    F = reference.fisher(model, (x, y), SimpleNamespace(variance=0.3))
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    singles = list(torch.arange(8).split(1))
    told = reference.information(F, theta, singles, 1e-14, len(x))
    X = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    errors = (0.3 * torch.linalg.inv(X.T @ X).diagonal()).sqrt()  # three weights and the bias of one output
    close(told["std_bound"], errors[[0, 1, 2, 0, 1, 2, 3, 3]], rtol=1e-8)
    close(told["information"], F.diagonal().clone())
    close(told["saliency"], theta**2 * F.diagonal() / 2)


def test_information_of_layers_adds_up(network):
    told = reference.information(network.F, network.theta, network.blocks, LAMBDA, network.n)
    singles = reference.information(network.F, network.theta, torch.arange(79).split(1), LAMBDA, network.n)
    assert told["share"].sum().item() == pytest.approx(1, rel=1e-12)
    assert told["information"].sum().item() == pytest.approx(reference.trace(network.F), rel=1e-12)
    for k, b in enumerate(network.blocks):
        assert told["saliency"][k].item() == pytest.approx(singles["saliency"][b].sum().item(), rel=1e-12)
        assert told["std_bound"][k].item() == pytest.approx(singles["std_bound"][b].square().mean().sqrt().item())
        values = torch.linalg.eigvalsh(reference.block(network.F, b))
        assert told["effective_dimension"][k].item() == pytest.approx((values / (values + LAMBDA)).sum().item())
    zero = reference.information(0 * network.F, network.theta, network.blocks, LAMBDA, network.n)
    assert not zero["share"].any()


# --- component-wise natural gradient ---------------------------------------------------------------------------------


def test_first_step_is_the_damped_block_natural_gradient():
    """Bias correction makes the first averages those of the first batch."""
    rows = torch.randn(7, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    theta, blocks = (
        torch.ones(6, dtype=torch.float64),
        [torch.tensor([0, 4]), torch.tensor([1, 2, 5]), torch.tensor([3])],
    )
    F_b = reference.block_diagonal(rows.T @ rows / 7, blocks)
    moved, _ = reference.cw_ngd_step(theta, rows, blocks, lr=0.1, damping=1e-3)
    close(moved, theta - 0.1 * reference.solve(F_b, rows.mean(0), 1e-3))


def test_rows_of_a_network_are_its_observed_scores():
    model, data, likelihood = ALL_CASES["mlp_tanh"]()
    rows, _ = reference.score_matrix(model, data, likelihood, "empirical")
    close(rows.mean(0), reference.gradient(model, data, likelihood))


def test_later_steps_average_with_bias_correction():
    """Against the averages written as explicit weighted sums over the past."""
    generator = torch.Generator().manual_seed(6)
    batches = [torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (4, 6, 5)]
    blocks, norm = [torch.tensor([0, 3]), torch.tensor([1])], torch.tensor([2, 4])
    start = theta = torch.zeros(5, dtype=torch.float64)
    state, u_before, expected = None, torch.zeros(5, dtype=torch.float64), start
    for t, rows in enumerate(batches, start=1):
        theta, state = reference.cw_ngd_step(theta, rows, blocks, state, norm, lr=0.5, damping=0.1, momentum=0.7)
        past = range(1, t + 1)
        slow = torch.tensor([0.99 ** (t - k) for k in past], dtype=torch.float64)
        fast = torch.tensor([0.9 ** (t - k) for k in past], dtype=torch.float64)
        H = sum(w * torch.einsum("ni,nj->ij", B, B) / len(B) for w, B in zip(slow, batches, strict=False)) / slow.sum()
        m = sum(w * B.mean(0) for w, B in zip(fast, batches, strict=False)) / fast.sum()
        h = sum(w * B.mean(0) ** 2 for w, B in zip(slow, batches, strict=False)) / slow.sum()
        u = torch.zeros(5, dtype=torch.float64)
        for b in blocks:
            u[b] = torch.linalg.solve(H[b][:, b] + 0.1 * torch.eye(len(b), dtype=H.dtype), m[b])
        u[norm] = m[norm] / (h[norm].sqrt() + 1e-8)
        u = u_before = u + 0.7 * u_before
        expected = expected - 0.5 * u
        close(theta, expected)
        assert state["t"] == t
    assert not start.any()
