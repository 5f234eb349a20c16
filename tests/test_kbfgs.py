import copy
import math

import pytest
import torch
from factor_samples import factors, layers_of, stored
from optim_samples import count_hooks
from test_cwngd import NETWORKS, flat, make, rows_of, seeded, summed
from torch import nn
from torch.nn import functional

from fisherlens import Categorical
from fisherlens.errors import InputError, NonFiniteError
from fisherlens.optim.kbfgs import KBFGS
from fisherlens.optim.secant import bfgs, by_pairs, powell_damped
from fisherlens.reference import optim_kronecker as slow
from fisherlens.reference.kronecker import kronecker_block
from fisherlens.training import problem, train

PLACES = {("flattened", "0"): 9, ("strided", "0"): 9, ("groups", "0"): 25, ("groups", "2"): 16}
PLACES |= {("1d", "0"): 4, ("shared", "conv"): 50, ("shared", "dense"): 2, ("tokens", "mix"): 3, ("tokens", "out"): 3}
PLAIN = {"lr": 0.1, "damping": 0.04, "ema": 0.0}


def closure_of(opt, model, x, y, loss=functional.cross_entropy):
    def closure():
        opt.zero_grad()
        value = loss(model(x), y)
        value.backward()
        return value

    return closure


def vectors(d, seed, batch=2):
    generator = torch.Generator().manual_seed(seed)
    H = torch.randn(batch, d, d, generator=generator, dtype=torch.float64)
    s, y = torch.randn(2, batch, d, 1, generator=generator, dtype=torch.float64)
    return H @ H.mT + torch.eye(d, dtype=torch.float64), s, y


@pytest.mark.parametrize("seed", range(6))
def test_updates_and_damping_follow_the_definition(seed):
    H, s, y = vectors(4, seed)
    damped = powell_damped(s, y, H @ y, 0.3)
    found, used = bfgs(H, *damped)
    assert used.all()
    for k in range(2):
        wanted = slow.powell_damped(H[k], s[k, :, 0], y[k, :, 0], 0.3)
        torch.testing.assert_close((damped[0][k, :, 0], damped[1][k, :, 0]), wanted, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found[k], slow.bfgs(H[k], *wanted), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found @ damped[1], damped[0])
    torch.testing.assert_close(bfgs(H, -y, y), (H, torch.zeros(2, dtype=torch.bool)))  # not positive: left alone


