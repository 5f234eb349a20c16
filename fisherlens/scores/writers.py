"""Collect the scores of one layer, batch by batch, in the representation that its plan chose."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fisherlens.layout import LayerInfo
from fisherlens.linalg.memory import Workspace, zeros
from fisherlens.scores.base import LayerScores
from fisherlens.scores.conv import ConvGeometry, ConvScores
from fisherlens.scores.dense import DenseScores
from fisherlens.scores.embedding import EmbeddingScores, mask_padding
from fisherlens.scores.explicit import ExplicitScores, ZeroScores
from fisherlens.scores.plan import LayerPlan
from fisherlens.scores.recorder import Use, parameter_rows


class Writer:
    """Collects one layer's scores batch by batch into what its plan asks for."""

    def __init__(
        self, layer: LayerInfo, plan: LayerPlan, uses: list[Use], n: int, r: int, like: Tensor, workspace: Workspace
    ):
        self.layer, self.plan, self.n, self.r = layer, plan, n, r
        self.dtype, self.device, self.workspace = like.dtype, like.device, workspace
        self.geometry = ConvGeometry.of(uses[0].module) if layer.kind == "conv" and uses else None
        if plan.storage in ("rows", "per example"):
            self.pieces = [zeros((n, r, p.numel), like.dtype, like.device) for p in layer.parameters]
        elif plan.storage in ("factors", "patches"):
            d_o = uses[0].output_shape[-1] if layer.kind == "dense" else uses[0].output_shape[1]
            d_i = uses[0].inputs.shape[-1] if layer.kind == "dense" else self._patches(uses[0]).shape[2]
            self.a = zeros((n, plan.positions, d_i), like.dtype, like.device)
            self.g = zeros((n, r, plan.positions, d_o), like.dtype, like.device)
        elif plan.storage == "look-ups":
            self.a = torch.zeros(n, plan.positions, dtype=torch.long, device=like.device)
            self.g = zeros((n, r, plan.positions, uses[0].output_shape[-1]), like.dtype, like.device)
        elif plan.storage == "convolution":
            self.a = zeros((n, *self.geometry.padded(uses[0].inputs[:1]).shape[1:]), like.dtype, like.device)
            self.g = zeros((n, r, *uses[0].output_shape[1:]), like.dtype, like.device)

    def _patches(self, use: Use) -> Tensor:
        return self.geometry.patches(self.geometry.padded(use.inputs.detach()))[:, 0].mT  # (n, T, d_i)

    def start(self, uses: list[Use], at: slice) -> None:
        """Take the inputs of one batch."""
        self.at, self.uses = at, uses
        size = at.stop - at.start
        if self.plan.storage == "rows":
            shapes = [(size, self.r, *use.output_shape[1:]) for use in uses]
            self.buffers = [self.workspace.empty(shape, self.dtype, self.device) for shape in shapes]
        elif self.plan.storage == "factors":
            self.a[at] = torch.cat([use.inputs.detach().reshape(size, -1, use.inputs.shape[-1]) for use in uses], dim=1)
        elif self.plan.storage == "look-ups":
            self.a[at] = torch.cat([use.inputs.reshape(size, -1) for use in uses], dim=1)
        elif self.plan.storage == "patches":
            self.a[at] = self._patches(uses[0])
        elif self.plan.storage == "convolution":
            self.a[at] = self.geometry.padded(uses[0].inputs.detach())

    def take(self, r: int, scores: list[Tensor | None]) -> None:
        """Take the output scores of column r."""
        storage = self.plan.storage
        if storage == "rows":
            for buffer, g in zip(self.buffers, scores, strict=True):
                buffer[:, r] = 0 if g is None else g
        elif storage in ("factors", "look-ups"):
            flat = [
                self.g.new_zeros(len(use.inputs), *use.output_shape[1:]) if g is None else g
                for use, g in zip(self.uses, scores, strict=True)
            ]
            if storage == "look-ups":
                flat = [
                    mask_padding(use.module, use.inputs, g[:, None])[:, 0]
                    for use, g in zip(self.uses, flat, strict=True)
                ]
            self.g[self.at, r] = torch.cat([g.reshape(g.shape[0], -1, g.shape[-1]) for g in flat], dim=1)
        elif storage != "none" and scores[0] is not None:
            self.g[self.at, r] = scores[0].flatten(2).mT if storage == "patches" else scores[0]

    def take_rows(self, r: int, pieces: Sequence[Tensor]) -> None:
        """Take finished rows of column r, one ``(n, numel)`` piece per parameter."""
        for target, piece in zip(self.pieces, pieces, strict=True):
            target[self.at, r] = piece

    def finish_batch(self) -> None:
        """Turn the scores of one batch into rows where rows are kept."""
        if self.plan.storage == "rows":
            out = [piece[self.at] for piece in self.pieces]
            parameter_rows(self.layer, self.uses[0], self.buffers[0], out, self.workspace)
            for use, g in zip(self.uses[1:], self.buffers[1:], strict=True):
                for target, piece in zip(out, parameter_rows(self.layer, use, g), strict=True):
                    target += piece
            self.buffers = []
        self.uses = []

    def scores(self) -> LayerScores:
        """The finished scores of the layer."""
        storage = self.plan.storage
        if storage == "none":
            return ZeroScores(self.layer, self.n, self.r, self.dtype, self.device)
        if storage in ("rows", "per example"):
            return ExplicitScores(self.layer, [piece.view(self.n * self.r, -1) for piece in self.pieces], self.r)
        if storage == "look-ups":
            return EmbeddingScores(self.layer, self.a, self.g)
        if storage == "convolution":
            return ConvScores(self.layer, self.geometry, self.a, self.g)
        return DenseScores(self.layer, self.a, self.g)
