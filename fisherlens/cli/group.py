"""The group of all commands, and how a call of it ends."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import click

from fisherlens._version import __version__
from fisherlens.errors import FisherLensError, nearest

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
  fisherlens notebooks --open                         the stories, cell by cell, in Jupyter
"""


class _Group(click.Group):
    """Commands in the order in which they were added; an unknown one is told with the nearest."""

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
