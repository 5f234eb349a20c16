"""What the files of results say: values over seeds, paired differences, and how sure they are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import xarray as xr

import fisherlens as fl

# Two-sided 95 % quantiles of Student's t, by degrees of freedom.
_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


def mean_sem(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard error over seeds; NaN for the error of a single one."""
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    if not len(values):
        return np.nan, np.nan
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else np.nan


def half_width(values: np.ndarray) -> float:
    """Half of the 95 % interval of the mean over seeds (Student's t); NaN for a single one."""
    count = int(np.isfinite(values).sum())
    return _T.get(count - 1, 2.0) * mean_sem(values)[1] if count > 1 else np.nan


def said(value: float, error: float, digits: int = 3) -> str:
    """A number with its error, both to the same place."""
    if not np.isfinite(value):
        return "–"
    if abs(value) >= 1000:
        return f"{value:.2g}" + (f" ± {error:.1g}" if np.isfinite(error) else "")
    digits = max(0, digits - (0 if abs(value) < 10 else 1 if abs(value) < 100 else 2))
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if np.isfinite(error) else "")


def number(values: np.ndarray, digits: int = 3) -> str:
    """Mean ± standard error over seeds."""
    return said(*mean_sem(values), digits)


@dataclass
class Network:
    """All files of one network."""

    name: str
    plan: dict
    trees: dict[tuple[int, str], xr.DataTree]

    @cached_property
    def seeds(self) -> list[int]:
        """Seeds of which any stage is there."""
        return sorted({seed for seed, _ in self.trees})

    @cached_property
    def stages(self) -> list[str]:
        """Stages that all of these seeds have."""
        return [s for s in ("init", "epoch", "end") if all((seed, s) in self.trees for seed in self.seeds)]

    @property
    def last(self) -> str:
        """The latest stage."""
        return self.stages[-1]

    @cached_property
    def one(self) -> xr.DataTree:
        """Any of the trees: what all share."""
        return self.trees[self.seeds[0], self.stages[0]]

    @cached_property
    def layers(self) -> list[str]:
        """Layer names, without the whole."""
        return [str(name) for name in self.one["exact"]["layer_only"].values]

    def attr(self, stage: str, name: str) -> np.ndarray:
        """A fact of the training at a stage, over seeds."""
        return np.array([self.trees[seed, stage].attrs[name] for seed in self.seeds], dtype=float)

    def has(self, kind: str) -> bool:
        """Whether a kind of Fisher was judged."""
        return kind in self.one.children

    def value(self, variable: str, cut: str, *, layer: str = "all", stage: str, kind: str = "exact", damping: int = 1):
        """A variable of a cut over seeds; the draws of a random cut are averaged."""
        return self._each(variable, cut, layer, stage, kind, damping).mean(-1)

    def draws(self, variable: str, cut: str, *, layer: str = "all", stage: str, kind: str = "exact", damping: int = 1):
        """As :meth:`value`, each draw by itself: (seed, draw)."""
        return self._each(variable, cut, layer, stage, kind, damping)

    def _each(self, variable: str, cut: str, layer: str, stage: str, kind: str, damping: int) -> np.ndarray:
        rows = []
        for seed in self.seeds:
            ds = self.trees[seed, stage][kind].dataset
            names = [
                n
                for n in ds["cut"].values.tolist()
                if n == cut or (n.rpartition(" ")[0] == cut and cut.endswith("random"))
            ]
            if not names:
                return np.full((len(self.seeds), 1), np.nan)
            found = ds[variable].sel(cut=names, layer=layer)
            rows.append((found.isel(damping=damping) if "damping" in found.dims else found).values)
        return np.array(rows, dtype=float)

    def over_layers(self, variable: str, cut: str, layers: list[str], **where) -> np.ndarray:
        """Mean over layers, over seeds."""
        if not layers:
            return np.full(len(self.seeds), np.nan)
        return np.mean([self.value(variable, cut, layer=layer, **where) for layer in layers], axis=0)

    def coupling(self, variable: str, relation: str, layers: list[str], stage: str) -> np.ndarray:
        """Mean over the layers that have such pairs, over seeds."""
        rows = [
            self.trees[seed, stage]["coupling"].dataset[variable].sel(relation=relation, layer=layers).mean("layer")
            for seed in self.seeds
        ]
        return np.array(rows, dtype=float)

    def stand_in(self, variable: str, name: str, stage: str) -> np.ndarray:
        """A variable of a structured approximation, over seeds."""
        return np.array(
            [float(self.trees[s, stage]["stand_ins"].dataset[variable].sel(approximation=name)) for s in self.seeds]
        )

    def single_share(self, rule: str, layer: str) -> float:
        """Share of a layer's parameters that a rule leaves alone."""
        return float(self.one["exact"]["single_share"].sel(rule=rule, layer_only=layer))

    @property
    def convolutions(self) -> list[str]:
        """Layers that are convolutions."""
        return [name for name in self.layers if name.startswith("conv")]

    @property
    def dense(self) -> list[str]:
        """Layers that are not."""
        return [name for name in self.layers if not name.startswith("conv")]

    @property
    def segmented(self) -> list[str]:
        """Layers that CW-NGD cuts into segments of more than one weight, two of a unit at least."""
        found = self.one["coupling"]["num_pairs"].sel(relation="same unit, next source")
        return [str(name) for name in found.layer.values[np.isfinite(found.values)]]


def load(folder: Path) -> dict[str, Network]:
    """Network by name; where files were made with different settings, those like the newest file."""
    files = sorted(folder.glob("*.nc"), key=lambda path: path.stat().st_mtime_ns)
    trees = [fl.load(path) for path in files]
    plans = {tree.attrs["network"]: tree.attrs["plan"] for tree in trees}
    found: dict[str, Network] = {}
    for name, plan in plans.items():
        own = {
            (t.attrs["seed"], t.attrs["stage"]): t
            for t in trees
            if t.attrs["network"] == name and t.attrs["plan"] == plan
        }
        network = Network(name, json.loads(plan), dict(sorted(own.items())))
        if network.stages:
            found[name] = network
    return found
