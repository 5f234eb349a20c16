"""How each layer's scores are kept, what that holds in memory and what a product with it costs."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from fisherlens.errors import InputError, MemoryBudgetError, readable_bytes
from fisherlens.layout import LayerInfo
from fisherlens.scores.recorder import Use

_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_memory(memory: str | float) -> int:
    """Bytes from a number or a text such as ``"2GiB"``."""
    if isinstance(memory, numbers.Real) and not isinstance(memory, bool) and math.isfinite(memory) and memory > 0:
        return int(memory)
    if isinstance(memory, str):
        text = memory.strip().upper()
        number = text.rstrip("KMGTIB ")
        unit = text[len(number) :].strip() or "B"
        try:
            value = float(number) * _UNITS[unit]
        except (ValueError, KeyError):
            value = 0.0
        if math.isfinite(value) and value > 0:
            return int(value)
    raise InputError(f"memory must be a positive number of bytes or a text such as '2GiB' or '500MB'; got {memory!r}.")


@dataclass(frozen=True)
class LayerPlan:
    """One layer of a plan: the path, why, bytes held, FLOPs of a product and its share of a gradient evaluation."""

    layer: str
    type_name: str
    path: str
    storage: str  # "factors" | "patches" | "convolution" | "look-ups" | "rows" | "per example" | "none"
    reason: str
    positions: int
    nbytes: int
    product_flops: float
    gradient_flops: float


class Plan:
    """The paths of all layers, printable; ``plan[layer]`` gives one :class:`LayerPlan`.

    FLOPs count a multiply-add as 2. ``product_cost`` is in gradient evaluations (forward and backward of the mean loss
    on the same data) by FLOP count; wall-clock ratios are what the benchmarks measure.
    """

    def __init__(self, layers: Sequence[LayerPlan], n_data: int, n_columns: int, budget: int, scores_nbytes: int = 0):
        self.layers = tuple(layers)
        self.n_data, self.n_columns, self.budget = n_data, n_columns, budget
        self.scores_nbytes = scores_nbytes  # what the scores of all data take, kept or not
        self.transient_nbytes = 0

    def __getitem__(self, layer: str) -> LayerPlan:
        return next(entry for entry in self.layers if entry.layer == layer)

    def __iter__(self):
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes that all layers hold together."""
        return sum(entry.nbytes for entry in self.layers)

    @property
    def peak_nbytes(self) -> int:
        """Predicted peak of memory while capturing: what is kept and the largest piece on its way."""
        return self.nbytes + self.transient_nbytes

    @property
    def streamed(self) -> bool:
        """Whether nothing is kept and every answer passes over the data."""
        return any(entry.path == "streamed" for entry in self.layers)

    @property
    def linearised(self) -> bool:
        """Whether the graph of the network is kept in place of scores."""
        return any(entry.path == "linearised" for entry in self.layers)

    @property
    def kept(self) -> bool:
        """Whether scores are kept between answers."""
        return not (self.streamed or self.linearised)

    @property
    def product_cost(self) -> float:
        """FLOPs of one product over those of one gradient evaluation."""
        return sum(e.product_flops for e in self.layers) / max(sum(e.gradient_flops for e in self.layers), 1.0)

    def to_json(self) -> str:
        """All fields as one JSON text, as stored in results."""
        return json.dumps(
            {"n_data": self.n_data, "n_columns": self.n_columns, "layers": [asdict(e) for e in self.layers]}
        )

    def __repr__(self) -> str:
        total = max(sum(e.gradient_flops for e in self.layers), 1.0)
        head = ("layer", "type", "path", "positions", "memory", "product/gradient", "reason")
        body = [
            (
                e.layer,
                e.type_name,
                e.path,
                str(e.positions),
                readable_bytes(e.nbytes),
                f"{e.product_flops / total:.3f}",
                e.reason,
            )
            for e in self.layers
        ]
        widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (head, *body)
        ]
        title = (
            f"Plan: {self.n_data} examples x {self.n_columns} score columns, {readable_bytes(self.nbytes)} of {readable_bytes(self.budget)}, "
            f"one product = {self.product_cost:.2f} gradient evaluations (FLOPs)"
        )
        return "\n".join([title, *lines])


