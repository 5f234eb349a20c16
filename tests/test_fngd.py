import copy
import gc
import io
import pickle

import pytest
import torch
from row_samples import NETWORKS, flat, layer_blocks, make, moved, rows_of, take_step
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fisherlens import Fisher
from fisherlens.errors import InputError, NonFiniteError
from fisherlens.optim import FNGD, TENGraD
from fisherlens.optim.fngd import Coefficients
from fisherlens.reference import blockwise_step, fngd_step

PLAIN = {"lr": 0.3, "damping": 0.1, "momentum": 0.0}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_first_step_is_a_dense_solve_with_the_matrix_of_each_layer(name):
    model, x, y = make(name)
    rows, before = rows_of(model, x, y), flat(model)
    wanted = blockwise_step(before, rows, rows.mean(0), layer_blocks(model), lr=0.3, damping=0.1) - before
    change, opt = moved(FNGD, name, **PLAIN)
    torch.testing.assert_close(change, wanted, rtol=1e-8, atol=1e-11)
    tengrad, _ = moved(TENGraD, name, labels="true", kl_clip=None, **PLAIN)
    torch.testing.assert_close(change, tengrad, rtol=1e-8, atol=1e-11)
    assert opt.diagnostics == {"steps": 1, "refreshes": 1, "retries": 0, "fallbacks": 0}


@pytest.mark.parametrize("coefficients", ["position", "layer"])
@pytest.mark.parametrize("name", NETWORKS)
def test_steps_follow_the_dense_loop_through_the_end_of_the_epoch(name, coefficients):
    """Every network, convolutions with strides, padding modes and groups, shared layers and sequences included."""
    model, x, y = make(name, n=20)
    opt = FNGD(model, **PLAIN, epoch_steps=3, coefficients=coefficients)
    theta, state, options = flat(model), None, {"lr": 0.3, "damping": 0.1, "epoch_steps": 3}
    for step in range(6):
        at = slice(5 * (step % 4), 5 * (step % 4) + 5)
        rows = rows_of(copy.deepcopy(model), x[at], y[at])
        theta, state = fngd_step(theta, rows, layer_blocks(model), state, scalar=coefficients == "layer", **options)
        take_step(opt, model, x[at], y[at])
        torch.testing.assert_close(flat(model), theta, rtol=1e-8, atol=1e-10)
    assert opt.diagnostics["refreshes"] == 3
    for c, found in zip(state["c"], opt.coefficients_of.values(), strict=True):
        torch.testing.assert_close(found, c, rtol=1e-7, atol=1e-10)


def weighted(name="dense", n=7, **options):
    """A network and its optimizer after the first epoch."""
    model, x, y = make(name, n)
    opt = FNGD(model, **PLAIN | {"epoch_steps": 2} | options)
    for _ in range(2):
        take_step(opt, model, x, y)
    return model, opt, x, y


