"""What every natural-gradient optimizer shares: statistics by hooks, the flat gradient, refusals, momentum, decay, state."""

from __future__ import annotations

import math
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from fisherlens.errors import UNKNOWN_NAME, InputError, NonFiniteError, NumericalWarning, nearest
from fisherlens.layout import ROOT, LayerInfo, Layout
from fisherlens.likelihoods import Likelihood, as_likelihood
from fisherlens.optim import texts
from fisherlens.optim.averages import Averages, BlockAverages
from fisherlens.optim.solve import RETRIES, solve_blocks
from fisherlens.optim.tap import Pass, ScoreTap, remove_handles

LABELS = ("true", "sampled")
REDUCTIONS = ("mean", "sum")


def number(name: str, value: Any, low: float = 0.0, high: float = math.inf, *, strict: bool = False) -> float:
    """Check a finite number with ``low <= value < high``, ``low < value`` where ``strict``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number; got {type(value).__name__} {value!r}.")
    if not math.isfinite(value) or value < low or (strict and value == low) or value >= high:
        bounds = f"{'>' if strict else '>='} {low:g}" + (f" and < {high:g}" if high < math.inf else "")
        raise InputError(f"{name} must be a finite number {bounds}; got {value!r}.")
    return float(value)


def choice(name: str, value: Any, known: tuple[str, ...]) -> str:
    """Check one of a few words."""
    if value not in known:
        raise InputError(UNKNOWN_NAME.format(what=name, name=value, hint=nearest(str(value), known)))
    return value


class NaturalGradient(torch.optim.Optimizer, ABC):
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
        ``fallbacks`` (blocks that took gradient over damping), since the start.
    """

    # torch's GradScaler hands its scale over only to optimizers that say so; then it can be refused by name
    _step_supports_amp_scaling = True
    scalar_kinds: tuple[str, ...] = ()  # kinds of layers to which the method applies a rule without scores
    rest_rule = "gradient / (1 + damping)"  # of parameters without statistics, as the warnings put it
    momentum_of_directions = True  # False: the method applies momentum itself, to gradients
    nesterov = False  # True: the step is the direction plus μ times its sum with all earlier ones

    def __init__(
        self,
        model: nn.Module,
        defaults: dict[str, Any],
        *,
        likelihood: str | Likelihood,
        labels: str,
        reduction: str,
        refresh: int,
        seed: int,
    ):
        self.name = type(self).__name__
        if not isinstance(model, nn.Module):
            raise TypeError(texts.NOT_A_MODEL.format(name=self.name, got=type(model).__name__))
        self.labels, self.reduction = choice("labels", labels, LABELS), choice("reduction", reduction, REDUCTIONS)
        number("lr", defaults["lr"], strict=True)
        for option, value in {"refresh": refresh, "seed": seed}.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{option} must be an int; got {type(value).__name__} {value!r}.")
        number("refresh", refresh, 1)
        number("seed", seed)
        self._check_options(defaults)
        self.refresh, self.seed = refresh, seed
        self.likelihood = as_likelihood(likelihood)
        if labels == "sampled" and self.likelihood.needs_targets:
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
        self._generator = torch.Generator().manual_seed(seed)
        self.diagnostics = {"steps": 0, "refreshes": 0, "retries": 0, "fallbacks": 0}
        self._examples, self._weight, self._seen = 0, 0.0, set[str]()
        self._previous: Tensor | None = None
        self._home = ""
        self._told: set[str] = set()
        super().__init__(self._parameters, defaults)
        self._check_method()
        sampled = labels == "sampled"
        self._tap = ScoreTap(
            model, self.covered, self._take, self.likelihood if sampled else None, self._generator if sampled else None
        )
        # a model keeps no hooks of an optimizer that is gone
        weakref.finalize(self, remove_handles, self._tap.handles).atexit = False
        self._schedule()
        left = [x for x in self.layout.layers if x not in self.covered and x.kind not in self.scalar_kinds]
        self._tell(texts.FALLBACK, [p.name for layer in left for p in layer.parameters])

    # --- what a method adds ------------------------------------------------------------------------------------------

    @abstractmethod
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

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """Tensors, numbers and dicts that :meth:`_load_state` takes."""

    @abstractmethod
    def _load_state(self, state: Mapping[str, Any]) -> None:
        """Take a state after checking that it fits."""

    # --- statistics --------------------------------------------------------------------------------------------------

    @property
    def _needs_scores(self) -> bool:
        """Whether statistics are made of scores; else the mean gradient is all that the method looks at."""
        return True

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
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        options = self.param_groups[0]
        self._check_options(options)
        if getattr(self, "found_inf", None) is not None:
            raise InputError(texts.SCALER.format(name=self.name))
        try:
            self._tap.flush()
            if self._examples == 0:
                raise InputError(texts.NO_STATISTICS)
            gradient, active = self._mean_gradient()
            direction = self._direction(gradient, active, options)
            self._move(direction, active, options)
        finally:
            self._clear()
        self.diagnostics["steps"] += 1
        self._schedule()
        return loss

    def _check_options(self, options: Mapping[str, Any]) -> None:
        """Check what a scheduler or a user may change between steps; a scheduler may bring lr to 0."""
        number("lr", options["lr"])
        number("damping", options["damping"], strict=True)
        number("momentum", options["momentum"], 0.0, 1.0)
        number("weight_decay", options["weight_decay"])
        if options["kl_clip"] is not None:
            number("kl_clip", options["kl_clip"], strict=True)

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
        return (flat / self._examples if self.reduction == "sum" else flat), active

    def _require_finite(self, flat: Tensor, text: str) -> None:
        if not torch.isfinite(flat).all():
            bad = (~torch.isfinite(flat)).nonzero()[0, 0].item()
            raise NonFiniteError(text.format(name=next(p.name for p in self.layout.parameters if bad < p.stop)))

    def _scale(self) -> float:
        """Factor of Σ u uᵀ over the scores as they arrived: those of a mean loss carry 1/M each, so that M²/M = M is left."""
        if self.labels == "sampled":
            return 1 / self._weight if self._weight else 0.0
        return float(self._examples) if self.reduction == "mean" else 1 / self._examples

    def _direction(self, gradient: Tensor, active: set[str], options: Mapping[str, Any]) -> Tensor:
        direction = self._rest(gradient, options["damping"])
        self._precondition(gradient, active - self._unseen(gradient, active), self._scale(), direction)
        self._require_finite(direction, texts.BAD_STEP)
        if self._due:
            self.diagnostics["refreshes"] += 1
        if options["kl_clip"] is not None:
            self._clip(direction, gradient, options["lr"], options["kl_clip"])
        if options["momentum"] and self.momentum_of_directions:
            own = direction.clone() if self.nesterov else None
            self._add_momentum(direction, active, options["momentum"])
            direction = direction if own is None else own.add_(direction, alpha=options["momentum"])
        return direction

    def _rest(self, gradient: Tensor, damping: float) -> Tensor:
        """Apply the rule for parameters without statistics, :attr:`rest_rule`; a new tensor."""
        return gradient / (1 + damping)

    def _add_momentum(self, vector: Tensor, active: set[str], momentum: float) -> None:
        """Add μ times the previous sum in place, and remember the new one; layers that do not move keep theirs."""
        previous = torch.zeros_like(vector) if self._previous is None else self._previous
        vector.add_(previous, alpha=momentum)
        self._previous = vector.clone()
        for layer in self.layout.layers:
            if layer.name not in active:
                self._previous[layer.start : layer.stop] = previous[layer.start : layer.stop]

    def _unseen(self, gradient: Tensor, active: set[str]) -> set[str]:
        """Find layers with a gradient that came past their module; a zero gradient needs no explanation."""
        if not self._needs_scores:
            return set()
        missing = [layer for layer in self.covered if layer.name in active and layer.name not in self._seen]
        missing = [layer for layer in missing if gradient[layer.start : layer.stop].any()]
        self._tell(texts.UNSEEN, [p.name for layer in missing for p in layer.parameters])
        return {layer.name for layer in missing}

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
        self.diagnostics["retries"] += found.retries
        self.diagnostics["fallbacks"] += len(found.failed)
        if len(found.failed):
            text = texts.NOT_DEFINITE.format(
                count=len(found.failed), size=vectors.shape[1], damping=damping * 10**RETRIES
            )
            warnings.warn(text, NumericalWarning, stacklevel=6)
        return found.vectors

    def _restore(self, own: Sequence[Averages], saved: Sequence[Mapping[str, Any]], what: str) -> None:
        """Take saved averages, once all shapes are seen to agree."""
        theirs = [{k: tuple(v.shape) for k, v in one.items() if isinstance(v, Tensor)} for one in saved]
        mine = [one.shapes() for one in own]
        if theirs != mine:
            differ = next(
                (pair for pair in zip(theirs, mine, strict=False) if pair[0] != pair[1]), (len(theirs), len(mine))
            )
            text = f"its averages have shapes {differ[0]} where those of {what} have {differ[1]}"
            raise InputError(texts.OTHER_MODEL.format(name=self.name, what=text))
        for one, values in zip(own, saved, strict=True):
            vars(one).update(values)

    def _clip(self, direction: Tensor, gradient: Tensor, lr: float, kl_clip: float) -> None:
        """Multiply the preconditioned layers by ν = min(1, √(κ / (lr² <u, g>))): the squared length ν² lr² uᵀFu stays near κ."""
        at = [slice(layer.start, layer.stop) for layer in self.covered]
        product = lr**2 * sum((direction[s].double() @ gradient[s].double()).item() for s in at)
        if product > kl_clip:
            for s in at:
                direction[s] *= math.sqrt(kl_clip / product)

    def _move(self, direction: Tensor, active: set[str], options: Mapping[str, Any]) -> None:
        lr, decay = options["lr"], options["weight_decay"]
        for info, p in zip(self.layout.parameters, self._parameters, strict=True):
            if info.layer in active:
                if decay:
                    p.mul_(1 - lr * decay)
                p.add_(direction[info.start : info.stop].view(info.shape), alpha=-lr)

    def _tell(self, text: str, names: list[str]) -> None:
        """Warn of parameters once."""
        new = [name for name in names if name not in self._told]
        self._told.update(new)
        if new:
            shown = ", ".join(repr(name) for name in new)
            warnings.warn(text.format(name=self.name, names=shown, rule=self.rest_rule), NumericalWarning, stacklevel=4)

    # --- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state, enough to continue bit by bit: tensors (not copied), numbers and names only."""
        state = super().state_dict()
        state["fisherlens"] = {
            "method": self.name,
            "parameters": {p.name: list(p.shape) for p in self.layout.parameters},
            "diagnostics": dict(self.diagnostics),
            "generator": self._generator.get_state(),
            "maps": dict(self._tap.maps),
            "previous": self._previous,
            **self._state(),
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state of the same method and model, copying its tensors; another one is an InputError."""
        own = state_dict.get("fisherlens", {})
        if own.get("method") != self.name:
            got = repr(own["method"]) if "method" in own else "an optimizer of another library"
            raise InputError(texts.OTHER_STATE.format(name=self.name, got=got))
        expected = {p.name: list(p.shape) for p in self.layout.parameters}
        if own["parameters"] != expected:
            differ = sorted(set(map(str, own["parameters"].items())) ^ set(map(str, expected.items())))
            raise InputError(texts.OTHER_MODEL.format(name=self.name, what=f"parameters differ, such as {differ[0]}"))
        like = self._parameters[0]

        def copied(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.detach().to(like.device, like.dtype, copy=True)
            if isinstance(value, Mapping):
                return {key: copied(entry) for key, entry in value.items()}
            return [copied(entry) for entry in value] if isinstance(value, list) else value

        maps = {name: None if shape is None else tuple(shape) for name, shape in own["maps"].items()}
        self._load_state(copied({**own, "maps": maps, "generator": None}))
        self._clear()
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "fisherlens"})
        self._tap.maps = maps
        self._home = f"{like.dtype} on {like.device}"
        self._previous = copied(own["previous"])
        self.diagnostics = dict(own["diagnostics"])
        self._generator.set_state(own["generator"].cpu())
        self._schedule()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse further groups: the statistics belong to the parameters that the optimizer was built with."""
        if self.param_groups:
            raise InputError(texts.ONE_GROUP.format(name=self.name))
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(texts.NO_COPY.format(name=self.name))


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
