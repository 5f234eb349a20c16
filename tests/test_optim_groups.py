"""Parameter groups of every method: options of their own, and nothing else changed by being divided."""

import copy
import itertools
import math
import re

import pytest
import torch
from optim_methods import ALL, WITHOUT_CLIP, unclipped
from optim_samples import count_hooks, data, flat, loss_of, network, step
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fisherlens.errors import InputError
from fisherlens.optim import CWNGD, KBFGS, KFAC, NGD

OWN = {"lr": 0.004, "momentum": 0.3, "weight_decay": 0.05, "damping": 0.03}
REST = {"lr": 0.007, "momentum": 0.8, "weight_decay": 0.0, "damping": 0.2}
FIRST = slice(0, 10)  # the convolution of the sample network


def moves(build, groups, steps, **options):
    """How far each of some steps goes from the same parameters."""
    model, batch = network(), data()
    opt, start = build(model, param_groups=groups, **options), flat(model)
    found = []
    for _ in range(steps):
        step(opt, model, batch)
        found.append(flat(model) - start)
        nn.utils.vector_to_parameters(start.clone(), model.parameters())
    return torch.stack(found)


@pytest.mark.parametrize("name", ALL)
def test_a_group_moves_as_if_its_options_were_those_of_all(name):
    own, rest = (options | unclipped(name) for options in (OWN, REST))
    if name.startswith("ngd"):
        own["damping"] = rest["damping"]
    steps = 1 if name.startswith("k-bfgs") else 4  # it learns from what all layers did
    wanted = moves(ALL[name], None, steps, **rest)
    wanted[:, FIRST] = moves(ALL[name], None, steps, **own)[:, FIRST]
    found = moves(ALL[name], [{"params": "0", **own}], steps, **rest)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-12)
    assert not torch.allclose(wanted, moves(ALL[name], None, steps, **rest))


@pytest.mark.parametrize("name", ALL)
def test_equal_groups_are_one_group(name):
    options = {} if name in WITHOUT_CLIP else {"kl_clip": 1e-6}
    one = moves(ALL[name], None, 4, **options)
    by_layer = moves(ALL[name], [{"params": ["3"]}, {"params": ["0.*"]}], 4, **options)
    within_layers = moves(ALL[name], [{"params": ["*.bias"]}], 4, **options)
    torch.testing.assert_close(by_layer, one, rtol=1e-11, atol=0)
    torch.testing.assert_close(within_layers, one, rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_decay_may_spare_the_biases(name):
    plain = moves(ALL[name], None, 1, **unclipped(name))[0]
    found = moves(ALL[name], [{"params": "*.bias", "weight_decay": 0.0}], 1, weight_decay=0.2, **unclipped(name))[0]
    model = network()
    lr = ALL[name](network()).param_groups[0]["lr"]
    wanted = plain - torch.cat([0.2 * lr * p.detach().reshape(-1) * (p.ndim > 1) for p in model.parameters()])
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ALL)
def test_schedulers_reach_each_group(name):
    model, batch = network(), data()
    opt = ALL[name](model, param_groups=[{"params": "0"}], momentum=0.0)
    scheduler = LambdaLR(opt, [lambda epoch: 1.0, lambda epoch: float(epoch == 0)])
    for _ in range(2):
        before = flat(model)
        step(opt, model, batch)
        scheduler.step()
    moved = flat(model) - before
    assert moved[FIRST].any()
    assert not moved[10:].any()


