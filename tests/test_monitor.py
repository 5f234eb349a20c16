"""The Monitor: what it measures is what the dense twin says, and the training that it watches is the same to the bit."""

import copy
import functools
import io
import json
import re
import signal
import subprocess
import sys
import textwrap
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune

import fisherlens as fl
from fisherlens import reference as ref
from fisherlens.errors import InputError, NonFiniteError, NumericalWarning, UnsupportedModuleError
from fisherlens.results import load
from fisherlens.training.monitor import measure as measuring
from fisherlens.training.monitor import monitor as monitoring
from fisherlens.training.monitor.clock import stability_limit
from fisherlens.training.monitor.file import RunFile
from fisherlens.training.monitor.table import VARIABLES

ROOT = Path(__file__).parents[1]
HOWTO = ROOT / "docs" / "howto" / "diagnose_your_training.md"
TIMES = ["seconds", "monitor_seconds", "share_of_time"]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def numbers(n=12, dtype=torch.float64):
    x, y = points(n, dtype)
    return x[:, :1], y


def seeded(build, seed=3):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build()


def regularised():
    """Batch statistics and dropout, both at work in training."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 2),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(18, 4),
        nn.Tanh(),
        nn.Linear(4, 3),
    )


def small():
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3))


def tiny():
    """Fewer parameters than score rows."""
    return nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 3))


def images(n=12, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 4, 4, generator=generator, dtype=torch.float64).to(dtype), torch.arange(n) % 3


def points(n=12, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, generator=generator, dtype=torch.float64).to(dtype), torch.arange(n) % 3


def advance(model, opt, data, steps, monitor=None, seen=None):
    """The loop that a user writes, with what it draws from the global generator."""
    for _ in range(steps):
        loss = functional.cross_entropy(model(data[0]), data[1])
        opt.zero_grad()
        loss.backward()
        opt.step()
        if monitor is not None and monitor.step() and seen is not None:
            seen.append(copy.deepcopy(model).eval())
    return model


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1} | options)


def watched(model, data, steps, **options):
    """A Monitor that measures at the start and at each of some steps."""
    monitor = fl.Monitor(model, data, likelihood="categorical", every=1, **options)
    for _ in range(steps):
        monitor.step()
    return monitor


def close(measured, expected, tolerance):
    np.testing.assert_allclose(
        np.asarray(measured, float), np.asarray(expected, float), rtol=tolerance, atol=tolerance * 1e-2
    )


# --- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("build", "make", "side"), [(regularised, images, "Gram"), (tiny, numbers, "dense")])
def test_every_quantity_is_that_of_the_dense_matrices(build, make, side, dtype):
    model, data = seeded(build).to(dtype), make(dtype=dtype)
    k, damping, tolerance = 3, 0.02, TOLERANCE[dtype]
    monitor = fl.Monitor(model, data, likelihood="categorical", every=2, k=k, damping=damping, num_examples=7)
    seen = [copy.deepcopy(model).eval()]
    with torch.random.fork_rng(devices=[]):
        advance(model, sgd(model, lr=0.3), data, 5, monitor, seen)
    run = monitor.result
    assert run["step"].values.tolist() == [0, 2, 4]
    assert run["measured"].all()
    index = torch.randperm(12, generator=torch.Generator().manual_seed(0))[:7].sort().values
    chosen = data[0][index].double(), data[1][index]
    assert run.attrs["n_data"] == 7
    assert run.attrs["method"] == f"exact: eigenvalues of the {side} matrix in float64"
    dense = []
    for place, twin in enumerate(seen):
        twin = twin.double()
        F, g = ref.fisher(twin, chosen, "categorical"), ref.gradient(twin, chosen, "categorical")
        dense.append(F)
        here = run.isel(step=place)
        layout = fl.Fisher(twin, chosen, likelihood="categorical").layout
        blocks = [torch.arange(layer.start, layer.stop) for layer in layout.layers]
        assert here["layer"].values.tolist() == [*layout.layer_names, "all"]
        with torch.no_grad():
            loss = functional.cross_entropy(twin(chosen[0]), chosen[1])
        close(here["loss"], loss, tolerance)
        close(here["gradient_norm"], g.norm(), tolerance)
        close(here["trace"], [*(ref.trace(ref.block(F, b)) for b in blocks), ref.trace(F)], tolerance)
        close(here["eigenvalue"], ref.spectrum(F)[:k], tolerance)
        close(here["effective_dimension"], ref.effective_dimension(F, damping), tolerance)
        assert here["effective_dimension_sem"] == 0
        assert here["effective_dimension_low"] == here["effective_dimension"] == here["effective_dimension_high"]
        close(here["coupling"], ref.coupling(F, blocks), tolerance)
        close(here["coupling_floor"], ref.coupling_noise_floor(F, blocks, 7, 2), tolerance)
        assert here["space_size"] == k
        close(here["alignment"], ref.top_share(F, g, k), tolerance)
        close(here["chance"], k / len(g), 1e-15)
        close(here["alignment_chance_in_rows"], k / min(len(g), 14), 1e-15)
        close(here["gap"], ref.space_gap(F, k), tolerance)
        close(here["overlap_first"], ref.space_overlap(F, dense[0], k), tolerance)
        if place:
            close(here["overlap_previous"], ref.space_overlap(F, dense[-2], k), tolerance)
    assert np.isnan(run["overlap_previous"][0])
    assert (run["overlap_previous"][1:] < 1 - 1e-6).all()  # else nothing was compared


def test_iterations_take_over_where_the_matrix_is_large(monkeypatch):
    model, data = seeded(regularised).double(), images()
    exact = fl.Monitor(model, data, likelihood="categorical", k=3).result
    monkeypatch.setattr(measuring, "LARGEST_ORDER", 0)
    lanczos = functools.partial(measuring.top_eigenvalues, method="lanczos", tol=1e-9)
    monkeypatch.setattr(measuring, "top_eigenvalues", lanczos)
    iterated = fl.Monitor(model, data, likelihood="categorical", k=3, every=1)
    advance(model.eval(), sgd(model), data, 1, iterated)
    found = iterated.result
    assert found.attrs["method"].startswith("block Lanczos")
    for name in ("eigenvalue", "alignment", "gap", "effective_dimension"):
        close(found[name][0], exact[name][0], 1e-5)
    assert 0.3 < found["overlap_first"][-1] <= 1 + 1e-12


def test_the_smaller_of_two_spaces_counts():
    """Two examples of two classes give rank 2, which is all that the leading space can hold."""
    model = seeded(lambda: nn.Linear(3, 2).double())
    x = torch.eye(3, dtype=torch.float64)[:2]
    monitor = fl.Monitor(model, (x, torch.tensor([0, 1])), likelihood="categorical", k=5)
    first = monitor.result.isel(step=0)
    assert first["space_size"] == 2
    assert first["chance"] == 2 / 8
    assert first["gap"] == 1
    assert (first["eigenvalue"][2:].values == 0).all()
    close(first["alignment"], 1, 1e-10)  # the gradient lies in the row space
    assert first["overlap_first"] == pytest.approx(1)


def test_spaces_are_orthonormal_also_where_rounding_mixes_their_vectors():
    """In float32, vectors lifted from the Gram matrix lose their orthogonality as its eigenvalues spread."""
    model = seeded(lambda: nn.Linear(4, 1, bias=False))
    x = torch.tensor([[1.0, 1e-2, 0, 0], [1.0, -1e-2, 1e-2, 0], [1.0, 0, 2e-2, 1e-3]])
    run = fl.Monitor(model, (x, x[:, :1]), likelihood="gaussian", k=3).result
    assert run["space_size"] == 3
    close(run["overlap_first"], [1], 1e-5)


def test_quantities_are_those_asked_for():
    model, data = seeded(small), points(dtype=torch.float32)
    run = fl.Monitor(model, data, likelihood="categorical", quantities=["drift", "trace"]).result
    measured = set(run.data_vars) - {"lr", "stability_limit", *TIMES, "measured", "problem"}
    assert measured == {"trace", "overlap_first", "overlap_previous", "space_size", "gap", "chance"}
    unlabelled = fl.Monitor(model, (data[0], None), likelihood="categorical").result
    assert "trace" in unlabelled
    assert "loss" not in unlabelled
    assert "alignment" not in unlabelled
    with pytest.raises(
        InputError, match=r"^The quantity 'alignment' needs observed labels, but the data have targets=None\. Give"
    ):
        fl.Monitor(model, (data[0], None), likelihood="categorical", quantities="alignment")


def test_variables_are_labelled_documented_and_survive_a_file(tmp_path):
    model = seeded(small)
    monitor = fl.Monitor(
        model, points(dtype=torch.float32), likelihood="categorical", k=2, optimizer=sgd(model), kind="mc", mc_samples=3
    )
    run = monitor.result
    assert {name: run[name].dims[1:] for name in VARIABLES} == {name: dims for name, (_, dims, *_) in VARIABLES.items()}
    assert run["trace"].units == run["eigenvalue"].units == "nat"
    page = (ROOT / "docs" / "schema.md").read_text(encoding="utf-8")
    assert [name for name in run.variables if f"`{name}`" not in page] == []
    attrs = run.attrs
    expected = {
        "kind": "mc",
        "mc_samples": 3,
        "likelihood": "categorical",
        "n_data": 12,
        "n_params": 21,
        "dtype": "float32",
        "device": "cpu",
        "seed": 0,
    }
    assert {name: attrs[name] for name in expected} == expected
    assert json.loads(attrs["settings"])["optimizer"] == "SGD"
    assert load(fl.save(run, tmp_path / "run.nc")).identical(run)
    run["trace"][:] = 0
    assert (monitor.result["trace"] > 0).all()  # a result is a copy


@pytest.mark.parametrize(("form", "first"), [("loader", 5), ("dicts", 5), ("generator", 5), ("two inputs", None)])
def test_data_come_in_every_form_and_no_more_is_read_than_needed(form, first):
    x, y = points(20)
    model = seeded(small).double()
    read = []

    def batches():
        for start in range(0, 20, 4):
            read.append(start)
            yield x[start : start + 4], y[start : start + 4]

    data, expected = batches(), (x[:5], y[:5])
    if form == "loader":
        data = torch.utils.data.DataLoader(list(zip(x, y, strict=True)), batch_size=4)
    elif form == "dicts":
        data = [{"input": x[:4], "labels": y[:4]}, {"input": x[4:8], "labels": y[4:8]}]
    elif form == "two inputs":

        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = model

            def forward(self, a, b):
                return self.net(a + b)

        data, expected = ((x / 2, x / 2), y), (x, y)
        both = fl.Monitor(Two(), data, likelihood="categorical", num_examples=first, quantities="loss").result
    before = torch.get_rng_state()
    if form != "two inputs":
        both = fl.Monitor(model, data, likelihood="categorical", num_examples=first, quantities="loss").result
    assert torch.equal(torch.get_rng_state(), before)  # a loader draws a seed from the global generator
    assert read == ([0, 4] if form == "generator" else [])
    with torch.no_grad():
        close(both["loss"][0], functional.cross_entropy(model(expected[0]), expected[1]), 1e-10)


def test_examples_are_kept_as_they_were_and_chosen_by_the_seed():
    model, (x, y) = seeded(small).double(), points(40)
    monitor = fl.Monitor(model, (x, y), likelihood="categorical", num_examples=10, quantities="loss")
    other = fl.Monitor(model, (x, y), likelihood="categorical", num_examples=10, quantities="loss", seed=1)
    x.zero_()  # the buffer of a loader, say
    monitor.step(at=50)
    assert monitor.result["loss"][0] == monitor.result["loss"][1]
    assert monitor.result["loss"][0] != other.result["loss"][0]


# --- what is not touched ---------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda m: sgd(m, momentum=0.9),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
    "cw-ngd": lambda m: fl.optim.CWNGD(m, lr=0.05, damping=1e-2),
    "kfac": lambda m: fl.optim.KFAC(m, labels="sampled"),
}


@pytest.mark.filterwarnings("ignore:.*(batch statistics|treated as constants|no statistics|without statistics).*")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_the_same_to_the_bit(name):
    data = images(dtype=torch.float32)
    ends = []
    for watched in (False, True):
        model = seeded(regularised)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what optimizers say of batch statistics
            torch.default_generator.manual_seed(7)
            opt = OPTIMIZERS[name](model)
            monitor = fl.Monitor(model, data, likelihood="categorical", every=2, k=3) if watched else None
            advance(model, opt, data, 6, monitor)
            state = opt.state_dict()
            ends.append((model.state_dict(), torch.get_rng_state(), state))
            assert monitor is None or len(monitor.result["step"]) == 4
            assert model.training
    plain, seen = ends
    for key, value in plain[0].items():
        assert torch.equal(value, seen[0][key]), key
    assert torch.equal(plain[1], seen[1])
    buffers = [[x for x in _tensors(end[2])] for end in ends]
    assert len(buffers[0]) == len(buffers[1])
    assert all(torch.equal(a, b) for a, b in zip(*buffers, strict=True))


def _tensors(state):
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _tensors(value)


@pytest.mark.parametrize("at", ["measure", "Fisher", "eval_copy"])
def test_nothing_is_touched_also_where_it_raises(unchanged, monkeypatch, at):
    model, data = seeded(regularised), images(dtype=torch.float32)
    heard = []
    model[0].register_forward_hook(lambda *_: heard.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what optimizers say of batch statistics
        opt = fl.optim.CWNGD(model, lr=0.05, damping=1e-2)
        monitor = fl.Monitor(model, data, likelihood="categorical", every=1, strict=True, keep_hooks=False)
        advance(model, opt, data, 1)
    heard.clear()
    functional.cross_entropy(model(data[0]), data[1]).backward()
    heard.clear()
    with unchanged(model):
        monitor.step()
    with unchanged(model), torch.no_grad():
        monitor.step()
    with unchanged(model), torch.inference_mode():
        monitor.step()
    assert monitor.result["measured"].all()
    assert (monitor.result["trace"][-1] == monitor.result["trace"][-3]).all()

    def fail(*_, **__):
        torch.rand(3)
        raise RuntimeError("in the middle")

    monkeypatch.setattr(monitoring, at, fail)
    with unchanged(model), pytest.raises(RuntimeError, match=r"^in the middle$"):
        monitor.step()
    assert heard == []
    assert opt.diagnostics["steps"] == 1


def test_hooks_act_on_the_copy_only_if_told_so():
    model, data = seeded(small).double(), points()
    plain = fl.Monitor(model, data, likelihood="categorical", quantities="loss").result["loss"][0]
    model[2].register_forward_hook(lambda module, inputs, output: 2 * output)
    text = (
        "The Monitor analyses a copy of the network without a forward hook of '2' (Linear). If that only listens, nothing is amiss: keep_hooks=False says so and silences "
        "this. If it is part of what the network computes, the numbers are those of another network: pass keep_hooks=True."
    )
    with pytest.warns(NumericalWarning, match=f"^{re.escape(text)}$") as caught:
        monitor = watched(model, data, 1, quantities="loss")
    assert len(caught) == 1  # once
    assert monitor.result["loss"][0] == plain
    dropped = fl.Monitor(model, data, likelihood="categorical", quantities="loss", keep_hooks=False)
    assert dropped.result["loss"][0] == plain
    kept = fl.Monitor(model, data, likelihood="categorical", quantities="loss", keep_hooks=True).result["loss"][0]
    with torch.no_grad():
        close(kept, functional.cross_entropy(model(data[0]), data[1]), 1e-10)
    assert kept != plain


def test_torchs_own_hooks_and_what_a_forward_pass_left_are_part_of_the_network():
    model, data = seeded(small).double(), points()
    prune.l1_unstructured(model[0], "weight", amount=3)
    model(data[0])  # leaves a weight that is no leaf
    run = fl.Monitor(model, data, likelihood="categorical", quantities=["loss", "trace"]).result
    with torch.no_grad():
        close(run["loss"][0], functional.cross_entropy(model(data[0]), data[1]), 1e-10)


def test_a_forward_that_was_replaced_by_a_plain_function_is_not_called():
    model, data = seeded(small).double(), points()
    inner = model.forward
    model.forward = lambda x: inner(x)  # it would run the original, in train mode
    with pytest.warns(
        NumericalWarning, match=r"without a replaced forward of '\(root\)' \(Sequential\)\. If that only listens"
    ):
        run = fl.Monitor(model, data, likelihood="categorical", quantities=["trace"]).result
    assert (run["trace"] > 0).all()


def test_wrapped_networks_are_unwrapped():
    model, data = seeded(small).double(), points()
    plain = fl.Monitor(model, data, likelihood="categorical").result
    wrapped = fl.Monitor(nn.DataParallel(model), data, likelihood="categorical").result
    assert wrapped.drop_vars(TIMES).equals(plain.drop_vars(TIMES))
    compiled = nn.Module()
    compiled._orig_mod = model  # as torch.compile keeps it
    assert fl.Monitor(compiled, data, likelihood="categorical").result["trace"].equals(plain["trace"])


@pytest.mark.slow
def test_a_compiled_network_is_measured_as_it_is():
    model, data = seeded(small).double(), points()
    expected = fl.Monitor(model, data, likelihood="categorical").result["trace"]
    compiled = torch.compile(model, backend="eager")
    compiled(data[0]).sum().backward()
    assert fl.Monitor(compiled, data, likelihood="categorical").result["trace"].equals(expected)
    model.compile(backend="eager")
    model(data[0]).sum().backward()
    assert fl.Monitor(model, data, likelihood="categorical").result["trace"].equals(expected)
    assert model._compiled_call_impl is not None


def test_a_network_that_holds_its_monitor_and_one_that_cannot_be_copied():
    model, data = seeded(small), points(dtype=torch.float32)
    model.watch = fl.Monitor(model, data, likelihood="categorical", every=1)
    model.watch.step()
    assert model.watch.result.sizes["step"] == 2
    model.kept = [model(data[0])]
    with pytest.raises(
        UnsupportedModuleError, match=r"^The network cannot be copied \(RuntimeError: .*keep such things outside"
    ):
        fl.Monitor(model, data, likelihood="categorical")


# --- when something goes wrong ---------------------------------------------------------------------------------------


def test_non_finite_weights_are_noted_and_the_training_goes_on():
    model, data = seeded(small).double(), points()
    monitor = fl.Monitor(model, data, likelihood="categorical", every=1)
    weight = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.warns(
        NumericalWarning,
        match=r"^The Monitor could not measure step 1, which is NaN in its result; the training goes on, .*NonFiniteError: Parameter '0\.weight'",
    ) as caught:
        measured = [monitor.step() for _ in range(2)]
    assert measured == [True, True]
    assert len(caught) == 1
    assert Path(caught[0].filename) == Path(__file__)
    with torch.no_grad():
        model[0].weight.copy_(weight)
    monitor.step()
    run = monitor.result
    assert run["measured"].values.tolist() == [True, False, False, True]
    assert run["problem"].values[1].startswith("NonFiniteError: Parameter '0.weight' holds NaN")
    assert run["problem"].values[[0, 3]].tolist() == ["", ""]
    for name in ("loss", "trace", "eigenvalue", "coupling", "alignment", "overlap_previous", "effective_dimension"):
        assert np.isnan(run[name][1:3]).all(), name
    assert run["loss"][3] == run["loss"][0]
    assert run["overlap_previous"][3] == pytest.approx(1)  # with the last space that was measured
    assert run["seconds"].notnull().all()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"^Parameter '0\.weight' holds NaN or infinity"):
        fl.Monitor(model, data, likelihood="categorical", strict=True)
    with pytest.warns(NumericalWarning, match="could not measure step 0"):
        assert not fl.Monitor(model, data, likelihood="categorical").result["measured"].any()


def test_a_network_that_changes_its_shape_or_freezes():
    model, data = seeded(small), points(dtype=torch.float32)
    monitor = fl.Monitor(model, data, likelihood="categorical", every=1)
    model[0].requires_grad_(False)
    monitor.step()
    assert monitor.result["measured"].all()
    assert (monitor.result["trace"][1] == monitor.result["trace"][0]).all()
    assert not model[0].weight.requires_grad
    model[2] = seeded(lambda: nn.Linear(3, 4))
    with pytest.warns(
        NumericalWarning,
        match=r"InputError: The network has 25 of the monitored parameters, and had 21 when the Monitor was built",
    ):
        monitor.step()


def test_a_failing_logger_or_disk_is_told_once_and_nothing_is_lost(tmp_path, monkeypatch):
    model, data = seeded(small), points(dtype=torch.float32)
    received = []

    def broken(step, values):
        raise ConnectionError("no network")

    options = {"out": tmp_path / "run.nc", "to": [lambda step, values: received.append((step, values)), broken]}
    with pytest.warns(
        NumericalWarning,
        match=r"^The Monitor measured step 0 and could not hand it to broken; .*ConnectionError: no network",
    ) as caught:
        monitor = watched(model, data, 2, k=2, **options)
    assert len(caught) == 1
    with monkeypatch.context() as patch:
        patch.setattr(RunFile, "write", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.warns(NumericalWarning, match=r"step 3 and could not write .*run\.nc; .*OSError: full"):
            monitor.step()
    assert load(tmp_path / "run.nc")["step"].values.tolist() == [0, 1, 2]
    monitor.step()
    assert load(tmp_path / "run.nc").identical(monitor.result)
    assert [step for step, _ in received] == [0, 1, 2, 3, 4]
    values = received[0][1]
    assert values["trace/all"] == monitor.result["trace"].sel(layer="all")[0]
    assert values["eigenvalue/1"] == monitor.result["eigenvalue"][0, 1]
    assert values["coupling/max"] == monitor.result["coupling"][0, 0, 1]
    assert "overlap_previous" not in values  # not a number yet
    strict = fl.Monitor(model, data, likelihood="categorical", start=False, strict=True, to=[broken])
    with pytest.raises(ConnectionError, match="no network"):
        strict.measure()


# --- when it measures, and what that costs -----------------------------------------------------------------------------


def test_the_share_of_time_is_measured_and_kept_below_a_limit(monkeypatch):
    """One second per step and per measurement: with an eighth of the time, the k-th follows when the clock shows 8 k."""
    time = [0.0]
    fake = types.SimpleNamespace(perf_counter=lambda: time[0])
    monkeypatch.setattr("fisherlens.training.monitor.clock.time", fake)
    real = monitoring.measure

    def slow(*arguments):
        time[0] += 1
        return real(*arguments)

    monkeypatch.setattr(monitoring, "measure", slow)
    model, data = seeded(small), points(dtype=torch.float32)
    for every, steps, shares in ((5, [0, 14, 21, 28, 35], [1, 1 / 8, 1 / 8, 1 / 8, 1 / 8]), (20, [0, 20], [1, 2 / 22])):
        time[0] = 0.0
        monitor = fl.Monitor(model, data, likelihood="categorical", every=every, max_share=0.125, quantities="trace")
        for _ in range(36):
            time[0] += 1
            monitor.step()
        run = monitor.result
        assert run["step"].values.tolist() == steps
        np.testing.assert_allclose(run["share_of_time"], shares)
        np.testing.assert_allclose(run["monitor_seconds"], np.arange(1, len(steps) + 1))
        assert monitor.share_of_time == pytest.approx(len(steps) / (36 + len(steps)))
        assert f"{100 * monitor.share_of_time:.1f} % of the time" in repr(monitor)


def test_the_share_of_a_real_run_counts_everything(tmp_path):
    model, data = seeded(small), points(dtype=torch.float32)
    with fl.Monitor(model, data, likelihood="categorical", every=3, out=tmp_path / "run.nc") as monitor:
        advance(model, sgd(model), data, 7, monitor)
    run = monitor.result
    assert run["step"].values.tolist() == [0, 3, 6]
    assert (run["seconds"].diff("step") > 0).all()
    assert (run["monitor_seconds"] <= run["seconds"]).all()
    np.testing.assert_allclose(run["share_of_time"], run["monitor_seconds"] / run["seconds"], rtol=0.05)
    assert 0 < monitor.share_of_time < 1
    shown = r"^Monitor\(every=3, N=12, P=21, loss, trace, .*drift: 3 measurements, the last at step 6; \d+\.\d % of the time, out='.*run\.nc'\)$"
    assert re.match(shown, repr(monitor))
    assert not monitor.step()  # closed
    monitor.close()


def test_steps_may_be_counted_by_others_and_may_go_back():
    model, data = seeded(small), points(dtype=torch.float32)
    monitor = fl.Monitor(model, data, likelihood="categorical", every=10)
    assert [monitor.step(at=at) for at in (4, 10, 10, 19, 25)] == [False, True, False, False, True]
    assert monitor.result["step"].values.tolist() == [0, 10, 25]
    assert not monitor.step(at=12)
    assert monitor.result["step"].values.tolist() == [0, 10]
    monitor.measure()
    monitor.measure()
    monitor.measure(at=13)
    assert np.isnan(monitor.result["overlap_previous"].values[:3]).tolist() == [
        True,
        False,
        True,
    ]  # what was dropped is no earlier one
    assert monitor.result["overlap_previous"][3] == pytest.approx(1)
    assert monitor.result["step"].values.tolist() == [0, 10, 12, 13]
    with pytest.raises(
        InputError, match=r"^at must be the number of optimizer steps so far, an integer >= 0; got -1\.$"
    ):
        monitor.step(at=-1)
    late = fl.Monitor(model, data, likelihood="categorical", every=2, start=False)
    assert [late.step() for _ in range(4)] == [False, True, False, True]
    assert late.result["step"].values.tolist() == [2, 4]


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"momentum": 0.5, "nesterov": True}, {"momentum": 0.9, "weight_decay": 7.0}]
)
def test_the_stability_limit_is_where_descent_on_a_quadratic_turns_into_divergence(options):
    sizes = []
    for factor in (0.97, 1.03):
        x = nn.Parameter(torch.ones(1, dtype=torch.float64))
        opt = torch.optim.SGD([x], lr=0.1, **options)
        curvature = factor * stability_limit(opt)
        for _ in range(300):
            x.grad = curvature * x.detach()
            opt.step()
        sizes.append(abs(x.item()))
    assert sizes[0] < 1e-1
    assert sizes[1] > 1e1


def test_learning_rates_are_recorded_and_the_limit_only_where_it_holds():
    model, data = seeded(small), points(dtype=torch.float32)
    opt = sgd(model, lr=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    monitor = fl.Monitor(model, data, likelihood="categorical", every=1, quantities="trace", optimizer=opt)
    advance(model, opt, data, 1)
    schedule.step()
    monitor.step()
    assert monitor.result["lr"].values.tolist() == [0.5, 0.25]
    assert monitor.result["stability_limit"].values.tolist() == [4, 8]
    adam = fl.Monitor(
        model, data, likelihood="categorical", quantities="trace", optimizer=torch.optim.Adam(model.parameters())
    )
    assert adam.result["lr"].values.tolist() == [1e-3]
    assert adam.result["stability_limit"].isnull().all()
    assert fl.Monitor(model, data, likelihood="categorical", quantities="trace").result["lr"].isnull().all()
    assert np.isnan(stability_limit(sgd(model, momentum=0.9, dampening=0.1)))


# --- files and states ------------------------------------------------------------------------------------------------


def test_a_file_of_another_run_is_not_written_over(tmp_path):
    model, data, path = seeded(small), points(dtype=torch.float32), tmp_path / "run.nc"
    options = {"likelihood": "categorical", "every": 2, "k": 2, "out": path}
    with fl.Monitor(model, data, **options) as first:
        advance(model, sgd(model), data, 5, first)
    assert load(path).identical(first.result)
    bytes_before = path.read_bytes()
    text = f"{path} is there already, and a Monitor does not write over another run. Name another file, replace it with existing='replace', or go on with the run that it holds"
    with pytest.raises(InputError, match="^" + re.escape(text)):
        fl.Monitor(model, data, **options)
    with pytest.raises(
        InputError,
        match=r"run\.nc is no record of this run: it holds .*Build it with the arguments of the earlier part",
    ):
        fl.Monitor(model, data, **options | {"k": 3}, existing="continue")
    with pytest.raises(InputError, match="is no record of this run"):
        fl.Monitor(nn.Linear(2, 3), data, **options, existing="continue")
    assert path.read_bytes() == bytes_before
    on = fl.Monitor(model, data, **options, existing="continue")
    assert on.steps == 4
    assert on.result.drop_vars("problem").equals(first.result.drop_vars("problem"))
    advance(model, sgd(model), data, 2, on)
    run = load(path)
    assert run["step"].values.tolist() == [0, 2, 4, 6]
    assert run.sel(step=[0, 2, 4])["eigenvalue"].equals(first.result["eigenvalue"])
    assert (run["seconds"].diff("step") > 0).all()
    fl.Monitor(model, data, **options, existing="replace")
    assert load(path)["step"].values.tolist() == [0]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    data = images(dtype=torch.float32)
    options = {"likelihood": "categorical", "every": 2, "k": 3}

    def built(out=None, **more):
        model = seeded(regularised).eval()  # dropout is not the matter here
        opt = sgd(model, momentum=0.9)
        return model, opt, fl.Monitor(model, data, optimizer=opt, out=out, **options, **more)

    model, opt, whole = built()
    advance(model, opt, data, 9, whole)
    path = tmp_path / "run.nc"
    model, opt, part = built(path)
    advance(model, opt, data, 5, part)
    kept = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict(), "monitor": part.state_dict()}, kept)
    advance(model, opt, data, 2, part)  # killed after these, which are then taken again
    assert load(path)["step"].values.tolist() == [0, 2, 4, 6]
    kept.seek(0)
    state = torch.load(kept, weights_only=True)
    model, opt, again = built(path, existing="continue", start=False)
    model.load_state_dict(state["model"])
    opt.load_state_dict(state["opt"])
    again.load_state_dict(state["monitor"])
    assert again.steps == 5
    advance(model, opt, data, 4, again)
    for run in (again.result, load(path)):
        assert run.drop_vars(TIMES).equals(whole.result.drop_vars(TIMES))
    assert (again.result["monitor_seconds"].diff("step") > 0).all()
    other = fl.Monitor(model, data, likelihood="categorical", k=4, start=False)
    with pytest.raises(
        InputError,
        match=r"^The state is that of another Monitor: k 3 there and 4 here\. Build it with the same network",
    ):
        other.load_state_dict(state["monitor"])
    with pytest.raises(InputError, match=r"^The state is that of another Monitor"):
        other.load_state_dict({})


@pytest.mark.slow
def test_a_killed_run_leaves_every_finished_measurement(tmp_path):
    path = tmp_path / "run.nc"
    program = f"""
        import torch, fisherlens as fl
        from torch import nn
        model = nn.Linear(3, 3)
        data = torch.randn(9, 3), torch.arange(9) % 3
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = fl.Monitor(model, data, likelihood="categorical", every=1, k=2, out={str(path)!r})
        while True:
            loss = nn.functional.cross_entropy(model(data[0]), data[1])
            opt.zero_grad(); loss.backward(); opt.step()
            monitor.step()
            print(monitor.steps, flush=True)
    """
    for seen in (1, 4):
        path.unlink(missing_ok=True)
        command = [sys.executable, "-c", textwrap.dedent(program)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
            for _ in range(seen):
                last = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
            process.wait()
        run = load(path)
        assert run["step"].values.tolist() == list(range(run.sizes["step"]))
        assert run.sizes["step"] > last
        assert run["measured"].all()


# --- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"every": 0}, InputError, "every must be an integer >= 1, the optimizer steps between measurements; got 0."),
        ({"k": 2.0}, InputError, "k must be an integer >= 1, the number of leading eigenvalues; got 2.0."),
        (
            {"num_examples": -1},
            InputError,
            "num_examples must be an integer >= 1, the number of monitored examples, or None for all; got -1.",
        ),
        ({"damping": 0}, InputError, "damping must be a finite number > 0; got 0."),
        ({"kind": "hessian"}, InputError, "Unknown kind 'hessian'. "),
        ({"existing": "append"}, InputError, "Unknown option existing= 'append'. "),
        ({"quantities": ["traces"]}, InputError, "Unknown quantity 'traces'. Did you mean 'trace'?"),
        ({"quantities": []}, InputError, "quantities is empty, so there is nothing to measure. Known: loss, "),
        (
            {"max_share": 5},
            InputError,
            "max_share must be a number between 0 and 1, a share of the wall time such as 0.05, or None; got 5.",
        ),
        ({"strict": 1}, TypeError, "strict must be True or False; got 1."),
        ({"keep_hooks": "all"}, TypeError, "keep_hooks must be True, False or None; got 'all'."),
        (
            {"to": ["tensorboard"]},
            TypeError,
            "to= takes functions (step, values), such as fl.adapters.tensorboard('runs/'); got str.",
        ),
        ({"likelihood": nn.CrossEntropyLoss()}, TypeError, "likelihood must be a name or a fisherlens likelihood"),
        ({"params": ["2.wight"]}, InputError, "Unknown parameter or pattern '2.wight'. Did you mean '2.weight'?"),
        ({"seed": -1}, InputError, "seed must be an integer >= 0; got -1."),
    ],
)
def test_wrong_arguments_show_before_the_training(options, error, text, unchanged):
    model = seeded(small)
    with unchanged(model), pytest.raises(error, match="^" + re.escape(text)):
        fl.Monitor(model, points(dtype=torch.float32), **{"likelihood": "categorical"} | options)


def test_wrong_models_and_data_show_before_the_training():
    model, (x, y) = seeded(small), points(dtype=torch.float32)
    with pytest.raises(TypeError, match=r"^model must be the torch\.nn\.Module that is being trained; got function\.$"):
        fl.Monitor(seeded, (x, y), likelihood="categorical")
    with pytest.raises(
        InputError, match=r"^data must be \(inputs, targets\), or batches of them such as a DataLoader; got Tensor\."
    ):
        fl.Monitor(model, x, likelihood="categorical")
    with pytest.raises(InputError, match=r"^The data to monitor are empty: no batch was found\."):
        fl.Monitor(model, [], likelihood="categorical")
    with pytest.raises(InputError, match=r"^Label 3 in .* is outside 0\.\.2"):
        fl.Monitor(model, (x, y + 1), likelihood="categorical")
    with pytest.raises(NonFiniteError, match="hold NaN or infinity, first at example 0"):
        fl.Monitor(model, (x * torch.nan, y), likelihood="categorical")


# --- the picture and the page ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page():
    """The names that the how-to's code defines, and what it printed."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    cells = re.findall(r"```\{code-cell\} python3\n(.*?)```", HOWTO.read_text(encoding="utf-8"), flags=re.DOTALL)
    printed = []
    names = {"__name__": "page", "print": lambda *words: printed.append(" ".join(map(str, words)))}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("error")
        for cell in cells:
            exec(compile(cell, str(HOWTO), "exec"), names)  # noqa: S102 - the page's own code is what is tested
    yield names | {"printed": printed}
    matplotlib.pyplot.close("all")


