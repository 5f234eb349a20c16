import copy
import functools
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

import fisherlens.optim.cwngd as cwngd_module
import fisherlens.optim.moments as moments_module
from fisherlens import Fisher
from fisherlens.errors import InputError, NumericalWarning
from fisherlens.optim import CWNGD
from fisherlens.optim.solve import solve_blocks
from fisherlens.partitions import partition
from fisherlens.reference import cw_ngd_step
from fisherlens.training import problem, train


def seeded(factory):
    """Call a factory with torch's global generator seeded, and its state given back."""

    @functools.wraps(factory)
    def build(*args, **kwargs):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(3)
            return factory(*args, **kwargs).double()

    return build


class Shared(nn.Module):
    """One dense and one convolution layer used twice in a forward pass."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.dense = nn.Linear(8, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.tanh(self.conv(torch.tanh(self.conv(x))))
        x = functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return self.out(torch.tanh(self.dense(input=torch.tanh(self.dense(x)))))


class Tokens(nn.Module):
    """Dense layers with an axis between the examples and the features; one output per example."""

    def __init__(self):
        super().__init__()
        self.mix, self.out = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.mix(x))).sum(1)


NETWORKS = {
    "dense": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), (5,)),
    "dense wide": (lambda: nn.Sequential(nn.Linear(20, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)), (20,)),
    "flattened": (
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(27, 3)),
        (1, 5, 5),
    ),
    "strided": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3)),
        (2, 6, 6),
    ),
    "groups": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, (3, 2), groups=2, padding="same", dilation=(1, 2), padding_mode="circular"),
            nn.Tanh(),
            nn.Conv2d(6, 6, 2, groups=6, bias=False),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(24, 3),
        ),
        (4, 5, 5),
    ),
    "1d": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)), (2, 6)),
    "shared": (Shared, (2, 5, 5)),
    "tokens": (Tokens, (3, 4)),
}
SETTINGS = {"lr": 0.1, "damping": 0.01, "ema": 0.0, "momentum_ema": 0.0}


def make(name, n=7):
    factory, shape = NETWORKS[name]
    generator = torch.Generator().manual_seed(len(name))
    x = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (n,), generator=generator)
    return seeded(factory)(), x, y


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])


def rows_of(model, x, y, loss=functional.cross_entropy):
    """Gradient of each example's loss, one example after another: (M, P)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(x)):
        grads = torch.autograd.grad(loss(model(x[i : i + 1]), y[i : i + 1]), parameters)
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows)


def backpropagate(opt, model, x, y, loss=functional.cross_entropy):
    value = loss(model(x), y)
    opt.zero_grad()
    value.backward()
    return value


def reference_blocks(model, x, scheme):
    return partition(Fisher(model, (x, None), likelihood="categorical"), scheme).blocks


