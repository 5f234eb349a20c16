"""Solves with F + λI through the kernel of the rows of one batch, and what optimizers share that keep such rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisherlens.errors import InputError, NonFiniteError
from fisherlens.layout import ROOT, LayerInfo
from fisherlens.linalg.memory import Workspace
from fisherlens.optim import texts
from fisherlens.optim.base import NaturalGradient
from fisherlens.optim.checks import all_finite
from fisherlens.optim.rows import batch_scores, kernel, owned, packed, unpacked
from fisherlens.optim.solve import factorise
from fisherlens.optim.tap import Pass
from fisherlens.scores.base import LayerScores
from fisherlens.scores.conv import ConvGeometry
from fisherlens.scores.matrix import ScoreMatrix


@dataclass(eq=False)
class KernelSolve:
    """(F_b + λI)⁻¹ for F_b = scale · UᵀU over the layers of one block, by Woodbury's identity.

    Attributes
    ----------
    rows : ScoreMatrix
        U, rows as they arrived.
    scale : float
        What makes UᵀU a mean over examples of the un-averaged loss.
    gram : Tensor or None
        U Uᵀ in the dtype of the rows; None where the block is solved by conjugate gradients.
    damping : float
        λ of the factor, raised where the kernel had lost its definiteness.
    factor : Tensor or None
        Cholesky factor of scale · U Uᵀ + λI in float64; None where that failed at every damping.
    """

    rows: ScoreMatrix
    scale: float
    gram: Tensor | None
    damping: float
    factor: Tensor | None = None

    def __post_init__(self) -> None:
        self.asked = self.damping  # before any retry

    @property
    def layers(self) -> list[LayerInfo]:
        return [scores.layer for scores in self.rows.layers]

    def of(self, flat: Tensor) -> Tensor:
        """The entries of this block."""
        pieces = [flat[layer.start : layer.stop] for layer in self.layers]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def write(self, values: Tensor, out: Tensor, active: set[str]) -> None:
        """Put values into their places in a flat vector, for the active layers."""
        for layer, part in zip(self.layers, values.split([layer.size for layer in self.layers]), strict=True):
            if layer.name in active:
                out[layer.start : layer.stop] = part

    def weights(self, z: Tensor) -> Tensor:
        """(scale · U Uᵀ + λI)⁻¹ z, in the dtype of the factor."""
        return torch.cholesky_solve(z.to(self.factor.dtype)[:, None], self.factor)[:, 0]

    def spread(self, y: Tensor) -> Tensor:
        """Uᵀ y, for ``(n,)`` or ``(n, K)``."""
        return self.rows.rmatmat(y.to(self.rows.dtype).view(len(y), -1)).view(-1, *y.shape[1:])

    def solve(self, g: Tensor) -> Tensor:
        """(F_b + λI)⁻¹ g = (g - scale · Uᵀ (scale · U Uᵀ + λI)⁻¹ U g) / λ."""
        if self.factor is None:
            return g / self.damping
        y = self.weights(self.rows.matmat(g[:, None])[:, 0])
        out = self.spread(self.scale * y)
        return torch.sub(g, out, out=out).div_(self.damping)

    def product(self, v: Tensor) -> Tensor:
        """(F_b + λI) V for ``(p, K)``."""
        return self.rows.product(v, self.scale) + self.damping * v


class RowMethod(NaturalGradient):
    """An optimizer whose statistics are the rows of one batch, kept until the next refresh."""

    path = "auto"

    def __init__(self, model: nn.Module, given: Mapping[str, Any]):
        self._passes: list[tuple[Pass, int]] = []
        self._kept: dict[str, KernelSolve] = {}
        self._workspace = Workspace()
        super().__init__(model, given)
        modules = dict(model.named_modules())
        convs = [layer.name for layer in self.covered if layer.kind == "conv"]
        self._geometry = {name: ConvGeometry.of(modules["" if name == ROOT else name]) for name in convs}

    def _pieces(self) -> Sequence[LayerInfo]:
        """The parts of layers that have kernels of their own; by default whole layers."""
        return self.covered

    def _schedule(self) -> None:
        super()._schedule()
        if not self._due and not self._has_statistics():  # a state that was saved without any
            self._due = self._tap.listening = True

    def _has_statistics(self) -> bool:
        """Whether a step without a refresh has anything to go by."""
        return bool(self._kept)

    def _absorb(self, one: Pass, examples: int) -> None:
        self._passes.append((one, examples))

    def _drop(self) -> None:
        self._passes = []
        if self.refresh == 1:
            self._kept = {}

    def _scores(self, layer: LayerInfo) -> LayerScores:
        """Rows of this batch, in memory of their own where later steps use them."""
        scores = batch_scores(layer, self._passes, self._parameters[0], self.path)
        return scores if self.refresh == 1 else owned(scores)

    def _kernel_solve(self, scores: Sequence[LayerScores], scale: float, *, factorised: bool = True) -> KernelSolve:
        """Take the rows of one block in: compute its kernel and factorise it, with more damping where that fails."""
        gram = None
        if factorised:
            for one in scores:
                found = kernel(one, self.path)
                self._require_finite_kernel(found, scale, one.layer.name)
                gram = found if gram is None else gram + found
        return self._factorised(scores, scale, gram, self._options(scores[0].layer.name)["damping"])

    def _require_finite_kernel(self, gram: Tensor, scale: float, layer: str) -> None:
        if not torch.isfinite(gram.diagonal().sum() * scale) or not all_finite(gram):
            raise NonFiniteError(texts.BAD_STATISTICS.format(layer=layer))

    def _factorised(
        self, scores: Sequence[LayerScores], scale: float, gram: Tensor | None, damping: float
    ) -> KernelSolve:
        rows = ScoreMatrix(scores)
        rows.workspace = self._workspace
        for one in scores:
            one.workspace = self._workspace
        solve = KernelSolve(rows, scale, gram, damping)
        if gram is not None:
            found = factorise(gram, scale, damping)
            solve.factor, solve.damping = found.factor, found.damping
            self._count(found.retries, int(found.factor is None), rows.size, damping)
        return solve

    def _share(self) -> float:
        """What makes the sum of the rows as they arrived the mean gradient."""
        return (1.0 if self.reduction == "mean" else 1 / self._examples) / self._carried

    def _beyond_rows(self, block: KernelSolve, g: Tensor, explained: Tensor) -> Tensor | None:
        """What of the gradient is no sum of rows, such as that of a penalty in the loss; None where it is rounding."""
        rest = g - explained
        # of a sum of n rows: n Σ|u|² bounds the square of Σ|u|
        size = self._share() * math.sqrt(block.rows.rows * block.gram.diagonal().sum().item())
        return rest if torch.linalg.vector_norm(rest).item() > 16 * torch.finfo(g.dtype).eps * size else None

    def _as_given(self, block: KernelSolve, g: Tensor, d: Tensor, explained: Tensor) -> Tensor:
        """The direction for a gradient that is not the sum of the rows alone."""
        rest = self._beyond_rows(block, g, explained)
        if rest is None:
            return d
        factor = (g @ explained) / (explained @ explained) if explained.any() else 0.0
        if self._beyond_rows(block, g, factor * explained) is None:
            return factor * d  # all of it was scaled, as clip_grad_norm_ does
        return d + rest  # a penalty in the loss, say: it keeps its own size, as in later epochs

    # --- state -------------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        def entry(solve: KernelSolve) -> dict[str, Any]:
            names = [[p.name for p in layer.parameters] for layer in solve.layers]
            rows = [packed(scores) for scores in solve.rows.layers]
            values = {"names": names, "rows": rows, "scale": solve.scale, "gram": solve.gram}
            return values | {"damping": solve.asked}

        kept = self._kept if self.refresh > 1 else {}
        return {"kept": {key: entry(solve) for key, solve in kept.items()}}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        pieces = {tuple(p.name for p in layer.parameters): layer for layer in self._pieces()}
        fresh = {}
        for key, entry in state["kept"].items():
            self._require_entries(entry, ("names", "rows", "scale", "gram", "damping"), "what is kept of a batch")
            names = [tuple(one) for one in entry["names"]]
            if not set(names) <= set(pieces):
                text = f"it keeps rows of {names[0]}, but the blocks here are {sorted(pieces)}"
                raise InputError(texts.OTHER_MODEL.format(name=self.name, what=text))
            like, layers = self._parameters[0], [pieces[one] for one in names]
            rows = [
                unpacked(one, layer, self._geometry.get(layer.name), like)
                for one, layer in zip(entry["rows"], layers, strict=True)
            ]
            fresh[key] = self._factorised(rows, entry["scale"], entry["gram"], entry["damping"])
        self._kept = fresh