@pytest.mark.parametrize("name", ["flattened", "groups", "shared", "tokens"])
def test_the_signal_to_earlier_layers_is_not_weighted(name):
    model, opt, x, y = weighted(name)
    plain = copy.deepcopy(model)
    opt.zero_grad()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [net(z) for net, z in zip((model, plain), inputs, strict=True)]
    assert torch.equal(*outputs)
    for out in outputs:
        functional.cross_entropy(out, y).backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-12, atol=1e-14)
    rows = rows_of(plain, x, y)
    expected = torch.zeros(rows.shape[1], dtype=x.dtype)
    for b, c in zip(layer_blocks(plain), opt.coefficients_of.values(), strict=True):
        expected[b] = rows[:, b].T @ c / len(x)
    found = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def count_calls(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        function()
    return {
        e.key: e.count
        for e in seen.key_averages()
        if e.key in ("aten::mm", "aten::addmm", "aten::bmm", "aten::convolution_backward", "aten::convolution")
    }


@pytest.mark.parametrize("name", ["dense", "flattened"])
def test_after_the_epoch_a_step_has_the_products_of_plain_gradient_descent(name):
    model, opt, x, y = weighted(name)
    plain = copy.deepcopy(model)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    ours, theirs = count_calls(lambda: take_step(opt, model, x, y)), count_calls(lambda: take_step(sgd, plain, x, y))
    assert theirs["aten::addmm"] >= 1
    assert ours == theirs


def test_a_short_batch_and_a_long_one():
    model, opt, x, y = weighted("dense", n=5)
    _, x, y = make("dense", n=8)
    c = opt.coefficients_of["0"]
    for n in (3, 8):
        rows, before = rows_of(copy.deepcopy(model), x[:n], y[:n]), flat(model)
        wanted = before.clone()
        for b, c in zip(layer_blocks(model), opt.coefficients_of.values(), strict=True):
            used = torch.cat([c, c.mean().expand(3)])[:n]
            wanted[b] -= 0.3 * rows[:, b].T @ used / n
        take_step(opt, model, x[:n], y[:n])
        torch.testing.assert_close(flat(model), wanted, rtol=1e-9, atol=1e-12)


def test_averages_count_each_position():
    average = Coefficients(torch.zeros(0), torch.zeros(0))
    average.add(torch.tensor([1.0, 2.0]))
    average.add(torch.tensor([3.0, 4.0, 5.0]))
    average.add(torch.tensor([5.0]))
    torch.testing.assert_close(average.mean, torch.tensor([3.0, 3.0, 5.0]))
    assert average.steps.tolist() == [3, 2, 1]
    torch.testing.assert_close(average.at(1, 3, constant=False), torch.tensor([3.0, 5.0, 11 / 3]))
    torch.testing.assert_close(average.at(7, 2, constant=False), torch.full((2,), 11 / 3))
    torch.testing.assert_close(average.at(0, 2, constant=True), torch.full((2,), 11 / 3))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_positions_count_on_over_accumulated_passes(reduction):
    results = []
    for sizes in ((7,), (3, 4), (1, 4, 2)):
        model, x, y = make("flattened")
        opt = FNGD(model, lr=0.3, damping=0.1, epoch_steps=2, reduction=reduction)
        for _ in range(4):
            opt.zero_grad()
            start = 0
            for n in sizes:
                at = slice(start, start + n)
                loss = functional.cross_entropy(model(x[at]), y[at], reduction=reduction)
                (loss * n / 7 if reduction == "mean" else loss).backward()
                start += n
            opt.step()
        results.append(flat(model))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-8, atol=1e-10)


