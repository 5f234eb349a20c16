"""What holds for every optimizer that keeps the rows of a batch, in the ordinary loop."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
from optim_samples import count_hooks, data, flat, loss_of, network, seeded, step
from row_samples import layer_blocks, rows_of
from test_optim import (
    Direct,
    Embedded,
    Tied,
    accumulate,
    analyse,
    copies,
    differentiate,
    evaluate,
    functional_call,
    recompute,
    replaced_before,
    two_forward_passes,
    two_losses,
    without_the_whole_model,
)
from torch import nn
from torch.nn import functional

from fisherlens import Fisher
from fisherlens.errors import InputError, NumericalWarning
from fisherlens.optim import CWNGD, FNGD, NGD, QuasiDiagonal, TENGraD, UnitWise
from fisherlens.reference import blockwise_step
from fisherlens.training import problem, train

METHODS = [NGD, TENGraD, FNGD, UnitWise, QuasiDiagonal]
SAMPLING = [NGD, TENGraD, UnitWise, QuasiDiagonal]
OPTIONS = {"lr": 0.05, "damping": 0.1}


@pytest.fixture
def untouched():
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())


def stepped(method, change=lambda opt, model, batch: None, **options):
    """Parameters after three steps, with something done between the backward pass and each step."""
    model, batch = network(), data()
    opt = method(model, **OPTIONS | options)
    for _ in range(3):
        loss = loss_of(model, batch)
        opt.zero_grad()
        loss.backward()
        change(opt, model, batch)
        opt.step()
    return flat(model)


BETWEEN = (evaluate, analyse, differentiate, functional_call, copies)


@pytest.mark.parametrize("change", BETWEEN)
@pytest.mark.parametrize("method", METHODS)
def test_only_what_reaches_the_gradients_counts(method, change, untouched):
    assert torch.equal(stepped(method, change, labels="true"), stepped(method, labels="true"))


@pytest.mark.parametrize("change", [analyse, functional_call, copies])
@pytest.mark.parametrize("method", SAMPLING)
def test_sampled_labels_are_drawn_for_the_batch_only(method, change, untouched):
    assert torch.equal(stepped(method, change, labels="sampled"), stepped(method, labels="sampled"))


OTHER_WAYS = [accumulate, two_losses, recompute(True), recompute(False), without_the_whole_model, replaced_before]


@pytest.mark.parametrize("change", [*OTHER_WAYS, two_forward_passes])
@pytest.mark.parametrize("method", METHODS)
def test_other_ways_to_the_same_gradient_give_the_same_step(method, change):
    options = {"labels": "true", "refresh": 1 if method is FNGD and change is two_forward_passes else 2}
    expected = stepped(method, **options)
    torch.testing.assert_close(stepped(method, change, **options), expected, rtol=1e-8, atol=1e-10)


def test_two_forward_passes_of_one_step_share_the_coefficients_of_fngd():
    """After the first epoch each forward pass starts at position zero, until a backward pass has counted it."""
    model, (x, y) = network(), data()
    opt = FNGD(model, **OPTIONS, momentum=0.0, epoch_steps=1)
    step(opt, model, (x, y))
    twin = copy.deepcopy(model)
    loss = sum(functional.cross_entropy(model(x[at]), y[at]) for at in (slice(0, 4), slice(4, 8))) / 2
    opt.zero_grad()
    loss.backward()
    wanted = torch.zeros(len(flat(twin)), dtype=x.dtype)
    rows = rows_of(twin, x, y)
    for b, c in zip(layer_blocks(twin), opt.coefficients_of.values(), strict=True):
        wanted[b] = rows[:, b].T @ c[:4].repeat(2) / 8
    torch.testing.assert_close(torch.cat([p.grad.reshape(-1) for p in model.parameters()]), wanted)


@pytest.mark.parametrize("method", METHODS)
def test_a_second_forward_pass_before_the_step_changes_nothing(method):
    model, batch = network(), data()
    opt = method(model, **OPTIONS, labels="true")
    for _ in range(3):
        opt.zero_grad()
        loss = loss_of(model, batch)
        other = loss_of(model, data(5, seed=1))
        loss.backward()
        opt.step()
        assert torch.isfinite(other)
    assert torch.equal(flat(model), stepped(method, labels="true"))


@pytest.mark.parametrize("method", METHODS)
def test_schedulers_reach_lr_and_damping(method):
    model, batch = network(), data()
    opt = method(model, **OPTIONS, momentum=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: [1.0, 0.0][epoch])
    step(opt, model, batch)
    scheduler.step()
    before = flat(model)
    step(opt, model, batch)
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("method", METHODS)
def test_a_closure_zero_grad_both_ways_and_weight_decay(method, untouched):
    results = []
    for set_to_none in (True, False):
        model, batch = network(), data()
        opt = method(model, **OPTIONS, weight_decay=0.2)
        before = flat(model)

        def closure(opt=opt, model=model, batch=batch, how=set_to_none):
            opt.zero_grad(set_to_none=how)
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        assert opt.step(closure) > opt.step(closure)
        results.append(flat(model) - before)
    assert torch.equal(*results)
    plain, decayed = network(), network()
    for net, decay in ((plain, 0.0), (decayed, 0.2)):
        step(method(net, **OPTIONS, weight_decay=decay), net, data())
    torch.testing.assert_close(flat(decayed), flat(plain) - 0.05 * 0.2 * flat(network()))


@pytest.mark.parametrize("method", METHODS)
def test_parameters_without_a_gradient_stay(method):
    model, batch = network(), data()
    opt = method(model, **OPTIONS, weight_decay=0.1)
    for refreshed in (True, False):
        before = model[0].weight.detach().clone()
        hidden = model[:4](batch[0]).detach()
        opt.zero_grad()
        functional.cross_entropy(model[4:](hidden), batch[1]).backward() if opt.labels == "true" else _whole(
            model, batch
        )
        opt.step()
        assert torch.equal(model[0].weight, before), refreshed
        step(opt, model, batch)
        assert not torch.equal(model[0].weight, before)


def _whole(model, batch):
    """A pass of the whole model that leaves no gradient in its first layers."""
    handle = model[3].register_forward_hook(lambda module, args, output: output.detach())
    try:
        loss_of(model, batch).backward()
    finally:
        handle.remove()


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.idle, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.a(x)))


@pytest.mark.parametrize("method", METHODS)
def test_an_unused_layer_stays_and_disturbs_nothing(method):
    model = seeded(Unused)
    alone = nn.Sequential(copy.deepcopy(model.a), nn.Tanh(), copy.deepcopy(model.out))
    batch = torch.eye(4, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    before = model.idle.weight.detach().clone()
    for net in (model, alone):
        opt = method(net, **OPTIONS)
        for _ in range(3):
            step(opt, net, batch)
    assert torch.equal(model.idle.weight, before)
    torch.testing.assert_close(model.a.weight, alone[0].weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_layers_without_a_rule_take_the_announced_fallback(method):
    rule = "gradient" if method is TENGraD else "gradient / (1 + damping)"
    model = seeded(Embedded)
    with pytest.warns(NumericalWarning) as caught:
        opt = method(model, lr=0.05, damping=0.5, **({"kl_clip": None} if method is not FNGD else {}))
    assert str(caught[0].message).startswith(f"{method.__name__} does not precondition 'scale', 'table.weight', as")
    assert f"they move by lr * {rule}, the rule" in str(caught[0].message)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(opt, model, (torch.tensor([0, 1, 1, 4]), torch.tensor([0, 1, 2, 0])))
    for name in ("scale", "table.weight"):
        p = dict(model.named_parameters())[name]
        expected = before[name] - 0.05 * p.grad / (1.0 if method is TENGraD else 1.5)
        torch.testing.assert_close(p.detach(), expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_used_past_its_module_takes_the_fallback(method):
    model = seeded(Direct)
    batch = torch.ones(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])
    opt = method(model, lr=0.05, damping=0.5, momentum=0.0, **({"kl_clip": None} if method is not FNGD else {}))
    share = 1.0 if method is TENGraD else 1.5
    for first in (True, False):
        before = model.first.weight.detach().clone()
        with (
            pytest.warns(NumericalWarning, match=f"{method.__name__} saw a gradient of")
            if first
            else warnings.catch_warnings()
        ):
            step(opt, model, batch)
        torch.testing.assert_close(model.first.weight.detach(), before - 0.05 * model.first.weight.grad / share)


@pytest.mark.parametrize("method", METHODS)
def test_tied_modules(method):
    batch = torch.eye(4, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    model = seeded(lambda: Tied(True))
    opt = method(model, **OPTIONS)
    losses = [step(opt, model, batch) for _ in range(6)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", METHODS)
def test_copies_hooks_and_states_of_others(method, untouched):
    model = network()
    opt = method(model, **OPTIONS)
    step(opt, model, data())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        fresh = method(other, **OPTIONS)
        step(fresh, other, data())
    with pytest.raises(TypeError, match=f"{method.__name__} cannot be copied or pickled"):
        copy.deepcopy(opt)
    for other in METHODS:
        if other is not method:
            with pytest.raises(
                InputError, match=f"This state dict is of '{method.__name__}'; {other.__name__} loads only"
            ):
                other(network(), **OPTIONS).load_state_dict(opt.state_dict())
    opt.remove_hooks()
    assert count_hooks(model) == 0
    opt = method(model, **OPTIONS)
    step(opt, model, data())
    del opt
    gc.collect()
    assert count_hooks(model) == 0


@pytest.mark.parametrize("method", METHODS)
def test_training_mode_is_accepted(method, untouched):
    def build():
        return nn.Sequential(
            nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(27, 3)
        )

    model = seeded(build)
    with pytest.warns(NumericalWarning, match="does not precondition '1.weight', '1.bias'"):
        opt = method(model, lr=0.02, damping=0.1)
    with torch.random.fork_rng(devices=[]):
        losses = [step(opt, model, data(30)) for _ in range(20)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_step_needs_a_backward_pass_and_something_to_train(method):
    model = network()
    opt = method(model, **OPTIONS)
    with pytest.raises(InputError, match=r"step\(\) found no statistics"):
        opt.step()
    with pytest.raises(InputError, match=f"{method.__name__} needs a model with parameters that require grad"):
        method(network().requires_grad_(False))
    with pytest.raises(TypeError, match=f"{method.__name__} takes the model itself"):
        method(list(model.parameters()))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (NGD, {"kl_clip": 1e-3}),
        (TENGraD, {"lr": 0.03, "damping": 0.2, "refresh": 10}),
        (FNGD, {"lr": 0.01, "epoch_steps": 20}),
        (UnitWise, {}),
        (QuasiDiagonal, {"lr": 0.05, "damping": 0.05}),
    ],
)
def test_it_learns_the_digits(method, options):
    digits = problem("digits-cnn")
    record = train(digits.model(0), digits, lambda model: method(model, **options), num_steps=60, record_every=20)
    loss = record.train_loss.values.squeeze()
    assert loss[-1] < 0.6 < loss[0]
    assert record.test_accuracy.values.squeeze()[-1] > 0.75


@pytest.mark.parametrize("method", [NGD, TENGraD])
def test_a_state_without_statistics_is_refreshed_at_once(method):
    """Saved with new rows in every step, loaded to keep them for many."""
    model, batch = network(), data()
    opt = method(model, **OPTIONS, labels="true", refresh=1)
    for _ in range(2):
        step(opt, model, batch)
    twin = copy.deepcopy(model)
    other = method(twin, **OPTIONS, labels="true", refresh=100)
    other.load_state_dict(opt.state_dict())
    for opt_, net in ((opt, model), (other, twin)):
        step(opt_, net, batch)
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", [TENGraD, FNGD])
def test_activations_do_not_wait_for_a_step_without_statistics(method):
    model, batch = network(), data()
    opt = method(model, **OPTIONS, **({"epoch_steps": 1} if method is FNGD else {}))
    step(opt, model, batch)
    loss_of(model, batch).backward()
    calls = [call for one in opt._tap._passes.values() for calls in one.calls.values() for call in calls]
    assert len(calls) == 3
    assert all(call.use.inputs.untyped_storage().nbytes() <= 8 for call in calls)
    opt.step()
    assert opt.diagnostics["refreshes"] == 1


@pytest.mark.parametrize("method", [NGD, TENGraD, FNGD])
def test_hooks_of_others_may_change_an_output(method):
    """The layer's scores are those at its own output, in weighted backward passes too."""
    model, (x, y) = network(), data()
    model[3].register_forward_hook(lambda module, args, output: 2 * output.square())
    model[5].register_full_backward_hook(lambda module, before, after: None)
    clip = {} if method is FNGD else {"kl_clip": None}
    opt = method(
        model, **OPTIONS, labels="true", momentum=0.0, **clip, **({"epoch_steps": 1} if method is FNGD else {})
    )
    for first in (True, False):
        rows, before = rows_of(copy.deepcopy(model), x, y), flat(model)
        step(opt, model, (x, y))
        if first:
            blocks = [torch.arange(len(before))] if method is NGD else layer_blocks(model)
            wanted = blockwise_step(before, rows, rows.mean(0), blocks, lr=0.05, damping=0.1)
        elif method is FNGD:
            wanted = before.clone()
            for b, c in zip(layer_blocks(model), opt.coefficients_of.values(), strict=True):
                wanted[b] -= 0.05 * rows[:, b].T @ c / len(x)
        else:
            break
        torch.testing.assert_close(flat(model), wanted, rtol=1e-8, atol=1e-10)


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 2)

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize("method", [NGD, TENGraD])
@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "bernoulli"])
def test_sampled_labels_give_the_fisher_in_its_own_scale(method, likelihood):
    """Whatever the loss: F with one draw per example, positions of a categorical output being terms of the mean."""
    model = seeded(Positions)
    x = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    F = Fisher(model, (x, None), likelihood=likelihood, kind="mc", seed=1).dense()
    before = flat(model)
    opt = method(model, **OPTIONS, likelihood=likelihood, labels="sampled", seed=1, kl_clip=None, momentum=0.0)
    loss = model(x).square().mean()
    opt.zero_grad()
    loss.backward()
    g = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    opt.step()
    wanted = before - 0.05 * torch.linalg.solve(F + 0.1 * torch.eye(len(F), dtype=x.dtype), g)
    torch.testing.assert_close(flat(model), wanted, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("method", [CWNGD, *METHODS])
def test_a_buffer_that_is_filled_again_too_early_is_noticed(method):
    model, (x, y) = network(), data()
    opt = method(model, **OPTIONS)
    buffer = x.clone()
    loss_of(model, (buffer, y)).backward()
    buffer.copy_(data(seed=1)[0])
    with pytest.raises(
        InputError, match="The input of layer '0' was changed in place after the layer had read it, so its"
    ):
        loss_of(model, (buffer, y)).backward()
    opt.zero_grad()
    step(opt, model, (buffer, y))
    assert opt.diagnostics["steps"] == 1


@pytest.mark.parametrize("method", METHODS)
def test_channels_last_is_the_same(method):
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model, (x, y) = network().to(memory_format=memory_format), data()
        opt = method(model, **OPTIONS, **({"epoch_steps": 2} if method is FNGD else {}))
        for _ in range(4):
            step(opt, model, (x.to(memory_format=memory_format), y))
        results.append(flat(model))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
