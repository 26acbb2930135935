"""The record of an unfinished conversion: what it is made from, and which folders are finished.

```
DIR/conversion.json                        what is converted, and the command that finishes it
DIR/conversion/<name>.<precision>.json     one finished folder each
```
Both are removed when elastic.json has been written.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from elastic_jax.checkpoint_format import (
    EXECUTABLES,
    JOURNAL,
    MANIFEST,
    PLANS,
    TOKENIZER,
    WEIGHTS,
    Folder,
    FolderName,
)
from elastic_jax.checkpoint_io import PARTIAL, sync, write_json
from elastic_jax.errors import ConversionError

RECORDS = "conversion"


@dataclasses.dataclass(frozen=True)
class Record:
    """A finished folder.

    Attributes:
        folder: what it holds.
        source_sha256: weight -> sha256 of its encoded bytes in the source.
    """

    folder: Folder
    source_sha256: Mapping[str, str]


class Journal:
    """The journal of one destination, which must be locked."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self, identity: Mapping[str, Any], finish: Mapping[str, Any], *, overwrite: bool) -> None:
        """Starts a conversion, or continues the one that is there.

        Args:
            identity: everything that decides what the files will be.
            finish: the command line that finishes the conversion: `arguments` before and `options` after DIR.
            overwrite: starts from nothing, whatever is there.

        Raises:
            ConversionError: an unfinished conversion of another source or with other options is there.
        """
        existing = None if overwrite else self._existing()
        if existing is None:
            # In this order: until the manifest is removed the old checkpoint is whole, from then on this is unfinished.
            shutil.rmtree(self._path / RECORDS, ignore_errors=True)
            write_json(self._path / JOURNAL, {"identity": dict(identity), "finish": dict(finish)})
            (self._path / MANIFEST).unlink(missing_ok=True)
            sync(self._path)
        elif different := sorted(
            key for key in identity.keys() | existing.keys() if identity.get(key) != existing.get(key)
        ):
            changes = "; ".join(f"{key} was {existing.get(key)!r}, now {identity.get(key)!r}" for key in different)
            raise ConversionError(
                f"{self._path} is an unfinished conversion of something else ({changes}): "
                "continue with the same source, options and versions, choose another folder, or start it anew with "
                "--overwrite"
            )
        (self._path / RECORDS).mkdir(exist_ok=True)
        self._clean()

    def add(self, name: FolderName, record: Record) -> None:
        """Notes a folder as finished."""
        values = {"folder": record.folder.to_json(), "source_sha256": dict(record.source_sha256)}
        write_json(self._path / RECORDS / f"{'.'.join(name)}.json", values)

    def finished(self) -> dict[FolderName, Record]:
        """Finished folders whose files still have the sizes they were written with."""
        records = {}
        for path in sorted((self._path / RECORDS).glob("*.json")):
            name, _, precision = path.stem.rpartition(".")
            values = json.loads(path.read_text("utf-8"))
            record = Record(Folder.from_json(values["folder"]), values["source_sha256"])
            folder = self._path / WEIGHTS / name / precision
            if all(_has_size(folder / file, described.size) for file, described in record.folder.files.items()):
                records[name, precision] = record
        return records

    def end(self) -> None:
        """Removes the journal: the manifest has been written."""
        (self._path / JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(self._path / RECORDS, ignore_errors=True)
        sync(self._path)

    def _existing(self) -> dict[str, Any] | None:
        try:
            return json.loads((self._path / JOURNAL).read_text("utf-8"))["identity"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            raise ConversionError(f"{self._path / JOURNAL} is damaged: start anew with --overwrite") from None

    def _clean(self) -> None:
        """Removes what no record vouches for: interrupted writes, and an overwritten checkpoint's files."""
        finished = self.finished()
        for leftover in (PLANS, TOKENIZER, EXECUTABLES):
            shutil.rmtree(self._path / leftover, ignore_errors=True)
        for folder in self._path.glob(f"{WEIGHTS}/*/*"):
            if (folder.parent.name, folder.name) not in finished:
                shutil.rmtree(folder)
        for partial in self._path.glob(f"*{PARTIAL}"):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        for partial in self._path.glob(f"{RECORDS}/*{PARTIAL}"):
            partial.unlink()


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a folder against other conversions; a killed process lets go of it.

    Raises:
        ConversionError: another process holds it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConversionError(f"another process is converting into {path}: wait for it, or end it") from None
        yield
    finally:
        os.close(descriptor)
