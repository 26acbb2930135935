"""Docstrings write code in single backquotes, as Markdown does; for Sphinx they become reStructuredText's literals."""

import re
from typing import Any

from sphinx.application import Sphinx

_SPAN = re.compile(r"(?<![`:\w])`([^`]+)`(?!`)(?=(\w?))")

_STAR = re.compile(r"(?<=\S)( *)\*")
"""An asterisk that begins no list: it is a product, or the mark before keyword arguments."""

_BEFORE_NAPOLEON = 400


def on_docstring(app: Sphinx, what: str, name: str, target: Any, options: Any, lines: list[str]) -> None:
    """Sphinx's event `autodoc-process-docstring`."""
    del app, what, name, target, options
    text = _STAR.sub(r"\1\\*", "\n".join(lines))
    text = _SPAN.sub(lambda match: f"``{_plain(match[1])}``" + ("\\ " if match[2] else ""), text)
    lines[:] = text.split("\n")


def _plain(code: str) -> str:
    return code.replace("\\*", "*")


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", on_docstring, priority=_BEFORE_NAPOLEON)
    return {"parallel_read_safe": True}
