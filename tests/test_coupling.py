"""Couplings against the reference, the level of chance, and p-values that find what was planted and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import make_case
from fisher_checks import KINDS, QUIET, ZOO, case, in_float32
from torch import Tensor, nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.coupling import kernels, strips, tiles
from fisherlens.coupling import norms as ways
from fisherlens.coupling.kernels import families, kernel_norms
from fisherlens.coupling.strips import matrix_norms, strip_norms
from fisherlens.coupling.tiles import BlockGrams, layer_norms, tile_norms
from fisherlens.errors import InputError, MemoryBudgetError, NonFiniteError

pytestmark = pytest.mark.filterwarnings(QUIET)
SCHEMES = {
    **{name: {} for name in ("layer", "parameter", "unit", "input", "channel", "kernel", "diagonal")},
    **{f"cw-ngd {v}": {"variant": v} for v in ("released", "2022", "2022-unit")},
    **{f"mbf {v}": {"variant": v} for v in ("A", "B")},
    "sequential": {"size": 7},
    "random": {"size": 7, "seed": 3},
}


def parts_of(F: fl.Fisher, scheme: str) -> fl.Partition:
    return fl.partition(F, scheme.split()[0], **SCHEMES[scheme])


def squares_of(T: Tensor, parts: fl.Partition) -> Tensor:
    """‖T_ij‖² of all pairs of blocks."""
    inside = torch.zeros(parts.num_blocks, len(T), dtype=T.dtype)
    for b, index in enumerate(parts.blocks):
        inside[b, index] = 1
    return inside @ T.square() @ inside.T


def check(F: fl.Fisher, T: Tensor, partition) -> None:
    parts = fl.partition(F, partition) if isinstance(partition, str) else partition
    ds = fl.coupling(F, parts, num_null=0)
    assert set(ds.data_vars) == {"coupling", "noise_floor", "block_norm"}
    blocks = list(parts.blocks)
    if len(blocks) <= 30:
        rho = reference.coupling(T, blocks).numpy()
    else:  # the same with fewer loops
        squares = squares_of(T, parts)
        scale = squares.diagonal().outer(squares.diagonal()).sqrt()
        rho = (squares / scale.where(scale > 0, 1)).sqrt().numpy()
    # what is computed is the square, of which entries below ε of the largest are rounding
    assert np.abs(ds["coupling"].values ** 2 - rho**2).max() < 1e-10
    floor = reference.coupling_noise_floor(T, blocks, F.n_rows, 1).numpy()
    assert np.allclose(ds["noise_floor"], floor, rtol=1e-10)
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
@pytest.mark.parametrize(
    "name",
    [
        *("fewer_parameters_than_examples", "mlp_tanh", "dense_on_positions", "conv_groups"),
        *("conv_one_position", "conv_1d", "conv_3d"),
    ],
)
def test_segments(name, scheme):
    c = case(name)
    F = c.fisher()
    check(F, c.matrix, parts_of(F, scheme))


@pytest.mark.parametrize("kind", ["mc", "empirical"])
@pytest.mark.parametrize("scheme", ["unit", "mbf B", "cw-ngd released", "random"])
def test_segments_of_other_kinds(scheme, kind):
    for name in ("mlp_tanh", "conv_groups", "segmentation"):
        c = case(name, kind)
        F = c.fisher()
        check(F, c.matrix, parts_of(F, scheme))


@pytest.mark.parametrize(
    "name", ["lstm", "tied_weights", "module_used_twice", "conv_used_twice", "layer_norm", "one_class"]
)
def test_layers_without_a_rule_or_used_twice(name):
    c = case(name)
    F = c.fisher()
    for scheme in ("layer", "unit", "random"):
        check(F, c.matrix, parts_of(F, scheme))
    assert np.isfinite(fl.coupling(F, num_null=3)["coupling"]).all()


def every_way(F: fl.Fisher, parts: fl.Partition):
    """Squares and traces by every way there is, with little memory and with much."""
    scores = F.scores
    if parts.scheme == "layer":
        yield "layers", layer_norms(scores)
    found = families(scores, parts.groups)
    if found:
        yield "kernels", kernel_norms(scores, parts, found)
    yield "matrix", matrix_norms(scores, parts)
    for room in (2**30, 20_000):
        yield f"tiles {room}", tile_norms(scores, parts, room)
        yield f"strips {room}", strip_norms(scores, parts, room)


@pytest.mark.parametrize("name", ["fewer_parameters_than_examples", "mlp_tanh", "lenet", "residual", "conv_groups"])
def test_all_ways_to_the_norms_agree(name, monkeypatch):
    """Through Gram matrices of layers or blocks, kernels over examples, the matrix itself, or strips of it, in pieces of any size."""
    monkeypatch.setattr(tiles, "CHUNK_BYTES", 3000)
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 3000)
    monkeypatch.setattr(strips, "_WIDTH", 5)
    c = case(name)
    F = c.fisher()
    order = torch.randperm(F.n_params, generator=torch.Generator().manual_seed(0))
    own = fl.partition(F, {"a": order[: F.n_params // 2], "b": order[F.n_params // 2 :]})
    seen = set()
    schemes = ("layer", "parameter", "unit", "mbf B", "cw-ngd released", "random") if F.n_params > 100 else SCHEMES
    for parts in (*(parts_of(F, scheme) for scheme in schemes), own):
        truth = squares_of(c.matrix, parts)
        traces = torch.stack([c.matrix.diagonal()[b].sum() for b in parts])
        for way, (squares, sizes) in every_way(F, parts):
            seen.add(way.split()[0])
            assert (squares / F.total_weight**2 - truth).abs().max() < 1e-12 * truth.max(), (parts.scheme, way)
            assert torch.allclose(sizes / F.total_weight, traces, rtol=1e-12), (parts.scheme, way)
            assert torch.equal(squares, squares.T)
    assert seen >= {"layers", "matrix", "tiles", "strips"}
    assert ("kernels" in seen) == (name in ("fewer_parameters_than_examples", "mlp_tanh"))


@pytest.mark.parametrize("examples", [3, 40])
def test_kernels_of_few_and_of_many_examples(examples):
    """A kernel of fewer features than examples is kept as its root; both forms, and pairs of a unit and an input, in two layers."""
    model, _, likelihood = make_case(
        "kernels", lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), (3,)
    )
    g = torch.Generator().manual_seed(1)
    data = torch.randn(examples, 3, generator=g, dtype=torch.float64), torch.randint(3, (examples,), generator=g)
    F, T = fl.Fisher(model, data, likelihood=likelihood), reference.fisher(model, data, likelihood)
    for scheme in ("unit", "input", "mbf B", "cw-ngd released", "cw-ngd 2022", "diagonal"):
        parts = parts_of(F, scheme)
        found = families(F.scores, parts.groups)
        squares, traces = kernel_norms(F.scores, parts, found)
        truth = squares_of(T, parts)
        assert (squares / examples**2 - truth).abs().max() < 1e-12 * truth.max()
        assert torch.allclose(traces / examples, torch.stack([T.diagonal()[b].sum() for b in parts]), rtol=1e-12)


@pytest.mark.parametrize("name", ["mlp_tanh", "lenet", "conv_groups"])
def test_gram_matrices_of_blocks_in_any_tile(name):
    F = case(name).fisher()
    scores, rows = F.scores, F.scores.rows
    every = scores.rows_at(torch.arange(rows))
    for scheme in ("layer", "parameter", "unit", "mbf B", "cw-ngd released", "random"):
        parts = parts_of(F, scheme)
        grams = BlockGrams(scores, parts)
        grams.room = 5000
        last = parts.num_blocks
        for blocks, rows_at, stop in ((slice(0, last), slice(0, rows), rows), (slice(last // 2, last), slice(3, 7), 7)):
            truth = torch.stack([every[rows_at][:, b] @ every[:stop][:, b].T for b in parts.blocks[blocks]])
            assert torch.allclose(
                grams.tile(blocks, rows_at, stop), truth, rtol=1e-12, atol=1e-13 * float(truth.abs().max())
            )


def test_the_way_follows_size_and_memory():
    small, wide = case("fewer_parameters_than_examples").fisher(), case("lenet").fisher()
    deep = case("mlp_tanh").fisher()
    words = {
        (wide, "layer"): "Gram matrices of the layers",
        (wide, "unit"): "tiles of Gram matrices",
        (deep, "unit"): "kernels over examples",
        (small, "unit"): "the matrix",
    }
    for (F, scheme), way in words.items():
        method = fl.coupling(F, scheme, num_null=0).attrs["method"]
        assert method == f"exact block norms ({way})", (scheme, method)
    assert fl.coupling(small, num_null=3).attrs["method"].endswith("layers), example permutation")


def test_layers_in_another_order_are_not_taken_for_the_layers():
    """Two layers of one size, named in the other order: the labels must follow."""
    model, data, likelihood = make_case(
        "alike", lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), (3,)
    )
    F = fl.Fisher(model, data, likelihood=likelihood)
    own = {"last": F.layout.index_of("2"), "first": F.layout.index_of("0")}
    check(F, reference.fisher(model, data, likelihood), fl.partition(F, own))
    straight = fl.coupling(F, num_null=0)["block_norm"].values
    assert np.allclose(fl.coupling(F, own, num_null=0)["block_norm"].values, straight[::-1])
    assert abs(straight[0] / straight[1] - 1) > 0.01
    a, b = fl.coupling(F, own, num_null=30), fl.coupling(F, "layer", num_null=30)
    assert a["coupling"].values[0, 1] == pytest.approx(b["coupling"].values[0, 1])


def test_many_examples_of_a_small_network():
    """Its Gram matrices would take 10 GiB; the matrix itself is small."""
    model, _, likelihood = make_case("tall", lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (3,))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(25_000, 3, generator=g, dtype=torch.float64)
    F = fl.Fisher(model, (x, torch.zeros(25_000, dtype=torch.long)), likelihood=likelihood)
    for partition in ("layer", "unit", "mbf"):
        check(F, F.dense(), partition)
    with pytest.raises(
        MemoryBudgetError, match=r"F\.gram\(\) is a matrix of order 25000, 9\.3 GiB .* over the budget of 2\.0 GiB"
    ):
        F.gram()


def test_scores_that_are_not_kept():
    c = case("mlp_tanh")
    for memory, path in ((2000, "linearised"), (1000, "streamed")):
        F = c.fisher(memory=memory)
        assert F.plan["0"].path == path
        for scheme in ("layer", "unit", "random"):
            check(F, c.matrix, parts_of(F, scheme))
        with pytest.raises(
            MemoryBudgetError, match=r"One row per example was asked of scores that are streamed.* Use num_null=0"
        ):
            fl.coupling(F, num_null=5)


def test_threads_do_not_matter():
    F = case("mlp_tanh").fisher()
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(fl.coupling(F, "unit", num_null=30))
    finally:
        torch.set_num_threads(before)
    for name in ("coupling", "noise_floor", "block_norm"):
        assert np.allclose(found[0][name], found[1][name], rtol=1e-12, atol=1e-12)
    for name in ("p_value", "p_adjusted", "q_value"):
        assert np.array_equal(found[0][name], found[1][name], equal_nan=True)


def test_couplings_that_fit_in_no_way(monkeypatch):
    F = case("mlp_tanh").fisher()
    monkeypatch.setattr(ways, "_LEAST", 100)
    with pytest.raises(
        MemoryBudgetError, match=r"couplings of 13 blocks need at least .* over the budget of 50 B.*num_sketches=8"
    ):
        ways.block_norms(F.scores, fl.partition(F, "unit"), 50)
    model, data, likelihood = make_case("wide", lambda: nn.Linear(29, 24), (29,), n=3)
    F = fl.Fisher(model, data, likelihood=likelihood, memory="16MiB")
    with pytest.raises(
        MemoryBudgetError,
        match=r"result for 720 blocks, 5 matrices of 720 by 720 numbers.* takes 19\.8 MiB, over the budget of 16\.0 MiB",
    ):
        fl.coupling(F, "diagonal", num_null=0)


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


# --- what is special and what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e12, 1e20])
def test_products_that_overflow_are_refused(size):
    """Scores that single precision holds, whose products it does not."""
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.fill_(1e-20)
        model[1].weight.copy_(torch.tensor([[1.0, 2.0, 0.5], [-1.0, 0.3, 1.0]]))
    x = size * torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    F = fl.Fisher(model, (x, torch.zeros(6, dtype=torch.long)), likelihood="categorical", kind="empirical")
    with pytest.raises(
        NonFiniteError, match=r"The couplings hold NaN or infinity.* Look for very large .* use a float64 model"
    ):
        fl.coupling(F, num_null=0)
    with pytest.raises(NonFiniteError, match="The couplings hold NaN or infinity"):
        fl.coupling(F, num_null=0, num_sketches=3)
    if size > 1e18:
        with pytest.raises(NonFiniteError, match="The couplings hold NaN or infinity"):
            fl.dependence(F, num_null=0)


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
