"""Fisher diagnostics along a training loop that somebody else writes."""

from __future__ import annotations

import json
import numbers
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fisherlens.errors import InputError, NonFiniteError, NumericalWarning
from fisherlens.fisher import Fisher
from fisherlens.fisher.checks import check_seed
from fisherlens.layout import Layout
from fisherlens.likelihoods import Likelihood, as_likelihood
from fisherlens.linalg.precision import without_autocast
from fisherlens.results import load, require_writable
from fisherlens.scores.recorder import preserved_randomness
from fisherlens.training.monitor.clock import Clock, learning_rate, stability_limit
from fisherlens.training.monitor.examples import choose_examples
from fisherlens.training.monitor.file import RunFile
from fisherlens.training.monitor.measure import Wish, measure
from fisherlens.training.monitor.options import check_options, choose_quantities
from fisherlens.training.monitor.table import Table, flat_values, plain_rows
from fisherlens.training.monitor.twin import eval_copy, select, unwrap

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["Monitor"]

_HOOKS = (
    "The Monitor analyses a copy of the network without {what}. If that only listens, nothing is amiss: keep_hooks=False says so and silences this. If it is "
    "part of what the network computes, the numbers are those of another network: pass keep_hooks=True."
)
_NOT_MEASURED = (
    "The Monitor could not measure step {step}, which is NaN in its result; the training goes on, and later failures are noted in the variable 'problem' "
    "alone. {problem} With strict=True this is an error."
)
_NOT_WRITTEN = "The Monitor measured step {step} and could not {what}; the training goes on. {problem} With strict=True this is an error."


