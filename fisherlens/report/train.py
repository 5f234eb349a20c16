"""Training that leaves what a report needs: curves of every optimizer and seed, and the network at three stages."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fisherlens.errors import readable_bytes
from fisherlens.fisher import Fisher
from fisherlens.report.blocks import as_blocks, segmentations
from fisherlens.report.store import Store
from fisherlens.training import Problem, train
from fisherlens.training.loop import MakeOptimizer

if TYPE_CHECKING:
    import xarray as xr

STAGES = ("start", "middle", "end")
CWNGD_NAME, SGD_NAME = "cw-ngd", "sgd"

# Our choice for these small networks: about the best of a coarse grid on seeds 1 and 2; the default run uses 0 and 1, so one overlaps.
# The released defaults of CW-NGD (1e-3 and 1e-7) are for batches of 1,024.
CWNGD_OPTIONS = {"lr": 3e-3, "damping": 1e-4}
SGD_OPTIONS = {"lr": 0.1, "momentum": 0.9}
_MOST_BYTES = 48 * 2**20  # of all blocks together: what a step can factorise in a fraction of a second


def default_optimizers(problem: Problem) -> dict[str, MakeOptimizer]:
    """CW-NGD and SGD with momentum."""
    return {
        CWNGD_NAME: partial(cwngd, problem=problem),
        SGD_NAME: lambda model: torch.optim.SGD(model.parameters(), **SGD_OPTIONS),
    }


def cwngd(model: nn.Module, problem: Problem, partition: Any = "cw-ngd") -> torch.optim.Optimizer:
    """The CW-NGD optimizer of the report, on its own blocks or on others."""
    from fisherlens.optim import CWNGD

    return CWNGD(model, **CWNGD_OPTIONS, likelihood=problem.likelihood, partition=partition)


def segment_optimizers(problem: Problem, F: Fisher, store: Store, seed: int) -> dict[str, MakeOptimizer]:
    """CW-NGD with the blocks of every segmentation whose matrices are small, all other options equal."""
    entries: dict[str, MakeOptimizer] = {}
    for blocks in segmentations(F, seed):
        size = blocks.storage_bytes(F.dtype)
        if size > _MOST_BYTES:
            why = f"its blocks take {readable_bytes(size)}, more than the {readable_bytes(_MOST_BYTES)} that the report spends on them"
            store.log(f"training with {blocks.scheme} blocks", "", "left out", why)
            continue
        # the optimizer lays the network out by itself, and takes blocks in flat indices from anywhere
        entries[blocks.scheme] = partial(cwngd, problem=problem, partition=as_blocks(blocks))
    return entries


class Snapshots:
    """A callback for :func:`fisherlens.train` that copies the parameters at the start, half way and at the end."""

    def __init__(self, num_steps: int):
        self.wanted = {0: "start", num_steps: "end"}
        if num_steps >= 2:
            self.wanted[num_steps // 2] = "middle"
        self.states: dict[str, dict[str, torch.Tensor]] = {}
        self.steps: dict[str, int] = {}

    def __call__(self, step: int, model: nn.Module, optimizer: object) -> None:
        if step in self.wanted:
            stage = self.wanted[step]
            self.states[stage] = copy.deepcopy(dict(model.state_dict()))
            self.steps[stage] = step

    def stages(self) -> list[str]:
        """Stages that were reached, in order."""
        return [stage for stage in STAGES if stage in self.states]


def train_all(
    problem: Problem,
    optimizers: Mapping[str, MakeOptimizer],
    *,
    num_steps: int,
    batch_size: int,
    seeds: Sequence[int],
    device: torch.device | None,
    snapshots: Snapshots | None = None,
    tick: Callable[[float], object] = lambda share: None,
    done: Callable[[xr.Dataset], object] = lambda result: None,
) -> xr.Dataset:
    """Train with every optimizer and seed from equal starts in equal batch order; Ctrl-C keeps the runs that are over.

    ``snapshots`` are taken of the first optimizer's first seed. ``done`` is called with what there is after each run.

    Raises
    ------
    KeyboardInterrupt
        After ``done`` was called with everything up to it: :func:`fisherlens.train` notes an interrupt in its record, and the
        report has to stop too.
    """
    rows: dict[str, list[xr.Dataset]] = {}
    share = 1 / (len(optimizers) * len(seeds) * num_steps)
    result = None
    for place, seed in enumerate(seeds):
        for number, (name, make) in enumerate(optimizers.items()):
            model = problem.model(seed)
            model = model if device is None else model.to(device)
            callbacks: list[Any] = [lambda step, *_: tick(share) if step else None]
            if snapshots is not None and place == number == 0:
                callbacks.append(snapshots)
            run = train(
                model,
                problem,
                make,
                num_steps=num_steps,
                batch_size=batch_size,
                seed=seed,
                name=name,
                callbacks=callbacks,
                record_every=max(1, num_steps // 20),
                progress=False,
            )
            rows.setdefault(name, []).append(run)
            result = joined(rows, seeds)
            done(result)
            if bool(run.interrupted.any()):
                raise KeyboardInterrupt
    return result


def joined(rows: Mapping[str, Sequence[xr.Dataset]], seeds: Sequence[int]) -> xr.Dataset:
    """Runs as one Dataset over optimizer, seed and step; a run that was not started is NaN and counts as interrupted."""
    import json

    import xarray as xr

    settings: dict[str, Any] = {}
    for runs in rows.values():
        own = json.loads(runs[0].attrs["settings"])
        settings = {**own, "optimizers": settings.get("optimizers", {}) | own["optimizers"]}
    most = max(len(runs) for runs in rows.values())
    by_name = [
        xr.concat(
            [*runs, *[_never(runs[0], seed) for seed in seeds[len(runs) : most]]], "seed", combine_attrs="override"
        )
        for runs in rows.values()
    ]
    result = xr.concat(by_name, "optimizer", combine_attrs="override", join="outer")
    result.attrs |= {"settings": json.dumps(settings, sort_keys=True)}
    result.attrs.pop("seed", None)
    return result


def _never(like: xr.Dataset, seed: int) -> xr.Dataset:
    """A run that was not started, in the form of one that was."""
    empty = like.copy(deep=True).assign_coords(seed=("seed", [seed], like.seed.attrs))
    for name, variable in empty.data_vars.items():
        if variable.dtype.kind == "f":
            empty[name] = variable * float("nan")
            empty[name].attrs = variable.attrs
    empty["interrupted"].values[:] = True
    empty["steps_taken"].values[:] = 0
    empty["ended_by"] = (("optimizer", "seed"), [["not started"]], like.ended_by.attrs)
    return empty
