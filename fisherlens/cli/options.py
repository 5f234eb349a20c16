"""Options that several commands share, and what they do with their results."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import xarray as xr

    from fisherlens.report.folder import OutputFolder

Decorator = Callable[[Any], Any]

_COUNT = click.IntRange(min=1)


def count(name: str, *names: str, text: str, default: int | None = None) -> Decorator:
    """An option that takes a number of at least 1."""
    shown: dict[str, Any] = {"metavar": "N"} if default is None else {"default": default, "show_default": True}
    return click.option(name, *names, type=_COUNT, help=text, **shown)


def steps() -> Decorator:
    """How long each training run is."""
    return count("--steps", "num_steps", text="Training steps per run.", default=120)


def seeds(default: int, text: str = "How many seeds: 0, 1, …") -> Decorator:
    """How many seeds."""
    return count("--seeds", "num_seeds", text=text, default=default)


def kind(text: str) -> Decorator:
    """Which Fisher."""
    return click.option("--kind", default="exact", show_default=True, metavar="exact|mc|empirical", help=text)


def examples(default: str) -> Decorator:
    """On how many examples the Fisher is taken."""
    return count("--num-examples", text=f"Examples that F is taken on; by default {default}.")


def damping(default: str) -> Decorator:
    """The damping λ."""
    return click.option("--damping", type=float, metavar="λ", help=f"In nat; by default {default}.")


def out(default: str, text: str = "Folder for what is written.") -> Decorator:
    """Where results go."""
    return click.option("--out", default=default, show_default=True, metavar="DIR", help=text)


def _own_problem(ctx: click.Context, param: click.Parameter, value: str) -> Any:
    """Leave the name of a ready problem as it is; call ``module:factory`` for one of the user's own."""
    if ":" not in value:
        return value
    from fisherlens.report.factories import own_problem

    return own_problem(value)


_PROBLEM = (
    "A ready problem, see `fisherlens problems`, or MODULE:FACTORY, a function of yours that returns a fl.Problem."
)
problem = click.option(
    "--problem",
    "name",
    default="digits-cnn",
    show_default=True,
    metavar="NAME",
    callback=_own_problem,
    help=_PROBLEM,
)
problem_argument = click.argument("name", metavar="[PROBLEM]", default="digits-cnn", callback=_own_problem)
seed = click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of everything random.")
device = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda",
    help="Where to compute; auto takes CUDA where there is one.",
)
data_dir = click.option(
    "--data-dir",
    metavar="DIR",
    help="Folder with the data of the ready problems; by default the one that FISHERLENS_DATA names.",
)

DATA = {"data_dir": "--data-dir", "num_train": "--num-train", "num_test": "--num-test"}


def data(command: Any) -> Any:
    """Options that choose the data of a ready problem."""
    for part, what in (("test", "judge on"), ("train", "train on")):
        command = count(f"--num-{part}", text=f"Examples to {what}, equally many of each class; by default all.")(
            command
        )
    return data_dir(command)


def taken(options: dict[str, Any]) -> dict[str, Any]:
    """The options of :func:`data` that were given; they leave ``options``."""
    found = {option: options.pop(option) for option in DATA}
    return {option: value for option, value in found.items() if value is not None}


# --- results ---------------------------------------------------------------------------------------------------------


@contextmanager
def heard(folder: OutputFolder) -> Iterator[list[str]]:
    """What a block warns of, each text once, to be said when its result has been; a folder made for nothing goes again."""
    texts: list[str] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield texts
    except BaseException:
        folder.abandon()
        raise
    texts += dict.fromkeys(str(warning.message) for warning in caught)


def publish(
    found: xr.Dataset,
    folder: OutputFolder,
    words: str,
    files: tuple[str, str],
    picture: bytes | None,
    warned: list[str],
    *,
    interrupted: str | None,
) -> None:
    """Print a result, then write it: its numbers are on the screen before a full disk can refuse them.

    Parameters
    ----------
    found, words, picture
        The result, the same as text, and as PNG; None where there is nothing to draw.
    folder, files
        Where the two files go, and their names.
    warned
        What is said on standard error at the end.
    interrupted
        What to say where Ctrl-C cut the run short, None where it did not.
    """
    from fisherlens.results import save

    data_file, picture_file = files
    width = max(map(len, files)) + len(str(folder.path)) + 1
    click.echo(words)
    try:
        save(found, folder.path / data_file)
        click.echo(
            f"\n{str(folder.path / data_file).ljust(width)}  every number: fisherlens.load({str(folder.path / data_file)!r})"
        )
        if picture is not None:
            folder.write(picture_file, picture)
            click.echo(f"{str(folder.path / picture_file).ljust(width)}  the same as a picture")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; files in {folder.path} are whole or were not written") from None
    finally:
        folder.abandon()  # nothing stays of it where nothing could be written
        for text in warned:
            click.echo(text, err=True)
    if interrupted is not None:
        raise KeyboardInterrupt(interrupted)
