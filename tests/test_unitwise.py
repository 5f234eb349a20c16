import copy
import io

import pytest
import torch
from row_samples import NETWORKS, flat, make, mc_rows, moved, rows_of, take_step, unit_blocks
from torch import nn
from torch.nn import functional

import fisherlens.optim.rows as rows_module
import fisherlens.optim.units as units_module
from fisherlens.errors import InputError, NonFiniteError, NumericalWarning
from fisherlens.optim import CWNGD, QuasiDiagonal, UnitWise
from fisherlens.reference import blockwise_step, quasi_diagonal, solve

PLAIN = {"lr": 0.3, "damping": 0.05, "kl_clip": None}


def unit_step(name, labels, n):
    model, x, y = make(name, n)
    rows, before = rows_of(model, x, y), flat(model)
    used = rows if labels == "true" else mc_rows(model, x, seed=5)
    return blockwise_step(before, used, rows.mean(0), unit_blocks(model)[0], lr=0.3, damping=0.05) - before


def quasi_step(name, labels, n):
    model, x, y = make(name, n)
    rows = rows_of(model, x, y)
    used = rows if labels == "true" else mc_rows(model, x, seed=5)
    return -0.3 * solve(quasi_diagonal(used.T @ used / len(used), *unit_blocks(model)), rows.mean(0), 0.05)


METHODS = {UnitWise: unit_step, QuasiDiagonal: quasi_step}


@pytest.mark.parametrize("labels", ["true", "sampled"])
@pytest.mark.parametrize("n", [3, 25])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_the_first_step_is_a_dense_solve(method, name, n, labels):
    """With 3 examples most units have more parameters than that, with 25 most have fewer."""
    change, opt = moved(method, name, n=n, labels=labels, seed=5, ema=0.0, **PLAIN)
    torch.testing.assert_close(change, METHODS[method](name, labels, n), rtol=1e-8, atol=1e-11)
    assert opt.diagnostics == {"steps": 1, "refreshes": 1, "retries": 0, "fallbacks": 0}


@pytest.mark.parametrize("budget", [0, 2**28])
@pytest.mark.parametrize("name", ["strided", "groups", "shared", "dense wide", "tokens"])
@pytest.mark.parametrize("method", METHODS)
def test_memory_budgets_change_nothing(method, name, budget, monkeypatch):
    for module, limit in ((rows_module, "KEPT_BYTES"), (units_module, "ROWS_BYTES"), (units_module, "CHUNK_BYTES")):
        monkeypatch.setattr(module, limit, budget)
    change, _ = moved(method, name, n=3, labels="true", ema=0.0, **PLAIN)
    torch.testing.assert_close(change, METHODS[method](name, "true", 3), rtol=1e-8, atol=1e-11)


def test_kernels_are_taken_where_they_are_smaller():
    for n, kept in ((3, {"0", "2"}), (5, {"0"}), (6, set())):  # units of 6 and 5 parameters
        model, x, y = make("dense", n)
        opt = UnitWise(model, labels="true", refresh=2, **PLAIN)
        take_step(opt, model, x, y)
        assert set(opt._rows) == kept
        assert set(opt._averages) == {"0", "2"} - kept


@pytest.mark.parametrize("n", [3, 25])
def test_unit_wise_steps_are_those_of_component_wise_blocks(n):
    """The same blocks through another optimizer, for several steps, averaged and not."""
    for ema in (0.0, 0.8):
        results = []
        for method in (UnitWise, lambda model, **k: CWNGD(model, partition="unit", momentum_ema=0.0, **k)):
            model, x, y = make("flattened", n)
            opt = method(model, labels="true", ema=ema, momentum=0.3, weight_decay=0.1, **PLAIN)
            for _ in range(4):
                take_step(opt, model, x, y)
            results.append(flat(model))
        torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)


def test_averages_of_the_quasi_diagonal_metric():
    model, x, y = make("flattened", n=20)
    opt = QuasiDiagonal(model, labels="true", ema=0.7, **PLAIN)
    F, theta, units = 0.0, flat(model), unit_blocks(model)
    for t in range(4):
        at = slice(5 * t, 5 * t + 5)
        rows = rows_of(model, x[at], y[at])
        F = 0.7 * F + 0.3 * rows.T @ rows / 5
        theta = theta - 0.3 * solve(quasi_diagonal(F / (1 - 0.7 ** (t + 1)), *units), rows.mean(0), 0.05)
        take_step(opt, model, x[at], y[at])
        torch.testing.assert_close(flat(model), theta, rtol=1e-8, atol=1e-10)


def test_little_damping_gives_the_published_formula():
    """p_i = (g_i - g_0 F_0i/F_00)/(F_ii - F_0i²/F_00), p_0 = g_0/F_00 - Σ_i p_i F_0i/F_00."""
    model, x, y = make("dense", n=30)
    rows, before = rows_of(model, x, y), flat(model)
    F, g = rows.T @ rows / 30, rows.mean(0)
    wanted = torch.zeros_like(before)
    for unit, bias in zip(*unit_blocks(model), strict=True):
        p0 = g[bias] / F[bias, bias]
        for i in unit[:-1]:
            slope = F[bias, i] / F[bias, bias]
            wanted[i] = (g[i] - g[bias] * slope) / (F[i, i] - F[bias, i] * slope)
            p0 = p0 - wanted[i] * slope
        wanted[bias] = p0
    opt = QuasiDiagonal(model, lr=1.0, damping=1e-13, labels="true", ema=0.0)
    take_step(opt, model, x, y)
    torch.testing.assert_close(before - flat(model), wanted, rtol=1e-6, atol=1e-9)


