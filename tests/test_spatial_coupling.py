"""Coupling of places in kernels and of output positions, against contributions of single positions from automatic differentiation."""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch
from cases import make_case
from fisher_checks import QUIET, ZOO, case
from torch import Tensor, nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.errors import InputError, MemoryBudgetError, UnsupportedModuleError

pytestmark = pytest.mark.filterwarnings(QUIET)


@cache
def position_rows(name: str, layer: str) -> tuple[Tensor, tuple[int, ...]]:
    """What every output position adds to the score rows of a layer, ``(rows, T, p)``, and the shape of its map.

    One backward pass per example, column and position: that of the position's outputs times their scores.
    """
    model, (inputs, targets), likelihood = ZOO[name]()
    module, seen = model.get_submodule(layer), {}

    def record(_, args, out):
        seen["x"] = args[0].detach()
        seen["change"] = torch.zeros_like(out, requires_grad=True)
        return out.detach() + seen["change"]

    handle = module.register_forward_hook(record)
    outputs = model(inputs)
    handle.remove()
    f = reference.by_term(outputs, outputs, likelihood)  # (N, T, C)
    values, vectors = torch.linalg.eigh(reference.output_fisher(outputs.detach(), likelihood, targets))
    root = vectors * values.clamp(min=0).sqrt()[..., None, :]
    signals = [(f * root[..., r]).flatten(2)[:, t].sum() for t in range(f.shape[1]) for r in range(f.shape[2])]
    scores = [torch.autograd.grad(s, seen["change"], retain_graph=True)[0] for s in signals]
    conv = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    out = module(seen["x"])
    shape = out.shape[2:] if conv else out.shape[1:-1]
    parameters = list(module.parameters())
    rows = []
    for n in range(len(out)):
        for score in scores:
            each = []
            for place in itertools.product(*map(range, shape)):
                at = (n, slice(None), *place) if conv else (n, *place)
                found = torch.autograd.grad((out[at] * score[at]).sum(), parameters, retain_graph=True)
                each.append(torch.cat([g.reshape(-1) for g in found]))
            rows.append(torch.stack(each))
    return torch.stack(rows), tuple(shape)


CASES = [
    *(
        ("conv_stride", "0"),
        ("conv_padding", "0"),
        ("conv_groups", "0"),
        ("conv_depthwise", "0"),
        ("conv_no_bias", "0"),
    ),
    *(("conv_1d", "0"), ("conv_3d", "0"), ("conv_circular", "0"), ("segmentation", "0"), ("conv_one_position", "0")),
    *(("dense_on_positions", "0"), ("conv_one_by_one", "0"), ("batchnorm_2d", "0")),
]


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_positions_against_the_definition(name, layer, unchanged):
    c = case(name)
    F = c.fisher()
    u, shape = position_rows(name, layer)
    info = F.layout.layer(layer)
    assert torch.allclose(
        u.sum(1).T @ u.sum(1) / F.total_weight, c.matrix[info.start : info.stop, info.start : info.stop]
    )
    with unchanged(c.model):
        ds = fl.spatial_coupling(F, layer, grid=shape)
    traces, rho = reference.position_traces(u).numpy(), reference.position_coupling(u).numpy()
    places = np.array(list(np.ndindex(*shape)))
    distance = np.array([[round(math.dist(a, b)) for b in places] for a in places])
    upper = np.triu(np.ones_like(distance, dtype=bool))
    norms = np.array([(u[:, t].T @ u[:, t]).norm() for t in range(len(places))])
    sizes = np.array([u[:, t].square().sum() for t in range(len(places))])
    scale = F.n_rows * np.outer(norms, norms)
    there = upper & (scale > 0)  # an average may leave the last positions out
    floor = np.sqrt(np.outer(sizes, sizes) / np.where(scale > 0, scale, 1))
    assert ds["distance"].values.tolist() == list(range(distance.max() + 1))
    for d in ds["distance"].values:
        here = distance == d
        one = ds.sel(distance=d)
        assert one["trace_share"].item() == pytest.approx(traces[here].sum() / traces.sum(), rel=1e-10, abs=1e-12)
        assert one["num_pairs"] == (here & upper).sum()
        assert one["num_sampled_pairs"] == (here & there).sum()
        if not (here & there).any():
            assert one[["position_coupling", "position_noise_floor"]].isnull().all().to_array().all()
            continue
        assert one["position_coupling"].item() == pytest.approx(rho[here & there].mean(), rel=1e-10)
        assert one["position_noise_floor"].item() == pytest.approx(floor[here & there].mean(), rel=1e-10)
    assert ds["trace_share"].sum().item() == pytest.approx(1)
    assert ds["position_share"].item() == ds["trace_share"].values[0]
    assert ds["position_share"].item() == pytest.approx(1) or len(places) > 1


