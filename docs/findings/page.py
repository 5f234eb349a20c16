"""The page, written from the files of results alone: no number in it is typed by hand."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import claims
import figures
from claims import HEAD, Claim
from cuts import CONTIGUOUS, LARGEST, NEIGHBOURS, RANDOM, SCATTERED, SHIFTED
from gather import Network, load, number
from study import NETWORKS

TABLE = [
    "layer", "unit", CONTIGUOUS.format("unit"), RANDOM.format("unit"), "input", CONTIGUOUS.format("input"),
    RANDOM.format("input"), "cw-ngd", SHIFTED, RANDOM.format("cw-ngd"), NEIGHBOURS, SCATTERED, "cw-ngd 2022",
    "mbf", "mbf A", "diagonal",
]  # fmt: skip
INTRO = """# Are the segments of CW-NGD and MBF independent?

CW-NGD (arXiv 2210.05268) and MBF (arXiv 2202.04124) cut the parameters into small segments, a convolution kernel (one output and one input
channel) or a piece of a dense unit, and invert the Fisher of each as if it were independent of all others. This page asks where that is
justified, and sets every rule against **other blocks of the same sizes**: a larger block keeps more of any matrix, so that only blocks of equal
size say something about *which* parameters belong together.

This page is written by `docs/findings/cw_ngd.py` from its files of results; every number, verdict and figure is computed. Numbers are means ±
standard errors over seeds. A verdict is given where the 95 % interval (Student's t over the seeds, paired by seed) of a difference excludes 0; with few seeds that asks
for a large difference, and the many comparisons are not corrected for their number.
"""
WORDS = f"""## What is compared

- Rules: `layer`; `unit` (incoming weights and bias of an output); `input` (outgoing weights of an input, or of an entry of the patch); `cw-ngd` as
  released (kernels; dense layers by unit and source channel where a small flattened map feeds them, by unit where at most 16 inputs do, else single
  entries); `cw-ngd 2022` (dense by unit); `mbf` (kernels; dense by input) and `mbf A` (dense by unit); `diagonal`.
- Controls of the same sizes, within each layer: *contiguous*, along the flat parameter vector (for `cw-ngd` these are the segments themselves);
  *{SHIFTED}* a segment, so that each block holds halves of two neighbours; *random*, means over several draws. Those of `unit` and `input` only in networks of up to
  {LARGEST:,} parameters; elsewhere chance speaks for them.
- Twice as large: *{NEIGHBOURS}* (each segment with the next along the weight, mostly of its own unit) and *{SCATTERED}* (with any other of the layer).
- **Energy captured**: Σ‖F_bb‖²/‖F‖², with the level of chance, its expectation for random blocks of the same sizes. For the whole
  network chance is that of blocks drawn across all layers, where the random controls, like the rules, stay inside each layer. **Decrease ratio**: what the
  block step reaches of the best possible decrease of the damped quadratic model. **Cosine** of the block step with the natural gradient. **KL**: total correlation
  between the blocks, in nat. **κ**: condition number of the block-preconditioned Fisher, of the order of the number of steps the segmentation costs.
- Which Fisher: *exact* (expectation over labels in closed form), and, as CW-NGD itself uses it, *empirical*: of one batch, and the average of
  several batches' Fishers at fixed parameters, which stands for the running average of .99 (that one also averages over the last hundred steps'
  parameters). An average of equal batches' Fishers is the Fisher of their union. λ = 1e-7 is CW-NGD's released damping, 0.01 λ_max a scaled one.
- Training is with CW-NGD itself, with the released learning rate and damping.
"""
LIMITS = """## How far this goes

- Energy, decrease ratio and divergence judge the *matrix* and one step of the quadratic model on the same examples, not training: being closer to F is not
  by itself a better optimizer.
