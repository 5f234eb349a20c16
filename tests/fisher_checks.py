"""What the tests of the operator share: the zoo with its reference matrices, computed once, and relative errors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from cases import ALL_CASES, EXTRA_CASES, cast
from torch import Tensor, nn

import fisherlens as fl
from fisherlens import reference

ZOO = {**ALL_CASES, **EXTRA_CASES}
KINDS = ("exact", "mc", "empirical")
SEED, DRAWS = 5, 2  # of the mc kind

# torch announces once per process that it pads even kernels of "same" convolutions in a copy
QUIET = "ignore:Using padding='same' with even kernel lengths"


def error(found: Tensor, truth: Tensor) -> float:
    """Relative Frobenius error; absolute where the truth is zero."""
    assert found.shape == truth.shape, (found.shape, truth.shape)
    gap = (found.double() - truth.double()).norm()
    norm = truth.double().norm()
    return (gap / norm if norm > 0 else gap).item()


@dataclass(frozen=True, eq=False)
class Case:
    """One network with data, its reference matrix of one kind, and the truth about its gradient."""

    model: nn.Module
    data: tuple[Any, Tensor]
    likelihood: Any
    kind: str
    matrix: Tensor

    def fisher(self, **options: Any) -> fl.Fisher:
        options = {"kind": self.kind, "mc_samples": DRAWS, "seed": SEED} | options
        return fl.Fisher(self.model, options.pop("data", self.data), likelihood=self.likelihood, **options)

    @property
    def gradient(self) -> Tensor:
        return reference.gradient(self.model, self.data, self.likelihood)

    def vectors(self, k: int = 4) -> Tensor:
        generator = torch.Generator().manual_seed(k)
        return torch.randn(len(self.matrix), k, generator=generator, dtype=torch.float64)


@cache
def case(name: str, kind: str = "exact") -> Case:
    """A case of the zoo in float64 with its reference matrix."""
    model, data, likelihood = ZOO[name]()
    labels = drawn_labels(model, data, likelihood) if kind == "mc" else None
    return Case(model, data, likelihood, kind, reference.fisher(model, data, likelihood, kind, labels=labels))


def in_float32(name: str, kind: str = "exact") -> fl.Fisher:
    """The operator of the same case in float32."""
    model, (inputs, targets), likelihood = ZOO[name]()
    if isinstance(inputs, tuple):
        inputs, targets = tuple(x.float() for x in inputs), targets
        return fl.Fisher(model.float(), (inputs, targets), likelihood=likelihood, kind=kind)
    model, data, likelihood = cast((model, (inputs, targets), likelihood), torch.float32)
    return fl.Fisher(model, data, likelihood=likelihood, kind=kind, mc_samples=DRAWS, seed=SEED)


def drawn_labels(
    model: nn.Module, data: tuple[Any, Tensor], likelihood: Any, draws: int = DRAWS, seed: int = SEED
) -> Tensor:
    """Labels of the mc kind, ``(*targets.shape, S)``: one CPU uniform per term and draw, in data order, inverted."""
    with torch.no_grad():
        f = reference.outputs_at(model, {}, data[0])
    t = reference.terms(f, likelihood, data[1])
    n, terms, elements = t.f.shape
    per_example = terms if t.family == "categorical" else elements
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(n, per_example, draws, generator=generator, dtype=torch.float64)
    if t.family == "categorical":
        below = t.f.double().softmax(-1).cumsum(-1)  # (n, terms, C)
        labels = (u[:, :, None, :] >= below[..., None]).sum(2).clamp(max=elements - 1)
        return labels.reshape(*data[1].shape, draws)
    f, variance = t.f[:, 0, :, None].double(), t.variance[:, 0, :, None].double()
    if t.family == "bernoulli":
        labels = (u < f.sigmoid()).to(t.f)
    else:
        labels = (f + variance.sqrt() * torch.special.ndtri(u)).to(t.f)
    return labels.reshape(*data[1].shape, draws)
