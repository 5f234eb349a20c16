"""What every natural-gradient optimizer shares: statistics by hooks, the flat gradient, refusals, and the order of a step."""

from __future__ import annotations

import warnings
import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fisherlens.errors import InputError, NonFiniteError, NumericalWarning
from fisherlens.layout import ROOT, LayerInfo, Layout
from fisherlens.likelihoods import as_likelihood
from fisherlens.linalg.precision import without_autocast
from fisherlens.optim import texts
from fisherlens.optim.averages import BlockAverages
from fisherlens.optim.checks import all_finite, choice, whole
from fisherlens.optim.groups import OPTIONS, Membership, check_options, make_groups
from fisherlens.optim.rule import StepRule, add_scaled
from fisherlens.optim.scaling import (
    AskedByScaler,
    loss_scale,
    overflowed,
    stepped_by_scaler,
    unscale,
)
from fisherlens.optim.solve import RETRIES, solve_blocks
from fisherlens.optim.state import StoredState
from fisherlens.optim.tap import Pass, ScoreTap, remove_handles

LABELS = ("true", "sampled")
REDUCTIONS = ("mean", "sum")


class NaturalGradient(StepRule, StoredState):
    """An optimizer whose direction needs the scores of single examples, captured by hooks in the ordinary loop.

    A method says what to do with a finished pass (:meth:`_absorb`), how statistics become a direction
    (:meth:`_precondition`), and what its state is (:meth:`_state`, :meth:`_load_state`).

    Attributes
    ----------
    layout : Layout
        The trainable parameters and their places in the flat vector.
    covered : tuple of LayerInfo
        Dense and convolution layers: those with statistics.
    diagnostics : dict
        ``steps``, ``refreshes`` (steps that took statistics in), ``retries`` (blocks factorised again with more damping) and
        ``fallbacks`` (blocks that took gradient over damping), since the start; with a ``GradScaler`` also ``overflows`` (steps that
        were skipped because a scaled gradient was not finite).
    """

    _step_supports_amp_scaling = AskedByScaler()
    _scaler: weakref.ref[Any] | None = None
    _loss_scale = _unit = 1.0  # factor of the loss in this step; what scores are divided by as they arrive
    scalar_kinds: tuple[str, ...] = ()  # kinds of layers to which the method applies a rule without scores
    rest_rule = "gradient / (1 + damping)"  # of parameters without statistics, as the warnings put it
    momentum_of_directions = True  # False: the method applies momentum itself, to gradients

    def __init__(self, model: nn.Module, given: Mapping[str, Any]):
        """Take what a method's constructor was given: the options that methods share stand there under their own names."""
        self.name = type(self).__name__
        if not isinstance(model, nn.Module):
            raise TypeError(texts.NOT_A_MODEL.format(name=self.name, got=type(model).__name__))
        if given["preset"] is not None:
            choice("preset", given["preset"], ("paper",))
        self.labels = choice("labels", given["labels"], LABELS)
        self.reduction = choice("reduction", given["reduction"], REDUCTIONS)
        self.refresh, self.seed = whole("refresh", given["refresh"]), whole("seed", given["seed"], 0)
        defaults = {option: given[option] for option in OPTIONS if option in given}
        check_options(defaults, self.nullable, new=True)
        self.likelihood = as_likelihood(given["likelihood"])
        if self.labels == "sampled" and self.likelihood.needs_targets:
            raise InputError(texts.WEIGHTED_LABELS.format(likelihood=self.likelihood))
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not parameters:
            raise InputError(texts.NO_PARAMETERS.format(name=self.name, model=type(model).__name__))
        self._check_kinds(parameters)
        self.layout = Layout.from_model(model)
        self.covered = tuple(layer for layer in self.layout.layers if _has_scores(model, layer))
        if not self.covered:
            raise InputError(texts.NOTHING_COVERED.format(name=self.name, model=type(model).__name__))
        self._parameters = [parameters[name] for name in self.layout]
        frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
        self._frozen = [(name, weakref.ref(p)) for name, p in frozen]
        groups, owner = make_groups(self.name, model, parameters, defaults, given["param_groups"])
        self._membership = Membership(self.layout, owner)
        self._generator = torch.Generator().manual_seed(self.seed)
        self._drawn = self._generator.get_state()
        self.diagnostics = {"steps": 0, "refreshes": 0, "retries": 0, "fallbacks": 0}
        self._examples, self._weight, self._seen = 0, 0.0, set[str]()
        self._home = ""
        self._told: set[str] = set()
        super().__init__(groups, defaults)
        self._complete = True
        self._check_method()
        self._check_groups(new=True)
        sampled = self.labels == "sampled"
        self._tap = ScoreTap(
            model, self.covered, self._take, self.likelihood if sampled else None, self._generator if sampled else None
        )
        # a model keeps no hooks of an optimizer that is gone
        weakref.finalize(self, remove_handles, self._tap.handles).atexit = False
        self._schedule()
        left = [x for x in self.layout.layers if x not in self.covered and x.kind not in self.scalar_kinds]
        self._tell(texts.FALLBACK, [p.name for layer in left for p in layer.parameters])

    # --- what a method adds ------------------------------------------------------------------------------------------

    def _check_method(self) -> None:
        """Check the method's own arguments, now that the layout is known and before any hook is placed."""

    @abstractmethod
    def _absorb(self, one: Pass, examples: int) -> None:
        """Add one pass to the statistics of the coming step; called only where statistics are due."""

    @abstractmethod
    def _precondition(self, gradient: Tensor, active: set[str], scale: float, out: Tensor) -> None:
        """Write the direction of the active layers into ``out`` (P,), from the flat mean gradient.

        ``active`` are the names of the layers with a gradient that their statistics explain. ``scale`` makes the sum of
        outer products of the absorbed scores a mean over examples of the un-averaged loss.
        """

    @abstractmethod
    def _drop(self) -> None:
        """Forget the passes absorbed since the last step."""

    # --- statistics --------------------------------------------------------------------------------------------------

    @property
    def _needs_scores(self) -> bool:
        """Whether statistics are made of scores; else the mean gradient is all that the method looks at."""
        return True

    @property
    def _carried(self) -> float:
        """What is left of the scale of the loss in the scores of a step."""
        return 1.0 if self.labels == "sampled" else self._loss_scale / self._unit

    def _schedule(self) -> None:
        """Decide whether the coming step takes statistics in."""
        self._due = self.diagnostics["steps"] % self.refresh == 0
        self._tap.listening = self._due and self._needs_scores

    def _take(self, one: Pass) -> None:
        """Count a finished pass and hand it to the method."""
        self._check_moved()
        # a mean gradient is that of any number of examples, also where a reshape has folded an axis into them
        counted = self._needs_scores or self.reduction == "sum"
        examples = one.count_examples() if counted else 1
        self._seen.update(one.calls)
        if self.labels == "sampled" and self._tap.listening:
            if one.weight is None:
                raise InputError(texts.NOT_THE_MODEL)
            self._weight += one.weight
        self._examples += examples
        if self._tap.listening:
            self._check_inputs(one)
            if self.labels == "true" and self._unit != 1:  # before anything is squared
                for call in (call for calls in one.calls.values() for call in calls):
                    call.score = call.score.to(self._parameters[0].dtype) / self._unit
            with without_autocast():  # the next forward pass may hand this one over
                self._absorb(one, examples)

    def _check_inputs(self, one: Pass) -> None:
        """Refuse inputs that were written over since the backward pass, as by the next batch in the same buffer."""
        for name, calls in one.calls.items():
            if any(call.layer.weight is not None and call.use.modified for call in calls):
                raise InputError(texts.WRITTEN_OVER.format(layer=name))

    def _check_moved(self) -> None:
        """Refuse parameters of another dtype or device than those that the state was made for."""
        now = f"{self._parameters[0].dtype} on {self._parameters[0].device}"
        self._home = self._home or now
        if now != self._home:
            raise InputError(texts.MOVED.format(was=self._home, now=now))

    def _clear(self) -> None:
        self._tap.clear()
        self._drop()
        self._examples, self._weight = 0, 0.0
        self._seen.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and the statistics that belong to them."""
        super().zero_grad(set_to_none)
        self._clear()

    def remove_hooks(self) -> None:
        """Take all hooks off the model; afterwards :meth:`step` finds no statistics."""
        self._tap.remove()

    # --- the step ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the parameters by one step.

        Parameters
        ----------
        closure
            Clears the gradients, computes the loss, calls ``backward`` and returns the loss, which step then returns.

        Raises
        ------
        InputError: no backward pass since the last step; a learning rate or damping out of range. NonFiniteError: NaN or
        infinity in a gradient (named) or in the statistics; parameters and state stay as they were.

        Notes
        -----
        ``scaler.step(opt)`` of a ``torch.amp.GradScaler`` calls this; a step whose scaled gradient overflowed is skipped and counted.
        """
        loss = None
        if closure is not None:
            if stepped_by_scaler(self):
                raise InputError(texts.SCALED_CLOSURE.format(name=self.name))
            with torch.enable_grad():
                loss = closure()
        self._check_groups()
        self._loss_scale, skipped, moved = loss_scale(self), overflowed(self), False
        if stepped_by_scaler(self):
            self.diagnostics["overflows"] = self.diagnostics.get("overflows", 0) + skipped
        try:
            if not skipped:
                unscale(self)
                self._tap.flush()
                if self._examples == 0:
                    raise InputError(texts.NO_STATISTICS)
                with without_autocast():
                    gradient, active = self._mean_gradient()
                    self._move(self._direction(gradient, active), active)
                moved = True
        finally:
            self._clear()
            self._unit = self._loss_scale
            if moved:
                self.diagnostics["steps"] += 1
                self._drawn = self._generator.get_state()
            else:  # as after the last step, labels to be drawn included
                self._generator.set_state(self._drawn)
        self._schedule()
        return loss

    def _check_kinds(self, parameters: Mapping[str, nn.Parameter]) -> None:
        lazy = [name for name, p in parameters.items() if isinstance(p, nn.parameter.UninitializedParameter)]
        if lazy:
            raise InputError(texts.LAZY.format(name=self.name, names=lazy))
        kinds = {(p.dtype, p.device) for p in parameters.values()}
        if len(kinds) > 1 or next(iter(kinds))[0] not in (torch.float32, torch.float64):
            raise InputError(texts.MIXED.format(got=sorted(f"{dtype} on {device}" for dtype, device in kinds)))

    def _mean_gradient(self) -> tuple[Tensor, set[str]]:
        """Flat gradient of the mean loss, zero where ``.grad`` is None, and the names of the layers that have one."""
        names = self.layout.parameters
        active = {info.layer for info, p in zip(names, self._parameters, strict=True) if p.grad is not None}
        pieces = []
        for p in self._parameters:
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            pieces.append((grad.to_dense() if grad.is_sparse else grad).reshape(-1))
        flat = torch.cat(pieces)
        self._require_finite(flat, texts.BAD_GRADIENT)
        thawed = [(name, p()) for name, p in self._frozen]
        self._tell(texts.THAWED, [n for n, p in thawed if p is not None and p.requires_grad and p.grad is not None])
        return (flat / self._examples if self.reduction == "sum" else flat), active

    def _require_finite(self, flat: Tensor, text: str) -> None:
        if not all_finite(flat):
            bad = (~torch.isfinite(flat)).nonzero()[0, 0].item()
            raise NonFiniteError(text.format(name=next(p.name for p in self.layout.parameters if bad < p.stop)))

    def _scale(self) -> float:
        """Factor of Σ u uᵀ over the scores as they arrived: those of a mean loss carry 1/M each, so that M²/M = M is left."""
        if self.labels == "sampled":
            return 1 / self._weight if self._weight else 0.0
        scale = float(self._examples) if self.reduction == "mean" else 1 / self._examples
        return scale / self._carried**2

    def _direction(self, gradient: Tensor, active: set[str]) -> Tensor:
        direction = self._rest(gradient)
        self._precondition(gradient, active - self._unseen(gradient, active), self._scale(), direction)
        self._hold(direction, active)
        self._require_finite(direction, texts.BAD_STEP)
        if self._due:
            self.diagnostics["refreshes"] += 1
        if self._any("kl_clip"):
            self._clip(direction, gradient)
        if self.momentum_of_directions and self._any("momentum"):
            own = direction.clone() if self.nesterov else None
            self._add_momentum(direction, active)
            direction = direction if own is None else add_scaled(own, direction, self._values("momentum"))
        return direction

    def _hold(self, direction: Tensor, active: set[str]) -> None:
        """Let parameters stay that have no gradient while the rest of their layer has one."""
        still = [i for i, p in zip(self.layout.parameters, self._parameters, strict=True) if p.grad is None]
        still = [info for info in still if info.layer in active]
        for info in still:
            direction[info.start : info.stop] = 0
        covered = {layer.name for layer in self.covered}
        self._tell(texts.STILL, [info.name for info in still if info.layer in covered])

    def _unseen(self, gradient: Tensor, active: set[str]) -> set[str]:
        """Find layers with a gradient that came past their module, wholly or in part; a zero gradient needs no explanation."""
        if not self._needs_scores:
            return set()
        missing = [layer for layer in self.covered if layer.name in active and layer.name not in self._seen]
        missing = [layer for layer in missing if gradient[layer.start : layer.stop].any()]
        self._tell(texts.UNSEEN, [p.name for layer in missing for p in layer.parameters])
        past = [x for x in self.covered if x.name in active & self._tap.past and x not in missing]
        self._tell(texts.PAST, [p.name for layer in past for p in layer.parameters])
        return {layer.name for layer in [*missing, *past]}

    def _require_finite_moments(
        self, blocks: Sequence[BlockAverages], sums: Sequence[Tensor | None], scale: float
    ) -> None:
        """Refuse moments with NaN or infinity anywhere, which then shows on their diagonal."""
        known = [(x, total) for x, total in zip(blocks, sums, strict=True) if total is not None]
        traces = [total.diagonal(dim1=-2, dim2=-1).sum() for _, total in known]
        finite = torch.isfinite(torch.stack(traces) * scale).tolist() if traces else []
        if not all(finite):
            raise NonFiniteError(texts.BAD_STATISTICS.format(layer=known[finite.index(False)][0].layer or "(several)"))

    def _solve(self, matrices: Tensor, damping: float, vectors: Tensor) -> Tensor:
        """Solve (M_b + λI) u_b = v_b for blocks of one size, and count what did not go smoothly."""
        found = solve_blocks(matrices, damping, vectors)
        self._count(found.retries, len(found.failed), vectors.shape[1], damping)
        return found.vectors

    def _count(self, retries: int, fallbacks: int, size: int, damping: float) -> None:
        """Count factorisations that were repeated, and warn of blocks that have none."""
        self.diagnostics["retries"] += retries
        self.diagnostics["fallbacks"] += fallbacks
        if fallbacks:
            text = texts.NOT_DEFINITE.format(count=fallbacks, size=size, damping=damping * 10**RETRIES)
            warnings.warn(text, NumericalWarning, stacklevel=7)

    def _tell(self, text: str, names: list[str]) -> None:
        """Warn of parameters once."""
        new = [name for name in names if name not in self._told]
        self._told.update(new)
        if new:
            shown = ", ".join(repr(name) for name in new)
            warnings.warn(text.format(name=self.name, names=shown, rule=self.rest_rule), NumericalWarning, stacklevel=4)


def _has_scores(model: nn.Module, layer: LayerInfo) -> bool:
    """Whether weight and bias of a dense or convolution layer are all it owns, and belong to no other module."""
    own = [p for p in (layer.weight, layer.bias) if p is not None]
    if layer.kind not in ("dense", "conv") or len(own) != len(layer.parameters):
        return False
    if layer.weight is not None and (len(layer.weight.shape) != 2) == (layer.kind == "dense"):
        return False
    modules = dict(model.named_modules(remove_duplicate=False))
    owner = modules["" if layer.name == ROOT else layer.name]
    others = {alias.rpartition(".")[0] for p in own for alias in p.aliases}
    return all(modules[other] is owner for other in others)
