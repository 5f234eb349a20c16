import copy
import itertools

import pytest
import torch
from factor_samples import first_step, resumed
from optim_samples import count_hooks
from test_cwngd import NETWORKS, Normed, backpropagate, flat, make, rows_of, seeded
from torch import nn
from torch.nn import functional

from fisherlens import Categorical
from fisherlens.errors import InputError, NumericalWarning
from fisherlens.optim.modes import along, contraction, cuts
from fisherlens.optim.shampoo import Shampoo
from fisherlens.optim.tnt import TNT
from fisherlens.reference import optim_means as slow
from fisherlens.training import problem, train

PLAIN = {"lr": 0.1, "damping": 1e-3, "momentum": 0.0}


def test_axes_of_a_batch_are_those_of_each_tensor():
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrices = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for axis, one in itertools.product(range(3), range(2)):
        torch.testing.assert_close(contraction(x, axis)[one], slow.contraction(x[one], axis))
    for one in range(2):
        torch.testing.assert_close(along(x, matrices, 1)[one], slow.along(x[one], matrices[one], 1))


@pytest.mark.parametrize(("shape", "size"), [((7, 5), 3), ((6, 3), 3), ((2, 2), 5), ((4, 3, 5), 2)])
def test_a_tensor_is_its_blocks(shape, size):
    x, out = torch.arange(float(torch.Size(shape).numel())).view(shape), torch.full(shape, torch.nan)
    found = cuts(shape, size)
    for cut in found:
        blocks = cut.take(x)
        assert blocks.shape[1:] == torch.Size(cut.sizes)
        assert max(cut.sizes) <= size
        cut.put(blocks, out)
    assert torch.equal(out, x)
    first = next(c for c in found if c.at[0].start == 0 and c.at[1].start == 0)
    assert torch.equal(first.take(x)[0], x[tuple(slice(0, n) for n in first.sizes)])


# --- Shampoo -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [3, 128])
@pytest.mark.parametrize("name", NETWORKS)
def test_steps_of_shampoo_follow_the_definition(name, block):
    """Sums of contractions over three steps, the roots made anew at each, the length of the gradient, vectors left alone."""
    model, x, y = make(name)
    opt = Shampoo(model, **PLAIN, block=block, inverse_refresh=1)
    seen = []
    for step in range(3):
        batch = slice(step, step + 4)
        flat_gradient, before = rows_of(copy.deepcopy(model), x[batch], y[batch]).mean(0), flat(model)
        seen.append(opt.layout.unflatten(flat_gradient))
        backpropagate(opt, model, x[batch], y[batch])
        opt.step()
        for info in opt.layout.parameters:
            wanted = -0.1 * slow.shampoo_direction([g[info.name] for g in seen], 1e-3, block)
            moved = (flat(model) - before)[info.start : info.stop].view(info.shape)
            torch.testing.assert_close(moved, wanted, rtol=1e-8, atol=1e-12)
    assert opt.diagnostics == {"steps": 3, "refreshes": 3, "retries": 0, "fallbacks": 0}


def test_averages_and_lengths():
    model, x, y = make("dense")
    opt = Shampoo(model, **PLAIN, ema=0.0, graft="none", inverse_refresh=1)
    for _ in range(2):
        step, gradient = first_step(opt, model, x, y)
    g = gradient[:20].view(4, 5)
    u = slow.along(g, slow.symmetric_power(g @ g.T + 1e-3 * torch.eye(4).double(), -0.25), 0)
    u = slow.along(u, slow.symmetric_power(g.T @ g + 1e-3 * torch.eye(5).double(), -0.25), 1)
    torch.testing.assert_close(step[:20], -0.1 * u.reshape(-1), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_is_that_of_sgd_where_nothing_is_preconditioned(nesterov):
    """Vectors move as under torch's SGD: their gradient does not depend on the weights here."""
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 3)))()
    twin, x = copy.deepcopy(model), torch.eye(3, dtype=torch.float64)
    opt = Shampoo(model, lr=0.1, nesterov=nesterov, weight_decay=0.0)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, nesterov=nesterov)
    for scale in (1.0, 0.3, -2.0):
        for net, o in ((model, opt), (twin, sgd)):
            o.zero_grad()
            (scale * net(x)).sum().backward()
            o.step()
        torch.testing.assert_close(model[0].bias, twin[0].bias)


