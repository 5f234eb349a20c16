"""Which entries of a layer form one block: the rule of every named scheme, and the checks of what a user supplies.

A rule takes a :class:`LayerInfo` and yields pieces. A piece is a 2-D array of flat indices, one block per row, and a
callable for the names of its rows, so that a million single entries cost one ``arange`` and no Python loop.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from fisherlens.errors import InputError
from fisherlens.layout import ROOT, LayerInfo, Layout, ParameterInfo, module_kind

_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
LARGEST_SEGMENT = 16  # the released CW-NGD cuts dense weights into segments only up to this size

_BAD_SIZE = (
    "'sequential' and 'random' need size, the number of parameters per block, an int >= 1; got size={got!r}. "
    "Nothing in the network suggests one: pass size=9, for example, for the size of a 3 by 3 kernel."
)
_NOT_INTEGER = "{name} must be an int; got {got!r} of type {type}. Convert it explicitly, with int(...)."
_BAD_SEED = "seed must be an int >= 0, as it seeds a generator of its own; got {got}. Pass seed=0, for example."
_NEEDS_MAP = (
    "Scheme {scheme!r} must know which (channels, height, width) map was flattened to feed dense {layers}; "
    "got a bare model, which does not tell, and a convolution comes before it. Pass input_maps={{{remedy}}} with the "
    "sizes of your network (None where the input is no flattened map), or pass a Fisher instead of the model: its "
    "capture has seen the map."
)
_MAP_NOT_DENSE = (
    "input_maps describes the inputs of dense layers; {layer!r} is {kind} ({type}). A convolution's channels are known "
    "from its weight: leave it out."
)
_MAP_SHAPE = (
    "input_maps[{layer!r}] must be (channels, height, width), positive ints, or None for a plain input; got {got!r}. "
    "It is the shape, without the batch, that entered the flatten."
)
_MAP_SIZE = (
    "The map flattened into dense layer {layer!r} must have C * H * W = {wanted} entries, the inputs of its weight; "
    "got {got} = {product}. Probably the shape before a pooling, or of another layer: use the one that entered "
    "the flatten."
)
_OWN_EMPTY = "Block {label!r} of your own partition is empty; every block needs at least one index. Leave it out."
_OWN_LABEL = "The labels of your own partition must be strings; got {got!r} of type {type}. Use str(label)."
_OWN_DTYPE = (
    "Block {label!r} of your own partition must hold integer indices into the flat vector; got {got}. "
    "From a mask, take mask.nonzero(); from names, F.layout.index_of(names)."
)
_OWN_SHAPE = (
    "Block {label!r} of your own partition must be a flat list of indices, shape (s,); got shape {got}. "
    "Flatten it with .reshape(-1)."
)
_OWN_RANGE = (
    "Block {label!r} of your own partition has index {index}; indices run from 0 to {last}, as there are {count} "
    "parameters. Negative indices do not count from the end; print(layout) shows where each tensor lies."
)
_OWN_OVERLAP = (
    "Blocks must be disjoint; index {index} ({entry}) is in {where}{more}. Remove it from all but one; "
    "print(layout) shows where each tensor lies."
)
_OWN_MISSING = (
    "Blocks must cover all {count} parameters; index {index} ({entry}) is in no block{more}. Add the rest as a "
    "block of its own, or choose fewer parameters when you build the Fisher."
)
_MAPS_TYPE = (
    "input_maps must be a dict, dense layer name -> (C, H, W) or None; got {got}. "
    "Pass {{'fc': (16, 5, 5)}}, for example, with the name that print(layout) shows."
)


class Piece(NamedTuple):
    """Blocks of one size: ``index`` of shape ``(B, s)``, and the labels of the B rows when asked for."""

    index: np.ndarray
    labels: Callable[[], list[str]]


Rule = Callable[[LayerInfo], Iterator[Piece]]


def entry_label(info: ParameterInfo, offset: int) -> str:
    """Name one entry of a parameter, such as ``0.weight[3,2]``."""
    position = np.unravel_index(offset, info.shape) if info.shape else ()
    return f"{info.name}[{','.join(str(int(i)) for i in position)}]" if info.shape else info.name


def flat(info: ParameterInfo, *shape: int) -> np.ndarray:
    """Give the flat indices of a parameter in its own shape, or in the one given."""
    return np.arange(info.start, info.stop, dtype=np.int64).reshape(shape or info.shape)


def counted(prefix: str, *counts: int) -> Callable[[], list[str]]:
    """Labels ``prefix i,j`` over a grid of counts, the last running fastest."""
    return lambda: [f"{prefix} {','.join(map(str, position))}" for position in np.ndindex(*counts)]


def whole(info: ParameterInfo) -> Piece:
    """Make the tensor one block."""
    return Piece(flat(info, 1, info.numel), lambda: [info.name])


def entries(info: ParameterInfo) -> Piece:
    """Make every entry of the tensor a block of its own."""
    return Piece(flat(info, info.numel, 1), lambda: [entry_label(info, i) for i in range(info.numel)])


def rows(info: ParameterInfo) -> Piece:
    """Slices along the first axis of a tensor with two axes or more, single entries of any other."""
    if len(info.shape) < 2:
        return entries(info)
    count = info.shape[0]
    return Piece(flat(info, count, math.prod(info.shape[1:])), counted(f"{info.name} row", count))


def kind_of(layer: LayerInfo) -> str:
    """Give the layer's kind; "other" where its tensors do not have the shapes of that kind, as no rule fits them."""
    weight, bias = layer.weight, layer.bias
    if weight is None and bias is None:
        return "other"
    if weight is None:
        return layer.kind if layer.kind == "norm" or len(bias.shape) == 1 else "other"  # type: ignore[union-attr]
    wanted = {"dense": len(weight.shape) == 2, "conv": len(weight.shape) >= 3, "norm": True}
    outputs = weight.shape if layer.kind == "norm" else weight.shape[:1]
    return layer.kind if wanted.get(layer.kind, False) and (bias is None or bias.shape == outputs) else "other"


