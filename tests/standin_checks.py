"""What the tests of stand-ins for F share: one contract, held against a dense twin, and the split of the error."""

from __future__ import annotations

import pytest
import torch
from fisher_checks import error
from torch import Tensor

import fisherlens as fl
from fisherlens import reference
from fisherlens.approximations import Approximation

DAMPINGS = (1e-3, 2.0)


def check_standin(
    A: Approximation,
    T: Tensor,
    twin: Tensor,
    V: Tensor,
    *,
    tol: float = 1e-10,
    split: float = 1e-10,
    layers: bool = True,
) -> None:
    """Every member of a stand-in A of F = T against its dense twin, and ‖F - F̂‖² = dropped + within."""
    V = V.to(A.dtype)
    X = V.double()
    assert (A.shape, A.n_params, A.dtype) == (T.shape, len(T), V.dtype)
    assert error(A.dense(), twin) < tol
    assert error(A @ V, twin @ X) < tol
    assert error(A @ V[:, 0], twin @ X[:, 0]) < tol
    assert error(A.layout.flatten(A @ A.layout.unflatten(V)), twin @ X) < tol
    assert torch.equal(A @ V, A @ V)
    for damping in DAMPINGS:
        solution = reference.solve(twin, X, damping)
        assert error(A.solve(V, damping), solution) < tol * 10
        assert error(A.solve(V[:, 1], damping), solution[:, 1]) < tol * 10
        assert error(A.layout.flatten(A.solve(A.layout.unflatten(V), damping)), solution) < tol * 10
        log_det = reference.log_determinant(twin, damping)
        assert A.log_determinant(damping) == pytest.approx(log_det, rel=tol * 10, abs=tol * len(T))
    assert error(A.diagonal(), twin.diagonal()) < tol
    assert A.trace() == pytest.approx(twin.trace().item(), rel=tol, abs=1e-14)
    assert A.squared_norm() == pytest.approx(twin.square().sum().item(), rel=tol, abs=1e-14)
    values = reference.spectrum(twin)
    assert values[-1] >= -1e-10 * values[0]
    assert A.storage_bytes > 0
    assert A.solve_flops >= 0
    assert repr(A).startswith(type(A).__name__.replace("Shared", "")[:8])
    check_split(A, T, twin, split)
    if layers:
        check_layers(A, twin, X, tol)


def check_split(A: Approximation, T: Tensor, twin: Tensor, tol: float) -> None:
    blocks = list(A.partition.blocks)
    assert torch.equal(torch.cat(blocks).sort().values, torch.arange(len(T)))
    inside = reference.block_diagonal(T, blocks)
    assert torch.equal(reference.block_diagonal(twin, blocks) == 0, twin == 0), "F̂ reaches beyond its partition"
    whole, size = (T - twin).square().sum().item(), T.square().sum().item()
    dropped, within = size - inside.square().sum().item(), (inside - twin).square().sum().item()
    assert whole == pytest.approx(dropped + within, rel=1e-10, abs=1e-12 * size)
    assert A.within_block_error() == pytest.approx(within, rel=tol, abs=tol * size + 1e-300)


def check_layers(A: Approximation, twin: Tensor, X: Tensor, tol: float) -> None:
    for layer in A.layout.layers:
        at = slice(layer.start, layer.stop)
        part, own = A.on_layer(layer.name), twin[at, at]
        assert part.shape == own.shape
        assert error(part.dense(), own) < tol * 10
        V = X[at].to(A.dtype)
        assert error(part.solve(V, 0.1), reference.solve(own, X[at], 0.1)) < tol * 100
        assert part.squared_norm() == pytest.approx(own.square().sum().item(), rel=tol * 10, abs=1e-14)
    with pytest.raises(fl.InputError, match=r"Unknown layer 'nowhere'"):
        A.on_layer("nowhere")


def units_and_biases(F: fl.Fisher) -> tuple[list[Tensor], list[int | None]]:
    """The unit blocks of F, and the flat index of each one's bias where its layer has weights too."""
    units, biases = list(fl.partition(F, "unit").blocks), []
    for unit in units:
        layer = next(x for x in F.layout.layers if x.start <= unit[0] < x.stop)
        both = layer.weight is not None and layer.bias is not None and layer.kind in ("dense", "conv", "norm")
        own = [i for i in unit.tolist() if both and layer.bias.start <= i < layer.bias.stop]
        assert len(own) == int(both)
        biases.append(own[0] if own else None)
    return units, biases


def families(F: fl.Fisher, parts: fl.Partition) -> list[list[Tensor]]:
    """Blocks that share a matrix: those of one size in one dense layer; every other block is alone."""
    found: dict[object, list[Tensor]] = {}
    for k, (block, layer) in enumerate(zip(parts.blocks, parts.layers, strict=True)):
        dense = layer is not None and F.layout.layer(layer).kind == "dense"
        found.setdefault((layer, len(block)) if dense else k, []).append(block)
    return list(found.values())
