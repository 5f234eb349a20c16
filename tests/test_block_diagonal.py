"""Block-diagonal parts of F: every scheme and every way of keeping a block, against the matrix with its couplings cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import make_case
from fisher_checks import KINDS, QUIET, case, error
from torch import nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.approximations import MomentBlocks, RowBlocks, ScoreBlock
from fisherlens.errors import InputError, MemoryBudgetError

pytestmark = pytest.mark.filterwarnings(QUIET)
TOLERANCE = 1e-10
SCHEMES = [
    *(("layer", {}), ("parameter", {}), ("unit", {}), ("input", {}), ("channel", {}), ("kernel", {}), ("cw-ngd", {})),
    *(("mbf", {}), ("sequential", {"size": 7}), ("random", {"size": 5}), ("diagonal", {})),
]
NAMES = ["fewer_parameters_than_examples", "mlp_tanh", "lenet", "conv_groups", "dense_on_positions", "batchnorm_first"]


def check(B: fl.BlockDiagonal, T: torch.Tensor, V: torch.Tensor, damping: float = 0.03) -> None:
    blocks = list(B.partition.blocks)
    cut = reference.block_diagonal(T, blocks)
    assert error(B.dense(), cut) < TOLERANCE
    assert error(B @ V, cut @ V) < TOLERANCE
    assert error(B @ V[:, 0], cut @ V[:, 0]) < TOLERANCE
    assert error(B.solve(V, damping), reference.solve(cut, V, damping)) < TOLERANCE
    assert error(B.solve(V[:, 0], damping), reference.solve(cut, V[:, 0], damping)) < TOLERANCE
    named = B.solve(B.layout.unflatten(V), damping)
    assert error(B.layout.flatten(named), reference.solve(cut, V, damping)) < TOLERANCE
    for lam in (1e-3, 2.0):
        assert B.log_determinant(lam) == pytest.approx(reference.log_determinant(cut, lam), rel=1e-9)
        d = [reference.effective_dimension(T[b][:, b], lam) for b in blocks]
        assert np.allclose(B.effective_dimension(lam), d, rtol=1e-8, atol=1e-12)
    assert B.squared_norm() == pytest.approx(cut.square().sum().item(), rel=TOLERANCE)
    assert B.storage_bytes > 0
    assert (B.shape, B.n_params, B.dtype) == (T.shape, len(T), torch.float64)


@pytest.mark.parametrize(("scheme", "options"), SCHEMES, ids=[s for s, _ in SCHEMES])
@pytest.mark.parametrize("name", NAMES)
def test_every_scheme(name, scheme, options, unchanged):
    c = case(name)
    F = c.fisher()
    with unchanged(c.model):
        check(fl.BlockDiagonal(F, fl.partition(F, scheme, **options)), c.matrix, c.vectors())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["layer", "unit", "diagonal"])
def test_every_kind(kind, scheme):
    c = case("residual", kind)
    check(fl.BlockDiagonal(c.fisher(), scheme), c.matrix, c.vectors())


def test_own_partitions():
    c = case("mlp_tanh")
    F = c.fisher()
    order = torch.randperm(79, generator=torch.Generator().manual_seed(0))
    for own in (
        {"all": torch.arange(79)},
        {"shuffled": order},
        {"a": order[:40], "b": order[40:41], "c": order[41:]},
        {"rest": torch.arange(36, 79), "layer, reversed": torch.arange(36).flip(0)},
    ):
        check(fl.BlockDiagonal(F, own), c.matrix, c.vectors())
    assert error(fl.BlockDiagonal(F, {"all": range(79)}).solve(c.vectors(), 0.1), F.solve(c.vectors(), 0.1)) < 1e-12


def test_every_way_of_keeping_blocks_is_met():
    c = case("lenet")
    kept = {
        scheme: {type(blocks) for _, blocks in fl.BlockDiagonal(c.fisher(), scheme)._parts}
        for scheme in ("layer", "unit", "diagonal")
    }
    assert ScoreBlock in kept["layer"]
    assert RowBlocks in kept["unit"]
    assert kept["diagonal"] == {MomentBlocks}


def test_weights_of_zero_leave_rows_out():
    model, (x, y), _ = make_case(
        "zero rows", lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,), n=9
    )
    likelihood = fl.Categorical(weight=[0.0, 1.0, 2.0])
    T = reference.fisher(model, (x, y), likelihood)
    F = fl.Fisher(model, (x, y), likelihood=likelihood)
    V = torch.randn(len(T), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for scheme in ("layer", "unit", "parameter"):
        check(fl.BlockDiagonal(F, scheme), T, V)


def test_of_restricted_operators():
    c = case("lenet")
    F = c.fisher()
    part = F.restrict(["3", "7"])
    at = slice(F.layout.layer("3").start, F.layout.layer("7").stop)
    for scheme in ("layer", "unit", "cw-ngd"):
        check(fl.BlockDiagonal(part, scheme), c.matrix[at, at], c.vectors()[at])
    scheme = fl.partition(F, "unit")
    for name in F.layout.layer_names:
        at = slice(F.layout.layer(name).start, F.layout.layer(name).stop)
        B = fl.BlockDiagonal(F, scheme).on_layer(name)
        blocks = [b - at.start for b in scheme.restrict(name).blocks]
        cut = reference.block_diagonal(c.matrix[at, at], blocks)
        assert error(B.dense(), cut) < TOLERANCE
        assert error(B.solve(c.vectors()[at], 0.1), reference.solve(cut, c.vectors()[at], 0.1)) < TOLERANCE


def test_several_dampings_do_not_mix():
    c = case("mlp_tanh")
    for scheme in ("layer", "unit", "diagonal"):
        B = fl.BlockDiagonal(c.fisher(), scheme)
        cut = reference.block_diagonal(c.matrix, list(B.partition.blocks))
        for damping in (0.1, 5.0, 0.1, 1e-3):
            assert error(B.solve(c.vectors(), damping), reference.solve(cut, c.vectors(), damping)) < TOLERANCE


def test_float32():
    model, (x, y), likelihood = make_case(
        "single blocks", lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (6,)
    )
    T = reference.fisher(model, (x, y), likelihood)
    F = fl.Fisher(model.float(), (x.float(), y), likelihood=likelihood)
    V = torch.randn(len(T), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for scheme in ("layer", "unit", "diagonal"):
        B = fl.BlockDiagonal(F, scheme)
        cut = reference.block_diagonal(T, list(B.partition.blocks))
        assert (B @ V.float()).dtype == torch.float32
        assert error(B @ V.float(), cut @ V) < 1e-5
        assert error(B.solve(V.float(), 0.01), reference.solve(cut, V, 0.01)) < 1e-4


def test_the_vector_is_left_alone():
    c = case("mlp_tanh")
    for scheme in ("layer", "unit", "diagonal"):
        B, V = fl.BlockDiagonal(c.fisher(), scheme), c.vectors()
        kept = V.clone()
        B @ V
        B.solve(V, 0.1)
        assert torch.equal(V, kept)


def test_what_is_refused():
    F = case("mlp_tanh").fisher()
    other = fl.partition(case("lenet").fisher(), "layer")
    with pytest.raises(InputError, match=r"parameters of another layout|must be of the same parameters"):
        fl.BlockDiagonal(F, other)
    with pytest.raises(InputError, match=r"Unknown .*'unti'.*Did you mean 'unit'"):
        fl.BlockDiagonal(F, "unti")
    B = fl.BlockDiagonal(F, "unit")
    with pytest.raises(InputError, match=r"takes v of shape \(79,\)"):
        B @ torch.ones(5, dtype=torch.float64)
    with pytest.raises(MemoryBudgetError, match=r"BlockDiagonal\.dense\(\) of 79 parameters would take 48\.8 KiB"):
        B.dense(max_params=10)
    F.memory = 1000
    with pytest.raises(
        MemoryBudgetError,
        match=r"blocks of partition 'unit' need .* over the budget of 1000 B \(largest block: 7 parameters\)",
    ):
        fl.BlockDiagonal(F, "unit")


def test_repr():
    text = repr(fl.BlockDiagonal(case("mlp_tanh").fisher(), "unit"))
    assert text.startswith("BlockDiagonal('unit', 13 blocks, P=79, ")
