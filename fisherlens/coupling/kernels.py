"""Couplings inside dense layers through kernels over pairs of examples: the cost does not grow with the size of a block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherlens.partitions import BlockGroup, Partition
from fisherlens.scores import ScoreMatrix
from fisherlens.scores.base import CHUNK_BYTES
from fisherlens.scores.dense import DenseScores

# More families than this leave so few blocks in each that calls dominate; the other ways then serve as well (our choice).
_MOST_FAMILIES = 256


@dataclass(frozen=True)
class Family:
    """Blocks of one dense layer with one position that share all but one index.

    By unit, a block is one output unit o with the inputs J that all of the family read: K[(n,r),(q,s)] = g_nro g_qso Σ_J a_nj a_qj.
    By input, it is one input j with the units O that all of the family feed: K[(n,r),(q,s)] = a_nj a_qj Σ_O g_nro g_qso.

    Attributes
    ----------
    ids
        Places of the blocks, ``(b,)``.
    by_unit
        Which of the two.
    inputs
        a, ``(n, |J|)``; by input ``(n, b)``.
    outputs
        g, ``(n, r, b)``; by input ``(n, r, |O|)``.
    """

    ids: Tensor
    by_unit: bool
    inputs: Tensor
    outputs: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def shared(self) -> int:
        """Inputs, or units, that every block has."""
        return self.inputs.shape[1] if self.by_unit else self.outputs.shape[2]

    def traces(self) -> Tensor:
        """Sum of squares of each block's scores, ``(b,)`` float64."""
        if self.by_unit:
            return self.inputs.double().square().sum(1) @ self.outputs.double().square().sum(1)
        return self.outputs.double().square().sum((1, 2)) @ self.inputs.double().square()


def families(scores: ScoreMatrix, groups: list[BlockGroup]) -> list[Family] | None:
    """The blocks as families, or None where one of them is no such block or its families are too many."""
    found: list[Family] = []
    for group in groups:
        if group.layer is None or not isinstance(layer := scores[group.layer], DenseScores) or layer.t != 1:
            return None
        start = scores.offsets[scores.layers.index(layer)]
        unit, column = layer._split(group.index.to(scores.device) - start)
        by_unit = bool((unit == unit[:, :1]).all())
        by_input = bool((column == column[:, :1]).all())
        cuts = ([(True, *_alike(column))] if by_unit else []) + ([(False, *_alike(unit))] if by_input else [])
        if not cuts:
            return None
        units, kind, sets = min(cuts, key=lambda cut: len(cut[2]))
        if len(found) + len(sets) > _MOST_FAMILIES:
            return None
        for number, shared in enumerate(sets):
            here = (kind == number).nonzero()[:, 0]
            one_column, one_unit = (shared, unit[here, 0]) if units else (column[here, 0], shared)
            inputs, outputs = layer._homogeneous(one_column)[:, 0], layer.g[:, :, 0, one_unit]
            found.append(Family(group.block_ids.to(scores.device)[here], units, inputs, outputs))
    return found


def _alike(entries: Tensor) -> tuple[Tensor, Tensor]:
    """Number of the set of entries that each row holds, in any order, and the sets: ``(B, s)`` → ``(B,)``, ``(sets, s)``."""
    entries = entries.sort(1).values
    if (entries == entries[:1]).all():
        return entries.new_zeros(len(entries)), entries[:1]
    sets, number = torch.unique(entries, dim=0, return_inverse=True)
    return number, sets


def kernel_cost(found: list[Family], n: int, r: int) -> float:
    """Multiplications of :func:`kernel_norms`."""
    cost = 0.0
    for a, b in _pairs(found):
        both = len(a) * len(b) / (2 if a is b else 1)
        order = min(n, a.shared * b.shared)
        cost += both * n * (order + r) + n * order * min(len(a), len(b)) * (a.by_unit != b.by_unit) + n * n
    return cost


def kernel_bytes(found: list[Family], n: int, item: int) -> int:
    """Bytes that :func:`kernel_norms` holds beside the result: kernels of two families and their product, and chunks."""
    return 4 * max(n * min(n, a.shared * b.shared) for a, b in _pairs(found)) * item + 3 * CHUNK_BYTES


def _pairs(found: list[Family]) -> Iterator[tuple[Family, Family]]:
    return ((a, b) for k, a in enumerate(found) for b in found[k:])


