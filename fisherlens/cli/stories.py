"""The notebooks that come with the package: where they are, what each is about, copies of them, and running these."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fisherlens import errors
from fisherlens._progress import progress
from fisherlens.errors import InputError
from fisherlens.report.folder import OutputFolder

_PATTERN = "[0-9][0-9]_*.ipynb"
_SECONDS_PER_CELL = 600
_NOT_THERE = (
    "The notebooks of fisherlens are not beside its modules in {package}, nor in {checkout}. An installation brings them, and a clone of the "
    "repository has them at its top: install fisherlens again."
)
_NEEDS = (
    "{option} needs {library}, which is not installed here. Install the extra 'notebooks' of fisherlens, or pip install {package}; without {option} the "
    "notebooks are copied, and any Jupyter opens them."
)
_STORED = "{folder} is where fisherlens keeps its own notebooks, which hold no outputs. Give --out another folder to run copies in."


@dataclass(frozen=True)
class Story:
    """One notebook: its file, and the title that it gives itself."""

    path: Path
    title: str

    @property
    def name(self) -> str:
        """As the command line calls it: ``01_first_look``."""
        return self.path.stem


def home() -> Path:
    """The folder of the notebooks: beside the modules of an installed package, at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent
    places = [package / "notebooks", *([checkout / "notebooks"] if (checkout / "pyproject.toml").is_file() else [])]
    for place in places:
        if any(place.glob(_PATTERN)):
            return place
    raise InputError(_NOT_THERE.format(package=package / "notebooks", checkout=checkout / "notebooks"))


def stories() -> list[Story]:
    """All notebooks, in their order."""
    return [Story(path, _title(path)) for path in sorted(home().glob(_PATTERN))]


def chosen(names: Sequence[str]) -> list[Story]:
    """The notebooks of these names, each by its number, its name or both; all for none.

    Raises
    ------
    InputError: a name that no notebook has, with the nearest.
    """
    known = stories()
    if not names:
        return known
    called = {form: one for one in known for form in _forms(one.name)}
    found = []
    for name in names:
        one = called.get(name.removesuffix(".ipynb"))
        if one is None:
            hint = errors.nearest(name, [story.name for story in known])
            raise InputError(errors.UNKNOWN_NAME.format(what="notebook", name=name, hint=hint))
        found.append(one)
    return [one for one in known if one in found]


def copy(some: Sequence[Story], folder: OutputFolder, *, overwrite: bool) -> dict[Path, str]:
    """Copy notebooks into a folder; path of each copy → what became of it: written, there already, or kept as the user's own."""
    states = {}
    for one in some:
        target = folder.path / one.path.name
        if target.exists() and (not overwrite or target.samefile(one.path)):
            states[target] = "there already" if _cells(target) == _cells(one.path) else "kept, it differs"
        else:
            folder.write(one.path.name, one.path.read_bytes())
            states[target] = "written"
    return states


def require_to_run(out: str) -> None:
    """Refuse to execute where something is missing, or in the folder of the stored notebooks."""
    for module in ("nbclient", "ipykernel"):
        _require("--run", module, module, "nbclient ipykernel")
    if Path(out).resolve() == home():
        raise InputError(_STORED.format(folder=home()))


def run(paths: Sequence[Path]) -> dict[Path, str]:
    """Execute notebooks from top to bottom, each in a kernel of its own, and store them with their outputs.

    Returns what went wrong, in a line: path → the error of the cell that failed.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellControlSignal, CellExecutionError, DeadKernelError

    failed = {}
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        cells = sum(cell.cell_type == "code" for cell in notebook.cells)
        with progress(cells, desc=path.stem) as bar:
            client = NotebookClient(
                notebook,
                timeout=_SECONDS_PER_CELL,
                kernel_name="python3",
                resources={"metadata": {"path": str(path.parent)}},
                on_cell_executed=lambda bar=bar, **_: bar.update(1),
            )
            try:
                client.execute(env=_environment())
            except CellExecutionError as error:
                failed[path] = f"{error.ename}: {error.evalue}"
            except (CellControlSignal, DeadKernelError) as error:  # a cell that takes too long; a kernel that is gone
                failed[path] = f"{type(error).__name__}: {error}"
        OutputFolder(path.parent, files=(path.name,), figures=False).write(
            path.name, nbformat.writes(notebook).encode()
        )
    return failed


def require_to_open() -> None:
    """Refuse to open where JupyterLab is missing."""
    _require("--open", "JupyterLab", "jupyterlab", "jupyterlab ipykernel")


def open_lab(place: Path) -> int:
    """Open a notebook or a folder in JupyterLab, and wait until it is closed; its exit code."""
    command = [sys.executable, "-m", "jupyterlab", str(place)]
    try:
        return subprocess.run(command, env=_environment(), check=False).returncode  # noqa: S603 - our own interpreter
    except KeyboardInterrupt:
        return 0  # the usual way to end it


def _require(option: str, library: str, module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise InputError(_NEEDS.format(option=option, library=library, package=package))


def _environment() -> dict[str, str]:
    """The environment of a kernel: it finds this very fisherlens, also one that is not installed."""
    here = str(Path(__file__).resolve().parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))}


def _forms(name: str) -> list[str]:
    """What a notebook may be called."""
    number, _, rest = name.partition("_")
    return [name, number, number.lstrip("0"), rest]


def _cells(path: Path) -> list[tuple[str, str]] | None:
    """Kind and source of every cell, so that outputs make no difference; None for what is no notebook."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _title(path: Path) -> str:
    """The first heading of a notebook."""
    heading = next((text for kind, text in _cells(path) or () if kind == "markdown" and text.startswith("# ")), "")
    return heading.partition("\n")[0].removeprefix("# ") or path.stem
