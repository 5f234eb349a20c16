"""Segmentations to set against each other: a rule, and blocks of the same sizes that hold other parameters."""

from __future__ import annotations

import numpy as np
import torch

import fisherlens as fl

RULES = ("layer", "unit", "input", "cw-ngd", "cw-ngd 2022", "mbf", "mbf A", "diagonal")
SHIFTED, NEIGHBOURS, SCATTERED = "cw-ngd, shifted by half", "cw-ngd, neighbours merged", "cw-ngd, strangers merged"
CONTIGUOUS = "{}, contiguous"
RANDOM = "{}, random"  # its draws are numbered: "cw-ngd, random 0"
_VARIANTS = {"cw-ngd 2022": ("cw-ngd", "2022"), "mbf A": ("mbf", "A")}


def of_rule(F: fl.Fisher, name: str) -> fl.Partition:
    """The partition of a rule by the name that it has in results."""
    scheme, variant = _VARIANTS.get(name, (name, None))
    return fl.partition(F, scheme, variant=variant)


def _by_layer(F: fl.Fisher, rule: str, change) -> fl.Partition:
    """The partition whose pieces in each layer are ``change(blocks)`` of the rule's blocks there, as lists of index arrays."""
    own = of_rule(F, rule)
    pieces = []
    for name in F.layout.layer_names:
        part = own.restrict(name)
        pieces += change(np.split(part.flat.numpy(), np.cumsum(part.sizes)[:-1]))
    return fl.partition(F, {str(number): torch.from_numpy(piece) for number, piece in enumerate(pieces)})


def _recut(flat: np.ndarray, blocks: list[np.ndarray]) -> list[np.ndarray]:
    return np.split(flat, np.cumsum([len(block) for block in blocks])[:-1])


def contiguous(F: fl.Fisher, rule: str) -> fl.Partition:
    """The rule's sizes, in its order, laid along the flat parameter vector of each layer."""
    return _by_layer(F, rule, lambda blocks: _recut(np.sort(np.concatenate(blocks)), blocks))


def random(F: fl.Fisher, rule: str, seed: int) -> fl.Partition:
    """The rule's sizes, filled with the parameters of each layer in random order."""
    generator = np.random.default_rng([seed, 1])

    def change(blocks: list[np.ndarray]) -> list[np.ndarray]:
        if max(map(len, blocks)) == 1:
            return blocks
        return _recut(generator.permutation(np.concatenate(blocks)), blocks)

    return _by_layer(F, rule, change)


def _segments(blocks: list[np.ndarray]) -> tuple[list[int], int]:
    """Places of the blocks of the size that holds most of a layer's parameters, and that size."""
    sizes = np.array([len(block) for block in blocks])
    found, counts = np.unique(sizes, return_counts=True)
    size = int(found[np.argmax(found * counts)])
    return np.flatnonzero(sizes == size).tolist(), size


def shifted(F: fl.Fisher, rule: str = "cw-ngd") -> fl.Partition:
    """The rule's segments moved on by half their length, so that each holds halves of two; the last one also the very first half."""

    def change(blocks: list[np.ndarray]) -> list[np.ndarray]:
        places, size = _segments(blocks)
        if size == 1:
            return blocks
        moved = _recut(np.roll(np.concatenate([blocks[p] for p in places]), -(size // 2)), [blocks[p] for p in places])
        others = [block for place, block in enumerate(blocks) if place not in set(places)]
        return moved + others

    return _by_layer(F, rule, change)


def merged(F: fl.Fisher, rule: str = "cw-ngd", *, seed: int | None = None) -> fl.Partition:
    """The rule's segments two by two: each with the next one, or, with a seed, with one drawn from the whole layer."""
    generator = None if seed is None else np.random.default_rng([seed, 2])

    def change(blocks: list[np.ndarray]) -> list[np.ndarray]:
        places, size = _segments(blocks)
        if size == 1:
            return blocks
        chosen = places if generator is None else generator.permutation(places).tolist()
        pairs = [np.concatenate([blocks[p] for p in chosen[at : at + 2]]) for at in range(0, len(chosen), 2)]
        return pairs + [block for place, block in enumerate(blocks) if place not in set(places)]

    return _by_layer(F, rule, change)


LARGEST = 20_000  # parameters of a network up to which units and inputs get controls too: blocks of thousands are dear


def all_cuts(F: fl.Fisher, draws: int, *, full: bool) -> dict[str, fl.Partition]:
    """Name -> partition. ``full`` adds rules and controls to those of CW-NGD, in small networks those of units and inputs too."""
    others = ("unit", "input") if F.n_params <= LARGEST else ()
    rules = RULES if full else ("layer", "unit", "input", "cw-ngd", "mbf", "diagonal")
    cuts = {rule: of_rule(F, rule) for rule in rules}
    cuts[SHIFTED] = shifted(F)
    for rule in ("cw-ngd", *others) if full else ("cw-ngd",):
        cuts |= {f"{RANDOM.format(rule)} {draw}": random(F, rule, draw) for draw in range(draws)}
    if full:
        cuts[NEIGHBOURS], cuts[SCATTERED] = merged(F), merged(F, seed=0)
        cuts |= {CONTIGUOUS.format(rule): contiguous(F, rule) for rule in ("cw-ngd", *others)}
    return cuts


def single_share(F: fl.Fisher, rule: str, layer: str) -> float:
    """Share of a layer's parameters that the rule leaves alone in a block."""
    sizes = of_rule(F, rule).restrict(layer).sizes
    return float(sizes[sizes == 1].sum() / sizes.sum())