def test_all_layers_are_covered():
    model = seeded(lambda: nn.Sequential(nn.Embedding(4, 3), nn.LayerNorm(3), nn.Flatten(), nn.Linear(6, 3)))()
    opt = Shampoo(model, **PLAIN, inverse_refresh=1)  # no warning
    x, y = torch.tensor([[0, 1], [3, 1], [2, 2]]), torch.tensor([0, 1, 2])
    step, gradient = first_step(opt, model, x, y)
    wanted = -0.1 * slow.shampoo_direction([gradient[:12].view(4, 3)], 1e-3)
    torch.testing.assert_close(step[:12].view(4, 3), wanted, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(step[12:18], -0.1 * gradient[12:18])


def test_a_tensor_without_gradient_stays():
    model, x, y = make("dense")
    opt = Shampoo(model, lr=0.1)
    opt.zero_grad()
    functional.cross_entropy(model[2](model[:2](x).detach()), y).backward()
    before = model[0].weight.clone()
    opt.step()
    assert torch.equal(model[0].weight, before)
    backpropagate(opt, model, torch.zeros_like(x), y)  # the gradient of the first weight is zero
    opt.step()
    assert torch.equal(model[0].weight, before)
    assert torch.isfinite(flat(model)).all()


def test_shampoo_of_sampled_labels():
    model, x, y = make("dense")
    opt = Shampoo(model, **PLAIN, labels="sampled", seed=4, graft="none")
    statistic = sampled_gradient(copy.deepcopy(model), x, torch.Generator().manual_seed(4))[:20].view(4, 5)
    step, gradient = first_step(opt, model, x, y)
    u = gradient[:20].view(4, 5)
    for axis in range(2):
        L = slow.contraction(statistic, axis)
        u = slow.along(u, slow.symmetric_power(L + 1e-3 * torch.eye(len(L)).double(), -0.25), axis)
    torch.testing.assert_close(step[:20], -0.1 * u.reshape(-1), rtol=1e-8, atol=1e-11)


# --- TNT ---------------------------------------------------------------------------------------------------------------------


def sampled_gradient(model, x, generator):
    outputs = model(x)
    bound = Categorical().bind(outputs, None)
    uniforms = torch.rand(len(x), bound.num_uniforms, generator=generator, dtype=torch.float64)
    signal = bound.sampled_score(uniforms) / len(x)
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(outputs, list(model.parameters()), signal)])


def axes_of(info):
    return info.shape if len(info.shape) < 3 else (*info.shape[:2], -1)


