"""``fisherlens problems`` and ``fisherlens notebooks``: what comes with the package."""

from __future__ import annotations

import click

from fisherlens.cli import options as shared

FAILED = 1


@click.command()
@shared.data_dir
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


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--list", "only_list", is_flag=True, help="Say which there are, and write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace copies that you have changed; by default they are kept.")
@click.option("--run", "execute", is_flag=True, help="Execute the copies and store them with their outputs.")
@click.option("--open", "open_them", is_flag=True, help="Open the copies in JupyterLab, until that is closed.")
@shared.out("notebooks", "Folder for the copies.")
@click.pass_context
def notebooks(
    ctx: click.Context,
    names: tuple[str, ...],
    only_list: bool,
    overwrite: bool,
    execute: bool,
    open_them: bool,
    out: str,
) -> None:
    """Copy the notebooks, worked stories cell by cell, into a folder of yours.

    NAME is the number of one, its name, or both; without any all are taken. A copy that you have changed is kept. Each runs in about a minute on
    two cores, on data that the package brings. --run and --open need the extra `notebooks` (JupyterLab, nbclient); a cell that fails makes
    the exit code 1.

    \b
    Examples:
      fisherlens notebooks --list
      fisherlens notebooks --open
      fisherlens notebooks 1 reading_a_spectrum --run --out stories
    """  # noqa: D301
    from fisherlens.cli import stories
    from fisherlens.report.folder import OutputFolder

    some = stories.chosen(names)
    if only_list:
        width = max(len(one.name) for one in some)
        for one in some:
            click.echo(f"{one.name.ljust(width)}  {one.title}")
        return
    if execute:
        stories.require_to_run(out)
    if open_them:
        stories.require_to_open()
    folder = OutputFolder(out, files=[one.path.name for one in some], figures=False)
    states = stories.copy(some, folder, overwrite=overwrite)
    width = max(len(str(path)) for path in states)
    for (path, state), one in zip(states.items(), some, strict=True):
        click.echo(f"{str(path).ljust(width)}  {one.title} ({state})")
    if any(state.startswith("kept") for state in states.values()):
        click.echo(
            "Copies that differ from those of the package are yours and were kept; --overwrite replaces them.", err=True
        )
    failed = stories.run(list(states)) if execute else {}
    for path, why in failed.items():
        click.echo(f"{path} failed: {why}", err=True)
    if open_them:
        code = stories.open_lab(next(iter(states)) if len(states) == 1 else folder.path)
        if code:
            ctx.exit(FAILED)
    if failed:
        ctx.exit(FAILED)
