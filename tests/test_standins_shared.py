"""Blocks of a dense layer that share their mean, as MBF keeps them, against their dense twin."""

from __future__ import annotations

import pytest
import torch
from fisher_checks import KINDS, QUIET, case, error, in_float32
from standin_checks import check_standin, families
from test_fisher_streamed import of_path
from torch import nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.approximations import SharedBlockDiagonal, SharedBlocks
from fisherlens.errors import InputError, MemoryBudgetError
from fisherlens.scores.dense import DenseScores

pytestmark = pytest.mark.filterwarnings(QUIET)
NAMES = [
    *("softmax_regression", "fewer_parameters_than_examples", "mlp_tanh", "mlp_no_bias", "frozen_first_layer"),
    *(
        "dense_on_positions",
        "module_used_twice",
        "lenet",
        "conv_groups",
        "conv_3d",
        "batchnorm_2d",
        "tied_weights",
        "lstm",
    ),
]


def shared(F: fl.Fisher, scheme: str = "mbf", **options) -> tuple[fl.BlockDiagonal, list[list[torch.Tensor]]]:
    parts = fl.partition(F, scheme, **options)
    return fl.BlockDiagonal(F, parts, shared=True), families(F, parts)


@pytest.mark.parametrize("variant", ["A", "B"])
@pytest.mark.parametrize("name", NAMES)
def test_mbf(name, variant, unchanged):
    c = case(name)
    F = c.fisher()
    with unchanged(c.model):
        A, groups = shared(F, variant=variant)
        check_standin(A, c.matrix, reference.shared_blocks(c.matrix, groups), c.vectors())
    assert isinstance(A, SharedBlockDiagonal)
    assert A.name == "mbf shared"
    assert repr(A).startswith(f"BlockDiagonal('mbf', shared, {A.partition.num_blocks} blocks, P={F.n_params}, ")


def test_by_name_it_is_variant_b():
    c = case("mlp_tanh")
    F = c.fisher()
    assert torch.equal(fl.BlockDiagonal(F, "mbf", shared=True).dense(), shared(F, variant="B")[0].dense())
    assert type(fl.BlockDiagonal(F, "mbf")) is fl.BlockDiagonal
    assert type(fl.BlockDiagonal(F, "mbf", shared=False)) is fl.BlockDiagonal


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["A", "B"])
def test_every_kind(kind, variant):
    for name in ("mlp_tanh", "dense_on_positions"):
        c = case(name, kind)
        A, groups = shared(c.fisher(), variant=variant)
        check_standin(A, c.matrix, reference.shared_blocks(c.matrix, groups), c.vectors(), layers=False)


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("unit", {}),
        ("input", {}),
        ("layer", {}),
        ("parameter", {}),
        ("kernel", {}),
        ("cw-ngd", {}),
        ("diagonal", {}),
        ("sequential", {"size": 7}),
    ],
)
def test_any_partition(scheme, options):
    for name in ("mlp_tanh", "lenet"):
        c = case(name)
        A, groups = shared(c.fisher(), scheme, **options)
        check_standin(
            A, c.matrix, reference.shared_blocks(c.matrix, groups), c.vectors(), layers=scheme != "sequential"
        )


@pytest.mark.parametrize("path", ["streamed", "linearised"])
@pytest.mark.parametrize("variant", ["A", "B"])
def test_scores_that_are_not_kept(path, variant):
    for name in ("mlp_tanh", "conv_groups"):
        c = case(name)
        F = of_path(c, path)
        F.memory = 2**30
        A, groups = shared(F, variant=variant)
        check_standin(A, c.matrix, reference.shared_blocks(c.matrix, groups), c.vectors(), layers=False)


@pytest.mark.parametrize("variant", ["A", "B"])
def test_float32(variant):
    c = case("mlp_tanh")
    A, groups = shared(in_float32("mlp_tanh"), variant=variant)
    twin = reference.shared_blocks(c.matrix, groups)
    check_standin(A, c.matrix, twin, c.vectors(), tol=1e-5, split=1e-4, layers=False)


@pytest.mark.parametrize("variant", ["A", "B"])
def test_small_chunks_and_parts(variant, monkeypatch):
    monkeypatch.setattr("fisherlens.approximations.pieces.CHUNK_BYTES", 300)
    monkeypatch.setattr("fisherlens.scores.base.PART", 2)
    for name in ("mlp_tanh", "dense_on_positions", "module_used_twice", "tied_weights"):
        c = case(name)
        A, groups = shared(c.fisher(), variant=variant)
        check_standin(A, c.matrix, reference.shared_blocks(c.matrix, groups), c.vectors(), layers=False)