@pytest.mark.parametrize(("name", "layer"), [case for case in CASES if case[0] != "dense_on_positions"])
def test_places_in_the_kernel_against_the_matrix(name, layer):
    c = case(name)
    F = c.fisher()
    info = F.layout.layer(layer)
    T = c.matrix[info.start : info.stop, info.start : info.stop]
    window = info.weight.shape[2:]
    count = math.prod(window)
    kernels = torch.arange(info.weight.numel).view(-1, count)
    ds = fl.spatial_coupling(F, layer, grid=position_rows(name, layer)[1])
    blocks = list(kernels.T)
    assert np.abs(ds["kernel_coupling"].values ** 2 - reference.coupling(T, blocks).numpy() ** 2).max() < 1e-10
    assert np.allclose(ds["kernel_noise_floor"], reference.coupling_noise_floor(T, blocks, F.n_rows, 1), rtol=1e-10)
    scale = T.diagonal().sqrt()
    correlation = (T / scale.outer(scale)).numpy()
    mean = np.mean([correlation[np.ix_(k, k)] for k in kernels.numpy()], axis=0)
    assert np.allclose(ds["kernel_correlation"], mean, rtol=1e-9, atol=1e-12)
    assert list(ds["offset_i"].values) == [",".join(map(str, place)) for place in np.ndindex(*window)]


def test_dense_layers_have_positions_but_no_kernel():
    ds = fl.spatial_coupling(case("dense_on_positions").fisher(), "0")
    assert "kernel_coupling" not in ds
    assert ds["distance"].values.tolist() == [0, 1, 2]
    one = fl.spatial_coupling(case("mlp_tanh").fisher(), "0")
    assert one["position_share"].item() == pytest.approx(1)
    assert one["distance"].values.tolist() == [0]


@pytest.mark.parametrize("kind", ["mc", "empirical"])
def test_other_kinds_add_up_to_the_trace(kind):
    """A share of 1 in all, and the coupling of the layer's rows for one position."""
    F = case("conv_padding", kind).fisher()
    ds = fl.spatial_coupling(F, "0")
    assert ds["trace_share"].sum().item() == pytest.approx(1)
    assert ((ds["position_coupling"] >= 0) & (ds["position_coupling"] <= 1)).all()


def test_a_choice_of_positions():
    F = case("conv_padding").fisher()
    u, shape = position_rows("conv_padding", "0")
    some = np.sort(np.random.default_rng(7).permutation(16)[:5])
    rho = reference.position_coupling(u[:, some]).numpy()
    places = np.array(list(np.ndindex(*shape)))[some]
    distance = np.array([[round(math.dist(a, b)) for b in places] for a in places])
    ds = fl.spatial_coupling(F, "0", max_positions=5, seed=7)
    upper = np.triu(np.ones((5, 5), dtype=bool))
    for d in ds["distance"].values:
        here = (distance == d) & upper
        assert ds["num_sampled_pairs"].sel(distance=d) == here.sum()
        value = ds["position_coupling"].sel(distance=d).item()
        assert np.isnan(value) if not here.any() else value == pytest.approx(rho[here].mean())
    whole = fl.spatial_coupling(F, "0")
    assert np.array_equal(ds["trace_share"], whole["trace_share"])
    assert fl.spatial_coupling(F, "0", max_positions=5, seed=7).drop_attrs().equals(ds.drop_attrs())