def test_a_penalty_in_the_loss_keeps_its_size_in_all_epochs():
    model, x, y = make("dense")
    opt = FNGD(model, **PLAIN, epoch_steps=1)

    def loss(model, x, y):
        return functional.cross_entropy(model(x), y) + 0.05 * sum(p.square().sum() for p in model.parameters())

    for _ in range(2):
        rows, before = rows_of(copy.deepcopy(model), x, y), flat(model)
        take_step(opt, model, x, y, loss)
        wanted = before - 0.3 * 0.1 * before
        for b, c in zip(layer_blocks(model), opt.coefficients_of.values(), strict=True):
            wanted[b] -= 0.3 * rows[:, b].T @ c / len(x)
        torch.testing.assert_close(flat(model), wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("epoch_steps", [1, 2])
def test_clipping_by_norm_clips_the_step_in_all_epochs(epoch_steps, dtype):
    found = []
    for factor in (1.0, 0.1):
        model, x, y = make("flattened")
        model, x = model.to(dtype), x.to(dtype)
        opt, places = FNGD(model, lr=0.1, epoch_steps=epoch_steps, momentum=0.0), []
        for k in range(2):
            opt.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            if k == 1:
                length = torch.linalg.vector_norm(torch.cat([p.grad.reshape(-1) for p in model.parameters()])).item()
                nn.utils.clip_grad_norm_(model.parameters(), factor * length)
            opt.step()
            places.append(flat(model))
        found.append(places[1] - places[0])
    torch.testing.assert_close(found[1], 0.1 * found[0], rtol=1e-3 if dtype == torch.float32 else 1e-5, atol=1e-7)


def test_the_epoch_can_be_ended_by_hand():
    model, x, y = make("dense")
    opt = FNGD(model, **PLAIN)
    take_step(opt, model, x, y)
    opt.end_epoch()
    kept = opt.coefficients_of
    take_step(opt, model, x, y)
    assert opt.diagnostics["refreshes"] == 1
    assert all(torch.equal(kept[name], c) for name, c in opt.coefficients_of.items())


def test_refresh_within_the_epoch():
    model, x, y = make("dense")
    opt = FNGD(model, **PLAIN, epoch_steps=5, refresh=2)
    changed, last = [], {}
    for _ in range(6):
        take_step(opt, model, x, y)
        now = opt.coefficients_of
        changed.append(not last or any(not torch.equal(last[name], c) for name, c in now.items()))
        last = now
    assert changed == [True, False, True, False, True, False]


# --- the ordinary loop ---------------------------------------------------------------------------------------------------


def test_in_place_activations_and_checkpoints():
    results = []
    for kind in ("plain", "in place", "reentrant", "not reentrant"):
        model, x, y = make("flattened")
        model[1] = nn.ReLU(inplace=kind != "plain")
        opt = FNGD(model, lr=0.1, damping=0.1, epoch_steps=2)
        for _ in range(4):
            opt.zero_grad()
            if "reentrant" in kind:
                hidden = checkpoint(model[:3], x.requires_grad_(), use_reentrant=kind == "reentrant")
                functional.cross_entropy(model[3:](hidden), y).backward()
            else:
                functional.cross_entropy(model(x), y).backward()
            opt.step()
        results.append(flat(model))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-9, atol=1e-12)


def test_a_gradient_penalty_passes_through():
    model, _opt, x, y = weighted("flattened")
    inputs = x.clone().requires_grad_()
    loss = functional.cross_entropy(model(inputs), y)
    slope = torch.autograd.grad(loss, inputs, create_graph=True)[0]
    twin = copy.deepcopy(model)
    again = x.clone().requires_grad_()
    expected = torch.autograd.grad(functional.cross_entropy(twin(again), y), again, create_graph=True)[0]
    torch.testing.assert_close(slope, expected)
    second = torch.autograd.grad(slope.square().sum(), inputs)[0]
    torch.testing.assert_close(second, torch.autograd.grad(expected.square().sum(), again)[0])


