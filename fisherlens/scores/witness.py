"""What plain backpropagation says of the scores of the whole data, to hold them against at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherlens.likelihoods import BoundLikelihood
from fisherlens.scores.checks import LOW_PRECISION
from fisherlens.scores.collector import Collector, Piece
from fisherlens.scores.matrix import ScoreMatrix
from fisherlens.scores.recorder import Unexplained, leaf_gradients

Gradients = dict[str, Tensor]


class Witness:
    """Coefficients d of every row, and the gradient that Uᵀd must be.

    Rules are tested on a few examples, which may not show all: a weight that serves by itself too for some later examples, or
    examples in another order. The gradient of the loss, which is taken anyway, is the witness where its coefficients are known;
    else one more backward pass per piece, of the scores summed with random weights.
    """

    def __init__(self, collector: Collector):
        self.collector = collector
        self._coefficients: list[Tensor] = []
        self._instead: Tensor | None = None  # what to add to the gradient of the loss where another pass was taken
        self._generator = torch.Generator().manual_seed(0)

    def know(self, coefficients: Tensor) -> None:
        """Take the coefficients ``(n, r)`` of the gradient of the loss of a piece."""
        self._coefficients.append(coefficients)

    def ask(self, piece: Piece, bound: BoundLikelihood, outputs: Tensor, leaves: dict[str, Tensor]) -> None:
        """Backpropagate the scores of a piece, summed with random weights; the graph is kept."""
        weight = 0.5 + torch.rand(piece.batch.size, 1, generator=self._generator, dtype=torch.float64, device="cpu").to(
            outputs
        )
        signal = sum(self.collector.signals(bound, piece.uniforms))
        signal = signal * weight.view(-1, *[1] * (signal.ndim - 1)).to(signal.dtype)
        self._put(leaf_gradients(outputs, leaves, signal, keep=True), 1)
        self._coefficients.append(weight.expand(-1, self.collector.r))

    def leave_out(self, gradients: Gradients) -> None:
        """The gradient of the loss of a piece whose coefficients are not those of the loss."""
        self._put(gradients, -1)

    def _put(self, gradients: Gradients, sign: int) -> None:
        if self._instead is None:
            size, device = self.collector.layout.n_params, self.collector.like.device
            self._instead = torch.zeros(size, dtype=torch.float64, device=device)
        add(self._instead, gradients, sign)

    def require(self, matrix: ScoreMatrix, of_loss: Tensor) -> None:
        """Raise :class:`Unexplained` for the layers whose scores do not give the gradient; ``of_loss`` is that of the loss."""
        d = torch.cat([x.reshape(-1) for x in self._coefficients]).to(matrix.dtype)[:, None]
        truth = (of_loss if self._instead is None else of_loss + self._instead).to(matrix.dtype)
        low = next(iter(self.collector.recorder.leaves().values())).dtype in LOW_PRECISION
        tolerance = 0.1 if low else 1e-2 if matrix.dtype == torch.float32 else 1e-6
        scales, gaps = self._largest(truth), self._largest(truth - matrix.rmatmat(d)[:, 0])
        wrong = {name for name, gap in gaps.items() if gap > tolerance * scales[name]}
        if (
            wrong
        ):  # near a minimum gradients cancel, and not all of a gap is more than rounding: random signs show the scale
            signs = torch.randint(2, d.shape, generator=torch.Generator().manual_seed(1), device="cpu").to(d) * 2 - 1
            scales = self._largest(matrix.rmatmat(d * signs)[:, 0])
            least = 1e3 * torch.finfo(matrix.dtype).tiny
            wrong = {name for name in wrong if gaps[name] > max(tolerance * scales[name], least)}
        if any(name in self.collector.recorder.modules for name in wrong):  # by a rule, not by one gradient per example
            raise Unexplained(sorted(wrong))

    def _largest(self, vector: Tensor) -> dict[str, float]:
        """The largest entry of each layer by its size."""
        found = {}
        for layer in self.collector.layout.layers:
            low, high = torch.aminmax(vector[layer.start : layer.stop])
            found[layer.name] = max(-low.item(), high.item())
        return found


def add(total: Tensor, gradients: Gradients, sign: int = 1) -> None:
    """Add gradients, in the order of the layout, to a flat float64 total."""
    start = 0
    for gradient in gradients.values():
        total[start : start + gradient.numel()].add_(gradient.reshape(-1), alpha=sign)
        start += gradient.numel()
