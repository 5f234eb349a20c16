"""The command line: ``fisherlens report``, ``compare``, ``verify`` and ``problems``."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from fisherlens._version import __version__
from fisherlens.errors import FisherLensError, InputError, nearest

if TYPE_CHECKING:
    import xarray as xr

BAD_INPUT, INTERRUPTED = 2, 130

_EXAMPLES = """
\b
Examples:
  fisherlens report                                   the main job, on handwritten digits
  fisherlens report --problem digits-mlp --steps 200  another ready problem, longer training
  fisherlens report --model nets:make --data nets:load --likelihood categorical
                                                      your own network, as it stands
  fisherlens compare --problem digits-mlp -o cw-ngd -o sgd=0.1 -o adam=1e-3
  fisherlens verify digits-cnn                        does the analysis come true?
  fisherlens problems
"""


class _Group(click.Group):
    """Commands in the order in which they teach; an unknown one is told with the nearest."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            raise click.UsageError(f"Unknown command {args[0]!r}. {nearest(args[0], self.commands)}")
        return super().resolve_command(ctx, args)


@click.group(
    invoke_without_command=True,
    cls=_Group,
    epilog=_EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="fisherlens")
@click.pass_context
def commands(ctx: click.Context) -> None:
    """What the Fisher information of a network looks like, and whether training agrees.

    `fisherlens report` without options trains a small network on handwritten digits, takes its exact Fisher at three stages, and writes
    one page that answers in words and pictures. `fisherlens COMMAND --help` explains each command.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


_out = click.option("--out", default="report", show_default=True, metavar="DIR", help="Folder for what is written.")
_seed = click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of everything random.")


def _own_problem(ctx: click.Context, param: click.Parameter, value: str) -> Any:
    """Leave the name of a ready problem as it is; call ``module:factory`` for one of the user's own."""
    if ":" not in value:
        return value
    from fisherlens.report.factories import own_problem

    return own_problem(value)


_problem = click.option(
    "--problem",
    "name",
    default="digits-cnn",
    show_default=True,
    metavar="NAME",
    callback=_own_problem,
    help="A ready problem, see `fisherlens problems`, or MODULE:FACTORY, a function of yours that returns a fl.Problem.",
)
_data_dir = click.option(
    "--data-dir",
    metavar="DIR",
    help="Folder with the data of the ready problems; by default the one that FISHERLENS_DATA names.",
)


def _data(command: Any) -> Any:
    """Options that choose the data of a ready problem."""
    for part, what in (("test", "judge on"), ("train", "train on")):
        command = click.option(
            f"--num-{part}",
            type=click.IntRange(min=1),
            metavar="N",
            help=f"Examples to {what}, equally many of each class; by default all.",
        )(command)
    return _data_dir(command)


_DATA = {"data_dir": "--data-dir", "num_train": "--num-train", "num_test": "--num-test"}


_device = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda",
    help="Where to compute; auto takes CUDA where there is one.",
)


