"""A folder that keeps every finished run of a comparison, so that the same call goes on where a killed one stopped."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fisherlens._version import __version__
from fisherlens.errors import FileFormatError, InputError
from fisherlens.results.seal import replacing, sweep
from fisherlens.training.base import Problem
from fisherlens.training.checkpoint import Checkpoint, not_kept
from fisherlens.training.jobs import Job
from fisherlens.training.record import Run, plain
from fisherlens.training.states import NotStorableError, dumps, read_state, write_state

_SETTINGS, _LOCK = "comparison.json", "lock"
_FACTS = ("optimizer", "seed", "options", "steps_taken", "diverged", "ended_by")
_MOST = 4  # differences that an error lists
_DIGITS = 16
_NOT_RUN = (
    "plots/",
    "report/",
    "cli/",
    "training/verify/",
    "training/monitor/",
    "training/adapters/",
)  # what training does not depend on
_OTHER = (
    "{path} holds runs of another comparison, with which these cannot be joined: {differences}. Repeat the call with the settings of before, "
    "or give resume= another folder."
)


class Store:
    """The folder of a comparison: its settings, a file for each finished run, and a checkpoint for each that is under way.

    Parameters
    ----------
    path
        The folder; missing ones are created.
    facts
        All that the runs depend on, nested dicts of numbers and text. A folder with others is refused.
    checkpoint_every
        Steps between checkpoints of a run; None stores finished runs only.
    """

    def __init__(self, path: str | os.PathLike[str], facts: Mapping[str, Any], checkpoint_every: int | None):
        self.path, self.every = Path(path), checkpoint_every
        self._lock = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.path)
            sweep(self.path)
            self._agree(plain(facts))
        except OSError as error:
            self.close()
            raise InputError(
                f"Cannot keep runs in {self.path}: {error.strerror or error}. resume= names a folder, which is created; choose another one."
            ) from error
        except BaseException:
            self.close()
            raise

    def _agree(self, facts: dict[str, Any]) -> None:
        """Write the settings, or compare them with those that are there."""
        target = self.path / _SETTINGS
        if not target.exists():
            others = sorted(entry.name for entry in self.path.iterdir() if entry.name != _LOCK)
            if others:
                raise InputError(
                    f"{self.path} holds {others[0]!r} and is not the folder of a comparison. Give resume= an empty or a new folder."
                )
            with replacing(target) as temporary, temporary.open("w", encoding="utf-8") as file:
                json.dump(facts, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            return
        try:
            known = json.loads(target.read_text(encoding="utf-8"))
        except ValueError as error:
            raise FileFormatError(
                f"{target} is damaged: {error}. It says which comparison the runs of this folder belong to; remove the folder to start again."
            ) from error
        differences = _differences(known, facts)
        if differences:
            more = f" and {len(differences) - _MOST} more" if len(differences) > _MOST else ""
            raise InputError(_OTHER.format(path=self.path, differences="; ".join(differences[:_MOST]) + more))

    def checkpoint(self, name: str) -> Checkpoint | None:
        """Where the run of this name is stored while it runs."""
        return None if self.every is None else Checkpoint(self.path / f"{name}.checkpoint", self.every)

    def get(self, job: Job) -> Run | None:
        """The finished run of a job, None where there is none."""
        path = self.path / f"{job.name}.run"
        if not path.exists():
            return None
        state = read_state(path)
        run = job.not_started()
        for name in _FACTS:
            setattr(run, name, state[name])
        run.metrics, run.interrupted = state["metrics"], False
        return run

    def put(self, job: Job, run: Run) -> None:
        """Keep a run that is finished, diverged ones included; its checkpoint goes. Where the disk refuses, a warning says so and the run goes on."""
        if run.interrupted:
            return
        try:
            write_state(self.path / f"{job.name}.run", {name: getattr(run, name) for name in (*_FACTS, "metrics")})
            if job.checkpoint is not None:
                job.checkpoint.drop()
        except OSError as error:
            not_kept(self.path, error)

    def close(self) -> None:
        """Let other processes use the folder."""
        if self._lock is not None:
            self._lock.close()


def _lock(folder: Path) -> Any:
    """Hold a lock that goes with the process, however it ends; None on systems without such locks."""
    try:
        import fcntl
    except ImportError:
        return None
    handle = (folder / _LOCK).open("a")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise InputError(
            f"Another process is working in {folder}. Wait for it, end it, or give resume= another folder."
        ) from None
    return handle


def _differences(known: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two nested facts, in words."""
    if isinstance(known, dict) and isinstance(now, dict):
        found = []
        for key in [*known, *(key for key in now if key not in known)]:
            inner = f"{name} {key}".strip()
            if key not in known or key not in now:
                found.append(f"{inner} is {'gone' if key in known else 'new'}")
            else:
                found += _differences(known[key], now[key], inner)
        return found
    if json.dumps(known) == json.dumps(now):
        return []
    if name.endswith("digest"):
        return [f"the {name.removesuffix(' digest')} differ"]
    return [f"{name} was {_short(known)} and is {_short(now)}"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:79] + "…"


# --- facts ----------------------------------------------------------------------------------------------------------


