"""Readers of the original file formats of image data sets: bytes in, arrays out, and what is wrong named with its place.

A reader trusts nothing in a file: sizes are compared before memory is taken, labels are compared with their range, and
nothing in a file can make it import, call or evaluate anything.
"""

from __future__ import annotations

import gzip
import io
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fisherlens.errors import FileFormatError, InputError

MOST_BYTES = 2**30  # a file that unpacks to more is none of these data sets
CIFAR_RECORD = 1 + 3 * 32 * 32

_DAMAGED = "{path} cannot be read on from offset {offset} of its {what}: {why}. The file is damaged or cut short: get it again."
_TOO_LARGE = "{path} unpacks to more than 1 GiB, more than any of the data sets here. It is another file: look at its name and origin."
_WRONG = "{path}, offset {offset}: {what}. {remedy}"
_OTHER_FILE = "Probably it is another file under this name, or a damaged one."
_CUT = "The file is cut short or damaged: get it again."


def wrong(path: Path, offset: int, what: str, remedy: str = _OTHER_FILE) -> FileFormatError:
    """The error for a file that does not hold what its format promises."""
    return FileFormatError(_WRONG.format(path=path, offset=offset, what=what, remedy=remedy))


def read_bytes(path: Path) -> bytes:
    """Everything in a file, unpacked where its name ends in ``.gz``.

    Raises
    ------
    FileFormatError: damaged or cut compression, with the offset in the unpacked content; more than 1 GiB. InputError: no right to read.
    """
    pieces, size = [], 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            while piece := file.read(2**20):
                pieces.append(piece)
                size += len(piece)
                if size > MOST_BYTES:
                    raise FileFormatError(_TOO_LARGE.format(path=path))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        text = _DAMAGED.format(path=path, offset=size, what="unpacked content", why=str(error).rstrip("."))
        raise FileFormatError(text) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}. Look at its permissions.") from error
    return b"".join(pieces)


def read_idx(content: bytes, path: Path, ndim: int) -> np.ndarray:
    """The array of unsigned bytes in an idx file (LeCun, Cortes, Burges: two zero bytes, type, axes, sizes, then the entries).

    Parameters
    ----------
    content
        The unpacked file.
    path
        Its name, for errors.
    ndim
        How many axes it must have: 3 for images, 1 for labels.
    """
    header = 4 + 4 * ndim
    magic = bytes((0, 0, 8, ndim))
    if content[:4] != magic:
        what = f"expected the magic number 0x{magic.hex()} (unsigned bytes, {ndim} axes); got 0x{content[:4].hex()}"
        raise wrong(path, 0, what)
    if len(content) < header:
        raise wrong(path, len(content), f"the file ends within its header of {header} bytes", _CUT)
    shape = struct.unpack(f">{ndim}I", content[4:header])
    promised = math.prod(shape)
    if len(content) - header != promised:
        what = (
            f"the header promises {promised:,} entries ({' x '.join(map(str, shape))}); got {len(content) - header:,}"
        )
        raise wrong(path, min(len(content), header + promised), what, _CUT)
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read_idx_pair(images: tuple[bytes, Path], labels: tuple[bytes, Path]) -> tuple[np.ndarray, np.ndarray]:
    """Labels ``(N,)`` int64 and images ``(N, 1, 28, 28)`` uint8 of the two idx files that belong together."""
    pixels, classes = read_idx(*images, ndim=3), read_idx(*labels, ndim=1)
    if pixels.shape[1:] != (28, 28):
        raise wrong(images[1], 8, f"expected images of 28 x 28; got {pixels.shape[1]} x {pixels.shape[2]}")
    if len(pixels) != len(classes) or len(pixels) == 0:
        raise wrong(
            labels[1],
            4,
            f"expected a label for each of the {len(pixels):,} images in {images[1].name}; got {len(classes):,}",
        )
    return check_labels(classes, labels[1], first=8), pixels[:, None]


