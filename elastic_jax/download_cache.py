"""What elastic-jax keeps in its own cache: the demo's model and checkpoint, and executables for the Hub's.

Only what this project writes there is listed, so only that can be removed: the cache may be a folder of the user's
(`ELASTIC_JAX_CACHE`) that holds other things too. Downloads of the Hub's client are in its own cache (`hf cache ls`).
"""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from elastic_jax.checkpoint_format import MANIFEST
from elastic_jax.demo_model import SMOLLM2
from elastic_jax.errors import ElasticError

COMPILED = "compiled"
"""Folder of executables for repositories: `compiled/<owner--name>/<commit>`."""

type Kind = Literal["model", "checkpoint", "executables"]


class CacheError(ElasticError):
    """What was named is not in the cache."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One thing in the cache that can be removed alone.

    Attributes:
        name: its path below the cache; what `remove` takes.
        kind: what it is.
        nbytes: bytes of its files.
    """

    name: str
    kind: Kind
    nbytes: int


def entries(cache: Path) -> list[Entry]:
    """Everything in the cache, by name; nothing if there is no cache.

    Raises:
        OSError: it cannot be read.
    """
    if not cache.is_dir():
        return []
    found: list[tuple[Path, Kind]] = []
    for path in cache.iterdir():
        if path.is_symlink():
            continue  # what it leads to is somebody else's
        if path.name == SMOLLM2.file_name:
            found.append((path, "model"))
        elif (path / MANIFEST).is_file():
            found.append((path, "checkpoint"))
        elif path.name == COMPILED and path.is_dir():
            found.extend((commit, "executables") for commit in path.glob("*/*") if commit.is_dir())
    return sorted(
        (Entry(path.relative_to(cache).as_posix(), kind, _size(path)) for path, kind in found), key=lambda e: e.name
    )


def remove(cache: Path, names: Sequence[str]) -> list[Entry]:
    """Removes entries; all of them, or none if one is not there.

    Returns:
        what was removed.

    Raises:
        CacheError: no entry has one of the names.
        OSError: something cannot be removed.
    """
    known = {entry.name: entry for entry in entries(cache)}
    if unknown := [name for name in names if name not in known]:
        raise CacheError(f"{cache} holds no entry {unknown[0]!r}; `elastic-jax cache ls` lists them: {list(known)}")
    removed = [known[name] for name in dict.fromkeys(names)]
    for entry in removed:
        path = cache / entry.name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        if entry.kind == "executables" and not any(path.parent.iterdir()):
            path.parent.rmdir()
    return removed


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