@pytest.mark.parametrize("scheme", ["cw-ngd", "layer", "unit", "kernel", "parameter", "diagonal", "input"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_first_step_is_a_dense_solve_with_the_blocks_of_this_batch(name, scheme):
    model, x, y = make(name)
    blocks = reference_blocks(model, x, scheme)
    rows, before = rows_of(model, x, y), flat(model)
    F = rows.T @ rows / len(rows)
    expected = torch.zeros_like(before)
    for b in blocks:
        damped = F[b][:, b] + SETTINGS["damping"] * torch.eye(len(b), dtype=F.dtype)
        expected[b] = -SETTINGS["lr"] * torch.linalg.solve(damped, rows.mean(0)[b])
    opt = CWNGD(model, **SETTINGS, partition=scheme)
    backpropagate(opt, model, x, y)
    opt.step()
    assert sorted(opt.partition.sizes) == sorted(len(b) for b in blocks)
    torch.testing.assert_close(flat(model) - before, expected, rtol=1e-9, atol=1e-12)
    assert opt.diagnostics == {"steps": 1, "refreshes": 1, "retries": 0, "fallbacks": 0}


@pytest.mark.parametrize("name", ["flattened", "groups", "shared"])
def test_steps_follow_the_slow_loop(name):
    options = {"lr": 0.05, "damping": 1e-3, "momentum": 0.3}
    model, x, y = make(name, n=20)
    blocks = reference_blocks(model, x, "cw-ngd")
    opt = CWNGD(model, **options)
    theta, state = flat(model), None
    for step in range(6):
        batch = slice(5 * (step % 4), 5 * (step % 4) + 5)
        theta, state = cw_ngd_step(theta, rows_of(model, x[batch], y[batch]), blocks, state, **options)
        backpropagate(opt, model, x[batch], y[batch])
        opt.step()
        torch.testing.assert_close(flat(model), theta, rtol=1e-8, atol=1e-10)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Linear(27, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.norm(self.conv(x))).flatten(1))


def test_normalisation_layers_take_the_scalar_rule():
    options = {"lr": 0.02, "damping": 1e-3}
    model = seeded(Normed)()
    _, x, y = make("flattened")
    opt = CWNGD(model, **options)
    layer = opt.layout.layer("norm")
    blocks = [b for b in reference_blocks(model, x, "cw-ngd") if not layer.start <= b[0] < layer.stop]
    norm = torch.arange(layer.start, layer.stop)
    theta, state = flat(model), None
    for _ in range(4):
        theta, state = cw_ngd_step(theta, rows_of(model, x, y), blocks, state, norm, **options)
        backpropagate(opt, model, x, y)
        opt.step()
        torch.testing.assert_close(flat(model), theta, rtol=1e-8, atol=1e-10)


def test_batch_statistics_count_as_constants():
    """In training mode the rows of a layer are its inputs times the scores at its output, whatever couples the examples."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 3)))()
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 4, generator=generator, dtype=torch.float64), torch.arange(8) % 3
    hidden = twin[0](x)
    hidden.retain_grad()
    functional.cross_entropy(twin[1:](hidden), y).backward()
    opt = CWNGD(model, **SETTINGS)
    backpropagate(opt, model, x, y)
    opt.step()
    assert model.training
    for unit in range(3):
        rows = 8 * hidden.grad[:, unit, None] * x
        F = rows.T @ rows / 8 + SETTINGS["damping"] * torch.eye(4, dtype=x.dtype)
        expected = twin[0].weight[unit] - SETTINGS["lr"] * torch.linalg.solve(F, twin[0].weight.grad[unit])
        torch.testing.assert_close(model[0].weight[unit], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["dense", "strided", "groups"])
def test_one_block_per_layer_is_layer_wise_natural_gradient(name):
    model, x, y = make(name)
    F = Fisher(model, (x, y), likelihood="categorical", kind="empirical")
    g, before = F.gradient(), flat(model)
    opt = CWNGD(model, **SETTINGS, partition="layer")
    backpropagate(opt, model, x, y)
    opt.step()
    for layer in F.layout.layers:
        at = slice(layer.start, layer.stop)
        damped = F.block(layer.name) + SETTINGS["damping"] * torch.eye(layer.size, dtype=x.dtype)
        expected = -SETTINGS["lr"] * torch.linalg.solve(damped, g[at])
        torch.testing.assert_close((flat(model) - before)[at], expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", ["flattened", "shared"])
def test_sampled_labels_estimate_the_fisher(name):
    model, x, y = make(name)
    F = Fisher(model, (x, None), likelihood="categorical", kind="mc", seed=5).dense()
    blocks = reference_blocks(model, x, "unit")
    g, before = rows_of(model, x, y).mean(0), flat(model)
    opt = CWNGD(model, **SETTINGS, partition="unit", labels="sampled", seed=5)
    backpropagate(opt, model, x, y)
    opt.step()
    for b in blocks:
        damped = F[b][:, b] + SETTINGS["damping"] * torch.eye(len(b), dtype=x.dtype)
        expected = -SETTINGS["lr"] * torch.linalg.solve(damped, g[b])
        torch.testing.assert_close((flat(model) - before)[b], expected, rtol=1e-8, atol=1e-11)


def test_sampled_labels_of_positions_are_terms_of_the_mean():
    model = seeded(lambda: nn.Conv1d(2, 3, 2))()
    x = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = torch.arange(24).reshape(6, 4) % 3
    F = Fisher(model, (x, None), likelihood="categorical", kind="mc", seed=1).dense()
    before = flat(model)
    opt = CWNGD(model, **SETTINGS, partition="layer", labels="sampled", seed=1)
    backpropagate(opt, model, x, y)
    gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    opt.step()
    damped = F + SETTINGS["damping"] * torch.eye(len(F), dtype=x.dtype)
    expected = -SETTINGS["lr"] * torch.linalg.solve(damped, gradient)
    torch.testing.assert_close(flat(model) - before, expected, rtol=1e-8, atol=1e-11)


def random_blocks(layout):
    return partition(layout, "random", size=7, seed=2)


def own_blocks(layout):
    order = torch.randperm(layout.n_params, generator=torch.Generator().manual_seed(0))
    return {"first": order[:11], "second": order[11:13], "rest": order[13:]}


@pytest.mark.parametrize("blocks", [random_blocks, own_blocks, lambda layout: partition(layout, "sequential", size=16)])
@pytest.mark.parametrize("factory", [Normed, NETWORKS["flattened"][0]])
def test_blocks_may_cross_layers(factory, blocks):
    model = seeded(factory)()
    _, x, y = make("flattened")
    layout = Fisher(model, (x, None), likelihood="categorical").layout
    scheme = blocks(layout)
    chosen = partition(layout, scheme).blocks
    rows, before = rows_of(model, x, y), flat(model)
    opt = CWNGD(model, **SETTINGS, partition=scheme)
    backpropagate(opt, model, x, y)
    opt.step()
    moved, scored = flat(model) - before, torch.ones(layout.n_params, dtype=torch.bool)
    for layer in layout.layers:
        scored[layer.start : layer.stop] = layer.kind != "norm"
    for whole in chosen:
        b = whole[scored[whole]]
        damped = rows[:, b].T @ rows[:, b] / len(rows) + SETTINGS["damping"] * torch.eye(len(b), dtype=x.dtype)
        torch.testing.assert_close(moved[b], -SETTINGS["lr"] * torch.linalg.solve(damped, rows.mean(0)[b]))
    gradient = rows.mean(0)[~scored]
    torch.testing.assert_close(moved[~scored], -SETTINGS["lr"] * gradient / (gradient.abs() + 1e-8))


@pytest.mark.parametrize("name", ["strided", "shared", "dense wide"])
def test_memory_budget_changes_nothing(name, monkeypatch):
    results = []
    for budget in (2**24, 1):
        model, x, y = make(name)
        monkeypatch.setattr(cwngd_module, "BlockMoments", functools.partial(moments_module.BlockMoments, budget=budget))
        opt = CWNGD(model, **SETTINGS)
        backpropagate(opt, model, x, y)
        opt.step()
        results.append(flat(model))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


def test_channels_last_is_the_same():
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model, x, y = make("strided")
        model = model.to(memory_format=memory_format)
        opt = CWNGD(model, **SETTINGS)
        backpropagate(opt, model, x.to(memory_format=memory_format), y)
        opt.step()
        results.append(flat(model))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["strided", "dense wide"])
def test_single_precision_stays_single_and_close(name):
    steps = []
    for dtype in (torch.float64, torch.float32):
        model, x, y = make(name)
        model, x = model.to(dtype), x.to(dtype)
        before = flat(model)
        opt = CWNGD(model, lr=0.1, damping=0.1)
        for _ in range(3):
            backpropagate(opt, model, x, y)
            opt.step()
        assert flat(model).dtype == dtype
        assert {blocks.H.dtype for blocks in opt._blocks} == {dtype}
        steps.append((flat(model) - before).double())
    assert torch.linalg.vector_norm(steps[1] - steps[0]) < 1e-4 * torch.linalg.vector_norm(steps[0])


def summed(outputs, targets):
    return functional.cross_entropy(outputs, targets, reduction="sum")


def test_a_summed_loss_gives_the_same_steps():
    results = []
    for reduction, loss in (("mean", functional.cross_entropy), ("sum", summed)):
        model, x, y = make("flattened")
        opt = CWNGD(model, lr=0.1, damping=1e-3, reduction=reduction)
        for _ in range(3):
            backpropagate(opt, model, x, y, loss)
            opt.step()
        results.append(flat(model))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)


def test_statistics_are_those_of_the_unaveraged_loss_whatever_it_is():
    """Repeating every example leaves mean gradient and matrix as they are."""
    results = []
    for times in (1, 3):
        model, x, _ = make("dense")
        opt = CWNGD(model, **SETTINGS, likelihood="gaussian")
        x = x.repeat(times, 1)
        backpropagate(opt, model, x, x[:, :3], functional.mse_loss)
        opt.step()
        results.append(flat(model))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)


def test_refresh_keeps_the_matrix_between_updates():
    model, x, y = make("strided")
    opt = CWNGD(model, lr=0.01, damping=1e-2, refresh=3)
    kept = []
    for _ in range(7):
        backpropagate(opt, model, x, y)
        opt.step()
        kept.append([blocks.H.clone() for blocks in opt._blocks])
    same = [all(map(torch.equal, a, b)) for a, b in itertools.pairwise(kept)]
    assert same == [True, True, False, True, True, False]
    assert (opt.diagnostics["steps"], opt.diagnostics["refreshes"]) == (7, 3)
    assert {(b.H_steps, b.m_steps) for b in opt._blocks} == {(3, 7)}


def test_refresh_with_a_summed_loss_still_counts_the_examples():
    results = []
    for reduction, loss in (("mean", functional.cross_entropy), ("sum", summed)):
        model, x, y = make("flattened")
        opt = CWNGD(model, lr=0.1, damping=1e-3, reduction=reduction, refresh=2)
        for n in (7, 3, 5):
            backpropagate(opt, model, x[:n], y[:n], loss)
            opt.step()
        results.append(flat(model))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)


def test_kl_clip_bounds_the_predicted_change():
    model, x, y = make("strided")
    gradient, before = rows_of(model, x, y).mean(0), flat(model)
    free = copy.deepcopy(model)
    for net, kl_clip in ((model, 1e-4), (free, None)):
        opt = CWNGD(net, **SETTINGS, kl_clip=kl_clip)
        backpropagate(opt, net, x, y)
        opt.step()
    u, unclipped = (before - flat(model)) / 0.1, (before - flat(free)) / 0.1
    product = 0.1**2 * unclipped @ gradient
    assert product > 1e-4
    torch.testing.assert_close(u, (1e-4 / product).sqrt() * unclipped, rtol=1e-8, atol=1e-12)


def test_weight_decay_is_decoupled():
    model, x, y = make("dense")
    plain, before = copy.deepcopy(model), flat(model)
    for net, decay in ((model, 0.2), (plain, 0.0)):
        opt = CWNGD(net, **SETTINGS, weight_decay=decay)
        backpropagate(opt, net, x, y)
        opt.step()
    torch.testing.assert_close(flat(model), flat(plain) - 0.1 * 0.2 * before)


def test_solving_raises_the_damping_of_the_blocks_that_need_it():
    good, bad, hopeless = torch.eye(2), torch.diag(torch.tensor([1.0, -0.5])), torch.diag(torch.tensor([1.0, -1e6]))
    matrices = torch.stack([good, bad, hopeless]).double()
    vectors = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
    found = solve_blocks(matrices, 0.01, vectors)
    assert found.retries == 2 + 2 + 1 + 1 + 1 + 1
    assert found.failed.tolist() == [2]
    torch.testing.assert_close(found.vectors[0], vectors[0] / 1.01)
    torch.testing.assert_close(found.vectors[1], vectors[1] / torch.tensor([2.0, 0.5], dtype=torch.float64))
    torch.testing.assert_close(found.vectors[2], vectors[2] / 1e4)


def test_many_blocks_are_solved_in_pieces(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(10, 6, 3, generator=generator, dtype=torch.float64)
    matrices, vectors = rows.mT @ rows, torch.randn(10, 3, generator=generator, dtype=torch.float64)
    whole = solve_blocks(matrices, 0.1, vectors).vectors
    monkeypatch.setattr("fisherlens.optim.solve.CHUNK_BYTES", 16 * 9 * 4)
    torch.testing.assert_close(solve_blocks(matrices, 0.1, vectors).vectors, whole)


def test_a_block_that_lost_its_definiteness_is_counted_and_never_steps_wildly():
    model, x, y = make("flattened")
    opt = CWNGD(model, lr=0.01, damping=1e-2, ema=0.5)
    backpropagate(opt, model, x, y)
    opt.step()
    kernels = next(blocks for blocks in opt._blocks if blocks.layer == "0")
    kernels.H[1] -= 0.5 * torch.eye(9, dtype=torch.float64)
    backpropagate(opt, model, x, y)
    opt.step()
    assert opt.diagnostics["fallbacks"] == 0
    assert 1 <= opt.diagnostics["retries"] <= 3
    retries = opt.diagnostics["retries"]

    kernels.H[1] -= 1e9 * torch.eye(9, dtype=torch.float64)
    backpropagate(opt, model, x, y)
    before = model[0].weight.detach().clone()
    text = (
        "1 blocks of 9 parameters are not positive definite even with 10000 I added; they move along gradient / 10000. "
        "Training has probably diverged: lower lr or raise damping."
    )
    with pytest.warns(NumericalWarning) as caught:
        opt.step()
    assert str(caught[0].message) == text
    assert (opt.diagnostics["retries"], opt.diagnostics["fallbacks"]) == (retries + 6, 1)
    m_hat = kernels.m[1] / (1 - 0.9**3)
    torch.testing.assert_close(before[1].reshape(-1) - 0.01 * m_hat / 1e4, model[0].weight[1].reshape(-1).detach())


def test_the_released_defaults():
    model, _, _ = make("dense")
    group = CWNGD(model, preset="paper").param_groups[0]
    del group["params"]
    expected = {"lr": 1e-3, "damping": 1e-7, "ema": 0.99, "momentum_ema": 0.9, "momentum": 0.0}
    assert group == expected | {"weight_decay": 0.0, "kl_clip": None}


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"partition": "kernels"}, InputError, "Unknown partition scheme 'kernels'. Did you mean 'kernel'? "),
        ({"partition": "random"}, InputError, "'sequential' and 'random' need size"),
        ({"partition": 3}, TypeError, "scheme must be a name, a dict label -> flat indices, or a Partition; got int."),
        ({"preset": "2022"}, InputError, "Unknown preset '2022'. Known: 'paper'."),
        ({"ema": 1.0}, InputError, "ema must be a finite number >= 0 and < 1; got 1.0."),
        ({"momentum_ema": -0.1}, InputError, "momentum_ema must be a finite number >= 0 and < 1; got -0.1."),
    ],
)
def test_wrong_options_are_refused(options, error, text):
    with pytest.raises(error) as caught:
        CWNGD(make("dense")[0], **options)
    assert str(caught.value).startswith(text)


def test_it_learns_the_digits():
    digits = problem("digits-cnn")
    record = train(digits.model(0), digits, lambda model: CWNGD(model, damping=1e-3), num_steps=60, record_every=20)
    loss = record.train_loss.values.squeeze()
    assert (loss[1:] < loss[:-1]).all()
    assert record.test_accuracy.values.squeeze()[-1] > 0.9
