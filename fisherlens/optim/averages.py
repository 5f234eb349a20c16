"""Running averages that optimizers keep: of blocks of one size in one batch, and of single parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fisherlens.layout import LayerInfo, ParameterInfo
from fisherlens.optim.moments import run_start
from fisherlens.partitions import BlockGroup


class Averages:
    """What of a dataclass is state: its tensors and counters, not where they belong."""

    steps: int
    weight: float

    def state(self) -> dict[str, Any]:
        """Tensors (not copied) and counters."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("layer", "at")}  # type: ignore[arg-type]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors."""
        return {name: tuple(value.shape) for name, value in self.state().items() if isinstance(value, Tensor)}

    def update(self, ema: float, **new: Tensor) -> None:
        """ρ x + (1 - ρ) new of some tensors, in place, and count it."""
        for name, value in new.items():
            getattr(self, name).lerp_(value, 1 - ema)
        self.weight = moved_weight(self.weight, ema)
        self.steps += 1

    def corrected(self, name: str) -> Tensor:
        """An average over 1 - ρ^t, which an average that started from zero falls short by."""
        return getattr(self, name) / self.weight


def moved_weight(weight: float, ema: float) -> float:
    """What of an average is data after one more update: 1 - ρ^t, also where ρ changes on the way."""
    return ema * weight + (1 - ema)


@dataclass(eq=False)
class BlockAverages(Averages):
    """B blocks of size s: H of outer products of scores, m of gradients, and how often each was updated.

    ``layer`` is None where the blocks cross layers, ``at`` tells where the B s entries lie in the flat vector.
    """

    layer: str | None
    at: slice | Tensor
    H: Tensor  # (B, s, s)
    m: Tensor  # (B, s)
    H_steps: int = 0
    m_steps: int = 0
    H_weight: float = 0.0
    m_weight: float = 0.0

    @classmethod
    def of_group(cls, group: BlockGroup, like: Tensor) -> BlockAverages:
        """Start at zero, in the dtype and on the device of ``like``."""
        run, shape = run_start(group.index), group.index.shape
        at = group.index.reshape(-1).to(like.device) if run is None else slice(run, run + group.index.numel())
        return cls(group.layer, at, like.new_zeros(*shape, group.size), like.new_zeros(shape))

    def of(self, flat: Tensor) -> Tensor:
        """The entries of a flat vector, (B, s)."""
        return flat[self.at].view(self.m.shape)


@dataclass(eq=False)
class EntryAverages(Averages):
    """A layer's entries one by one: h of squares and m of gradients, both (p,)."""

    layer: str
    at: slice
    h: Tensor
    m: Tensor
    steps: int = 0
    h_weight: float = 0.0
    m_weight: float = 0.0

    @classmethod
    def of(cls, layer: str, where: LayerInfo | ParameterInfo, like: Tensor) -> EntryAverages:
        """Start at zero, in the dtype and on the device of ``like``; ``where`` is the layer itself or a tensor of it."""
        size = where.stop - where.start
        return cls(layer, slice(where.start, where.stop), like.new_zeros(size), like.new_zeros(size))

    def adapted(self, g: Tensor, rho: float, beta: float, floor: float) -> Tensor:
        """Take one more gradient in, h ← ρh + (1 - ρ) g² and m ← βm + (1 - β) g, and give m̂ / (√ĥ + floor), both corrected for their start."""
        self.h.lerp_(g.square(), 1 - rho)
        self.m.lerp_(g, 1 - beta)
        self.steps += 1
        self.h_weight, self.m_weight = moved_weight(self.h_weight, rho), moved_weight(self.m_weight, beta)
        return (self.m / self.m_weight) / ((self.h / self.h_weight).sqrt() + floor)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along the blocks; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
