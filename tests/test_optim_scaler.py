"""Mixed precision: a GradScaler changes nothing but overflowing steps, and autocast little."""

import copy
import gc
import io
import re

import pytest
import torch
from optim_methods import ALL, FACTORS, SETTLED
from optim_samples import data, flat, loss_of, network, step
from torch import nn
from torch.nn import functional

from fisherlens.errors import InputError
from fisherlens.optim import KFAC, MBF, NGD, TNT


def clipped(model):
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def plain_run(build, dtype, steps=6, change=lambda model: None, **options):
    model, batch = network(dtype), data(dtype=dtype)
    opt = build(model, **options)
    for _ in range(steps):
        opt.zero_grad()
        loss_of(model, batch).backward()
        change(model)
        opt.step()
    return flat(model), opt


def scaled_run(build, dtype, scaler, steps=6, change=None, **options):
    model, batch = network(dtype), data(dtype=dtype)
    opt = build(model, **options)
    for _ in range(steps):
        opt.zero_grad()
        scaler.scale(loss_of(model, batch)).backward()
        if change is not None:
            scaler.unscale_(opt)
            change(model)
        scaler.step(opt)
        scaler.update()
    return flat(model), opt


def powers():
    """A scale that doubles every other step."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**9, growth_interval=2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("build", ALL.values(), ids=ALL)
def test_a_power_of_two_changes_nothing(build, dtype):
    wanted, plain = plain_run(build, dtype)
    scaler = powers()
    found, opt = scaled_run(build, dtype, scaler)
    assert torch.equal(found, wanted)
    assert scaler.get_scale() == 2.0**12
    assert opt.diagnostics == plain.diagnostics | {"overflows": 0}


@pytest.mark.parametrize("build", ALL.values(), ids=ALL)
def test_gradients_may_be_unscaled_and_clipped_before(build):
    wanted, _ = plain_run(build, torch.float64, change=clipped)
    found, _ = scaled_run(build, torch.float64, powers(), change=clipped)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ALL)
def test_any_scale_and_a_summed_loss(name):
    def summed(scaler):
        model, (x, y) = network(), data()
        opt = ALL[name](model, reduction="sum", **SETTLED.get(name, {}))
        for _ in range(4):
            opt.zero_grad()
            loss = functional.cross_entropy(model(x), y, reduction="sum")
            (loss if scaler is None else scaler.scale(loss)).backward()
            opt.step() if scaler is None else scaler.step(opt)
            None if scaler is None else scaler.update()
        return flat(model)

    found = summed(torch.amp.GradScaler("cpu", init_scale=1000.0, growth_factor=1.5, growth_interval=1))
    torch.testing.assert_close(found, summed(None), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("build", ALL.values(), ids=ALL)
def test_parts_of_a_batch_are_accumulated(build):
    results = []
    for scaler in (None, powers()):
        model, (x, y) = network(), data()
        opt = build(model)
        for _ in range(4):
            opt.zero_grad()
            for at in (slice(0, 3), slice(3, 8)):
                loss = loss_of(model, (x[at], y[at])) * len(x[at]) / 8
                (loss if scaler is None else scaler.scale(loss)).backward()
            opt.step() if scaler is None else scaler.step(opt)
            None if scaler is None else scaler.update()
        results.append(flat(model))
    assert torch.equal(*results)


def stored(opt):
    """All state but counts, and the maps that any forward pass shows."""
    state = opt.state_dict()
    state["fisherlens"] = {
        key: value for key, value in state["fisherlens"].items() if key not in ("diagnostics", "maps")
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("build", ALL.values(), ids=ALL)
def test_an_overflow_skips_the_step_and_leaves_no_trace(build, unscaled):
    wanted, _ = plain_run(build, torch.float32, steps=4)
    model, batch, scaler = network(torch.float32), data(dtype=torch.float32), powers()
    opt = build(model)
    for k in range(6):
        before, state, scale = flat(model), stored(opt), scaler.get_scale()
        opt.zero_grad()
        overflows = k in (0, 3)
        scaler.scale(loss_of(model, batch) * (1e38 if overflows else 1)).backward()
        if unscaled:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        assert (scaler.get_scale() < scale) == overflows
        assert torch.equal(flat(model), before) == overflows
        assert not overflows or stored(opt) == state
    assert opt.diagnostics["overflows"] == 2
    assert opt.diagnostics["steps"] == 4
    assert torch.equal(flat(model), wanted)


@pytest.mark.parametrize("build", ALL.values(), ids=ALL)
def test_a_disabled_scaler_and_one_that_comes_late(build):
    wanted, plain = plain_run(build, torch.float64)
    found, opt = scaled_run(build, torch.float64, torch.amp.GradScaler("cpu", enabled=False))
    assert torch.equal(found, wanted)
    assert opt.diagnostics == plain.diagnostics
    model, batch, scaler = network(), data(), powers()
    opt = build(model)
    for k in range(6):
        opt.zero_grad()
        loss = loss_of(model, batch)
        (scaler.scale(loss) if k in (2, 3) else loss).backward()
        scaler.step(opt) if k in (2, 3) else opt.step()
        scaler.update() if k in (2, 3) else None
    assert torch.equal(flat(model), wanted)


def test_large_scales_do_not_overflow_when_squared():
    """2¹⁰⁰ times a gradient is a number in single precision, and its square is none."""
    wanted, _ = plain_run(ALL["kfac"], torch.float32)
    model, batch = network(torch.float32), data(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_factor=2.0**20, growth_interval=1)
    opt = ALL["kfac"](model)
    for _ in range(6):
        opt.zero_grad()
        scaler.scale(loss_of(model, batch)).backward()
        scaler.step(opt)
        scaler.update()
    assert scaler.get_scale() == 2.0**120
    assert torch.equal(flat(model), wanted)


def test_a_scaler_is_not_kept_alive():
    scaler = powers()
    _, opt = scaled_run(ALL["kfac"], torch.float64, scaler)
    assert opt._scaler() is scaler
    del scaler
    gc.collect()
    assert opt._scaler() is None
    assert KFAC._step_supports_amp_scaling


def test_a_scale_that_is_not_told_is_refused():
    model, batch = network(), data()
    opt = KFAC(model)
    loss_of(model, batch).backward()
    opt.found_inf = torch.zeros(())
    with pytest.raises(InputError) as caught:
        opt.step()
    assert str(caught.value) == (
        "KFAC was stepped by a scaler that has unscaled the gradients before and does not tell its scale, which the captured scores still "
        "carry. Step by scaler.step(opt) of a torch.amp.GradScaler, or leave scaler.unscale_(opt) out."
    )
    del opt.found_inf
    opt.step()


@pytest.mark.parametrize("build", [NGD, KFAC])
def test_a_closure_is_refused(build):
    model, batch, scaler = network(), data(), powers()
    opt = build(model, **{"adapt_damping": True} if build is NGD else {})
    scaler.scale(loss_of(model, batch)).backward()
    text = re.escape(
        f"{build.__name__} got a closure from a GradScaler, whose scale the gradients of that closure would carry, unchecked. Call backward "
        "on scaler.scale(loss) first, then scaler.step(opt) without a closure; a method that needs one cannot be used with a scaler."
    )
    with pytest.raises(InputError, match=text):
        scaler.step(opt, lambda: loss_of(model, batch))


# --- autocast -------------------------------------------------------------------------------------------------------------


def cast(net, batch, dtype=torch.bfloat16):
    with torch.autocast("cpu", dtype=dtype):
        return loss_of(net, batch)


def tensors(value):
    """All floating-point tensors in a state."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [x for entry in entries for x in tensors(entry)]


