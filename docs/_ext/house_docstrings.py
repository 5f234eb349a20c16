"""Show the Returns and Raises sections of this project's docstrings as the sentences they are.

numpydoc reads each line of such a section as one entry, a type, unless an indented text follows it. Types stand in annotations here and
these sections hold prose, which is put together again and shown as one paragraph.
"""

from __future__ import annotations

from typing import Any

from numpydoc.docscrape_sphinx import SphinxDocString

_as_entries = SphinxDocString._str_returns


def _as_sentences(self: SphinxDocString, name: str = "Returns") -> list[str]:
    entries = self[name]
    if not entries or any(line.strip() for entry in entries for line in entry.desc):
        return _as_entries(self, name)
    lines = [" : ".join(filter(None, [entry.name, entry.type])) for entry in entries]
    return [*self._str_field_list(name), "", *self._str_indent(lines), ""]


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    SphinxDocString._str_returns = _as_sentences
    return {"parallel_read_safe": True, "parallel_write_safe": True}
