"""The few HTML elements that the page is made of; everything that comes from data is escaped here."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

_UNIT = re.compile(r"(?<=[\d⁰¹²³⁴⁵⁶⁷⁸⁹]) (?=(?:nat|%|×|s|min|times|λ)\b|%|×)")
_INDEX = re.compile(r"\b(F)_(b|ii|ij|jj)\b")
_CODE, _STRONG = re.compile(r"`([^`]+)`"), re.compile(r"\*\*(.+?)\*\*")


@dataclass(frozen=True)
class Figure:
    """A drawn picture with its size in CSS pixels."""

    name: str
    png: bytes
    width: int
    height: int


@dataclass
class Section:
    """One question of the page: its answer in a sentence or two, and what shows it."""

    key: str
    title: str
    question: str
    headline: str = ""
    body: list[str] = field(default_factory=list)

    def add(self, *pieces: str) -> None:
        """Append finished HTML, leaving out what is empty."""
        self.body += [piece for piece in pieces if piece]


def text(words: object) -> str:
    """Escape, then turn ``**strong**`` and ```code``` into elements."""
    safe = _UNIT.sub(
        "\u00a0", html.escape(str(words), quote=False).replace(" = ", "\u00a0=\u00a0")
    )  # a number and its unit stay on one line
    safe = _INDEX.sub(r"\1<sub>\2</sub>", _CODE.sub(r"<code>\1</code>", safe))
    return _STRONG.sub(r"<strong>\1</strong>", safe)


def paragraph(*sentences: str, kind: str = "") -> str:
    """One paragraph; empty sentences are left out."""
    words = " ".join(sentence for sentence in sentences if sentence)
    return f"<p{_class(kind)}>{text(words)}</p>" if words else ""


def heading(words: str, level: int = 3) -> str:
    """A heading inside a section."""
    return f"<h{level}>{text(words)}</h{level}>"


def bullets(items: Sequence[str], kind: str = "") -> str:
    """An unordered list."""
    return f"<ul{_class(kind)}>{''.join(f'<li>{text(item)}</li>' for item in items if item)}</ul>"


def terms(pairs: Sequence[tuple[str, str]]) -> str:
    """A list of words and what they mean here."""
    return f"<dl>{''.join(f'<dt>{text(word)}</dt><dd>{text(meaning)}</dd>' for word, meaning in pairs)}</dl>"


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, *, words: int = 1, strong: Sequence[int] = ()
) -> str:
    """A table: the first ``words`` columns hold words, the others numbers; rows of ``strong`` stand out.

    A head or cell may hold a line break, written as a newline.
    """
    if not rows:
        return ""

    def cell(value: str, column: int, tag: str, scope: str = "") -> str:
        kind = "" if column < words else ' class="n"'
        return f"<{tag}{scope}{kind}>{text(value).replace(chr(10), '<br>')}</{tag}>"

    top = "".join(cell(value, column, "th", ' scope="col"') for column, value in enumerate(head))
    lines = []
    for place, row in enumerate(rows):
        cells = "".join(
            cell(v, c, "th" if c == 0 else "td", ' scope="row"' if c == 0 else "") for c, v in enumerate(row)
        )
        lines.append(f"<tr{_class('strong' if place in strong else '')}>{cells}</tr>")
    body = f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<figure class="table"><div class="scroll">{body}</div><figcaption>{text(caption)}</figcaption></figure>'


def figure(picture: Figure | None, caption: str, alt: str = "") -> str:
    """A figure with its caption, the picture inlined; nothing where there is no picture."""
    if picture is None:
        return ""
    data = base64.b64encode(picture.png).decode("ascii")
    label = html.escape(alt or caption.replace("**", "").replace("`", ""), quote=True)
    return (
        f'<figure id="{picture.name}"><img src="data:image/png;base64,{data}" width="{picture.width}" '
        f'height="{picture.height}" alt="{label}"><figcaption>{text(caption)}</figcaption></figure>'
    )


def note(words: str, kind: str = "note") -> str:
    """A boxed remark: ``note``, ``warning`` or ``missing``."""
    return f'<div class="{kind}">{text(words)}</div>' if words else ""


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
