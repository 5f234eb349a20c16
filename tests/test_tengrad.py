import copy
import io

import pytest
import torch
from row_samples import NETWORKS, flat, layer_blocks, make, mc_rows, moved, rows_of, take_step
from torch import nn
from torch.nn import functional

import fisherlens.optim.rows as rows_module
from fisherlens.errors import InputError, NonFiniteError, NumericalWarning
from fisherlens.layout import Layout
from fisherlens.optim import NGD, TENGraD
from fisherlens.optim.rows import by_positions, kernel
from fisherlens.reference import blockwise_step, reduced_rows, tengrad_step
from fisherlens.scores.conv import ConvGeometry, ConvScores

PLAIN = {"lr": 0.3, "damping": 0.05, "kl_clip": None, "momentum": 0.0}


@pytest.mark.parametrize("path", ["A", "B"])
@pytest.mark.parametrize("labels", ["true", "sampled"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_first_step_is_a_dense_solve_with_the_matrix_of_each_layer(name, labels, path):
    model, x, y = make(name)
    rows, before = rows_of(model, x, y), flat(model)
    used = rows if labels == "true" else mc_rows(model, x, seed=5)
    wanted = blockwise_step(before, used, rows.mean(0), layer_blocks(model), lr=0.3, damping=0.05) - before
    change, opt = moved(TENGraD, name, labels=labels, seed=5, path=path, **PLAIN)
    torch.testing.assert_close(change, wanted, rtol=1e-8, atol=1e-11)
    assert opt.diagnostics == {"steps": 1, "refreshes": 1, "retries": 0, "fallbacks": 0}


def test_with_one_layer_it_is_exact_natural_gradient():
    for factory in (lambda: nn.Linear(5, 3), lambda: nn.Conv1d(2, 3, 3)):
        steps = []
        for method in (TENGraD, NGD):
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                model = factory().double()
            shape = (6, 5) if isinstance(model, nn.Linear) else (6, 2, 3)
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            before = flat(model)
            options = {"refresh": 1, "labels": "sampled", "seed": 3, **PLAIN}
            opt = method(model, **options)
            for _ in range(3):
                take_step(
                    opt, model, x, torch.arange(6) % 3, lambda m, a, b: functional.cross_entropy(m(a).flatten(1), b)
                )
            steps.append(flat(model) - before)
        torch.testing.assert_close(*steps, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", ["flattened", "shared", "dense wide"])
def test_steps_follow_the_first_rule_with_old_rows(name):
    options = {"lr": 0.1, "damping": 0.1, "weight_decay": 0.05, "momentum": 0.9, "kl_clip": 1e-3}
    model, x, y = make(name, n=20)
    opt = TENGraD(model, labels="true", refresh=3, **options)
    theta, m, kept = flat(model), None, None
    for step in range(5):
        at = slice(5 * (step % 4), 5 * (step % 4) + 5)
        rows = rows_of(model, x[at], y[at])
        kept = rows if step % 3 == 0 else kept
        theta, m = tengrad_step(theta, kept, rows.mean(0), layer_blocks(model), m, **options)
        take_step(opt, model, x[at], y[at])
        torch.testing.assert_close(flat(model), theta, rtol=1e-8, atol=1e-10)
    assert opt.diagnostics["refreshes"] == 2


def test_the_rows_survive_a_buffer_that_is_filled_again():
    results = []
    for reuse in (False, True):
        model, x, y = make("flattened", n=12)
        opt = TENGraD(model, labels="true", refresh=3, lr=0.1)
        buffer = torch.empty_like(x[:4])
        for step in range(3):
            at = slice(4 * step, 4 * step + 4)
            batch = buffer.copy_(x[at]) if reuse else x[at]
            take_step(opt, model, batch, y[at])
        results.append(flat(model))
    assert torch.equal(*results)


def by_hand(rule, momentum):
    model, x, y = make("dense")
    theta, m, w, lr = flat(model), 0.0, 0.05, 0.1
    for _ in range(3):
        rows = rows_of(_with(model, theta), x, y)
        P = (theta - blockwise_step(theta, rows, rows.mean(0), layer_blocks(model), lr=1.0, damping=0.1)).clone()
        if rule == "july-2021":
            theta = theta - lr * (P + w * theta)
        else:
            m = momentum * m + P + w * theta
            theta = theta - lr * m
    return theta


def _with(model, theta):
    model, start = copy.deepcopy(model), 0
    for p in model.parameters():
        p.data = theta[start : start + p.numel()].view_as(p).clone()
        start += p.numel()
    return model


@pytest.mark.parametrize("rule", ["july-2021", "later"])
def test_the_other_rules(rule):
    model, x, y = make("dense")
    opt = TENGraD(
        model, lr=0.1, damping=0.1, momentum=0.8, weight_decay=0.05, rule=rule, refresh=1, labels="true", kl_clip=1e-9
    )
    for _ in range(3):
        take_step(opt, model, x, y)
    torch.testing.assert_close(flat(model), by_hand(rule, 0.8), rtol=1e-8, atol=1e-10)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Linear(27, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.norm(self.conv(x))).flatten(1))


def test_other_parameters_move_along_their_gradient_and_are_clipped_too():
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        model = Normed().double()
    _, x, y = make("flattened")
    before, rows = flat(model), rows_of(model, x, y)
    first, norm, out = layer_blocks(model)
    with pytest.warns(NumericalWarning) as caught:
        opt = TENGraD(model, lr=0.1, damping=0.1, kl_clip=1e-3, labels="true")
    assert str(caught[0].message) == (
        "TENGraD does not precondition 'norm.weight', 'norm.bias', as no layer of a known kind owns them alone; they move by "
        "lr * gradient, the rule for parameters without statistics. Freeze them to leave them as they are."
    )
    theta, _ = tengrad_step(before, rows, rows.mean(0), [first, out], lr=0.1, damping=0.1, kl_clip=1e-3)
    take_step(opt, model, x, y)
    torch.testing.assert_close(flat(model), theta, rtol=1e-8, atol=1e-11)
    free, _ = tengrad_step(before, rows, rows.mean(0), [first, out], lr=0.1, damping=0.1, kl_clip=1e9)
    assert (theta - before).norm() < 0.5 * (free - before).norm()
    assert norm.numel() == 6


def conv_scores(geometry_of, x, t):
    """Patches and scores of a convolution, position by position, by torch's own unfold."""
    a = functional.unfold(x, geometry_of.kernel_size, stride=geometry_of.stride, padding=geometry_of.padding)
    return a.mT, t.flatten(2).mT


@pytest.mark.parametrize("groups", [1, 2])
def test_the_reduced_path_has_sums_over_positions(groups):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        conv = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=groups).double()
    x = torch.randn(6, 2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(6) % 4
    outputs = conv(x)
    outputs.retain_grad()
    loss = functional.cross_entropy(outputs.mean((2, 3)) + outputs[:, :, 0, 0], y)
    opt = TENGraD(conv, path="reduced", labels="true", **PLAIN)
    outputs = conv(x)
    outputs.retain_grad()
    loss = functional.cross_entropy(outputs.mean((2, 3)) + outputs[:, :, 0, 0], y)
    before = flat(conv)
    opt.zero_grad()
    loss.backward()
    a, g = conv_scores(conv, x, 6 * outputs.grad)
    per_group = [
        reduced_rows(
            a[:, :, j * a.shape[2] // groups : (j + 1) * a.shape[2] // groups],
            g[:, :, 4 * j // groups : 4 * (j + 1) // groups],
        )
        for j in range(groups)
    ]
    biases = 4 // groups
    rows = torch.cat([r[:, :-biases] for r in per_group] + [r[:, -biases:] for r in per_group], dim=1)
    gradient = torch.cat([p.grad.reshape(-1) for p in conv.parameters()])
    wanted = blockwise_step(before, rows, gradient, [torch.arange(len(before))], lr=0.3, damping=0.05)
    opt.step()
    torch.testing.assert_close(flat(conv), wanted, rtol=1e-8, atol=1e-11)


def test_the_reduced_path_is_exact_for_inputs_that_do_not_vary():
    steps = []
    for path in ("reduced", "B"):
        model, x, y = make("strided")
        model[0].padding = (0, 0)
        model[-1] = torch.nn.utils.skip_init(nn.Linear, 12, 3).double()
        torch.nn.utils.vector_to_parameters(
            torch.randn(39, generator=torch.Generator().manual_seed(1)).double(), model[-1].parameters()
        )
        before = flat(model)
        constant = x.mean((2, 3), keepdim=True).expand_as(x).contiguous()
        opt = TENGraD(model, path=path, labels="true", **PLAIN)
        take_step(opt, model, constant, y)
        steps.append((flat(model) - before)[:57])
    torch.testing.assert_close(*steps, rtol=1e-8, atol=1e-11)


def test_paths_are_chosen_by_cost():
    def scores(n, c_in, c_out, size):
        x, g = torch.zeros(n, c_in, size, size), torch.zeros(n, 1, c_out, size - 2, size - 2)
        model = nn.Conv2d(c_in, c_out, 3)
        return ConvScores(Layout.from_model(model).layers[0], ConvGeometry.of(model), x, g)

    deep, wide = scores(2, 64, 64, 4), scores(2, 3, 8, 16)
    assert by_positions([deep], 128, "auto")
    assert not by_positions([wide], 128, "auto")
    assert by_positions([wide], 128, "A")
    assert not by_positions([deep], 128, "B")
    # N T² (d_i + d_o + 1) < (T + N) d_i d_o against T² (d_i + d_o) < d_i d_o, at d_i = 36, d_o = 16, T = 4
    between = scores(2, 4, 16, 4)
    assert by_positions([between], 2, "auto")
    assert not by_positions([between], 128, "auto")
    assert not by_positions([between], 2, "paper")


@pytest.mark.parametrize("name", ["strided", "groups", "1d"])
def test_both_kernels_of_a_convolution_are_the_same(name, monkeypatch):
    """Kernels from factors, by positions and by rows, against the kernel of explicit rows, whole and in the smallest pieces."""
    monkeypatch.setattr(rows_module, "KEPT_BYTES", 0)
    model, x, y = make(name)
    opt = TENGraD(model, labels="true", **PLAIN)
    functional.cross_entropy(model(x), y).backward()
    opt._tap.flush()
    layer = opt.covered[0]
    scores = opt._scores(layer)
    assert type(scores) is ConvScores
    rows = rows_of(model, x, y)[:, layer.start : layer.stop] / len(x)
    for chunk in (1, 2**26):
        monkeypatch.setattr(rows_module, "CHUNK_BYTES", chunk)
        for path in ("A", "B"):
            torch.testing.assert_close(kernel(scores, path), rows @ rows.T, rtol=1e-9, atol=1e-14)


def test_low_rank_products_keep_leading_singular_values():
    model, x, y = make("strided")
    rows, before = rows_of(model, x, y), flat(model)
    first, out = layer_blocks(model)
    U, g = rows[:, first], rows.mean(0)[first]
    left, s, right = torch.linalg.svd(U, full_matrices=False)
    k = int((s.cumsum(0) <= 0.6 * s.sum()).sum())
    assert 1 <= k < 5
    low = left[:, :k] * s[:k] @ right[:k]
    y_n = torch.linalg.solve(U @ U.T / 7 + 0.05 * torch.eye(7, dtype=U.dtype), low @ g)
    wanted = before.clone()
    wanted[first] -= 0.3 * (g - low.T @ y_n / 7) / 0.05
    wanted[out] = blockwise_step(before, rows, rows.mean(0), [out], lr=0.3, damping=0.05)[out]
    change, _ = moved(TENGraD, "strided", labels="true", path="B", low_rank=0.6, **PLAIN)
    torch.testing.assert_close(before + change, wanted, rtol=1e-7, atol=1e-10)
    whole, _ = moved(TENGraD, "strided", labels="true", path="B", low_rank=1.0, **PLAIN)
    exact, _ = moved(TENGraD, "strided", labels="true", path="B", **PLAIN)
    torch.testing.assert_close(whole, exact, rtol=1e-5, atol=1e-8)


def test_biases_as_in_the_paper():
    model, x, y = make("strided")
    rows, before = rows_of(model, x, y), flat(model)
    conv, conv_bias, weight, bias = torch.arange(len(before)).split([p.numel() for p in model.parameters()])
    opt = TENGraD(model, labels="true", preset="paper", refresh=2, **PLAIN)
    assert (opt.path, opt.bias) == ("paper", "paper")
    g = rows.mean(0)
    wanted = blockwise_step(before, rows, g, [conv, weight, bias], lr=0.3, damping=0.05)
    wanted[conv_bias] = before[conv_bias] - 0.3 * g[conv_bias]
    take_step(opt, model, x, y)
    torch.testing.assert_close(flat(model), wanted, rtol=1e-8, atol=1e-11)
    before, g = flat(model), rows_of(model, x, y).mean(0)
    wanted = blockwise_step(before, rows, g, [conv, weight], lr=0.3, damping=0.05)  # old rows
    for b in (conv_bias, bias):
        wanted[b] = before[b] - 0.3 * g[b]
    take_step(opt, model, x, y)
    torch.testing.assert_close(flat(model), wanted, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", ["strided", "dense wide", "shared"])
def test_single_precision(name):
    wanted, _ = moved(TENGraD, name, labels="true", **PLAIN)
    change, _ = moved(TENGraD, name, torch.float32, labels="true", **PLAIN)
    assert torch.linalg.vector_norm(change - wanted) < 1e-3 * torch.linalg.vector_norm(wanted)


def test_reductions_and_accumulation():
    results = []
    for reduction, sizes in (("mean", (7,)), ("sum", (7,)), ("mean", (3, 4)), ("sum", (1, 6))):
        model, x, y = make("flattened")
        opt = TENGraD(model, lr=0.1, labels="true", reduction=reduction, refresh=2)
        for _ in range(3):
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


@pytest.mark.parametrize("budget", [0, 2**28])
@pytest.mark.parametrize(
    "options", [{}, {"path": "reduced"}, {"low_rank": 0.9, "path": "B"}, {"preset": "paper"}, {"labels": "true"}]
)
@pytest.mark.parametrize("name", ["shared", "groups"])
def test_a_resumed_run_is_bitwise_equal(name, options, budget, monkeypatch):
    monkeypatch.setattr(rows_module, "KEPT_BYTES", budget)
    model, x, y = make(name)
    model, x = model.float(), x.float()
    opt = TENGraD(model, refresh=4, **options)
    for _ in range(2):
        take_step(opt, model, x, y)
    stored = io.BytesIO()
    torch.save(opt.state_dict(), stored)
    stored.seek(0)
    twin = copy.deepcopy(model)
    other = TENGraD(twin, lr=0.9, damping=0.9, seed=4, refresh=4, **options)
    other.load_state_dict(torch.load(stored, weights_only=True))
    assert [take_step(opt, model, x, y) for _ in range(4)] == [take_step(other, twin, x, y) for _ in range(4)]
    assert torch.equal(flat(model), flat(twin))
    assert opt.diagnostics == other.diagnostics


def test_states_that_do_not_fit_are_refused():
    model, x, y = make("dense")
    opt = TENGraD(model, preset="paper")
    take_step(opt, model, x, y)
    state = opt.state_dict()
    with pytest.raises(InputError, match="This state dict is of 'TENGraD'; NGD loads only its own"):
        NGD(model).load_state_dict(state)
    with pytest.raises(InputError, match=r"it keeps rows of \('0.weight',\), but the blocks here are"):
        TENGraD(model).load_state_dict(state)


def test_scores_that_overflow_are_refused_and_change_nothing():
    model, x, y = make("strided")
    model, x = model.float(), x.float()
    opt = TENGraD(model, refresh=1, labels="true")
    take_step(opt, model, x, y)
    before, state = flat(model), copy.deepcopy(opt.state_dict()["fisherlens"])
    opt.zero_grad()
    (1e25 * functional.cross_entropy(model(x), y)).backward()
    with pytest.raises(NonFiniteError, match="The scores of layer '0' hold NaN or infinity in their second moments"):
        opt.step()
    assert torch.equal(flat(model), before)
    after = opt.state_dict()["fisherlens"]
    assert after["diagnostics"] == state["diagnostics"]
    assert torch.equal(after["previous"], state["previous"])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rule": "june"}, "Unknown rule 'june'."),
        ({"path": "C"}, "Unknown path 'C'."),
        ({"bias": "none"}, "Unknown bias 'none'."),
        ({"low_rank": 0.0}, "low_rank must be a finite number > 0"),
        ({"low_rank": 1.5}, "low_rank must be a finite number > 0"),
        ({"damping": -1.0}, "damping must be a finite number > 0; got -1.0."),
        ({"preset": "v1"}, "Unknown preset 'v1'. Known: 'paper'."),
    ],
)
def test_wrong_options_are_refused(options, text):
    with pytest.raises(InputError) as caught:
        TENGraD(make("dense")[0], **options)
    assert str(caught.value).startswith(text)
