"""The output folder: found writable before any work, files whole or absent, and nothing left of a report that never began."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from fisherlens.errors import InputError
from fisherlens.report.store import DATA_FILE
from fisherlens.results import require_writable
from fisherlens.results.seal import replacing

PAGE, FIGURES = "report.html", "figures"


class OutputFolder:
    """A folder made ready for what a command writes.

    Parameters
    ----------
    path
        The folder; missing ones are created. InputError where that, or a file in it, is refused.
    files
        What will be written there.
    figures
        Whether there will be a folder of figures in it.
    """

    def __init__(self, path: str | os.PathLike[str], *, files: Sequence[str] = (DATA_FILE, PAGE), figures: bool = True):
        self.path = Path(path)
        self._made: list[Path] = []
        if not str(path):
            raise InputError("out must name a folder, such as out='report/'; got an empty text.")
        try:
            self._make(self.path)
            for name in files:
                require_writable(self.path / name)
            if figures:
                self._make(self.path / FIGURES)
                require_writable(self.path / FIGURES / "figure.png")
        except OSError as error:
            self.abandon()
            where = error.filename or self.path
            raise InputError(
                f"Cannot write to {self.path}: {where}: {error.strerror}. Choose another folder with out=, or change permissions."
            ) from error
        except InputError:
            self.abandon()
            raise

    def _make(self, folder: Path) -> None:
        missing = [folder, *folder.parents]
        for level in reversed([level for level in missing if not level.exists()]):
            level.mkdir()
            self._made.append(level)
        if not folder.is_dir():
            raise InputError(
                f"Cannot write to {self.path}: {folder} is a file, not a folder. Choose another name with out=."
            )

    def abandon(self) -> None:
        """Remove the folders that were created, as long as they are empty."""
        for level in reversed(self._made):
            try:
                level.rmdir()
            except OSError:
                return

    def drop_figures(self, names: Iterable[str]) -> None:
        """Remove figures of these names, without number, that an earlier report left: they would show other results."""
        for name in names:
            for path in (self.path / FIGURES).glob(f"[0-9][0-9]-{name}.png"):
                path.unlink(missing_ok=True)

    def write(self, name: str, content: bytes) -> Path:
        """Write one file, which takes its name only when it is complete; an InputError where that fails."""
        target = self.path / name
        try:
            with replacing(target) as temporary:
                temporary.write_bytes(content)
        except OSError as error:
            raise InputError(
                f"Writing {target} failed: {error}. An earlier file of that name is untouched. Is the disk full, or the folder gone?"
            ) from error
        return target
