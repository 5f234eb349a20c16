"""Couplings against the reference, the level of chance, and p-values that find what was planted and nothing else."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from cases import fill, make_case
from fisher_checks import KINDS, QUIET, ZOO, case, in_float32
from torch import Tensor, nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.errors import InputError, MemoryBudgetError

pytestmark = pytest.mark.filterwarnings(QUIET)
SCHEMES = ("layer", "parameter", "unit", "channel", "kernel", "cw-ngd", "diagonal")


def check(F: fl.Fisher, T: Tensor, partition) -> None:
    parts = fl.partition(F, partition) if isinstance(partition, str) else partition
    ds = fl.coupling(F, parts, num_null=0)
    assert set(ds.data_vars) == {"coupling", "noise_floor", "block_norm"}
    blocks = list(parts.blocks)
    rho = reference.coupling(T, blocks).numpy()
    # entries below √ε of the largest are rounding: the norms are squared
    assert np.allclose(ds["coupling"], rho, rtol=1e-8, atol=3e-8)
    big = rho > 1e-3
    assert np.allclose(ds["coupling"].values[big], rho[big], rtol=1e-8)
    floor = reference.coupling_noise_floor(T, blocks, F.n_rows, 1).numpy()
    assert np.allclose(ds["noise_floor"], floor, rtol=1e-8)
    norms = [T[b][:, b].norm().item() for b in blocks]
    assert np.allclose(ds["block_norm"], norms, rtol=1e-10, atol=1e-14)
    assert np.array_equal(ds["coupling"], ds["coupling"].T)
    assert ((ds["coupling"] >= 0) & (ds["coupling"] <= 1)).all()
    on = np.diag(ds["coupling"])
    assert np.allclose(on[np.array(norms) > 0], 1)
    assert list(ds["block_i"].values) == list(ds["block_j"].values) == list(parts.labels)
    assert list(ds["size_i"].values) == list(parts.sizes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp_tanh", "conv_groups", "lenet", "segmentation", "residual", "frozen_first_layer"])
def test_layers(name, kind, unchanged):
    c = case(name, kind)
    F = c.fisher()
    with unchanged(c.model):
        check(F, c.matrix, "layer")
        check(F, c.matrix, "parameter")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["fewer_parameters_than_examples", "mlp_no_bias", "conv_no_bias", "batchnorm_first"])
def test_segments(name, scheme):
    c = case(name)
    check(c.fisher(), c.matrix, scheme)


WAYS = ("_layer_norms", "_gram_norms", "_matrix_norms", "_column_norms")


@pytest.mark.parametrize("name", ["fewer_parameters_than_examples", "lenet", "residual"])
def test_all_ways_to_the_norms_agree(name):
    """Through Gram matrices of layers or blocks, through the matrix itself, or through strips of it."""
    module, c = sys.modules["fisherlens.coupling"], case(name)
    F = c.fisher()
    order = torch.randperm(F.n_params, generator=torch.Generator().manual_seed(0))
    own = {"a": order[: F.n_params // 2], "b": order[F.n_params // 2 :]}
    for scheme in ("layer", "unit", own):
        parts = fl.partition(F, scheme)
        blocks = list(parts.blocks)
        truth = torch.stack([torch.stack([c.matrix[i][:, j].square().sum() for j in blocks]) for i in blocks])
        for way in WAYS if scheme == "layer" else WAYS[1:]:
            found = getattr(module, way)(F.scores, parts) / F.total_weight**2
            assert (found - truth).abs().max() < 1e-12 * truth.max(), way


def test_the_way_follows_size_and_memory(monkeypatch):
    module, called = sys.modules["fisherlens.coupling"], []
    for way in WAYS:
        original = getattr(module, way)
        monkeypatch.setattr(module, way, lambda *a, f=original, n=way: called.append(n) or f(*a))
    wide, tall = case("lenet").fisher(), case("fewer_parameters_than_examples").fisher()
    for F, scheme in ((wide, "layer"), (wide, "unit"), (tall, "unit")):
        check(F, case("lenet" if F is wide else "fewer_parameters_than_examples").matrix, scheme)
    assert called == ["_layer_norms", "_gram_norms", "_matrix_norms"]


def test_many_examples_of_a_small_network():
    """Its Gram matrices would take 10 GiB; the matrix itself is small."""
    model, _, likelihood = make_case("tall", lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (3,))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(25_000, 3, generator=g, dtype=torch.float64)
    F = fl.Fisher(model, (x, torch.zeros(25_000, dtype=torch.long)), likelihood=likelihood)
    check(F, F.dense(), "layer")
    with pytest.raises(
        MemoryBudgetError, match=r"F\.gram\(\) is a matrix of order 25000, 9\.3 GiB .* over the budget of 2\.0 GiB"
    ):
        F.gram()


def test_couplings_that_fit_in_no_way(monkeypatch):
    F = case("mlp_tanh").fisher()
    F.memory, F.scores.rows, F.scores.size = 10**6, 10**6, 10**6
    with pytest.raises(
        MemoryBudgetError, match=r"couplings of 3 blocks need at least .* over the budget of 976\.6 KiB"
    ):
        fl.coupling(F, num_null=0)


def test_float32():
    for name in ("mlp_tanh", "lenet", "fewer_parameters_than_examples"):
        F, T = in_float32(name), case(name).matrix
        for scheme in ("layer", "unit"):
            ds = fl.coupling(F, scheme, num_null=0)
            blocks = list(fl.partition(F, scheme).blocks)
            assert np.allclose(ds["coupling"], reference.coupling(T, blocks), rtol=1e-4, atol=1e-4)
            assert np.allclose(ds["noise_floor"], reference.coupling_noise_floor(T, blocks, F.n_rows, 1), rtol=1e-4)


def test_own_partitions_and_blocks_across_layers():
    c = case("mlp_tanh")
    order = torch.randperm(79, generator=torch.Generator().manual_seed(0))
    own = {"a": order[:30], "b": order[30:31], "c": order[31:]}
    F = c.fisher()
    check(F, c.matrix, fl.partition(F, own))
    check(F, c.matrix, fl.partition(F, "random", size=9))
    ds = fl.coupling(F, own, num_null=0)
    assert list(ds["block_i"].values) == ["a", "b", "c"]
    assert ds["layer_i"].values[0] == "(several)"


def test_inside_one_layer():
    c = case("lenet")
    part = c.fisher().restrict("7")
    at = slice(c.fisher().layout.layer("7").start, c.fisher().layout.layer("7").stop)
    check(part, c.matrix[at, at], "unit")


def test_weights_and_ignored_labels():
    model, (x, y), _ = ZOO["mlp_tanh"]()
    y = y.clone()
    y[3] = -100
    likelihood = fl.Categorical(weight=[0.5, 1.0, 4.0])
    F = fl.Fisher(model, (x, y), likelihood=likelihood)
    check(F, reference.fisher(model, (x, y), likelihood), "layer")
    ds = fl.coupling(F, num_null=20)
    assert np.isfinite(ds["p_value"].values[~np.eye(3, dtype=bool)]).all()


def test_zero_blocks():
    model, data, likelihood = ZOO["root_parameter"]()
    F = fl.Fisher(model, data, likelihood=likelihood)
    own = {"unused": F.layout.index_of("unused"), "scale": F.layout.index_of("scale"), "fc": F.layout.index_of("fc")}
    ds = fl.coupling(F, own, num_null=50)
    for name in ("coupling", "noise_floor"):
        assert (ds[name].sel(block_i="unused").values == 0).all()
        assert (ds[name].sel(block_j="unused").values == 0).all()
    assert ds["block_norm"].sel(block_i="unused").item() == 0
    for name in ("p_value", "p_adjusted"):
        values = ds[name].sel(block_i="unused")
        assert np.isnan(values.sel(block_j="unused"))
        assert (values.drop_sel(block_j="unused").values == 1).all()
    assert ds["p_value"].sel(block_i="scale", block_j="fc").item() < 0.2


def test_noise_floor_is_the_coupling_of_mixed_rows():
    """Root mean square over random rotations of one block's rows: what a finite sample gives to uncorrelated blocks."""
    c = case("mlp_tanh")
    F = c.fisher()
    U = F.scores.rows_at(torch.arange(14))
    a, b = U[:, :36], U[:, 36:64]
    g = torch.Generator().manual_seed(0)
    squares = []
    for _ in range(3000):
        q, r = torch.linalg.qr(torch.randn(14, 14, generator=g, dtype=torch.float64))
        q = q * r.diagonal().sign()
        squares.append((a.T @ q @ b).square().sum() / (a.T @ a).norm() / (b.T @ b).norm())
    floor = fl.coupling(F, num_null=0)["noise_floor"].values[0, 1]
    assert torch.stack(squares).mean().item() == pytest.approx(floor**2, rel=0.02)