def facts_of(problem: Problem, model: nn.Module, optimizers: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return all that runs depend on; ``model`` is the network of the first seed, ``optimizers`` label → facts."""
    return {
        "fisherlens version": __version__,
        "files of fisherlens digest": _code_of_package(),
        "torch version": torch.__version__,
        "problem": problem.name,
        "likelihood": _object_facts(problem.likelihood),
        "training data digest": digest(problem.train),
        "test data digest": digest(problem.test),
        "network": repr(model),
        "classes of the network digest": _classes_digest(model),
        "initial weights digest": digest([*model.parameters(), *model.buffers()]),
        "device": str(next((p.device for p in model.parameters()), "cpu")),
        "order of optimizers": list(optimizers),
        "optimizer": dict(optimizers),
        **more,
    }


def optimizer_facts(entry: Any, made: tuple[Optimizer, Any]) -> dict[str, Any]:
    """Return what can be seen of an optimizer, its scheduler, and the function that makes them."""
    optimizer, scheduler = made
    groups = {
        str(place): {"parameters": sum(p.numel() for p in group["params"])}
        | {name: _simple(value) for name, value in group.items() if name != "params"}
        for place, group in enumerate(optimizer.param_groups)
    }
    found = {"class": type(optimizer).__qualname__, "group": groups, "options": _object_facts(optimizer)}
    found["function"] = _function_facts(entry)
    if scheduler is not None:
        found["scheduler"] = {"class": type(scheduler).__qualname__, "options": _object_facts(scheduler)}
    return found


def digest(tensors: Sequence[Tensor]) -> str:
    """The sha256 of tensors, shapes and dtypes included; its first digits."""
    found = hashlib.sha256()
    for tensor in tensors:
        try:
            found.update(dumps(tensor))
        except NotStorableError:
            found.update(repr(tensor).encode())
    return found.hexdigest()[:_DIGITS]


def _classes_digest(model: nn.Module) -> str:
    """The sha256 of what modules of classes outside torch do and hold: an edited forward pass shows in neither text nor weights."""
    found = hashlib.sha256()
    for name, module in model.named_modules():
        own = [kind for kind in type(module).__mro__ if kind.__module__.partition(".")[0] not in ("torch", "builtins")]
        if own:
            held = {k: _given(v) for k, v in sorted(vars(module).items()) if not k.startswith("_")}
            found.update(repr((name, held, [_members(kind) for kind in own])).encode())
    return found.hexdigest()[:_DIGITS]


@functools.cache
def _members(kind: type) -> list[tuple[str, str]]:
    """The functions of a class by name, with what they do."""
    plain = {name: getattr(value, "__func__", getattr(value, "fget", value)) for name, value in vars(kind).items()}
    return [(name, _code_digest(value.__code__)) for name, value in sorted(plain.items()) if hasattr(value, "__code__")]


@functools.cache
def _code_of_package() -> str:
    """The sha256 of the files of this package that runs depend on: a development copy changes without a new version."""
    root = Path(__file__).resolve().parents[1]
    found = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not name.startswith(_NOT_RUN):
            found.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:_DIGITS]


def _object_facts(value: Any) -> Any:
    """The class of an object and its public attributes, as far as they are numbers, text or tensors."""
    if isinstance(value, str):
        return value
    public = {
        k: _simple(v)
        for k, v in getattr(value, "__dict__", {}).items()
        if not k.startswith("_") and k not in ("defaults", "param_groups", "state")
    }
    return {"class": type(value).__qualname__} | public


def _simple(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return digest([value])
    if isinstance(value, list | tuple):
        return [_simple(entry) for entry in value]
    return value.__qualname__ if isinstance(value, type) else type(value).__qualname__


def _function_facts(entry: Any) -> Any:
    """The code of an entry and what it was given: an option that the optimizer does not show is seen here."""
    if isinstance(entry, functools.partial):
        given = {str(place): _given(value) for place, value in enumerate(entry.args)}
        given |= {name: _given(value) for name, value in entry.keywords.items()}
        return {"of": _function_facts(entry.func), "given": given}
    code = getattr(entry, "__code__", None)
    if code is None:  # a class, or an object that is called
        name = getattr(entry, "__qualname__", None)
        return name if name is not None else _object_facts(entry) | {"functions": dict(_members(type(entry)))}
    cells = []
    for cell in getattr(entry, "__closure__", None) or ():
        try:
            cells.append(_given(cell.cell_contents))
        except ValueError:  # not filled yet
            cells.append(None)
    defaults = [*(entry.__defaults__ or ()), *(entry.__kwdefaults__ or {}).values()]
    return {"code digest": _code_digest(code), "defaults": _simple(defaults), "around": cells}


def _given(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _given(entry) for name, entry in value.items()}
    if isinstance(value, functools.partial):
        return _function_facts(value)
    if hasattr(value, "__code__"):
        return _code_digest(value.__code__)
    return value.__qualname__ if hasattr(value, "__qualname__") else _simple(value)


def _code_digest(code: Any) -> str:
    """The sha256 of what a function does; names of files and places in them do not matter."""
    inner = []
    for one in code.co_consts:
        if hasattr(one, "co_code"):
            inner.append(_code_digest(one))
        else:  # the order of a set changes from process to process
            inner.append(repr(sorted(map(repr, one)) if isinstance(one, frozenset) else one))
    text = repr((code.co_code, inner, code.co_names))
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
