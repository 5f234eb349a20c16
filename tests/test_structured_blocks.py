"""Units and inputs of a dense layer as blocks that are never formed, explicit inverses, and Lanczos for pairs of matrices."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from fisher_checks import case
from torch import nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.approximations import shelf as shelf_module
from fisherlens.approximations.shelf import Shelf, large_moments
from fisherlens.approximations.structured import InputBlocks, UnitBlocks
from fisherlens.errors import NonFiniteError
from fisherlens.independence.leads import Leads, Trail
from fisherlens.linalg.pencil import MASS, PRECONDITION, PRODUCT, Settling, lanczos_run, preconditioned_run, serve

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
    monkeypatch.setattr(sys.modules["fisherlens.independence.options"], "MAX_STEPS", 2)
    F = case("mlp_tanh").fisher()
    with pytest.warns(
        fl.ConvergenceWarning, match=r"μ_m(in|ax) of 'unit' on '\w+' did not converge to 0\.01 in 2 Lanczos steps"
    ) as told:
        ds = fl.independence(F, "unit", damping=LAMBDA)
    assert {w.filename for w in told} == {__file__}
    assert ds["condition_number"].isnull().any()
    assert ds["kl_divergence"].notnull().all()


def test_rough_solves_are_exact_for_multiples_of_one_matrix_and_symmetric_always():
    one = fl.Fisher(*of_one_example(), likelihood="categorical")
    blocks = fl.BlockDiagonal(one, "mbf")
    blocks.prefer_inverses()
    assert blocks.preconditions
    v = torch.randn(one.n_params, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.allclose(blocks.precondition(v, LAMBDA), blocks.solve(v, LAMBDA), rtol=1e-9, atol=1e-11)
    several = fl.BlockDiagonal(wide(True), "mbf")
    v = torch.randn(several.n_params, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inner = v.T @ several.precondition(v, LAMBDA)
    assert torch.allclose(inner, inner.T, rtol=1e-10)
    assert torch.linalg.eigvalsh(inner)[0] > 0
    assert not fl.BlockDiagonal(wide(True), "unit").preconditions


def of_one_example():
    model = nn.Sequential(nn.Linear(6, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model, (torch.randn(1, 6, generator=generator, dtype=torch.float64), torch.tensor([1]))


def test_one_solve_with_its_determinants_keeps_no_blocks():
    F = wide(True)
    blocks, truth = fl.BlockDiagonal(F, "mbf"), reference.block_diagonal(F.dense(), list(fl.partition(F, "mbf").blocks))
    blocks.prefer_inverses()
    v = torch.ones(F.n_params, dtype=torch.float64)
    for damping in (LAMBDA, 3 * LAMBDA):
        assert blocks.log_determinant(damping) == pytest.approx(reference.log_determinant(truth, damping), rel=1e-10)
    for damping in (LAMBDA, 3 * LAMBDA):
        fresh = fl.BlockDiagonal(F, "mbf")
        fresh.prefer_inverses()
        assert torch.allclose(fresh.solve(v, damping), reference.solve(truth, v, damping), rtol=1e-9, atol=1e-11)
        assert fresh.log_determinant(damping) == pytest.approx(reference.log_determinant(truth, damping), rel=1e-10)
        for _, part in (*blocks._parts, *fresh._parts):
            assert part._inverse is None
            assert part._factor is None


def rough(A: torch.Tensor, M: torch.Tensor, asked: list):
    """Answers of a pair whose second matrix is inverted by its diagonal only; ``asked`` takes the vectors multiplied by A."""

    def answer(questions):
        asked.extend(v.clone() for _, kind, v in questions if kind == PRODUCT)
        act = {PRODUCT: A.__matmul__, MASS: M.__matmul__, PRECONDITION: lambda r: r / M.diagonal()}
        return [act[kind](v) for _, kind, v in questions]

    return answer


def test_the_largest_of_a_pair_from_rough_solves():
    A, M, mu, start = pair()
    asked: list = []
    ((high,),) = serve([preconditioned_run(start, tol=1e-8, max_steps=300)], rough(A, M, asked))
    assert high.converged
    assert high.value == pytest.approx(mu[-1].item(), rel=1e-8)
    x = torch.from_numpy(high.weights) @ torch.stack(asked[: len(high.weights)])
    assert (x @ A @ x / (x @ M @ x)).item() == pytest.approx(high.value, rel=1e-10)
    ((short,),) = serve([preconditioned_run(start, tol=1e-8, max_steps=2)], rough(A, M, []))
    assert (short.converged, short.steps) == (False, 2)
    assert short.value < mu[-1]
    ((same,),) = serve([preconditioned_run(start, tol=1e-6, max_steps=50)], rough(3 * M, M, []))
    assert (same.converged, same.steps) == (True, 1)
    assert same.value == pytest.approx(3, rel=1e-12)
    A[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="holds NaN or infinity"):
        serve([preconditioned_run(start, tol=1e-6, max_steps=50)], rough(A, M, []))


def test_a_run_tells_its_vector():
    A, M, _, start = pair()
    asked: list = []

    def answer(questions):
        asked.extend(v.clone() for _, kind, v in questions if kind == PRODUCT)
        return answers(A, M)(questions)

    ((high,),) = serve([lanczos_run(start, tol=1e-6, max_steps=300)], answer)
    x = torch.from_numpy(high.weights) @ torch.stack(asked)
    assert (x @ A @ x / (x @ M @ x)).item() == pytest.approx(high.value, rel=1e-8)


def test_what_increments_leave_to_come():
    for q in (0.3, 0.7, 0.95):
        watch = Settling()
        left = [watch.rest(1 - q**k) for k in range(12)]
        assert left[:2] == [np.inf, np.inf]
        assert all(rest >= q**k * (1 - 1e-6) for k, rest in enumerate(left) if k > 1), q
        assert left[-1] == pytest.approx(max(9 * (1 - q) / q, 1) * q**11, rel=1e-6)
    watch = Settling()
    left = [watch.rest(float(k)) for k in range(5)]
    assert left == [
        np.inf,
        np.inf,
        30,
        40,
        50,
    ]  # a value that goes on growing is not believed, unless by next to nothing


@pytest.mark.parametrize("spectrum", ["crowded", "even", "gap"])
def test_a_value_is_accurate_where_its_vector_is_not(spectrum):
    """The largest of many crowded eigenvalues is known to half a percent long before residuals are that small."""
    n, tol = 2000, 5e-3
    values = {
        "crowded": torch.cat([torch.linspace(0, 1, n - 200), torch.linspace(1, 2, 200)]),
        "even": torch.linspace(0, 2, n),
        "gap": torch.cat([torch.linspace(0, 1, n - 1), torch.tensor([2.0])]),
    }[spectrum].double()
    for seed in range(3):
        start = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ((found,),) = serve(
            [lanczos_run(start, tol=tol, max_steps=500)],
            lambda questions: [values * v if kind == PRODUCT else v for _, kind, v in questions],
        )
        assert found.converged
        assert abs(found.value / 2 - 1) < tol, (spectrum, seed, found)


def test_blocks_of_several_partitions_are_built_once():
    F = case("lenet").fisher()
    shared = 0
    for layer in F.layout.layers:
        diagonal = F.diagonal()[layer.start : layer.stop]
        shelf, held = Shelf(diagonal), []
        for name in ("layer", "unit", "cw-ngd", "mbf", "diagonal"):
            partition = fl.partition(F, name)
            part = fl.BlockDiagonal.part_of(F, partition, layer.name, shelf)
            alone = fl.BlockDiagonal.part_of(F, partition, layer.name)
            assert torch.allclose(part.dense(), alone.dense(), rtol=1e-12, atol=1e-15), (layer.name, name)
            shared += sum(blocks is other for _, blocks in part._parts for other in held)
            held += [blocks for _, blocks in part._parts]
    assert shared >= 2  # the kernels of CW-NGD and MBF


def test_large_blocks_by_halves(monkeypatch):
    monkeypatch.setattr(shelf_module, "_LARGE", 2)
    met = 0
    for name in ("lenet", "conv_1d", "conv_groups"):
        F = case(name).fisher()
        for layer in F.layout.layers:
            scores, parts = F.scores[layer.name], fl.partition(F, "unit").restrict(layer.name)
            index = parts.groups[0].index - layer.start
            found = large_moments(scores, index)
            if found is not None:
                met += 1
                assert torch.allclose(found, scores.moments(index), rtol=1e-12, atol=1e-15)
            assert large_moments(scores, index.flip(0)) is None or len(index) == 1
    assert met >= 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_whole_layers_and_inputs_above_the_dense_order(monkeypatch, dtype):
    """Coefficients among Gram matrices for whole layers, rough solves for inputs: the values of the dense matrices."""
    conditioning, met = sys.modules["fisherlens.independence.conditioning"], []
    for module in (conditioning, sys.modules["fisherlens.independence.segmentations"]):
        monkeypatch.setattr(module, "DENSE_ORDER", 20)
    for name in ("layer_extremes", "preconditioned_run"):
        own = getattr(conditioning, name)
        monkeypatch.setattr(
            conditioning, name, lambda *a, _own=own, _name=name, **k: (met.append(_name), _own(*a, **k))[1]
        )
    F, exact = wide(True, dtype), wide(True)
    tol = 1e-6 if dtype == torch.float64 else 1e-3
    for damping in (1e-3, 0.3):
        ds = fl.independence(F, ["layer", "unit", "mbf"], damping=damping, tol=tol)
        for name in ("layer", "unit", "mbf"):
            cut = reference.block_diagonal(exact.dense(), list(fl.partition(exact, name).blocks))
            wanted = reference.condition_number(exact.dense(), cut, damping)
            assert ds["condition_number"].sel(partition=name, layer="all").item() == pytest.approx(wanted, rel=tol), (
                name
            )
    assert met.count("layer_extremes") == 2
    assert met.count("preconditioned_run") == 6  # two layers and the whole, at two dampings


def test_zero_scores_by_layers_lose_nothing(monkeypatch):
    for module in ("conditioning", "segmentations"):
        monkeypatch.setattr(sys.modules[f"fisherlens.independence.{module}"], "DENSE_ORDER", 20)
    model = nn.Sequential(nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 1)).double()  # one class: nothing to learn
    F = fl.Fisher(
        model, (torch.ones(5, 12, dtype=torch.float64), torch.zeros(5, dtype=torch.long)), likelihood="categorical"
    )
    assert np.allclose(fl.independence(F, ["layer", "mbf"])["condition_number"], 1, rtol=1e-12)


def test_what_layers_hand_on_and_what_a_budget_ends():
    F = case("mlp_tanh").fisher()
    first, second = F.layout.layers[:2]
    x, y = (torch.ones(layer.size, dtype=torch.float64) for layer in (first, second))
    leads, key = Leads(1e9), ("unit", 0.1)
    leads.note_low(key, first.name, 4.0, x)
    leads.note_high(key, 9.0, torch.tensor([3.0, 4.0]))
    assert leads.low(key, F) is None  # of one layer alone: the whole has a better start
    assert leads.high(key) is None
    leads.note_low(key, second.name, 2.0, y)
    leads.note_high(key, 4.0, torch.tensor([-6.0, -8.0]))
    low = leads.low(key, F)
    assert not low[second.stop :].any()
    sides = torch.zeros(F.n_params, 2, dtype=torch.float64)
    sides[first.start : first.stop, 0], sides[second.start : second.stop, 1] = x, y
    a = sides.T @ (F.dense() @ sides + key[1] * sides)
    m = torch.diag(torch.tensor([4.0, 2.0], dtype=torch.float64) * a.diagonal())
    quotient = low @ sides @ torch.linalg.solve(sides.T @ sides, m) @ torch.linalg.solve(sides.T @ sides, sides.T @ low)
    best = torch.linalg.eigvals(torch.linalg.solve(a, m)).real.max()
    assert quotient / (low @ F.dense() @ low + key[1] * low @ low) == pytest.approx(best.item(), rel=1e-10)
    assert best >= 4  # no worse than the better of the two alone
    assert torch.allclose(leads.high(key).abs(), torch.tensor([0.6, 0.8]))  # signs are made to agree
    leads.note_high(key, 25.0, torch.tensor([4.0, -3.0]))
    parts = leads.high(key) @ torch.tensor([[0.8, 0.6], [-0.6, 0.8]])
    assert torch.allclose(parts.abs(), torch.tensor([25.0, 13.0]) / math.hypot(25, 13))
    assert leads.high(("unit", 0.2)) is None
    poor = Leads(8 * first.size)
    poor.note_low(key, first.name, 4.0, x)
    poor.note_low(key, second.name, 2.0, y)
    assert poor.low(key, F) is None
    trail = Trail(2, 8 * 3 * len(x))
    for which in (0, 1, 0):
        trail.add(which, x)
    assert torch.allclose(trail.vector(0, [2.0, -0.5]), 1.5 * x)
    assert trail.vector(1, [1.0, 1.0]) is None  # fewer were asked for than have weights
    trail.add(1, x)  # one too many: all is given back
    assert trail.vector(1, [1.0]) is None


@pytest.mark.parametrize("scheme", ["unit", "cw-ngd", "mbf", "diagonal", "sequential"])
def test_starts_lie_near_the_ends(scheme, monkeypatch):
    """What a few columns and a few blocks tell is not far from the ends of the spectrum, and both values are those of dense matrices."""
    conditioning, options = (sys.modules[f"fisherlens.independence.{name}"] for name in ("conditioning", "options"))
    for module in (conditioning, sys.modules["fisherlens.independence.segmentations"]):
        monkeypatch.setattr(module, "DENSE_ORDER", 20)
    for module in (options, sys.modules["fisherlens.independence.starts"]):
        monkeypatch.setattr(module, "SMALL", 20)
    lows, highs = [], []
    low, common = conditioning.low_start, conditioning.common_start
    monkeypatch.setattr(
        conditioning, "low_start", lambda target, *rest: lows.append((target.name, low(target, *rest))) or lows[-1][1]
    )
    monkeypatch.setattr(
        conditioning,
        "common_start",
        lambda target, damping: highs.append((target.name, common(target, damping))) or highs[-1][1],
    )
    F = wide(True)
    parts = fl.partition(F, scheme, **({"size": 9} if scheme == "sequential" else {}))
    exact, eye = F.dense(), LAMBDA * torch.eye(F.n_params, dtype=torch.float64)
    cut = reference.block_diagonal(exact, list(parts.blocks))
    found = fl.independence(F, [parts], damping=LAMBDA).isel(partition=0)
    mu = reference.preconditioned_spectrum(exact, cut, LAMBDA)
    assert found["mu_min"].sel(layer="all").item() == pytest.approx(mu[-1].item(), rel=5e-3)
    assert found["mu_max"].sel(layer="all").item() == pytest.approx(mu[0].item(), rel=5e-3)
    assert len(lows) >= 3
    for name, r in lows:
        if r is None:  # fewer parameters than rows
            continue
        at = slice(None) if name == "all" else slice(F.layout.layer(name).start, F.layout.layer(name).stop)
        x = torch.linalg.solve((exact + eye)[at, at], r)
        quotient = (x @ (cut + eye)[at, at] @ x) / (x @ (exact + eye)[at, at] @ x)
        assert quotient > 0.7 / found["mu_min"].sel(layer=name).item(), name
    met = 0
    for name, r in highs:
        if r is not None:
            at, met = slice(F.layout.layer(name).start, F.layout.layer(name).stop), met + 1
            x = torch.linalg.solve((cut + eye)[at, at], r)
            quotient = (x @ (exact + eye)[at, at] @ x) / (x @ (cut + eye)[at, at] @ x)
            assert quotient > 0.6 * found["mu_max"].sel(layer=name).item(), name  # of the diagonal's y, also for others
    assert met >= 1


@pytest.mark.parametrize("scheme", ["layer", "unit", "cw-ngd", "mbf", "diagonal"])
def test_layers_of_a_partition_without_another_look_at_its_entries(scheme):
    F = case("batchnorm_first").fisher()
    whole = fl.partition(F, scheme)
    for code, layer in enumerate(F.layout.layer_names):
        part, slow = whole.restrict(layer), whole._pieces(np.flatnonzero(whole._entry_codes == code))
        assert part.labels == slow.labels
        assert torch.equal(part.flat, slow.flat)
        assert len(part.groups) == len(slow.groups)
        for own, other in zip(part.groups, slow.groups, strict=True):
            assert own.layer == other.layer
            assert torch.equal(own.index, other.index)
            assert torch.equal(own.block_ids, other.block_ids)


def test_layers_that_are_as_large_all_have_a_part_in_the_start():
    leads, key = Leads(1e6), ("unit", LAMBDA)
    eye = torch.eye(40, dtype=torch.float64)
    for place, value in ((0, 26.2), (1, 26.1), (2, 1.0)):
        leads.note_high(key, value, eye[place])
    start = leads.high(key).abs()
    assert start[:2].min() > 0.7  # not the first alone: a run may then settle at the wrong one of two
    assert 0.02 < start[2] < 0.05
    aligned = Leads(1e6)
    for value, y in ((26.2, eye[0]), (26.1, -eye[0] - 1e-3 * eye[1])):
        aligned.note_high(key, value, y)
    assert abs(aligned.high(key)[0]) > 0.999
