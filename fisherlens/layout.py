"""Where each parameter lives in the flat vector, and what its layer looks like."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fisherlens import errors
from fisherlens.errors import InputError

ROOT = "(root)"

_DENSE = (nn.Linear,)
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class ParameterInfo:
    """One parameter tensor: its name, shape and place in the flat vector."""

    name: str
    shape: tuple[int, ...]
    start: int
    layer: str
    aliases: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        return self.start + self.numel

    @property
    def leaf(self) -> str:
        """The last part of the name, such as ``weight``."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class LayerInfo:
    """One layer: the module that owns the parameters, as a contiguous piece of the flat vector.

    ``weight`` and ``bias`` are None where that parameter does not exist or was not selected.
    ``input_map`` is the (channels, height, width) that was flattened to feed a dense layer, if known.
    """

    name: str
    kind: str  # "dense" | "conv" | "norm" | "embedding" | "other"
    type_name: str
    parameters: tuple[ParameterInfo, ...]
    weight: ParameterInfo | None
    bias: ParameterInfo | None
    groups: int = 1
    input_map: tuple[int, int, int] | None = None

    @property
    def start(self) -> int:
        return self.parameters[0].start

    @property
    def stop(self) -> int:
        return self.parameters[-1].stop

    @property
    def size(self) -> int:
        return self.stop - self.start

    def __len__(self) -> int:
        return self.size


def module_kind(module: nn.Module) -> str:
    """The family of a module, by exact type: a look-alike from another library is "other"."""
    if type(module) in _DENSE:
        return "dense"
    if type(module) in _CONV:
        return "conv"
    if type(module) in _NORM:
        return "norm"
    if type(module) is nn.Embedding:
        return "embedding"
    return "other"


class FunctionModel(nn.Module):
    """A plain function ``f(params, inputs)`` and its dict of tensors, where a module is expected.

    All tensors count as parameters, whether they require grad or not; a dot in a name separates layer and parameter.
    """

    def __init__(self, function: Callable[[dict[str, Tensor], Any], Tensor], values: Mapping[str, Tensor]):
        super().__init__()
        wrong = [
            name for name, value in values.items() if not isinstance(value, Tensor) or not value.is_floating_point()
        ]
        if not values or wrong:
            raise InputError(
                f"A function as model needs params as a dict name → floating-point tensor; got {wrong or 'an empty dict'}. "
                "Pass fl.Fisher(f, data, params={'w': ...}) with f(params, inputs)."
            )
        self.function, self.values = function, dict(values)
        self.training = False

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, Tensor]]:  # type: ignore[override]
        yield from self.values.items()

    def forward(self, inputs: Any) -> Tensor:
        return self.function(self.values, inputs)


def named(names: Any) -> list[str]:
    """One name or several as a list; anything else is a TypeError."""
    wanted = [names] if isinstance(names, str) else list(names) if isinstance(names, Iterable) else [names]
    for name in wanted:
        if not isinstance(name, str):
            raise TypeError(f"Expected names of layers or parameters, a text or a list of texts; got {name!r}.")
    return wanted


