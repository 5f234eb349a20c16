"""Stand-ins made of one small structured matrix per layer, in bases that Kronecker factors give."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from fisherlens import errors
from fisherlens.approximations.base import Approximation
from fisherlens.approximations.block_diagonal import BlockDiagonal
from fisherlens.errors import InputError, MemoryBudgetError, UnsupportedModuleError, readable_bytes
from fisherlens.fisher import Fisher, require_fisher
from fisherlens.layout import LayerInfo
from fisherlens.linalg.kronecker import EIGH, KroneckerPair, RotatedDiagonal
from fisherlens.partitions import partition as make_partition
from fisherlens.scores.replay import as_matrices, as_vectors, has_factors

#: what an entry of a layer's piece of the vector meets: a structure of its own, or the layer's own block or diagonal
Part = KroneckerPair | RotatedDiagonal | BlockDiagonal

FORMS, OTHERS = ("expand", "reduce"), ("raise", "diagonal", "block")

_NO_FACTORS = (
    "{what} has no Kronecker factors for layer {name!r} ({type_name}){why}. Supported are torch.nn.Linear, Conv1d, Conv2d and Conv3d, by exact type, each "
    "with its own parameters. others='diagonal' gives all other layers their exact diagonal, others='block' their exact block; "
    "F.restrict([...]) leaves them out."
)


def check_choice(what: str, value: Any, known: tuple[str, ...]) -> str:
    """Refuse what is none of the known words, naming the nearest."""
    if value not in known:
        raise InputError(errors.UNKNOWN_NAME.format(what=what, name=value, hint=errors.nearest(value, known)))
    return value


class Layerwise(Approximation):
    """What KFAC and EKFAC share: one structure per layer with factors, the exact diagonal or block for any other.

    Parameters
    ----------
    F
        The Fisher operator.
    name
        As results and messages call it.
    others
        What layers without factors get: ``"raise"``, ``"diagonal"`` or ``"block"``.
    """

    def __init__(self, F: Fisher, name: str, others: str):
        require_fisher(F)
        check_choice("value of others", others, OTHERS)
        super().__init__(F, name, make_partition(F, "layer"))
        self.others = others
        without = [layer for layer in F.layout.layers if not has_factors(F, layer.name)]
        if without and others == "raise":
            raise UnsupportedModuleError(_no_factors(type(self).__name__, without[0]))
        with_factors = [layer for layer in F.layout.layers if layer not in without]
        self._require_room(with_factors)
        parts: dict[str, Part] = dict(self._build([layer.name for layer in with_factors])) if with_factors else {}
        if without:
            scheme = make_partition(F, "diagonal" if others == "diagonal" else "layer")
            parts |= {layer.name: BlockDiagonal.part_of(F, scheme, layer.name) for layer in without}
        self._parts = {name: parts[name] for name in F.layout.layer_names}
        self._errors: dict[str, float] = {}

    @abstractmethod
    def _build(self, names: list[str]) -> Mapping[str, Part]:
        """The structures of layers with factors."""

    @abstractmethod
    def _held(self, d_o: int, d: int) -> int:
        """Bytes held at most for one pair of these orders."""

    def _prepare_flops(self, d_o: int, d: int) -> float:
        """Operations that prepare solves with one pair."""
        return EIGH * (d_o**3 + d**3)

    def _part_bytes(self, layer: LayerInfo, _: Any) -> int:
        """Bytes held for a layer with a structure."""
        return layer.groups * self._held(*orders(layer))

    def _part_flops(self, layer: LayerInfo, _: Any) -> float:
        """Operations that prepare solves for a layer with a structure."""
        return layer.groups * self._prepare_flops(*orders(layer))

    @abstractmethod
    def _structure_errors(self, names: list[str]) -> dict[str, float]:
        """‖F_l - F̂_l‖² of layers with a structure."""

    @abstractmethod
    def _invert(self, part: KroneckerPair | RotatedDiagonal, w: Tensor, damping: float) -> Tensor: ...

    @abstractmethod
    def _log_det(self, part: KroneckerPair | RotatedDiagonal, damping: float) -> float: ...

    def _require_room(self, layers: list[LayerInfo]) -> None:
        held = {layer.name: layer.groups * self._held(*orders(layer)) for layer in layers}
        if sum(held.values()) > self._fisher.memory:
            largest = max(held, key=held.__getitem__)
            raise MemoryBudgetError(
                f"The factors of {type(self).__name__} take {readable_bytes(sum(held.values()))}, over the budget of {readable_bytes(self._fisher.memory)}; "
                f"the largest are those of layer {largest!r} with {readable_bytes(held[largest])}. Leave it out with F.restrict([...]), or raise "
                "memory= of the Fisher."
            )

    def _layers(self) -> list[tuple[LayerInfo, Part]]:
        return [(layer, self._parts[layer.name]) for layer in self.layout.layers]

    def _apply(self, v: Tensor, act: Callable[[Any, Tensor], Tensor], other: Callable[[Any, Tensor], Tensor]) -> Tensor:
        pieces = []
        for layer, part in self._layers():
            own = v[layer.start : layer.stop]
            if isinstance(part, BlockDiagonal):
                pieces.append(other(part, own))
            else:
                pieces.append(as_vectors(layer, act(part, as_matrices(layer, own))))
        return torch.cat(pieces)

    def _product(self, v: Tensor) -> Tensor:
        return self._apply(v, lambda part, w: part.product(w), lambda part, own: part._product(own))

    def _solve(self, v: Tensor, damping: float) -> Tensor:
        return self._apply(
            v, lambda part, w: self._invert(part, w, damping), lambda part, own: part._solve(own, damping)
        )

    def _log_determinant(self, damping: float) -> float:
        return sum(
            part._log_determinant(damping) if isinstance(part, BlockDiagonal) else self._log_det(part, damping)
            for part in self._parts.values()
        )

    def diagonal(self) -> Tensor:
        """F̂_ii, flat ``(P,)``."""
        pieces = [
            part.diagonal()
            if isinstance(part, BlockDiagonal)
            else as_vectors(layer, part.diagonal()[None])[:, 0].to(self.dtype)
            for layer, part in self._layers()
        ]
        return torch.cat(pieces)

    def squared_norm(self) -> float:
        """‖F̂‖²."""
        return sum(part.squared_norm() for part in self._parts.values())

    def within_block_errors(self) -> dict[str, float]:
        """‖F_l - F̂_l‖² of every layer by name, squared Frobenius norms in nat².

        A difference of squared norms, so an error below about ε ‖F_l‖² is rounding; it is never below 0.
        """
        missing = [name for name in self._parts if name not in self._errors]
        with_structure = [name for name in missing if not isinstance(self._parts[name], BlockDiagonal)]
        found = self._structure_errors(with_structure) if with_structure else {}
        for name in missing:
            if name not in found:
                part = self._parts[name]
                found[name] = 0.0 if self.others == "block" else self._norm2(name) - part.squared_norm()
        self._errors |= {name: max(value, 0.0) for name, value in found.items()}
        return {name: self._errors[name] for name in self._parts}

    def within_block_error(self) -> float:
        """Σ_l ‖F_l - F̂_l‖² over the layers; see :meth:`within_block_errors`."""
        return sum(self.within_block_errors().values())

    def _norm2(self, name: str) -> float:
        return self._fisher.restrict(name).frobenius_norm() ** 2

    def on_layer(self, layer: str) -> Self:
        """The block of one layer, as a stand-in for ``F.restrict(layer)``."""
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__)
        own = self._fisher.restrict(layer)
        Approximation.__init__(part, own, self.name, make_partition(own, "layer"))
        part._parts = {layer: self._parts[layer]}
        part._errors = {layer: self._errors[layer]} if layer in self._errors else {}
        return part

    @property
    def storage_bytes(self) -> int:
        """Bytes of what F̂ is made of; what solves keep beside it is not counted."""
        return sum(
            part.storage_bytes if isinstance(part, BlockDiagonal) else self._part_bytes(layer, part)
            for layer, part in self._layers()
        )

    @property
    def solve_flops(self) -> float:
        """Operations of the eigendecompositions or Cholesky factors that solves use."""
        return sum(
            part.solve_flops if isinstance(part, BlockDiagonal) else self._part_flops(layer, part)
            for layer, part in self._layers()
        )

    def _by_layer(self, pick: Callable[[Any], Tensor]) -> dict[str, Tensor]:
        """One matrix per layer with a structure, ``(d, d)``; with groups one for each, ``(groups, d, d)``."""
        found = {name: pick(part) for name, part in self._parts.items() if not isinstance(part, BlockDiagonal)}
        return {name: matrix[0] if len(matrix) == 1 else matrix for name, matrix in found.items()}


def orders(layer: LayerInfo) -> tuple[int, int]:
    """Orders d_o and d of the factors of one group; d counts the 1 of the bias."""
    d_o = (layer.weight or layer.bias).shape[0] // layer.groups
    return d_o, layer.size // (layer.groups * d_o)


def _no_factors(what: str, layer: LayerInfo) -> str:
    if layer.kind in ("dense", "conv"):
        why = ": its score rows are not explained by its inputs and outputs, as it has parameters of other modules (tied or borrowed) or ones of its own"
    elif layer.kind == "other" and len(layer.parameters) and layer.name == "(root)":
        why = f": parameter {layer.parameters[0].name!r} belongs to the network itself"
    else:
        why = ""
    return _NO_FACTORS.format(what=what, name=layer.name, type_name=layer.type_name, why=why)
