"""Segmentations of the parameters: disjoint blocks that cover them, by a named scheme or by your own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fisherlens import _partition_schemes as schemes
from fisherlens import errors
from fisherlens.errors import InputError
from fisherlens.layout import Layout
from fisherlens.results import make_dataset

if TYPE_CHECKING:
    import xarray as xr

SCHEMES = (
    *("layer", "parameter", "unit", "input", "channel", "kernel", "cw-ngd", "mbf"),
    *("sequential", "random", "diagonal"),
)
OWN = "own"

_WRONG_OWNER = (
    "partition takes a Fisher, a Layout or a torch.nn.Module; got {got}. Pass the operator F made by fisherlens.Fisher "
    "or the network itself, rather than its class, outputs or parameters."
)
_WRONG_SCHEME = (
    "scheme must be a name, a dict label -> flat indices, or a Partition; got {got}. Known names: {known}. "
    "A list of index sets has no labels: pass a dict."
)
_OTHER_LAYOUT = (
    "Both must be of the same parameters; got a partition over {other} parameters for a layout of {own} whose names, "
    "shapes or order differ. It was probably made for another model or another choice of params: "
    "build it again from this one."
)
_NO_OPTION = (
    "Scheme {scheme!r} takes no {option}; got {option}={value!r}. {option} belongs to {owners}: "
    "leave it out, or change the scheme."
)
_WRONG_DTYPE = (
    "dtype must be a torch.dtype such as torch.float32; got {got!r}. Numpy types and strings are not converted: "
    "name the torch type."
)
_NOT_PARTITION = "refines compares with a Partition; got {got}. Build it with partition(F, scheme) first."


@dataclass(frozen=True, eq=False)
class BlockGroup:
    """Blocks of one size in one layer, batched.

    Attributes
    ----------
    layer
        Name of the layer that holds all of them, or None where each of them crosses layers.
    index
        Flat indices, shape ``(B, s)``, int64, on the CPU: one block per row.
    block_ids
        Place of each row in ``Partition.blocks``, shape ``(B,)``, ascending.
    """

    layer: str | None
    index: Tensor
    block_ids: Tensor

    @property
    def size(self) -> int:
        """Parameters per block, s."""
        return self.index.shape[1]

    def __len__(self) -> int:
        return self.index.shape[0]


@dataclass(frozen=True, eq=False, repr=False)
class Partition:
    """Disjoint blocks of the flat parameter vector, as made by :func:`partition`.

    Blocks are numbered in layout order, within a layer as the scheme enumerates them (weight blocks row-major, then the
    bias, then anything else the layer owns); "sequential" and "random" in the order of the cut, your own in that of the
    dict. Iterating gives the index tensors of ``blocks``. Only :meth:`restrict` gives a partition that does not cover
    the layout.

    Attributes
    ----------
    scheme
        Name of the scheme; ``"own"`` for a dict.
    layout
        Layout of the flat vector that the indices refer to.
    sizes
        Parameters per block, shape ``(num_blocks,)``, read-only.
    flat
        The indices of all blocks one after the other, int64, on the CPU.
    options
        The scheme's options, such as ``{"size": 9}``, to be recorded with results.
    """

    scheme: str
    layout: Layout
    sizes: np.ndarray
    flat: Tensor
    options: Mapping[str, object] = field(default_factory=dict)
    _make_labels: Callable[[], list[str]] = field(default=list)

    def __post_init__(self) -> None:
        self.sizes.flags.writeable = False

    @property
    def num_blocks(self) -> int:
        """How many blocks there are."""
        return len(self.sizes)

    @property
    def largest_block(self) -> int:
        """Parameters in the largest block."""
        return int(self.sizes.max(initial=0))

    @cached_property
    def blocks(self) -> tuple[Tensor, ...]:
        """Flat indices of each block, int64. One tensor per block: prefer ``groups`` where there are many."""
        return self.flat.split(self.sizes.tolist())

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Name of each block: its layer, what it is and where, such as ``features.3 kernel 5,2``."""
        return tuple(self._make_labels())

    @cached_property
    def layers(self) -> tuple[str | None, ...]:
        """Name of each block's layer, None for a block that crosses layers."""
        names = np.array([*self.layout.layer_names, None], dtype=object)
        return tuple(names[self._layer_codes])

    @cached_property
    def groups(self) -> list[BlockGroup]:
        """The blocks in batches of one layer and one size, ordered by their first block. No loop over blocks."""
        codes, sizes = self._layer_codes, self.sizes
        ends = np.flatnonzero((codes[1:] != codes[:-1]) | (sizes[1:] != sizes[:-1])) + 1
        firsts = np.concatenate([[0], ends])[: len(codes)]
        if len(firsts) < 1000 and len(set(zip(codes[firsts], sizes[firsts], strict=True))) == len(firsts):
            batches = np.split(np.arange(len(codes)), ends) if len(codes) else []
        else:
            order = np.lexsort((sizes, codes))  # stable, so ids ascend within a group
            changes = (np.diff(codes[order]) != 0) | (np.diff(sizes[order]) != 0)
            batches = np.split(order, np.flatnonzero(changes) + 1)
        flat, starts, names, found = self.flat.numpy(), self._starts, [*self.layout.layer_names, None], []
        for ids in sorted(batches, key=lambda ids: ids[0]):
            first, size = ids[0], int(sizes[ids[0]])
            if ids[-1] - first + 1 == len(ids):  # a run of neighbours is a view
                index = flat[starts[first] : starts[first] + size * len(ids)].reshape(-1, size)
            else:
                index = flat[starts[ids][:, None] + np.arange(size)]
            found.append(BlockGroup(names[codes[first]], torch.from_numpy(index), torch.from_numpy(ids)))
        return found

    @cached_property
    def block_of(self) -> Tensor:
        """Number of the block of each parameter, shape ``(P,)``; -1 where a restricted partition has none."""
        result = np.full(self.layout.n_params, -1, dtype=np.int64)
        result[self.flat.numpy()] = np.repeat(np.arange(self.num_blocks), self.sizes)
        return torch.from_numpy(result)

    @property
    def storage_entries(self) -> int:
        """Numbers that the blocks of a matrix hold, the sum of s_b squared over blocks b of size s_b."""
        return sum(size**2 * count for size, count in self._size_counts(self.sizes))

    @property
    def solve_flops(self) -> float:
        """Floating-point operations of a Cholesky factor of every block, the sum of s_b cubed over three."""
        return sum(size**3 * count for size, count in self._size_counts(self.sizes)) / 3

    def storage_bytes(self, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of the blocks of a matrix of this dtype; the default is the usual dtype of a network."""
        if not isinstance(dtype, torch.dtype):
            raise TypeError(_WRONG_DTYPE.format(got=dtype))
        return self.storage_entries * dtype.itemsize

    def restrict(self, layer: str) -> Partition:
        """Keep what lies in one layer, still in flat indices of the whole layout; blocks that become empty are dropped.

        A block that is cut gets the layer's name in front of its label. An unknown layer is an InputError.
        """
        info = self.layout.layer(layer)
        code = self.layout.layer_names.index(info.name)
        if self._in_order:  # no block is cut
            first, stop = np.searchsorted(self._layer_codes, [code, code + 1]).tolist()
            if stop > first:
                return self._neighbours(first, stop)
        return self._pieces(np.flatnonzero(self._entry_codes == code))

    def _neighbours(self, first: int, stop: int) -> Partition:
        """Blocks that follow each other and are all those of a layer, without another look at their entries."""
        starts, sizes = self._starts, self.sizes[first:stop].copy()
        flat = self.flat[starts[first] : starts[first] + sizes.sum()]
        part = Partition(self.scheme, self.layout, sizes, flat, self.options, lambda: list(self.labels[first:stop]))
        groups = [g for g in self.groups if first <= g.block_ids[0] < stop]
        part.__dict__["groups"] = [BlockGroup(g.layer, g.index, g.block_ids - first) for g in groups]
        return part

    def within_layers(self) -> Partition:
        """Intersect every block with each layer, in layout order; a partition inside the layers comes back as it is."""
        if self._in_order:
            return self
        return self._pieces(np.argsort(self._entry_codes, kind="stable"))

    def refines(self, other: Partition) -> bool:
        """Whether every block lies inside one block of the other; both must be of the same layout, else InputError."""
        if not isinstance(other, Partition):
            raise TypeError(_NOT_PARTITION.format(got=type(other).__name__))
        if other.layout != self.layout:
            raise InputError(_OTHER_LAYOUT.format(other=other.layout.n_params, own=self.layout.n_params))
        if not self.num_blocks:
            return True
        theirs = other.block_of.numpy()[self.flat.numpy()]
        lowest = np.minimum.reduceat(theirs, self._starts)
        return bool(((lowest == np.maximum.reduceat(theirs, self._starts)) & (lowest >= 0)).all())

    def to_dataset(self, layer: str) -> xr.Dataset:
        """Describe one layer's weight as a matrix of block numbers, for ``fl.plot.partition``.

        ``block (output, input)``: the first axis of the weight by all others in memory order; ``bias_block (output)`` if there is a bias.
        Numbers are places in ``blocks``, -1 for no block.
        """
        info = self.layout.layer(layer)
        shown = info.weight or info.parameters[0]
        ids = self.block_of.numpy()
        rows = shown.shape[0] if shown.shape else 1
        kernel = (
            math.prod(shown.shape[2:])
            if info.kind == "conv"
            else math.prod(info.input_map[1:])
            if info.input_map
            else 1
        )
        number = {"long_name": "number of the block", "units": "1"}
        variables = {"block": (("output", "input"), ids[shown.start : shown.stop].reshape(rows, -1), number)}
        if info.bias is not None and info.bias is not shown:
            variables["bias_block"] = ("output", ids[info.bias.start : info.bias.stop], number)
        coords = {"output": np.arange(rows), "input": np.arange(variables["block"][1].shape[1])}
        window = shown.shape[2:] if info.kind == "conv" else info.input_map or ()
        width = window[-1] if window else 1
        facts = {"layer": layer, "scheme": self.scheme, "columns_per_channel": int(kernel), "kernel_width": int(width)}
        return make_dataset(variables, coords, method="segmentation of the parameters", **facts)

    def __len__(self) -> int:
        return self.num_blocks

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.blocks)

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        head = f"Partition {self.scheme!r}{options}: {self.num_blocks} blocks over {len(self.flat)} parameters"
        table = [("layer", "blocks", "sizes", "storage", "solve")]
        crossing = "(crossing layers)"
        for code, name in [*enumerate(self.layout.layer_names), (-1, crossing)]:
            sizes = self.sizes[self._layer_codes == code]
            if len(sizes):
                table.append((name, *self._facts(sizes)))
        table.append(("all", *self._facts(self.sizes)))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
        note = "storage: entries of all blocks in float32; solve: one Cholesky factor of each block, in FLOP"
        return "\n".join([head, *("  " + line.rstrip() for line in lines), note])

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum(self.sizes) - self.sizes

    @cached_property
    def _entry_codes(self) -> np.ndarray:
        """Number of the layer of each entry of ``flat``."""
        codes = np.empty(self.layout.n_params, dtype=np.int64)
        for code, layer in enumerate(self.layout.layers):
            for info in layer.parameters:
                codes[info.start : info.stop] = code
        return codes[self.flat.numpy()]

    @cached_property
    def _layer_codes(self) -> np.ndarray:
        """Number of the layer of each block, -1 where it crosses layers."""
        if not self.num_blocks:
            return np.empty(0, dtype=np.int64)
        codes, starts = self._entry_codes, self._starts
        if _ascends(codes) and self.sizes.min() > 0:
            return np.where(codes[starts] == codes[starts + self.sizes - 1], codes[starts], -1)
        lowest = np.minimum.reduceat(codes, starts)
        return np.where(lowest == np.maximum.reduceat(codes, starts), lowest, -1)

    @cached_property
    def _in_order(self) -> bool:
        """Whether no block crosses layers, and those of a layer follow those of the layer before."""
        return _ascends(np.concatenate([[0], self._layer_codes]))

    def _pieces(self, kept: np.ndarray) -> Partition:
        """Keep together only neighbours in ``kept`` (places in ``flat``) that are of one block and one layer."""
        parents = np.repeat(np.arange(self.num_blocks), self.sizes)[kept]
        codes = self._entry_codes[kept]
        starts = np.flatnonzero(np.diff(parents, prepend=-1).astype(bool) | np.diff(codes, prepend=-1).astype(bool))
        sizes = np.diff(starts, append=len(kept))
        parent, code = parents[starts], codes[starts]
        names = self.layout.layer_names

        def labels() -> list[str]:
            return [
                self.labels[b] if size == self.sizes[b] else f"{names[c]} {self.labels[b]}"
                for b, c, size in zip(parent, code, sizes, strict=True)
            ]

        flat = torch.from_numpy(self.flat.numpy()[kept])
        return Partition(self.scheme, self.layout, sizes, flat, self.options, labels)

    @staticmethod
    def _size_counts(sizes: np.ndarray) -> list[tuple[int, int]]:
        """Each size with the number of its blocks, as Python ints: cubes overflow 64 bits."""
        found, counts = np.unique(sizes, return_counts=True)
        return list(zip(found.tolist(), counts.tolist(), strict=True))

    @classmethod
    def _facts(cls, sizes: np.ndarray) -> tuple[str, str, str, str]:
        pairs = cls._size_counts(sizes)[::-1]
        shown = ", ".join(f"{count} x {size}" for size, count in pairs) or "none"
        if len(pairs) > 3:
            shown = f"{pairs[-1][0]} to {pairs[0][0]}"
        storage = errors.readable_bytes(4 * sum(size**2 * count for size, count in pairs))
        return str(len(sizes)), shown, storage, f"{sum(size**3 * count for size, count in pairs) / 3:.3g}"


def _ascends(x: np.ndarray) -> bool:
    return bool((x[1:] >= x[:-1]).all())


def partition(
    F_or_model: Any,
    scheme: str | Mapping[str, Any] | Partition,
    *,
    size: int | None = None,
    seed: int = 0,
    variant: str | None = None,
    input_maps: Mapping[str, Sequence[int] | None] | None = None,
) -> Partition:
    r"""Cut the parameters into disjoint blocks that cover them.

    .. math:: \{0, \dots, P - 1\} = \bigcup_b I_b, \qquad I_b \cap I_{b'} = \emptyset \; (b \ne b')

    ============ ================================== =============================== ==================================
    scheme       dense W (d_o, d_i)                 convolution (c_out, c_in/g, k)  bias
    ============ ================================== =============================== ==================================
    layer        with all else of the layer         same                            in the block
    parameter    each tensor                        same                            own block
    unit         row o, its incoming weights        output channel                  with its unit
    input        column i                           patch entry                     one block
    channel      source channel; input if plain     input channel                   one block
    kernel       as unit                            (out, in) channel pair          one block; dense: with its unit
    cw-ngd       see ``variant``                    channel pair                    one block
    mbf          columns (B) or rows (A) of [W, b]  channel pair                    in W's blocks; conv: single entries
    sequential   runs of ``size`` in flat order     same                            wherever it falls
    random       the same after one permutation     same                            wherever it falls
    diagonal     single entries                     same                            single entries
    ============ ================================== =============================== ==================================

    Normalisation layers: pairs (gamma, beta), one per channel, under unit, input, channel and kernel; single entries
    under cw-ngd and mbf, whose optimizers treat them by a scalar rule. What belongs to no known kind of layer
    (embeddings, recurrent and transposed layers, parameters of your own modules): under unit, input, channel and kernel
    the slices along the first axis of a tensor with two axes or more (an embedding's table rows), else single entries;
    under cw-ngd and mbf single entries.

    Parameters
    ----------
    F_or_model
        A Fisher or anything else with a ``.layout``, a Layout, or an ``nn.Module`` (its parameters that require grad).
    scheme
        A name from the table, a dict label -> flat indices (list, array or tensor of shape ``(s,)``) of your own, or a
        Partition of the same layout, which comes back as it is.
    size
        Parameters per block of "sequential" and "random", at least 1; the last block takes the remainder.
    seed
        Seeds the permutation of "random", with a generator of its own: global random state is neither read nor changed.
    variant
        "cw-ngd": "released" (default, the authors' code: dense weights by (unit, source channel) if fed by a flattened
        (C, H, W) map with H * W <= 16, by unit without its bias if the input is plain and d_i <= 16, else single
        entries), "2022" (our reading of the paper: dense by unit with its bias, convolutions by channel pair) or
        "2022-unit" (convolutions by output channel with its bias). "mbf": "B" (default, by input) or "A" (by unit).
    input_maps
        Dense layer name -> (C, H, W) of the map that was flattened to feed it, (C, 1, L) after a 1-d convolution
        and (C, D * H, W) after a 3-d one; None for a plain input. A Fisher knows
        them from its capture, and what is given here goes before it. A bare model does not: "channel" and the released
        "cw-ngd" then need an entry for the first dense layer after a convolution, in the order in which the model
        defines its modules, and for further ones of the same width that cannot be fed by the dense layer before them.
        A Layout alone is taken at its word: no map means plain.

    Returns
    -------
    Partition
        Blocks numbered in layout order, then as the scheme enumerates them. A kernel is labelled by its place in the
        weight (out, in), of a grouped convolution too; input channels and patch entries are counted over all groups, so
        that a grouped convolution has c_in channel blocks of (c_out / g) k entries.

    Raises
    ------
    InputError
        Unknown scheme or variant (with the nearest), an option the scheme does not have, a missing or impossible size
        or map; blocks of your own that are empty, out of range, overlapping or not covering (with the index).
    TypeError
        An owner, scheme, option or index of the wrong type.

    Notes
    -----
    Cost: O(P) memory and time, without a Python loop per block; ``blocks`` and ``labels`` are made when asked for.
    The rules of cw-ngd and mbf are those of the code their authors released (arXiv 2210.05268; arXiv 2202.04124);
    "2022", what groups, norm layers and unknown layers get, and the remaining schemes where literature has no fixed
    meaning for them, are our choice.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1))
    >>> p = partition(model, "unit")
    >>> p.labels
    ('0 unit 0', '0 unit 1', '2 unit 0')
    >>> p.blocks[1].tolist()
    [3, 4, 5, 7]
    >>> p.storage_entries, partition(model, "layer").storage_entries
    (41, 73)
    """
    layout, model = _layout_of(F_or_model)
    if isinstance(scheme, Partition):
        if scheme.layout != layout:
            raise InputError(_OTHER_LAYOUT.format(other=scheme.layout.n_params, own=layout.n_params))
        _reject_options(scheme.scheme, size=size, variant=variant, allowed=())
        return scheme
    if not isinstance(scheme, str | Mapping):
        raise TypeError(_WRONG_SCHEME.format(got=type(scheme).__name__, known=", ".join(SCHEMES)))
    layout = schemes.with_maps(layout, {} if input_maps is None else input_maps)
    if isinstance(scheme, Mapping):
        _reject_options(OWN, size=size, variant=variant, allowed=())
        flat, sizes = schemes.own_blocks(layout, scheme)
        names = tuple(scheme)
        return Partition(OWN, layout, sizes, torch.from_numpy(flat), {}, lambda: list(names))
    if scheme not in SCHEMES:
        hint = errors.nearest(scheme, SCHEMES)
        raise InputError(errors.UNKNOWN_NAME.format(what="partition scheme", name=scheme, hint=hint))
    if scheme in ("sequential", "random"):
        _reject_options(scheme, size=size, variant=variant, allowed=("size",))
        return _cut(layout, scheme, size, seed)
    variants = schemes.RULES[scheme]
    _reject_options(scheme, size=size, variant=variant, allowed=() if None in variants else ("variant",))
    variant = next(iter(variants)) if variant is None else variant
    if variant not in variants:
        hint = errors.nearest(str(variant), map(str, variants))
        raise InputError(errors.UNKNOWN_NAME.format(what=f"variant of {scheme!r}", name=variant, hint=hint))
    if model is not None and (scheme == "channel" or variant == "released"):
        schemes.require_maps(model, layout, scheme, input_maps or {})
    pieces = [piece for layer in layout.layers for piece in variants[variant](layer) if piece.index.size]
    flat = np.concatenate([np.empty(0, dtype=np.int64), *(piece.index.reshape(-1) for piece in pieces)])
    sizes = np.repeat([piece.index.shape[1] for piece in pieces], [len(piece.index) for piece in pieces])

    def labels() -> list[str]:
        return [label for piece in pieces for label in piece.labels()]

    options = {} if variant is None else {"variant": variant}
    return Partition(scheme, layout, sizes.astype(np.int64), torch.from_numpy(flat), options, labels)


def _layout_of(owner: Any) -> tuple[Layout, nn.Module | None]:
    """Find the layout; return the model too where that is all we were given."""
    if isinstance(owner, Layout):
        return owner, None
    if isinstance(owner, nn.Module):
        return Layout.from_model(owner), owner
    layout = getattr(owner, "layout", None)
    if not isinstance(layout, Layout):
        raise TypeError(_WRONG_OWNER.format(got=type(owner).__name__))
    return layout, None


def _reject_options(scheme: str, *, size: object, variant: object, allowed: tuple[str, ...]) -> None:
    owners = {"size": "'sequential' and 'random'", "variant": "'cw-ngd' and 'mbf'"}
    for option, value in (("size", size), ("variant", variant)):
        if value is not None and option not in allowed:
            raise InputError(_NO_OPTION.format(scheme=scheme, option=option, value=value, owners=owners[option]))


def _cut(layout: Layout, scheme: str, size: Any, seed: Any) -> Partition:
    if scheme == "random":
        flat, sizes = schemes.shuffled(layout, size, seed)
        options = {"size": int(size), "seed": int(seed)}
    else:
        flat, sizes = schemes.sequential(layout, size)
        options = {"size": int(size)}
    names = range(len(sizes))
    return Partition(scheme, layout, sizes, torch.from_numpy(flat), options, lambda: [f"{scheme} {i}" for i in names])
