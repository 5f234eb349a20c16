r"""What any operator predicts about steps that know their own block only: shared by the claims on convergence and independence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherlens.approximations import BlockDiagonal
from fisherlens.errors import InputError, MemoryBudgetError
from fisherlens.fisher import Fisher
from fisherlens.independence import independence
from fisherlens.linalg.pencil import dense_extremes
from fisherlens.partitions import Partition
from fisherlens.partitions import partition as make_partition
from fisherlens.spectrum import WHOLE
from fisherlens.training.segments import NAMED, SEGMENTS, distinct, shuffled
from fisherlens.training.verify.subject import Subject

# Order up to which an operator that is no Fisher is written out (our choice: the condition number takes an eigendecomposition).
MOST_DENSE = 1500
_TOO_LARGE = (
    "An operator that is no fl.Fisher is written out to cut it into blocks, up to {most} parameters; this one has {n}. Give a fl.Fisher (of "
    "another kind, or on other data), or a function of the Fisher that returns one."
)


@dataclass(frozen=True)
class Judgement:
    """What an operator says about one segmentation, as :func:`fisherlens.independence` does for the whole network."""

    decrease_ratio: float
    natural_gradient_cosine: float
    condition_number: float


def chosen(subject: Subject, wanted: Mapping[str, Any] | None) -> dict[str, Partition]:
    """Segmentations by name: the ones asked for, or layers, units, those of CW-NGD and MBF, a shuffled control and single entries.

    Two that cut this network alike are kept once; one whose blocks exceed the memory budget is left out.
    """
    F = subject.true_fisher
    if wanted is not None:
        return {name: make_partition(F, one) for name, one in wanted.items()}
    segments = make_partition(F, SEGMENTS)
    named = [make_partition(F, scheme) for scheme in NAMED]
    found = distinct([*named, shuffled(segments, 0), make_partition(F, "diagonal")])
    kept = {}
    for one in found:
        try:
            BlockDiagonal(F, one)
        except MemoryBudgetError:
            continue
        kept[one.scheme] = one
    return kept


def judge(operator: Any, partitions: Sequence[Partition], gradient: Tensor, damping: float) -> list[Judgement]:
    """Decrease ratio, cosine and condition number of every segmentation; an operator that is no Fisher is written out."""
    if isinstance(operator, Fisher):
        found = independence(operator, list(partitions), damping=damping, progress_bar=False).sel(layer=WHOLE)
        names = ("decrease_ratio", "natural_gradient_cosine", "condition_number")
        return [Judgement(*(float(found[name][k]) for name in names)) for k in range(len(partitions))]
    matrix = written_out(operator, gradient)
    eye = damping * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    g = gradient.to(matrix.dtype)
    p = torch.linalg.solve(matrix + eye, g)
    answers = []
    for one in partitions:
        block = one.block_of.to(matrix.device)
        inside = torch.where(block[:, None] == block[None], matrix, 0) + eye
        q = torch.linalg.solve(inside, g)
        ratio, cosine = quality(g, p, q, float(q @ matrix @ q + damping * (q @ q)))
        low, high = dense_extremes(matrix + eye, inside)
        answers.append(Judgement(ratio, cosine, high / low if low > 0 else math.inf))
    return answers


def quality(g: Tensor, p: Tensor, q: Tensor, bend: float) -> tuple[float, float]:
    """Decrease ratio (g·q)²/[(qᵀ(F+λ)q)(g·p)] and Euclidean cosine of a step q to the natural one p; ``bend`` is qᵀ(F+λ)q."""
    scale = bend * float(g @ p)
    lengths = float(p.norm() * q.norm())
    ratio = min(float(g @ q) ** 2 / scale, 1.0) if scale > 0 else math.nan
    return ratio, float(p @ q) / lengths if lengths else math.nan


def written_out(operator: Any, like: Tensor) -> Tensor:
    """The matrix of an operator, float64 and symmetric, on the device of ``like``."""
    n = operator.shape[0]
    if n > MOST_DENSE:
        raise InputError(_TOO_LARGE.format(most=f"{MOST_DENSE:,}", n=f"{n:,}"))
    eye = torch.eye(n, dtype=getattr(operator, "dtype", like.dtype), device=getattr(operator, "device", like.device))
    matrix = (operator @ eye).to(like.device, torch.float64)
    return (matrix + matrix.T) / 2