def test_analyses_of_the_model_see_no_weights():
    model, opt, x, y = weighted("strided")
    before = Fisher(copy.deepcopy(model), (x, y), likelihood="categorical", kind="empirical")
    after = Fisher(model, (x, y), likelihood="categorical", kind="empirical")
    torch.testing.assert_close(after.gradient(), before.gradient(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(after.diagonal(), before.diagonal(), rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        model(x)
    state = flat(model)
    take_step(opt, model, x, y)
    assert not torch.equal(flat(model), state)


def test_transforms_of_functions_see_no_weights():
    model, opt, x, y = weighted("flattened")
    twin = copy.deepcopy(model)
    found, expected = (
        torch.func.vmap(torch.func.jacrev(lambda z, net=net: net(z[None])[0]))(x) for net in (model, twin)
    )
    torch.testing.assert_close(found, expected)
    take_step(opt, model, x, y)


def test_the_model_can_be_copied_and_hooks_can_go():
    model, opt, x, y = weighted()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        functional.cross_entropy(other(x), y).backward()
        found = torch.cat([p.grad.reshape(-1) for p in other.parameters()])
        torch.testing.assert_close(found, rows_of(other, x, y).mean(0))
    opt.remove_hooks()
    model.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    found = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(found, rows_of(model, x, y).mean(0))
    with pytest.raises(InputError, match="its hooks in place"):
        opt.step()
    model, opt, x, y = weighted()
    del opt
    gc.collect()
    model.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(model[0].bias.grad, rows_of(model, x, y).mean(0)[20:24])


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("options", [{}, {"coefficients": "layer", "refresh": 2}])
def test_a_resumed_run_is_bitwise_equal(after, options):
    model, x, y = make("groups")
    model, x = model.float(), x.float()
    opt = FNGD(model, epoch_steps=3, **options)
    for _ in range(after):
        take_step(opt, model, x, y)
    stored = io.BytesIO()
    torch.save(opt.state_dict(), stored)
    stored.seek(0)
    twin = copy.deepcopy(model)
    other = FNGD(twin, lr=0.9, damping=0.9, **options)
    other.load_state_dict(torch.load(stored, weights_only=True))
    assert [take_step(opt, model, x, y) for _ in range(5)] == [take_step(other, twin, x, y) for _ in range(5)]
    assert torch.equal(flat(model), flat(twin))
    assert opt.diagnostics == other.diagnostics


@pytest.mark.parametrize("name", ["strided", "groups", "dense wide"])
def test_single_precision_and_autocast(name):
    wanted, _ = moved(FNGD, name, steps=4, lr=0.1, epoch_steps=2)
    change, _ = moved(FNGD, name, torch.float32, steps=4, lr=0.1, epoch_steps=2)
    assert torch.linalg.vector_norm(change - wanted) < 1e-3 * torch.linalg.vector_norm(wanted)
    model, x, y = make(name)
    model, x = model.float(), x.float()
    before = flat(model)
    opt = FNGD(model, lr=0.1, epoch_steps=2)
    for _ in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = functional.cross_entropy(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert functional.cosine_similarity((flat(model) - before).double(), wanted, dim=0) > 0.99


def test_frozen_parts():
    model, x, y = make("flattened")
    model[0].bias.requires_grad_(False)
    model[3].weight.requires_grad_(False)
    before = model[3].weight.clone()
    opt = FNGD(model, lr=0.1, epoch_steps=2)
    losses = [take_step(opt, model, x, y) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert torch.equal(model[3].weight, before)
    assert model[0].bias.grad is None


def test_a_non_finite_gradient_is_refused():
    for steps in (0, 3):
        model, x, y = make("dense")
        opt = FNGD(model, epoch_steps=2)
        for _ in range(steps):
            take_step(opt, model, x, y)
        before = flat(model)
        functional.cross_entropy(model(x), y).backward()
        model[0].bias.grad[1] = float("nan")
        with pytest.raises(NonFiniteError, match=r"The gradient of parameter '0.bias' holds NaN or infinity"):
            opt.step()
        assert torch.equal(flat(model), before)
        assert opt.diagnostics["steps"] == steps


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"labels": "sampled"},
            InputError,
            "FNGD weights the gradients of the loss itself, so its coefficients exist for labels='true' only; got 'sampled'. "
            "For sampled labels take TENGraD, which has the same layer blocks.",
        ),
        ({"labels": "observed"}, InputError, "Unknown labels 'observed'."),
        ({"epoch_steps": 0}, InputError, "epoch_steps must be a finite number >= 1; got 0."),
        ({"epoch_steps": 2.0}, TypeError, "epoch_steps must be an int; got float 2.0."),
        ({"coefficients": "scalar"}, InputError, "Unknown coefficients 'scalar'."),
        ({"lr": -1.0}, InputError, "lr must be a finite number > 0; got -1.0."),
        ({"preset": "first"}, InputError, "Unknown preset 'first'. Known: 'paper'."),
    ],
)
def test_wrong_options_are_refused(options, error, text):
    with pytest.raises(error) as caught:
        FNGD(make("dense")[0], **options)
    assert str(caught.value).startswith(text)
