"""``fisherlens compare`` and ``fisherlens verify``: optimizers side by side, and the analysis against training."""

from __future__ import annotations

from typing import Any

import click

from fisherlens.cli import options as shared


@click.command()
@shared.problem
@shared.data
@click.option(
    "-o",
    "--optimizer",
    "entries",
    multiple=True,
    metavar="NAME[=LR]",
    default=("cw-ngd", "sgd"),
    show_default=True,
    help="sgd (momentum 0.9), adam, adamw, cw-ngd, mbf, tengrad, fngd, projected-kfac, kfac, ekfac, k-bfgs, ngd, shampoo, tnt, unit-wise or "
    "quasi-diagonal, with a learning rate if you like; repeat for several.",
)
@shared.steps()
@shared.seeds(3)
@shared.count("--batch-size", text="Examples per step.", default=64)
@shared.count("--record-every", text="Steps between measurements; by default a fiftieth of the run.")
@click.option(
    "--tune",
    "num_rates",
    type=click.IntRange(min=2),
    metavar="N",
    help="Search first: N learning rates for every optimizer, √10 apart around its own, on a seed that is not reported.",
)
@click.option(
    "--target",
    "goals",
    multiple=True,
    metavar="METRIC=NUMBER",
    help="train_loss, test_loss or test_accuracy that a run should reach, repeat for several; by default the problem's own.",
)
@click.option(
    "--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes for the runs; 0 is this one."
)
@click.option(
    "--resume",
    is_flag=True,
    help="Keep finished runs in DIR/runs, so that the same command goes on where it was stopped.",
)
@shared.device
@shared.out("compare", "Folder for compare.nc and compare.png.")
def compare(
    name: Any,
    entries: tuple[str, ...],
    num_steps: int,
    num_seeds: int,
    num_rates: int | None,
    goals: tuple[str, ...],
    device: str,
    resume: bool,
    out: str,
    **options: Any,
) -> None:
    """Train a ready problem with several optimizers, from equal starts in equal batch order.

    Prints what each reached and how many steps it took to the targets, and writes compare.nc (all curves) and compare.png. A comparison at
    learning rates that nobody searched says little: --tune gives every optimizer the same small search, and reports all of it.
    Ctrl-C keeps the runs that were recorded; with --resume the same command does only what is missing, also after a crash.

    \b
    Examples:
      fisherlens compare
      fisherlens compare --problem digits-mlp -o cw-ngd=0.003 -o sgd=0.1 -o sgd=0.05 -o adam --steps 300
      fisherlens compare -o kfac -o cw-ngd -o adam --tune 5 --target test_accuracy=0.9 --workers 2 --resume
    """  # noqa: D301
    from fisherlens.report.folder import OutputFolder
    from fisherlens.report.race import grid, optimizer, picture, table, target
    from fisherlens.training import Tuning, compare_optimizers, problem
    from fisherlens.training.devices import find_device, on_device

    chosen = problem(name, **shared.taken(options))
    optimizers = {entry: optimizer(entry, chosen, options["batch_size"]) for entry in entries}
    targets = dict(map(target, goals)) or None
    where = find_device(device)
    chosen = chosen if where is None else on_device(chosen, where)
    tune = None
    if num_rates is not None:
        tune = Tuning({entry: {"lr": grid(make, chosen, num_rates)} for entry, make in optimizers.items()})
    files = ("compare.nc", "compare.png")
    folder = OutputFolder(out, files=files, figures=False)
    runs = folder.path / "runs" if resume else None
    options |= {"num_steps": num_steps, "seeds": num_seeds, "tune": tune, "targets": targets, "resume": runs}
    with shared.heard(folder) as warned:
        found = compare_optimizers(chosen, optimizers, **options)
    ended = "interrupted; what was recorded is saved" if bool(found.interrupted.any()) else None
    shared.publish(found, folder, table(found), files, picture(found), warned, interrupted=ended)


@click.command()
@shared.problem_argument
@shared.data
@click.option(
    "--claims",
    metavar="NAME,…",
    help="Some of metric, stability, one_step, convergence, independence, information, sharing.",
)
@shared.seeds(3)
@click.option(
    "--quick/--full",
    "quick",
    default=True,
    show_default="quick",
    help="Short runs and few learning rates, or longer ones.",
)
@shared.kind("Which Fisher predicts.")
@shared.examples("the preset's")
@shared.damping("a hundredth of the largest eigenvalue")
@shared.device
@shared.out("verify", "Folder for verify.nc and verification.png.")
def verify(name: Any, claims: str | None, num_seeds: int, quick: bool, device: str, out: str, **options: Any) -> None:
    """Check what the analysis predicts against what training does.

    PROBLEM is a ready one, see `fisherlens problems`, or MODULE:FACTORY, a function of yours that returns a fl.Problem. Prints one line per
    claim, predicted and measured, and whether it holds; writes verify.nc and verification.png. A claim that fails is a result, so that the
    exit code is 0 all the same. Ctrl-C keeps the claims that are finished.

    \b
    Examples:
      fisherlens verify
      fisherlens verify digits-mlp --claims metric,stability --seeds 5
      fisherlens verify fashion-cnn --full --device cuda --data-dir ~/data
    """  # noqa: D301
    from fisherlens.report.folder import OutputFolder
    from fisherlens.report.threads import one_thread
    from fisherlens.report.verdicts import picture, table
    from fisherlens.training import problem
    from fisherlens.training import verify as check
    from fisherlens.training.devices import find_device

    chosen = problem(name, **shared.taken(options))
    names = None if claims is None else [part.strip() for part in claims.split(",") if part.strip()]
    found_device, preset = find_device(device), "quick" if quick else "full"
    files = ("verify.nc", "verification.png")
    folder = OutputFolder(out, files=files, figures=False)
    with shared.heard(folder) as warned, one_thread(chosen.model(0)):
        found = check(chosen, names, seeds=num_seeds, preset=preset, device=found_device, **options)
    ended = "interrupted; the claims that were finished are saved" if bool(found.interrupted) else None
    shared.publish(found, folder, table(found), files, picture(found), warned, interrupted=ended)