@pytest.mark.parametrize("name", ["kfac", "tengrad", "cw-ngd"])
def test_clipping_is_shared_by_the_groups_of_one_bound(name):
    """Convolution and last layer share one, the layer between has its own; the learning rate of a bias enters as its own."""
    lr = {"0.weight": 0.05, "0.bias": 0.5, "3.weight": 0.02, "3.bias": 0.02, "5.weight": 0.05, "5.bias": 0.05}
    clip = {"0": 1e-7, "3": 1e-6, "5": 1e-7}

    def groups(bounds):
        bounds = bounds or dict.fromkeys(clip)
        return [
            {"params": "0.weight", "lr": 0.05, "kl_clip": bounds["0"]},
            {"params": "0.bias", "lr": 0.5, "kl_clip": bounds["0"]},
            {"params": "3", "lr": 0.02, "kl_clip": bounds["3"]},
            {"params": "5", "lr": 0.05, "kl_clip": bounds["5"]},
        ]

    options = {"momentum": 0.0}
    free, found = (moves(ALL[name], groups(bounds), 1, **options)[0] for bounds in (None, clip))
    model, batch = network(), data()
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss_of(model, batch), list(model.parameters()))])
    sums, entries, start = {}, {}, 0
    for parameter, p in model.named_parameters():
        at, start = slice(start, start + p.numel()), start + p.numel()
        bound = clip[parameter[0]]
        sums[bound] = sums.get(bound, 0.0) - lr[parameter] * (free[at] @ gradient[at]).item()
        entries.setdefault(bound, []).append(at)
    wanted = free.clone()
    for bound, total in sums.items():
        assert total > bound
        for at in entries[bound]:
            wanted[at] *= math.sqrt(bound / total)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)


def members(opt):
    names = {id(p): name for name, p in opt.model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in opt.param_groups]


WEIGHTS = ["0.weight", "3.weight", "5.weight"]
BIASES = ["0.bias", "3.bias", "5.bias"]


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        (lambda m: "3", [["3.weight", "3.bias"], ["0.weight", "0.bias", "5.weight", "5.bias"]]),
        (lambda m: ["*.bias"], [BIASES, WEIGHTS]),
        (lambda m: ("5.bias", "0.bias", "?.bias"), [BIASES, WEIGHTS]),
        (lambda m: m[3].parameters(), [["3.weight", "3.bias"], ["0.weight", "0.bias", "5.weight", "5.bias"]]),
        (lambda m: [m[5].bias, "0.bias", m[3].bias], [BIASES, WEIGHTS]),
        (lambda m: m[5].bias, [["5.bias"], [*WEIGHTS[:1], "0.bias", "3.weight", "3.bias", "5.weight"]]),
        (lambda m: (pair for pair in m.named_parameters() if "bias" in pair[0]), [BIASES, WEIGHTS]),
        (lambda m: m.parameters(), [["0.weight", "0.bias", "3.weight", "3.bias", "5.weight", "5.bias"]]),
    ],
)
def test_parameters_are_named_or_given(params, wanted):
    model = network()
    opt = KFAC(model, param_groups=[{"params": params(model), "lr": 0.5, "name": "own"}])
    opt.model = model
    assert members(opt) == wanted
    assert [group["lr"] for group in opt.param_groups] == [0.5, 1e-2][: len(wanted)]
    assert opt.param_groups[0]["name"] == "own"


def test_frozen_parameters_are_in_no_group():
    model = network()
    model[3].bias.requires_grad_(False)
    opt = KFAC(model, param_groups=iter([{"params": model[3].parameters()}, {"params": ["0", "3.bias"]}]))
    opt.model = model
    assert members(opt) == [["3.weight"], ["0.weight", "0.bias"], ["5.weight", "5.bias"]]


# --- state ----------------------------------------------------------------------------------------------------------------


def divided(name):
    """A layer with options of its own, and a tensor of another one with its own learning rate."""
    own = {"lr": 0.002, "momentum": 0.7, "weight_decay": 0.1} | ({} if name.startswith("ngd") else {"damping": 0.3})
    return [{"params": "3", **own}, {"params": "5.bias", "lr": 0.003}]


