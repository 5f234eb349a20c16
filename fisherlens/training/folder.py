"""The data folder: which data set lies there in which form, are its files what they should be, and each file read once."""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fisherlens import errors
from fisherlens.errors import FileFormatError, InputError
from fisherlens.training.checksums import CHECKSUMS
from fisherlens.training.formats import read_bytes

VARIABLE = "FISHERLENS_DATA"

_NO_FOLDER = (
    "{name} is read from a data folder, and none is named. Set the environment variable {variable}, or give data_dir= (--data-dir on the "
    "command line), to a folder that holds {folder}/{file}. The data set comes from {home}."
)
_NO_SUCH_FOLDER = "The data folder {root} ({origin}) is no folder. Name one that exists; {name} is looked for in its subfolder {folder}."
_MISSING = (
    "{name} is not in the data folder {root} ({origin}): there is no {file} in {searched}. It comes from {home}: put {files} there as "
    "they come, or name another folder with data_dir=, --data-dir or the environment variable {variable}."
)
_CHECKSUM = (
    "{path}: the {algorithm} of its content is {got}, but that of {file} of {name} is {expected}. It is damaged, or another data set under "
    "the same name. Get it again from {home}; for data of your own in this format pass verify=False."
)

Files = Mapping[str, tuple[bytes, Path]]
Where = str | os.PathLike[str] | None


@dataclass(frozen=True)
class Part:
    """Training or test half of a data set: labels ``(N,)`` int64, and images by index as uint8, ``(n, channels, height, width)``."""

    labels: np.ndarray
    pixels: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Form:
    """A form in which a data set may lie in a data folder.

    ``name`` is what ``version=`` calls it, ``title`` what pages call the data; ``folders`` are looked through in their order; ``sizes``
    are the examples of both halves where they are fewer than usual.
    """

    name: str
    title: str
    folders: tuple[str, ...]
    files: tuple[str, ...]
    read: Callable[[Files], tuple[Part, Part]]
    sizes: tuple[int, int] | None = None


@dataclass(frozen=True)
class DataSet:
    """A data set of a data folder: where it comes from, its forms in order of preference, its mean and deviation per channel."""

    name: str
    home: str
    forms: tuple[Form, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def _find_root(data: DataSet, data_dir: Where) -> tuple[Path, str]:
    first = data.forms[0]
    given = os.environ.get(VARIABLE) if data_dir is None else data_dir
    words = {"name": data.name, "folder": first.folders[0], "file": first.files[0], "home": data.home}
    if not given:
        raise InputError(_NO_FOLDER.format(**words, variable=VARIABLE))
    root, origin = Path(given).expanduser().absolute(), VARIABLE if data_dir is None else "data_dir"
    if not root.is_dir():
        raise InputError(_NO_SUCH_FOLDER.format(**words, root=root, origin=origin))
    return root, origin


def find(data: DataSet, data_dir: Where, version: str | None = None) -> tuple[Form, dict[str, Path]]:
    """The form in which a data set is there, and its files; nothing is read.

    Raises
    ------
    InputError: no data folder named, no such folder, a missing file, an unknown version.
    """
    known = {form.name: form for form in data.forms}
    if version is not None and version not in known:
        hint = errors.nearest(version, known)
        raise InputError(errors.UNKNOWN_NAME.format(what=f"version of {data.name}", name=version, hint=hint))
    root, origin = _find_root(data, data_dir)
    wanted = data.forms if version is None else (known[version],)
    lacking: tuple[Form, str] | None = None
    for form in wanted:
        for folder in _folders(root, form):
            found = {file: path for file in form.files if (path := _find_file(folder, file)) is not None}
            if len(found) == len(form.files):
                return form, found
            if found and lacking is None:
                lacking = form, next(file for file in form.files if file not in found)
        if lacking is not None:
            break  # a form that is begun is not passed over for another one: the numbers would differ
    form, file = lacking or (wanted[0], wanted[0].files[0])
    raise InputError(
        _MISSING.format(
            name=data.name,
            root=root,
            origin=origin,
            file=f"{file} or {file}.gz",
            searched=" or ".join(str(folder) for folder in _folders(root, form)),
            home=data.home,
            files=", ".join(form.files),
            variable=VARIABLE,
        )
    )


def _folders(root: Path, form: Form) -> list[Path]:
    """Where a form is looked for; the folder of the data set itself may also be named as the data folder."""
    inside = [root / folder for folder in form.folders]
    return inside + [root.parent / folder for folder in form.folders if Path(folder).parts[0] == root.name]


def _find_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


_lock = threading.RLock()


def load(data: DataSet, data_dir: Where, version: str | None = None, *, verify: bool = True) -> tuple[Form, Part, Part]:
    """The form that was found, with training and test half; read once per process, and again where a file has changed.

    Raises
    ------
    InputError: as :func:`find`. FileFormatError: a wrong checksum, unless ``verify`` is False; a damaged file.
    """
    form, paths = find(data, data_dir, version)
    stamps = tuple((file, path, path.stat().st_size, path.stat().st_mtime_ns) for file, path in paths.items())
    with _lock:  # two threads that ask for the same data do not read them twice
        return form, *_load(data, form, stamps, bool(verify))


@functools.lru_cache(maxsize=4)
def _load(data: DataSet, form: Form, stamps: tuple[tuple[str, Path, int, int], ...], verify: bool) -> tuple[Part, Part]:
    files = {}
    for file, path, *_ in stamps:
        content = read_bytes(path)
        if verify:
            _check(content, path, data, file)
        files[file] = content, path
    return form.read(files)


def _check(content: bytes, path: Path, data: DataSet, file: str) -> None:
    """Compare the checksum of a file's unpacked content with the one on record."""
    algorithm, expected = CHECKSUMS[data.name][file]
    got = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
    if got != expected:
        words = {"path": path, "algorithm": algorithm, "got": got, "expected": expected}
        raise FileFormatError(_CHECKSUM.format(**words, file=file, name=data.name, home=data.home))