class Layout:
    """The order of the selected parameters, which is that of ``named_parameters()``.

    Iterating gives parameter names; ``layout[name]`` is a :class:`ParameterInfo`;
    ``layout.layers`` are the layers in order, each a contiguous slice of the flat vector.
    """

    def __init__(self, layers: Sequence[LayerInfo]):
        self.layers: tuple[LayerInfo, ...] = tuple(layers)
        self.parameters: tuple[ParameterInfo, ...] = tuple(p for layer in self.layers for p in layer.parameters)
        self._by_name = {p.name: p for p in self.parameters}
        self._layer_by_name = {layer.name: layer for layer in self.layers}

    @classmethod
    def from_model(cls, model: nn.Module, params: Sequence[str] | str | None = None) -> Layout:
        """Lay out the parameters that require grad, or those that match names or glob patterns."""
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be a torch.nn.Module; got {type(model).__name__}. Pass the network itself, not its class or outputs."
            )
        chosen = _select(model, params)
        modules = dict(model.named_modules())
        aliases: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            aliases.setdefault(id(parameter), []).append(name)
        layers: list[LayerInfo] = []
        grouped: dict[str, list[ParameterInfo]] = {}
        start = 0
        for name, parameter in chosen.items():
            owner = name.rpartition(".")[0] or ROOT
            others = tuple(alias for alias in aliases[id(parameter)] if alias != name)
            info = ParameterInfo(name, tuple(parameter.shape), start, owner, others)
            grouped.setdefault(owner, []).append(info)
            start = info.stop
        for owner, infos in grouped.items():
            module = modules.get("" if owner == ROOT else owner, model)
            kind = module_kind(module)
            own = {info.leaf: info for info in infos}
            layers.append(
                LayerInfo(
                    name=owner,
                    kind=kind,
                    type_name=type(module).__name__,
                    parameters=tuple(infos),
                    weight=own.get("weight") if kind in ("dense", "conv", "norm") else None,
                    bias=own.get("bias") if kind in ("dense", "conv", "norm") else None,
                    groups=getattr(module, "groups", 1) if kind == "conv" else 1,
                )
            )
        return cls(layers)

    def with_input_maps(self, maps: Mapping[str, tuple[int, int, int]]) -> Layout:
        """The same layout, told which (channels, height, width) maps were flattened into dense layers."""
        layers = [
            replace(layer, input_map=tuple(maps[layer.name])) if layer.name in maps else layer for layer in self.layers
        ]
        return Layout(layers)

    def restrict(self, names: Sequence[str]) -> Layout:
        """The layout of some layers alone, in the same order, counted from 0."""
        wanted = {self.layer(name).name for name in names}
        layers, start = [], 0
        for layer in self.layers:
            if layer.name in wanted:
                moved = {p.name: replace(p, start=p.start - layer.start + start) for p in layer.parameters}
                weight, bias = (None if p is None else moved[p.name] for p in (layer.weight, layer.bias))
                layers.append(replace(layer, parameters=tuple(moved.values()), weight=weight, bias=bias))
                start += layer.size
        return Layout(layers)

    @property
    def n_params(self) -> int:
        return self.parameters[-1].stop

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    @property
    def layer_names(self) -> tuple[str, ...]:
        return tuple(self._layer_by_name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> ParameterInfo:
        if name not in self._by_name:
            hint = errors.nearest(name, self.names)
            raise InputError(errors.UNKNOWN_NAME.format(what="parameter", name=name, hint=hint))
        return self._by_name[name]

    def layer(self, name: str) -> LayerInfo:
        """The layer of this name; an unknown one is an InputError that names the nearest."""
        if name not in self._layer_by_name:
            hint = errors.nearest(name, self.layer_names)
            raise InputError(errors.UNKNOWN_NAME.format(what="layer", name=name, hint=hint))
        return self._layer_by_name[name]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.parameters == other.parameters

    def __hash__(self) -> int:
        return hash(self.parameters)

    def index_of(self, names: str | Sequence[str]) -> Tensor:
        """Flat indices of layers or parameters, by name or glob pattern, in layout order, each once."""
        wanted = named(names)
        if not wanted:
            raise InputError("No layer or parameter was named; print(F.layout) lists them.")
        pieces: set[tuple[int, int]] = set()
        for name in wanted:
            hits = [(p.start, p.stop) for p in self.parameters if fnmatch.fnmatchcase(p.name, name)]
            hits += [(p.start, p.stop) for x in self.layers if fnmatch.fnmatchcase(x.name, name) for p in x.parameters]
            if not hits:
                hint = errors.nearest(name, (*self.layer_names, *self.names))
                raise InputError(errors.UNKNOWN_NAME.format(what="layer or parameter", name=name, hint=hint))
            pieces.update(hits)
        return torch.cat([torch.arange(a, b, device="cpu") for a, b in sorted(pieces)])

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """A dict name → tensor, of the parameters' shapes or with one trailing axis K, as ``(P,)`` or ``(P, K)``."""
        if set(tensors) != set(self._by_name):
            missing = sorted(set(self._by_name) - set(tensors))
            extra = sorted(set(tensors) - set(self._by_name))
            raise InputError(
                f"A dict vector must hold exactly the keys of the layout; missing {missing}, unknown {extra}. "
                "print(F.layout) lists names and shapes."
            )
        pieces = []
        for info in self.parameters:
            tensor = tensors[info.name]
            extra_axes = tensor.shape[len(info.shape) :]
            if tuple(tensor.shape[: len(info.shape)]) != info.shape or len(extra_axes) > 1:
                raise InputError(
                    f"Entry {info.name!r} must have shape {info.shape} or {(*info.shape, 'K')}; got {tuple(tensor.shape)}."
                )
            pieces.append(tensor.reshape(info.numel, *extra_axes))
        widths = {tuple(piece.shape[1:]) for piece in pieces}
        if len(widths) > 1:
            raise InputError(f"The entries of a dict of vectors must agree on the trailing axis; got {sorted(widths)}.")
        return torch.cat(pieces)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """``(P,)`` or ``(P, K)`` as a dict of views name → tensor of the parameter's shape (and K)."""
        return {p.name: flat[p.start : p.stop].reshape((*p.shape, *flat.shape[1:])) for p in self.parameters}

    def parameter_labels(self) -> np.ndarray:
        """One label per entry of the flat vector, such as ``0.weight[3,2]``."""
        labels: list[str] = []
        for info in self.parameters:
            for index in np.ndindex(*info.shape):
                labels.append(f"{info.name}[{','.join(map(str, index))}]" if index else info.name)
        return np.array(labels)

    def parameter_layers(self) -> np.ndarray:
        """The layer name of each entry of the flat vector."""
        return np.concatenate([np.full(layer.size, layer.name) for layer in self.layers])

    def __repr__(self) -> str:
        lines = [f"Layout: {self.n_params} parameters in {len(self.layers)} layers"]
        for layer in self.layers:
            shapes = ", ".join(f"{p.leaf} {p.shape}" for p in layer.parameters)
            lines.append(f"  [{layer.start}:{layer.stop}] {layer.name} ({layer.type_name}): {shapes}")
        return "\n".join(lines)


def _select(model: nn.Module, params: Sequence[str] | str | None) -> dict[str, nn.Parameter]:
    every = dict(model.named_parameters())
    lazy = [name for name, parameter in every.items() if is_lazy(parameter)]
    if lazy:
        raise InputError(
            f"Parameter {lazy[0]!r} belongs to a lazy module that has seen no input, so its shape is not known yet. Run one forward pass first: "
            "model(inputs)."
        )
    if params is None and isinstance(model, FunctionModel):
        return every
    if params is None:
        chosen = {name: p for name, p in every.items() if p.requires_grad}
        if not chosen:
            raise InputError(
                f"The model ({type(model).__name__}) has no parameter that requires grad, so its Fisher is empty. "
                "Set requires_grad on the parameters of interest, or pass params=[...] with their names."
            )
        return chosen
    if not isinstance(params, (str, Sequence, set, frozenset)) or not all(isinstance(name, str) for name in params):
        raise TypeError(f"params must be None, a name, or a list of names, layers or glob patterns; got {params!r}.")
    patterns = [params] if isinstance(params, str) else list(params)
    chosen_names: set[str] = set()
    for pattern in patterns:
        hits = [n for n in every if n == pattern or fnmatch.fnmatchcase(n, pattern) or n.startswith(pattern + ".")]
        if not hits:
            hint = errors.nearest(pattern, every)
            raise InputError(errors.UNKNOWN_NAME.format(what="parameter or pattern", name=pattern, hint=hint))
        chosen_names.update(hits)
    if not chosen_names:
        raise InputError(
            "params is an empty list, so there is nothing to analyse. Pass None for all that require grad."
        )
    return {name: p for name, p in every.items() if name in chosen_names}
