"""The table of judgements: filled target by target, whole again after Ctrl-C, and turned into a Dataset."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from fisherlens._progress import progress
from fisherlens.errors import ConvergenceWarning, NumericalWarning, user_level
from fisherlens.fisher import Fisher
from fisherlens.independence.judge import PER_DAMPING, judge
from fisherlens.independence.leads import Leads
from fisherlens.independence.options import Options
from fisherlens.independence.standin import StandIn
from fisherlens.independence.target import Target
from fisherlens.results import make_dataset
from fisherlens.spectrum import WHOLE

if TYPE_CHECKING:
    import xarray as xr

Words = Mapping[str, tuple[str, str]]
_WHOLE_NUMBERS = ("num_blocks", "largest_block", "storage_bytes")


class Table:
    """Values over (damping, stand-in, layer), NaN until judged.

    Parameters
    ----------
    F
        The Fisher operator.
    dim
        ``"partition"`` or ``"approximation"``.
    names
        Of the stand-ins.
    dampings, single
        λ, and whether it was one number.
    fixed
        Long names and units of the variables without damping.
    options, bar
        Of the estimates; whether to show progress.
    """

    def __init__(
        self,
        F: Fisher,
        dim: str,
        names: Sequence[str],
        dampings: list[float],
        single: bool,
        fixed: Words,
        options: Options,
        bar: bool | None,
    ):
        self.F, self.dim, self.names, self.dampings, self.single = F, dim, list(names), dampings, single
        self.words, self.options, self.bar = fixed, options, bar
        self.layers = [*F.layout.layer_names, WHOLE]
        shape = len(self.names), len(self.layers)
        self.fixed = {name: np.full(shape, np.nan) for name in fixed}
        self.varying = {name: np.full((len(dampings), *shape), np.nan) for name in PER_DAMPING}
        self.notes: list[tuple[str, type[Warning]]] = []
        self.methods: dict[str, None] = {}
        self._leads = Leads(F.memory / 8)
        self.done, self.interrupted = 0, False

    @property
    def total(self) -> int:
        """Judgements in all."""
        return len(self.dampings) * len(self.names) * len(self.layers)

    def note(self, text: str, category: type[Warning] = NumericalWarning) -> None:
        """Keep a warning for the end, once."""
        if (text, category) not in self.notes:
            self.notes.append((text, category))

    def fill(self, judge_target: Callable[[Target, int], None]) -> None:
        """Call for each layer and then for the whole with its place; Ctrl-C keeps what is there, unless that is nothing."""
        with progress(self.total, desc=self.dim, enabled=self.bar) as self._bar:
            try:
                diagonal = self.F.diagonal().double()
                for place, layer in enumerate(self.layers):
                    if layer == WHOLE and len(self.layers) == 2:  # of one layer: the whole is that layer
                        self._copy_layer()
                        return
                    whole = layer == WHOLE
                    F, own = self.F if whole else self.F.restrict(layer), None if whole else self.F.layout.layer(layer)
                    piece = diagonal if own is None else diagonal[own.start : own.stop]
                    target = Target(F, layer, self.options, piece)
                    target.leads = self._leads
                    judge_target(target, place)
                    self.methods[target.words] = None
            except KeyboardInterrupt:
                if not self.done:
                    raise
                self.interrupted = True
                self.note(
                    f"Interrupted after {self.done} of {self.total} judgements; the others are NaN in the result.",
                    ConvergenceWarning,
                )

    def _copy_layer(self) -> None:
        for values in (*self.fixed.values(), *self.varying.values()):
            values[..., 1] = values[..., 0]
        self.advance(self.total // 2)

    def advance(self, count: int) -> None:
        """Count judgements that are done."""
        self.done += count
        self._bar.update(count)

    def put(self, row: int, place: int, values: Mapping[str, float]) -> None:
        """Fill variables without damping."""
        for name, value in values.items():
            self.fixed[name][row, place] = value

    def judge(self, target: Target, place: int, stand_ins: Mapping[int, StandIn]) -> None:
        """Fill the variables with damping for stand-ins by their row; equal ones are judged once."""
        different = {id(stand_in.matrix): stand_in for stand_in in stand_ins.values()}
        for at, damping in enumerate(self.dampings):
            found = judge(target, list(different.values()), damping, lambda text: self.note(text, ConvergenceWarning))
            told = dict(zip(different, found, strict=True))
            for row, stand_in in stand_ins.items():
                for name, value in told[id(stand_in.matrix)].items():
                    self.varying[name][at, row, place] = value
            self.advance(len(stand_ins))

    def dataset(self, **settings: Any) -> xr.Dataset:
        """Warn of what is to be told, at the caller, and build the result."""
        for text, category in self.notes:
            warnings.warn(text, category, stacklevel=user_level())
        dims = (self.dim, "layer")
        variables: dict[str, Any] = {}
        for name, (long_name, units) in self.words.items():
            values = self.fixed[name]
            if name in _WHOLE_NUMBERS and np.isfinite(values).all():
                values = values.astype(np.int64)
            variables[name] = (dims, values, {"long_name": long_name, "units": units})
        for name, (long_name, units) in PER_DAMPING.items():
            attrs = {"long_name": long_name, "units": units}
            values = self.varying[name]
            variables[name] = (dims, values[0], attrs) if self.single else (("damping", *dims), values, attrs)
        coords: dict[str, Any] = {self.dim: self.names, "layer": self.layers}
        if not self.single:
            coords["damping"] = self.dampings
        how = "; ".join(list(self.methods)[:3])
        return make_dataset(
            variables,
            coords,
            operator=self.F,
            method=f"{how}; condition numbers by dense or Lanczos generalised eigenvalues",
            settings={**settings, "damping": self.dampings, **asdict(self.options)},
            damping=self.dampings[0] if self.single else None,
            num_probes=self.options.num_probes,
            probe_seed=self.options.seed,
            interrupted=f"after {self.done} of {self.total} judgements" if self.interrupted else None,
        )
