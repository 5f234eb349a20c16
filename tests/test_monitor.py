"""The Monitor: what it measures is what the dense twin says, and the training that it watches is the same to the bit."""

import copy
import functools
import json
import re
import warnings

import numpy as np
import pytest
import torch
from monitor_samples import (
    ROOT,
    TIMES,
    TOLERANCE,
    advance,
    close,
    images,
    numbers,
    points,
    regularised,
    seeded,
    sgd,
    small,
    tiny,
    watched,
)
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune

import fisherlens as fl
from fisherlens import reference as ref
from fisherlens.errors import InputError, NumericalWarning, UnsupportedModuleError
from fisherlens.results import load
from fisherlens.training.monitor import measure as measuring
from fisherlens.training.monitor import monitor as monitoring
from fisherlens.training.monitor.table import VARIABLES

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
    for with_monitor in (False, True):
        model = seeded(regularised)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what optimizers say of batch statistics
            torch.default_generator.manual_seed(7)
            opt = OPTIMIZERS[name](model)
            monitor = fl.Monitor(model, data, likelihood="categorical", every=2, k=3) if with_monitor else None
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


def test_numbers_out_of_numpy_arrays_are_numbers():
    model, data = seeded(small).double(), points()
    plain = fl.Monitor(model, data, likelihood="categorical", every=2, k=3, num_examples=8, seed=1)
    n = np.int64
    given = fl.Monitor(
        model,
        data,
        likelihood="categorical",
        every=n(2),
        k=n(3),
        num_examples=n(8),
        seed=n(1),
        max_share=np.float32(0.9),
    )
    assert given.step(at=n(1)) is False
    for monitor in (plain, given):
        monitor.measure(at=n(4))
    assert given.result.drop_vars(TIMES).equals(plain.result.drop_vars(TIMES))
    assert json.loads(json.dumps(given.state_dict()["made_of"])) == plain.state_dict()["made_of"]
