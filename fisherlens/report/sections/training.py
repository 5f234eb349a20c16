"""The section on training runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from fisherlens.report.elements import Section, heading, paragraph, table
from fisherlens.report.findings import PARTLY, SEGMENTS, speed, trained_order, verdict
from fisherlens.report.sections.view import View
from fisherlens.report.steps import GRADIENT
from fisherlens.report.words import count, listing, num, plain, seconds, share, times
from fisherlens.spectrum import WHOLE

if TYPE_CHECKING:
    import xarray as xr

_SGD = "sgd"


def training(view: View) -> Section:
    """The section on whole training runs; there is none for a network that was not trained."""
    section = Section("training", "Training", "Did training behave as the segmentation predicts?")
    if not view.trained:
        section.headline = (
            "The network was analysed as it stands and not trained, so there is no training to compare with."
        )
        return section
    curves = view.node("training")
    trained = trained_order(view.tree)
    if curves is None:
        section.headline = "No training run was finished."
        section.add(view.troubles("training"))
        return section
    rho = float("nan") if trained is None else view.number("training_correlation")
    section.headline = _headline(view, trained, rho)
    section.add(
        heading("The same optimizer on other blocks"),
        paragraph(_setup(view)),
        paragraph(_order(trained), _too_large(view)),
        view.picture(
            "segment-training",
            "**CW-NGD on the blocks of each segmentation.** Left: training loss. Right: the mean loss of each run (geometric, low is fast) over what the "
            "analysis said its blocks keep. The prediction holds where marks fall from left to right.",
        ),
        _segment_table(view, trained),
        heading("CW-NGD and SGD"),
        paragraph(_race(view, curves)),
        paragraph(_gradient_prediction(view, curves)),
        view.picture(
            "training",
            "**Training curves**, median over seeds with the range between them. Compare steps (left) with seconds (top right): a better step may cost more.",
        ),
        _race_table(view, curves),
        view.troubles("training"),
    )
    return section


def _headline(view: View, trained: tuple[list[str], np.ndarray, np.ndarray] | None, rho: float) -> str:
    if trained is None or not np.isfinite(rho):
        return "The order in which segmentations train could not be compared with the prediction."
    names, kept, loss = trained
    number = (
        f"rank correlation ρ = {num(rho, 2)} over {len(names)} segmentations, {_seeds(view.node('segment_training'))}"
    )
    if verdict(rho) == "held":
        text = f"**Yes: the more a segmentation keeps of the natural-gradient step, the faster CW-NGD trains on its blocks** ({number})."
    else:
        word = "In part" if verdict(rho) == "held in part" else "No"
        how = (
            "go together only in part"
            if rho >= PARTLY
            else "run against each other"
            if rho <= -PARTLY
            else "have little to do with each other"
        )
        text = f"**{word}: what segmentations keep and how fast CW-NGD trains on their blocks {how}** ({number})."
    best, expected = names[int(np.nanargmin(loss))], names[int(np.nanargmax(kept))]
    if best == expected:
        return f"{text} The predicted best, `{best}`, trained fastest."
    return f"{text} The fastest was `{best}`; `{expected}` was predicted."


def _setup(view: View) -> str:
    found = view.node("segment_training")
    if found is None:
        return ""
    settings = json.loads(found.attrs["settings"])
    options = next(iter(settings["optimizers"].values()))
    return (
        f"One optimizer, CW-NGD with learning rate {plain(options['lr'])} and damping {plain(options['damping'])}, is run on the blocks of every segmentation in turn: equal starts, "
        f"equal batches of {settings['batch_size']}, {count(settings['num_steps'])} steps, {_seeds(found)}. Only the blocks differ. The prediction is the decrease ratio from the section on "
        "segmentations, averaged over the stages of the analysed run; the options are those of the CW-NGD run below, fixed beforehand, and the same for all."
    )


def _seeds(found: xr.Dataset) -> str:
    seeds = found.seed.values.tolist()
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {listing([str(seed) for seed in seeds])}"


def _order(trained: tuple[list[str], np.ndarray, np.ndarray] | None) -> str:
    if trained is None:
        return ""
    names, kept, loss = trained
    expected = [names[place] for place in np.argsort(-kept)]
    measured = [names[place] for place in np.argsort(loss)]
    text = f"Predicted, fastest first: {listing([f'`{name}`' for name in expected])}. Measured: {listing([f'`{name}`' for name in measured])}."
    if expected == measured:
        return text + " The two orders are the same."
    moved = [name for name in names if expected.index(name) != measured.index(name)]
    return (
        f"{text} {count(len(moved))} of {len(names)} are in another place: {listing([f'`{name}`' for name in moved])}."
    )


def _too_large(view: View) -> str:
    """A remark on blocks that a batch cannot fill: their statistics differ from F by more than what was dropped."""
    found, judged = view.node("segment_training"), view.node("independence")
    if found is None or judged is None:
        return ""
    batch = json.loads(found.attrs["settings"])["batch_size"]
    sizes = judged.largest_block.isel(stage=0).sel(layer=WHOLE)
    large = [
        str(name)
        for name in found.optimizer.values
        if name in sizes.partition.values and float(sizes.sel(partition=name)) > batch
    ]
    if not large:
        return ""
    return (
        f"{listing([f'`{name}`' for name in large])} {'has' if len(large) == 1 else 'have'} blocks of more parameters than the {batch} examples of a batch, so that the "
        "optimizer's matrices are of low rank in the first steps; the prediction, made with F, does not know of that."
    )


def _segment_table(view: View, trained: tuple[list[str], np.ndarray, np.ndarray] | None) -> str:
    found = view.node("segment_training")
    if found is None or trained is None:
        return ""
    names, kept, loss = trained
    last = found.isel(step=-1)
    rows = []
    for place in np.argsort(-kept):
        one = last.sel(optimizer=names[place])
        row = [
            f"`{names[place]}`",
            num(kept[place]),
            num(loss[place]),
            num(float(one.train_loss.median())),
            share(float(one.test_accuracy.median())),
        ]
        taken = float(one.seconds.median()) / max(int(one.steps_taken.median()), 1)
        rows.append([*row, num(1000 * taken, 2), _ending(found.sel(optimizer=names[place]))])
    head = [
        "Blocks",
        "predicted:\nmean decrease ratio",
        "measured: mean\ntraining loss [nat]",
        "final training\nloss [nat]",
        "test\naccuracy",
        "ms per\nstep",
        "ended",
    ]
    marked = [place for place, row in enumerate(rows) if row[0] == f"`{SEGMENTS}`"]
    return table(
        head,
        rows,
        "CW-NGD on the blocks of each segmentation, in the predicted order. The mean loss is geometric, over the records of the run.",
        strong=marked,
    )


def _ending(runs: xr.Dataset) -> str:
    bad = int(runs.diverged.sum())
    cut = int(runs.interrupted.sum())
    return f"{bad} diverged" if bad else f"{cut} interrupted" if cut else "as planned"


def _race(view: View, curves: xr.Dataset) -> str:
    names = [str(name) for name in curves.optimizer.values]
    if SEGMENTS not in names or _SGD not in names:
        return f"{listing([f'`{name}`' for name in names])} were trained from equal starts on equal batches, {_seeds(curves)}."
    own, other = (curves.sel(optimizer=name).median("seed") for name in (SEGMENTS, _SGD))
    end = float(other.train_loss.isel(step=-1))
    text = (
        f"After {count(float(curves.step[-1]))} steps the training loss is {num(float(own.train_loss.isel(step=-1)))} nat with CW-NGD and {num(end)} nat with SGD (medians over "
        f"{_seeds(curves)}). "
    )
    reached = _first_below(own, end)
    if reached is None:
        slower = _first_below(other, float(own.train_loss.isel(step=-1)))
        if slower is not None:
            text += (
                f"SGD was at CW-NGD's final loss after {count(slower[0])} steps, so CW-NGD was the slower one here. "
            )
    else:
        cost = float(other.seconds.isel(step=-1))
        text += f"CW-NGD was at SGD's final loss after {count(reached[0])} steps instead of {count(float(curves.step[-1]))}; in time, after {seconds(reached[1])} against {seconds(cost)}. "
    ratio = float(own.seconds.isel(step=-1) / other.seconds.isel(step=-1))
    text += f"A step of CW-NGD took {times(ratio)} as long as one of SGD. "
    return text


def _first_below(curve: xr.Dataset, level: float) -> tuple[float, float] | None:
    """Step and seconds of the first record at or below a level."""
    hits = np.flatnonzero(curve.train_loss.values <= level)
    return None if not len(hits) else (float(curve.step[hits[0]]), float(curve.seconds[hits[0]]))


def _gradient_prediction(view: View, curves: xr.Dataset) -> str:
    """Whether CW-NGD's lead over SGD is in line with what their directions promise."""
    checks, found = view.node("one_step"), speed(curves)
    if checks is None or not {SEGMENTS, _SGD} <= set(curves.optimizer.values.tolist()):
        return ""
    part = checks.sel(damping_factor=1.0)
    ratio = (part.predicted_ratio.sel(direction=SEGMENTS) / part.predicted_ratio.sel(direction=GRADIENT)).values
    measured = (part.measured_decrease.sel(direction=SEGMENTS) / part.measured_decrease.sel(direction=GRADIENT)).values
    listed = listing(
        [f"{num(value, 2)} times {view.when(stage)}" for value, stage in zip(ratio, view.known(checks), strict=True)]
    )
    one_step = listing([num(value, 2) for value in measured])
    ahead = float(found.sel(optimizer=SEGMENTS)) < float(found.sel(optimizer=_SGD))
    expected = float(np.nanmean(np.log(np.maximum(ratio, 1e-12)))) > 0
    agree = "as predicted" if ahead == expected else "against the prediction"
    return (
        f"The quadratic model says that a step along CW-NGD's direction decreases the loss {listed} as much as one along the gradient; measured with one step it was {one_step} times. Over the "
        f"whole run {'CW-NGD' if ahead else 'SGD'} was ahead, {agree}. This compares directions at their best lengths; the optimizers also average, and their learning rates are fixed."
    )


