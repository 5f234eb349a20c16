"""Does the analysis come true? Check every claim of ``fl.verify`` on several problems, and write ``verification.md`` with its figures.

    python docs/findings/verification.py                            # every problem whose data are here, three seeds
    python docs/findings/verification.py --problems digits-cnn      # one of them; the page says which have not been run
    python docs/findings/verification.py --page                     # the page again, from the results that are there

Each problem and claim has a netCDF file of its own in OUT/data/verification, written whole or not at all. Ctrl-C loses the one that is being
checked; the same command goes on from there. Settings are in the files: one made with others is checked again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1])]

import matplotlib as mpl  # noqa: E402

mpl.use("Agg")

import h5netcdf  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import xarray as xr  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

import fisherlens as fl  # noqa: E402
from fisherlens.report.verdicts import FAILS, HOLDS, UNDECIDED, rule, states  # noqa: E402
from fisherlens.report.words import listing, num  # noqa: E402
from fisherlens.training.verify import CLAIMS  # noqa: E402

PROBLEMS = {
    "digits-cnn": "CNN on digits",
    "digits-mlp": "MLP on digits",
    "digits-autoencoder": "autoencoder on digits",
    "fashion-mlp": "MLP on Fashion-MNIST",
    "fashion-cnn": "CNN on Fashion-MNIST",
    "cifar-vgg": "VGG-like on CIFAR-10",
    "cifar-resnet": "ResNet-20 on CIFAR-10",
}
# examples that F is taken on where the preset's are too many for a CPU: a convolution over 32 x 32 positions costs as much per example as a small network
FEWER = {"cifar-vgg": 32, "cifar-resnet": 32}
INTRO = """# Does the analysis come true?

Every quantity of this package predicts something: how far a step changes the outputs, above which learning rate training diverges, how much one
step gains, in which order optimizers converge, which blocks may be cut, which filters may go, how fast the curvature drifts. `fl.verify` makes the
prediction and then lets it happen. A claim that fails is a result, and is shown as one that holds.