- The empirical Fisher is judged against itself, which is not the Fisher; its noise floor is that of one score per example.
- The exact Fisher of few examples has a low rank, and two uncorrelated blocks are then coupled by chance: compare ρ² with its floor only.
- The noise floor of a coupling takes the score columns of an example as exchangeable; a coupling far above it is real, one close to it may be either.
- Condition numbers are accurate to 5 %. What does not fit 2 GiB is left out and shown as –.
- Couplings in large layers are those of a few whole units drawn at random.
"""


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *map(list, rows)])


def _what_ran(found: dict[str, Network]) -> str:
    rows = []
    for name, plan in NETWORKS.items():
        if name not in found:
            rows.append(
                [plan.title, f"**not yet run**: `python docs/findings/cw_ngd.py --networks {name}`", *["–"] * 5]
            )
            continue
        n, exact = found[name], found[name].one["exact"].attrs
        p = n.plan
        rows.append(
            [
                p["title"],
                f"{exact['n_params']:,} parameters; seeds {len(n.seeds)}; stages {', '.join(n.stages)}",
                f"{exact['n_data']}",
                f"{n.one['batch'].attrs['n_data']}; {n.one['averaged'].attrs['n_data']}" if n.has("batch") else "–",
                f"{n.one.attrs['num_train']:,}, batch {p['batch']}",
                f"{int(n.attr(n.last, 'step')[0])} ({p['lr']:g}; {p['damping']:g})",
                " → ".join(number(100 * n.attr(s, "test_accuracy"), 1) for s in n.stages),
            ]
        )
    head = (
        "network", "run", "examples, exact", "examples, empirical: one batch; averaged", "training examples",
        "steps at the end (lr; λ)", "test accuracy in % by stage",
    )  # fmt: skip
    return "## What was run\n\n" + _table(head, rows) + "\n"


def _judgements(n: Network) -> str:
    parts = []
    where = {"stage": n.last}
    rows = []
    for cut in TABLE:
        own = [number(n.value(v, cut, **where)) for v in ("energy_captured", "energy_noise_floor")]
        for damping in (0, 1):
            own.append(number(n.value("decrease_ratio", cut, damping=damping, **where)))
        own.append(number(n.value("natural_gradient_cosine", cut, **where)))
        own += [number(n.value(v, cut, **where), 2) for v in ("kl_divergence", "condition_number")]
        if any(cell != "–" for cell in own):
            rows.append([cut, *own])
    head = (
        "cut", "energy", "chance", "decrease ratio, λ = 1e-7", "decrease ratio, λ = 0.01 λ_max", "cosine", "KL in nat", "κ",
    )  # fmt: skip
    parts.append(
        f"Whole network, {figures.STAGE_WORDS[n.last]}, exact Fisher; cosine, KL and κ at 0.01 λ_max:\n\n{_table(head, rows)}\n"
    )
    if n.has("stand_ins"):
        names = n.one["stand_ins"]["approximation"].values.tolist()
        variables = ("relative_error", "decrease_ratio", "kl_divergence")
        rows = [[name, *(number(n.stand_in(v, name, n.last)) for v in variables)] for name in names]
        head = ("stand-in", "‖F − F̂‖/‖F‖", "decrease ratio", "KL in nat")
        parts.append(
            f"Structured stand-ins at 0.01 λ_max; `mbf, shared` has one block for all columns of a dense layer:\n\n{_table(head, rows)}\n"
        )
    return "\n".join(parts)


def _sentences(n: Network, made: list[Claim]) -> str:
    """Plain words for what the claims say, grouped by verdict."""
    lines = []
    for assumed, words in ((True, "What the papers assume"), (False, "Beside it")):
        for verdict, outcome in (("supported", "holds here"), ("contradicted", "does not hold here")):
            own = [c for c in made if c.verdict == verdict and c.assumed == assumed]
            if own:
                told = "; ".join(f"{c.lower} ({number(c.a)} against {number(c.b)})" for c in own)
                lines.append(f"- {words} and {outcome}: {told}.")
    rest = [c for c in made if c.verdict in ("undecided", "not contradicted")]
    if rest:
        lines.append("- Not decided by these seeds: " + "; ".join(c.lower for c in rest) + ".")
    if any(c.verdict == "one seed only" for c in made):
        lines.append("- One seed only, so that there is no verdict; see the tables.")
    alone = [
        f"{100 * n.single_share('cw-ngd', name):.0f} % of {name}"
        for name in n.dense
        if n.single_share("cw-ngd", name) > 0.5
    ]
    if alone:
        lines.append(
            f"- The released rule leaves most weights of these dense layers alone in a block of one, so that CW-NGD is a diagonal method there: {', '.join(alone)}."
        )
    return "\n".join(lines)


def _pictures(chosen: list[Network], widths: list[Network], out: Path) -> dict[str, str]:
    made = {
        name: getattr(figures, name)(chosen, out / f"cw-ngd-{name}.png")
        for name in ("step", "energy", "coupling", "training")
    }
    if len(widths) > 1:
        made["width"] = figures.width(widths, out / "cw-ngd-width.png")
    return made


def _picture(made: dict[str, str], name: str, text: str) -> str:
    return f"![{text}]({made[name]})\n\n*{text}*\n"


def write(data: Path, out: Path) -> Path:
    """Write page and figures from the results in ``data`` to ``out``; return the page."""
    found = load(data)
    networks = [found[name] for name in NETWORKS if name in found]
    chosen = [n for n in networks if not n.plan["light"]] or networks
    widths = sorted((n for n in networks if n.plan["problem"] == "digits-cnn"), key=lambda n: n.plan["width"])
    made = _pictures(chosen, widths, out)
    text = [INTRO]
    for n in chosen:
        text.append(
            f"**{n.plan['title']}, {figures.STAGE_WORDS[n.last]}.**\n\n{_sentences(n, list(claims.of_network(n)))}\n"
        )
    text += [_what_ran(found), WORDS, "## Which segmentation is justified\n"]
    text.append(
        _picture(
            made,
            "step",
            "How much of the best step's decrease each segmentation keeps, for the whole network at the end of training, by kind of Fisher and damping. Bars are standard errors over seeds.",
        )
    )
    text.append(
        _picture(
            made,
            "energy",
            "Energy captured by layer at the end of training. Blue: rules; red: the same sizes placed otherwise, or pairs of segments; grey: random. A rule is justified as far as it stands above grey and red of its own sizes.",
        )
    )
    for n in chosen:
        rows = [c.row() for c in claims.of_network(n)]
        text.append(
            f"### {n.plan['title']}\n\n{_judgements(n)}\nStatements, {figures.STAGE_WORDS[n.last]}:\n\n{HEAD}\n"
            + "\n".join(rows)
            + "\n"
        )
    text.append("## Neighbours and strangers\n")
    text.append(
        _picture(
            made,
            "coupling",
            "Mean squared coupling of two segments, by where they lie to each other. Dotted: the noise floor of the same pairs.",
        )
    )
    text.append(
        "Channels have no order of their own, so that a *next* source can differ from a *farther* one only by chance at the start; what matters is whether two segments share their unit or their source.\n"
    )
    text.append("## Does independence grow with training?\n")
    text.append(
        _picture(
            made, "training", "Energy captured and decrease ratio of the whole network along training, exact Fisher."
        )
    )
    for n in chosen:
        rows = [c.row() for c in claims.of_training(n)]
        if rows:
            text.append(f"{n.plan['title']}:\n\n{HEAD}\n" + "\n".join(rows) + "\n")
    text.append("## Does independence grow with width?\n")
    if "width" in made:
        text.append(
            _picture(
                made,
                "width",
                "The digits network at several widths, before and after training with the same number of steps. A point without a bar is of one seed.",
            )
        )
        text.append(
            "All widths take the same steps, so that they end at different accuracies (see the table of what was run), which is mixed up with width.\n"
        )
        most = [n for n in widths if len(n.seeds) == max(len(other.seeds) for other in widths)]
        if len(most) > 1:
            rows = [c.row() for c in claims.of_width(most[0], most[-1])]
            text.append(f"{HEAD}\n" + "\n".join(rows) + "\n")
    else:
        text.append("Not yet run at more than one width.\n")
    text.append(LIMITS)
    page = out / "cw-ngd.md"
    draft = page.with_suffix(".md.part")
    draft.write_text("\n".join(text), encoding="utf-8")
    draft.replace(page)
    return page
