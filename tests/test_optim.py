import copy
import gc
import pickle

import pytest
import torch
from optim_samples import OPTIONS, count_hooks, data, flat, loss_of, network, seeded, step, stepped
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fisherlens import Fisher
from fisherlens.errors import InputError, NumericalWarning
from fisherlens.optim import CWNGD
from fisherlens.optim.tap import Call


@pytest.fixture
def untouched():
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())


# --- hooks and what counts -----------------------------------------------------------------------------------------------


def evaluate(opt, model, batch):
    model.eval()
    other = data(5, seed=1)
    loss_of(model, other)  # with gradients, but never backpropagated
    with torch.no_grad():
        model(other[0])
    model.train()


def analyse(opt, model, batch):
    Fisher(model, data(5, seed=1), likelihood="categorical", kind="empirical").trace()


def differentiate(opt, model, batch):
    torch.autograd.grad(loss_of(model, data(5, seed=1)), list(model.parameters()))
    inputs = batch[0].clone().requires_grad_()
    torch.autograd.grad(model(inputs).sum(), inputs)


def functional_call(opt, model, batch):
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    functional.cross_entropy(torch.func.functional_call(model, leaves, (batch[0],)), batch[1]).backward()


def copies(opt, model, batch):
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        loss_of(other, data(5, seed=1)).backward()


# a further forward pass with gradients draws labels, so that later ones differ: true labels only
BETWEEN = [(change, "true") for change in (evaluate, analyse, differentiate, functional_call, copies)]
BETWEEN += [(change, "sampled") for change in (analyse, functional_call, copies)]


@pytest.mark.parametrize(("change", "labels"), BETWEEN)
def test_only_what_reaches_the_gradients_counts(change, labels, untouched):
    assert torch.equal(stepped(change, labels=labels), stepped(labels=labels))


def test_a_gradient_penalty_in_the_loss_is_part_of_the_backward_pass():
    model, batch = network(), data()
    opt = CWNGD(model, **OPTIONS)
    inputs = batch[0].clone().requires_grad_()
    loss = functional.cross_entropy(model(inputs), batch[1])
    penalty = torch.autograd.grad(loss, inputs, create_graph=True)[0].square().sum()
    opt.zero_grad()
    (loss + 0.1 * penalty).backward()
    opt.step()
    assert opt._blocks[0].H_steps == 1
    assert torch.isfinite(flat(model)).all()


def accumulate(opt, model, batch):
    opt.zero_grad()
    for at in (slice(0, 4), slice(4, 8)):
        (loss_of(model, (batch[0][at], batch[1][at])) / 2).backward()


def two_forward_passes(opt, model, batch):
    opt.zero_grad()
    parts = [loss_of(model, (batch[0][at], batch[1][at])) for at in (slice(0, 4), slice(4, 8))]
    (sum(parts) / 2).backward()


def two_losses(opt, model, batch):
    """The same outputs in two losses, backpropagated one after the other."""
    opt.zero_grad()
    outputs = model(batch[0])
    (0.3 * functional.cross_entropy(outputs, batch[1])).backward(retain_graph=True)
    (0.7 * functional.cross_entropy(outputs, batch[1])).backward()


def recompute(use_reentrant):
    def run(opt, model, batch):
        opt.zero_grad()
        hidden = checkpoint(model[:4], batch[0].requires_grad_(), use_reentrant=use_reentrant)
        functional.cross_entropy(model[4:](hidden), batch[1]).backward()

    run.__name__ = "reentrant" if use_reentrant else "not_reentrant"
    return run


def without_the_whole_model(opt, model, batch):
    opt.zero_grad()
    functional.cross_entropy(model[4:](model[:4](batch[0])), batch[1]).backward()


def replaced_before(opt, model, batch):
    """Gradients that zero_grad drops take their statistics along, in either way of dropping."""
    for set_to_none in (True, False):
        loss_of(model, data(5, seed=1)).backward()
        opt.zero_grad(set_to_none=set_to_none)
    loss_of(model, batch).backward()


@pytest.mark.parametrize(
    "change",
    [
        accumulate,
        two_forward_passes,
        two_losses,
        recompute(True),
        recompute(False),
        without_the_whole_model,
        replaced_before,
    ],
)
def test_other_ways_to_the_same_gradient_give_the_same_step(change):
    torch.testing.assert_close(stepped(change), stepped(), rtol=1e-8, atol=1e-10)


