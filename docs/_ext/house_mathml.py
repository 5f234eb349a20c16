"""Write formulae as MathML, which browsers show by themselves: no script from elsewhere, no TeX on the machine that builds."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

# What docutils' translation from TeX does not know or sets badly, each in terms of what it does.
_REPLACED = [
    (re.compile(r"\\dots(?![a-zA-Z])"), r"\\ldots"),
    (re.compile(r"\\[td]?frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\[Bb]igg?[lr]?(?![a-zA-Z])"), ""),  # fences grow by themselves
    # "log det F", not "logdetF"
    (re.compile(r"(\\(?:log|det|min|max|operatorname\{\w+\}))\s*(?=\\[a-z]|[A-Za-z])"), r"\1\\,"),
    # an index belongs beside a letter with a bar, not below it
    (re.compile(r"\\(bar|hat)\s*([A-Za-z])"), r"{\\\1 \2{}}"),
]
_LOGGER = logging.getLogger(__name__)


def _mathml(node: nodes.Element, *, block: bool) -> str:
    tex = node.astext()
    for pattern, replacement in _REPLACED:
        tex = pattern.sub(replacement, tex)
    try:
        return tex2mathml(tex, as_block=block)
    except Exception as error:  # docutils' own classes of errors differ between versions
        _LOGGER.warning("formula %r cannot be shown: %s", tex, error, location=node)
        return f"<code>{tex}</code>"


def _inline(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(_mathml(node, block=False))
    raise nodes.SkipNode


def _block(self: HTML5Translator, node: nodes.math_block) -> None:
    self.body.append(self.starttag(node, "div", CLASS="math notranslate nohighlight"))
    self.body.append(_mathml(node, block=True))
    self.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
