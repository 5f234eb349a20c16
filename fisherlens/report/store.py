"""What a report has found so far: results by analysis and stage, a log of every task, and one file that is always whole."""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fisherlens.errors import FisherLensError
from fisherlens.results import make_dataset, save

if TYPE_CHECKING:
    import xarray as xr

DATA_FILE = "report.nc"
_PAUSE = 5.0  # least seconds between two saves: a kill loses no more than that and the task it hits
_SHARE = 0.05  # of the time that saving may take; a file of many couplings is written and read back in seconds

# What may go wrong in one analysis without spoiling the others: everything raised on purpose, and running out of memory.
EXPECTED = (FisherLensError, MemoryError, torch.OutOfMemoryError, torch.linalg.LinAlgError)


class Store:
    """Results and log of one report.

    Parameters
    ----------
    folder
        Where ``report.nc`` is kept up to date.
    attrs
        Facts about the whole report: strings and numbers.
    """

    def __init__(self, folder: Path, attrs: Mapping[str, Any]):
        self.folder = folder
        self.attrs = {"python_version": platform.python_version(), **attrs}
        self.started = time.perf_counter()
        self._staged: dict[str, dict[str, xr.Dataset]] = {}
        self._plain: dict[str, xr.Dataset] = {}
        self._steps: dict[str, float] = {}
        self._log: list[dict[str, Any]] = []
        self._next_save = -float("inf")
        self._changed = False

    # --- collecting --------------------------------------------------------------------------------------------------

    def put(self, node: str, result: xr.Dataset, stage: str | None = None) -> None:
        """Keep a result under a node of the tree; those of several stages are stacked along the dim ``stage``."""
        if stage is None:
            self._plain[node] = result
        else:
            self._staged.setdefault(node, {})[stage] = _with_damping(result)
        self._changed = True

    def get(self, node: str, stage: str) -> xr.Dataset | None:
        """The result of one stage, if it is there."""
        return self._staged.get(node, {}).get(stage)

    def at_step(self, stage: str, step: float) -> None:
        """Note at which training step a stage was reached."""
        self._steps[stage] = float(step)

    def log(self, task: str, stage: str, outcome: str, message: str = "", seconds: float = 0.0) -> None:
        """Note how a task ended: ``done``, ``failed``, ``interrupted``, ``left out``, or a ``caveat`` on its result."""
        self._log.append(
            {"task": task, "stage": stage, "outcome": outcome, "message": " ".join(message.split()), "seconds": seconds}
        )
        self._changed = True

    @contextmanager
    def task(self, task: str, stage: str = "") -> Iterator[None]:
        """Run one analysis: time it, keep its warnings as caveats, and log an expected failure instead of raising it."""
        started = time.perf_counter()
        outcome, message = "interrupted", ""
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                yield
            outcome = "done"
        except EXPECTED as error:
            outcome, message = "failed", f"{type(error).__name__}: {error}"
        finally:
            self.log(task, stage, outcome, message, time.perf_counter() - started)
        for words in dict.fromkeys(str(warning.message) for warning in caught):
            self.log(task, stage, "caveat", words)
        self.save()

    # --- the file ----------------------------------------------------------------------------------------------------

    def tree(self) -> xr.DataTree:
        """All results as one DataTree, with the facts as attributes of its root and the log as a node."""
        import xarray as xr

        facts = {"wall_seconds": time.perf_counter() - self.started, **self.attrs}
        nodes: dict[str, xr.Dataset] = {
            "/": make_dataset({}, {}, method="report: all analyses of one network", **facts)
        }
        nodes |= {f"/{node}": self._stack(parts) for node, parts in self._staged.items()}
        nodes |= {f"/{node}": result for node, result in self._plain.items()}
        if self._log:
            nodes["/log"] = self._log_dataset()
        return xr.DataTree.from_dict(nodes)

    def _log_dataset(self) -> xr.Dataset:
        words = {
            "task": "what was done",
            "stage": "stage of training",
            "outcome": "how it ended",
            "message": "what was reported",
        }
        variables: dict[str, Any] = {
            name: (
                "entry",
                np.array([entry[name] for entry in self._log], dtype=str),
                {"long_name": text, "units": "1"},
            )
            for name, text in words.items()
        }
        spent = np.array([entry["seconds"] for entry in self._log])
        variables["seconds"] = ("entry", spent, {"long_name": "time it took", "units": "s"})
        return make_dataset(variables, {"entry": np.arange(len(self._log))}, method="log of a report")

    @property
    def empty(self) -> bool:
        """Whether no analysis has left a result yet."""
        return not (self._staged or self._plain)

    def _stack(self, parts: Mapping[str, xr.Dataset]) -> xr.Dataset:
        import xarray as xr

        names = xr.Variable("stage", np.array(list(parts), dtype=str), {"long_name": "stage of training"})
        result = xr.concat(
            list(parts.values()),
            names,
            data_vars="all",
            coords="minimal",
            compat="override",
            join="outer",
            combine_attrs="override",
        )
        steps = [self._steps.get(stage, np.nan) for stage in parts]
        if np.isfinite(steps).any():
            result = result.assign_coords(step=("stage", steps, {"long_name": "optimizer steps", "units": "1"}))
        return result

    def save(self, *, force: bool = False) -> xr.DataTree | None:
        """Write ``report.nc`` if something is new and the last save is a while ago, or if forced; what was written, if it was."""
        now = time.perf_counter()
        if not force and (not self._changed or now < self._next_save):
            return None
        tree = self.tree()
        save(tree, self.folder / DATA_FILE)
        done = time.perf_counter()
        self._next_save, self._changed = done + max(_PAUSE, (done - now) / _SHARE), False
        return tree


def _with_damping(result: xr.Dataset) -> xr.Dataset:
    """A damping that is an attribute, as a variable: it differs from stage to stage."""
    if "damping" not in result.attrs:
        return result
    result = result.copy()
    value = float(result.attrs.pop("damping"))
    return result.assign(damping=((), value, {"long_name": "damping λ", "units": "nat"}))