This page is written by `docs/findings/verification.py` from its files of results; every number and verdict is computed. Numbers are means ±
standard errors over seeds. A claim holds where the 95 % bounds of its agreement over the seeds lie within the rule, fails where they lie outside, and is
undecided where they hold a boundary. Many claims are judged, and the bounds are not corrected for their number.
"""

# Why claims fail, by patterns of their names; said for those that fail or are undecided on some problem.
WHY = {
    "metric/reach-*": "A fact about networks. The form is right there (`metric/middle`, `metric/bottom`), and ends early: where F is small a step must be long to change the outputs "
    "by as much as steps are clipped at, and on so long a step they do not move in a straight line. Trust regions that count in F alone are too wide there; damping is what limits "
    "such steps.",
    "stability/*-hessian": "On the MLP within a few per cent, the accuracy of the measurement: some dozen steps decide. On the CNN on Fashion-MNIST single seeds lie far off, and we have not found out "
    "why: kinks of ReLU near the parameters, where there is no Hessian, are one suspect, the measurement itself the other.",
    "stability/ngd stability/block-* stability/sgd": "A fact, not a computation gone wrong: by the Hessian, preconditioned alike, the same rates come out right (rows `-hessian`) on all problems but the CNN on Fashion-MNIST, which is open. (F + λ)⁻¹ "
    "divides by F where F is next to nothing, and the Hessian has curvature there that F does not have. The finer the blocks, the less of it they reach, so that F predicts "
    "gradient descent and units well and exact natural gradient badly.",
    "stability/sgd-training": "Above 2/λ_max the stiffest direction grows, but the loss rises above its start only when that has eaten up what all others gain, within as many steps as "
    "are taken. So the rate is met from above.",
    "one_step/ngd one_step/order one_step/unit one_step/kfac": "The quadratic model is trusted at its own best length, which for exact natural gradient is the longest step of all. The series behind "
    "the rows shows it come true within 6 % at a tenth of that length on every problem here, and fall behind from a quarter on: a limit of the model, and the reason for clipping.",
    "convergence/condition-number convergence/decrease-ratio": "On the autoencoder the order is the other way round: the target, half of the way down on a log scale, lies above the 27.1 nat at which every picture is told as the mean "
    "picture, and that is learnt by the biases of the last layer alone. The fine segmentations are there first and stay there; the whole and layers come later and pass below. "
    "Without clipping, and with a clip twenty times wider, it stayed so (tried on two seeds). Where it is undecided, three seeds are too few.",
    "convergence/exact": "Not explained. Coarse blocks are expected to win, and units or finer cuts are often faster to the target. It agrees with `stability/ngd`: exact "
    "natural gradient is the method whose largest stable rate F misses most. Its Fisher is also that of a mini-batch with one drawn label per example, and everything outside of "
    "these rows is divided by λ alone.",
    "independence/*": "The share of the way is measured on other examples than the batch that a step knows, and over three seeds; distances agree within a third.",
    "information/removed information/small information/rank information/loss": "A removal is no short step. It shows most where tanh units are saturated (the layer behind the code of "
    "the autoencoder): a saturated unit passes no score on, so that F hardly sees its weights, and taking it away takes away the constant that it adds. For small shares of a unit the form is right.",
    "information/against-*": "The same: where units are saturated, those of least information are not those that may go, and magnitude is the better guide. On networks with ReLU information is.",
    "sharing/*": "Three seeds differ too much to tell: what a stale direction is worth depends on the batches that it meets.",
}


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), metavar="NAME", help="which; default all")
    parser.add_argument("--claims", nargs="+", choices=list(CLAIMS), default=list(CLAIMS), help="which; default all")
    parser.add_argument("--seeds", type=int, default=3, help="counted from 0; default 3")
    parser.add_argument("--full", action="store_true", help="longer runs and more learning rates")
    parser.add_argument("--num-examples", type=int, help="that F is taken on; default the preset's, fewer for CIFAR-10")
    parser.add_argument("--device", help="where to compute; default where the problem puts its network")
    parser.add_argument("--data-dir", default=os.environ.get("FISHERLENS_DATA"), help="default $FISHERLENS_DATA")
    parser.add_argument("--out", type=Path, default=HERE, help="where page, figures and data/ go")
    parser.add_argument("--page", action="store_true", help="check nothing, write the page from what is there")
    options = parser.parse_args(given)
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    return options


def examples(options: argparse.Namespace, name: str) -> int | None:
    """On how many examples F is taken; None for the preset's."""
    return FEWER.get(name) if options.num_examples is None else options.num_examples


def wish(options: argparse.Namespace, name: str) -> str:
    """What a file of results depends on, in one line."""
    few = examples(options, name)
    words = f"preset={'full' if options.full else 'quick'} seeds={options.seeds}"
    return words if few is None else f"{words} examples={few}"


def is_there(path: Path, wanted: str) -> bool:
    """Whether a file holds results made with these settings."""
    if not path.exists():
        return False
    with h5netcdf.File(path) as file:
        return file.attrs["wish"] == wanted


