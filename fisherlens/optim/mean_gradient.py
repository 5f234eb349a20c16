"""Methods whose statistic is made of the mean gradient of a batch, at the user's labels or at labels drawn from the model."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisherlens.errors import InputError
from fisherlens.linalg.precision import without_autocast
from fisherlens.optim import texts
from fisherlens.optim.factors import summed_scores, write_matrix
from fisherlens.optim.layerwise import LayerWise
from fisherlens.optim.tap import Pass, at_least_single, draw_uniforms
from fisherlens.scores.recorder import preserved_randomness
from fisherlens.scores.source import Source, call


class MeanGradient(LayerWise):
    """A method whose matrices are averages of products of mean gradients ḡ, which need no scores of single examples.

    An outer product of ḡ is M times smaller than that of the scores of M examples, and so are the λ and lr that belong to it.
    """

    @property
    def _needs_scores(self) -> bool:
        return self.labels == "sampled"

    def _absorb(self, one: Pass, examples: int) -> None:
        """Add Σ_n u_n of one pass, the scores at sampled labels."""
        like = self._parameters[0]
        if self._total is None:
            self._total = like.new_zeros(self.layout.n_params)
        for layer, calls in self._layers(one):
            found = like.new_zeros(self.layout.n_params)
            write_matrix(layer, summed_scores(layer, calls, like.dtype, self._workspace), found)
            self._total += found
            self._sampled.add(layer.name)

    def _drop(self) -> None:
        self._total: Tensor | None = None
        self._sampled: set[str] = set()

    def _statistic(self, gradient: Tensor, active: set[str], scale: float) -> tuple[Tensor, set[str]]:
        """Flat mean gradient that the statistics are made of, and the layers for which it is known."""
        if self.labels == "true":
            return gradient, active
        total = torch.zeros_like(gradient) if self._total is None else self._total * scale
        return total, active & self._sampled


class WarmStarted(MeanGradient):
    """A method of mean gradients whose averages may start from one pass over the data."""

    def __init__(self, model: nn.Module, given: Mapping[str, Any]):
        super().__init__(model, given)
        self._model = weakref.ref(model)  # an optimizer keeps no model alive

    @abstractmethod
    def _warm(self, gradients: Iterator[Tensor]) -> int:
        """Replace all averages by the mean over flat gradients, and return how many there were."""

    def warm_start(self, batches: Any) -> None:
        """Set the statistics to their mean over one pass over the data, with labels drawn from the model, before training.

        Parameters
        ----------
        batches
            A pair ``(inputs, targets)`` of tensors, which is one batch, or a re-iterable of such batches: the training loader. The
            targets are not used and may be None.

        Raises
        ------
        InputError: no batches, or after the first step. NonFiniteError: outputs or gradients with NaN or infinity. The averages then
        stay as they were.

        Notes
        -----
        Parameters, ``.grad``, buffers (as those of BatchNorm) and random states stay as they are; labels are drawn by the optimizer's own
        generator. The model runs in the mode that it is in. Cost: one gradient evaluation on the data.
        """
        model = self._model()
        if self.diagnostics["steps"]:
            raise InputError(texts.WARM_TOO_LATE.format(name=self.name))
        if model is None:
            raise InputError(texts.MODEL_GONE.format(name=self.name))
        if self.likelihood.needs_targets:
            raise InputError(texts.WEIGHTED_WARM.format(likelihood=self.likelihood))
        self._check_moved()
        buffers = [(b, b.clone()) for b in model.buffers()]
        listening, self._tap.listening = self._tap.listening, False
        try:
            device = self._parameters[0].device
            autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
            with preserved_randomness(device), without_autocast():
                self._warm(self._sampled_gradients(model, batches, *autocast))
        finally:
            self._tap.listening = listening
            self._clear()
            self._drawn = self._generator.get_state()
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)

    def _sampled_gradients(
        self, model: nn.Module, batches: Any, autocast: bool, dtype: torch.dtype
    ) -> Iterator[Tensor]:
        """Flat mean gradient of each batch, at labels drawn from the model."""
        source = Source(batches, self._parameters[0].device)
        for batch in source.batches():
            with torch.enable_grad(), torch.autocast(source.device.type, dtype=dtype, enabled=autocast):
                outputs = at_least_single(call(model, batch.inputs))
                bound = self.likelihood.bind(outputs, None, batch.where)
                uniforms = draw_uniforms(len(outputs), bound.num_uniforms, self._generator)
                signal = bound.sampled_score(uniforms) / bound.weight.sum().item()
                grads = torch.autograd.grad(
                    outputs, self._parameters, signal, allow_unused=True, materialize_grads=True
                )
            flat = torch.cat([(g.to_dense() if g.is_sparse else g).reshape(-1) for g in grads])
            self._require_finite(flat, texts.BAD_GRADIENT)
            yield flat
