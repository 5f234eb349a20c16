"""Layers whose parameters are used past their module as well, and parameters that are trained later than the optimizer knows."""

import warnings

import pytest
import torch
from optim_methods import ALL
from optim_samples import data, flat, loss_of, network, seeded, step
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fisherlens.errors import InputError, NumericalWarning
from fisherlens.optim import CWNGD, KFAC, MBF, NGD, TENGraD

BATCH = torch.linspace(-1, 1, 30, dtype=torch.float64).view(5, 6).sin(), torch.arange(5) % 3


class Tied(nn.Module):
    """An autoencoder whose decoder multiplies by the weight of its encoder, and a classifier behind it."""

    def __init__(self, *, tied=True):
        super().__init__()
        self.encoder, self.out, self.tied = nn.Linear(6, 4), nn.Linear(6, 3), tied

    def forward(self, x):
        weight = self.encoder.weight if self.tied else torch.ones(4, 6, dtype=x.dtype)
        return self.out(torch.tanh(functional.linear(torch.tanh(self.encoder(x)), weight.mT)))


def caught_in(build, model, batch=BATCH, loss=loss_of, steps=2):
    """What two steps warn of, and what the first of them added to the parameters."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt, before = build(model), flat(model)
        for k in range(steps):
            opt.zero_grad()
            loss(model, batch).backward()
            gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
            opt.step()
            if k == 0:
                moved, first = flat(model) - before, gradient
    return [str(one.message) for one in caught], moved, first


def test_a_weight_used_past_its_module_as_well_takes_the_announced_fallback():
    options = {"lr": 0.1, "damping": 0.5, "momentum": 0.0, "labels": "true"}
    for method in (KFAC, NGD, CWNGD, TENGraD):
        texts, moved, gradient = caught_in(lambda m, method=method: method(m, **options, kl_clip=None), seeded(Tied))
        rule, share = ("gradient", 1.0) if method is TENGraD else ("gradient / (1 + damping)", 1.5)
        assert texts == [
            f"{method.__name__} saw 'encoder.weight', 'encoder.bias' used past the module that owns them as well as through it, as where a decoder "
            f"multiplies by the weight of its encoder. The calls of the module do not explain such gradients; they move by lr * {rule}. Give the second "
            "use a module with parameters of its own to have both preconditioned."
        ]
        torch.testing.assert_close(moved[:28], -0.1 * gradient[:28] / share)
        assert not torch.allclose(moved[28:], -0.1 * gradient[28:] / share)
    assert caught_in(MBF, seeded(Tied))[0] == []  # the mean gradient is all that it looks at


class Recomputed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.body, self.use_reentrant = network(), use_reentrant

    def forward(self, x):
        return self.body[4:](checkpoint(self.body[:4], x.requires_grad_(), use_reentrant=self.use_reentrant))


class Ordinary(nn.Module):
    """Calls in every form that stays within the modules: twice, padded by a mode, written over behind, in tuples of outputs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding="same", padding_mode="circular")
        self.twice, self.out = nn.Linear(4, 4), nn.Linear(32, 3, bias=False)

    def forward(self, x):
        x = functional.relu(self.conv(x), inplace=True)
        x = functional.relu(self.twice(functional.relu(self.twice(x), inplace=True)), inplace=True)
        return {"logits": (self.out(x.flatten(1)), x)}


def penalised(model, batch):
    return loss_of(model, batch) + 0.01 * sum(p.square().sum() for p in model.parameters())


@pytest.mark.parametrize(
    ("factory", "batch", "loss"),
    [
        (lambda: seeded(lambda: Tied(tied=False)), BATCH, penalised),
        (lambda: Recomputed(True), data(), loss_of),
        (lambda: Recomputed(False), data(), loss_of),
        (lambda: seeded(Ordinary), data(), lambda m, b: functional.cross_entropy(m(b[0])["logits"][0], b[1])),
    ],
)
def test_ordinary_calls_and_penalties_in_the_loss_are_no_such_use(factory, batch, loss):
    assert caught_in(lambda m: KFAC(m, labels="true"), factory(), batch, loss)[0] == []


def test_sampled_labels_need_a_checkpoint_that_is_not_reentrant():
    model = Recomputed(False)
    opt = KFAC(model, labels="sampled")
    step(opt, model, data())
    model.use_reentrant = True
    loss_of(model, data()).backward()
    with pytest.raises(
        InputError,
        match=r"or from within a reentrant checkpoint\. Call the whole model, checkpoint with use_reentrant=False, or",
    ):
        opt.step()


def test_it_is_seen_where_the_first_forward_pass_failed():
    model = seeded(Tied)
    opt = KFAC(model, labels="true")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(torch.ones(2, 5, dtype=torch.float64))
    with torch.no_grad():
        model(BATCH[0])
    with pytest.warns(NumericalWarning, match=r"KFAC saw 'encoder\.weight', 'encoder\.bias' used past the module"):
        step(opt, model, BATCH)


@pytest.mark.parametrize("name", ALL)
def test_parameters_that_are_unfrozen_later_are_not_moved_which_is_said_once(name):
    model, batch = network(), data()
    model[0].requires_grad_(False)
    opt = ALL[name](model)
    step(opt, model, batch)
    model[0].requires_grad_(True)
    before, other = model[0].weight.detach().clone(), model[5].weight.detach().clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            step(opt, model, batch)
    assert [str(one.message) for one in caught] == [
        f"{type(opt).__name__} does not move '0.weight', '0.bias': they did not require grad when it was built, and have a gradient now. Its statistics "
        "are laid out once, so build a new optimizer to train them, with the new state of the model; if another optimizer moves them, all is well."
    ]
    assert torch.equal(model[0].weight, before)
    assert not torch.equal(model[5].weight, other)
