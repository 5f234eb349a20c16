"""The measurements: networks, their training, and one file of results per network, seed and stage."""

from __future__ import annotations

import copy
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import h5netcdf
import numpy as np
import torch
import xarray as xr
from cuts import RULES, all_cuts, single_share
from pairs import coupling_by_relation
from torch import nn

import fisherlens as fl
from fisherlens.training import networks as ready

STAGES = ("init", "epoch", "end")
KEPT = (
    "energy_captured",
    "energy_noise_floor",
    "decrease_ratio",
    "natural_gradient_cosine",
    "kl_divergence",
    "condition_number",
    "num_blocks",
    "largest_block",
)
OWN_DAMPING, SCALED_DAMPING = "1e-7", "0.01 λ_max"
STAND_INS = ("layer", "cw-ngd", "mbf", "mbf, shared", "KFAC", "EKFAC", "diagonal")


@dataclass(frozen=True)
class Plan:
    """What is measured on one network; ``seconds`` is what a run took per seed on one core, for the forecast only."""

    title: str
    problem: str
    examples: int  # of the exact Fisher
    batch: int  # of training, and of the empirical Fisher that one step sees
    averaged: int  # examples of the empirical Fisher that stands for the running average
    epochs: int
    seconds: float
    lr: float = 1e-3
    damping: float = 1e-7
    draws: int = 3
    double: bool = False
    light: bool = False
    width: float = 1.0
    train: int | None = None
    version: str | None = None


NETWORKS = {
    "digits-cnn": Plan("CNN on digits", "digits-cnn", 128, 256, 1280, 20, 150, double=True),
    "digits-cnn-half": Plan(
        "the same, half as wide", "digits-cnn", 128, 256, 1280, 20, 15, double=True, light=True, width=0.5
    ),
    "digits-cnn-double": Plan(
        "the same, twice as wide", "digits-cnn", 128, 256, 1280, 20, 150, double=True, light=True, width=2.0
    ),
    "fashion-mlp": Plan("MLP on Fashion-MNIST", "fashion-mlp", 128, 1024, 2048, 10, 340, train=12000, double=True),
    "fashion-lenet": Plan(
        "LeNet-5 on Fashion-MNIST", "fashion-cnn", 128, 1024, 2048, 10, 400, train=12000, double=True
    ),
    "cifar-vgg": Plan(
        "VGG-like on CIFAR-10", "cifar-vgg", 32, 128, 256, 2, 900, draws=2, double=True, version="lossless-4000"
    ),
}


def smoke(plan: Plan) -> Plan:
    """Something tiny in every respect, for a look at whether all runs."""
    tiny = {"examples": 6, "batch": 24, "averaged": 48, "train": 120, "epochs": 1, "draws": 2}
    return replace(plan, **tiny, width=plan.width / 4)


def digits_cnn(width: float) -> nn.Module:
    """The network of ``digits-cnn`` with its channels and hidden units scaled."""
    first, second, hidden = (max(2, round(width * n)) for n in (8, 16, 16))
    model = ready.digits_cnn()
    model.conv1 = nn.Conv2d(1, first, 3, padding=1)
    model.conv2 = nn.Conv2d(first, second, 3, padding=1)
    model.hidden, model.output = nn.Linear(second * 16, hidden), nn.Linear(hidden, 10)
    return model


def build(name: str, plan: Plan, data_dir: str | None) -> fl.Problem:
    """The problem of a network: ready ones as they are, LeNet-5 on the data of ``fashion-cnn``, and digits-cnn at its width."""
    options = {"num_train": plan.train, "version": plan.version}
    problem = fl.problem(plan.problem, data_dir=data_dir, **{k: v for k, v in options.items() if v is not None})
    factory = problem.factory
    if plan.problem == "digits-cnn" and plan.width != 1:
        factory = partial(digits_cnn, plan.width)
    if name == "fashion-lenet":
        factory = ready.mnist_lenet
    return fl.Problem(name, problem.description, factory, problem.train, problem.test, problem.likelihood)


