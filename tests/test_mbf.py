import copy
import gc
import itertools

import pytest
import torch
from factor_samples import first_step, resumed
from optim_samples import count_hooks
from test_cwngd import NETWORKS, Normed, backpropagate, flat, make, rows_of, seeded
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from fisherlens import Categorical
from fisherlens.errors import InputError, NonFiniteError, NumericalWarning
from fisherlens.optim.mbf import MBF
from fisherlens.reference.matrix import solve
from fisherlens.reference.optim_means import mbf_kernels, mbf_scalar_rule, mbf_statistic
from fisherlens.training import problem, train

PLAIN = {"lr": 0.1, "damping": 0.02, "ema": 0.0, "momentum": 0.0}


def dense_matrix(layer, gradient, variant):
    """[∂W, ∂b] of a dense layer, or ∂W of a convolution; the flat indices of its entries in that order; and F̂ over them."""
    weight = torch.arange(layer.weight.start, layer.weight.stop).view(layer.weight.shape)
    if layer.kind == "conv":
        return weight.reshape(-1), mbf_kernels(gradient[weight])
    index = weight
    if layer.bias:
        index = torch.cat([weight, torch.arange(layer.bias.start, layer.bias.stop)[:, None]], 1)
    return index.reshape(-1), mbf_statistic(gradient[index], variant)


def expected(opt, gradient, statistic, variant, lr=0.1, damping=0.02):
    out = torch.zeros_like(gradient)
    for layer in opt.covered:
        index, F_hat = dense_matrix(layer, statistic, variant)
        out[index] = -lr * solve(F_hat, gradient[index], damping)
        if layer.kind == "conv" and layer.bias:
            at = slice(layer.bias.start, layer.bias.stop)
            out[at] = -lr * mbf_scalar_rule(gradient[at])[0]
    return out


@pytest.mark.parametrize("variant", ["A", "B", "released_view"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_first_step_is_a_dense_solve(name, variant):
    model, x, y = make(name)
    opt = MBF(model, **PLAIN, variant=variant)
    step, gradient = first_step(opt, model, x, y)
    torch.testing.assert_close(step, expected(opt, gradient, gradient, variant), rtol=1e-8, atol=1e-12)
    assert opt.diagnostics == {"steps": 1, "refreshes": 1, "retries": 0, "fallbacks": 0}


@pytest.mark.parametrize("name", ["dense", "groups", "shared"])
def test_sampled_labels_give_the_statistic(name):
    model, x, y = make(name)
    twin = copy.deepcopy(model)
    opt = MBF(model, **PLAIN, labels="sampled", seed=5)
    step, gradient = first_step(opt, model, x, y)
    mean = sampled_gradient(twin, x, 5)
    torch.testing.assert_close(step, expected(opt, gradient, mean, "B"), rtol=1e-8, atol=1e-12)


def sampled_gradient(model, x, seed):
    """Mean gradient at labels drawn as the optimizer draws them."""
    outputs = model(x)
    bound = Categorical().bind(outputs, None)
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(len(x), bound.num_uniforms, generator=generator, dtype=torch.float64)
    signal = bound.sampled_score(uniforms) / len(x)
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(outputs, list(model.parameters()), signal)])


@pytest.mark.parametrize("variant", ["A", "B"])
def test_steps_follow_the_algorithm_box(variant):
    """T1 = 2, T2 = 4: the statistic at 0, 2, 4, ..., its inverse at 0, 2, 4 and then at every fourth step."""
    model, x, y = make("groups")
    options = {"lr": 0.05, "damping": 0.01, "ema": 0.6, "momentum": 0.5, "weight_decay": 0.1}
    opt = MBF(model, **options, variant=variant, refresh=2, inverse_refresh=4)
    theta, m, scalars = flat(model), 0.0, {}
    F, used = {}, {}
    for i in range(11):
        batch = slice(3 * (i % 2), 3 * (i % 2) + 3)
        g = rows_of(copy.deepcopy(model), x[batch], y[batch]).mean(0)
        m = 0.5 * m + g
        direction = torch.zeros_like(g)
        for layer in opt.covered:
            index, S = dense_matrix(layer, g, variant)
            if i % 2 == 0:
                F[layer.name] = 0.6 * F.get(layer.name, 0.0) + 0.4 * S
            if (i <= 4 and i % 2 == 0) or i % 4 == 0:
                used[layer.name] = F[layer.name].clone()
            direction[index] = solve(used[layer.name], m[index], 0.01)
            if layer.kind == "conv" and layer.bias:
                at = slice(layer.bias.start, layer.bias.stop)
                direction[at], scalars[layer.name] = mbf_scalar_rule(g[at], scalars.get(layer.name))
        theta = (1 - 0.05 * 0.1) * theta - 0.05 * direction
        backpropagate(opt, model, x[batch], y[batch])
        opt.step()
        torch.testing.assert_close(flat(model), theta, rtol=1e-8, atol=1e-11)