def test_the_effective_dimension_of_every_block():
    c = case("mlp_tanh")
    A, _ = shared(c.fisher())
    T = A.dense()
    own = [reference.effective_dimension(T[b][:, b], 0.05) for b in A.partition.blocks]
    assert error(A.effective_dimension(0.05), torch.tensor(own, dtype=torch.float64)) < 1e-10


def test_blocks_that_are_equal_lose_nothing():
    """One output and a Gaussian likelihood: g is 1, so the blocks by input hold the second moments of the inputs."""
    x = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    F = fl.Fisher(nn.Linear(2, 3).double(), (x, torch.zeros(3, 3).double()), likelihood="gaussian")
    A = fl.BlockDiagonal(F, "mbf", shared=True)
    assert A.within_block_error() < 1e-14
    assert error(A.dense(), fl.BlockDiagonal(F, "mbf").dense()) < 1e-14
    assert A.storage_bytes == 3 * 3 * 8


def test_a_wide_layer_keeps_one_small_matrix(monkeypatch):
    x = torch.randn(8, 900, generator=torch.Generator().manual_seed(0))
    F = fl.Fisher(nn.Linear(900, 40), (x, torch.arange(8)), likelihood="categorical")

    def refuse(*_):
        raise AssertionError("explicit columns")

    monkeypatch.setattr(DenseScores, "columns", refuse)
    for variant, size in (("A", 901), ("B", 40)):
        A, _ = shared(F, variant=variant)
        assert A.storage_bytes == 4 * size**2
        assert [type(blocks) for _, blocks in A._parts] == [SharedBlocks]
        spread = A.within_block_error()
        assert 0 < spread < F.frobenius_norm() ** 2
        assert A.trace() == pytest.approx(F.trace(), rel=1e-4)
        assert torch.isfinite(A.solve(F.gradient(), 1e-3)).all()


@pytest.mark.parametrize("name", ["mlp_tanh", "lenet", "dense_on_positions"])
def test_spectra(name):
    for variant in ("A", "B"):
        A, groups = shared(case(name).fisher(), variant=variant)
        twin = reference.shared_blocks(case(name).matrix, groups)
        found = fl.spectrum(A)
        values = torch.from_numpy(found["eigenvalue"].values)
        assert error(values, reference.spectrum(twin)[: len(values)]) < 1e-10
        assert int(found["num_above_noise"]) == int(torch.linalg.matrix_rank(twin, hermitian=True, rtol=1e-12))
        by_layer = fl.spectrum(A, by="layer", vectors=True)
        for layer in A.layout.layers:
            own = by_layer.sel(layer=layer.name)
            at = slice(layer.start, layer.stop)
            truth = reference.spectrum(twin[at, at])
            assert error(torch.from_numpy(own["eigenvalue"].values[: len(truth)]), truth) < 1e-9
        every = fl.spectrum(A, by=A.partition)
        assert int(every["rank_bound"].max()) <= A.partition.largest_block


def test_what_is_refused():
    F = case("mlp_tanh").fisher()
    with pytest.raises(
        TypeError,
        match=r"shared must be True or False; got 'yes'\. True replaces the blocks of one size in a dense layer by their mean",
    ):
        fl.BlockDiagonal(F, "mbf", shared="yes")
    other = fl.partition(case("lenet").fisher(), "mbf")
    with pytest.raises(InputError, match=r"Both must be of the same parameters"):
        fl.BlockDiagonal(F, other, shared=True)
    F.memory = 100
    with pytest.raises(MemoryBudgetError, match=r"The blocks of partition 'mbf' need 488 B, over the budget of 100 B"):
        fl.BlockDiagonal(F, "mbf", shared=True)


@pytest.mark.parametrize("name", ["lenet", "batchnorm_1d"])
def test_one_block_of_everything_is_kept_on_its_smaller_side(name, monkeypatch):
    c = case(name)
    F = c.fisher()
    monkeypatch.setattr("fisherlens.approximations.block_diagonal._cross_rows", None)
    A = fl.BlockDiagonal(F, {"all": torch.arange(F.n_params)})
    assert A.storage_bytes == 8 * min(F.scores.rows, F.n_params) ** 2
    check_standin(A, c.matrix, c.matrix, c.vectors(), layers=False)


def test_one_block_of_everything_with_many_rows():
    model = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    x = torch.randn(30, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    F = fl.Fisher(model, (x, torch.zeros(30, 2).double()), likelihood="gaussian")
    A = fl.BlockDiagonal(F, {"all": torch.arange(10)})
    assert A.storage_bytes == 8 * 10**2
    assert error(A.dense(), F.dense()) < 1e-14
