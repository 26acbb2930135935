"""Links that make sense in a checkout, on the site: a page's source may link files that are no pages.

README.md's sections are pages of their own here; any other file of the repository is shown by its name.
"""

import re
from pathlib import PurePosixPath
from typing import Any

from sphinx.application import Sphinx

_LINK = re.compile(r"\[(?P<text>[^\]\[]*)\]\((?P<path>\.\./[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")

_README_SECTIONS = {"#finding-plans": "finding-plans.md", "": "index.md"}
"""Anchor in README.md -> the page that tells the same; every other one is of the measurements."""


def on_source(app: Sphinx, page: str, content: list[str]) -> None:
    """Sphinx's event `source-read`."""
    del app, page
    content[0] = _on_the_site(content[0])


def on_included(app: Sphinx, path: Any, page: str, content: list[str]) -> None:
    """Sphinx's event `include-read`: README.md links pages as `docs/NAME.md`."""
    del app, path, page
    content[0] = _on_the_site(content[0].replace("](docs/", "]("))


def _on_the_site(text: str) -> str:
    return _LINK.sub(_replacement, text).replace("](search.md", "](finding-plans.md")


def _replacement(link: re.Match[str]) -> str:
    path = PurePosixPath(link["path"].removeprefix("../"))
    anchor = link["anchor"] or ""
    if str(path) == "README.md":
        return f"[{link['text']}]({_README_SECTIONS.get(anchor, f'benchmarks.md{anchor}')})"
    named = path.name == link["text"].strip("`/")
    return f"`{path}`" if named else f"{link['text']} (`{path}`)"


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", on_source)
    app.connect("include-read", on_included)
    return {"parallel_read_safe": True}
