"""The section on what each segmentation keeps of the natural gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fisherlens.errors import readable_bytes
from fisherlens.report.blocks import SEGMENTS
from fisherlens.report.elements import Section, bullets, heading, paragraph, table
from fisherlens.report.sections.view import View
from fisherlens.report.words import count, fixed, listing, num, share
from fisherlens.spectrum import WHOLE

if TYPE_CHECKING:
    import xarray as xr

MEANING = {
    "layer": "one block per layer: only couplings between layers are dropped",
    "unit": "one block per output unit or channel, with its incoming weights and its bias",
    SEGMENTS: "one block per kernel, per source channel of a unit, and per layer's biases, as CW-NGD cuts them",
    "mbf": "one block per kernel, and per input of a dense layer, as MBF cuts them",
    "shifted": "a control: runs of CW-NGD's block sizes in the same layers, moved on by half a block, so that the borders are wrong",
    "shuffled": "a control: blocks of CW-NGD's sizes in the same layers, filled at random",
    "diagonal": "every parameter alone",
}
_CLOSE = 0.02  # difference in a share that is called none
_SLIGHT = 0.005  # the same for energies


def segmentations(view: View) -> Section:
    """The section on what is lost if the blocks of a segmentation are treated as independent."""
    section = Section("segmentations", "Segmentations", "What does each segmentation keep of the natural gradient?")
    found = view.node("independence")
    if found is None:
        section.headline = "The comparison of segmentations is not available here."
        section.add(view.troubles("independence"))
        return section
    last = view.known(found)[-1]
    one = found.sel(stage=last, layer=WHOLE)
    names = [str(name) for name in one.partition.values]
    kept = {name: float(one.decrease_ratio.sel(partition=name)) for name in names}
    alone = _alone(one, int(view.facts["n_params"]))
    section.headline = _headline(view, kept, last, compare=not alone)
    section.add(
        bullets([f"`{name}`: {MEANING[name]}." for name in names if name in MEANING]),
        paragraph(
            "The main measure is the **decrease ratio**: take one natural-gradient step with the blocks of a segmentation, at its best length, and ask "
            "how much of the decrease of the exact step it achieves in the quadratic model of the loss. 1 is the exact natural gradient.",
            f"The damping is λ = {num(float(found.damping.sel(stage=last)))} ({view.facts['damping_rule']}).",
        ),
        view.picture(
            "segmentations",
            "**What each segmentation keeps, whole network.** Energy is the share of ‖F‖² inside the blocks; the black marks are what random blocks of "
            "the same sizes would hold. Cosine compares directions, the decrease ratio progress; a condition number near 1 means that the blocks leave "
            "nothing to correct.",
        ),
        _table(view, found.sel(layer=WHOLE)),
        heading("What the numbers say"),
        bullets(
            [
                _energy(view, one, names, last),
                *([alone] if alone else [_contents(kept), _borders(kept)]),
                _coarse(kept),
                _course(view, found, names),
            ]
        ),
        view.picture(
            "segmentations-layers",
            "**Decrease ratio by layer**: each layer's own block of F, its own gradient. Where a segmentation is near 1 in every layer but lower for the whole "
            "network, the loss comes from couplings between layers.",
        ),
        _layer_table(view, found.sel(stage=last), last),
        view.troubles("independence"),
    )
    return section


def _headline(view: View, kept: dict[str, float], last: str, *, compare: bool) -> str:
    if SEGMENTS not in kept or not np.isfinite(kept[SEGMENTS]):
        return "The segmentations could be judged only in part; see the table."
    text = f"CW-NGD's segments keep **{share(kept[SEGMENTS])}** of the decrease of a natural-gradient step {view.when(last)}"
    rest = [
        f"{share(kept[name])} for {words}"
        for name, words in (("layer", "whole layers"), ("unit", "units"), ("diagonal", "single parameters"))
        if name in kept
    ]
    text += f"; it is {listing(rest)}." if rest else "."
    control = kept.get("shuffled", np.nan)
    if np.isfinite(control) and compare:
        gain = kept[SEGMENTS] - control
        text += f" Random blocks of the same sizes keep {share(control)}" + (
            ", so what is inside the segments matters."
            if gain > _CLOSE
            else ", about as much."
            if gain > -_CLOSE
            else ", even more."
        )
    return text


def _energy(view: View, one: xr.Dataset, names: list[str], last: str) -> str:
    held = {name: float(one.energy_captured.sel(partition=name)) for name in names}
    chance = {name: float(one.energy_noise_floor.sel(partition=name)) for name in names}
    known = [name for name in names if np.isfinite(held[name]) and np.isfinite(chance[name])]
    if not known:
        return ""
    best = max(known, key=lambda name: held[name] - chance[name])
    if held[best] - chance[best] > _SLIGHT:
        text = (
            f"**Energy.** Furthest above chance {view.when(last)} are `{best}` blocks: they hold {share(held[best])} of ‖F‖², against "
            f"{share(chance[best])} for random blocks of the same sizes."
        )
    else:
        text = f"**Energy.** No segmentation holds more of ‖F‖² than random blocks of the same sizes {view.when(last)}."
    below = [name for name in known if held[name] < chance[name] - _SLIGHT]
    if not below:
        return text
    text += f" Below chance: {listing([f'`{name}` ({share(held[name])} against {share(chance[name])})' for name in below])}."
    if len(view.node("independence").layer) > 2:
        text += (
            " Random blocks mix layers, so they catch couplings between layers that these drop; energy alone does not say which blocks "
            "make a good step."
        )
    return text


def _alone(one: xr.Dataset, params: int) -> str:
    """A remark where the rule of CW-NGD leaves most parameters alone, so that its controls cannot differ from it."""
    blocks = int(one.num_blocks.sel(partition=SEGMENTS)) if SEGMENTS in one.partition.values else 0
    if blocks <= params / 2:
        return ""
    return (
        f"**CW-NGD's rule leaves most parameters alone here**: it cuts {count(params)} of them into {count(blocks)} blocks, because it takes dense "
        "weights with more than 16 plain inputs one by one. It is close to `diagonal`, and its controls hardly differ from it."
    )


def _contents(kept: dict[str, float]) -> str:
    if (
        not {SEGMENTS, "shuffled", "diagonal"} <= kept.keys()
        or not np.isfinite([kept[SEGMENTS], kept["shuffled"], kept["diagonal"]]).all()
    ):
        return ""
    own, random, single = kept[SEGMENTS], kept["shuffled"], kept["diagonal"]
    text = f"**Contents.** Over single parameters ({share(single)}), random blocks of CW-NGD's sizes gain {_points(random - single)} and its own segments {_points(own - single)}. "
    if own - random > _CLOSE:
        return text + "Parameters of one segment belong together; it is not the block size alone."
    if own - random > -_CLOSE:
        return text + "The segments do no better than their size: their contents could be exchanged at random."
    return text + "The segments do worse than random blocks of their size."


def _points(gain: float) -> str:
    """A difference of two shares."""
    return f"{100 * gain:.1f} points".replace("-", "−")


def _borders(kept: dict[str, float]) -> str:
    if not {SEGMENTS, "shifted"} <= kept.keys() or not np.isfinite([kept[SEGMENTS], kept["shifted"]]).all():
        return ""
    own, moved = kept[SEGMENTS], kept["shifted"]
    text = f"**Borders.** Runs of the same sizes whose borders are off by half a block keep {share(moved)}, against {share(own)}. "
    if own - moved > _CLOSE:
        return text + "Cutting at the borders of kernels and channels pays."
    if own - moved > -_CLOSE:
        return text + "Where exactly the cuts are hardly matters, as long as neighbours stay together."
    return text + "Cutting at the borders of kernels and channels is worse than cutting across them."


def _coarse(kept: dict[str, float]) -> str:
    good = {name: value for name, value in kept.items() if np.isfinite(value) and name not in ("shifted", "shuffled")}
    if len(good) < 3:
        return ""
    order = sorted(good, key=lambda name: -good[name])
    return f"**Order.** From most to least kept: {listing([f'`{name}` ({share(good[name])})' for name in order])}."


def _course(view: View, found: xr.Dataset, names: list[str]) -> str:
    known = view.known(found)
    if len(known) < 2:
        return ""
    first, last = (found.decrease_ratio.sel(stage=stage, layer=WHOLE) for stage in (known[0], known[-1]))
    moved = (last - first).values
    if not np.isfinite(moved).any():
        return ""
    rising = int((moved > _CLOSE).sum())
    most = int(np.nanargmax(abs(moved)))
    return (
        f"**Along the run.** {count(rising) if rising else 'None'} of {len(names)} segmentations keep more {view.when(known[-1])} than {view.when(known[0])}; "
        f"the largest change is that of `{names[most]}`, from {share(float(first[most]))} to {share(float(last[most]))}."
    )


def _table(view: View, whole: xr.Dataset) -> str:
    known = view.known(whole)
    head = ["Segmentation", "blocks", "largest", "memory", *(view.head("decrease", stage) for stage in known)]
    last = known[-1]
    head += ["cosine", "energy", "random\nblocks", "condition\nnumber", "KL\n[nat]"]
    rows = []
    for name in [str(entry) for entry in whole.partition.values]:
        one = whole.sel(partition=name)
        end = one.sel(stage=last)
        row = [
            f"`{name}`",
            count(float(end.num_blocks)),
            count(float(end.largest_block)),
            readable_bytes(float(end.storage_bytes)) if np.isfinite(end.storage_bytes) else "–",
        ]
        row += [fixed(one.decrease_ratio.sel(stage=stage), 3) for stage in known]
        row += [fixed(end[key], 3) for key in ("natural_gradient_cosine", "energy_captured", "energy_noise_floor")]
        row += [num(float(end[key])) for key in ("condition_number", "kl_divergence")]
        rows.append(row)
    marked = [place for place, name in enumerate(whole.partition.values) if name == SEGMENTS]
    caption = (
        f"The whole network{'' if len(known) < 2 else '; the last five columns ' + view.when(last)}. “Decrease” is the decrease ratio, “random blocks” the energy expected of random blocks of the same sizes. KL is the total correlation between blocks: the divergence, in nat, of the block-wise Gaussian with covariance (F_b + λ)⁻¹ "
        "from the exact one."
    )
    return table(head, rows, caption, strong=marked)


def _layer_table(view: View, one: xr.Dataset, stage: str) -> str:
    layers = [str(name) for name in one.layer.values if name != WHOLE]
    if len(layers) < 2:
        return ""
    head = ["Segmentation", *(f"{layer}" for layer in layers), "whole network"]
    rows = [
        [f"`{name}`", *(fixed(one.decrease_ratio.sel(partition=name, layer=layer), 3) for layer in (*layers, WHOLE))]
        for name in [str(entry) for entry in one.partition.values]
    ]
    marked = [place for place, name in enumerate(one.partition.values) if name == SEGMENTS]
    return table(head, rows, f"Decrease ratio by layer{view.at(stage)}.", strong=marked)
