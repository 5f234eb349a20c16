"""CIFAR-10's "python version", read without Python's own loader: the stream is taken apart as data and nothing in it is run.

The files are streams of one-byte instructions for a small stack machine. Python's loader lets such a stream import and call
anything. The machine here knows the instructions that these files consist of; the three names that they mention stand for
themselves, are compared with a list and never looked up; any other instruction or name ends the reading with an error.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fisherlens.errors import FileFormatError
from fisherlens.training.formats import check_labels, wrong

_ARRAY, _DTYPE = "numpy.core.multiarray _reconstruct", "numpy dtype"
_NAMES = (_ARRAY, "numpy ndarray", _DTYPE)
_REMEDY = 'Only files of CIFAR-10\'s "python version" are read here, as its authors made them.'


@dataclass(frozen=True)
class _Name:
    """A name in the stream; it stands for itself."""

    text: str


@dataclass
class _Made:
    """What the stream says is made by calling a name: kept as the name, its arguments and its state."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


class _Mark:
    """The beginning of a list of items on the stack."""


class _Machine:
    """Reads one stream; :meth:`run` returns the object that it describes, made of dicts, lists, tuples, numbers, bytes and _Made."""

    def __init__(self, content: bytes, path: Path):
        self.content, self.path, self.at = content, path, 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.content):
            raise wrong(self.path, len(self.content), "the stream ends within an instruction", "The file is cut short.")
        self.at += count
        return self.content[self.at - count : self.at]

    def number(self, form: str) -> int:
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return value

    def line(self) -> str:
        end = self.content.find(b"\n", self.at)
        text = self.take((end if end >= 0 else len(self.content)) + 1 - self.at)
        return text[:-1].decode("latin-1")

    def items(self) -> list[Any]:
        """What lies above the last mark; the mark goes too."""
        place = max(k for k, entry in enumerate(self.stack) if isinstance(entry, _Mark))
        found = self.stack[place + 1 :]
        del self.stack[place:]
        return found

    def name(self) -> _Name:
        start = self.at - 1
        text = f"{self.line()} {self.line()}"
        if text not in _NAMES:
            raise wrong(
                self.path, start, f"the stream names {text!r}, which no data file needs; nothing was run", _REMEDY
            )
        return _Name(text)

    def call(self) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        self.stack.append(_Made(_checked(name, _Name).text, _checked(arguments, tuple)))

    def build(self) -> None:
        state = self.stack.pop()
        _checked(self.stack[-1], _Made).state = state

    def put_all(self, pairs: list[Any]) -> None:
        _checked(self.stack[-1], dict).update(zip(pairs[::2], pairs[1::2], strict=True))

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def last(self, count: int) -> tuple[Any, ...]:
        found = tuple(self.stack[-count:])
        if len(found) < count:
            raise IndexError(count)
        del self.stack[-count:]
        return found

    def run(self) -> Any:
        while True:
            start, code = self.at, self.take(1)
            if code == b".":
                return self.stack.pop()
            if code not in _INSTRUCTIONS:
                raise wrong(
                    self.path, start, f"instruction 0x{code.hex()} belongs to no such file; nothing was run", _REMEDY
                )
            try:
                _INSTRUCTIONS[code](self)
            except (IndexError, KeyError, TypeError, ValueError) as error:
                what = f"instruction 0x{code.hex()} does not fit what stands before it"
                raise wrong(self.path, start, what, _REMEDY) from error


def _checked(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(type(value).__name__)
    return value


_INSTRUCTIONS: dict[bytes, Callable[[_Machine], object]] = {
    b"\x80": lambda m: m.take(1),  # the version of the protocol
    b"(": lambda m: m.push(_Mark()),
    b"}": lambda m: m.push({}),
    b"]": lambda m: m.push([]),
    b")": lambda m: m.push(()),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"J": lambda m: m.push(m.number("<i")),
    b"\x8a": lambda m: m.push(int.from_bytes(m.take(m.number("<B")), "little", signed=True)),
    b"U": lambda m: m.push(m.take(m.number("<B"))),
    b"T": lambda m: m.push(m.take(m.number("<I"))),
    b"X": lambda m: m.push(m.take(m.number("<I")).decode("utf-8")),
    b"q": lambda m: m.memo.__setitem__(m.number("<B"), m.stack[-1]),
    b"r": lambda m: m.memo.__setitem__(m.number("<I"), m.stack[-1]),
    b"h": lambda m: m.push(m.memo[m.number("<B")]),
    b"j": lambda m: m.push(m.memo[m.number("<I")]),
    b"t": lambda m: m.push(tuple(m.items())),
    b"\x85": lambda m: m.push(m.last(1)),
    b"\x86": lambda m: m.push(m.last(2)),
    b"\x87": lambda m: m.push(m.last(3)),
    b"a": lambda m: _checked(m.stack[-2], list).append(m.stack.pop()),
    b"e": lambda m: (lambda found: _checked(m.stack[-1], list).extend(found))(m.items()),
    b"s": lambda m: m.put_all(list(m.last(2))),
    b"u": lambda m: m.put_all(m.items()),
    b"c": lambda m: m.push(m.name()),
    b"R": lambda m: m.call(),
    b"b": lambda m: m.build(),
}


def read_cifar_python(content: bytes, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels ``(N,)`` and images ``(N, 3, 32, 32)`` of a file of CIFAR-10's python version, whose stream is read and not run.

    Raises
    ------
    FileFormatError: any instruction or name that these files do not consist of, or a content that is not theirs; with the offset.
    """
    found = _Machine(content, path).run()
    try:
        labels = np.array(_checked(found[b"labels"], list))
        pixels = _pixels(found[b"data"])
        if labels.shape != (len(pixels),) or labels.dtype.kind != "i" or not len(labels):
            raise ValueError("labels and images do not belong together")
    except FileFormatError:
        raise
    except (KeyError, TypeError, ValueError, IndexError) as error:
        what = "expected a dict of 'labels' (a list of integers) and 'data' (an array of N x 3,072 bytes)"
        raise wrong(path, 0, what, _REMEDY) from error
    return check_labels(labels, path, first=0, stride=0), pixels


def _pixels(array: Any) -> np.ndarray:
    """The images in what the stream says about an array of bytes: (version, shape, dtype, order, entries)."""
    _, shape, dtype, fortran, raw = _checked(_checked(array, _Made).state, tuple)
    if (
        array.name != _ARRAY
        or _checked(dtype, _Made).name != _DTYPE
        or dtype.arguments[0] != b"u1"
        or fortran is not False
    ):
        raise ValueError("not an array of unsigned bytes in row order")
    return np.frombuffer(_checked(raw, bytes), np.uint8).reshape(shape[0], 3072).reshape(-1, 3, 32, 32)