def _race_table(view: View, curves: xr.Dataset) -> str:
    settings = json.loads(curves.attrs["settings"])["optimizers"]
    last = curves.isel(step=-1)
    rows = []
    for name in [str(entry) for entry in curves.optimizer.values]:
        one = last.sel(optimizer=name)
        known = settings.get(name, {})
        shown = ", ".join(f"{key} {plain(known[key])}" for key in ("lr", "momentum", "damping") if known.get(key))
        row = [
            f"`{name}`",
            shown,
            num(float(one.train_loss.median())),
            num(float(one.test_loss.median())),
            share(float(one.test_accuracy.median())),
        ]
        taken = float(one.seconds.median())
        rows.append(
            [
                *row,
                seconds(taken),
                num(1000 * taken / max(int(one.steps_taken.median()), 1), 2),
                _ending(curves.sel(optimizer=name)),
            ]
        )
    head = [
        "Optimizer",
        "options",
        "training loss\n[nat]",
        "test loss\n[nat]",
        "test\naccuracy",
        "training\ntime",
        "ms per\nstep",
        "ended",
    ]
    caption = f"After {count(float(curves.step[-1]))} steps of {json.loads(curves.attrs['settings'])['batch_size']} examples; medians over {_seeds(curves)}. Time excludes evaluation."
    return table(head, rows, caption, words=2)