def test_pairs_are_the_matrix():
    H, X = torch.eye(5, dtype=torch.float64).expand(2, 5, 5), vectors(5, 9)[0]
    S, Y = [], []
    for seed in range(4):
        _, s, y = vectors(5, seed)
        s, y = powell_damped(s, y, H @ y, 0.1)
        H, _ = bfgs(H, s, y)
        S.append(s)
        Y.append(y)
    torch.testing.assert_close(by_pairs(torch.stack(S), torch.stack(Y), X), H @ X, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_first_step_has_the_inverse_of_the_input_factor(name):
    model, x, y = make(name)
    twin, before = copy.deepcopy(model), flat(model)
    gradient = rows_of(twin, x, y).mean(0)
    opt = KBFGS(model, **PLAIN)
    opt.step(closure_of(opt, model, x, y))
    for layer, index in layers_of(opt):
        G, A = factors(twin, x, y, layer)
        t = PLACES.get((name, layer.name), 1)  # the twin's A is a mean over positions, not their sum
        right = torch.stack([slow.kbfgs_first_factor(a * t, torch.ones(len(a)).double(), 0.04) for a in A])
        whole = kronecker_block(torch.eye(len(G[0])).double().expand_as(G), right, layer.bias is not None)
        moved = (flat(model) - before)[index]
        torch.testing.assert_close(moved, -0.1 * whole @ gradient[index], rtol=1e-8, atol=1e-11)
    assert opt.diagnostics == {"steps": 1, "refreshes": 1, "retries": 0, "fallbacks": 0, "skipped": 0}


class Watched:
    """Mean input, mean pre-activation and mean score of dense layers, by hooks of the test's own."""

    def __init__(self, model, x, y):
        self.a, self.h, self.g = [], [], []
        handles = [m.register_forward_hook(self._see) for m in model.modules() if isinstance(m, nn.Linear)]
        outputs = functional.cross_entropy(model(x), y, reduction="sum")
        for handle in handles:
            handle.remove()
        self.g = [g.mean(0) for g in torch.autograd.grad(outputs, self.raw)]

    raw: list

    def _see(self, module, args, output):
        self.__dict__.setdefault("raw", []).append(output)
        self.a.append(torch.cat([args[0].detach(), torch.ones(len(output), 1).to(output)], 1))
        self.h.append(output.detach().mean(0))


@pytest.mark.parametrize("memory", [None, 2, 10])
def test_steps_follow_the_definition(memory):
    """A dense network by hand: A, s and y averaged, H_A and H_G updated once per step, after Powell's damping."""
    rho, lam, lr = 0.7, 0.04, 0.1
    eps = math.sqrt(lam)
    model, x, y = make("dense")
    twin = copy.deepcopy(model)
    opt = KBFGS(model, lr=lr, damping=lam, ema=rho, memory=memory)
    layers = [m for m in twin if isinstance(m, nn.Linear)]
    A, HA, HG, s, u = [None] * 2, [None] * 2, [torch.eye(4).double(), torch.eye(3).double()], [0.0] * 2, [0.0] * 2
    pairs = [[], []]
    for step in range(5):
        at = slice(step % 2, step % 2 + 6)
        old = Watched(twin, x[at], y[at])
        twin.zero_grad()
        functional.cross_entropy(twin(x[at]), y[at]).backward()
        for k, layer in enumerate(layers):
            now = old.a[k].T @ old.a[k] / len(old.a[k])
            if step == 0:
                A[k] = now
                HA[k] = slow.kbfgs_first_factor(now, old.a[k].mean(0), lam)
            else:
                A[k] = rho * A[k] + (1 - rho) * now
                p = HA[k] @ old.a[k].mean(0)
                HA[k] = slow.bfgs(HA[k], p, A[k] @ p + eps * p)
            G = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
            direction = HG[k] @ G @ HA[k]
            with torch.no_grad():
                layer.weight -= lr * direction[:, :-1]
                layer.bias -= lr * direction[:, -1]
        new = Watched(twin, x[at], y[at])
        for k in range(2):
            s[k] = rho * s[k] + (1 - rho) * (new.h[k] - old.h[k])
            u[k] = rho * u[k] + (1 - rho) * (new.g[k] - old.g[k])
            pairs[k].append(slow.powell_damped(HG[k], s[k], u[k], eps))
            used = pairs[k] if memory is None else pairs[k][-memory:]
            HG[k] = torch.eye(len(HG[k])).double()
            for one in used:
                HG[k] = slow.bfgs(HG[k], *one)
        opt.step(closure_of(opt, model, x[at], y[at]))
        torch.testing.assert_close(flat(model), flat(twin), rtol=1e-8, atol=1e-10)
    assert opt.diagnostics["skipped"] == 0


def test_the_closure_runs_twice_and_its_first_loss_is_returned():
    model, x, y = make("strided")
    opt = KBFGS(model, lr=0.05, refresh=2)
    losses, inner = [], closure_of(opt, model, x, y)

    def closure():
        losses.append(inner())
        return losses[-1]

    assert opt.step(closure) is losses[0]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert opt.step(closure) is losses[2]
    assert len(losses) == 3  # no statistics are due
    assert (opt.diagnostics["steps"], opt.diagnostics["refreshes"]) == (2, 1)


def binary(outputs, targets):
    return functional.binary_cross_entropy_with_logits(outputs, functional.one_hot(targets, 3).double())


LOSSES = {  # mean negative log-likelihoods
    "categorical": functional.cross_entropy,
    "bernoulli": lambda f, y: 3 * binary(f, y),
    "gaussian": lambda f, y: (f - functional.one_hot(y, 3)).square().sum() / (2 * len(f)),
}


@pytest.mark.parametrize("likelihood", LOSSES)
@pytest.mark.parametrize("name", ["dense", "groups", "shared"])
def test_the_ordinary_loop_is_that_of_a_closure(name, likelihood):
    results, loss = [], LOSSES[likelihood]
    for way in ("closure", "loop", "parts"):
        model, x, y = make(name)
        opt = KBFGS(model, lr=0.05, likelihood=likelihood, refresh=2)
        for _ in range(5):
            if way == "closure":
                opt.step(closure_of(opt, model, x, y, loss))
                continue
            opt.zero_grad()
            if way == "loop":
                loss(model(x), y).backward()
            else:
                for at in (slice(0, 3), slice(3, 7)):
                    (loss(model(x[at]), y[at]) * len(x[at]) / 7).backward()
            gradients = [p.grad.clone() for p in model.parameters()]
            opt.step()
            assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
        results.append(flat(model))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-8, atol=1e-10)