@commands.command()
@_problem
@_data
@click.option(
    "--model", metavar="MODULE:FACTORY", help="Your own network: a function without arguments that returns it."
)
@click.option(
    "--data", metavar="MODULE:FACTORY", help="Its data: a function that returns (inputs, targets) or batches of them."
)
@click.option(
    "--likelihood",
    metavar="NAME",
    help="What its outputs mean: categorical (logits), bernoulli (logits) or gaussian (means).",
)
@click.option("--kind", default="exact", show_default=True, metavar="exact|mc|empirical", help="Which Fisher.")
@click.option(
    "--num-examples",
    type=click.IntRange(min=1),
    metavar="N",
    help="Examples that F is taken on; by default at most 128.",
)
@click.option(
    "--steps", "num_steps", type=click.IntRange(min=1), default=120, show_default=True, help="Training steps per run."
)
@click.option(
    "--seeds",
    "num_seeds",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Seeds of the training curves.",
)
@click.option("--damping", type=float, metavar="λ", help="In nat; by default 1e-3 of each stage's largest eigenvalue.")
@_seed
@_device
@_out
@click.pass_context
def report(
    ctx: click.Context,
    name: str,
    model: str | None,
    data: str | None,
    likelihood: str | None,
    num_steps: int,
    **options: Any,
) -> None:
    """Analyse a network and write report.html, report.nc and figures/*.png.

    Without --model a ready problem is trained with CW-NGD and with SGD, and analysed at the start, half way and at the end. With --model
    your own network is analysed as it stands, on a copy in evaluation mode, and not trained.

    \b
    Your own network, in a file nets.py of the current folder:
        def make():                 # returns a torch.nn.Module
            return MyNetwork()
        def load():                 # returns (inputs, targets), a list of such batches, or a DataLoader
            return inputs, targets
    \b
    and then:
        fisherlens report --model nets:make --data nets:load --likelihood categorical

    The page needs no network and can be mailed. `fl.load("report/report.nc")` gives every number back. Ctrl-C keeps what is finished.
    """  # noqa: D301
    from fisherlens.likelihoods import as_likelihood
    from fisherlens.report import report as make_report
    from fisherlens.report.factories import call, network
    from fisherlens.report.folder import OutputFolder
    from fisherlens.training import problem

    own = [
        option
        for option, value in (("--model", model), ("--data", data), ("--likelihood", likelihood))
        if value is not None
    ]
    if own:
        missing = [option for option in ("--model", "--data", "--likelihood") if option not in own]
        if missing:
            raise InputError(
                f"Your own network needs --model, --data and --likelihood together; missing: {' and '.join(missing)}."
            )
        belong = {"name": "--problem", "num_steps": "--steps", "num_seeds": "--seeds"} | _DATA
        for option, shown in belong.items():
            if ctx.get_parameter_source(option) is click.core.ParameterSource.COMMANDLINE:
                raise InputError(
                    f"{shown} belongs to a ready problem, which is trained; --model is analysed as it stands. Leave one of them out."
                )
    folder, choice = options.pop("out"), _taken(options)
    command = shlex.join(["fisherlens", *sys.argv[1:]])
    if own:
        as_likelihood(
            likelihood
        )  # an unknown name, and a folder that cannot be written, show before the user's code runs
        place = OutputFolder(folder)
        try:
            subject, source = network(model), call(data, "data")
            tree = make_report(
                subject, folder, data=source, likelihood=likelihood, name=model, command=command, **options
            )
        finally:
            place.abandon()  # nothing stays of a report that never began
    else:
        chosen = problem(name, **choice) if choice else name
        tree = make_report(chosen, folder, num_steps=num_steps, command=command, **options)
    _tell(tree, Path(folder))


def _taken(options: dict[str, Any]) -> dict[str, Any]:
    """The options of :func:`_data` that were given; they leave ``options``."""
    taken = {option: options.pop(option) for option in _DATA}
    return {option: value for option, value in taken.items() if value is not None}


def _tell(tree: xr.DataTree, folder: Path) -> None:
    """Say in a few lines where everything is, and what could not be done."""
    from fisherlens.report.findings import node

    log = node(tree, "log")
    failed = (
        []
        if log is None
        else [
            str(task) for task, outcome in zip(log.task.values, log.outcome.values, strict=True) if outcome == "failed"
        ]
    )
    pictures = len(list((folder / "figures").glob("*.png")))
    click.echo(f"{folder / 'report.html'}   the page: open it in a browser")
    click.echo(f"{folder / 'report.nc'}     every number: fisherlens.load({str(folder / 'report.nc')!r})")
    click.echo(f"{folder / 'figures'}{os.sep}*.png  {pictures} figures")
    if failed:
        click.echo(f"Not available: {', '.join(dict.fromkeys(failed))}. The page says why.", err=True)


@commands.command()
@_problem
@_data
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
@click.option(
    "--steps", "num_steps", type=click.IntRange(min=1), default=120, show_default=True, help="Training steps per run."
)
@click.option(
    "--seeds", "num_seeds", type=click.IntRange(min=1), default=3, show_default=True, help="How many seeds: 0, 1, …"
)
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Examples per step.")
@click.option(
    "--record-every",
    type=click.IntRange(min=1),
    metavar="N",
    help="Steps between measurements; by default a fiftieth of the run.",
)
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
@_device
@click.option(
    "--out", default="compare", show_default=True, metavar="DIR", help="Folder for compare.nc and compare.png."
)
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
    import warnings

    from fisherlens.report.folder import OutputFolder
    from fisherlens.report.race import grid, optimizer, picture, table, target
    from fisherlens.report.subject import find_device
    from fisherlens.results import save
    from fisherlens.training import Tuning, compare_optimizers, problem
    from fisherlens.training.devices import on_device

    chosen = problem(name, **_taken(options))
    optimizers = {entry: optimizer(entry, chosen, options["batch_size"]) for entry in entries}
    targets = dict(map(target, goals)) or None
    where = find_device(device)
    chosen = chosen if where is None else on_device(chosen, where)
    tune = None
    if num_rates is not None:
        tune = Tuning({entry: {"lr": grid(make, chosen, num_rates)} for entry, make in optimizers.items()})
    folder = OutputFolder(out, files=("compare.nc", "compare.png"), figures=False)
    runs = folder.path / "runs" if resume else None
    options |= {"num_steps": num_steps, "seeds": num_seeds, "tune": tune, "targets": targets, "resume": runs}
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = compare_optimizers(chosen, optimizers, **options)
    except BaseException:
        folder.abandon()
        raise
    save(found, folder.path / "compare.nc")
    drawn = picture(found)
    if drawn is not None:
        folder.write("compare.png", drawn)
    click.echo(table(found))
    click.echo(f"\n{folder.path / 'compare.nc'}   all curves: fisherlens.load({str(folder.path / 'compare.nc')!r})")
    if drawn is not None:
        click.echo(f"{folder.path / 'compare.png'}  the curves as a picture")
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        click.echo(message, err=True)
    if bool(found.interrupted.any()):
        raise KeyboardInterrupt("interrupted; what was recorded is saved")


