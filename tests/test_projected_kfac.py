import copy
import itertools
import math

import pytest
import torch
from factor_samples import factors, first_step, layers_of, resumed
from optim_samples import count_hooks
from test_cwngd import NETWORKS, backpropagate, flat, make
from torch.nn import functional

import fisherlens.optim.projection as module
from fisherlens.errors import InputError, NumericalWarning
from fisherlens.optim.kfac import KFAC
from fisherlens.optim.projected_kfac import ProjectedKFAC
from fisherlens.optim.projection import Side, apply_side, damping_columns, recursive_inverse
from fisherlens.reference import optim_kronecker as slow
from fisherlens.reference.kronecker import factored_damping, kronecker_block
from fisherlens.reference.standins import projected_factor
from fisherlens.training import problem, train

PLAIN = {"lr": 0.1, "damping": 0.02, "momentum": 0.0, "labels": "true", "kl_clip": None}


def by_group(factor, basis):
    return torch.stack([projected_factor(C, P) for C, P in zip(factor, basis, strict=True)])


def dense_step(model, x, y, opt, gradient, lr=0.1, damping=0.02):
    """-lr times the solve with both factors on the bases of the optimizer, their damping from the traces of the factors."""
    out = torch.zeros_like(gradient)
    for layer, index in layers_of(opt):
        G, A = factors(model, x, y, layer)
        a, g = opt._sides(layer)
        left, right = factored_damping(G, A, damping)
        left, right = left - G + by_group(G, g.P), right - A + by_group(A, a.P)
        out[index] = -lr * torch.linalg.solve(kronecker_block(left, right, layer.bias is not None), gradient[index])
    return out


@pytest.mark.parametrize("ema", [0.0, 0.95])
@pytest.mark.parametrize("rank", [2, 4, 64])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_first_step_is_a_dense_solve(name, rank, ema):
    model, x, y = make(name)
    twin = copy.deepcopy(model)
    opt = ProjectedKFAC(model, **PLAIN, rank=rank, ema=ema)
    step, gradient = first_step(opt, model, x, y)
    torch.testing.assert_close(step, dense_step(twin, x, y, opt, gradient), rtol=1e-8, atol=1e-11)
    for side in opt._records.values():
        assert side.P.shape[2] == min(rank, side.P.shape[1])
        torch.testing.assert_close(side.P.mT @ side.P, torch.eye(side.P.shape[2]).double().expand_as(side.Q))
    assert opt.diagnostics == {"steps": 1, "refreshes": 1, "retries": 0, "fallbacks": 0}


@pytest.mark.parametrize("labels", ["true", "sampled"])
@pytest.mark.parametrize("name", ["dense", "groups", "shared"])
def test_without_projection_it_is_kfac_with_factored_damping(name, labels):
    results = []
    for build, options in ((KFAC, {"damping_form": "factored"}), (ProjectedKFAC, {"rank": 100})):
        model, x, y = make(name)
        opt = build(model, **PLAIN | {"labels": labels, "ema": 0.0}, inverse_refresh=1, **options)
        for _ in range(3):
            backpropagate(opt, model, x, y)
            opt.step()
        results.append(flat(model))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-11)


def test_the_basis_comes_from_the_data():
    """With most of a factor on few directions, the basis finds them, and the step is that of the whole factors."""
    model, x, y = make("dense wide", n=40)
    x = x * torch.logspace(0, -4, 20, dtype=x.dtype)
    twin = copy.deepcopy(model)
    steps = []
    for build, options in ((KFAC, {"damping_form": "factored"}), (ProjectedKFAC, {"rank": 5})):
        net = copy.deepcopy(twin)
        steps.append(first_step(build(net, **PLAIN, **options), net, x, y)[0])
    assert functional.cosine_similarity(*steps, dim=0) > 0.99


def test_an_update_is_the_inverse_of_the_updated_factor():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 12, 6, generator=generator, dtype=torch.float64)
    Q = torch.linalg.inv(rows.mT @ rows / 12 + 0.1 * torch.eye(6, dtype=torch.float64))
    V = torch.randn(3, 6, 5, generator=generator, dtype=torch.float64)
    found, stands = recursive_inverse(Q, V, 0.9)
    assert stands.all()
    for one, q, v in zip(found, Q, V, strict=True):
        torch.testing.assert_close(one, slow.recursive_inverse(q, v, 0.9), rtol=1e-10, atol=1e-12)
    assert torch.equal(found, found.mT)


