"""What makes a file whole or absent: a digest behind its last byte, and a temporary that takes the name at the end.

Nothing here knows what the file holds.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fisherlens import errors
from fisherlens.errors import FileFormatError, InputError

# The last bytes of every file: a line of fixed length whose sha256 covers all bytes before its hexadecimal digits.
# HDF5 ignores what stands behind its own end of file, so any netCDF reader still opens the file.
FORMAT = 1
_TRAILER = "\nfisherlens-file format={format:04d} container={container:<8} sha256={digest}\n"
_PATTERN = re.compile(rb"\nfisherlens-file format=(\d{4}) container=(dataset |datatree) sha256=([0-9a-f]{64})\n")
_LENGTH = len(_TRAILER.format(format=FORMAT, container="dataset", digest="0" * 64))
_DIGEST_TAIL = 64 + 1  # the digits and the newline behind them
_HDF5_START = b"\x89HDF\r\n\x1a\n"

_TEMPORARY = re.compile(r"\..+\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}\.fisherlens-tmp")
_STALE_SECONDS = 24 * 3600.0
_writing: set[str] = set()  # temporaries that this process is writing now


def seal(path: Path, container: str) -> None:
    """Append the line with the digest of the file, and wait until all of it is on disk."""
    head = _TRAILER.format(format=FORMAT, container=container, digest="").rstrip("\n").encode()
    with path.open("r+b") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
        digest.update(head)
        file.write(head + digest.hexdigest().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def verify(path: Path) -> str:
    """The container that the last line of a file names, once that line and the digest in it are found right."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _LENGTH))
        match = _PATTERN.fullmatch(file.read())
        file.seek(0)
        if match is None:
            start = file.read(len(_HDF5_START))
            found = (
                "is empty"
                if size == 0
                else "starts as netCDF-4 but does not end as a fisherlens file"
                if start == _HDF5_START
                else "neither starts nor ends as a fisherlens file"
            )
            raise FileFormatError(
                f"{path} {found} ({errors.readable_bytes(size)}). It was cut short or damaged, or fisherlens.save did not write it. "
                "Save it again or restore a copy; a netCDF file of another program opens with xarray.open_dataset."
            )
        remaining = size - _DIGEST_TAIL
        digest = hashlib.sha256()
        while remaining and (piece := file.read(min(1 << 20, remaining))):
            digest.update(piece)
            remaining -= len(piece)
    if digest.hexdigest().encode() != match[3]:
        raise FileFormatError(
            f"{path} is damaged: its content does not have the sha256 that was recorded when it was saved. A disk or transfer "
            "error changed it, or another program wrote into it. Save it again or restore a copy."
        )
    if int(match[1]) > FORMAT:
        raise FileFormatError(
            f"{path} has file format {int(match[1])}; this fisherlens reads up to {FORMAT}. "
            "It was written by a newer release: upgrade fisherlens to read it."
        )
    return match[2].decode().strip()


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path beside ``target`` that takes its name when the block ends well, and vanishes when it does not."""
    temporary = _temporary(target)
    _writing.add(str(temporary))
    try:
        yield temporary
        os.replace(temporary, target)
        _sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)
        _writing.discard(str(temporary))


def require_writable(path: str | os.PathLike[str]) -> Path:
    """The file that a save to ``path`` would write (links followed), or an InputError that says why it cannot.

    Creates and removes an empty file in the folder, since permission bits alone do not tell (read-only mounts, root).
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise InputError(f"{target} is a folder; name a file in it, such as {target / 'run.nc'}.")
    if not target.parent.is_dir():
        raise InputError(
            f"Cannot write {target}: there is no folder {target.parent}. Create it first, or correct the path."
        )
    probe = _temporary(target)
    try:
        probe.touch(exist_ok=False)
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"Cannot write {target}: the folder {target.parent} refuses a new file ({error.strerror}). "
            "Choose another folder, or change its permissions."
        ) from error
    return target


def sweep(folder: Path) -> list[Path]:
    """Remove the temporaries that killed processes left in a folder, and return them.

    One of this machine goes when its process is gone; one of another machine (a shared folder) after a day.
    """
    removed = []
    for path in folder.glob(".*.fisherlens-tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or str(path) in _writing:
            continue
        try:
            old = time.time() - path.stat().st_mtime > _STALE_SECONDS
            if old or (match["host"] == _host() and not _alive(int(match["pid"]))):
                path.unlink()
                removed.append(path)
        except OSError:  # another process swept it first, or (on Windows) still writes it
            continue
    return removed


def _temporary(target: Path) -> Path:
    stem = target.name[:100]  # file systems limit a name to 255 bytes
    return target.parent / f".{stem}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.fisherlens-tmp"


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # what this process writes now was left out before
    if os.name != "posix":
        return False  # there, an open file refuses to be removed, and os.kill(pid, 0) would end the process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_folder(folder: Path) -> None:
    """Make the new name itself survive a power cut; only POSIX lets a folder be synced."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
