"""What every section asks of the results: stages, facts, and what went wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fisherlens.report import findings
from fisherlens.report.elements import Figure, figure, note

if TYPE_CHECKING:
    import xarray as xr

_WHEN = {"start": "at the start", "middle": "in the middle", "end": "at the end"}


class View:
    """The results of one report with its figures."""

    def __init__(self, tree: xr.DataTree, pictures: Mapping[str, Figure]):
        self.tree, self.pictures = tree, pictures
        self.facts: dict[str, Any] = dict(tree.attrs)
        self.stages = findings.stages_of(tree)
        self.key = self.node("key_numbers")

    def node(self, name: str) -> xr.Dataset | None:
        """A result, or None where it is missing."""
        return findings.node(self.tree, name)

    @property
    def last(self) -> str:
        """The stage that sentences speak of."""
        return self.stages[-1]

    @property
    def trained(self) -> bool:
        """Whether the report trained the network."""
        return self.facts.get("trained") == "yes"

    def when(self, stage: str) -> str:
        """``at the end``; ``here`` for a network that was not trained."""
        return _WHEN.get(stage, "here")

    def head(self, words: str, stage: str) -> str:
        """A column's head, with the stage in a line of its own where there are several."""
        return f"{words}\n{stage}" if len(self.stages) > 1 else words

    def at(self, stage: str) -> str:
        """``, end`` behind a caption's words; nothing where there is one stage only."""
        return f", {stage}" if len(self.stages) > 1 else ""

    def known(self, result: xr.Dataset | None) -> list[str]:
        """Stages for which a result is there, in order."""
        return [] if result is None else [stage for stage in self.stages if stage in result.stage.values]

    def number(self, name: str, stage: str | None = None) -> float:
        """A key number, NaN where it is missing."""
        if self.key is None or name not in self.key:
            return float("nan")
        found = self.key[name]
        return float(found.sel(stage=stage) if stage is not None else found)

    def latest(self, name: str) -> str | None:
        """The last stage for which a key number is known; None for one that belongs to no stage, or is not known at all."""
        if self.key is None or name not in self.key or "stage" not in self.key[name].dims:
            return None
        return next(
            (stage for stage in reversed(self.stages) if self.number(name, stage) == self.number(name, stage)),
            self.last,
        )

    def picture(self, name: str, caption: str) -> str:
        """A figure with its caption, or nothing."""
        return figure(self.pictures.get(name), caption)

    def troubles(self, *tasks: str) -> str:
        """Boxes that say which of these tasks failed, were left out or came with a caveat."""
        return "".join(note(words, kind) for words, kind in self.entries(*tasks))

    def entries(self, *tasks: str) -> list[tuple[str, str]]:
        """What the log says of tasks whose name starts with one of these, each text once: ``(words, kind of box)``."""
        log = self.node("log")
        if log is None:
            return []
        found: dict[tuple[str, str], list[str]] = {}
        for task, stage, outcome, message in zip(
            *(log[name].values for name in ("task", "stage", "outcome", "message")), strict=True
        ):
            if outcome == "done" or not str(task).startswith(tasks):
                continue
            kind = {"caveat": "caveat", "left out": "note"}.get(str(outcome), "missing")
            ended = {
                "caveat": "a caveat",
                "failed": "not available",
                "interrupted": "interrupted",
                "left out": "left out",
            }[str(outcome)]
            words = f"**{str(task).capitalize()}: {ended}**{{stages}}. {_sentence(str(message))}".strip()
            found.setdefault((words, kind), []).append(str(stage))
        boxes = []
        for (words, kind), stages in found.items():
            named = [stage for stage in dict.fromkeys(stages) if stage in _WHEN]
            boxes.append(
                (words.replace("{stages}", f" ({', '.join(named)})" if named and len(self.stages) > 1 else ""), kind)
            )
        return boxes


def _sentence(message: str) -> str:
    """A capital in front and a full stop behind."""
    message = message[:1].upper() + message[1:]
    return message if not message or message.endswith((".", "!", "?", "…")) else f"{message}."
