"""The code blocks of the documentation: which there are, and how each is run. Standard library only.

A fence names its language. `python` and `bash` blocks are run; `text`, `json` and `{...}` (Sphinx's directives) are no
code. An HTML comment in the line before a fence says what is special:

    <!-- not run: needs an NVIDIA GPU -->     never run; the reason must be one of REASONS
    <!-- run: fresh (it installs) -->         run in a fresh environment alone (scripts/new_user.py)
"""

import dataclasses
import re
from pathlib import Path

REASONS = ("needs an NVIDIA GPU", "needs Docker", "needs a Hub account", "is run by", "takes hours")
"""Why a block may not be run."""

CODE = ("python", "bash")
NO_CODE = ("text", "json", "toml", "dockerfile")

_NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.+?) -->")
_FRESH = re.compile(r"<!-- run: fresh\b.*?-->")
_FENCE = re.compile(r"^(?P<indent> *)```+(?P<language>\S*)")


class BlockError(ValueError):
    """A block of the documentation that says of itself what is not known."""


@dataclasses.dataclass(frozen=True)
class Block:
    """One block of code.

    Attributes:
        where: `page:line`.
        language: `python` or `bash`.
        text: the code.
        fresh: whether it is run in a fresh environment alone.
        not_run: why it is never run; None if it is.
    """

    where: str
    language: str
    text: str
    fresh: bool
    not_run: str | None

    @property
    def shell(self) -> str:
        """The block as part of a shell script; a block of Python is a process of its own."""
        if self.language == "bash":
            return self.text
        return f"python - <<'END-OF-BLOCK'\n{self.text}\nEND-OF-BLOCK"


def blocks_of(page: Path) -> list[Block]:
    """The code blocks of a page in their order.

    Raises:
        BlockError: a fence has no known language, a mark has no known reason, or a fence is not closed.
    """
    lines = page.read_text("utf-8").splitlines()
    found: list[Block] = []
    at = 0
    while at < len(lines):
        fence = _FENCE.match(lines[at])
        if fence is None:
            at += 1
            continue
        where = f"{page.name}:{at + 1}"
        closing = fence[0].removesuffix(fence["language"])
        end = next((i for i in range(at + 1, len(lines)) if lines[i] == closing), None)
        if end is None:
            raise BlockError(f"{where}: this fence is not closed")
        language = fence["language"]
        if language in CODE:
            text = "\n".join(line.removeprefix(fence["indent"]) for line in lines[at + 1 : end])
            found.append(_block(where, language, text, lines[at - 1] if at else ""))
        elif language not in NO_CODE and not language.startswith("{"):
            raise BlockError(f"{where}: a fence must be one of {(*CODE, *NO_CODE)}, found {language!r}")
        at = end + 1
    return found


def _block(where: str, language: str, text: str, before: str) -> Block:
    marked = _NOT_RUN.search(before)
    reason = marked["reason"] if marked else None
    if reason is not None and not reason.startswith(REASONS):
        raise BlockError(f"{where}: a block may be left out for one of {REASONS}, found {reason!r}")
    return Block(where, language, text, _FRESH.search(before) is not None, reason)