def test_a_unit_that_is_off_moves_like_its_damping():
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3)).double()
    with torch.no_grad():
        model[0].bias[0] = -1e3
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for method in METHODS:
        net = copy.deepcopy(model)
        opt = method(net, labels="true", ema=0.0, **PLAIN)
        take_step(opt, net, x, torch.arange(6) % 3)
        assert torch.equal(net[0].weight[0], model[0].weight[0])
        assert torch.isfinite(flat(net)).all()


@pytest.mark.parametrize("n", [3, 25])
@pytest.mark.parametrize("method", METHODS)
def test_refresh_keeps_the_statistics_and_accumulation_is_one_batch(method, n):
    results = []
    for parts, reduction in ((1, "mean"), (3, "mean"), (3, "sum")):
        model, x, y = make("flattened", n)
        opt = method(model, lr=0.1, damping=0.05, labels="true", refresh=2, ema=0.0, reduction=reduction)
        for _ in range(3):
            opt.zero_grad()
            for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
                loss = functional.cross_entropy(model(xs), ys, reduction=reduction)
                (loss * len(xs) / n if reduction == "mean" else loss).backward()
            opt.step()
        assert opt.diagnostics["refreshes"] == 2
        results.append(flat(model))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("n", [3, 25])
@pytest.mark.parametrize("method", METHODS)
def test_single_precision(method, n):
    for name in ("strided", "dense wide", "shared"):
        change, _ = moved(method, name, torch.float32, n=n, labels="true", ema=0.0, **PLAIN)
        wanted = METHODS[method](name, "true", n)
        assert torch.linalg.vector_norm(change - wanted) < 1e-3 * torch.linalg.vector_norm(wanted)


@pytest.mark.parametrize("options", [{}, {"ema": 0.5, "momentum": 0.5}, {"ema": 0.0, "refresh": 3}])
@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_bitwise_equal(method, after, options):
    model, x, y = make("shared", n=5)
    model, x = model.float(), x.float()
    opt = method(model, **options)
    for _ in range(after):
        take_step(opt, model, x, y)
    stored = io.BytesIO()
    torch.save(opt.state_dict(), stored)
    stored.seek(0)
    twin = copy.deepcopy(model)
    other = method(twin, lr=0.9, damping=0.9, seed=7, **{k: v for k, v in options.items() if k == "refresh"})
    other.load_state_dict(torch.load(stored, weights_only=True))
    assert [take_step(opt, model, x, y) for _ in range(4)] == [take_step(other, twin, x, y) for _ in range(4)]
    assert torch.equal(flat(model), flat(twin))
    assert opt.diagnostics == other.diagnostics


def test_units_that_lost_their_definiteness_get_more_damping(monkeypatch):
    model, x, y = make("dense wide", n=4)
    before, g = flat(model), rows_of(model, x, y).mean(0)
    opt = UnitWise(model, lr=1.0, damping=1e-2, kl_clip=None, labels="true")
    monkeypatch.setattr("fisherlens.optim.units.self_gram", lambda a: -1e9 * torch.eye(len(a), dtype=a.dtype))
    with pytest.warns(
        NumericalWarning, match=r"blocks of 4 parameters are not positive definite even with 10000 I added"
    ):
        take_step(opt, model, x, y)
    assert opt.diagnostics["fallbacks"] > 0
    unit = unit_blocks(model)[0][0]
    torch.testing.assert_close(flat(model)[unit], before[unit] - g[unit] / 1e4)


@pytest.mark.parametrize("n", [3, 25])
@pytest.mark.parametrize("method", METHODS)
def test_scores_that_overflow_are_refused_and_change_nothing(method, n):
    model, x, y = make("dense", n)
    model, x = model.float(), x.float()
    opt = method(model, labels="true", ema=0.5)
    take_step(opt, model, x, y)
    before, kept = flat(model), {k: v["F"].clone() for k, v in opt._averages.items()}
    opt.zero_grad()
    (1e25 * functional.cross_entropy(model(x), y)).backward()
    with pytest.raises(NonFiniteError, match="The scores of layer '0' hold NaN or infinity in their second moments"):
        opt.step()
    assert torch.equal(flat(model), before)
    assert all(torch.equal(kept[name], one["F"]) for name, one in opt._averages.items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ema": 1.0}, "ema must be a finite number >= 0 and < 1; got 1.0."),
        ({"damping": 0.0}, "damping must be a finite number > 0; got 0.0."),
        ({"preset": "first"}, "Unknown preset 'first'. Known: 'paper'."),
    ],
)
def test_wrong_options_are_refused(method, options, text):
    with pytest.raises(InputError) as caught:
        method(make("dense")[0], **options)
    assert str(caught.value).startswith(text)
