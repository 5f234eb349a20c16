"""``fisherlens report``: everything about a network on one page."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fisherlens.cli import options as shared
from fisherlens.errors import InputError

if TYPE_CHECKING:
    import xarray as xr


@click.command()
@shared.problem
@shared.data
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
@shared.kind("Which Fisher.")
@shared.examples("at most 128")
@shared.steps()
@shared.seeds(2, "Seeds of the training curves.")
@shared.damping("1e-3 of each stage's largest eigenvalue")
@shared.seed
@shared.device
@shared.out("report")
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
        belong = {"name": "--problem", "num_steps": "--steps", "num_seeds": "--seeds"} | shared.DATA
        for option, shown in belong.items():
            if ctx.get_parameter_source(option) is click.core.ParameterSource.COMMANDLINE:
                raise InputError(
                    f"{shown} belongs to a ready problem, which is trained; --model is analysed as it stands. Leave one of them out."
                )
    folder, choice = options.pop("out"), shared.taken(options)
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
