"""The rule of a step: options of each parameter, momentum, clipping, decay, and what parameters without statistics do."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fisherlens.errors import InputError
from fisherlens.layout import LayerInfo, Layout
from fisherlens.optim import texts
from fisherlens.optim.groups import Membership, check_options


def add_scaled(x: Tensor, y: Tensor, factor: float | Tensor) -> Tensor:
    """Add ``factor`` times y to x in place, the factor one number or one per entry."""
    return x.addcmul_(y, factor) if isinstance(factor, Tensor) else x.add_(y, alpha=factor)


def _double_dot(x: Tensor, y: Tensor) -> Tensor:
    """Σ x y in float64; on a CPU in pieces that stay in its cache, as copies of the whole would cost more than the sum."""
    size = 2**16 if x.device.type == "cpu" else len(x)
    return torch.stack([a.double() @ b.double() for a, b in zip(x.split(size), y.split(size), strict=True)]).sum()


class StepRule(torch.optim.Optimizer):
    """How a direction becomes a step, with options that may differ between groups of parameters."""

    name: str
    layout: Layout
    covered: tuple[LayerInfo, ...]
    nullable: tuple[str, ...] = ("kl_clip",)  # options that may be None
    nesterov = False  # True: the step is the direction plus μ times its sum with all earlier ones
    clips_all = False  # True: kl_clip is about all parameters, not those of covered layers alone
    decoupled = True  # False: the method puts weight decay into its directions
    crosses_layers = False  # whether a block of the method reaches over several layers
    _parameters: list[nn.Parameter]
    _membership: Membership
    _previous: Tensor | None = None
    _complete = False  # whether all groups are there

    def _options(self, layer: str | None) -> dict[str, Any]:
        """Options of a layer's group; None for blocks that cross layers, whose groups agree."""
        return self.param_groups[0 if layer is None else self._membership.of_layer[layer]]

    def _values(self, option: str) -> float | Tensor:
        """An option for all entries of a flat vector: one number where the groups agree, else ``(P,)``."""
        found = [group[option] for group in self.param_groups]
        if all(value == found[0] for value in found):
            return float(found[0])
        like, owner = self._parameters[0], self._membership.owner
        return torch.cat([like.new_full((p.numel,), found[owner[p.name]]) for p in self.layout.parameters])

    def _any(self, option: str) -> bool:
        """Whether an option is on in any group."""
        return any(group.get(option) for group in self.param_groups)

    def _check_groups(self, *, new: bool = False) -> None:
        """Check what a scheduler or a user may have changed since the last step."""
        for k, group in enumerate(self.param_groups):
            try:
                check_options(group, self.nullable, new=new)
            except (InputError, TypeError) as error:
                if len(self.param_groups) == 1:
                    raise
                raise type(error)(texts.IN_GROUP.format(number=k, error=error)) from None
        if len(self.param_groups) > 1:
            self._membership.require_agreement(self.name, self.param_groups, across_layers=self.crosses_layers)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse further groups: the statistics belong to the parameters that the optimizer was built with."""
        if self._complete:
            raise InputError(texts.NO_MORE_GROUPS.format(name=self.name))
        super().add_param_group(param_group)

    def _rest(self, gradient: Tensor) -> Tensor:
        """Apply the rule for parameters without statistics; a new tensor."""
        return gradient / (1 + self._values("damping"))

    def _add_momentum(self, vector: Tensor, active: set[str]) -> None:
        """Add μ times the previous sum in place, and keep the vector itself as the new one; layers that do not move keep theirs."""
        previous = torch.zeros_like(vector) if self._previous is None else self._previous
        add_scaled(vector, previous, self._values("momentum"))
        self._previous = vector
        for layer in self.layout.layers:
            if layer.name not in active:
                self._previous[layer.start : layer.stop] = previous[layer.start : layer.stop]

    def _clip(self, direction: Tensor, gradient: Tensor) -> None:
        """Multiply layers by ν = min(1, √(κ / Σ lr² <u, g>)), so that the squared length of their step, by F, stays near κ.

        The sum is over all layers of one κ: groups that agree in it are clipped as if they were one.
        """
        layers = self.layout.layers if self.clips_all else self.covered
        for kappa in dict.fromkeys(group.get("kl_clip") for group in self.param_groups):
            if kappa is None:
                continue
            clipped = [layer for layer in layers if self._options(layer.name).get("kl_clip") == kappa]
            terms = [self._squared_length(layer, direction, gradient) for layer in clipped]
            product = torch.stack(terms).sum().item() if terms else 0.0
            if product > kappa:
                for layer in clipped:
                    direction[layer.start : layer.stop] *= math.sqrt(kappa / product)

    def _squared_length(self, layer: LayerInfo, direction: Tensor, gradient: Tensor) -> Tensor:
        """Σ lr² u g over a layer, in float64."""
        pieces: list[tuple[Any, dict[str, Any]]] = [(layer, self._options(layer.name))]
        if layer.name in self._membership.split:
            pieces = [(p, self.param_groups[self._membership.owner[p.name]]) for p in layer.parameters]
        terms = []
        for piece, group in pieces:
            at = slice(piece.start, piece.stop)
            terms.append(group["lr"] ** 2 * _double_dot(direction[at], gradient[at]))
        return torch.stack(terms).sum()

    def _move(self, direction: Tensor, active: set[str]) -> None:
        """Decay the parameters of active layers, and step."""
        for info, p in zip(self.layout.parameters, self._parameters, strict=True):
            if info.layer in active and p.grad is not None:
                group = self.param_groups[self._membership.owner[info.name]]
                if self.decoupled and group["weight_decay"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(direction[info.start : info.stop].view(info.shape), alpha=-group["lr"])
