"""How the report was made, and the words it uses."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from fisherlens.errors import readable_bytes
from fisherlens.report.elements import Section, bullets, heading, paragraph, table, terms
from fisherlens.report.sections.view import View
from fisherlens.report.words import count, listing, num, seconds, times
from fisherlens.spectrum import WHOLE

if TYPE_CHECKING:
    import xarray as xr

_WORDS = (
    (
        "Score",
        "the gradient of log p(y | x, θ) with respect to the parameters: one long vector per example and possible label.",
    ),
    (
        "Fisher information F",
        "the mean outer product of the scores, with the expectation over labels taken under the model, in closed form for the exact kind. ½ δᵀFδ is how many nat the "
        "predictions change when the parameters move by δ.",
    ),
    ("nat", "the unit of information with natural logarithms; 1 nat is 1.44 bit."),
    (
        "Natural gradient",
        "(F + λI)⁻¹ g: the gradient g seen in the metric of the predictions, so that every direction is stepped along by how much it changes them.",
    ),
    (
        "Damping λ",
        "what is added to every eigenvalue of F: directions that tell less than λ are treated as if they told λ.",
    ),
    (
        "Effective dimension",
        "tr F(F + λI)⁻¹: a direction counts 1 where its eigenvalue is far above λ, and 0 far below.",
    ),
    (
        "Segmentation",
        "a partition of the parameters into blocks. Block-diagonal methods drop all of F outside the blocks; what is dropped is what this page measures.",
    ),
    (
        "Coupling",
        "‖F_ij‖ / √(‖F_ii‖ ‖F_jj‖) of two blocks, in [0, 1]. Its square is the linear centred-kernel alignment (uncentred) of their tangent kernels.",
    ),
    (
        "Noise floor of a coupling",
        "√(tr F_ii tr F_jj / (N R ‖F_ii‖ ‖F_jj‖)): the coupling that a sample of N examples with R score columns gives to two uncorrelated blocks.",
    ),
    (
        "Adjusted p",
        "the share of permutations in which any pair stands out as much as this one does: it accounts for looking at all pairs at once.",
    ),
    ("Energy", "the share of ‖F‖², the sum of all squared entries, that lies inside the blocks."),
    (
        "Rank correlation ρ",
        "Spearman's: 1 if two lists are in the same order, −1 in the opposite one, around 0 if they have nothing to do with each other. With few entries it is coarse.",
    ),
)


def words_used() -> Section:
    """The section that explains the terms."""
    section = Section("words", "Words used here", "What do the terms mean?")
    section.add(terms(list(_WORDS)))
    return section


def made(view: View) -> Section:
    """The section on versions, seeds, sizes, plan, command and time."""
    section = Section("made", "How this was made", "With what, from what, and how can it be made again?")
    facts = view.facts
    rows = [
        ["What", f"{facts['description']}"],
        ["Examples of F", _examples(view)],
        ["Parameters P", count(facts.get("n_params", np.nan))],
        [
            "Kind and likelihood",
            f"{facts['kind']}, {facts['likelihood']}, {facts.get('n_columns', '–')} score columns per example",
        ],
        ["Damping λ", _damping(view)],
        [
            "Run that was analysed",
            str(facts.get("analysed_run", "none: the network as it was given, in evaluation mode")),
        ],
        ["Stages", _stages(view)],
        [
            "Seed",
            f"{facts['seed']}: initial weights, order of batches, choice of examples, sampled labels, permutations, shuffled blocks",
        ],
        ["Permutations", f"{facts['num_null']} for layers, at most 99 for segments"],
        ["Precision", f"scores in {facts.get('dtype', '–')} on {facts['device']}; decompositions and sums in float64"],
        [
            "Versions",
            f"fisherlens {facts['fisherlens_version']}, torch {facts['torch_version']}, Python {facts['python_version']}",
        ],
        ["Machine", str(facts["platform"])],
        ["Made", f"{facts['created_at']}, in {seconds(float(facts['wall_seconds']))} before drawing"],
    ]
    section.add(
        table(["", ""], [[name, value] for name, value in rows], "Facts about this report.", words=2),
        heading("Make it again"),
        paragraph(f"`{facts['command']}`", kind="command"),
        heading("Use the numbers"),
        paragraph("Everything on this page is in one file next to it:"),
        '<pre>import fisherlens as fl\n\ntree = fl.load("report.nc")\ntree["spectrum"].eigenvalue         # stage, layer, rank\n'
        'fl.plot.coupling(tree["coupling"].to_dataset().isel(stage=-1))</pre>',
        paragraph(f"Its parts are {listing([f'`{name}`' for name in view.tree.children])}."),
        _plan(view),
        _times(view),
    )
    notes = [words for words, kind in view.entries("") if kind != "caveat"]
    section.add(heading("What is missing, and why") if notes else "", bullets(notes) if notes else "")
    return section


def _examples(view: View) -> str:
    n, total = view.facts.get("n_data"), view.facts.get("n_total")
    if n is None:
        return "–"
    if n == total:
        return f"all {count(n)}"
    how = (
        "drawn at random from the training set"
        if view.trained
        else "drawn at random from tensors, or the first ones of batches"
    )
    return f"N = {count(n)} of {count(total)}, {how}"


def _damping(view: View) -> str:
    found, spectrum = view.node("fisher"), view.node("spectrum")
    if found is None:
        return str(view.facts["damping_rule"])
    values = [f"{num(float(found.damping.sel(stage=stage)))} {view.when(stage)}" for stage in view.stages]
    text = f"{listing(values)} ({view.facts['damping_rule']})"
    last = view.known(spectrum)[-1:]
    if not last:
        return text
    damping, one = float(found.damping.sel(stage=last[0])), spectrum.sel(stage=last[0], layer=WHOLE)
    if not (damping > 0 and float(one.noise_floor) > 0):
        return text
    below, above = float(one.eigenvalue[0]) / damping, damping / float(one.noise_floor)
    return (
        f"{text}. {view.when(last[0]).capitalize()} that is {times(below)} below the largest eigenvalue, so that F decides the leading directions, and "
        f"{times(above)} the noise floor of the eigenvalues"
        + (", so that rounding does not decide the others." if above > 1 else ".")
    )


def _stages(view: View) -> str:
    found = view.node("fisher")
    if found is None or "step" not in found.coords:
        return listing(view.stages) if view.stages else "none"
    return listing([f"{stage} (step {count(float(found.step.sel(stage=stage)))})" for stage in view.stages])


def _plan(view: View) -> str:
    text = view.facts.get("plan")
    if not text:
        return ""
    plan = json.loads(text)
    layers = plan["layers"]
    work = max(sum(float(layer["gradient_flops"]) for layer in layers), 1.0)
    rows = [
        [
            f"`{layer['layer']}`",
            layer["type_name"],
            layer["path"],
            layer["reason"],
            readable_bytes(layer["nbytes"]),
            num(layer["product_flops"] / work, 2),
        ]
        for layer in layers
    ]
    caption = (
        "How each layer's scores are kept, chosen by cost under the memory budget. The last column is the cost of one product with F in evaluations of the gradient, by "
        "floating-point operations."
    )
    return heading("Plan") + table(
        ["Layer", "type", "path", "because", "memory", "product over\ngradient"], rows, caption, words=4
    )


def _times(view: View) -> str:
    log = view.node("log")
    if log is None:
        return ""
    spent: dict[str, float] = {}
    for task, took in zip(log.task.values, log.seconds.values, strict=True):
        name = "coupling of segments" if str(task).startswith("coupling of the segments") else str(task)
        spent[name] = spent.get(name, 0.0) + float(took)
    ordered = sorted(((name, took) for name, took in spent.items() if took >= 0.05), key=lambda entry: -entry[1])
    rows = [[name, seconds(took)] for name, took in ordered]
    return (
        heading("Time") + table(["Task", "all stages"], rows, "Where the time went, drawing excluded.") if rows else ""
    )


def finished(log: xr.Dataset | None) -> int:
    """How many tasks of a report ended well."""
    return 0 if log is None else int((log.outcome.values == "done").sum())