def test_the_page_runs_and_shows_what_its_text_says(page):
    run = page["run"]
    assert run["step"].values.tolist() == list(range(0, 184, 20))
    assert run["loss"][-1] < run["loss"][0] / 2
    assert page["printed"][0].startswith("Monitor(every=20, N=64, P=2410, ")
    assert list(page["panels"]) == [
        "loss",
        "trace",
        "eigenvalue",
        "effective_dimension",
        "alignment",
        "drift",
        "coupling",
        "share_of_time",
    ]
    assert (run["stability_limit"] == 10).all()
    assert (run["alignment"] > 10 * run["chance"]).any()
    assert page["printed"][-1] == f"{page['monitor'].steps} {run.sizes['step']}"


def test_the_picture(page):
    run, panels = page["run"], page["panels"]
    lines = {name: [line.get_label() for line in ax.get_lines()] for name, ax in panels.items()}
    assert lines["trace"][-1] == "whole network"
    assert panels["eigenvalue"].get_yscale() == "log"
    assert lines["eigenvalue"] == [
        "largest",
        *lines["eigenvalue"][1:4],
        "5th largest",
        "stability limit",
    ]
    assert lines["alignment"] == ["gradient", "random, row space", "random"]
    np.testing.assert_allclose(panels["alignment"].get_lines()[0].get_ydata(), run["alignment"])
    np.testing.assert_allclose(panels["eigenvalue"].get_lines()[-1].get_ydata(), run["stability_limit"])
    assert {ax.get_xlabel() for ax in panels.values()} == {"optimizer steps"}
    assert panels["loss"].get_ylabel().replace("\n", " ") == "mean loss on the monitored examples [nat]"


