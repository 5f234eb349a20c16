"""Every analysis of one stage: a network with fixed parameters, and its Fisher."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fisherlens.coupling import coupling
from fisherlens.errors import InputError, NonFiniteError
from fisherlens.fisher import Fisher
from fisherlens.independence import independence
from fisherlens.information import information
from fisherlens.partitions import partition as make_partition
from fisherlens.report.blocks import SEGMENTS, segmentations
from fisherlens.report.relations import relations
from fisherlens.report.steps import mean_loss_at, one_step
from fisherlens.report.store import Store
from fisherlens.results import make_dataset
from fisherlens.spectrum import WHOLE, spectrum

if TYPE_CHECKING:
    import xarray as xr

DAMPING_SHARE = 1e-3  # of the largest eigenvalue; our choice, said on the page
DAMPING_FACTORS = (1.0, 10.0, 100.0)  # of the one-step check
SEGMENT_NULL = 99  # permutations for segments: p-values down to 0.01
MOST_SEGMENTS = 300  # blocks in a layer up to which all pairs of segments take seconds

# What the parts of one stage cost beside each other, for the progress bar.
WEIGHTS = {"spectrum": 0.5, "information": 0.8, "coupling": 0.1, "segments": 3.0, "independence": 6.0, "steps": 2.5}
STAGE_WEIGHT = sum(WEIGHTS.values())


@dataclass(frozen=True)
class Setting:
    """What all stages share; ``damping`` None is the default share of each stage's largest eigenvalue."""

    kind: str
    mc_samples: int
    memory: str | float
    damping: float | None
    num_null: int
    seed: int
    bars: bool | None


def analyse(
    store: Store,
    stage: str,
    F: Fisher,
    model: nn.Module,
    data: Any,
    setting: Setting,
    tick: Callable[[str, float], object],
) -> None:
    """Run every analysis of one stage; what fails is logged and leaves the others alone."""
    has_targets = data[1] is not None

    with store.task("spectrum", stage):
        store.put("spectrum", spectrum(F, by="layer"), stage)
    tick(f"{stage}: information", WEIGHTS["spectrum"])

    top = damping = float("nan")
    with store.task("largest eigenvalue", stage):
        top = _largest(store, stage, F, setting.seed)
        damping = setting.damping or DAMPING_SHARE * top
        loss = _loss(model, data, F) if has_targets else float("nan")
        store.put("fisher", _facts(F, top, damping, loss), stage)
    if not top > 0:
        reason = "F is not finite: the squares of its scores overflow, so it cannot be analysed."
        with suppress(NonFiniteError):
            if F.trace() == 0:
                reason = "F is zero: no output depends on any parameter here, so there is nothing to analyse."
        store.log("all further analyses", stage, "failed", reason)
        tick(stage, STAGE_WEIGHT - WEIGHTS["spectrum"])
        return

    with store.task("information", stage):
        store.put("information", information(F, "layer", damping=damping), stage)
        store.put("units", information(F, "unit", damping=damping), stage)
    tick(f"{stage}: couplings", WEIGHTS["information"])

    with store.task("coupling of layers", stage):
        store.put(
            "coupling",
            coupling(F, "layer", num_null=setting.num_null, seed=setting.seed, progress_bar=setting.bars),
            stage,
        )
    tick(f"{stage}: segments", WEIGHTS["coupling"])

    _segments(store, stage, F, setting, tick)

    with store.task("independence", stage):
        _require_targets(has_targets)
        judged = independence(F, segmentations(F, setting.seed), damping=damping, progress_bar=setting.bars)
        store.put("independence", judged, stage)
        if "interrupted" in judged.attrs:  # what was finished is kept; the report ends here all the same
            raise KeyboardInterrupt
    tick(f"{stage}: one step", WEIGHTS["independence"])

    with store.task("one-step check", stage):
        _require_targets(has_targets)
        dampings = {factor: factor * damping for factor in DAMPING_FACTORS}
        weight = WEIGHTS["steps"]
        blocks = segmentations(F, setting.seed)
        found = one_step(
            F, model, data, blocks, dampings=dampings, tick=lambda share: tick(f"{stage}: one step", share * weight)
        )
        store.put("one_step", found, stage)


