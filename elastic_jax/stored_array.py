"""Arrays on disk, as `checkpoint_io.write_arrays` has Orbax store them, read straight into memory.

Orbax writes zarr (version 2): a folder with a description, `.zarray`, and one file a chunk. Without compression a chunk
is the bytes of a block of the array, so reading one is copying a file to its place. Orbax itself stays far below the
page cache's speed, because every byte passes through several fresh buffers. It reads the same arrays from the same
files, and a test says so.
"""

import dataclasses
import itertools
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from elastic_jax.errors import CheckpointError

_PIECE_BYTES = 8 << 20
_DTYPES = {"|i1": np.dtype(np.int8), "<f4": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_EXPECTED = {"zarr_format": 2, "order": "C", "compressor": None, "filters": None, "dimension_separator": "."}

_scratch = threading.local()


class DamagedArrayError(CheckpointError):
    """An array on disk is not what it should be."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some lines of a chunk: a run of bytes in its file, and a block of the array.

    Attributes:
        file: the chunk's file.
        offset: of its first byte there.
        place: the block.
    """

    file: Path
    offset: int
    place: tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array on disk. Made by `open`.

    Attributes:
        path: its folder.
        shape: of the array.
        dtype: of the array.
        chunk: the shape of each chunk; divides `shape`.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]

    @classmethod
    def open(cls, path: Path, struct: jax.ShapeDtypeStruct) -> "StoredArray":
        """Reads the description alone.

        Args:
            path: the array's folder.
            struct: what it should hold.

        Raises:
            DamagedArrayError: there is no description, it is of another array, or of a layout that nothing here writes.
        """
        try:
            found = json.loads((path / ".zarray").read_bytes())
            shape, chunk = tuple(found["shape"]), tuple(found["chunks"])
            dtype = _DTYPES.get(found["dtype"])
            layout = {key: found[key] for key in _EXPECTED}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedArrayError(f"{path}: its .zarray cannot be read: {error!r}") from None
        if (shape, dtype) != (struct.shape, struct.dtype):
            raise DamagedArrayError(
                f"{path} should be {struct.dtype}{list(struct.shape)}, found {found['dtype']}{list(shape)}"
            )
        divides = len(chunk) == len(shape) and all(c and not s % c for s, c in zip(shape, chunk, strict=True))
        if layout != _EXPECTED or not divides:
            raise DamagedArrayError(f"{path}: .zarray describes a layout that elastic-jax does not write: {found}")
        return cls(path, shape, np.dtype(dtype), chunk)

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def pieces(self) -> Iterator[Piece]:
        """The whole array in pieces that can be read at the same time, each of a few megabytes."""
        line = math.prod(self.chunk[1:]) * self.dtype.itemsize
        lines = max(1, _PIECE_BYTES // line)
        for number in itertools.product(*(range(s // c) for s, c in zip(self.shape, self.chunk, strict=True))):
            file = self.path / ".".join(map(str, number))
            start = tuple(n * c for n, c in zip(number, self.chunk, strict=True))
            rest = tuple(slice(s, s + c) for s, c in zip(start[1:], self.chunk[1:], strict=True))
            for first in range(0, self.chunk[0], lines):
                last = min(first + lines, self.chunk[0])
                yield Piece(file, first * line, (slice(start[0] + first, start[0] + last), *rest))

    def read(self, piece: Piece, out: np.ndarray) -> None:
        """Reads one piece to its place.

        Args:
            piece: one of `pieces`.
            out: the array, [shape] of `dtype`, contiguous.

        Raises:
            DamagedArrayError: its file cannot be read, or is too short.
        """
        block = out[piece.place]
        # Chunks that are cut across their lines are strided in the array, and a file is not.
        target = block if block.flags.c_contiguous else _scratch_array(block.shape, block.dtype)
        _read_file(piece.file, piece.offset, memoryview(target.reshape(-1).view(np.uint8)))
        if target is not block:
            block[...] = target


def _scratch_array(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A thread's own memory, the same every time: touching new memory costs more than reading a cached file."""
    size = math.prod(shape) * dtype.itemsize
    if getattr(_scratch, "memory", np.empty(0)).size < size:
        _scratch.memory = np.empty(size, np.uint8)
    return _scratch.memory[:size].view(dtype).reshape(shape)


def _read_file(path: Path, offset: int, target: memoryview) -> None:
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < len(target):
                count = file.readinto(target[done:])
                if not count:
                    raise DamagedArrayError(f"{path} ends after {offset + done} bytes, before its last values")
                done += count
    except OSError as error:
        raise DamagedArrayError(f"{path} cannot be read: {error.strerror or error}") from None
