"""What plain backpropagation says of the scores of the whole data, to hold them against at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherlens.likelihoods import BoundLikelihood
from fisherlens.scores.checks import LOW_PRECISION
from fisherlens.scores.collector import Collector, Piece
from fisherlens.scores.matrix import ScoreMatrix
from fisherlens.scores.recorder import Unexplained, leaf_gradients


class Witness:
    """Coefficients d and the gradient that Uᵀd must be, piece by piece of the data.

    Rules are tested on a few examples, which may not show all: a weight that serves by itself too for some later examples, or
    examples in another order. The gradient of the loss, which is taken anyway, is the witness where its coefficients are known;
    else one more backward pass per piece, of the scores summed with random weights.
    """

    def __init__(self, collector: Collector):
        self.collector = collector
        self._coefficients: list[Tensor] = []
        self._gradient = torch.zeros(collector.layout.n_params, dtype=torch.float64, device=collector.like.device)
        self._generator = torch.Generator().manual_seed(0)

    def take(self, gradient: Tensor, coefficients: Tensor) -> None:
        """The gradient of the loss of a piece, and its coefficients ``(n, r)``."""
        self._gradient += gradient
        self._coefficients.append(coefficients)

    def ask(self, piece: Piece, bound: BoundLikelihood, outputs: Tensor, leaves: dict[str, Tensor]) -> None:
        """Backpropagate the scores of a piece, summed with random weights; the graph is kept."""
        weight = 0.5 + torch.rand(piece.batch.size, 1, generator=self._generator, dtype=torch.float64).to(outputs)
        signal = sum(self.collector.signals(bound, piece.uniforms))
        signal = signal * weight.view(-1, *[1] * (signal.ndim - 1)).to(signal.dtype)
        self._gradient += flat(leaf_gradients(outputs, leaves, signal, keep=True))
        self._coefficients.append(weight.expand(-1, self.collector.r))

    def require(self, matrix: ScoreMatrix) -> None:
        """Raise :class:`Unexplained` for the layers whose scores say something else.

        Gaps are judged by the scale of Uᵀ(±d) with random signs, in which nothing cancels.
        """
        d = torch.cat([x.reshape(-1) for x in self._coefficients]).to(matrix.dtype)
        signs = torch.randint(2, d.shape, generator=torch.Generator().manual_seed(1)).to(d) * 2 - 1
        back = matrix.rmatmat(torch.stack([d, d * signs], dim=1)).double()
        low = next(iter(self.collector.recorder.leaves().values())).dtype in LOW_PRECISION
        tolerance = 0.1 if low else 1e-2 if matrix.dtype == torch.float32 else 1e-6
        wrong = []
        for layer in self.collector.layout.layers:
            at = slice(layer.start, layer.stop)
            gap = (back[at, 0] - self._gradient[at]).abs().max()
            scale = torch.maximum(back[at].abs().max(), self._gradient[at].abs().max())
            if gap > tolerance * scale and gap > 1e3 * torch.finfo(matrix.dtype).tiny:
                wrong.append(layer.name)
        if any(name in self.collector.recorder.modules for name in wrong):  # by a rule, not by one gradient per example
            raise Unexplained(wrong)


def flat(gradients: dict[str, Tensor]) -> Tensor:
    """Gradients as one vector in float64."""
    return torch.cat([g.reshape(-1).double() for g in gradients.values()])