class Monitor:
    r"""Fisher diagnostics along any training loop, in a file as it goes, at a cost that is measured and shown.

    After every so many optimizer steps it takes a copy of the network in eval mode, builds its Fisher on a few fixed examples, and
    records what is asked for. The training is not touched: parameters, buffers, gradients, hooks and random state stay as they are, so that
    a run ends with the same parameters with and without it, bit by bit.

    Parameters
    ----------
    model
        The network that is being trained, in any mode, and behind ``torch.compile`` or (Distributed)DataParallel too.
    data
        What to judge it by: ``(inputs, targets)`` tensors, or batches of them such as a DataLoader. ``num_examples`` of them are copied once,
        a random choice from tensors and the first ones from batches, and serve the whole run. Held-out data show generalisation, training data the loss surface.
    likelihood
        As in :class:`fisherlens.Fisher`.
    every
        Optimizer steps between measurements.
    quantities
        Any of ``"loss"``, ``"trace"``, ``"eigenvalues"``, ``"effective_dimension"``, ``"coupling"``, ``"alignment"``, ``"drift"``; None for all that the data
        allow (the loss and the alignment need targets).
    k
        Leading eigenvalues, and dimension of the leading space.
    damping
        λ of the effective dimension, in nat, the same along the run.
    kind, mc_samples, params, seed, memory
        As in :class:`fisherlens.Fisher`; of the kinds ``"exact"``, ``"mc"`` and ``"empirical"``. ``seed`` also chooses the examples.
    num_examples
        How many examples; None for all. The default of 64 keeps the Gram matrix of ten classes below an order of 600, so that all is exact (our choice).
        A score column per class is a backward pass: with hundreds of classes take ``kind="mc"``, of ``mc_samples`` columns.
    optimizer
        If given, its learning rate is recorded, and for SGD the largest stable curvature (2/lr without momentum).
    max_share
        Stretch the interval so that the Monitor takes at most this share of the wall time; the steps at which it measured are the coordinate
        ``step``. None measures every ``every`` steps whatever that costs.
    out
        File to write after each measurement, whole or not at all: a run killed at any time leaves all finished measurements.
    existing
        Where ``out`` is there already: ``"refuse"``, ``"replace"`` it, or ``"continue"`` the run that it holds from its last step.
    to
        Functions ``(step, values)`` that receive each measurement as a dict of numbers, such as those of :mod:`fisherlens.adapters`.
    start
        Measure at once, as step 0; False where a state is to be loaded. The first measurement also tests the arguments.
    strict
        Raise what keeps a step from being measured or written. By default it is noted and warned of once, as no diagnosis is worth a training run.
    keep_hooks
        Whether hooks of the network act on its copy. None leaves them out and says so; those of torch (weight norm, pruning) always act.

    Attributes
    ----------
    result : xarray.Dataset
        All measurements so far over ``step``: what ``quantities`` ask for, ``seconds``, ``monitor_seconds`` and ``share_of_time``, ``measured`` and ``problem``.
    steps, share_of_time
        Optimizer steps so far; share of the wall time that went into the Monitor, writing included.

    Raises
    ------
    InputError, TypeError
        An option out of its range, data or a network that a Fisher refuses, or a file that is there and may not be replaced; before the training starts.
    UnsupportedModuleError
        A network that cannot be copied.

    Warns
    -----
    NumericalWarning
        Once for the first step that could not be measured, as of NaN in the parameters, and once for hooks that were left out.

    Notes
    -----
    - ``trace`` (layer) in nat: mean squared length of the scores. A spike says that one step changed the outputs of every example.
    - ``eigenvalue`` (rank) in nat, ``residual_norm`` and ``noise_floor``: the stiffest directions.
    - ``effective_dimension`` tr F(F + λ)⁻¹, with standard error and interval, which are 0 and the value itself where it is exact.
    - ``coupling`` (block_i, block_j) of layers, and ``coupling_floor``, its chance level.
    - ``alignment`` ‖Vᵀg‖²/‖g‖² of the mean gradient g and the ``space_size`` leading eigenvectors V; ``chance`` is what a random direction gives, s/P,
      ``alignment_chance_in_rows`` what a random one of those gives that these examples see at all, s over the rank.
    - ``overlap_previous``, ``overlap_first`` ‖VᵀW‖²/s with the space of the previous and of the first measurement, 1 for the same space, ``chance`` for random ones.
      Drift is 1 less that. ``gap``, 1 - λ_{s+1}/λ_s, tells how well the space is determined: near 0 an overlap means little.
    - ``lr`` and ``stability_limit``: curvature beyond which gradient descent diverges on a quadratic. It is about the Hessian; F is the part of it that does not
      vanish where the data are fitted.

    Exact through the smaller of F and its Gram matrix up to an order of 3,000; beyond, ``top_eigenvalues`` and Lanczos quadrature with their errors.

    Cost: a copy of the network, one capture (R + 1 backward passes of ``num_examples``), one eigendecomposition, k products. The leading spaces, 2 P k numbers,
    are kept in main memory. In distributed training build it on one process only.

    A file is written in full each time, so that thousands of measurements are better spread over a larger ``every``.

    Examples
    --------
    >>> model, x = nn.Linear(3, 2), torch.eye(3)
    >>> opt = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with Monitor(model, (x, torch.tensor([0, 1, 0])), likelihood="categorical", every=5, k=2) as monitor:
    ...     for _ in range(10):
    ...         loss = nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 0]))
    ...         opt.zero_grad(); loss.backward(); opt.step()
    ...         measured = monitor.step()
    >>> monitor.result["step"].values.tolist()
    [0, 5, 10]
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        likelihood: str | Likelihood,
        every: int = 50,
        quantities: Sequence[str] | str | None = None,
        k: int = 10,
        damping: float = 1e-3,
        kind: str = "exact",
        mc_samples: int = 1,
        params: Sequence[str] | str | None = None,
        num_examples: int | None = 64,
        seed: int = 0,
        memory: str | float = "2GiB",
        optimizer: Any = None,
        max_share: float | None = None,
        out: str | os.PathLike[str] | None = None,
        existing: str = "refuse",
        to: Iterable[Callable[[int, Mapping[str, float]], object]] = (),
        start: bool = True,
        strict: bool = False,
        keep_hooks: bool | None = None,
    ):
        self._clock = Clock()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be the torch.nn.Module that is being trained; got {type(model).__name__}.")
        self._likelihood = as_likelihood(likelihood)
        check_options(every, k, damping, kind, num_examples, max_share, existing, start, strict, keep_hooks)
        every, k, num_examples = int(every), int(k), None if num_examples is None else int(num_examples)
        seed = check_seed(seed)
        self._sinks = list(to)
        for sink in self._sinks:
            if not callable(sink):
                raise TypeError(
                    f"to= takes functions (step, values), such as fl.adapters.tensorboard('runs/'); got {type(sink).__name__}."
                )
        self._model, self._optimizer = model, optimizer
        self.every, self._strict, self._keep_hooks = every, strict, keep_hooks
        self._max_share = None if max_share is None else float(max_share)
        layout = Layout.from_model(unwrap(model), params)
        device = next(unwrap(model).parameters()).device
        with preserved_randomness(device):
            self._batches, self._count = choose_examples(data, num_examples, seed)
        labelled = all(targets is not None for _, targets in self._batches)
        wish = Wish(choose_quantities(quantities, labelled), min(k, layout.n_params), float(damping), seed)
        self._wish = wish
        self._names = layout.names
        self._options = {"kind": kind, "mc_samples": mc_samples, "seed": seed, "memory": memory}
        self._options |= {"likelihood": self._likelihood, "progress": False}
        self._table = Table(wish.quantities, layout.layer_names, wish.k, {"n_params": layout.n_params})
        self._first: Tensor | None = None
        self._previous: Tensor | None = None
        self._told: set[str] = set()
        self._shown: xr.Dataset | None = None
        self._closed = False
        self.steps = 0
        self._out = self._open(out, existing)
        if start and self._table.last_step is None:
            self._measure(raising=True)

    # --- the training loop -------------------------------------------------------------------------------------------

    def step(self, at: int | None = None) -> bool:
        """Count an optimizer step, after ``opt.step()``, and measure if one is due; tells whether it did.

        Parameters
        ----------
        at
            The number of optimizer steps taken so far, for loops that know it; None for one more than before. A smaller number than
            before means that the run went back: measurements of later steps are dropped.
        """
        self._go_to(self.steps + 1 if at is None else at)
        since = self.steps - (self._table.last_step or 0)
        if self._closed or since < self.every or not self._clock.allows(self._max_share):
            return False
        self._measure()
        return True

    def measure(self, at: int | None = None) -> None:
        """Measure now, whether or not it is due: at the end of a run, say. A second measurement of one step replaces the first.

        Parameters
        ----------
        at
            The number of optimizer steps taken so far, if :meth:`step` was not told.
        """
        self._go_to(self.steps if at is None else at)
        self._measure()

    def _go_to(self, at: Any) -> None:
        if isinstance(at, bool) or not isinstance(at, numbers.Integral) or at < 0:
            raise InputError(f"at must be the number of optimizer steps so far, an integer >= 0; got {at!r}.")
        self.steps = at = int(at)
        if (self._table.last_step or 0) > at:  # the run went back, and takes these steps again
            self._table.forget_from(at + 1)
            self._shown = self._previous = None  # the space of a step that is dropped is no earlier one

    def close(self) -> None:
        """Close what receives the measurements; the result stays, and later steps are not measured."""
        if self._closed:
            return
        self._closed = True
        for sink in self._sinks:
            close = getattr(sink, "close", None)
            if callable(close):
                self._attempt(close, f"close {_name(sink)}")

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- results -----------------------------------------------------------------------------------------------------

    @property
    def result(self) -> xr.Dataset:
        """All measurements so far; a Dataset of its own each time."""
        return self._dataset().copy(deep=True)

    @property
    def share_of_time(self) -> float:
        """Share of the wall time since the start that went into the Monitor."""
        return self._clock.share

    def __repr__(self) -> str:
        last = self._table.last_step
        seen = "no measurement yet" if last is None else f"{len(self._table)} measurements, the last at step {last}"
        where = "" if self._out is None else f", out={str(self._out.path)!r}"
        return (
            f"Monitor(every={self.every}, N={self._count}, P={self._table.attrs['n_params']}, {', '.join(self._wish.quantities)}: {seen}; "
            f"{100 * self.share_of_time:.1f} % of the time{where})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Monitor:
        """A network that holds its Monitor shares it with its copies."""
        return self

    def _dataset(self) -> xr.Dataset:
        if self._shown is None:
            self._shown = self._table.to_dataset(self._settings())
        return self._shown

    def _settings(self) -> dict[str, Any]:
        return {
            "every": self.every,
            "k": self._wish.k,
            "damping": self._wish.damping,
            "quantities": self._wish.quantities,
            "max_share": self._max_share,
            "optimizer": None if self._optimizer is None else type(self._optimizer).__name__,
        }

    # --- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes to go on as if nothing had happened: numbers, text and tensors, for your checkpoint."""
        return {
            "version": 1,
            "steps": self.steps,
            "rows": plain_rows(self._table.rows),
            "facts": dict(self._table.attrs),
            "made_of": self._identity(),
            "first": self._first,
            "previous": self._previous,
            "elapsed": self._clock.elapsed,
            "spent": self._clock.spent,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: steps, measurements, the spaces that drift is measured from, and the times.

        Measurements made after the state was taken are dropped, from ``out`` too at the next measurement: the steps are taken again.
        Build the Monitor with ``start=False``, and with ``existing="continue"`` if it writes to the file of the earlier part.

        Parameters
        ----------
        state
            As :meth:`state_dict` gave it.
        """
        own = self._identity()
        theirs = state.get("made_of") if isinstance(state, Mapping) else None
        if not isinstance(theirs, Mapping) or dict(theirs) != own:
            known = dict(theirs) if isinstance(theirs, Mapping) else {}
            differ = [name for name in own if known.get(name) != own[name]]
            shown = ", ".join(f"{name} {known.get(name)!r} there and {own[name]!r} here" for name in differ[:3])
            raise InputError(
                f"The state is that of another Monitor: {shown or 'it has no settings'}. Build it with the same network, quantities, k and damping."
            )
        self.steps = int(state["steps"])
        self._table.rows = [dict(row) for row in state["rows"]]
        self._table.attrs = dict(state["facts"])
        self._first, self._previous = state["first"], state["previous"]
        self._clock, self._shown = Clock(float(state["elapsed"]), float(state["spent"])), None

    def _identity(self) -> dict[str, Any]:
        wish = self._wish
        return {
            "quantities": list(wish.quantities),
            "k": wish.k,
            "damping": wish.damping,
            "kind": self._options["kind"],
            "params": list(self._names),
            "num_examples": self._count,
        }

    def _open(self, out: str | os.PathLike[str] | None, existing: str) -> RunFile | None:
        if out is None:
            return None
        path = require_writable(out)
        if path.exists() and existing == "refuse":
            raise InputError(
                f"{path} is there already, and a Monitor does not write over another run. Name another file, replace it with existing='replace', or go on with "
                "the run that it holds with existing='continue'."
            )
        if path.exists() and existing == "continue":
            found = load(path)
            self._table.take(found, str(path))
            last = self._table.rows[-1] if self._table.rows else {}
            self.steps = int(last.get("step", 0))
            self._clock = Clock(float(last.get("seconds", 0.0)), float(last.get("monitor_seconds", 0.0)))
        return RunFile(path)

    # --- one measurement ---------------------------------------------------------------------------------------------

    def _measure(self, *, raising: bool = False) -> None:
        device = next(unwrap(self._model).parameters()).device
        with (
            preserved_randomness(device),
            torch.inference_mode(False),
            without_autocast(),
            self._clock.running(device),
        ):
            row = {"step": self.steps} | self._values(raising)
            times = {"seconds": self._clock.elapsed, "monitor_seconds": self._clock.spent}
            row |= times | {"share_of_time": self._clock.share}
            self._table.add(row)
            self._shown = None
            if self._out is not None:
                self._attempt(lambda: self._out.write(self._dataset()), f"write {self._out.path}")
            values = dict(flat_values(row, self._table.layers)) if self._sinks else {}
            for sink in self._sinks:
                self._attempt(lambda sink=sink: sink(self.steps, values), f"hand it to {_name(sink)}")

    def _values(self, raising: bool) -> dict[str, Any]:
        """What was measured; or, of a network that cannot be measured now, why."""
        row: dict[str, Any] = {}
        if self._optimizer is not None:
            row |= {"lr": learning_rate(self._optimizer), "stability_limit": stability_limit(self._optimizer)}
        try:
            twin, left_out = eval_copy(self._model, keep_hooks=bool(self._keep_hooks))
            if left_out and self._keep_hooks is None:
                self._tell("hooks", _HOOKS.format(what=", ".join(left_out[:3]) + (", …" if len(left_out) > 3 else "")))
            select(twin, self._names, self._table.attrs["n_params"])
            F = Fisher(twin, self._batches, **self._options)
            again = self._table.last_step == self.steps  # the space of a measurement that is replaced is no earlier one
            earlier = self._first, None if again else self._previous
            values, space = measure(F, twin, self._batches, self._wish, earlier)
        except Exception as error:
            # nothing trains yet at the start, so there a wrong argument shows; but NaN may be what one wants to see
            if self._strict or (raising and not isinstance(error, NonFiniteError)):
                raise
            problem = f"{type(error).__name__}: {error}"
            self._tell("measure", _NOT_MEASURED.format(step=self.steps, problem=problem))
            return row | {"problem": problem}
        if "kind" not in self._table.attrs:
            self._table.attrs |= facts_of(F)
        if space is not None:
            self._first = space if self._first is None else self._first
            self._previous = space
        return row | values | {"problem": ""}

    def _attempt(self, action: Callable[[], object], what: str) -> None:
        """Do something that must not end the training."""
        try:
            action()
        except Exception as error:
            if self._strict:
                raise
            problem = f"{type(error).__name__}: {error}"
            self._tell(what, _NOT_WRITTEN.format(step=self.steps, what=what, problem=problem))

    def _tell(self, what: str, message: str) -> None:
        """Warn once of each thing."""
        if what not in self._told:
            self._told.add(what)
            warnings.warn(message, NumericalWarning, stacklevel=5)


def facts_of(F: Fisher) -> dict[str, Any]:
    """What a result says of the operator, which is another one at each step."""
    facts: dict[str, Any] = {name: getattr(F, name) for name in ("kind", "n_data", "n_params", "seed")}
    if F.kind == "mc":
        facts |= {"mc_samples": F.mc_samples, "mc_sampling": F.mc_sampling}
    facts["likelihood"] = F.likelihood.name
    facts |= {name: str(getattr(F, name)).removeprefix("torch.") for name in ("dtype", "device")}
    plan = F.plan.to_json() if hasattr(F.plan, "to_json") else json.dumps(str(F.plan))
    return facts | {"plan": plan}


def _name(sink: Any) -> str:
    return getattr(sink, "__name__", type(sink).__name__)