@pytest.mark.parametrize("name", ALL)
def test_a_run_resumed_with_groups_is_bitwise_equal(name):
    model, batch = network(), data()
    opt = ALL[name](model, param_groups=divided(name))
    for _ in range(3):
        step(opt, model, batch)
    twin = copy.deepcopy(model)
    other = ALL[name](twin, param_groups=[{**group, "lr": 0.9} for group in divided(name)])
    other.load_state_dict(opt.state_dict())
    for _ in range(3):
        assert step(opt, model, batch) == step(other, twin, batch)
    assert torch.equal(flat(model), flat(twin))
    assert [group["lr"] for group in other.param_groups] == [0.002, 0.003, opt.param_groups[2]["lr"]]


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        (None, "parameter group 0 holds ['3.weight', '3.bias'] there and ['0.weight', '0.bias', '3.weight', '3.bias', "),
        ([{"params": ["3", "5.bias"]}], "parameter group 0 holds ['3.weight', '3.bias'] there and ['3.weight', '3.bias', '5.bias'] here"),
        ([{"params": "3"}], "parameter group 1 holds ['5.bias'] there and ['0.weight', '0.bias', '5.weight', '5.bias'] here"),
    ],
)  # fmt: skip
def test_a_state_of_other_groups_is_refused(groups, text):
    model = network()
    opt = KFAC(model, param_groups=[{"params": "3"}, {"params": "5.bias"}])
    step(opt, model, data())
    other = KFAC(network(), param_groups=groups)
    before = other.state_dict()
    with pytest.raises(InputError) as caught:
        other.load_state_dict(opt.state_dict())
    assert str(caught.value).startswith(f"This state of KFAC belongs to another model or setting: {text}")
    assert other.state_dict()["param_groups"] == before["param_groups"]


def test_a_state_from_before_there_were_groups_is_one_of_a_single_group():
    model = network()
    opt = KFAC(model)
    step(opt, model, data())
    state = opt.state_dict()
    del state["fisherlens"]["groups"], state["fisherlens"]["seed"]
    twin = copy.deepcopy(model)
    other = KFAC(twin)
    other.load_state_dict(state)
    assert step(opt, model, data()) == step(other, twin, data())
    with pytest.raises(InputError, match="parameter group 0 holds"):
        KFAC(network(), param_groups=[{"params": "3"}]).load_state_dict(state)


# --- refusals -------------------------------------------------------------------------------------------------------------

EXAMPLE = "param_groups must be a list of dicts such as {'params': ['0.*', 'head'], 'lr': 0.1}, with the names"


@pytest.mark.parametrize(
    ("groups", "error", "text"),
    [
        (lambda m: {"params": "0"}, TypeError, EXAMPLE),
        (lambda m: "0", TypeError, EXAMPLE),
        (lambda m: 3, TypeError, EXAMPLE),
        (lambda m: list(m.parameters()), TypeError, EXAMPLE),
        (lambda m: [{"lr": 0.1}], TypeError, EXAMPLE),
        (lambda m: [{"params": 3}], TypeError, "'params' of parameter group 0 must be names, layers or glob patterns, or"),
        (lambda m: [{"params": [0]}], TypeError, "'params' of parameter group 0 must be names, layers or glob patterns, or"),
        (lambda m: [{"params": "0", "lrr": 1}], InputError, "Unknown option in parameter group 0 'lrr'. Did you mean 'lr'?"),
        (lambda m: [{"params": "0"}, {"params": "7.*"}], InputError, "Unknown parameter or pattern '7.*'."),
        (
            lambda m: [{"params": "0"}, {"params": ["*.bias"]}],
            InputError,
            "Parameter '0.bias' is in parameter groups 0 and 1, but can have one set of options. Take it out of one of them, as by",
        ),
        (
            lambda m: [{"params": network().parameters()}],
            InputError,
            "Parameter group 0 holds a tensor of shape (2, 1, 2, 2) that is no parameter of the model that KFAC was given, as after",
        ),
        (
            lambda m: [{"params": []}],
            InputError,
            "Parameter group 0 holds no trainable parameter; its 'params' are an empty list. An iterator such as",
        ),
        (
            lambda m: [{"params": "0", "damping": 0.0}],
            InputError,
            "In parameter group 0: damping must be a finite number > 0; got 0.0.",
        ),
        (lambda m: [{"params": "0", "lr": 0.0}], InputError, "In parameter group 0: lr must be a finite number > 0; got 0.0."),
        (lambda m: [{"params": "0", "ema": None}], TypeError, "In parameter group 0: ema must be a number; got NoneType None."),
        (
            lambda m: [{"params": "*.weight", "damping": 0.1}],
            InputError,
            "Layer '0' is divided between parameter groups [0, 1] with different damping [0.1, 0.03], but KFAC treats a layer as a "
            "whole. Give these groups the same damping, or put the layer into one of them; lr and weight_decay may differ within a layer.",
        ),
        (lambda m: [{"params": "3.bias", "momentum": 0.1}], InputError, "Layer '3' is divided between parameter groups [0, 1] with"),
        (lambda m: [{"params": "3.bias", "kl_clip": None}], InputError, "Layer '3' is divided between parameter groups [0, 1] with"),
    ],
    ids=itertools.count(),
)  # fmt: skip
def test_groups_that_cannot_be_are_refused(groups, error, text):
    model = network()
    with pytest.raises(error) as caught:
        KFAC(model, param_groups=groups(model))
    assert str(caught.value).startswith(text)
    assert count_hooks(model) == 0