def snapshots(problem: fl.Problem, plan: Plan, seed: int) -> dict[str, tuple[nn.Module, dict[str, float]]]:
    """Stage -> (network, facts) along one training with CW-NGD itself."""
    epoch = -(-len(problem.train[0]) // plan.batch)
    steps = {"init": 0, "epoch": epoch, "end": epoch * plan.epochs}
    model, kept = problem.model(seed), {}

    def keep(step: int, model: nn.Module, _: object) -> None:
        for stage, wanted in steps.items():
            if step == wanted:
                kept[stage] = copy.deepcopy(model)

    make = partial(fl.optim.CWNGD, lr=plan.lr, damping=plan.damping)
    record = fl.train(
        model, problem, make, num_steps=steps["end"], batch_size=plan.batch, seed=seed, callbacks=[keep],
        record_every=epoch, progress=False,
    ).isel(optimizer=0, seed=0)  # fmt: skip
    if len(kept) < len(steps):
        raise fl.InputError(f"{problem.name}, seed {seed}: training stopped early ({record.ended_by.item()}).")
    names = ("train_loss", "test_loss", "test_accuracy")
    return {
        stage: (kept[stage], {n: float(record[n].sel(step=steps[stage])) for n in names} | {"step": steps[stage]})
        for stage in STAGES
    }


def _fisher(model: nn.Module, problem: fl.Problem, plan: Plan, kind: str, count: int) -> fl.Fisher:
    x, y = problem.train
    chosen = torch.from_numpy(np.random.default_rng([7, len(x)]).permutation(len(x))[:count])
    dtype = torch.float64 if plan.double else torch.float32
    model = copy.deepcopy(model).to(dtype)
    data = (x[chosen].to(dtype), y[chosen])
    return fl.Fisher(model, data, likelihood=problem.likelihood, kind=kind, memory="2GiB", progress=False)


def _dampings(F: fl.Fisher) -> dict[str, float]:
    top = float(fl.top_eigenvalues(F, 1, tol=1e-3, progress=False)["eigenvalue"].values.ravel()[0])
    return {OWN_DAMPING: 1e-7, SCALED_DAMPING: 0.01 * top}


def _judged(F: fl.Fisher, draws: int, *, full: bool) -> xr.Dataset:
    cuts, dampings = all_cuts(F, draws, full=full), _dampings(F)
    found = fl.independence(F, list(cuts.values()), damping=list(dampings.values()), tol=0.05, progress_bar=False)
    found = found[list(KEPT)].rename(partition="cut").drop_vars("damping")
    found = found.assign_coords(cut=list(cuts), damping=list(dampings))
    found["damping_value"] = "damping", list(dampings.values())
    found["single_share"] = (
        ("rule", "layer_only"),
        [[single_share(F, rule, layer) for layer in F.layout.layer_names] for rule in RULES],
    )
    found = found.assign_coords(rule=list(RULES), layer_only=list(F.layout.layer_names))
    found.attrs = {"n_data": F.n_data, "n_params": F.n_params, "kind": F.kind}
    return found


def _stand_ins(F: fl.Fisher) -> xr.Dataset:
    """Structured approximations side by side at the scaled damping."""
    made = dict.fromkeys(STAND_INS)
    for name in made:
        made[name] = {"KFAC": fl.KFAC, "EKFAC": fl.EKFAC}.get(name, name)
    made["mbf, shared"] = lambda operator: fl.BlockDiagonal(operator, "mbf", shared=True)
    value = _dampings(F)[SCALED_DAMPING]
    found = fl.compare_approximations(F, made, damping=value, tol=0.05, progress_bar=False)
    names = ["relative_error", "dropped_coupling", "within_block_error", "decrease_ratio", "kl_divergence"]
    found = found[names].sel(layer="all").drop_vars("layer")
    found.attrs = {}
    return found


def measure(model: nn.Module, problem: fl.Problem, plan: Plan, seed: int) -> dict[str, xr.Dataset]:
    """All results of one network at one stage, by kind of Fisher."""
    with warnings.catch_warnings():  # what is left out, for want of room, is NaN in the result and counted on the page
        warnings.simplefilter("ignore", fl.NumericalWarning)
        warnings.simplefilter("ignore", fl.ConvergenceWarning)
        exact = _fisher(model, problem, plan, "exact", plan.examples)
        found = {
            "exact": _judged(exact, plan.draws, full=not plan.light),
            "coupling": coupling_by_relation(exact, seed),
        }
        if not plan.light:
            found["stand_ins"] = _stand_ins(exact)
            del exact
            for kind, count in (("batch", plan.batch), ("averaged", plan.averaged)):
                F = _fisher(model, problem, plan, "empirical", count)
                found[kind] = _judged(F, plan.draws, full=False)
    return found


def settings_of(plan: Plan) -> str:
    """What a file of results depends on, in one line; the forecast is not among it."""
    return json.dumps({**asdict(plan), "seconds": None}, sort_keys=True)


def file_of(folder: Path, name: str, seed: int, stage: str) -> Path:
    """Where the results of one network, seed and stage lie."""
    return folder / f"{name}-{seed}-{stage}.nc"


def is_there(path: Path, plan: Plan) -> bool:
    """Whether a file holds results made with these settings; one that does not is measured again.

    Only the settings are read here; that every byte is as it was written is checked when the page is made.
    """
    if not path.exists():
        return False
    with h5netcdf.File(path) as file:
        return file.attrs["plan"] == settings_of(plan)


def run(
    plans: dict[str, Plan], seeds: int, stages: Sequence[str], folder: Path, data_dir: str | None, say: Callable
) -> None:
    """Measure what is not there yet; each file is whole or absent, so that an interrupted run goes on where it was."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, seed, missing in _open(plans, seeds, stages, folder):
        plan, start = plans[name], time.perf_counter()
        problem = build(name, plan, data_dir)
        trained = snapshots(problem, plan, seed)
        say(f"{name}, seed {seed}: trained in {time.perf_counter() - start:.0f} s")
        for stage in missing:
            start = time.perf_counter()
            model, facts = trained[stage]
            tree = xr.DataTree.from_dict(dict(measure(model, problem, plan, seed)))
            tree.attrs = {"plan": settings_of(plan), "network": name, "seed": seed, "stage": stage, **facts}
            tree.attrs |= {"num_train": len(problem.train[0]), "description": problem.description}
            fl.save(tree, file_of(folder, name, seed, stage))
            say(f"{name}, seed {seed}, {stage}: {time.perf_counter() - start:.0f} s")


def _open(
    plans: dict[str, Plan], seeds: int, stages: Sequence[str], folder: Path
) -> Iterator[tuple[str, int, list[str]]]:
    for name, plan in plans.items():
        for seed in range(seeds):
            missing = [stage for stage in stages if not is_there(file_of(folder, name, seed, stage), plan)]
            if missing:
                yield name, seed, missing