def test_options_of_the_picture(page):
    import matplotlib.pyplot as plt

    run = page["run"].copy(deep=True)
    run["measured"][3] = False
    for name in ("loss", "trace"):
        run[name][3] = np.nan
    before = run.copy(deep=True)
    left, right = plt.subplots(1, 2)[1]
    drawn = fl.plot.monitor(
        run,
        {"loss": left, "trace": right},
        panels=["trace", "loss"],
        layers="all",
        x="seconds",
        scale="linear",
        legend=False,
    )
    assert list(drawn) == ["trace", "loss"]
    assert drawn["trace"] is right
    assert len(right.get_lines()) == 2  # the curve, and the step that was not measured
    assert right.get_yscale() == "linear"
    assert left.get_xlabel() == "wall time since the start [s]"
    assert right.get_legend() is None
    assert run.identical(before)
    bare = fl.plot.monitor(run, panels=["alignment", "eigenvalue"], show_chance=False, show_limit=False)
    assert [len(ax.get_lines()) for ax in bare.values()] == [2, 6]
    plt.close("all")


def test_the_picture_refuses_what_it_cannot_draw(page):
    run = page["run"]
    with pytest.raises(
        TypeError, match=r"^plot\.monitor draws the Dataset of fl\.Monitor, monitor\.result; got Monitor\.$"
    ):
        fl.plot.monitor(page["monitor"])
    with pytest.raises(InputError, match=r"^Unknown panel 'eigenvalues'\. Did you mean 'eigenvalue'"):
        fl.plot.monitor(run, panels=["eigenvalues"])
    with pytest.raises(InputError, match=r"^The panel 'drift' was not measured; this result holds loss, trace"):
        fl.plot.monitor(run.drop_vars("overlap_previous"), panels="drift")
    with pytest.raises(InputError, match=r"^Unknown layer 'conv'\."):
        fl.plot.monitor(run, panels="trace", layers="conv")
    with pytest.raises(InputError, match=r"'loss' is missing\. Give it, or name other panels\.$"):
        fl.plot.monitor(run, {}, panels="loss")
    with pytest.raises(
        InputError, match=r"^plot\.monitor draws the result of fl\.Monitor; this Dataset has none of its variables"
    ):
        fl.plot.monitor(run[["lr"]])
    nothing = run.assign(measured=run["measured"] & False)
    with pytest.raises(InputError, match=r"^plot\.monitor found no step that was measured\."):
        fl.plot.monitor(nothing)
