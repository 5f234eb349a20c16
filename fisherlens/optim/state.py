"""The state of a method: enough to continue bit by bit, and refused where it belongs to something else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fisherlens.errors import InputError
from fisherlens.layout import Layout
from fisherlens.optim import texts
from fisherlens.optim.averages import Averages
from fisherlens.optim.groups import OPTIONS, Membership
from fisherlens.optim.tap import ScoreTap

# Entries that older states lack: there was one group then, and options and blocks are taken to be those of now.
_LATER = ("groups", "seed", "settings", "blocks")


class StoredState(torch.optim.Optimizer, ABC):
    """State dicts of a method, which gives and takes what is its own (:meth:`_state`, :meth:`_load_state`)."""

    meanings: tuple[str, ...] = ()  # attributes on which it depends what stored tensors mean
    name: str
    layout: Layout
    diagnostics: dict[str, int]
    seed: int
    _parameters: list[nn.Parameter]
    _membership: Membership
    _generator: torch.Generator
    _drawn: Tensor
    _tap: ScoreTap
    _previous: Tensor | None
    _home: str

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """Tensors, numbers and dicts that :meth:`_load_state` takes."""

    @abstractmethod
    def _load_state(self, state: Mapping[str, Any]) -> None:
        """Take a state after checking that it fits."""

    @abstractmethod
    def _clear(self) -> None:
        """Forget what backward passes have brought."""

    @abstractmethod
    def _schedule(self) -> None:
        """Decide whether the coming step takes statistics in."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state, enough to continue bit by bit: tensors (not copied), numbers and names only."""
        return {**super().state_dict(), "fisherlens": self._own_state()}

    def _own_state(self) -> dict[str, Any]:
        return {
            "method": self.name,
            "parameters": {p.name: list(p.shape) for p in self.layout.parameters},
            "groups": self._membership.names,
            "settings": {name: getattr(self, name) for name in self.meanings},
            "seed": self.seed,
            "diagnostics": dict(self.diagnostics),
            "generator": self._generator.get_state(),
            "maps": dict(self._tap.maps),
            "previous": self._previous,
            **self._state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state of the same method, model and parameter groups, copying its tensors; another one is an InputError."""
        own = state_dict.get("fisherlens", {}) if isinstance(state_dict, Mapping) else {}
        self._require_fit(own)
        self._require_entries(state_dict, ("state", "param_groups"), "the state dict")
        for k, group in enumerate(state_dict["param_groups"]):
            self._require_entries(group, [x for x in OPTIONS if x in self.defaults], f"parameter group {k}")
        like = self._parameters[0]

        def copied(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.detach().to(like.device, like.dtype, copy=True)
            if isinstance(value, Mapping):
                return {key: copied(entry) for key, entry in value.items()}
            return [copied(entry) for entry in value] if isinstance(value, list) else value

        maps = {name: None if shape is None else tuple(shape) for name, shape in own["maps"].items()}
        try:
            self._load_state(copied({**own, "maps": maps, "generator": None}))
        except KeyError as missing:
            what = f"it has no entry {missing} where one is needed"
            raise InputError(texts.OLD_STATE.format(name=self.name, what=what)) from None
        self._clear()
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "fisherlens"})
        self._tap.maps = maps
        self.seed = own.get("seed", self.seed)
        self._home = f"{like.dtype} on {like.device}"
        self._previous = copied(own["previous"])
        self.diagnostics = dict(own["diagnostics"])
        self._generator.set_state(own["generator"].cpu())
        self._drawn = self._generator.get_state()
        self._schedule()

    def _require_fit(self, own: Mapping[str, Any]) -> None:
        """Refuse the state of another method, model, or division into groups."""
        if own.get("method") != self.name:
            got = repr(own["method"]) if "method" in own else "an optimizer of another library"
            raise InputError(texts.OTHER_STATE.format(name=self.name, got=got))
        known = [name for name in self._own_state() if name not in _LATER]
        self._require_entries(own, known, "the state")
        expected = {p.name: list(p.shape) for p in self.layout.parameters}
        if list(own["parameters"].items()) != list(expected.items()):
            differ = sorted(set(map(str, own["parameters"].items())) ^ set(map(str, expected.items())))
            what = f"parameters differ, such as {differ[0]}" if differ else "its parameters stand in another order"
            raise InputError(texts.OTHER_MODEL.format(name=self.name, what=what))
        for option, theirs in own.get("settings", {}).items():
            mine = getattr(self, option, None)
            if theirs != mine:
                what = f"{option} is {theirs!r} there and {mine!r} here"
                raise InputError(texts.OTHER_MODEL.format(name=self.name, what=what))
        saved = own.get("groups", [list(expected)])
        for k in range(max(len(saved), len(self._membership.names))):
            theirs, mine = ((x[k] if k < len(x) else None) for x in (saved, self._membership.names))
            if theirs != mine:
                what = f"parameter group {k} holds {theirs or 'nothing'} there and {mine or 'nothing'} here"
                raise InputError(texts.OTHER_MODEL.format(name=self.name, what=what))

    def _require_entries(self, found: Any, wanted: Iterable[str], where: str) -> None:
        """Refuse what lacks entries that this version writes: a missing weight of an average would make it infinite."""
        missing = [name for name in wanted if not isinstance(found, Mapping) or name not in found]
        if missing:
            what = f"{where} has no entry {missing[0]!r}" + (f" (nor {missing[1:]})" if missing[1:] else "")
            raise InputError(texts.OLD_STATE.format(name=self.name, what=what))

    def _restore(self, own: Sequence[Averages], saved: Sequence[Mapping[str, Any]], what: str) -> None:
        """Take saved averages, once all shapes are seen to agree."""
        for one, values in zip(own, saved, strict=False):
            self._require_entries(values, one.state(), "an average")
        theirs = [{k: tuple(v.shape) for k, v in one.items() if isinstance(v, Tensor)} for one in saved]
        mine = [one.shapes() for one in own]
        if theirs != mine:
            differ = next(
                (pair for pair in zip(theirs, mine, strict=False) if pair[0] != pair[1]), (len(theirs), len(mine))
            )
            text = f"its averages have shapes {differ[0]} where those of {what} have {differ[1]}"
            raise InputError(texts.OTHER_MODEL.format(name=self.name, what=text))
        for one, values in zip(own, saved, strict=True):
            vars(one).update(values)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(texts.NO_COPY.format(name=self.name))
