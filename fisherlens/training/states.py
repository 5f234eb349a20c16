"""Nested states of tensors, numbers and text as one file: written whole or not at all, read back to the bit, and never run.

A file is a line with the sha256 of everything behind it, the length of a JSON text, that text, and the bytes of the arrays. The text
describes the containers; nothing in it is looked up or called.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherlens.errors import FileFormatError
from fisherlens.results.seal import replacing

_HEAD = b"fisherlens-state 1 "
_DIGEST = 64
_CONTAINERS: dict[str, Any] = {"dict": dict, "ordered": OrderedDict, "counter": Counter}
_DAMAGED = (
    "{path} is damaged: {what}. A disk or transfer error changed it, or another program wrote into it. Remove the file: what it holds "
    "is then computed again."
)


class NotStorableError(TypeError):
    """A state holds an object that is no tensor, number, text or container of them."""


def write_state(path: Path, state: Any) -> None:
    """Write a nested state so that the file takes its name only when all of it is on disk.

    Raises
    ------
    NotStorableError: something in the state has no form in a file. Nothing is written then.
    """
    content = dumps(state)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_state(path: Path) -> Any:
    """Read what :func:`write_state` wrote; tensors are on the CPU.

    Raises
    ------
    FileFormatError: a changed, missing or added byte.
    """
    content = path.read_bytes()
    start = len(_HEAD) + _DIGEST + 1
    if not content.startswith(_HEAD) or len(content) < start:
        raise FileFormatError(_DAMAGED.format(path=path, what="it does not start as a file of stored runs"))
    if hashlib.sha256(content[start:]).hexdigest().encode() != content[len(_HEAD) : start - 1]:
        raise FileFormatError(_DAMAGED.format(path=path, what="its content does not have the sha256 that was recorded"))
    return _loads(memoryview(content)[start:])


def dumps(state: Any) -> bytes:
    """The bytes of a file."""
    arrays: list[np.ndarray] = []
    text = json.dumps(_described(state, arrays)).encode()
    body = b"".join([len(text).to_bytes(8, "little"), text, *(array.tobytes() for array in arrays)])
    return _HEAD + hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def pack(tensor: Tensor) -> tuple[str, tuple[int, ...], np.ndarray]:
    """A tensor of any strided dtype as (name of the dtype, shape, bytes)."""
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise NotStorableError(f"a tensor of layout {tensor.layout} and dtype {tensor.dtype}")
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    raw = plain.view(torch.uint8).numpy() if plain.numel() else np.zeros(0, np.uint8)
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), raw


def unpack(dtype: str, shape: tuple[int, ...], raw: np.ndarray) -> Tensor:
    """What :func:`pack` took apart, on the CPU and in memory of its own."""
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise TypeError(f"{dtype!r} is no dtype of torch")
    if not raw.size:
        return torch.empty(shape, dtype=kind, device="cpu")
    return torch.from_numpy(raw.copy()).view(kind).reshape(shape)


def _described(value: Any, arrays: list[np.ndarray]) -> Any:
    """What JSON can hold of a value; its arrays go into the list."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        dtype, shape, raw = pack(value)
        arrays.append(raw)
        return {"tensor": dtype, "shape": list(shape), "bytes": int(raw.nbytes)}
    if isinstance(value, np.ndarray) and value.dtype.kind in "iufb":
        arrays.append(np.ascontiguousarray(value))
        return {"array": value.dtype.str, "shape": list(value.shape), "bytes": int(value.nbytes)}
    if type(value) is list:
        return [_described(entry, arrays) for entry in value]
    if isinstance(value, tuple) and type(value) in (tuple, torch.Size):
        return {"tuple": [_described(entry, arrays) for entry in value]}
    for name, kind in _CONTAINERS.items():
        if type(value) is kind:
            return {name: [[_described(key, arrays), _described(entry, arrays)] for key, entry in value.items()]}
    raise NotStorableError(f"an object of type {type(value).__name__}")


def _loads(content: memoryview) -> Any:
    length = int.from_bytes(content[:8], "little")
    at = 8 + length

    def take(count: int) -> np.ndarray:
        nonlocal at
        at += count
        return np.frombuffer(content[at - count : at], np.uint8) if count else np.zeros(0, np.uint8)

    def built(value: Any) -> Any:  # arrays follow in the order in which they were described
        if isinstance(value, list):
            return [built(entry) for entry in value]
        if not isinstance(value, Mapping):
            return value
        if "tensor" in value:
            return unpack(value["tensor"], tuple(value["shape"]), take(value["bytes"]))
        if "array" in value:
            return take(value["bytes"]).view(np.dtype(value["array"])).reshape(value["shape"]).copy()
        ((name, entries),) = value.items()
        if name == "tuple":
            return tuple(built(entry) for entry in entries)
        return _CONTAINERS[name]({built(key): built(entry) for key, entry in entries})

    return built(json.loads(bytes(content[8:at])))