def test_blocks_across_layers_have_one_damping():
    text = (
        "Blocks of {} reach over several layers here, so that {} must be the same in all parameter groups; got {}. Groups may differ "
        "in lr, weight_decay, momentum and kl_clip; a method with blocks within layers, such as TENGraD, allows the rest."
    )
    model = network()
    with pytest.raises(InputError, match=re.escape(text.format("NGD", "damping", "[0.1, 0.01]"))):
        NGD(model, param_groups=[{"params": "0", "damping": 0.1}])
    blocks = {"first": torch.arange(60), "second": torch.arange(60, len(flat(model)))}
    with pytest.raises(InputError, match=re.escape(text.format("CWNGD", "momentum_ema", "[0.5, 0.9]"))):
        CWNGD(model, partition=blocks, param_groups=[{"params": "0", "momentum_ema": 0.5}])
    CWNGD(model, partition=blocks, param_groups=[{"params": "0", "momentum": 0.5, "kl_clip": 1e-3}])
    CWNGD(model, partition="layer", param_groups=[{"params": "0", "momentum_ema": 0.5}])


def test_what_is_changed_later_is_checked_at_the_step():
    model, batch = network(), data()
    opt = KFAC(model, param_groups=[{"params": "*.bias"}])
    loss_of(model, batch).backward()
    before = flat(model)
    opt.param_groups[1]["damping"] = -1.0
    with pytest.raises(InputError, match=r"In parameter group 1: damping must be a finite number > 0; got -1\.0\."):
        opt.step()
    opt.param_groups[1]["damping"] = 0.5
    with pytest.raises(
        InputError, match=r"Layer '0' is divided between parameter groups \[0, 1\] with different damping"
    ):
        opt.step()
    assert torch.equal(flat(model), before)
    opt.param_groups[0]["damping"] = 0.5
    opt.step()
    assert opt.diagnostics["steps"] == 1


def test_groups_are_given_at_once():
    opt = KBFGS(network(), param_groups=[{"params": "0", "lr": 0.1}])
    with pytest.raises(InputError) as caught:
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert str(caught.value) == (
        "KBFGS takes its parameter groups when it is built, as statistics are laid out then: KBFGS(model, param_groups=[{'params': "
        "['0.*'], 'lr': 0.1}]); what is in none of them is the last group. Options of a group may change at any time, as in "
        "opt.param_groups[0]['lr'] = 0.01; for parameters that are to be trained from now on, build a new optimizer."
    )
    assert len(opt.param_groups) == 2


def test_adapted_damping_is_that_of_all_groups():
    model, batch = network(), data()
    opt = NGD(
        model, lr=1e-3, damping=0.5, adapt_damping=True, param_groups=[{"params": "0", "lr": 2e-3}], labels="true"
    )

    def closure():
        opt.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    for _ in range(5):
        opt.step(closure)
    dampings = {group["damping"] for group in opt.param_groups}
    assert len(dampings) == 1
    assert dampings != {0.5}