def test_the_ordinary_loop_with_a_summed_loss_and_dropout():
    results = []
    for reduction, loss in (("mean", functional.cross_entropy), ("sum", summed)):
        model = seeded(lambda: nn.Sequential(nn.Linear(5, 20), nn.Dropout(), nn.Linear(20, 3)))()
        _, x, y = make("dense")
        masks = []
        model[1].register_forward_hook(lambda module, args, output, masks=masks: masks.append(output.detach() == 0))
        opt = KBFGS(model, lr=0.01, reduction=reduction)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            for _ in range(3):
                opt.zero_grad()
                loss(model(x), y).backward()
                opt.step()
        assert torch.equal(masks[0], masks[1])
        assert torch.equal(masks[2], masks[3])
        assert not torch.equal(masks[1], masks[2])
        results.append([record.H_g for record in opt._records.values()])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def test_gradients_that_are_only_looked_at_do_not_count():
    results = []
    for look in (False, True):
        model, x, y = make("groups")
        opt = KBFGS(model, lr=0.05)
        for _ in range(3):
            loss = functional.cross_entropy(model(x), y)
            opt.zero_grad()
            if look:
                torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            loss.backward()
            opt.step()
        results.append(flat(model))
    assert torch.equal(*results)


def test_an_input_that_is_written_over_before_the_step_is_noticed():
    model, x, y = make("dense")
    opt = KBFGS(model)
    functional.cross_entropy(model(x), y).backward()
    x += 1
    with pytest.raises(InputError, match="was changed in place after the layer had read it"):
        opt.step()


def test_what_cannot_be_made_again_needs_a_closure():
    text = r"KBFGS.step\(\) needs a closure here, because it looks at the same batch again after the step"
    model, x, y = make("dense")
    opt = KBFGS(model, likelihood=Categorical(weight=[1.0, 2.0, 3.0]))
    before = flat(model)
    functional.cross_entropy(model(x), y).backward()
    with pytest.raises(InputError, match=text):
        opt.step()
    opt = KBFGS(model)
    functional.cross_entropy(model[2](model[:2](x)), y).backward()
    with pytest.raises(InputError, match=text):
        opt.step()
    assert torch.equal(flat(model), before)
    opt.zero_grad()
    with pytest.raises(InputError, match=r"step\(\) found no statistics"):
        opt.step()


def test_dropout_is_the_same_in_both_calls():
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 20), nn.Dropout(), nn.Linear(20, 3)))()
    _, x, y = make("dense")
    opt = KBFGS(model, lr=1e-12)
    masks = []
    model[1].register_forward_hook(lambda module, args, output: masks.append(output.detach() == 0))
    with torch.random.fork_rng(devices=[]):
        opt.step(closure_of(opt, model, x, y))
        opt.step(closure_of(opt, model, x, y))
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[1], masks[2])