def check_labels(labels: np.ndarray, path: Path, *, first: int, stride: int = 1) -> np.ndarray:
    """Labels as int64, all within 0..9; ``first`` and ``stride`` tell where in the file they stand."""
    bad = np.flatnonzero((labels < 0) | (labels > 9))
    if len(bad):
        place = int(bad[0])
        raise wrong(path, first + stride * place, f"expected a label in 0..9; got {labels[place]}, example {place}")
    return labels.astype(np.int64)


def read_cifar_binary(content: bytes, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels ``(N,)`` and images ``(N, 3, 32, 32)`` of a file of CIFAR-10's binary version: records of a label and 3,072 pixels."""
    if not content or len(content) % CIFAR_RECORD:
        whole = len(content) // CIFAR_RECORD
        what = f"expected records of {CIFAR_RECORD:,} bytes; got {whole:,} of them and {len(content) % CIFAR_RECORD:,} bytes more"
        raise wrong(path, whole * CIFAR_RECORD, what, _CUT)
    records = np.frombuffer(content, np.uint8).reshape(-1, CIFAR_RECORD)
    labels = check_labels(records[:, 0], path, first=0, stride=CIFAR_RECORD)
    return labels, records[:, 1:].reshape(-1, 3, 32, 32)


def read_npz(content: bytes, path: Path, arrays: Mapping[str, tuple[str, int]]) -> dict[str, np.ndarray]:
    """Arrays of an npz file by name, each of the type ("uint8" or any "integer") and number of axes that it must have."""
    if content[:4] != b"PK\x03\x04":
        raise wrong(path, 0, f"expected an npz archive, which begins with 0x504b0304; got 0x{content[:4].hex()}")
    found = {}
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            for name, (kind, ndim) in arrays.items():
                if name not in archive.files:
                    got = ", ".join(map(repr, archive.files)) or "none"
                    raise wrong(path, 0, f"expected an array {name!r} in the archive; got {got}")
                array = archive[name]
                if not np.issubdtype(array.dtype, getattr(np, kind)) or array.ndim != ndim:
                    what = f"expected the array {name!r} of type {kind} with {ndim} axes; got {array.dtype} of shape {array.shape}"
                    raise wrong(path, 0, what)
                found[name] = array
    except (ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        text = _DAMAGED.format(path=path, offset=0, what="npz archive", why=" ".join(str(error).split()).rstrip("."))
        raise FileFormatError(text) from error
    return found


def decode_jpegs(path: Path, encoded: np.ndarray, offsets: np.ndarray, index: np.ndarray, out: np.ndarray) -> None:
    """Decode the images ``index`` of a row of JPEG files, laid end to end at ``offsets``, into ``out[index]`` (N, 3, 32, 32)."""
    from PIL import Image

    from fisherlens._progress import progress

    enabled = None if len(index) > 2000 else False
    for place in progress([int(k) for k in index], desc="Decode images", enabled=enabled):
        start, stop = int(offsets[place]), int(offsets[place + 1])
        try:
            with Image.open(io.BytesIO(encoded[start:stop].tobytes()), formats=["JPEG"]) as image:
                if image.size != (32, 32):
                    raise ValueError(f"its size is {image.size[0]} x {image.size[1]}, not 32 x 32")
                out[place] = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        except (OSError, ValueError, SyntaxError) as error:
            what = f"image {place} is no JPEG that can be decoded ({' '.join(str(error).split())})"
            raise wrong(path, start, what, _CUT) from error


def check_offsets(offsets: np.ndarray, count: int, size: int, path: Path) -> np.ndarray:
    """Offsets of ``count`` pieces laid end to end in ``size`` bytes: count + 1 numbers from 0 to size, rising."""
    whole = len(offsets) == count + 1 and offsets[0] == 0 and offsets[-1] == size
    if not whole or (np.diff(offsets.astype(np.int64)) <= 0).any():
        raise wrong(path, 0, f"expected {count + 1:,} rising offsets from 0 to {size:,}; got {len(offsets):,} others")
    return offsets
