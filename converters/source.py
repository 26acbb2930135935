"""A source of weights: tensors that can be read in blocks of rows, and everything else a checkpoint needs."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import BFloat16, Float, UInt8

from converters.names import list_names
from elastic_jax.checkpoint_io import forget_pages
from elastic_jax.config import ModelConfig
from elastic_jax.errors import ConversionError

_BLOCK_BYTES = 1 << 20  # a block and its temporaries stay in cache
_INFINITY = 0x7F80  # bfloat16's bits; with the sign removed, greater ones are no numbers
_SAMPLE_BYTES = 4096

type Decode = Callable[[UInt8[np.ndarray, "rows row_bytes"]], Float[np.ndarray, "rows columns"]]
"""Turns encoded rows into floats."""


class NonFiniteError(ConversionError):
    """A weight is infinite or not a number (or is, once rounded to bfloat16)."""


@dataclasses.dataclass(frozen=True)
class SourceTensor:
    """One weight in a file.

    Attributes:
        name: what the file calls it.
        path: the file.
        offset: of its first byte in the file.
        shape: its sizes, output dimension first; one or two.
        encoding: what the file calls its type.
        row_bytes: encoded bytes of one row.
        decode: turns encoded rows into floats.
        interleaved_heads: for query and key rows in GGUF's order: the number of heads. None where nothing is moved.
    """

    name: str
    path: Path
    offset: int
    shape: tuple[int, ...]
    encoding: str
    row_bytes: int
    decode: Decode
    interleaved_heads: int | None

    @property
    def rows(self) -> int:
        """Number of rows; a vector is one row."""
        return self.shape[0] if len(self.shape) == 2 else 1

    @property
    def nbytes(self) -> int:
        """Encoded bytes in the file."""
        return self.rows * self.row_bytes

    def read(self, out: BFloat16[np.ndarray, "rows columns"], progress: Callable[[int], None]) -> str:
        """Reads the weight, rounded to bfloat16.

        Args:
            out: is filled.
            progress: is told the encoded bytes of every block read.

        Returns:
            sha256 of the encoded bytes.

        Raises:
            ConversionError: the file ends early or cannot be read.
            NonFiniteError: a weight is infinite or not a number.
        """
        digest = hashlib.sha256()
        step = max(1, _BLOCK_BYTES // self.row_bytes)
        buffer = np.empty((min(step, self.rows), self.row_bytes), np.uint8)
        with _open(self.path) as descriptor:
            for start in range(0, self.rows, step):
                block = buffer[: min(step, self.rows - start)]
                self._fill(descriptor, self.offset + start * self.row_bytes, block)
                digest.update(block)
                rows = out[start : start + len(block)]
                with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found below
                    rows[...] = self.decode(block).astype(ml_dtypes.bfloat16)
                if np.max(rows.view(np.uint16) & 0x7FFF) >= _INFINITY:
                    row, column = np.argwhere(~np.isfinite(rows))[0]
                    raise NonFiniteError(f"{self.name} [{start + row}, {column}] is {rows[row, column]}")
                progress(block.nbytes)
            forget_pages(descriptor, self.offset, self.nbytes)
        if self.interleaved_heads is not None:
            out[...] = split_halves(out, self.interleaved_heads)
        return digest.hexdigest()

    def sha256(self) -> str:
        """sha256 of the encoded bytes."""
        digest = hashlib.sha256()
        buffer = np.empty(min(_BLOCK_BYTES, self.nbytes), np.uint8)
        with _open(self.path) as descriptor:
            for start in range(0, self.nbytes, _BLOCK_BYTES):
                block = buffer[: min(_BLOCK_BYTES, self.nbytes - start)]
                self._fill(descriptor, self.offset + start, block)
                digest.update(block)
        return digest.hexdigest()

    def samples(self) -> Iterator[bytes]:
        """The first, middle and last bytes: enough to tell two trainings of one model apart, at no cost."""
        size = min(_SAMPLE_BYTES, self.nbytes)
        buffer = np.empty((1, size), np.uint8)
        with _open(self.path) as descriptor:
            for offset in (0, (self.nbytes - size) // 2, self.nbytes - size):
                self._fill(descriptor, self.offset + offset, buffer)
                yield buffer.tobytes()

    def _fill(self, descriptor: int, offset: int, block: np.ndarray) -> None:
        view = memoryview(block).cast("B")
        while view:
            count = os.preadv(descriptor, [view], offset)
            if not count:
                raise ConversionError(f"{self.path} ends inside {self.name}: it is truncated; download it again")
            view, offset = view[count:], offset + count


class _open:
    """A file descriptor. Files are read by position, so threads share no state, and not mapped into memory: mapped
    pages would count as the process's own.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ConversionError(f"{path} cannot be read: {error.strerror}") from None

    def __enter__(self) -> int:
        return self._descriptor

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def split_halves(weight: BFloat16[np.ndarray, "rows columns"], heads: int) -> BFloat16[np.ndarray, "rows columns"]:
    """Undoes llama.cpp's order of query and key rows.

    Its rotary embedding turns neighbours (0, 1), (2, 3), ... of a head; Hugging Face's turns row i with row
    i + head_dim / 2. So the even rows of each head come first, then its odd rows.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file of weights.

    Attributes:
        name: without its folder.
        size: in bytes.
        header_sha256: of the part that names and places the tensors.
    """

    name: str
    size: int
    header_sha256: str


@dataclasses.dataclass(frozen=True)
class Source:
    """Everything a conversion reads; its headers have been checked.

    Attributes:
        kind: `safetensors` or `gguf`.
        location: the folder or file, for messages.
        repository: the Hub's `owner/name`, if it came from there.
        commit: of the repository.
        config: the model.
        tensors: name in converters.names -> weight.
        files: the files of weights.
        tokenizer: file name -> content.
    """

    kind: str
    location: str
    repository: str | None
    commit: str | None
    config: ModelConfig
    tensors: Mapping[str, SourceTensor]
    files: tuple[SourceFile, ...]
    tokenizer: Mapping[str, bytes]

    def describe(self) -> dict[str, object]:
        """What elastic.json says of the source; nothing of the machine it lay on."""
        return {
            "kind": self.kind,
            "repository": self.repository,
            "commit": self.commit,
            "files": [dataclasses.asdict(file) for file in self.files],
        }

    def fingerprint(self) -> str:
        """sha256 that tells this source from another, without reading all of it.

        Headers alone are equal for every training of one architecture, so bytes of each tensor are added. Reading
        every file first would nearly double the reading of a conversion; each tensor's full sha256 is made
        while it is converted, and elastic.json has them.
        """
        digest = hashlib.sha256(json.dumps([self.describe(), self.config.to_json()], sort_keys=True).encode())
        for name, content in sorted(self.tokenizer.items()):
            digest.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.encoding} {tensor.offset}\n".encode())
            for sample in tensor.samples():
                digest.update(sample)
        return digest.hexdigest()


def merge_tensors(files: Mapping[str, Mapping[str, SourceTensor]]) -> dict[str, SourceTensor]:
    """Joins the tensors of several files.

    Raises:
        ConversionError: two files hold the same tensor.
    """
    merged: dict[str, SourceTensor] = {}
    duplicates = []
    for file, tensors in files.items():
        for name, tensor in tensors.items():
            if name in merged:
                duplicates.append(f"{name} (in {merged[name].path.name} and {file})")
            merged[name] = tensor
    if duplicates:
        raise ConversionError(f"{len(duplicates)} tensors are stored twice: {list_names(duplicates)}")
    return merged