@pytest.mark.parametrize("r", [3, 4, 6, 10, 32])
def test_damping_columns_average_to_the_damping(r):
    Q, gamma = torch.zeros(2, r, r, dtype=torch.float64), torch.tensor([0.3, 2.0], dtype=torch.float64)
    columns = [damping_columns(Q, gamma, step) for step in range(r)]  # a multiple of the cycle, whatever r
    mean = sum(V @ V.mT for V in columns) / r
    torch.testing.assert_close(mean, gamma[:, None, None] * torch.eye(r, dtype=torch.float64))
    assert columns[0].shape == (2, r, min(4, r))


def test_steps_follow_the_recursion():
    """One batch again and again: each inverse is that of its predecessor, with the columns that were drawn."""
    model, x, y = make("groups")
    opt = ProjectedKFAC(model, **PLAIN, rank=3, ema=0.8, inverse_refresh=100)
    drawn, original = [], module.recursive_inverse

    def spy(Q, V, beta):
        drawn.append((Q.clone(), V.clone(), beta))
        return original(Q, V, beta)

    module.recursive_inverse = spy
    try:
        for _ in range(4):
            backpropagate(opt, model, x, y)
            opt.step()
    finally:
        module.recursive_inverse = original
    assert len(drawn) == 3 * 2 * 3  # steps after the first, sides, layers
    sides = list(opt._records.values())
    for (Q, V, beta), side in zip(drawn[-6:], sides, strict=True):
        assert V.shape[2] == 4 + min(4, Q.shape[1])
        for q, v, now in zip(Q, V, side.Q, strict=True):
            torch.testing.assert_close(now, slow.recursive_inverse(q, v, beta), rtol=1e-9, atol=1e-11)


def test_signs_estimate_the_factor():
    model, x, y = make("dense wide")
    opt = ProjectedKFAC(model, **PLAIN | {"lr": 1e-9}, rank=4, sketches=2000, ema=0.5, inverse_refresh=100)
    for _ in range(2):
        backpropagate(opt, model, x, y)
        opt.step()
    for layer, _ in layers_of(opt):
        for side, factor in zip(opt._sides(layer), reversed(factors(model, x, y, layer)), strict=True):
            core = side.P.mT @ factor @ side.P
            mean = torch.linalg.inv(side.Q) - side.gamma[:, None, None] * torch.eye(len(core[0]), dtype=core.dtype)
            mean -= 0.5 * (damping_columns(side.Q, side.gamma, 1) @ damping_columns(side.Q, side.gamma, 1).mT)
            mean += 0.5 * side.gamma[:, None, None] * torch.eye(len(core[0]), dtype=core.dtype)
            assert torch.linalg.matrix_norm(mean - core) < 0.1 * torch.linalg.matrix_norm(core)


def test_a_change_of_basis_carries_the_factor_over():
    model, x, y = make("strided")
    opt = ProjectedKFAC(model, **PLAIN | {"lr": 1e-9}, rank=3, inverse_refresh=2)
    bases, inverses = [], []
    for _ in range(5):
        backpropagate(opt, model, x, y)
        opt.step()
        bases.append(opt._records["0 a"].P.clone())
        inverses.append(opt._records["0 a"].Q.clone())
    assert [torch.equal(a, b) for a, b in itertools.pairwise(bases)] == [True, False, True, False]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(inverses))

    P = torch.linalg.qr(torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    core = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))[None]
    gamma = torch.tensor([0.1], dtype=torch.float64)
    side = Side("0", P, torch.linalg.inv(core + 0.1 * torch.eye(3)), torch.tensor([1.5]).double(), gamma, gamma, 1)
    before = apply_side(side, torch.eye(6, dtype=torch.float64)[None])
    module.change_basis(side, P @ turn, side.level)  # the same space
    side.P = P @ turn
    torch.testing.assert_close(apply_side(side, torch.eye(6, dtype=torch.float64)[None]), before)


def test_an_inverse_without_positive_pivots_is_made_anew():
    model, x, y = make("dense")
    opt = ProjectedKFAC(model, **PLAIN, rank=3)
    backpropagate(opt, model, x, y)
    opt.step()
    side = opt._records["0 a"]
    side.Q.neg_()
    backpropagate(opt, model, x, y)
    opt.step()
    assert opt.diagnostics["retries"] == 1
    assert (torch.linalg.eigvalsh(side.Q) > 0).all()
    assert (torch.linalg.eigvalsh(side.Q) <= 1 / side.gamma).all()