def check(options: argparse.Namespace, folder: Path) -> None:
    """Check what is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = fl.problems(data_dir=options.data_dir).missing
    for name in options.problems:
        if name in missing:
            print(f"{name}: left out. {missing[name]}", flush=True)
            continue
        problem = None
        for claim in options.claims:
            path = folder / f"{name}-{claim}.nc"
            if is_there(path, wish(options, name)):
                continue
            start = time.perf_counter()
            problem = problem or fl.problem(name, data_dir=options.data_dir)
            preset = "full" if options.full else "quick"
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = fl.verify(
                        problem,
                        claim,
                        seeds=options.seeds,
                        preset=preset,
                        num_examples=examples(options, name),
                        device=options.device,
                        progress=False,
                    )
            except fl.FisherLensError as error:
                print(f"{name}, {claim}: not checked. {error}", flush=True)
                continue
            seconds = time.perf_counter() - start
            found = found.assign_attrs(wish=wish(options, name), title=problem.description, seconds=seconds)
            fl.save(found, path)
            print(f"{name}, {claim}: {seconds:.0f} s", flush=True)


# --- the page --------------------------------------------------------------------------------------------------------


def load(folder: Path) -> dict[str, dict[str, xr.Dataset]]:
    """Problem → claim → result."""
    found: dict[str, dict[str, xr.Dataset]] = {}
    for name in PROBLEMS:
        paths = {claim: folder / f"{name}-{claim}.nc" for claim in CLAIMS}
        there = {claim: fl.load(path) for claim, path in paths.items() if path.exists()}
        if there:
            found[name] = there
    return found


def write(folder: Path, out: Path) -> Path:
    """Write page and figures from the files that are there."""
    results = load(folder)
    parts = [INTRO, _short(results), _reasons(results), "## What was run\n", _ran(results)]
    for name, claims in results.items():
        joined = _joined(claims)
        called = _called(name, claims)
        parts += [
            f"## {called}\n",
            _picture(joined, out, name, called),
            _rows(joined),
            _metric(claims, out, name, called),
        ]
    parts.append(_words(results))
    path = out / "verification.md"
    path.write_text("\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return path


def _joined(claims: dict[str, xr.Dataset]) -> xr.Dataset:
    """The rows of all claims of a problem, without the series behind them."""
    rows = [found[[name for name in found if "claim" in found[name].dims]] for found in claims.values()]
    return xr.concat(rows, dim="claim", combine_attrs="drop_conflicts")


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *map(list, rows)]) + "\n"


def _called(name: str, claims: dict[str, xr.Dataset]) -> str:
    """The problem in a few words; CIFAR-10 with the form in which it was there."""
    title = str(next(iter(claims.values())).attrs["title"])
    return (
        PROBLEMS[name].replace("CIFAR-10", title.partition(" 32 x 32")[0])
        if title.startswith("CIFAR-10")
        else PROBLEMS[name]
    )


def _short(results: dict[str, dict[str, xr.Dataset]]) -> str:
    lines = []
    for name, claims in results.items():
        joined = _joined(claims)
        words, names = states(joined), joined.claim.values.tolist()
        text = f"- **{_called(name, claims)}**: {words.count(HOLDS)} of {len(words)} claims hold."
        for state, verb in ((FAILS, "Not so"), (UNDECIDED, "Undecided")):
            chosen = [f"`{label}`" for label, word in zip(names, words, strict=True) if word == state]
            text += f" {verb}: {listing(chosen)}." if chosen else ""
        lines.append(text)
    return "## In short\n\n" + "\n".join(lines) + "\n" if lines else ""


def _reasons(results: dict[str, dict[str, xr.Dataset]]) -> str:
    """What fails or is undecided somewhere, and why, as far as that is known."""
    found: dict[str, list[str]] = {}
    for name, claims in results.items():
        joined = _joined(claims)
        for label, word in zip(joined.claim.values.tolist(), states(joined), strict=True):
            if word != HOLDS:
                found.setdefault(label, []).append(f"{_called(name, claims)} ({word if word != FAILS else 'fails'})")
    lines = []
    for patterns, text in WHY.items():
        labels = [label for label in found if any(fnmatch(label, one) for one in patterns.split())]
        if labels:
            said = "; ".join(f"`{label}` on {listing(found.pop(label))}" for label in labels)
            lines.append(f"- {said}. {text}")
    return "## What does not hold, and why\n\n" + "\n".join(lines) + "\n" if lines else ""


def _ran(results: dict[str, dict[str, xr.Dataset]]) -> str:
    rows = []
    for name, title in PROBLEMS.items():
        if name not in results:
            rows.append([title, f"**not yet run**: `python docs/findings/verification.py --problems {name}`", "–", "–"])
            continue
        claims = results[name]
        first = next(iter(claims.values())).attrs
        left = [f"`{claim}`" for claim in CLAIMS if claim not in claims]
        settings = " and ".join(dict.fromkeys(str(one.attrs["wish"]) for one in claims.values()))
        rows.append([_called(name, claims), str(first["title"]), settings, listing(left) if left else "none"])
    return _table(["problem", "what", "settings", "claims not checked"], rows)


def _with_error(one: xr.Dataset, name: str) -> str:
    error = float(one[f"{name}_sem"])
    return (
        f"{num(float(one[name]))} ± {num(error, 1)}" if error > 1e-9 * abs(float(one[name])) else num(float(one[name]))
    )


def _rows(joined: xr.Dataset) -> str:
    rows = []
    for place, (name, word) in enumerate(zip(joined.claim.values.tolist(), states(joined), strict=True)):
        one = joined.isel(claim=place)
        unit = "" if str(one.unit.values) == "1" else f" {one.unit.values}"
        numbers = [_with_error(one, key) + unit for key in ("predicted", "measured")]
        said = rule(str(one.relation.values), float(one.tolerance))
        rows.append(
            [
                f"`{name}`",
                *numbers,
                said,
                word if word == HOLDS else f"**{word}**",
                str(one.note.values).replace("|", "\\|"),
            ]
        )
    return _table(["claim", "predicted", "measured", "rule", "", "note"], rows)


def _save(figure: Figure, path: Path) -> str:
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path.name


def _picture(joined: xr.Dataset, out: Path, name: str, called: str) -> str:
    figure = Figure(figsize=(10, 1.5 + 0.29 * joined.sizes["claim"]), layout="constrained")
    fl.plot.verification(joined, figure.subplots())
    text = (
        f"Claims on the {called}: how far what was measured lies from what was predicted, with 95 % bounds over seeds. In the grey range a claim holds; "
        "crosses fail, diamonds are undecided."
    )
    return f"![{text}]({_save(figure, out / f'verification-{name}.png')})\n\n*{text}*\n"


def _metric(claims: dict[str, xr.Dataset], out: Path, name: str, called: str) -> str:
    """The divergence along the three eigenvectors beside the quadratic form, first seed."""
    if "metric" not in claims:
        return ""
    found = claims["metric"].isel(seed=0)
    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    for direction, shade in zip(("top", "middle", "bottom"), ("#0072B2", "#009E73", "#D55E00"), strict=True):
        one = found.sel(metric_direction=direction)
        length = one.metric_length.values
        kl = one.metric_divergence.values
        ax.loglog(length, one.metric_quadratic.values, color=shade, linewidth=0.9, alpha=0.6)
        for values, mark in zip(kl, ("o", "x"), strict=True):
            good = np.isfinite(values) & (values > 0)
            ax.loglog(
                length[good],
                values[good],
                mark,
                color=shade,
                markersize=3.5,
                linestyle="none",
                label=f"{direction}, {'+' if mark == 'o' else '−'}v",
            )
    ax.set_ylim(1e-20, 1e2)
    ax.set_xlabel("length ℓ of the step")
    ax.set_ylabel("KL from θ to θ ± ℓv [nat]")
    ax.legend(fontsize=8, frameon=False, ncols=3)
    ax.spines[["top", "right"]].set_visible(False)
    text = f"Divergence of the outputs along eigenvectors of F (marks) and ½ ℓ² vᵀFv (lines), {called}, seed {int(found.seed)}."
    return f"![{text}]({_save(figure, out / f'verification-{name}-metric.png')})\n\n*{text}*\n"


def _words(results: dict[str, dict[str, xr.Dataset]]) -> str:
    """Every claim in words, once."""
    said: dict[str, str] = {}
    for claims in results.values():
        for found in claims.values():
            said |= dict(zip(found.claim.values.tolist(), found.statement.values.tolist(), strict=True))
    return (
        "## The claims in words\n\n" + "\n".join(f"- `{name}`: {text}" for name, text in said.items()) + "\n"
        if said
        else ""
    )


def main(given: list[str] | None = None) -> None:
    """Check, then write the page; after Ctrl-C too, of what is there."""
    options = arguments(given)
    folder = options.out / "data" / "verification"
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        if not options.page:
            check(options, folder)
    finally:
        if any(folder.glob("*.nc")):
            print(f"written: {write(folder, options.out)}")


if __name__ == "__main__":
    main()
