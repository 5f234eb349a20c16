"""What holds for every method, or for those that are built from factors or mean gradients, in the ordinary loop."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
from factor_samples import stored
from optim_methods import ALL, FACTORS, SETTLED, unclipped
from optim_samples import count_hooks, data, flat, loss_of, network, seeded
from test_cwngd import backpropagate, make, summed
from torch import nn
from torch.nn import functional

from fisherlens import Fisher
from fisherlens.errors import InputError, NonFiniteError, NumericalWarning
from fisherlens.optim import (
    CWNGD,
    EKFAC,
    KBFGS,
    KFAC,
    MBF,
    TNT,
    ProjectedKFAC,
    QuasiDiagonal,
    Shampoo,
    UnitWise,
)


@pytest.fixture(params=FACTORS)
def build(request):
    return FACTORS[request.param]


FAST = ("fngd",)  # to be traced


@pytest.fixture(params=ALL)
def every(request):
    return request.param


@pytest.fixture(autouse=True)
def untouched():
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())


def step(opt, model, batch, loss=loss_of, set_to_none=True):
    def closure():
        opt.zero_grad(set_to_none=set_to_none)
        value = loss(model, batch)
        value.backward()
        return value

    if isinstance(opt, KBFGS) and opt.memory:  # and the other one in the ordinary loop
        return opt.step(closure).item()
    value = closure()
    opt.step()
    return value.item()


def normed():
    return nn.Sequential(
        nn.Conv2d(1, 4, 2, groups=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=2, padding=1, stride=2),
        nn.Tanh(), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_learns_and_keeps_its_dtype(every, dtype):
    model, batch = network(dtype), data(24, dtype)
    opt = ALL[every](model)
    losses = [step(opt, model, batch) for _ in range(25)]
    assert losses[-1] < losses[0] - 0.02
    assert flat(model).dtype == dtype
    assert opt.diagnostics["steps"] == 25
    assert opt.diagnostics["fallbacks"] == 0


@pytest.mark.filterwarnings("ignore::fisherlens.errors.NumericalWarning")
def test_batch_norm_and_groups_in_training_mode(build):
    model, batch = seeded(normed), data(24)
    opt = build(model)
    losses = [step(opt, model, batch) for _ in range(25)]
    assert losses[-1] < losses[0] - 0.02
    assert model.training


def test_schedulers_reach_the_learning_rate(every):
    model, batch = network(), data()
    opt = ALL[every](model, momentum=0.0, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: float(epoch == 0))
    before = flat(model)
    step(opt, model, batch)
    scheduler.step()
    after = flat(model)
    step(opt, model, batch)
    assert not torch.equal(before, after)
    assert torch.equal(flat(model), after)


def test_weight_decay_is_decoupled(every):
    model, batch = network(), data()
    twin, before = copy.deepcopy(model), flat(model)
    for net, decay in ((model, 0.2), (twin, 0.0)):
        opt = ALL[every](net, weight_decay=decay, **unclipped(every))
        step(opt, net, batch)
    torch.testing.assert_close(flat(model), flat(twin) - opt.param_groups[0]["lr"] * 0.2 * before)


def test_zero_grad_both_ways(every):
    results = []
    for set_to_none in (True, False):
        model = network()
        opt = ALL[every](model)
        for _ in range(3):
            step(opt, model, data(), set_to_none=set_to_none)
        results.append(flat(model))
    assert torch.equal(*results)


@pytest.mark.parametrize("name", [name for name in FACTORS if name not in ("mbf sampled", "kfac factored", "tnt")])
def test_what_happens_in_between_changes_nothing(name):
    """With sampled labels a forward pass with gradients draws some."""
    results = []
    for between in (False, True):
        model, batch = network(), data()
        opt = FACTORS[name](model)
        for _ in range(3):
            step(opt, model, batch)
            if between:
                model.eval()
                loss_of(model, data(5, seed=1))
                with torch.no_grad():
                    model(batch[0])
                model.train()
                Fisher(model, data(5, seed=1), likelihood="categorical", kind="empirical").trace()
                torch.autograd.grad(loss_of(model, data(5, seed=1)), list(model.parameters()))
        results.append(flat(model))
    assert torch.equal(*results)


def test_models_can_be_copied_and_hooks_go_with_the_optimizer(every):
    model, build = network(), ALL[every]
    opt = build(model)
    step(opt, model, data())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert torch.equal(flat(other), flat(model))
        step(build(other), other, data())
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(opt)
    del opt
    gc.collect()
    assert count_hooks(model) == 0


@pytest.mark.filterwarnings("ignore")  # of the tracer
@pytest.mark.parametrize("name", [x if x in FAST else pytest.param(x, marks=pytest.mark.slow) for x in ALL])
def test_compiled_models(name):
    """Traced, without a compiler: the hooks take part in the graph."""
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = network()
        opt = ALL[name](model)
        called = torch.compile(model, backend="eager") if compiled else model
        for _ in range(4):
            opt.zero_grad()
            loss_of(called, data()).backward()
            opt.step()
        results.append(flat(model))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_parts_of_a_batch_and_a_summed_loss_give_the_same_steps(every):
    results = []
    for way in ("whole", "parts", "summed"):
        model, x, y = make("strided")
        options = SETTLED.get(every, {})
        opt = ALL[every](model, reduction="sum" if way == "summed" else "mean", **options)
        for _ in range(3):
            opt.zero_grad()
            if way == "parts":
                for at in (slice(0, 3), slice(3, 7)):
                    (functional.cross_entropy(model(x[at]), y[at]) * len(x[at]) / 7).backward()
            else:
                (summed if way == "summed" else functional.cross_entropy)(model(x), y).backward()
            opt.step()
        results.append(flat(model))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["dense", "groups", "shared"])
def test_single_precision_stays_single_and_close(every, name):
    steps = []
    for dtype in (torch.float64, torch.float32):
        model, x, y = make(name)
        model, x = model.to(dtype), x.to(dtype)
        before = flat(model)
        opt = ALL[every](model, damping=0.1)
        for _ in range(4):
            backpropagate(opt, model, x, y)
            opt.step()
        assert flat(model).dtype == dtype
        steps.append((flat(model) - before).double())
    assert torch.linalg.vector_norm(steps[1] - steps[0]) < 1e-3 * torch.linalg.vector_norm(steps[0])


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("k-bfgs")])
def test_refused_steps_change_nothing(name):
    steps = []
    for refusing in (True, False):
        model, x, y = make("groups")
        opt = ALL[name](model, **{} if name == "fngd" else {"labels": "true"}, refresh=1)
        backpropagate(opt, model, x, y)
        opt.step()
        if refusing:
            before, state = flat(model), stored(opt)
            backpropagate(opt, model, x, y)
            model[5].weight.grad[0, 0] = torch.nan
            with pytest.raises(NonFiniteError, match=r"The gradient of parameter '5.weight' holds NaN or infinity"):
                opt.step()
            opt.zero_grad()
            (1e160 * functional.cross_entropy(model(x), y)).backward()
            with pytest.raises(NonFiniteError, match=r"The scores of layer '.*' hold NaN or infinity"):
                opt.step()
            assert torch.equal(flat(model), before)
            assert stored(opt) == state
        backpropagate(opt, model, x, y)
        opt.step()
        steps.append(flat(model))
    assert torch.equal(*steps)


def test_in_place_activations_behind_dense_layers_on_sequences_change_nothing(every):
    """There the output of a dense layer with a bias is a view, which writing over it takes out of the graph."""
    x, y = torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.arange(7) % 3
    results = []
    for inplace in (False, True):
        model = seeded(
            lambda inplace=inplace: nn.Sequential(
                nn.Linear(4, 6),
                nn.ReLU(inplace),
                nn.Linear(6, 5),
                nn.LeakyReLU(0.1, inplace),
                nn.Flatten(),
                nn.Linear(15, 3),
            )
        )
        opt = ALL[every](model)
        for _ in range(3):
            step(opt, model, (x, y))
        results.append(flat(model))
    assert torch.equal(*results)


class Halted(nn.Module):
    """The network, whose first half gets no gradient while ``halt`` is set."""

    def __init__(self):
        super().__init__()
        self.body, self.halt = network(), True

    def forward(self, x):
        x = self.body[:4](x)
        return self.body[4:](x.detach() if self.halt else x)


def test_layers_without_gradient_stay(build):
    model, batch = Halted(), data()
    model.halt = False
    opt = build(model, weight_decay=0.1, momentum=0.5)
    step(opt, model, batch)
    first, last = model.body[0].weight, model.body[5].weight
    before, other = first.detach().clone(), last.detach().clone()
    model.halt = True
    for _ in range(3):
        step(opt, model, batch)
    assert torch.equal(first, before)
    assert not torch.equal(last, other)


def test_layers_that_join_later_are_preconditioned_at_once(build):
    model, batch = Halted(), data()
    opt = build(model, refresh=1, momentum=0.0, kl_clip=None)
    step(opt, model, batch)
    model.halt = False
    before = model.body[0].weight.detach().clone()
    step(opt, model, batch)
    moved, gradient = model.body[0].weight.detach() - before, model.body[0].weight.grad
    options = opt.param_groups[0]
    assert torch.isfinite(moved).all()
    if not isinstance(opt, (Shampoo, KBFGS)):  # those have another gradient by now, or its length
        assert not torch.allclose(moved, -options["lr"] * gradient / (1 + options["damping"]), rtol=0.05)


def test_autocast_keeps_statistics_in_single_precision(build):
    moved = []
    for autocast in (False, True):
        model, batch = network(torch.float32), data(16, torch.float32)
        before = flat(model)
        opt = build(model, momentum=0.0)

        def loss(net, b, autocast=autocast):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                return loss_of(net, b)

        step(opt, model, batch, loss)
        moved.append(flat(model) - before)
        assert flat(model).dtype == torch.float32
        tensors = [x for r in opt._records.values() for x in r.state().values() if isinstance(x, torch.Tensor)]
        assert {x.dtype for x in tensors} == {torch.float32}
    assert functional.cosine_similarity(*moved, dim=0) > 0.9


TRUE = [name for name in FACTORS if name not in ("mbf sampled", "kfac factored", "tnt", "k-bfgs", "k-bfgs(l)")]


@pytest.mark.parametrize("name", TRUE)
def test_statistics_that_overflow_are_refused(name):
    model, batch = network(torch.float32), data(8, torch.float32)
    opt = FACTORS[name](model, refresh=1)
    step(opt, model, batch)
    before = flat(model)
    with pytest.raises(NonFiniteError, match="The scores of layer '0' hold NaN or infinity in their second moments"):
        step(opt, model, batch, lambda net, b: 1e25 * loss_of(net, b))
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("build", [MBF, Shampoo, TNT])
@pytest.mark.parametrize("entry", [("3", 0, 0), ("5", 2, 4)])
def test_one_large_entry_of_a_gradient_is_enough(build, entry):
    layer, *at = entry
    model, batch = network(torch.float32), data(8, torch.float32)
    opt = build(model, **{"block": 2} if build is Shampoo else {}, labels="true")
    before = flat(model)
    with pytest.raises(NonFiniteError, match=f"The scores of layer '{layer}' hold NaN or infinity"):
        step(opt, model, batch, lambda net, b: loss_of(net, b) + 1e25 * net[int(layer)].weight[tuple(at)])
    assert torch.equal(flat(model), before)


def test_common_options_have_one_name(build):
    model = network()
    options = {"lr": 1e-3, "damping": 0.1, "momentum": 0.5, "weight_decay": 0.1, "kl_clip": 1e-3, "ema": 0.5}
    opt = build(model, **options, likelihood="categorical", labels="true", reduction="mean", refresh=2, seed=3)
    assert options.items() <= opt.param_groups[0].items()
    step(opt, model, data())


def test_a_state_of_another_shape_is_refused(build):
    model = network()
    opt = build(model)
    step(opt, model, data())
    state = opt.state_dict()
    other = seeded(lambda: nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(InputError, match="parameters differ, such as"):
        build(other).load_state_dict(state)
    with pytest.raises(InputError, match="an optimizer of another library"):
        opt.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())


def test_states_of_other_options_are_refused():
    for method, other in (
        (ProjectedKFAC, {"rank": 2}),
        (Shampoo, {"block": 2}),
        (KBFGS, {"memory": 3}),
    ):
        model = network()
        opt = method(model)
        step(opt, model, data())
        with pytest.raises(InputError, match=r"its averages have shapes .* where those of these options have"):
            method(network(), **other).load_state_dict(opt.state_dict())


def test_an_unused_parameter_is_left_alone(build):
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x)

    model = seeded(Unused)
    opt = build(model)
    before = model.idle.weight.detach().clone()
    for _ in range(3):
        step(opt, model, (torch.eye(4, dtype=torch.float64), torch.tensor([0, 1, 2, 0])))
    assert torch.equal(model.idle.weight, before)


@pytest.mark.parametrize("frozen", ["3.bias", "3.weight"])
def test_a_parameter_that_is_frozen_later_stays(every, frozen):
    """Half a layer: its block still counts it, and decay and momentum must not move it either."""
    model, batch = network(), data()
    opt = ALL[every](model, weight_decay=0.1, momentum=0.5)
    step(opt, model, batch)
    p = model.get_parameter(frozen).requires_grad_(False)
    p.grad = None
    before, other = p.detach().clone(), model[5].weight.detach().clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            step(opt, model, batch)
    assert torch.equal(p, before)
    assert not torch.equal(model[5].weight, other)
    if frozen == "3.bias":
        assert [str(one.message) for one in caught] == [
            f"{type(opt).__name__} found no gradient of '3.bias' while the rest of the layer has one, as after requires_grad_(False); they "
            "stay as they are, but still count in the block of their layer. Build a new optimizer to leave them out of it."
        ]


@pytest.mark.parametrize("ema", [0.0, 0.99])
@pytest.mark.parametrize("build", [KFAC, EKFAC, CWNGD, UnitWise, QuasiDiagonal])
def test_averages_of_one_batch_are_its_own_statistics_whatever_becomes_of_their_weight(build, ema):
    model, batch = network(), data()
    options = {"lr": 0.1, "damping": 0.01, "ema": 0.5, "momentum": 0.0, "labels": "true", "kl_clip": None}
    options |= {KFAC: {"inverse_refresh": 1}, CWNGD: {"momentum_ema": 0.5}}.get(build, {})
    opt, start, moved = build(model, **options), flat(model), []
    for k in range(5):
        if k == 3:
            opt.param_groups[0].update({name: ema for name in ("ema", "momentum_ema") if name in opt.param_groups[0]})
        step(opt, model, batch)
        moved.append(flat(model) - start)
        nn.utils.vector_to_parameters(start.clone(), model.parameters())
    assert moved[0].any()
    for one in moved[1:]:
        torch.testing.assert_close(one, moved[0], rtol=1e-8, atol=1e-12)


def test_the_default_device_of_others_does_not_matter(every):
    results = []
    for device in ("cpu", "meta"):
        model, batch = network(), data()
        with torch.device(device):
            opt = ALL[every](model)
            for _ in range(3):
                step(opt, model, batch)
        results.append(flat(model))
    assert torch.equal(*results)


def test_a_weight_used_past_its_module():
    """Methods of factors fall back and say so; those of mean gradients need no module."""

    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.out(torch.tanh(functional.linear(x, self.first.weight, self.first.bias)))

    batch = torch.ones(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])
    for method in (KFAC, EKFAC, ProjectedKFAC, KBFGS):
        model = seeded(Direct)
        with pytest.warns(
            NumericalWarning, match=f"{method.__name__} saw a gradient of 'first.weight', 'first.bias', but"
        ):
            step(method(model), model, batch)
    for method in (MBF, Shampoo):
        model = seeded(Direct)
        step(method(model), model, batch)
