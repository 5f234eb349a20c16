import copy

import pytest
import torch
from row_samples import NETWORKS, flat, make, mc_rows, moved, rows_of, take_step
from torch import nn
from torch.nn import functional

import fisherlens.optim.rows as rows_module
from fisherlens.errors import InputError, NonFiniteError, NumericalWarning
from fisherlens.optim import NGD
from fisherlens.optim.solve import factorise
from fisherlens.reference import ngd_step

PLAIN = {"lr": 0.3, "damping": 0.01, "kl_clip": None}


def expected(name, labels, n=7, **options):
    model, x, y = make(name, n)
    rows = rows_of(model, x, y)
    used = rows if labels == "true" else mc_rows(model, x, seed=5)
    before = flat(model)
    options = {k: v for k, v in (PLAIN | options).items() if k in ("lr", "damping")}
    return ngd_step(before, used, rows.mean(0), **options) - before


@pytest.mark.parametrize("labels", ["true", "sampled"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_first_step_is_a_dense_solve_with_the_whole_matrix(name, labels):
    change, opt = moved(NGD, name, labels=labels, seed=5, **PLAIN)
    torch.testing.assert_close(change, expected(name, labels), rtol=1e-8, atol=1e-11)
    assert opt.diagnostics == {"steps": 1, "refreshes": 1, "retries": 0, "fallbacks": 0, "cg_steps": 0}


@pytest.mark.parametrize("labels", ["true", "sampled"])
@pytest.mark.parametrize("name", ["dense wide", "groups", "shared", "tokens"])
def test_conjugate_gradients_agree(name, labels):
    change, opt = moved(NGD, name, labels=labels, seed=5, solver="cg", cg_tol=1e-12, cg_steps=200, **PLAIN)
    torch.testing.assert_close(change, expected(name, labels), rtol=1e-7, atol=1e-10)
    assert 0 < opt.diagnostics["cg_steps"] <= 60  # rank + 1 in exact arithmetic, whatever P


def test_many_rows_go_to_conjugate_gradients_which_start_warm():
    counts = []
    for warm_start in (0.95, 0.0):
        _, opt = moved(NGD, "dense", labels="true", max_rows=6, warm_start=warm_start, lr=0.01, kl_clip=None)
        model, x, y = make("dense")
        opt = NGD(model, labels="true", max_rows=6, warm_start=warm_start, lr=1e-4, kl_clip=None)
        for _ in range(3):
            take_step(opt, model, x, y)
        counts.append(opt.diagnostics["cg_steps"])
    assert 0 < counts[0] < counts[1]


@pytest.mark.parametrize("name", ["dense", "strided", "shared"])
def test_single_precision(name):
    for labels in ("true", "sampled"):
        change, _ = moved(NGD, name, torch.float32, labels=labels, seed=5, **PLAIN)
        wanted = expected(name, labels)
        assert torch.linalg.vector_norm(change - wanted) < 1e-3 * torch.linalg.vector_norm(wanted)


def test_the_row_space_form_does_not_cancel():
    change, _ = moved(NGD, "dense wide", torch.float32, labels="true", lr=1e-4, damping=1e-6, kl_clip=None)
    wanted = expected("dense wide", "true", lr=1e-4, damping=1e-6)
    assert torch.linalg.vector_norm(change - wanted) < 1e-3 * torch.linalg.vector_norm(wanted)


def test_what_else_is_in_the_gradient_takes_part():
    """A penalty in the loss, or a clipped gradient, is no sum of scores of examples."""
    model, x, y = make("dense")
    rows, before = rows_of(model, x, y), flat(model)
    g = rows.mean(0) * 0.5 + 0.1 * before
    wanted = ngd_step(before, rows, g, lr=0.3, damping=0.01)
    opt = NGD(model, labels="true", **PLAIN)
    functional.cross_entropy(model(x), y).backward()
    for p in model.parameters():
        p.grad = 0.5 * p.grad + 0.1 * p.detach()
    opt.step()
    torch.testing.assert_close(flat(model), wanted, rtol=1e-8, atol=1e-10)


def test_steps_follow_the_dense_loop():
    model, x, y = make("flattened", n=20)
    opt, theta, direction = (
        NGD(model, labels="true", lr=0.1, damping=0.05, momentum=0.4, weight_decay=0.1, kl_clip=None),
        flat(model),
        0.0,
    )
    for i in range(4):
        at = slice(5 * i, 5 * i + 5)
        rows = rows_of(model, x[at], y[at])
        direction = 0.4 * direction - (ngd_step(theta, rows, rows.mean(0), lr=1.0, damping=0.05) - theta)
        theta = theta * (1 - 0.1 * 0.1) - 0.1 * direction
        take_step(opt, model, x[at], y[at])
        torch.testing.assert_close(flat(model), theta, rtol=1e-8, atol=1e-10)


class Mapped(nn.Module):
    """A dense layer whose inputs are given in other coordinates: W x + b = (W B⁻¹)(B x) + b."""

    def __init__(self, net, basis):
        super().__init__()
        self.net, self.basis = net, basis

    def forward(self, x):
        return self.net(x @ self.basis.T)


def test_it_does_not_depend_on_the_coordinates_of_a_layer():
    """With more examples than parameters and little damping, two parametrisations take the same step in function space."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 3, generator=generator, dtype=torch.float64), torch.arange(60) % 2
    basis = torch.tensor([[2.0, 0.3, 0.0], [0.0, 0.5, 0.4], [0.1, 0.0, 1.5]], dtype=torch.float64)
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * (1 + i) / 2)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[0].weight.copy_(net[0].weight @ torch.linalg.inv(basis))
    other = Mapped(other, basis)

    def loss(model, x, y):
        return functional.binary_cross_entropy_with_logits(model(x)[:, 0], y.double())

    torch.testing.assert_close(net(x), other(x))
    for model in (net, other):
        opt = NGD(model, lr=0.5, damping=1e-10, labels="true", kl_clip=None)
        take_step(opt, model, x, y, loss)
    torch.testing.assert_close(net(x), other(x), rtol=0, atol=1e-4)
    fresh = torch.optim.SGD(net.parameters(), lr=0.5), torch.optim.SGD(other.parameters(), lr=0.5)
    for sgd, model in zip(fresh, (net, other), strict=True):
        take_step(sgd, model, x, y, loss)
    assert (net(x) - other(x)).abs().max() > 1e-3  # unlike gradient descent


@pytest.mark.parametrize("budget", [0, 2**28])
@pytest.mark.parametrize("name", ["strided", "groups", "shared", "1d"])
def test_memory_budgets_change_nothing(name, budget, monkeypatch):
    monkeypatch.setattr(rows_module, "KEPT_BYTES", budget)
    monkeypatch.setattr(rows_module, "ROWS_BYTES", 1)
    monkeypatch.setattr(rows_module, "CHUNK_BYTES", 1)
    change, _ = moved(NGD, name, labels="true", **PLAIN)
    torch.testing.assert_close(change, expected(name, "true"), rtol=1e-8, atol=1e-11)


def split_step(opt, model, x, y, sizes, share=None):
    opt.zero_grad()
    start = 0
    for n in sizes:
        at = slice(start, start + n)
        (functional.cross_entropy(model(x[at]), y[at]) * n / len(x)).backward()
        start += n
    opt.step()


@pytest.mark.parametrize("budget", [0, 2**28])
@pytest.mark.parametrize("name", ["flattened", "groups", "shared", "tokens"])
def test_several_backward_passes_are_one_batch(name, budget, monkeypatch):
    monkeypatch.setattr(rows_module, "KEPT_BYTES", budget)
    model, x, y = make(name)
    before = flat(model)
    opt = NGD(model, labels="true", **PLAIN)
    split_step(opt, model, x, y, (2, 4, 1))
    torch.testing.assert_close(flat(model) - before, expected(name, "true"), rtol=1e-8, atol=1e-11)


class Sized(nn.Module):
    """Takes maps of any size, and a branch that not every pass uses."""

    def __init__(self):
        super().__init__()
        self.conv, self.side, self.mix, self.out = nn.Conv1d(2, 3, 2), nn.Linear(3, 3), nn.Linear(2, 3), nn.Linear(3, 3)

    def forward(self, x):
        h = torch.tanh(self.conv(x)).mean(-1) + torch.tanh(self.mix(x.mT)).mean(1)
        return self.out(h + self.side(h) if x.shape[-1] > 4 else h)


@pytest.mark.parametrize("budget", [0, 2**28])
def test_passes_of_other_sizes_and_layers_are_one_batch_too(budget, monkeypatch):
    monkeypatch.setattr(rows_module, "KEPT_BYTES", budget)
    generator = torch.Generator().manual_seed(1)
    model = Sized().double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    small, large = (torch.randn(n, 2, t, generator=generator, dtype=torch.float64) for n, t in ((3, 4), (2, 6)))
    y = torch.tensor([0, 1, 2, 0, 1])

    def rows(x, y):
        found = []
        for i in range(len(x)):
            grads = torch.autograd.grad(
                functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()), allow_unused=True
            )
            found.append(
                torch.cat(
                    [
                        torch.zeros_like(p).reshape(-1) if g is None else g.reshape(-1)
                        for g, p in zip(grads, model.parameters(), strict=True)
                    ]
                )
            )
        return torch.stack(found)

    all_rows, before = torch.cat([rows(small, y[:3]), rows(large, y[3:])]), flat(model)
    opt = NGD(model, labels="true", **PLAIN)
    opt.zero_grad()
    (functional.cross_entropy(model(small), y[:3]) * 3 / 5).backward()
    (functional.cross_entropy(model(large), y[3:]) * 2 / 5).backward()
    opt.step()
    wanted = ngd_step(before, all_rows, all_rows.mean(0), lr=0.3, damping=0.01)
    torch.testing.assert_close(flat(model), wanted, rtol=1e-8, atol=1e-10)


def test_a_summed_loss_gives_the_same_steps():
    results = []
    for reduction in ("mean", "sum"):
        model, x, y = make("flattened")
        opt = NGD(model, lr=0.3, damping=0.01, labels="true", reduction=reduction)
        for _ in range(3):
            take_step(opt, model, x, y, lambda m, a, b, how=reduction: functional.cross_entropy(m(a), b, reduction=how))
        results.append(flat(model))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)


def test_kl_clip_bounds_the_predicted_change():
    _, x, y = make("strided")
    free, _ = moved(NGD, "strided", labels="true", **PLAIN)
    clipped, _ = moved(NGD, "strided", labels="true", **PLAIN | {"kl_clip": 1e-4})
    g = rows_of(make("strided")[0], x, y).mean(0)
    product = -0.3 * free @ g
    assert product > 1e-4
    torch.testing.assert_close(clipped, (1e-4 / product).sqrt() * free)


# --- damping -------------------------------------------------------------------------------------------------------------


def closure_of(opt, model, x, y, losses):
    def closure():
        opt.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.item())
        return loss

    return closure


@pytest.mark.parametrize(("lr", "factor"), [(0.05, 0.9**5), (5.0, 0.9**-5)])
def test_damping_follows_how_well_the_model_predicts(lr, factor):
    model, x, y = make("dense", n=30)
    opt = NGD(model, lr=lr, damping=0.5, labels="true", kl_clip=None, adapt_damping=True)
    losses = []
    closure = closure_of(opt, model, x, y, losses)
    for i in range(5):
        before = flat(model)
        opt.step(closure)
        assert len(losses) == i + 1 + (i == 4)
    assert opt.param_groups[0]["damping"] == pytest.approx(0.5 * factor)
    assert opt.diagnostics["steps"] == 5
    change = flat(model) - before
    if lr < 1:  # the model that the ratio was taken with
        model.load_state_dict(_unflat(model, before))
        rows = rows_of(model, x, y)
        F, g = rows.T @ rows / len(rows), rows.mean(0)
        predicted = g @ change + change @ (F @ change + 0.5 * change) / 2
        assert opt._predicted == pytest.approx(predicted.item(), rel=1e-8)
        assert (losses[-1] - losses[-2]) / predicted > 0.75


def _unflat(model, theta):
    state, start = {}, 0
    for name, p in model.named_parameters():
        state[name] = theta[start : start + p.numel()].view_as(p)
        start += p.numel()
    return state


def test_adapting_needs_a_closure():
    model, x, y = make("dense")
    opt = NGD(model, adapt_damping=True)
    functional.cross_entropy(model(x), y).backward()
    with pytest.raises(InputError) as caught:
        opt.step()
    assert str(caught.value) == (
        "NGD with adapt_damping=True compares the loss before and after a step, so it needs step(closure); got step(). Put "
        "zero_grad, loss and backward into a function that returns the loss, or set adapt_damping=False."
    )


# --- state and failures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"solver": "cg", "momentum": 0.5}, {"refresh": 3}, {"refresh": 3, "solver": "cg"}]
)
@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_resumed_run_is_bitwise_equal(options, after):
    model, x, y = make("shared")
    model, x = model.float(), x.float()
    opt = NGD(model, **options)
    for _ in range(after):
        take_step(opt, model, x, y)
    twin = copy.deepcopy(model)
    other = NGD(twin, lr=0.9, damping=0.9, seed=4, **options)
    state = copy.deepcopy(opt.state_dict())
    other.load_state_dict(state)
    assert [take_step(opt, model, x, y) for _ in range(4)] == [take_step(other, twin, x, y) for _ in range(4)]
    assert torch.equal(flat(model), flat(twin))
    assert opt.diagnostics == other.diagnostics


@pytest.mark.parametrize("solver", ["kernel", "cg"])
def test_scores_that_overflow_are_refused(solver):
    model, x, y = make("dense")
    model, x = model.float(), x.float()
    opt = NGD(model, labels="true", solver=solver)
    before = flat(model)
    (1e25 * functional.cross_entropy(model(x), y)).backward()
    with pytest.raises(NonFiniteError, match="hold NaN or infinity"):
        opt.step()
    assert torch.equal(flat(model), before)
    assert opt.diagnostics["steps"] == 0


def test_factors_that_fail_get_more_damping():
    kernel = torch.diag(torch.tensor([1.0, -0.5]))
    found = factorise(kernel, 2.0, 0.01)
    assert (found.retries, found.damping) == (3, pytest.approx(10.0))
    torch.testing.assert_close(found.factor, torch.diag(torch.tensor([12.0, 9.0]).sqrt()).double())
    assert factorise(-1e9 * kernel, 1.0, 0.01).factor is None


def test_a_kernel_without_a_factor_moves_along_the_gradient(monkeypatch):
    import fisherlens.optim.kernels as kernels_module

    monkeypatch.setattr(kernels_module, "kernel", lambda scores, path: -1e9 * scores.gram())
    model, x, y = make("dense")
    before, g = flat(model), rows_of(model, x, y).mean(0)
    opt = NGD(model, lr=1.0, damping=1e-2, labels="true", kl_clip=None)
    with pytest.warns(
        NumericalWarning, match="1 blocks of 39 parameters are not positive definite even with 10000 I added"
    ):
        take_step(opt, model, x, y)
    torch.testing.assert_close(flat(model), before - g / 1e4)
    assert (opt.diagnostics["retries"], opt.diagnostics["fallbacks"]) == (6, 1)


def test_an_input_that_is_written_over_before_the_step_is_noticed():
    model, x, y = make("dense")
    opt = NGD(model, labels="true")
    functional.cross_entropy(model(x), y).backward()
    x.zero_()
    with pytest.raises(InputError, match="The input of layer '0' was changed in place after the layer had read it"):
        opt.step()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"lr": 0.0}, InputError, "lr must be a finite number > 0; got 0.0."),
        ({"damping": float("nan")}, InputError, "damping must be a finite number > 0; got nan."),
        ({"solver": "cgs"}, InputError, "Unknown solver 'cgs'. Did you mean 'cg'? "),
        ({"max_rows": 0}, InputError, "max_rows must be a finite number >= 1; got 0."),
        ({"cg_tol": 0.0}, InputError, "cg_tol must be a finite number > 0; got 0.0."),
        ({"cg_steps": 0}, InputError, "cg_steps must be a finite number >= 1; got 0."),
        ({"warm_start": -1.0}, InputError, "warm_start must be a finite number >= 0; got -1.0."),
        ({"preset": "kfac-jax"}, InputError, "Unknown preset 'kfac-jax'. Known: 'paper'."),
    ],
)
def test_wrong_options_are_refused(options, error, text):
    with pytest.raises(error) as caught:
        NGD(make("dense")[0], **options)
    assert str(caught.value).startswith(text)