def test_unequal_batches_are_accumulated_by_example():
    def weighted(opt, model, batch):
        opt.zero_grad()
        for at, n in ((slice(0, 3), 3), (slice(3, 8), 5)):
            (loss_of(model, (batch[0][at], batch[1][at])) * n / 8).backward()

    torch.testing.assert_close(stepped(weighted), stepped(), rtol=1e-8, atol=1e-10)


def test_in_place_activations_are_fine():
    results = []
    for inplace in (True, False):
        model = network()
        model[1] = nn.ReLU(inplace=inplace)
        opt = CWNGD(model, **OPTIONS)
        step(opt, model, data())
        results.append(flat(model))
    assert torch.equal(*results)


def test_the_model_can_be_copied_and_stored_and_its_copies_are_free():
    model = network()
    opt = CWNGD(model, **OPTIONS)
    step(opt, model, data())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert torch.equal(flat(other), flat(model))
        fresh = CWNGD(other, **OPTIONS)
        step(fresh, other, data())
        assert fresh.diagnostics["steps"] == opt.diagnostics["steps"] == 1
    opt.zero_grad()
    loss_of(copy.deepcopy(model), data()).backward()
    with pytest.raises(InputError, match="step\\(\\) found no statistics"):
        opt.step()


def test_hooks_can_be_removed_and_go_with_the_optimizer():
    model = network()
    opt = CWNGD(model, **OPTIONS)
    other = CWNGD(model, **OPTIONS)
    step(opt, model, data())
    assert count_hooks(model) == 16
    opt.remove_hooks()
    opt.remove_hooks()
    assert count_hooks(model) == 8
    loss_of(model, data()).backward()
    with pytest.raises(InputError, match="its hooks in place"):
        opt.step()
    other.step()
    del other
    gc.collect()
    assert count_hooks(model) == 0


def test_a_forward_pass_without_a_backward_pass_leaves_no_memory():
    model = network()
    opt = CWNGD(model, **OPTIONS, labels="sampled")
    x = data()[0]
    gc.collect()
    gc.disable()  # what only a cycle keeps alive would stay
    try:
        for _ in range(3):
            model(x)
        assert not [o for o in gc.get_objects() if type(o) is Call]
    finally:
        gc.enable()
    assert opt.diagnostics["steps"] == 0


# --- the ordinary loop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_both_ways(set_to_none):
    model = network()
    opt = CWNGD(model, **OPTIONS)
    for _ in range(3):
        loss = loss_of(model, data())
        opt.zero_grad(set_to_none=set_to_none)
        loss.backward()
        opt.step()
    expected = network()
    other = CWNGD(expected, **OPTIONS)
    for _ in range(3):
        step(other, expected, data())
    assert torch.equal(flat(model), flat(expected))


def test_a_closure_is_called_once_and_its_loss_returned(untouched):
    model = network()
    opt = CWNGD(model, **OPTIONS)
    losses = []

    def closure():
        opt.zero_grad()
        losses.append(loss_of(model, data()))
        losses[-1].backward()
        return losses[-1]

    assert opt.step(closure) is losses[0]
    assert opt.step(closure) < losses[0]
    assert len(losses) == 2


def test_schedulers_reach_lr_and_damping():
    model, batch = network(), data()
    opt = CWNGD(model, **OPTIONS, ema=0.0, momentum_ema=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: [1.0, 0.5, 0.0][epoch])
    before, moved = flat(model), []
    for _ in range(3):
        step(opt, model, batch)
        scheduler.step() if len(moved) < 2 else None
        moved.append(flat(model) - before)
        model.load_state_dict(network().state_dict())
    torch.testing.assert_close(moved[1], 0.5 * moved[0])
    assert not moved[2].any()
    opt.param_groups[0] |= {"lr": 0.05, "damping": 1e6}
    step(opt, model, batch)
    assert (flat(model) - before).abs().max() < 1e-6


def test_parameters_without_gradient_stay():
    model, batch = network(), data()
    opt = CWNGD(model, **OPTIONS, weight_decay=0.1, momentum=0.5)
    step(opt, model, batch)
    before, direction = model[0].weight.detach().clone(), opt._previous[:10].clone()
    for _ in range(2):
        hidden = model[:4](batch[0]).detach()
        opt.zero_grad()
        functional.cross_entropy(model[4:](hidden), batch[1]).backward()
        opt.step()
    assert torch.equal(model[0].weight, before)
    assert torch.equal(opt._previous[:10], direction)
    steps = {blocks.layer: blocks.m_steps for blocks in opt._blocks}
    assert steps == {"0": 1, "3": 1, "5": 3}