def test_little_memory_and_float32_give_the_same():
    c = case("lenet")
    whole = fl.spatial_coupling(c.fisher(), "0")
    streamed = c.fisher(memory=4000)
    assert not streamed.plan.kept
    streamed.memory = 2**20
    model, (x, y), likelihood = ZOO["lenet"]()
    single = fl.Fisher(model.float(), (x.float(), y), likelihood=likelihood)
    for F, tolerance in ((streamed, 1e-10), (single, 1e-4)):
        ds = fl.spatial_coupling(F, "0")
        for name in whole:
            assert np.allclose(ds[name], whole[name], rtol=tolerance, atol=tolerance, equal_nan=True), name


def test_positions_that_are_alike_or_unrelated():
    """A constant image through a 1 by 1 convolution and an average: T positions say the same, each with 1/T of the trace."""
    model, _, likelihood = make_case(
        "alike", lambda: nn.Sequential(nn.Conv2d(1, 2, 1), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(2, 2)), (1, 3, 3)
    )
    x = torch.randn(6, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).expand(6, 1, 3, 3)
    F = fl.Fisher(model, (x.contiguous(), torch.zeros(6, dtype=torch.long)), likelihood=likelihood)
    ds = fl.spatial_coupling(F, "0", grid=(3, 3))
    assert ds["position_share"].item() == pytest.approx(1 / 9)
    assert np.allclose(ds["position_coupling"], 1)

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 1)

        def forward(self, x):
            return self.conv(x)[:, 0]  # every position is an output of its own

    x = torch.randn(30, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    F = fl.Fisher(Last().double(), (x, torch.zeros(30, 4, dtype=torch.float64)), likelihood="gaussian")
    ds = fl.spatial_coupling(F, "conv", grid=[4])
    assert ds["position_share"].item() == pytest.approx(1)
    assert np.allclose(ds["position_coupling"].values[1:], 0, atol=1e-7)


def test_what_is_refused():
    F = case("lenet").fisher()
    for value in (1, 2.5, True):
        with pytest.raises(InputError, match="max_positions must be an integer >= 2, the output positions"):
            fl.spatial_coupling(F, "0", max_positions=value)
    with pytest.raises(InputError, match="seed must be an integer >= 0"):
        fl.spatial_coupling(F, "0", seed=-1)
    for grid in ((8, 7), (64.0,), (8, True), "64", 64, (-8, -8)):
        with pytest.raises(
            InputError,
            match=r"grid must be the output positions along each axis of layer '0', 2 positive integers with the product 64; got",
        ):
            fl.spatial_coupling(F, "0", grid=grid)
    with pytest.raises(InputError, match=r"Unknown layer 'conv1'"):
        fl.spatial_coupling(F, "conv1")
    norm = case("batchnorm_first").fisher()
    with pytest.raises(UnsupportedModuleError, match="layer '0' is a BatchNorm2d, which has no output positions"):
        fl.spatial_coupling(norm, "0")
    with pytest.raises(
        InputError, match=r"Layer 'conv' is called several times: its 20 output positions lie on several maps"
    ):
        fl.spatial_coupling(case("conv_used_twice").fisher(), "conv")
    few = make_case("few", lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(32, 10)), (4, 4, 4))
    patches = fl.Fisher(few[0], few[1], likelihood=few[2])
    assert patches.plan["0"].storage == "patches"
    with pytest.raises(
        InputError,
        match=r"The shape of the map of 4 output positions of layer '0' is not known .* Pass grid=\(height, width\)",
    ):
        fl.spatial_coupling(patches, "0")
    assert fl.spatial_coupling(patches, "0", grid=(2, 2))["distance"].size == 2
    F.memory = 50_000
    with pytest.raises(MemoryBudgetError, match=r"A matrix over the 64 output positions of layer '0' needs 96\.0 KiB"):
        fl.spatial_coupling(F, "0")


def test_a_layer_that_is_never_called():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(3, 2), nn.Conv2d(1, 1, 2)

        def forward(self, x):
            return self.used(x)

    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    F = fl.Fisher(Unused(), (x, torch.zeros(5, dtype=torch.long)), likelihood="categorical")
    with pytest.raises(InputError, match="Layer 'idle' is never called on these data, so it has no output positions"):
        fl.spatial_coupling(F, "idle")