@commands.command()
@click.argument("name", metavar="[PROBLEM]", default="digits-cnn", callback=_own_problem)
@_data
@click.option(
    "--claims",
    metavar="NAME,…",
    help="Some of metric, stability, one_step, convergence, independence, information, sharing.",
)
@click.option(
    "--seeds", "num_seeds", type=click.IntRange(min=1), default=3, show_default=True, help="How many seeds: 0, 1, …"
)
@click.option(
    "--quick/--full",
    "quick",
    default=True,
    show_default="quick",
    help="Short runs and few learning rates, or longer ones.",
)
@click.option("--kind", default="exact", show_default=True, metavar="exact|mc|empirical", help="Which Fisher predicts.")
@click.option(
    "--num-examples",
    type=click.IntRange(min=1),
    metavar="N",
    help="Examples that F is taken on; by default the preset's.",
)
@click.option("--damping", type=float, metavar="λ", help="In nat; by default a hundredth of the largest eigenvalue.")
@_device
@click.option(
    "--out", default="verify", show_default=True, metavar="DIR", help="Folder for verify.nc and verification.png."
)
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
    import warnings

    from fisherlens.report.folder import OutputFolder
    from fisherlens.report.subject import find_device
    from fisherlens.report.threads import one_thread
    from fisherlens.report.verdicts import picture, table
    from fisherlens.results import save
    from fisherlens.training import problem
    from fisherlens.training import verify as check

    chosen = problem(name, **_taken(options))
    names = None if claims is None else [part.strip() for part in claims.split(",") if part.strip()]
    found_device, preset = find_device(device), "quick" if quick else "full"
    folder = OutputFolder(out, files=("verify.nc", "verification.png"), figures=False)
    try:
        with warnings.catch_warnings(record=True) as caught, one_thread(chosen.model(0)):
            warnings.simplefilter("always")
            found = check(chosen, names, seeds=num_seeds, preset=preset, device=found_device, **options)
    except BaseException:
        folder.abandon()
        raise
    save(found, folder.path / "verify.nc")
    folder.write("verification.png", picture(found))
    click.echo(table(found))
    click.echo(
        f"\n{folder.path / 'verify.nc'}         every number: fisherlens.load({str(folder.path / 'verify.nc')!r})"
    )
    click.echo(f"{folder.path / 'verification.png'}  the same as a picture")
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        click.echo(message, err=True)
    if bool(found.interrupted):
        raise KeyboardInterrupt("interrupted; the claims that were finished are saved")


@commands.command()
@_data_dir
def problems(data_dir: str | None) -> None:
    """List the ready problems: name, whether its data are here, what it is.

    What is not here, and where it comes from, is said on standard error.

    \b
    Examples:
      fisherlens problems
      fisherlens problems --data-dir ~/data
    """  # noqa: D301
    from fisherlens.training import problems as known

    found = known(data_dir=data_dir)
    click.echo(str(found))
    for line in found.reasons():
        click.echo(f"Not here: {line}", err=True)


# --- ends -----------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and leave the process with its exit code.

    0 for success, 2 with one line for bad input, 130 after Ctrl-C; an unexpected error keeps its traceback and gives 1.
    """
    try:
        code = commands.main(args=arguments, prog_name="fisherlens", standalone_mode=False)
    except click.ClickException as error:
        _refuse(error.format_message(), error)
    except FisherLensError as error:
        _refuse(str(error))
    except (KeyboardInterrupt, click.Abort) as error:
        words = " ".join(str(error.__cause__ or error).split())
        click.echo(f"fisherlens: {words or 'interrupted; nothing was finished, so nothing was written'}", err=True)
        sys.exit(INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _refuse(message: str, error: click.ClickException | None = None) -> NoReturn:
    """One line on standard error, and exit code 2."""
    context = getattr(error, "ctx", None)
    hint = f" Try: {context.command_path} --help" if context is not None else ""
    click.echo(f"fisherlens: {' '.join(message.split())}{hint}", err=True)
    sys.exit(BAD_INPUT)