@pytest.mark.parametrize("name", ALL)
def test_autocast_is_close_to_single_precision(name):
    """Each step from the same parameters, since small differences grow along a trajectory."""
    options = (
        {"damping": 1e-3} if name == "shampoo" else {}
    )  # else a root blows up the rounding of directions without gradient
    paths = []
    for loss in (loss_of, cast):
        model, batch = network(torch.float32), data(24, torch.float32)
        opt, start, found = ALL[name](model, **options), flat(model), []
        for _ in range(3):
            opt.zero_grad()
            loss(model, batch).backward()
            opt.step()
            found.append(flat(model) - start)
            nn.utils.vector_to_parameters(start.clone(), model.parameters())
        assert {x.dtype for x in tensors(opt.state_dict())} <= {torch.float32, torch.float64}
        paths.append(torch.stack(found))
    error = torch.linalg.vector_norm(paths[1] - paths[0]) / torch.linalg.vector_norm(paths[0])
    assert 0 < error < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", FACTORS.values(), ids=FACTORS)
def test_autocast_with_a_scaler_is_autocast(build, dtype):
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=2)):
        model, batch = network(torch.float32), data(24, torch.float32)
        opt = build(model)
        for _ in range(4):
            opt.zero_grad()
            loss = cast(model, batch, dtype)
            (loss if scaler is None else scaler.scale(loss)).backward()
            opt.step() if scaler is None else scaler.step(opt)
            None if scaler is None else scaler.update()
        results.append(flat(model))
    start = flat(network(torch.float32))
    gap = torch.linalg.vector_norm(results[1] - results[0]) / torch.linalg.vector_norm(results[0] - start)
    assert gap < (1e-6 if dtype == torch.bfloat16 else 0.05), (
        gap
    )  # half precision loses its smallest scores without the scale