_WHY_ROWS = {
    "rows": "one number per parameter and example",
    "per example": "no layer rule: one gradient per example and column",
    "none": "never called",
}


# The choice between factors and rows is for a few vectors at a time, as estimators hand them over, on a machine that does this
# many FLOPs while it reads a byte: rows have fewer FLOPs, but are read twice in every product (measured on two CPU cores).
_VECTORS = 4
_BALANCE = 15.0
# Time of a FLOP in convolution primitives over that in matrix products (measured on the same cores).
_CONVOLUTION = 3.0


@dataclass
class _Candidate:
    storage: str
    nbytes: int
    flops: float

    @property
    def work(self) -> float:
        """Cost of a product per vector, in FLOPs, with the reading of what is kept."""
        slower = _CONVOLUTION if self.storage == "convolution" else 1.0
        return slower * self.flops + 2 * self.nbytes * _BALANCE / _VECTORS


@dataclass(frozen=True)
class Sizes:
    """What a plan depends on beside the layers: examples, columns, dtype of the scores, bytes of the graph per example."""

    n_data: int
    n_columns: int
    dtype: torch.dtype
    graph_bytes: int


# A kept linearisation holds the forward graph and that of its gradient, which saves some of the same tensors and others of its
# own: 2.2 to 2.5 times the forward graph were measured.
_GRAPHS = 2.3
# Kinds of layers whose second derivative backwards costs more than the forward pass that a kept graph saves (measured).
_SLOW_TWICE = frozenset({"conv"})


def make_plan(layers: Sequence[LayerInfo], uses: dict[str, list[Use]], sizes: Sizes, budget: int) -> Plan:
    """Choose the cheapest exact representation of each layer within the budget.

    Rule (methods: routes by cost): factors by default; explicit rows where there are so many more positions T than score columns R
    that R/T of the FLOPs outweighs reading the rows; layers with the largest saving per byte first, while memory lasts.
    Where the scores do not fit: the graph of the network, linearised, if that fits and no convolution makes it slow; else everything
    is streamed.
    """
    n_data, n_columns, dtype = sizes.n_data, sizes.n_columns, sizes.dtype
    chosen: dict[str, tuple[_Candidate, str]] = {}
    upgrades: list[tuple[float, str, _Candidate]] = []
    few, many = f"few for {n_columns} score columns", f"many for {n_columns} score columns"
    facts = {layer.name: _facts(layer, uses.get(layer.name), n_data, n_columns, dtype) for layer in layers}
    for layer in layers:
        candidates, positions, _ = facts[layer.name]
        factors, rows = candidates.get("factors"), candidates["rows"]
        if factors is None:
            chosen[layer.name] = (rows, _WHY_ROWS[rows.storage])
        elif rows.nbytes <= factors.nbytes and rows.work <= factors.work:
            why = "smaller" if positions == 1 else f"{positions} positions, {many}, and smaller"
            chosen[layer.name] = (rows, why)
        else:
            chosen[layer.name] = (factors, "one position" if positions == 1 else f"{positions} positions, {few}")
            if rows.work < factors.work:
                saving = (factors.work - rows.work) / max(rows.nbytes - factors.nbytes, 1)
                upgrades.append((saving, layer.name, rows))
    used = sum(candidate.nbytes for candidate, _ in chosen.values())
    for _, name, rows in sorted(upgrades, key=lambda u: -u[0]):
        extra = rows.nbytes - chosen[name][0].nbytes
        if used + extra <= budget:
            chosen[name] = (rows, f"{facts[name][1]} positions, {many}")
            used += extra
        else:
            chosen[name] = (chosen[name][0], f"explicit rows ({readable_bytes(rows.nbytes)}) would not fit")
    fallback = ""
    if used > budget:
        if used / n_data > budget:
            largest = max(chosen, key=lambda name: chosen[name][0].nbytes)
            raise MemoryBudgetError(
                f"The scores of a single example x {n_columns} columns need {readable_bytes(used / n_data)}, over the budget of {readable_bytes(budget)}; the "
                f"largest layer is {largest!r}. kind='mc' needs one column per draw instead of {n_columns}; or raise memory=."
            )
        kept = _GRAPHS * sizes.graph_bytes * n_data <= budget and not any(layer.kind in _SLOW_TWICE for layer in layers)
        fallback = "linearised" if kept else "streamed"
    total = max(sum(gradient for _, _, gradient in facts.values()), 1.0)
    entries = []
    for layer in layers:
        (candidate, reason), (_, positions, gradient) = chosen[layer.name], facts[layer.name]
        path = "explicit" if candidate.storage in ("rows", "none", "per example") else "factors"
        held, flops = candidate.nbytes, candidate.flops
        if fallback:
            # the graph has no layers; its bytes are shared out by the layers' work
            held = int(_GRAPHS * sizes.graph_bytes * n_data * gradient / total) if fallback == "linearised" else 0
            flops = gradient * (4 / 3 if fallback == "linearised" else 5 / 3)
            path, reason = fallback, f"its scores ({readable_bytes(candidate.nbytes)}) do not fit with the others"
        entries.append(
            LayerPlan(layer.name, layer.type_name, path, candidate.storage, reason, positions, held, flops, gradient)
        )
    return Plan(entries, n_data, n_columns, budget, used)


