"""Measurements as a labelled Dataset over ``step``, and back: what is shown, saved, resumed and handed to loggers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fisherlens.errors import InputError

if TYPE_CHECKING:
    import xarray as xr

WHOLE = "all"
QUANTITIES = ("loss", "trace", "eigenvalues", "effective_dimension", "coupling", "alignment", "drift")
_PAIR = ("block_i", "block_j")
# attributes that say what was analysed
FACTS = ("kind", "mc_samples", "mc_sampling", "likelihood", "n_data", "n_params", "dtype", "device", "seed", "plan")

# name -> (quantity or None where it is always there, dims behind step, long_name, units)
VARIABLES: dict[str, tuple[str | None, tuple[str, ...], str, str]] = {
    "loss": ("loss", (), "mean loss on the monitored examples", "nat"),
    "gradient_norm": ("loss", (), "norm of its gradient", "nat"),
    "trace": ("trace", ("layer",), "trace of F", "nat"),
    "eigenvalue": ("eigenvalues", ("rank",), "eigenvalue of F", "nat"),
    "residual_norm": ("eigenvalues", ("rank",), "error bound or residual norm of the eigenvalue", "nat"),
    "noise_floor": ("eigenvalues", (), "noise floor n ε λ_max", "nat"),
    "effective_dimension": ("effective_dimension", (), "effective dimension", "1"),
    "effective_dimension_sem": ("effective_dimension", (), "standard error of the effective dimension", "1"),
    "effective_dimension_low": ("effective_dimension", (), "lower end of the interval of the effective dimension", "1"),
    "effective_dimension_high": (
        "effective_dimension",
        (),
        "upper end of the interval of the effective dimension",
        "1",
    ),
    "coupling": ("coupling", _PAIR, "coupling of two layers", "1"),
    "coupling_floor": ("coupling", _PAIR, "coupling of uncorrelated layers in a sample of this size", "1"),
    "alignment": ("alignment", (), "share of |g|² in the leading eigenspace", "1"),
    "alignment_chance_in_rows": ("alignment", (), "share of a random vector of the row space of the scores", "1"),
    "overlap_first": ("drift", (), "overlap with the first leading space", "1"),
    "overlap_previous": ("drift", (), "overlap with the previous leading space", "1"),
    "space_size": ("alignment drift", (), "dimension of the leading space", "1"),
    "gap": ("alignment drift", (), "relative gap behind the leading space", "1"),
    "chance": ("alignment drift", (), "share or overlap of random directions", "1"),
    "lr": (None, (), "learning rate", "1"),
    "stability_limit": (None, (), "largest stable curvature at this learning rate", "nat"),
    "seconds": (None, (), "wall time since the start", "s"),
    "monitor_seconds": (None, (), "wall time in the Monitor", "s"),
    "share_of_time": (None, (), "share of the wall time in the Monitor", "1"),
}


def present(quantities: Sequence[str]) -> list[str]:
    """The variables that some quantities give."""
    return [
        name
        for name, (quantity, *_) in VARIABLES.items()
        if quantity is None or any(word in quantities for word in quantity.split())
    ]


@dataclass
class Table:
    """Rows of a run, one per measurement, ascending in ``step``.

    Attributes
    ----------
    quantities, layers, k
        What is measured, and the lengths of the dims.
    attrs
        Facts about the operator, for the attributes of the result.
    rows
        Name -> value of each measurement; ``step``, ``problem`` (why nothing was measured, or empty) and ``method`` beside the variables.
    """

    quantities: tuple[str, ...]
    layers: tuple[str, ...]
    k: int
    attrs: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def last_step(self) -> int | None:
        """Where the latest measurement was made."""
        return self.rows[-1]["step"] if self.rows else None

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a measurement; one at the same step takes the place of the earlier one."""
        self.forget_from(row["step"])
        self.rows.append(dict(row))

    def forget_from(self, step: int) -> None:
        """Drop the measurements at this step and later."""
        self.rows = [row for row in self.rows if row["step"] < step]

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of one measurement of a variable."""
        sizes = {
            "layer": len(self.layers) + 1,
            "rank": self.k,
            "block_i": len(self.layers),
            "block_j": len(self.layers),
        }
        return tuple(sizes[dim] for dim in VARIABLES[name][1])

    def column(self, name: str) -> np.ndarray:
        """All measurements of a variable, NaN where it was not measured."""
        shape = self.shape_of(name)
        out = np.full((len(self.rows), *shape), np.nan)
        for place, row in enumerate(self.rows):
            if name in row:
                out[place] = np.asarray(row[name], dtype=float)
        return out

    def to_dataset(self, settings: Mapping[str, Any]) -> xr.Dataset:
        """The rows as arrays, with how they were made."""
        from fisherlens.results import make_dataset

        variables: dict[str, Any] = {}
        for name in present(self.quantities):
            _, dims, long_name, units = VARIABLES[name]
            variables[name] = (("step", *dims), self.column(name), {"long_name": long_name, "units": units})
        problems = np.array([row.get("problem", "") for row in self.rows], dtype=str)
        variables["measured"] = ("step", problems == "", {"long_name": "whether the step was measured", "units": "1"})
        variables["problem"] = ("step", problems, {"long_name": "why it was not", "units": "1"})
        coords: dict[str, Any] = {
            "step": (
                "step",
                np.array([row["step"] for row in self.rows], dtype=np.int64),
                {"long_name": "optimizer steps", "units": "1"},
            )
        }
        if "trace" in self.quantities:
            coords["layer"] = [*self.layers, WHOLE]
        if "eigenvalues" in self.quantities:
            coords["rank"] = np.arange(self.k)
        if "coupling" in self.quantities:
            coords |= {dim: list(self.layers) for dim in _PAIR}
        methods = list(dict.fromkeys(row["method"] for row in self.rows if row.get("method")))
        method = "; ".join(methods) or "one capture per measurement"
        return make_dataset(variables, coords, method=method, settings=settings, **self.attrs)

    def take(self, dataset: xr.Dataset, source: str) -> None:
        """Take over the rows of a Dataset of an earlier part of this run."""
        wanted = present(self.quantities)
        layers = tuple(str(name) for name in dataset["layer"].values[:-1]) if "layer" in dataset.dims else None
        fits = (
            "step" in dataset.dims
            and "problem" in dataset
            and sorted(set(dataset.data_vars) - {"measured", "problem"}) == sorted(wanted)
            and all(dataset[name].shape[1:] == self.shape_of(name) for name in wanted)
            and layers in (None, self.layers)
            and dataset.attrs.get("n_params") == self.attrs.get("n_params")
        )
        if not fits:
            raise InputError(
                f"{source} is no record of this run: it holds {', '.join(map(str, dataset.data_vars)) or 'nothing'} of {dataset.attrs.get('n_params', '?')} "
                f"parameters, while this Monitor measures {', '.join(self.quantities)} of {self.attrs.get('n_params')} in the layers {', '.join(self.layers)}. "
                "Build it with the arguments of the earlier part, write to another file, or replace the old one with existing='replace'."
            )
        self.attrs |= {name: dataset.attrs[name] for name in FACTS if name in dataset.attrs}
        columns = {name: dataset[name].values for name in wanted}
        problems = dataset["problem"].values
        self.rows = []
        for place, step in enumerate(dataset["step"].values):
            row: dict[str, Any] = {"step": int(step), "problem": str(problems[place])}
            if not row["problem"]:
                row["method"] = str(dataset.attrs.get("method", ""))
            row |= {name: column[place] for name, column in columns.items() if not np.isnan(column[place]).all()}
            self.rows.append(row)


def plain_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows as lists, numbers and text, which any checkpoint can hold."""
    return [
        {
            name: value if isinstance(value, str | int) else np.asarray(value, dtype=float).tolist()
            for name, value in row.items()
        }
        for row in rows
    ]


def flat_values(row: Mapping[str, Any], layers: Sequence[str]) -> Iterator[tuple[str, float]]:
    """The finite numbers of a measurement by name, for loggers: ``trace/all``, ``eigenvalue/0``, ``coupling/mean`` and so on."""
    for name, (_, dims, *_) in VARIABLES.items():
        if name not in row or name in ("residual_norm", "coupling_floor"):
            continue
        values = np.asarray(row[name], dtype=float)
        if dims == ("layer",):
            named = zip((f"{name}/{layer}" for layer in (*layers, WHOLE)), values, strict=True)
        elif dims == ("rank",):
            named = zip((f"{name}/{rank}" for rank in range(len(values))), values, strict=True)
        elif dims == _PAIR:
            pairs = values[np.triu_indices(len(values), 1)]
            named = [(f"{name}/mean", pairs.mean()), (f"{name}/max", pairs.max())] if len(pairs) else []
        else:
            named = [(name, values.item())]
        yield from ((key, float(value)) for key, value in named if math.isfinite(value))
