import copy
import itertools

import pytest
import torch
from factor_samples import blocks_of, factors, first_step, layers_of, resumed
from optim_samples import count_hooks
from test_cwngd import NETWORKS, Normed, backpropagate, flat, make, rows_of, seeded
from torch import nn

import fisherlens as fl
from fisherlens.errors import InputError, NumericalWarning
from fisherlens.linalg.dense import eigenpairs
from fisherlens.optim.ekfac import EKFAC
from fisherlens.optim.factors import damped_inverses
from fisherlens.optim.kfac import KFAC
from fisherlens.reference.kronecker import ekfac_block, factored_damping, kronecker_block
from fisherlens.reference.optim_kronecker import ekfac_mean_block, step_with
from fisherlens.training import problem, train

PLAIN = {"lr": 0.1, "damping": 0.02, "ema": 0.0, "momentum": 0.0, "labels": "true", "kl_clip": None}


def expected_step(model, gradient, opt, matrices):
    blocks = [index for _, index in layers_of(opt)]
    return step_with(torch.zeros_like(gradient), gradient, blocks, matrices, lr=PLAIN["lr"], damping=PLAIN["damping"])


@pytest.mark.parametrize("form", ["expand", "reduce"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_first_step_of_kfac_is_a_dense_solve(name, form):
    model, x, y = make(name)
    opt = KFAC(model, **PLAIN, form=form)
    matrices = blocks_of(copy.deepcopy(model), x, y, opt, form)
    step, gradient = first_step(opt, model, x, y)
    torch.testing.assert_close(step, expected_step(model, gradient, opt, matrices), rtol=1e-8, atol=1e-11)
    assert opt.diagnostics == {"steps": 1, "refreshes": 1, "retries": 0, "fallbacks": 0}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("n", [4, 60])
@pytest.mark.parametrize("damping", [1e-6, 1e-2])
def test_few_examples_of_a_wide_layer(damping, n, dtype, tolerance):
    """With fewer examples than inputs most eigenvectors of A are not needed; the direction is that of all of them."""
    model, x, y = make("dense wide", n=n)
    reference = copy.deepcopy(model)
    matrices = blocks_of(reference, x, y, KFAC(copy.deepcopy(model), **PLAIN))
    gradient = rows_of(reference, x, y).mean(0)
    opt = KFAC(model.to(dtype), **PLAIN | {"damping": damping})
    before = flat(model)
    backpropagate(opt, model, x.to(dtype), y)
    opt.step()
    blocks = [index for _, index in layers_of(opt)]
    wanted = step_with(torch.zeros_like(gradient), gradient, blocks, matrices, lr=PLAIN["lr"], damping=damping)
    # rounding of the gradient, which the inverse enlarges by up to 1/λ
    bound = tolerance * (1 if dtype == torch.float64 else max(1.0, 1e-2 / damping))
    assert torch.linalg.vector_norm((flat(model) - before).double() - wanted) < bound * torch.linalg.vector_norm(wanted)


@pytest.mark.parametrize("name", NETWORKS)
def test_factored_damping_damps_each_factor(name):
    model, x, y = make(name)
    opt = KFAC(model, **PLAIN, preset="paper")
    twin = copy.deepcopy(model)
    step, gradient = first_step(opt, model, x, y)
    for layer, index in layers_of(opt):
        left, right = factored_damping(*factors(twin, x, y, layer), PLAIN["damping"])
        whole = kronecker_block(left, right, layer.bias is not None)
        wanted = -PLAIN["lr"] * torch.linalg.solve(whole, gradient[index])
        torch.testing.assert_close(step[index], wanted, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_first_step_of_ekfac_is_a_dense_solve(name):
    model, x, y = make(name)
    opt = EKFAC(model, **PLAIN)
    twin = copy.deepcopy(model)
    matrices = []
    for layer, index in layers_of(opt):
        (_, q_g), (_, q_a) = (eigenpairs(factor) for factor in factors(twin, x, y, layer))
        rows = rows_of(twin, x, y)[:, index]
        matrices.append(ekfac_block(rows.T @ rows / len(rows), q_g, q_a, layer.bias is not None))
    step, gradient = first_step(opt, model, x, y)
    torch.testing.assert_close(step, expected_step(model, gradient, opt, matrices), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", ["dense", "groups", "shared"])
def test_ekfac_of_mean_gradients(name):
    model, x, y = make(name)
    opt = EKFAC(model, **PLAIN, moments="mean")
    twin = copy.deepcopy(model)
    gradient = rows_of(twin, x, y).mean(0)
    matrices = []
    for layer, index in layers_of(opt):
        (_, q_g), (_, q_a) = (eigenpairs(factor) for factor in factors(twin, x, y, layer))
        Q = kronecker_block(q_g, q_a, layer.bias is not None)
        matrices.append(ekfac_mean_block(gradient[index], len(x), Q))
    step, _ = first_step(opt, model, x, y)
    torch.testing.assert_close(step, expected_step(model, gradient, opt, matrices), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("kind", ["true", "sampled"])
@pytest.mark.parametrize(("build", "standin"), [(KFAC, "KFAC"), (EKFAC, "EKFAC")])
@pytest.mark.parametrize("name", ["dense", "strided", "groups", "shared"])
def test_it_is_the_stand_in_of_the_same_name(name, build, standin, kind):
    if not hasattr(fl, standin):
        pytest.skip("the stand-in does not exist yet")
    model, x, y = make(name)
    options = {"kind": "empirical"} if kind == "true" else {"kind": "mc", "seed": 5}
    F = fl.Fisher(copy.deepcopy(model), (x, y), likelihood="categorical", **options)
    opt = build(model, **PLAIN | {"labels": kind, "seed": 5})
    step, gradient = first_step(opt, model, x, y)
    wanted = -PLAIN["lr"] * getattr(fl, standin)(F).solve(gradient, PLAIN["damping"])
    torch.testing.assert_close(step, wanted, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("build", [KFAC, EKFAC])
def test_memory_budget_changes_nothing(build, monkeypatch):
    results = []
    for budget in (None, 1):
        if budget:
            monkeypatch.setattr("fisherlens.optim.factors.ROWS_BYTES", budget)
            monkeypatch.setattr("fisherlens.optim.factors.positions.__defaults__", (budget,))
        model, x, y = make("groups")
        opt = build(model, **PLAIN)
        first_step(opt, model, x, y)
        results.append(flat(model))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_averages_are_corrected_for_their_start():
    """One batch again and again: the averages are its own statistics, whatever the weights."""
    results = []
    for ema in (0.0, 0.9):
        model, x, y = make("strided")
        opt = KFAC(model, **PLAIN | {"ema": ema}, inverse_refresh=1)
        for _ in range(3):
            backpropagate(opt, model, x, y)
            gradient = [p.grad.clone() for p in model.parameters()]
            kept = {k: v.clone() for k, v in model.state_dict().items()}
            opt.step()
            moved = flat(model)
            model.load_state_dict(kept)
        results.append(moved)
        assert gradient
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-11)


def test_refresh_periods():
    model, x, y = make("strided")
    opt = KFAC(model, lr=0.01, refresh=2, inverse_refresh=4, labels="true")
    seen = []
    for _ in range(9):
        backpropagate(opt, model, x, y)
        opt.step()
        record = opt._records["0"]
        seen.append((record.A.clone(), record.right.clone()))
    same = [[torch.equal(a, b) for a, b in itertools.pairwise(kind)] for kind in zip(*seen, strict=True)]
    assert same[0] == [True, False, True, False, True, False, True, False]
    assert same[1] == [True, True, True, False, True, True, True, False]
    assert (opt.diagnostics["steps"], opt.diagnostics["refreshes"]) == (9, 5)


def test_ekfac_updates_moments_between_changes_of_the_bases():
    model, x, y = make("groups")
    opt = EKFAC(model, lr=0.01, inverse_refresh=3, ema=0.5)
    seen = []
    for _ in range(7):
        backpropagate(opt, model, x, y)
        opt.step()
        record = opt._records["0"]
        seen.append((record.left.clone(), record.s.clone()))
    same = [[torch.equal(a, b) for a, b in itertools.pairwise(kind)] for kind in zip(*seen, strict=True)]
    assert same[0] == [True, True, False, True, True, False]
    assert not any(same[1])
    assert opt._records["0"].steps == 1


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (KFAC, {"inverse_refresh": 3}),
        (KFAC, {"damping_form": "factored", "refresh": 2, "weight_decay": 0.1, "kl_clip": 1e-3}),
        (EKFAC, {"inverse_refresh": 3, "labels": "sampled", "ema": 0.5}),
        (EKFAC, {"moments": "mean", "ema": 0.75}),
    ],
)
def test_a_resumed_run_is_bitwise_equal(build, options):
    state = torch.get_rng_state()
    assert resumed(build, options)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("build", [KFAC, EKFAC])
def test_layers_without_factors_take_the_announced_fallback(build):
    model = seeded(Normed)()
    _, x, y = make("flattened")
    with pytest.warns(NumericalWarning, match=f"{build.__name__} does not precondition 'norm.weight', 'norm.bias'"):
        opt = build(model, **PLAIN)
    step, gradient = first_step(opt, model, x, y)
    layer = opt.layout.layer("norm")
    at = slice(layer.start, layer.stop)
    torch.testing.assert_close(step[at], -PLAIN["lr"] * gradient[at] / (1 + PLAIN["damping"]))


@pytest.mark.parametrize("build", [KFAC, EKFAC])
def test_frozen_tensors_are_no_part_of_it(build):
    model, x, y = make("flattened")
    model[0].weight.requires_grad_(False)
    model[3].bias.requires_grad_(False)
    before = model[0].weight.clone()
    opt = build(model, lr=0.05, damping=0.1, labels="true")
    losses = []
    for _ in range(10):
        losses.append(backpropagate(opt, model, x, y).item())
        opt.step()
    assert losses[-1] < losses[0]
    assert torch.equal(model[0].weight, before)


def test_an_input_that_is_written_over_later_is_noticed():
    model, x, y = make("dense")
    opt = EKFAC(model, **PLAIN)
    backpropagate(opt, model, x, y)
    x += 1
    with pytest.raises(InputError, match="The input of layer '0' was changed in place"):
        opt.step()


def test_inverses_take_more_damping_where_they_need_it():
    good, bad, hopeless = torch.eye(2), torch.diag(torch.tensor([1.0, -0.5])), torch.diag(torch.tensor([1.0, -1e6]))
    matrices = torch.stack([good, bad, hopeless]).double()
    found = damped_inverses(matrices, torch.full((3,), 0.01, dtype=torch.float64))
    assert (found.retries, found.failed) == (2 + 2 + 1 + 1 + 1 + 1, 1)
    torch.testing.assert_close(found.matrices[0], torch.eye(2).double() / 1.01)
    torch.testing.assert_close(found.matrices[1], torch.diag(1 / torch.tensor([2.0, 0.5]).double()))
    torch.testing.assert_close(found.matrices[2], torch.eye(2).double() / 1e4)


def test_a_factor_that_lost_its_definiteness_is_counted():
    model, x, y = make("dense")
    opt = KFAC(model, preset="paper", labels="true", inverse_refresh=1, ema=0.5)
    backpropagate(opt, model, x, y)
    opt.step()
    opt._records["0"].A -= 1e12 * torch.eye(6, dtype=x.dtype)
    backpropagate(opt, model, x, y)
    with pytest.warns(NumericalWarning, match="1 blocks of 6 parameters are not positive definite even with"):
        opt.step()
    assert (opt.diagnostics["retries"], opt.diagnostics["fallbacks"]) == (6, 1)


@pytest.mark.parametrize("build", [KFAC, EKFAC])
def test_hooks_can_be_removed(build):
    model, x, y = make("dense")
    opt = build(model)
    copy.deepcopy(model)
    opt.remove_hooks()
    assert count_hooks(model) == 0
    backpropagate(opt, model, x, y)
    with pytest.raises(InputError, match="its hooks in place"):
        opt.step()


@pytest.mark.parametrize(
    ("build", "options", "error", "text"),
    [
        (KFAC, {"lr": 0.0}, InputError, "lr must be a finite number > 0; got 0.0."),
        (EKFAC, {"damping": float("nan")}, InputError, "damping must be a finite number > 0; got nan."),
        (KFAC, {"ema": 1.0}, InputError, "ema must be a finite number >= 0 and < 1; got 1.0."),
        (KFAC, {"damping_form": "Exact"}, InputError, "Unknown damping_form 'Exact'. Did you mean 'exact'? "),
        (KFAC, {"form": "sum"}, InputError, "Unknown form 'sum'. Known: 'expand', 'reduce'."),
        (EKFAC, {"moments": "examples "}, InputError, "Unknown moments 'examples '. Did you mean 'examples'? "),
        (KFAC, {"inverse_refresh": 0}, InputError, "inverse_refresh must be a finite number >= 1; got 0."),
        (EKFAC, {"inverse_refresh": 1.5}, TypeError, "inverse_refresh must be an int; got float 1.5."),
        (KFAC, {"preset": "2015"}, InputError, "Unknown preset '2015'. Known: 'paper'."),
    ],
)
def test_wrong_options_are_refused(build, options, error, text):
    model = make("dense")[0]
    with pytest.raises(error) as caught:
        build(model, **options)
    assert str(caught.value).startswith(text)
    assert count_hooks(model) == 0
    with pytest.raises(InputError, match=f"{build.__name__} needs a model with parameters that require grad"):
        build(nn.Linear(2, 2).requires_grad_(False))


def test_states_of_each_other_are_refused():
    model, x, y = make("dense")
    opt = KFAC(model)
    backpropagate(opt, model, x, y)
    opt.step()
    with pytest.raises(InputError, match="This state dict is of 'KFAC'; EKFAC loads only its own"):
        EKFAC(make("dense")[0]).load_state_dict(opt.state_dict())


@pytest.mark.parametrize("build", [KFAC, EKFAC])
def test_it_learns_the_digits(build):
    digits = problem("digits-cnn")
    record = train(digits.model(0), digits, lambda model: build(model), num_steps=40, record_every=20)
    loss = record.train_loss.values.squeeze()
    assert (loss[1:] < loss[:-1]).all()
    assert record.test_accuracy.values.squeeze()[-1] > 0.7