def test_kl_clip_and_rescaling():
    model, x, y = make("strided")
    nets = [copy.deepcopy(model) for _ in range(3)]
    steps = []
    for net, options in zip(nets, ({}, {"kl_clip": 1e-4}, {"rescale": True}), strict=True):
        step, gradient = first_step(ProjectedKFAC(net, **PLAIN | options, rank=4), net, x, y)
        steps.append(step)
    product = -0.1 * steps[0] @ gradient
    assert product > 1e-4
    torch.testing.assert_close(steps[1], (1e-4 / product).sqrt() * steps[0])
    for _, index in layers_of(ProjectedKFAC(model)):
        torch.testing.assert_close(steps[2][index].norm(), 0.1 * gradient[index].norm())


@pytest.mark.parametrize(
    "options", [{"rank": 3, "inverse_refresh": 3}, {"labels": "true", "refresh": 2, "ema": 0.0, "weight_decay": 0.1}]
)
def test_a_resumed_run_is_bitwise_equal(options):
    state = torch.get_rng_state()
    assert resumed(ProjectedKFAC, options)
    assert torch.equal(state, torch.get_rng_state())


def test_a_layer_that_reads_zeros_steps_finitely():
    model, x, y = make("dense")
    opt = ProjectedKFAC(model, rank=2)
    for _ in range(3):
        backpropagate(opt, model, torch.zeros_like(x), y)
        opt.step()
    assert torch.isfinite(flat(model)).all()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"lr": 0.0}, InputError, "lr must be a finite number > 0; got 0.0."),
        ({"rank": 0}, InputError, "rank must be a finite number >= 1; got 0."),
        ({"rank": 2.0}, TypeError, "rank must be an int; got float 2.0."),
        ({"sketches": -1}, InputError, "sketches must be a finite number >= 1; got -1."),
        ({"ema": 1.0}, InputError, "ema must be a finite number >= 0 and < 1; got 1.0."),
        ({"preset": "x"}, InputError, "Unknown preset 'x'. Known: 'paper'."),
    ],
)
def test_wrong_options_are_refused(options, error, text):
    model = make("dense")[0]
    with pytest.raises(error) as caught:
        ProjectedKFAC(model, **options)
    assert str(caught.value).startswith(text)
    assert count_hooks(model) == 0


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 24])
@pytest.mark.parametrize("seed", [0, 1])
def test_twenty_thousand_updates_in_single_precision_stay_true(seed, dead):
    """Data on all or on some directions only: symmetrised, and with damping columns, nothing winds up."""
    d, beta, gamma = 64, 0.95, 0.1
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, d + 1, dtype=torch.float32) ** -0.6
    scale[d - dead :] *= dead == 0
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    Q = (torch.eye(d) / gamma)[None]
    exact = gamma * torch.eye(d, dtype=torch.float64)
    gammas = torch.tensor([gamma])
    for step in range(20_000):
        V = rotation @ (scale[:, None] * torch.randn(d, 4, generator=generator)) / math.sqrt(4)
        V = torch.cat([V[None], damping_columns(Q, gammas, step)], dim=2)
        exact = beta * exact + (1 - beta) * (V[0].double() @ V[0].double().T)
        Q, stands = recursive_inverse(Q, V, beta)
        assert stands.all()
    wanted = torch.linalg.inv(exact)
    assert torch.equal(Q, Q.mT)
    assert torch.linalg.matrix_norm(Q[0].double() - wanted) < 1e-4 * torch.linalg.matrix_norm(wanted)


def test_it_learns_the_digits():
    digits = problem("digits-cnn")
    record = train(digits.model(0), digits, lambda model: ProjectedKFAC(model), num_steps=40, record_every=20)
    loss = record.train_loss.values.squeeze()
    assert (loss[1:] < loss[:-1]).all()
    assert record.test_accuracy.values.squeeze()[-1] > 0.7


def test_layers_without_factors_are_announced():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    with pytest.warns(NumericalWarning, match="ProjectedKFAC does not precondition '1.weight', '1.bias'"):
        ProjectedKFAC(model)