def split_weight(layer: LayerInfo, channels: int | None = None) -> np.ndarray:
    """Flat indices of the weight as ``(groups, outputs per group, inputs per group, positions)``.

    A dense weight is a convolution with one position per input, or, if its inputs were a flattened map, with
    ``channels`` inputs of d_i / channels positions.
    """
    weight = layer.weight
    assert weight is not None  # noqa: S101 - callers have looked
    outputs, inputs = weight.shape[0], channels if channels is not None else weight.shape[1]
    positions = math.prod(weight.shape[1:]) // inputs if inputs else 0
    return flat(weight, layer.groups, outputs // layer.groups, inputs, positions)


def extras(layer: LayerInfo) -> tuple[ParameterInfo, ...]:
    """Find the parameters no rule of the layer's kind speaks about."""
    if kind_of(layer) == "other":
        return layer.parameters
    return tuple(p for p in layer.parameters if p != layer.weight and p != layer.bias)


def of_layer(layer: LayerInfo) -> Iterator[Piece]:
    """One block per layer."""
    yield Piece(np.concatenate([flat(p, p.numel) for p in layer.parameters])[None], lambda: [layer.name])


def of_parameter(layer: LayerInfo) -> Iterator[Piece]:
    """One block per tensor."""
    yield from map(whole, layer.parameters)


def of_entry(layer: LayerInfo) -> Iterator[Piece]:
    """One block per entry."""
    yield from map(entries, layer.parameters)


def of_unit(layer: LayerInfo, word: str = "unit") -> Iterator[Piece]:
    """Incoming weights and bias of each output; (gamma, beta) of each channel of a norm layer."""
    if kind_of(layer) != "other":
        own = [p for p in (layer.weight, layer.bias) if p is not None]
        count = own[0].numel if layer.kind == "norm" else own[0].shape[0]
        joined = [flat(p, count, p.numel // count if count else 0) for p in own]
        yield Piece(np.concatenate(joined, axis=1), counted(f"{layer.name} {word}", count))
    yield from map(rows, extras(layer))


def _by_source(layer: LayerInfo, word: str, per_position: bool, channels: int | None = None) -> Iterator[Piece]:
    """All weights that read one input channel (or one of its positions), then the bias as one block."""
    if layer.weight is not None:
        weight = split_weight(layer, channels)
        groups, outputs, inputs, positions = weight.shape
        if per_position:
            index = weight.transpose(0, 2, 3, 1).reshape(groups * inputs * positions, outputs)
            counts = (groups * inputs, *layer.weight.shape[2:])
        else:
            index = weight.transpose(0, 2, 1, 3).reshape(groups * inputs, outputs * positions)
            counts = (groups * inputs,)
        yield Piece(index, counted(f"{layer.name} {word}", *counts))
    if layer.bias is not None:
        yield whole(layer.bias)


def of_input(layer: LayerInfo) -> Iterator[Piece]:
    """Columns of the weight matrix, one per input or patch entry; the bias is one block."""
    if kind_of(layer) in ("norm", "other"):
        yield from of_unit(layer, "input")
        return
    yield from _by_source(layer, "input", per_position=True)
    yield from map(rows, extras(layer))


def of_channel(layer: LayerInfo) -> Iterator[Piece]:
    """All weights from one source channel; the bias is one block."""
    kind = kind_of(layer)
    if kind in ("norm", "other"):
        yield from of_unit(layer, "channel")
        return
    plain = kind == "dense" and layer.input_map is None
    channels = layer.input_map[0] if kind == "dense" and layer.input_map else None
    yield from _by_source(layer, "input" if plain else "channel", per_position=False, channels=channels)
    yield from map(rows, extras(layer))


def _channel_pairs(layer: LayerInfo) -> Iterator[Piece]:
    if layer.weight is not None:
        outputs, inputs, *window = layer.weight.shape
        index = flat(layer.weight, outputs * inputs, math.prod(window))
        yield Piece(index, counted(f"{layer.name} kernel", outputs, inputs))


def of_kernel(layer: LayerInfo) -> Iterator[Piece]:
    """Convolution: (out, in) channel pairs, the bias one block; every other layer as by unit."""
    if kind_of(layer) != "conv":
        yield from of_unit(layer)
        return
    yield from _channel_pairs(layer)
    if layer.bias is not None:
        yield whole(layer.bias)
    yield from map(rows, extras(layer))


def _dense_segments(layer: LayerInfo) -> Iterator[Piece]:
    """Apply the dense rule of the released CW-NGD: short segments of a unit's row, or single entries."""
    if layer.weight is None:
        return
    outputs, inputs = layer.weight.shape
    channels = layer.input_map[0] if layer.input_map else 0
    if channels and inputs // channels <= LARGEST_SEGMENT:
        index = flat(layer.weight, outputs * channels, inputs // channels)
        yield Piece(index, counted(f"{layer.name} segment", outputs, channels))
    elif not channels and inputs <= LARGEST_SEGMENT:
        yield Piece(flat(layer.weight), counted(f"{layer.name} unit", outputs))
    else:
        yield entries(layer.weight)


def of_cwngd(layer: LayerInfo) -> Iterator[Piece]:
    """CW-NGD as its authors released it: kernels, dense segments, the bias of a layer as one block."""
    kind = kind_of(layer)
    if kind in ("norm", "other"):
        yield from of_entry(layer)
        return
    yield from _channel_pairs(layer) if kind == "conv" else _dense_segments(layer)
    if layer.bias is not None:
        yield whole(layer.bias)
    yield from map(entries, extras(layer))


def of_cwngd_2022(layer: LayerInfo, convolution: Rule = of_kernel) -> Iterator[Piece]:
    """CW-NGD as read from the paper: dense units; channel pairs or, with ``of_unit``, output channels."""
    rules: dict[str, Rule] = {"dense": of_unit, "conv": convolution}
    yield from _without_extras(rules.get(kind_of(layer), of_entry), layer)


def of_mbf(layer: LayerInfo, dense: Rule = of_input) -> Iterator[Piece]:
    """MBF: dense inputs (variant B) or, with ``of_unit``, units (A); channel pairs with single conv biases."""
    if kind_of(layer) != "conv":
        yield from _without_extras(dense if kind_of(layer) == "dense" else of_entry, layer)
        return
    yield from _channel_pairs(layer)
    yield from (entries(p) for p in layer.parameters if p != layer.weight)


def _without_extras(rule: Rule, layer: LayerInfo) -> Iterator[Piece]:
    """Apply a rule to weight and bias only; what else the layer owns is left as single entries."""
    others = extras(layer)
    if kind_of(layer) == "other" or not others:
        yield from rule(layer)
        return
    yield from rule(replace(layer, parameters=tuple(p for p in layer.parameters if p not in others)))
    yield from map(entries, others)


RULES: dict[str, dict[str | None, Rule]] = {
    "layer": {None: of_layer},
    "parameter": {None: of_parameter},
    "unit": {None: of_unit},
    "input": {None: of_input},
    "channel": {None: of_channel},
    "kernel": {None: of_kernel},
    "cw-ngd": {
        "released": of_cwngd,
        "2022": of_cwngd_2022,
        "2022-unit": lambda layer: of_cwngd_2022(layer, of_unit),
    },
    "mbf": {"B": of_mbf, "A": lambda layer: of_mbf(layer, of_unit)},
    "diagonal": {None: of_entry},
}


def sequential(layout: Layout, size: Any) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices and block sizes of runs of ``size`` parameters; the last takes the remainder."""
    if size is None or (step := _integer("size", size)) < 1:
        raise InputError(_BAD_SIZE.format(got=size))
    count = layout.n_params
    sizes = np.full(-(-count // step), min(step, count), dtype=np.int64)
    sizes[-1:] = count - step * (len(sizes) - 1)
    return np.arange(count, dtype=np.int64), sizes


def shuffled(layout: Layout, size: Any, seed: Any) -> tuple[np.ndarray, np.ndarray]:
    """Cut the same runs after one permutation; inside a block the indices ascend."""
    flat, sizes = sequential(layout, size)
    if (own := _integer("seed", seed)) < 0:
        raise InputError(_BAD_SEED.format(got=own))
    block = np.empty_like(flat)
    block[np.random.default_rng(own).permutation(len(flat))] = np.repeat(np.arange(len(sizes)), sizes)
    return np.argsort(block, kind="stable"), sizes


def own_blocks(layout: Layout, blocks: Mapping[Any, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices and block sizes of a dict label -> indices, after the check that it is a disjoint cover."""
    count = layout.n_params
    arrays = [_own_block(label, value, count) for label, value in blocks.items()]
    labels = list(blocks)
    flat = np.concatenate([np.empty(0, dtype=np.int64), *arrays])
    sizes = np.array([len(array) for array in arrays], dtype=np.int64)
    uses = np.bincount(flat, minlength=count)
    if len(shared := np.flatnonzero(uses > 1)):
        first = int(shared[0])
        holders = np.repeat(np.arange(len(sizes)), sizes)[flat == first]
        names = list(dict.fromkeys(repr(labels[b]) for b in holders))
        where = f"{' and '.join(names)}" if len(names) > 1 else f"{names[0]} {len(holders)} times"
        entry, more = _entry_at(layout, first), _and_more(len(shared) - 1)
        raise InputError(_OWN_OVERLAP.format(index=first, entry=entry, where=where, more=more))
    if len(missing := np.flatnonzero(uses == 0)):
        first = int(missing[0])
        entry, more = _entry_at(layout, first), _and_more(len(missing) - 1)
        raise InputError(_OWN_MISSING.format(count=count, index=first, entry=entry, more=more))
    return flat, sizes


def _own_block(label: Any, value: Any, count: int) -> np.ndarray:
    if not isinstance(label, str):
        raise TypeError(_OWN_LABEL.format(got=label, type=type(label).__name__))
    if not isinstance(value, Tensor | np.ndarray | Sequence) or isinstance(value, str):
        raise TypeError(_OWN_DTYPE.format(label=label, got=type(value).__name__))
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.size == 0:
        raise InputError(_OWN_EMPTY.format(label=label))
    if array.dtype.kind not in "iu":
        raise TypeError(_OWN_DTYPE.format(label=label, got=f"dtype {array.dtype}"))
    if array.ndim != 1:
        raise InputError(_OWN_SHAPE.format(label=label, got=array.shape))
    outside = array[(array < 0) | (array >= count)]
    if len(outside):
        raise InputError(_OWN_RANGE.format(label=label, index=outside[0], last=count - 1, count=count))
    return array.astype(np.int64)


def with_maps(layout: Layout, maps: Any) -> Layout:
    """Tell the layout of the given input maps, after a check of every map that it then has."""
    if not isinstance(maps, Mapping):
        raise TypeError(_MAPS_TYPE.format(got=type(maps).__name__))
    given = {}
    for name, shape in maps.items():
        layer = layout.layer(name)
        if layer.kind != "dense":
            raise InputError(_MAP_NOT_DENSE.format(layer=name, kind=layer.kind, type=layer.type_name))
        given[name] = _checked_map(name, shape)
    if given:
        changed = [replace(x, input_map=given[x.name]) if x.name in given else x for x in layout.layers]
        layout = Layout(changed)
    for layer in layout.layers:
        if layer.input_map is not None and kind_of(layer) == "dense" and layer.weight is not None:
            product, wanted = math.prod(layer.input_map), layer.weight.shape[1]
            if product != wanted:
                text = " * ".join(map(str, layer.input_map))
                raise InputError(_MAP_SIZE.format(layer=layer.name, wanted=wanted, got=text, product=product))
    return layout


def require_maps(model: nn.Module, layout: Layout, scheme: str, maps: Mapping[str, Any]) -> None:
    """Refuse to guess what a bare model flattens into the dense layers that follow its convolutions."""
    unknown = [name for name in _after_convolution(model) if name in layout.layer_names and name not in maps]
    needed = {name: layout.layer(name).weight for name in unknown}
    shapes = {name: weight.shape for name, weight in needed.items() if weight is not None}
    if shapes:
        layers = ", ".join(f"{name!r} (weight {shape})" for name, shape in shapes.items())
        remedy = ", ".join(f"{name!r}: (C, H, W)" for name in shapes)
        raise InputError(_NEEDS_MAP.format(scheme=scheme, layers=layers, remedy=remedy))


def _after_convolution(model: nn.Module) -> list[str]:
    """Dense layers that a convolution may feed through a flatten, in the order of definition.

    The first one after a convolution, and its siblings: of the same width, which the dense layer just before them
    cannot feed (two heads on one flattened map).
    """
    found: list[str] = []
    pending, width, before = False, -1, -1
    for name, module in model.named_modules():
        if isinstance(module, _CONVOLUTIONS):
            pending = True
        elif module_kind(module) == "dense":
            d_o, d_i = module.out_features, module.in_features
            if pending or (d_i == width and d_i != before):
                found.append(name or ROOT)
                width = d_i
            pending, before = False, d_o
    return found


def _checked_map(name: str, shape: Any) -> tuple[int, int, int] | None:
    if shape is None:
        return None
    good = isinstance(shape, Sequence) and not isinstance(shape, str) and len(shape) == 3
    if not good or any(isinstance(x, bool) or not hasattr(x, "__index__") or x < 1 for x in shape):
        raise InputError(_MAP_SHAPE.format(layer=name, got=shape))
    channels, height, width = map(operator.index, shape)
    return channels, height, width


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(_NOT_INTEGER.format(name=name, got=value, type=type(value).__name__))
    return operator.index(value)


def _entry_at(layout: Layout, index: int) -> str:
    info = next(p for p in layout.parameters if p.start <= index < p.stop)
    return entry_label(info, index - info.start)


def _and_more(count: int) -> str:
    return f" ({count} more like it)" if count else ""
