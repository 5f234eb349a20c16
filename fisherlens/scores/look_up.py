"""Table look-ups that torch differentiates along a direction as it differentiates them backwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding
from torch.overrides import TorchFunctionMode


class ForwardRules(TorchFunctionMode):
    """Gives a table look-up the derivative along a direction that its gradient has.

    Backwards, the row of the padding index receives nothing, while the forward rule of torch lets it through; and a sparse
    gradient cannot be differentiated again.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is embedding:
            return _look_up(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _look_up(input: Tensor, weight: Tensor, padding_idx: int | None = None, *_: Any, **__: Any) -> Tensor:
    # max_norm and scale_grad_by_freq, which may follow, are refused before anything runs
    rows = embedding(input, weight)
    if padding_idx is None:
        return rows
    return torch.where((input == padding_idx % len(weight))[..., None], rows.detach(), rows)