def test_frozen_parameters_are_no_part_of_it():
    model, batch = network(), data()
    model[3].weight.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    before = model[3].weight.clone()
    opt = CWNGD(model, **OPTIONS)
    assert opt.layout.names == ("0.weight", "3.bias", "5.weight", "5.bias")
    losses = [step(opt, model, batch) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert torch.equal(model[3].weight, before)


def test_dropout_and_batch_norm_in_training_mode(untouched):
    def build():
        return nn.Sequential(
            nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(27, 3)
        )

    model = seeded(build)
    opt = CWNGD(model, **OPTIONS)
    with torch.random.fork_rng(devices=[]):
        losses = [step(opt, model, data(30)) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert model.training


def test_autocast_gives_statistics_in_the_dtype_of_the_parameters():
    model, batch = network(torch.float32), data(dtype=torch.float32)
    opt = CWNGD(model, **OPTIONS)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, batch)
        opt.zero_grad()
        loss.backward()
        opt.step()
    expected = stepped().float()
    assert {blocks.H.dtype for blocks in opt._blocks} == {torch.float32}
    start = flat(network()).float()
    assert functional.cosine_similarity(flat(model) - start, expected - start, dim=0) > 0.99


# --- layers that are not covered -----------------------------------------------------------------------------------------


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.scale, self.out = nn.Embedding(5, 4), nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.table(x) * self.scale)


def test_layers_without_a_rule_take_the_announced_fallback():
    model = seeded(Embedded)
    with pytest.warns(NumericalWarning) as caught:
        opt = CWNGD(model, **OPTIONS | {"damping": 0.5})
    assert str(caught[0].message) == (
        "CWNGD does not precondition 'scale', 'table.weight', as no layer of a known kind owns them alone; they move by "
        "lr * gradient / (1 + damping), the rule for parameters without statistics. Freeze them to leave them as they are."
    )
    assert len(caught) == 1
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(opt, model, (torch.tensor([0, 1, 1, 4]), torch.tensor([0, 1, 2, 0])))
    for name in ("scale", "table.weight"):
        p = dict(model.named_parameters())[name]
        torch.testing.assert_close(p.detach(), before[name] - 0.05 * p.grad / 1.5)
    assert not torch.allclose(model.out.weight, before["out.weight"] - 0.05 * model.out.weight.grad / 1.5)


class Direct(nn.Module):
    """Uses one layer's weight without calling the layer."""

    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.tanh(functional.linear(x, self.first.weight, self.first.bias)))


def test_a_layer_used_past_its_module_takes_the_fallback_and_says_so_once():
    model = seeded(Direct)
    opt = CWNGD(model, **OPTIONS | {"damping": 0.5})
    batch = torch.ones(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])
    before = model.first.weight.detach().clone()
    with pytest.warns(NumericalWarning) as caught:
        step(opt, model, batch)
    assert str(caught[0].message) == (
        "CWNGD saw a gradient of 'first.weight', 'first.bias', but no call of the module that owns them, as when a function "
        "uses its weight directly; they move by lr * gradient / (1 + damping). Call the module itself, model.layer(x), to have "
        "them preconditioned."
    )
    torch.testing.assert_close(model.first.weight.detach(), before - 0.05 * model.first.weight.grad / 1.5)
    step(opt, model, batch)


class Tied(nn.Module):
    def __init__(self, same_module):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a if same_module else nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))


def test_tied_modules():
    batch = torch.eye(4, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    model = seeded(lambda: Tied(True))
    opt = CWNGD(model, **OPTIONS)
    assert [layer.name for layer in opt.covered] == ["a", "out"]
    losses = [step(opt, model, batch) for _ in range(5)]
    assert losses[-1] < losses[0]
    model = seeded(lambda: Tied(False))
    with pytest.warns(NumericalWarning, match="does not precondition 'a.weight', 'a.bias', as no layer"):
        opt = CWNGD(model, **OPTIONS)
    assert [layer.name for layer in opt.covered] == ["b", "out"]  # the bias of b is its own
    losses = [step(opt, model, batch) for _ in range(5)]
    assert losses[-1] < losses[0]