def kernel_norms(scores: ScoreMatrix, parts: Partition, found: list[Family]) -> tuple[Tensor, Tensor]:
    """‖U_iᵀU_j‖² of all pairs, ``(B, B)``, and tr U_iᵀU_i, ``(B,)``, float64.

    Two units: sᵀ[(A Aᵀ) ∘ (A' A'ᵀ)] s with s_n = Σ_r g_nro g'_nro'; two inputs: tᵀ H t with t = a_j ∘ a'_j' and
    H_nq = Σ_rs (g_nr·g_qs)(g'_nr·g'_qs). A kernel of few features is kept as its root.
    """
    num = parts.num_blocks
    out = torch.zeros(num, num, dtype=torch.float64, device=scores.device)
    traces = torch.zeros(num, dtype=torch.float64, device=scores.device)
    for family in found:
        traces[family.ids] = family.traces()
    for a, b in _pairs(found):
        values = _alike_pairs(a, b) if a.by_unit == b.by_unit else _mixed_pairs(a, b)
        if a is b:  # the lower triangle was left out
            values = torch.triu(values) + torch.triu(values, 1).T
        out[a.ids[:, None], b.ids] = values
        out[b.ids[:, None], a.ids] = values.T
    return out.clamp_(min=0), traces


def _alike_pairs(a: Family, b: Family) -> Tensor:
    """Pairs of two units, or of two inputs: one quadratic form each, with one kernel for all."""
    kernel, root = _input_kernel(a, b) if a.by_unit else _output_kernel(a, b)
    n = len(a.inputs)
    out = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.inputs.device)
    step = max(1, CHUNK_BYTES // max(1, n * len(b) * a.inputs.dtype.itemsize))
    for i in range(0, len(a), step):
        j = i if a is b else 0
        if a.by_unit:
            signal = torch.bmm(a.outputs[:, :, i : i + step].mT, b.outputs[:, :, j:])
        else:
            signal = a.inputs[:, i : i + step, None] * b.inputs[:, None, j:]
        out[i : i + step, j:] = _forms(kernel, root, signal.reshape(n, -1)).view(signal.shape[1:])
    return out


def _mixed_pairs(a: Family, b: Family) -> Tensor:
    """Pairs of a unit and an input: a kernel for each unit, Σ_nq (Σ_J a_nj a_qj) (m_n·m_q) b_n b_q with m_n = Σ_r g_nro g'_nr."""
    if not a.by_unit:
        return _mixed_pairs(b, a).T
    few = a.shared * b.shared < len(a.inputs)
    shared = None if few else a.inputs @ a.inputs.T
    rows = []
    for i in range(len(a)):
        m = torch.bmm(a.outputs[:, None, :, i], b.outputs)[:, 0]
        kernel = (a.inputs[:, :, None] * m[:, None]).flatten(1) if shared is None else shared * (m @ m.T)
        rows.append(_forms(kernel, few, b.inputs))
    return torch.stack(rows)


def _forms(kernel: Tensor, root: bool, signals: Tensor) -> Tensor:
    """sᵀ Q s of every column s, float64; Q is given as itself or by a root W with Q = W Wᵀ."""
    image = (kernel.T if root else kernel) @ signals
    return (image.square() if root else image.mul_(signals)).sum(0, dtype=torch.float64)


def _input_kernel(a: Family, b: Family) -> tuple[Tensor, bool]:
    if a.shared * b.shared < len(a.inputs):
        return (a.inputs[:, :, None] * b.inputs[:, None]).flatten(1), True
    return (a.inputs @ a.inputs.T) * (b.inputs @ b.inputs.T), False


def _output_kernel(a: Family, b: Family) -> tuple[Tensor, bool]:
    n, r, _ = a.outputs.shape
    if a.shared * b.shared < n:
        return torch.bmm(a.outputs.mT, b.outputs).flatten(1), True
    flat = [x.outputs.reshape(n * r, -1) for x in (a, b)]
    out = a.inputs.new_empty(n, n)
    step = max(1, CHUNK_BYTES // max(1, n * r * r * a.inputs.dtype.itemsize))
    for i in range(0, n, step):
        left, right = (x[i * r : (i + step) * r] @ x.T for x in flat)
        out[i : i + step] = (left * right).view(-1, r, n, r).sum((1, 3))
    return out, False


def spread_gram(family: Family, blocks: slice, rows: slice, stop: int) -> Tensor:
    """K_b of some blocks of a family, rows ``rows`` by columns 0..stop, ``(b, m, stop)``."""
    n, r, _ = family.outputs.shape
    device = family.inputs.device
    low, high = torch.arange(rows.start, rows.stop, device=device) // r, torch.arange(stop, device=device) // r
    flat = family.outputs.reshape(n * r, -1)
    if family.by_unit:
        first, last = rows.start // r, math.ceil(rows.stop / r)
        shared = (family.inputs[first:last] @ family.inputs.T)[low - first][:, high]
        own = flat[:, blocks].T
        return own[:, rows, None] * own[:, None, :stop] * shared
    own = family.inputs[:, blocks].T
    return own[:, low, None] * own[:, None, high] * (flat[rows] @ flat[:stop].T)
