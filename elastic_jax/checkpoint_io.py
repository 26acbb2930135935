"""Files that are whole or absent: everything goes to a temporary sibling, is flushed to the disk, and is renamed."""

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from elastic_jax.checkpoint_format import FileRecord
from elastic_jax.system_errors import about

PARTIAL = ".partial"
"""Suffix of what is being written; anything that has it was interrupted and may be deleted."""

_CHUNK_BYTES = 64 << 20
_CACHED_BYTES = 8 << 20
_READ_BYTES = 4 << 20


def sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def forget_pages(descriptor: int, offset: int, size: int) -> None:
    """Takes a large part of a file, once it is read or flushed, out of the page cache.

    A model is larger than memory: caching it would evict everything else. And writing into pages that were used before
    takes up to half of the system time off a conversion on a virtual machine (3.8 GB: 16 to 30 s before, 7 to 15 s
    after).
    Small parts stay, so that a small model is loaded from memory right after its conversion.
    """
    if size >= _CACHED_BYTES and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)


def write_file(path: Path, content: bytes) -> FileRecord:
    """Writes a file atomically.

    Raises:
        OSError: it cannot be written; nothing is left of it then, and what was there before is.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with about(path, instead_of=partial), partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())


def write_json(path: Path, values: Any) -> FileRecord:
    """Writes JSON atomically, with a stable layout."""
    return write_file(path, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())


def describe_file(path: Path) -> FileRecord:
    """Size and sha256 of a file; its content need not fit in memory."""
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return FileRecord(size, digest.hexdigest())


def describe_folder(path: Path) -> dict[str, FileRecord]:
    """Size and sha256 of every file below a folder, by relative path."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): describe_file(file) for file in files}


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder to fill; if nothing raises, it takes `path`'s place."""
    partial = path.with_name(path.name + PARTIAL)
    partial.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # on a full disk above all
        raise
    for entry in (*partial.rglob("*"), partial):
        sync(entry)
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)
    sync(path.parent)


def write_arrays(path: Path, leaves: Mapping[str, np.ndarray]) -> dict[str, FileRecord]:
    """Writes arrays as one Orbax checkpoint, atomically; equal arrays give equal files.

    Not compressed: int8 weights shrink by a tenth only, files would depend on the compressor's version, and reading
    them would cost more than it saves.

    Returns:
        Path below the folder -> size and sha256, read back from the files.
    """
    import orbax.checkpoint as ocp  # takes long, and nothing that loads a model writes arrays
    from etils import epath

    # Orbax's default, OCDBT, is slower here and names its files at random. The handler is used alone because the
    # checkpointer around it adds files with times in them; atomicity is new_folder's part.
    _silence_orbax()
    with new_folder(path) as partial:
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False, use_compression=False)
        try:
            save_args = {name: ocp.SaveArgs(chunk_byte_size=_chunk_bytes(leaf)) for name, leaf in leaves.items()}
            handler.save(epath.Path(partial), args=ocp.args.PyTreeSave(dict(leaves), save_args=save_args))
        finally:
            handler.close()
        files = describe_folder(partial)
        for name, record in files.items():
            with (partial / name).open("rb") as file:
                forget_pages(file.fileno(), 0, record.size)
        return files


@functools.cache
def _silence_orbax() -> None:
    """Orbax raises what went wrong in its threads, and prints it with a traceback before."""
    logging.getLogger("absl").addFilter(lambda record: "_SignalingThread.run() raised" not in str(record.msg))


def _chunk_bytes(array: np.ndarray) -> int | None:
    """Size of the files an array is split into, so that reading one needs little memory beside the array.

    Orbax splits dimensions by their divisors, and a dimension with few of them would become one file a row. So arrays
    are split only where halving works; others are one file.
    """
    halvings = max(0, -(-array.nbytes // _CHUNK_BYTES) - 1).bit_length()
    if halvings == 0 or any(size % (1 << halvings) for size in array.shape):
        return None
    return array.nbytes >> halvings