def test_a_summed_loss_and_parts_give_the_same_steps():
    results = []
    for way in ("whole", "summed", "parts"):
        model, x, y = make("groups")
        opt = KBFGS(model, lr=0.05, damping=0.1, reduction="sum" if way == "summed" else "mean")

        def parts(opt=opt, model=model, x=x, y=y):
            opt.zero_grad()
            for at in (slice(0, 3), slice(3, 7)):
                (functional.cross_entropy(model(x[at]), y[at]) * len(x[at]) / 7).backward()

        whole = closure_of(opt, model, x, y, summed if way == "summed" else functional.cross_entropy)
        for _ in range(3):
            opt.step(parts if way == "parts" else whole)
        results.append(flat(model))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["dense", "groups", "shared"])
def test_single_precision_stays_single_and_close(name):
    steps = []
    for dtype in (torch.float64, torch.float32):
        model, x, y = make(name)
        model, x = model.to(dtype), x.to(dtype)
        before = flat(model)
        opt = KBFGS(model, lr=0.05, damping=0.1)
        for _ in range(3):
            opt.step(closure_of(opt, model, x, y))
        assert flat(model).dtype == dtype
        steps.append((flat(model) - before).double())
    assert torch.linalg.vector_norm(steps[1] - steps[0]) < 1e-3 * torch.linalg.vector_norm(steps[0])


@pytest.mark.parametrize("options", [{}, {"memory": 3, "momentum": 0.5, "refresh": 2}])
@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_resumed_run_is_bitwise_equal(options, after):
    model, x, y = make("groups")
    opt = KBFGS(model, lr=0.05, **options)
    for _ in range(after):
        opt.step(closure_of(opt, model, x, y))
    other, _, _ = make("groups")
    other.load_state_dict(model.state_dict())
    again = KBFGS(other, lr=0.9, **options)
    again.load_state_dict(opt.state_dict())
    for _ in range(4):
        opt.step(closure_of(opt, model, x, y))
        again.step(closure_of(again, other, x, y))
    assert torch.equal(flat(model), flat(other))
    assert opt.diagnostics == again.diagnostics


def test_refused_steps_change_nothing_and_lost_pairs_are_counted():
    model, x, y = make("dense")
    opt = KBFGS(model, lr=0.05)
    opt.step(closure_of(opt, model, x, y))
    before, state = flat(model), stored(opt)
    with pytest.raises(NonFiniteError, match=r"The gradient of parameter '0.weight' holds NaN or infinity"):
        opt.step(closure_of(opt, model, x * torch.nan, y))
    assert torch.equal(flat(model), before)
    assert stored(opt) == state
    calls = []

    def second_fails():
        calls.append(None)
        opt.zero_grad()
        loss = functional.cross_entropy(model(x * (1 if len(calls) == 1 else math.nan)), y)
        loss.backward()
        return loss

    H = [record.H_g.clone() for record in opt._records.values()]
    opt.step(second_fails)
    assert opt.diagnostics["skipped"] == 2
    assert all(torch.equal(a, r.H_g) for a, r in zip(H, opt._records.values(), strict=True))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"lr": 0.0}, InputError, "lr must be a finite number > 0; got 0.0."),
        ({"damping": float("inf")}, InputError, "damping must be a finite number > 0; got inf."),
        (
            {"labels": "sampled"},
            InputError,
            "KBFGS follows the change of the loss itself from the old to the new weights",
        ),
        ({"labels": "drawn"}, InputError, "Unknown labels 'drawn'. Known: 'true', 'sampled'."),
        ({"memory": 0}, InputError, "memory must be a finite number >= 1; got 0."),
        ({"memory": "all"}, TypeError, "memory must be an int; got str 'all'."),
        ({"preset": "L"}, InputError, "Unknown preset 'L'. Known: 'paper'."),
    ],
)
def test_wrong_options_are_refused(options, error, text):
    model = make("dense")[0]
    with pytest.raises(error) as caught:
        KBFGS(model, **options)
    assert str(caught.value).startswith(text)
    assert count_hooks(model) == 0


def test_it_learns_the_digits():
    digits = problem("digits-cnn")
    record = train(digits.model(0), digits, KBFGS, num_steps=40, record_every=20)
    loss = record.train_loss.values.squeeze()
    assert (loss[1:] < loss[:-1]).all()
    assert record.test_accuracy.values.squeeze()[-1] > 0.7