def test_without_statistics_it_is_momentum_sgd_at_lr_over_damping():
    """F is zero before the first update; a bias of a convolution has a rule of its own."""
    _, x, y = make("strided")
    model = seeded(lambda: nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)))()
    twin = copy.deepcopy(model)
    opt = MBF(model, lr=1e-3, damping=0.01, momentum=0.7)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.7)
    for _ in range(3):
        opt.diagnostics["steps"] = 101  # at no multiple of a period
        opt._schedule()
        backpropagate(opt, model, x, y)
        sgd.zero_grad()
        functional.cross_entropy(twin(x), y).backward()
        opt.step()
        sgd.step()
        torch.testing.assert_close(flat(model), flat(twin), rtol=1e-10, atol=1e-13)
    assert opt.diagnostics["refreshes"] == 0


def test_kernels_of_one_entry_are_diagonal():
    model = seeded(lambda: nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)))()
    x = torch.randn(5, 2, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    opt = MBF(model, **PLAIN)
    step, gradient = first_step(opt, model, x, torch.arange(5) % 3)
    torch.testing.assert_close(step[:6], -0.1 * gradient[:6] / (gradient[:6] ** 2 + 0.02))


def test_normalisation_layers_take_the_scalar_rule():
    model = seeded(Normed)()
    _, x, y = make("flattened")
    opt = MBF(model, **PLAIN, weight_decay=0.5)
    layer = opt.layout.layer("norm")
    at, state, theta = slice(layer.start, layer.stop), None, flat(model)[layer.start : layer.stop]
    for _ in range(4):
        direction, state = mbf_scalar_rule(rows_of(copy.deepcopy(model), x, y).mean(0)[at], state)
        theta = 0.95 * theta - 0.1 * direction
        backpropagate(opt, model, x, y)
        opt.step()
        torch.testing.assert_close(flat(model)[at], theta, rtol=1e-9, atol=1e-12)


# --- the warm start ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "groups", "shared"])
def test_a_warm_start_takes_the_mean_over_the_batches(name, unchanged):
    model, x, y = make(name)
    opt = MBF(model, **PLAIN | {"ema": 0.9}, refresh=3, seed=2)
    batches = [(x[:4], y[:4]), (x[4:], None)]
    with unchanged(model):
        opt.warm_start(batches)
    generator = torch.Generator().manual_seed(2)
    sums = {}
    for inputs, _ in batches:
        outputs = model(inputs)
        bound = Categorical().bind(outputs, None)
        uniforms = torch.rand(len(inputs), bound.num_uniforms, generator=generator, dtype=torch.float64)
        signal = bound.sampled_score(uniforms) / len(inputs)
        g = torch.cat([p.reshape(-1) for p in torch.autograd.grad(outputs, list(model.parameters()), signal)])
        for layer in opt.covered:
            sums[layer.name] = sums.get(layer.name, 0.0) + dense_matrix(layer, g, "B")[1] / 2
    gradient = rows_of(copy.deepcopy(model), x, y).mean(0)
    step, _ = first_step(opt, model, x, y)
    for layer in opt.covered:
        index, S = dense_matrix(layer, gradient, "B")
        wanted = -0.1 * solve(0.9 * sums[layer.name] + 0.1 * S, gradient[index], 0.02)
        torch.testing.assert_close(step[index], wanted, rtol=1e-8, atol=1e-12)


def test_a_warm_start_reads_a_loader_and_leaves_batch_statistics(unchanged):
    model = seeded(
        lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(18, 3))
    )()
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(9, 1, 4, 4, generator=generator, dtype=torch.float64), torch.arange(9) % 3)
    opt = MBF(model, **PLAIN)
    with unchanged(model):
        opt.warm_start(DataLoader(data, batch_size=4, shuffle=True))
        opt.warm_start(data.tensors)  # one batch
    assert all(record.inversions == 1 for name, record in opt._records.items() if name in ("0", "4"))