# --- p-values --------------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Two layers side by side: each with inputs and an output of its own, or added to one output."""

    def __init__(self, planted: bool):
        super().__init__()
        self.left, self.right, self.planted = nn.Linear(3, 1), nn.Linear(3, 1), planted

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x[:, :3]), self.right(x[:, 3:])
        return left + right if self.planted else torch.cat([left, right], 1)


def two_heads(seed: int, planted: bool = False, n: int = 24) -> fl.Fisher:
    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        model = fill(Heads(planted).double(), g)
    x = torch.randn(n, 6, generator=g, dtype=torch.float64)
    if planted:
        x[:, 3:] = x[:, :3] + 0.5 * x[:, 3:]
    return fl.Fisher(model, (x, torch.zeros(n, 1 if planted else 2, dtype=torch.float64)), likelihood="gaussian")


def test_independent_blocks_are_found_at_the_nominal_rate():
    """Uniform p-values: neither too many small ones, nor none."""
    p = np.array([fl.coupling(two_heads(s), num_null=39, seed=s)["p_value"].values[0, 1] for s in range(200)])
    assert p.min() >= 1 / 40
    for level in (0.05, 0.25, 0.5, 0.75):
        expected, spread = 200 * level, (200 * level * (1 - level)) ** 0.5
        assert abs((p <= level + 1e-9).sum() - expected) < 3.5 * spread, level