def _facts(
    layer: LayerInfo, uses: list[Use] | None, n: int, r: int, dtype: torch.dtype
) -> tuple[dict[str, _Candidate], int, float]:
    """Candidates, positions per example, and the layer's FLOPs in a gradient evaluation."""
    size = dtype.itemsize
    rows = _Candidate("rows", n * r * layer.size * size, 4.0 * n * r * layer.size)
    if uses is None:
        gradients = _Candidate("per example", rows.nbytes, rows.flops)
        return {"rows": gradients}, 1, 6.0 * n * layer.size
    if not uses:
        return {"rows": _Candidate("none", 0, 0.0)}, 0, 0.0
    if layer.kind == "norm":
        per_example = uses[0].inputs[0].numel() * len(uses)
        each = layer.size // len(layer.parameters)  # scale and shift are of one size
        return {"rows": rows}, max(1, per_example // each), 8.0 * n * per_example
    if layer.kind == "embedding":
        d = uses[0].output_shape[-1]
        t = sum(math.prod(use.output_shape[1:-1]) for use in uses)
        kept = _Candidate("look-ups", n * t * (8 + r * d * size), 4.0 * n * r * t * d)
        return {"factors": kept, "rows": rows}, t, 4.0 * n * t * d
    if layer.kind == "dense":
        d_o = uses[0].output_shape[-1]
        d_i = uses[0].inputs.shape[-1]
        t = sum(math.prod(use.output_shape[1:-1]) for use in uses)
        inputs, groups = t * d_i, 1
    else:
        d_o = uses[0].output_shape[1]
        groups = layer.groups
        d_i = uses[0].inputs.shape[1] // groups * math.prod(uses[0].module.kernel_size)
        t = sum(math.prod(use.output_shape[2:]) for use in uses)
        inputs = sum(use.inputs[0].numel() for use in uses)
    work = t * d_i * d_o * bool(layer.weight)
    flops = 4.0 * n * (work + r * t * d_o)
    gradient = 6.0 * n * t * d_i * d_o
    if layer.kind == "dense":
        return {"factors": _Candidate("factors", n * (inputs + r * t * d_o) * size, flops), "rows": rows}, t, gradient
    candidates = {"rows": rows}
    if len(uses) == 1 and t <= r and groups == 1:
        candidates["factors"] = _Candidate("patches", n * t * (d_i + r * d_o) * size, flops)
    elif len(uses) == 1:
        candidates["factors"] = _Candidate("convolution", n * (inputs + r * t * d_o) * size, flops)
    return candidates, t, gradient