@pytest.mark.parametrize("where", ["the step", "the parts of a batch"])
@pytest.mark.parametrize("name", ALL)
def test_statistics_are_not_cast_where_autocast_is_in_force(name, where):
    """A step within it; and a first part's statistics, which the forward pass of the second part hands over."""
    results = []
    for within in (False, True):
        model, (x, y) = network(torch.float32), data(24, torch.float32)
        opt = ALL[name](model)
        for _ in range(3):
            opt.zero_grad()
            for at in [slice(0, 24)] if where == "the step" else [slice(0, 12), slice(12, 24)]:
                if not within:
                    opt._tap.flush()
                (cast(model, (x[at], y[at])) * len(x[at]) / 24).backward()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=within and where == "the step"):
                opt.step()
        results.append(flat(model))
    assert torch.equal(*results)


@pytest.mark.parametrize("method", [MBF, TNT])
def test_a_warm_start_within_autocast_keeps_its_averages_in_single_precision(method):
    found = []
    for enabled in (False, True):
        model, (x, _) = network(torch.float32), data(24, torch.float32)
        opt = method(model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            opt.warm_start([(x[:12], None), (x[12:], None)])
        found.append(torch.cat([t.reshape(-1) for t in tensors(opt.state_dict())]))
    assert found[1].dtype == torch.float32
    assert 0 < torch.linalg.vector_norm(found[1] - found[0]) < 0.05 * torch.linalg.vector_norm(found[0])


def test_it_learns_in_half_precision():
    model, batch = network(torch.float32), data(24, torch.float32)
    opt, scaler = KFAC(model), torch.amp.GradScaler("cpu", init_scale=2.0**30)
    twin = copy.deepcopy(model)
    losses = []
    for _ in range(60):
        loss = cast(model, batch, torch.float16)
        opt.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        losses.append(loss.item())
    assert opt.diagnostics["overflows"] > 3
    assert opt.diagnostics["steps"] + opt.diagnostics["overflows"] == 60
    assert losses[-1] < losses[0] - 0.1
    other = KFAC(twin)
    assert step(other, twin, batch) == pytest.approx(losses[0], abs=1e-2)