def _require_targets(has_targets: bool) -> None:
    if not has_targets:
        raise InputError(
            "The gradient needs observed labels, but the data have targets=None. Give data=(inputs, targets) for this part."
        )


def _largest(store: Store, stage: str, F: Fisher, seed: int) -> float:
    """The largest eigenvalue: from the spectrum, or by power iteration where that did not fit."""
    found = store.get("spectrum", stage)
    if found is not None:
        return float(found.eigenvalue.sel(layer=WHOLE)[0])
    v = torch.randn(F.n_params, generator=torch.Generator().manual_seed(seed), device="cpu").to(F.device, F.dtype)
    for _ in range(50):
        v = F @ (v / torch.linalg.vector_norm(v).clamp(min=torch.finfo(F.dtype).tiny))
    return float(torch.linalg.vector_norm(v))


def _loss(model: nn.Module, data: Any, F: Fisher) -> float:
    """The mean loss, NaN for a likelihood whose loss is not known; the one-step check says so."""
    try:
        return mean_loss_at(model, data, F)
    except InputError:
        return float("nan")


def _facts(F: Fisher, top: float, damping: float, loss: float) -> xr.Dataset:
    gradient = float("nan") if loss != loss else F.gradient().double().norm().item()
    values = {
        "trace": (F.trace(), "trace of F", "nat"),
        "top_eigenvalue": (top, "largest eigenvalue of F", "nat"),
        "damping": (damping, "damping λ", "nat"),
        "loss": (loss, "mean loss on the examples of F", "nat"),
        "gradient_norm": (gradient, "length of the mean gradient", "nat"),
        "rank_bound": (F.rank_bound, "upper bound of the rank", "1"),
        "n_columns": (F.n_columns, "score columns per example", "1"),
        "n_rows": (F.n_rows, "rows of the score matrix", "1"),
    }
    variables = {
        name: ((), value, {"long_name": text, "units": units}) for name, (value, text, units) in values.items()
    }
    return make_dataset(variables, {}, operator=F, method="facts about the operator")


def _smaller(result: xr.Dataset) -> xr.Dataset:
    """In single precision: a layer of 257 segments has 66,049 pairs, and no more digits are needed of them."""
    return result.assign({name: found.astype("float32") for name, found in result.items() if found.dtype.kind == "f"})


def _segments(store: Store, stage: str, F: Fisher, setting: Setting, tick: Callable[[str, float], object]) -> None:
    """Couplings of CW-NGD's segments inside each layer that has neither one block nor too many."""
    names = F.layout.layer_names
    found: dict[str, xr.Dataset] = {}
    for name in names:
        part = F.restrict(name)
        blocks = make_partition(part, SEGMENTS)
        task = f"coupling of the segments of {name}"
        if not 2 <= blocks.num_blocks <= MOST_SEGMENTS:
            why = (
                "one block only" if blocks.num_blocks < 2 else f"{blocks.num_blocks} blocks, more than {MOST_SEGMENTS}"
            )
            store.log(task, stage, "left out", why)
        else:
            with store.task(task, stage):
                draws = min(setting.num_null, SEGMENT_NULL)
                found[name] = coupling(part, blocks, num_null=draws, seed=setting.seed, progress_bar=setting.bars)
                store.put(f"segments/{name.replace('/', '_')}", _smaller(found[name]), stage)
        tick(f"{stage}: segments of {name}", WEIGHTS["segments"] / len(names))
    if found:
        with store.task("relations of segments", stage):
            store.put("segment_relations", relations(found, F), stage)
    tick(f"{stage}: segmentations", 0.0)
