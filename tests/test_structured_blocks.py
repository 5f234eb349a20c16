"""Units and inputs of a dense layer as blocks that are never formed, explicit inverses, and Lanczos for pairs of matrices."""

from __future__ import annotations

import pytest
import torch
from fisher_checks import case
from torch import nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.approximations.structured import InputBlocks, UnitBlocks
from fisherlens.errors import NonFiniteError
from fisherlens.linalg.pencil import PRODUCT, lanczos_run, serve

LAMBDA = 0.01


def wide(bias: bool, dtype: torch.dtype = torch.float64) -> fl.Fisher:
    """Layers whose units have more weights than there are examples."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 7, bias=bias), nn.Tanh(), nn.Linear(7, 4, bias=bias)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    x = torch.randn(5, 12, generator=generator).to(dtype)
    return fl.Fisher(model, (x, torch.arange(5) % 4), likelihood="categorical")


@pytest.mark.parametrize("inverses", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("scheme", "kind"), [("unit", UnitBlocks), ("input", InputBlocks), ("mbf", InputBlocks)])
def test_blocks_of_a_dense_layer(scheme, kind, bias, inverses):
    F = wide(bias)
    blocks, truth = (
        fl.BlockDiagonal(F, scheme),
        reference.block_diagonal(F.dense(), list(fl.partition(F, scheme).blocks)),
    )
    assert {type(part) for _, part in blocks._parts} == {kind}
    if inverses:
        blocks.prefer_inverses()
    generator = torch.Generator().manual_seed(1)
    for columns in (1, 3):
        v = torch.randn(F.n_params, columns, generator=generator, dtype=torch.float64)
        assert torch.allclose(blocks @ v, truth @ v, rtol=1e-12, atol=1e-13)
        assert torch.allclose(blocks.solve(v, LAMBDA), reference.solve(truth, v, LAMBDA), rtol=1e-9, atol=1e-11)
    assert torch.allclose(blocks.dense(), truth, atol=1e-14)
    assert blocks.squared_norm() == pytest.approx(truth.norm().item() ** 2, rel=1e-12)
    assert blocks.log_determinant(LAMBDA) == pytest.approx(reference.log_determinant(truth, LAMBDA), rel=1e-10)
    assert blocks.effective_dimension(LAMBDA).sum().item() == pytest.approx(
        reference.effective_dimension(truth, LAMBDA), rel=1e-10
    )
    spectrum = fl.spectrum(F, by=scheme)["eigenvalue"].values
    assert spectrum[spectrum == spectrum].max() == pytest.approx(torch.linalg.eigvalsh(truth)[-1].item(), rel=1e-10)


def test_inverses_in_float32_and_where_the_damping_is_too_small_for_that():
    F, exact = wide(True, torch.float32), wide(True)
    for damping, rel in ((1e-2, 1e-4), (1e-6, 1e-2)):
        blocks = fl.BlockDiagonal(F, "mbf")
        blocks.prefer_inverses()
        truth = reference.block_diagonal(exact.dense(), list(fl.partition(exact, "mbf").blocks))
        g = torch.ones(F.n_params)
        wanted = reference.solve(truth, g.double(), damping)
        assert ((blocks.solve(g, damping).double() - wanted).norm() / wanted.norm()).item() < rel
        assert blocks.log_determinant(damping) == pytest.approx(reference.log_determinant(truth, damping), rel=rel)


def answers(A: torch.Tensor, M: torch.Tensor):
    return lambda questions: [A @ v if kind == PRODUCT else torch.linalg.solve(M, v) for _, kind, v in questions]


def pair(n: int = 60):
    generator = torch.Generator().manual_seed(0)
    a, m = (torch.randn(n, n, generator=generator, dtype=torch.float64) for _ in range(2))
    A, M = a @ a.T, m @ m.T / n + torch.eye(n, dtype=torch.float64)
    root = torch.linalg.cholesky(M)
    half = torch.linalg.solve_triangular(root, A, upper=False)
    mu = torch.linalg.eigvalsh(torch.linalg.solve_triangular(root, half.T, upper=False))
    return A, M, mu, torch.randn(n, generator=generator, dtype=torch.float64)


def test_both_ends_of_a_pair():
    A, M, mu, start = pair()
    runs = [
        lanczos_run(start, tol=1e-6, max_steps=300),
        lanczos_run(start, tol=1e-6, max_steps=300, ends=("smallest", "largest")),
    ]
    (high,), (low, again) = serve(runs, answers(A, M))
    assert high.converged
    assert low.converged
    assert high.value == pytest.approx(mu[-1].item(), rel=1e-6)
    assert again.value == pytest.approx(mu[-1].item(), rel=1e-6)
    assert low.value == pytest.approx(mu[0].item(), rel=1e-5)
    assert high.steps < low.steps


def test_a_run_that_is_cut_short_says_so_and_an_exhausted_space_ends_it():
    A, M, mu, start = pair()
    (short,) = serve([lanczos_run(start, tol=1e-10, max_steps=3)], answers(A, M))[0]
    assert (short.converged, short.steps) == (False, 3)
    assert short.value < mu[-1]
    (same,) = serve([lanczos_run(start, tol=1e-6, max_steps=50)], answers(3 * M, M))[0]
    assert (same.converged, same.steps) == (True, 1)
    assert same.value == pytest.approx(3, rel=1e-12)


def test_what_is_not_finite_is_refused():
    A, M, _, start = pair()
    A[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="A product or solve with F or its stand-in holds NaN or infinity"):
        serve([lanczos_run(start, tol=1e-6, max_steps=50)], answers(A, M))


def test_a_condition_number_that_does_not_converge_is_nan(monkeypatch):
    from fisherlens.independence import conditioning

    monkeypatch.setattr(conditioning, "DENSE_ORDER", 20)
    monkeypatch.setattr(conditioning, "MAX_STEPS", 2)
    F = case("mlp_tanh").fisher()
    with pytest.warns(
        fl.ConvergenceWarning, match=r"μ_m(in|ax) of 'unit' on '\w+' did not converge to 0\.01 in 2 Lanczos steps"
    ) as told:
        ds = fl.independence(F, "unit", damping=LAMBDA)
    assert {w.filename for w in told} == {__file__}
    assert ds["condition_number"].isnull().any()
    assert ds["kl_divergence"].notnull().all()