def test_planted_couplings_are_found():
    found = [fl.coupling(two_heads(s, planted=True), num_null=99, seed=s) for s in range(20)]
    p = np.array([ds["p_value"].values[0, 1] for ds in found])
    assert np.mean(p <= 0.05) > 0.9
    assert all(ds["coupling"].values[0, 1] > ds["noise_floor"].values[0, 1] for ds in found)
    apart = [fl.coupling(two_heads(s), num_null=0)["coupling"].values[0, 1] for s in range(5)]
    assert max(apart) < 1e-7  # exactly no coupling in the exact Fisher


def test_layers_of_one_network_are_coupled():
    model, (x, y), likelihood = make_case(
        "coupled", lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,), n=60
    )
    ds = fl.coupling(fl.Fisher(model, (x, y), likelihood=likelihood), num_null=99)
    assert ds["p_value"].values[0, 1] <= 0.02
    assert ds["coupling"].values[0, 1] > 2 * ds["noise_floor"].values[0, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_adjusted_values_and_repeatability(kind):
    F = case("mlp_tanh", kind).fisher()
    a, b, c = (fl.coupling(F, "parameter", num_null=60, seed=s) for s in (1, 1, 2))
    off = ~np.eye(6, dtype=bool)
    for ds in (a, c):
        p, adjusted = ds["p_value"].values, ds["p_adjusted"].values
        assert np.isnan(np.diag(p)).all()
        assert np.array_equal(p[off], p.T[off])
        assert (adjusted[off] >= p[off]).all()
        assert ((p[off] >= 1 / 61) & (adjusted[off] <= 1)).all()
        assert np.allclose(p[off] * 61, np.round(p[off] * 61))
    assert a.drop_attrs().equals(b.drop_attrs())
    assert not np.array_equal(a["p_value"].values[off], c["p_value"].values[off])
    assert np.array_equal(a["coupling"].values, c["coupling"].values)


def test_adjusted_values_control_the_whole_family():
    """Four independent heads, six pairs: the smallest adjusted value is small as often as a single p-value may be."""

    class Four(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(2, 1) for _ in range(4))

        def forward(self, x):
            return torch.cat([head(part) for head, part in zip(self.heads, x.split(2, 1), strict=True)], 1)

    smallest, raw = [], []
    for seed in range(120):
        g = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            model = fill(Four().double(), g)
        x = torch.randn(20, 8, generator=g, dtype=torch.float64)
        F = fl.Fisher(model, (x, torch.zeros(20, 4, dtype=torch.float64)), likelihood="gaussian")
        ds = fl.coupling(F, num_null=39, seed=seed)
        smallest.append(np.nanmin(ds["p_adjusted"].values))
        raw.append(np.nanmin(ds["p_value"].values))
    hits, raw_hits = (np.array(smallest) <= 0.1).sum(), (np.array(raw) <= 0.1).sum()
    assert hits < 12 + 3.5 * (120 * 0.09) ** 0.5
    assert raw_hits > 30 > hits


def test_permutations_are_those_of_the_definition():
    """p-values again, from the reference's permuted blocks."""
    F = two_heads(3, n=9)
    sample = F.single_sample(7)
    U = sample.rows_at(torch.arange(9))
    generator = torch.Generator().manual_seed(7)
    blocks = [torch.arange(4), torch.arange(4, 8)]

    def squared(order):
        # U_iᵀ Π U_j: the norm of the block of the permuted matrix
        return reference.permuted_block(U, 1.0, *blocks, order).square().sum()

    null = torch.stack([squared(torch.randperm(9, generator=generator)) for _ in range(30)])
    expected = (1 + (null >= squared(torch.arange(9)) - 1e-12).sum().item()) / 31
    found = fl.coupling(F, num_null=30, seed=7)
    assert found["p_value"].values[0, 1] == pytest.approx(expected)


def test_single_blocks_and_single_examples():
    c = case("mlp_tanh")
    ds = fl.coupling(c.fisher().restrict("2"), "layer", num_null=5)
    assert ds["coupling"].shape == (1, 1)
    assert np.isnan(ds["p_value"].values).all()
    one = fl.Fisher(c.model, (c.data[0][:1], c.data[1][:1]), likelihood="categorical")
    ds = fl.coupling(one, num_null=5)
    assert (ds["p_value"].values[~np.eye(3, dtype=bool)] == 1).all()


def test_what_is_refused():
    F = case("mlp_tanh").fisher()
    for num_null in (-1, 1.5, True, "a"):
        with pytest.raises(InputError, match="num_null must be an integer >= 0"):
            fl.coupling(F, num_null=num_null)
    for seed in (-1, 1.5, None):
        with pytest.raises(InputError, match="seed must be an integer >= 0"):
            fl.coupling(F, seed=seed)
    with pytest.raises(InputError, match=r"'diagonal' has 79 blocks, so 6241 pairs; the limit is 20 blocks"):
        fl.coupling(F, "diagonal", max_blocks=20)
    with pytest.raises(InputError, match=r"Unknown .*'layres'.*Did you mean 'layer'"):
        fl.coupling(F, "layres")


def test_permutations_that_do_not_fit(monkeypatch):
    F = case("mlp_tanh").fisher()
    sample = F.single_sample(0)
    sample.n = 40_000
    monkeypatch.setattr(F, "single_sample", lambda seed: sample)
    with pytest.raises(
        MemoryBudgetError, match=r"permutation test of 3 blocks on 40000 examples needs .*Use num_null=0"
    ):
        fl.coupling(F)
