"""What names a repository of the Hugging Face Hub. Apart, so that loading a folder imports no Hub client."""

import re
from pathlib import Path

from elastic_jax.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Whether a text has the form `owner/name`; whether there is such a repository is another question."""
    return _HUB_ID.fullmatch(name) is not None


def is_remote(path: str | Path) -> bool:
    """Whether a checkpoint's name means a repository. What exists locally is never looked for on the Hub."""
    return isinstance(path, str) and not Path(path).exists() and is_hub_id(path)


def refuse_revision(path: str | Path, revision: str | None) -> None:
    """For what is no repository: only those have revisions.

    Raises:
        CheckpointError: one was asked for.
    """
    if revision is not None:
        raise CheckpointError(f"revision {revision!r} was asked for, but {path} is no Hub id: leave it out")
