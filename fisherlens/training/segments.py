"""The segmentations that analyses of training compare: the published ones, and controls with blocks of CW-NGD's sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherlens.partitions import Partition
from fisherlens.partitions import partition as make_partition

SEGMENTS = "cw-ngd"
NAMED = ("layer", "unit", SEGMENTS, "mbf")
CONTROLS = ("shifted", "shuffled", "diagonal")


def shifted(segments: Partition) -> Partition:
    """Runs of the same sizes in the same layers, moved on by half a block: neighbours together, borders ignored."""
    half = int(np.median(np.repeat(segments.sizes, segments.sizes))) // 2
    return replace(segments, scheme="shifted", flat=_per_layer(segments, lambda own: np.roll(own, -half)))


def shuffled(segments: Partition, seed: int) -> Partition:
    """Blocks of the same sizes in the same layers, filled at random from a generator of its own."""
    rng = np.random.default_rng(seed)
    return replace(segments, scheme="shuffled", flat=_per_layer(segments, rng.permutation))


def _per_layer(segments: Partition, move: Any) -> Tensor:
    flat = segments.flat.numpy().copy()
    owner = np.repeat(np.array([str(name) for name in segments.layers]), segments.sizes)
    for name in dict.fromkeys(owner.tolist()):
        here = np.flatnonzero(owner == name)
        flat[here] = move(np.sort(flat[here]))
    return torch.from_numpy(flat)


def segmentations(F: Any, seed: int) -> list[Partition]:
    """Every segmentation, from coarse to single entries."""
    segments = make_partition(F, SEGMENTS)
    named = [make_partition(F, scheme) for scheme in NAMED]
    return [*named, shifted(segments), shuffled(segments, seed), make_partition(F, "diagonal")]


def as_blocks(partition: Partition) -> dict[str, Tensor]:
    """A segmentation as label → indices, for an optimizer that lays the network out by itself."""
    return {f"{partition.scheme} {place}": block for place, block in enumerate(partition.blocks)}


def distinct(partitions: list[Partition]) -> list[Partition]:
    """Those that differ in their blocks, the first of each kind: on small networks two schemes may cut alike."""
    found: dict[Any, Partition] = {}
    for one in partitions:
        blocks = frozenset(tuple(sorted(block.tolist())) for block in one.blocks)
        found.setdefault(blocks, one)
    return list(found.values())