def test_wrong_warm_starts_are_refused():
    model, x, y = make("dense")
    opt = MBF(model, **PLAIN)
    with pytest.raises(InputError, match="data must be"):
        opt.warm_start(x)
    with pytest.raises(NonFiniteError):
        opt.warm_start((x * torch.nan, y))
    assert opt._records is None
    backpropagate(opt, model, x, y)
    opt.step()
    with pytest.raises(
        InputError, match=r"MBF.warm_start\(\) replaces all averages, so it comes before the first step"
    ):
        opt.warm_start((x, y))
    weighted = MBF(model, **PLAIN, likelihood=Categorical(weight=[1.0, 2.0, 3.0]))
    with pytest.raises(InputError, match="A warm start draws labels, which Categorical"):
        weighted.warm_start((x, y))
    opt = MBF(model, **PLAIN)
    del model
    gc.collect()
    with pytest.raises(InputError, match=r"because the model no longer exists\. Keep a reference to it"):
        opt.warm_start((x, y))


# --- the ordinary loop -------------------------------------------------------------------------------------------------------


class Folded(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 2), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.a(x.reshape(-1, 4)).reshape(len(x), -1))


def test_mean_gradients_do_not_ask_where_the_examples_are():
    model = seeded(Folded)()
    x, y = torch.eye(16, dtype=torch.float64), torch.arange(16) % 3
    opt = MBF(model, **PLAIN)
    step, gradient = first_step(opt, model, x, y)
    torch.testing.assert_close(step, expected(opt, gradient, gradient, "B"), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{}, {"labels": "sampled", "refresh": 2, "inverse_refresh": 3, "weight_decay": 0.1, "kl_clip": 1e-3}]
)
def test_a_resumed_run_is_bitwise_equal(options):
    state = torch.get_rng_state()
    assert resumed(MBF, {"lr": 1e-3} | options)
    assert torch.equal(state, torch.get_rng_state())


def test_embeddings_take_the_announced_fallback_and_may_be_frozen():
    model = seeded(lambda: nn.Sequential(nn.Embedding(4, 3), nn.Flatten(), nn.Linear(6, 3)))()
    with pytest.warns(NumericalWarning, match="MBF does not precondition '0.weight', as no layer of a known kind"):
        opt = MBF(model, **PLAIN)
    x, y = torch.tensor([[0, 1], [3, 1], [2, 2]]), torch.tensor([0, 1, 2])
    step, gradient = first_step(opt, model, x, y)
    torch.testing.assert_close(step[:12], -0.1 * gradient[:12] / 1.02)


def test_the_released_defaults():
    model, _, _ = make("dense")
    opt = MBF(model, preset="paper")
    group = {key: value for key, value in opt.param_groups[0].items() if key != "params"}
    assert group == {"lr": 3e-5, "damping": 3e-3, "ema": 0.9, "momentum": 0.9, "weight_decay": 0.0, "kl_clip": None}
    assert (opt.refresh, opt.inverse_refresh, opt.variant, opt.labels) == (10, 100, "B", "true")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"lr": -1.0}, InputError, "lr must be a finite number > 0; got -1.0."),
        ({"damping": float("inf")}, InputError, "damping must be a finite number > 0; got inf."),
        ({"variant": "C"}, InputError, "Unknown variant 'C'. Known: 'B', 'A', 'released_view'."),
        ({"ema": 1.0}, InputError, "ema must be a finite number >= 0 and < 1; got 1.0."),
        ({"inverse_refresh": True}, TypeError, "inverse_refresh must be an int; got bool True."),
        ({"preset": "cnn"}, InputError, "Unknown preset 'cnn'. Known: 'paper'."),
    ],
)
def test_wrong_options_are_refused(options, error, text):
    model = make("dense")[0]
    with pytest.raises(error) as caught:
        MBF(model, **options)
    assert str(caught.value).startswith(text)
    assert count_hooks(model) == 0


def test_the_inverse_is_kept_between_its_periods():
    model, x, y = make("dense")
    opt = MBF(model, lr=1e-3, refresh=1, inverse_refresh=2)
    kept = []
    for _ in range(6):
        backpropagate(opt, model, x, y)
        opt.step()
        kept.append(opt._records["0"].inverse.clone())
    assert [torch.equal(a, b) for a, b in itertools.pairwise(kept)] == [False, False, True, False, True]


def test_it_learns_the_digits():
    digits = problem("digits-cnn")
    record = train(digits.model(0), digits, lambda model: MBF(model, lr=1e-3), num_steps=60, record_every=20)
    assert record.train_loss.values.squeeze()[-1] < 0.7
    assert record.test_accuracy.values.squeeze()[-1] > 0.75