@pytest.mark.parametrize("labels", ["sampled", "true"])
@pytest.mark.parametrize("form", ["each", "shared"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_first_step_of_tnt_follows_the_definition(name, labels, form):
    model, x, y = make(name)
    twin = copy.deepcopy(model)
    opt = TNT(model, **PLAIN | {"damping": 0.1}, labels=labels, seed=4, damping_form=form)
    step, gradient = first_step(opt, model, x, y)
    statistic = sampled_gradient(twin, x, torch.Generator().manual_seed(4)) if labels == "sampled" else gradient
    for info in opt.layout.parameters:
        G, S = (v[info.start : info.stop].view(axes_of(info)) for v in (gradient, statistic))
        wanted = -0.1 * slow.tnt_direction(G, S, 0.1, form).reshape(-1)
        torch.testing.assert_close(step[info.start : info.stop], wanted, rtol=1e-8, atol=1e-11)
    assert opt.diagnostics == {"steps": 1, "refreshes": 1, "retries": 0, "fallbacks": 0}


def test_a_bias_has_a_matrix_of_its_own():
    model, x, y = make("dense")
    opt = TNT(model, **PLAIN, labels="true")
    step, gradient = first_step(opt, model, x, y)
    g = gradient[20:24]
    torch.testing.assert_close(step[20:24], -0.1 * g / (g @ g + 1e-3), rtol=1e-7, atol=1e-11)


def test_all_axes_of_tnt_share_their_mean_eigenvalue():
    model, x, y = make("strided")
    opt = TNT(model, **PLAIN | {"damping": 0.1}, inverse_refresh=1, refresh=1)
    for _ in range(2):
        backpropagate(opt, model, x, y)
        opt.step()
    axes = opt._axes(opt.layout.parameters[0])
    means = [torch.linalg.inv(r.root[0]).trace() / len(r.root[0]) - 0.1 for r in axes]
    torch.testing.assert_close(means[0], means[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(means[0], means[2], rtol=1e-6, atol=0)


def test_a_warm_start_of_tnt(unchanged):
    model, x, y = make("groups")
    opt = TNT(model, **PLAIN | {"damping": 0.01}, seed=3, refresh=5, inverse_refresh=5)
    with unchanged(model):
        opt.warm_start([(x[:4], None), (x[4:], None)])
    generator = torch.Generator().manual_seed(3)
    gradients = [sampled_gradient(model, part, generator) for part in (x[:4], x[4:])]
    info = opt.layout.parameters[0]
    parts = [g[info.start : info.stop].view(axes_of(info)) for g in gradients]
    for axis, record in enumerate(opt._axes(info)):
        mean = sum(slow.contraction(g, axis) for g in parts) / 2
        torch.testing.assert_close(record.L[0], mean, rtol=1e-10, atol=1e-14)
        assert record.weight == 1.0
    backpropagate(opt, model, x, y)
    opt.step()
    assert opt._axes(info)[0].weight == 1.0


def test_norm_layers_take_the_announced_fallback_of_tnt():
    model = seeded(Normed)()
    _, x, y = make("flattened")
    with pytest.warns(NumericalWarning, match="TNT does not precondition 'norm.weight', 'norm.bias'"):
        opt = TNT(model, **PLAIN)
    step, gradient = first_step(opt, model, x, y)
    layer = opt.layout.layer("norm")
    at = slice(layer.start, layer.stop)
    torch.testing.assert_close(step[at], -0.1 * gradient[at] / 1.001)


# --- both --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (Shampoo, {"inverse_refresh": 3, "block": 4}),
        (Shampoo, {"ema": 0.9, "refresh": 2, "weight_decay": 0.1, "graft": "none", "damping": 1e-3}),
        (TNT, {"inverse_refresh": 3, "refresh": 1}),
        (TNT, {"labels": "true", "kl_clip": 1e-3}),
    ],
)
def test_a_resumed_run_is_bitwise_equal(build, options):
    state = torch.get_rng_state()
    assert resumed(build, options)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("build", "options", "error", "text"),
    [
        (Shampoo, {"lr": 0.0}, InputError, "lr must be a finite number > 0; got 0.0."),
        (Shampoo, {"damping": 0.0}, InputError, "damping must be a finite number > 0; got 0.0."),
        (Shampoo, {"ema": 1.0}, InputError, "ema must be a finite number >= 0 and < 1; got 1.0."),
        (Shampoo, {"graft": "adam"}, InputError, "Unknown graft 'adam'. Known: 'sgd', 'none'."),
        (Shampoo, {"block": 0}, InputError, "block must be a finite number >= 1; got 0."),
        (TNT, {"damping": float("nan")}, InputError, "damping must be a finite number > 0; got nan."),
        (TNT, {"inverse_refresh": 0}, InputError, "inverse_refresh must be a finite number >= 1; got 0."),
        (TNT, {"preset": "cnn"}, InputError, "Unknown preset 'cnn'. Known: 'paper'."),
    ],
)
def test_wrong_options_are_refused(build, options, error, text):
    model = make("dense")[0]
    with pytest.raises(error) as caught:
        build(model, **options)
    assert str(caught.value).startswith(text)
    assert count_hooks(model) == 0


@pytest.mark.parametrize("build", [Shampoo, TNT])
def test_they_learn_the_digits(build):
    digits = problem("digits-cnn")
    record = train(digits.model(0), digits, build, num_steps=60, record_every=20)
    assert record.train_loss.values.squeeze()[-1] < 1.0
    assert record.test_accuracy.values.squeeze()[-1] > 0.6
