"""What methods share that keep one record per layer: sums of the passes, periods of inversion, batched inverses, state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fisherlens.errors import NonFiniteError
from fisherlens.layout import LayerInfo
from fisherlens.linalg.memory import Workspace
from fisherlens.optim import texts
from fisherlens.optim.base import NaturalGradient
from fisherlens.optim.checks import all_finite, whole
from fisherlens.optim.factors import damped_inverses, normal
from fisherlens.optim.moments import ROWS_BYTES
from fisherlens.optim.tap import Call, Pass


def accumulate(sums: dict[str, Any], layer: LayerInfo, found: Any) -> None:
    """Add what one pass has brought to the sums of the coming step."""
    sums[layer.name] = sums[layer.name] + found if layer.name in sums else found


class LayerWise(NaturalGradient):
    """A method that keeps one record of tensors and counters per layer, made when the first statistics arrive.

    Subclasses say how a record starts, by :meth:`_new` for a layer or by :meth:`_made` for all.
    """

    _records: dict[str, Any] | None = None

    def __init__(self, model: nn.Module, given: Mapping[str, Any]):
        self.inverse_refresh = whole("inverse_refresh", given.get("inverse_refresh", 1))
        self._workspace = Workspace(limit=2 * ROWS_BYTES)
        self._drop()
        super().__init__(model, given)

    def _made(self) -> dict[str, Any]:
        """Make the records of all layers, in the dtype and on the device of the parameters."""
        return {layer.name: self._new(layer, self._parameters[0]) for layer in self.covered}

    def _new(self, layer: LayerInfo, like: Tensor) -> Any:
        """Make the record of one layer."""
        raise NotImplementedError

    def _record_of(self, layer: LayerInfo) -> Any:
        if self._records is None:
            self._records = self._made()
        return self._records[layer.name]

    @property
    def _inverse_due(self) -> bool:
        return self.diagnostics["steps"] % self.inverse_refresh == 0

    def _layers(self, one: Pass) -> Iterator[tuple[LayerInfo, list[Call]]]:
        """Layers of a pass with their calls."""
        for layer in self.covered:
            if layer.name in one.calls:
                yield layer, one.calls[layer.name]

    def _drop(self) -> None:
        self._sums: dict[str, Any] = {}

    def _require_finite_parts(self, parts: Iterable[tuple[str, Sequence[Tensor]]]) -> None:
        """Refuse statistics with NaN or infinity before anything is changed, naming their layer."""
        for name, tensors in parts:
            if not all(all_finite(x) for x in tensors):
                raise NonFiniteError(texts.BAD_STATISTICS.format(layer=name))

    def _inverted(self, jobs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Invert (M_b + λ_b I) for several batches; blocks of one size are one batch. Counts what did not go smoothly."""
        found: dict[int, Tensor] = {}
        sizes: dict[int, list[int]] = {}
        for k, (matrices, _) in enumerate(jobs):
            sizes.setdefault(matrices.shape[-1], []).append(k)
        for size, members in sizes.items():
            result = damped_inverses(torch.cat([jobs[k][0] for k in members]), torch.cat([jobs[k][1] for k in members]))
            most = max(jobs[k][1].max().item() for k in members) if result.failed else 0.0
            self._count(result.retries, result.failed, size, most)
            found.update(zip(members, normal(result.matrices).split([len(jobs[k][0]) for k in members]), strict=True))
        return [found[k] for k in range(len(jobs))]

    def _state(self) -> dict[str, Any]:
        return {"averages": None if self._records is None else [one.state() for one in self._records.values()]}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        if state["averages"] is None:
            self._records = None
            return
        records = self._made()
        self._restore(list(records.values()), state["averages"], "these options")
        self._records = records
