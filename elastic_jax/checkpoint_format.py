"""What an Elastic checkpoint's files are called and what elastic.json says: the format, and no reading of weights."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Self

import jax
import numpy as np

from elastic_jax.config import ModelConfig
from elastic_jax.errors import CheckpointError, ConfigError
from elastic_jax.groups import model_groups
from elastic_jax.plan import PRECISIONS

FORMAT_VERSION = 1
"""Raised by every change that an older reader would misread."""

MANIFEST = "elastic.json"
"""Written last: a folder that has it holds a complete checkpoint."""

JOURNAL = "conversion.json"
"""Written first and removed last: a folder that has it, and no manifest, is an unfinished conversion."""

WEIGHTS, PLANS, TOKENIZER, EXECUTABLES = "weights", "plans", "tokenizer", "executables"

EMBEDDING, NORMS = "embedding", "norms"
"""The two folders that are no group: they are never quantized, and every plan reads them."""

type FolderName = tuple[str, str]
"""What is stored (a group, `embedding` or `norms`) and its precision: names the folder `weights/<name>/<precision>`."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One stored array.

    Attributes:
        shape: its sizes.
        dtype: its NumPy or ml_dtypes name.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the array in memory."""
        return int(np.prod(self.shape, dtype=np.int64)) * jax.numpy.dtype(self.dtype).itemsize

    @property
    def struct(self) -> jax.ShapeDtypeStruct:
        """The leaf as JAX describes an array that is not there."""
        return jax.ShapeDtypeStruct(self.shape, jax.numpy.dtype(self.dtype))


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """What one file must be.

    Attributes:
        size: in bytes.
        sha256: of its content, in hexadecimal.
    """

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Folder:
    """One Orbax checkpoint: the arrays of one group in one precision.

    Attributes:
        bits: width of one weight.
        group_size: weights along the contracting dimension that share a scale; None without scales.
        leaves: array name -> what it is.
        files: path below the folder -> what it must be.
    """

    bits: int
    group_size: int | None
    leaves: Mapping[str, Leaf]
    files: Mapping[str, FileRecord]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays in memory."""
        return sum(leaf.nbytes for leaf in self.leaves.values())

    def to_json(self) -> dict[str, Any]:
        """The folder as JSON-ready values."""
        return dataclasses.asdict(self) | {
            "leaves": {name: {"shape": list(leaf.shape), "dtype": leaf.dtype} for name, leaf in self.leaves.items()},
            "files": {path: dataclasses.asdict(record) for path, record in sorted(self.files.items())},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Reads what `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        leaves = {k: Leaf(tuple(int(n) for n in v["shape"]), str(v["dtype"])) for k, v in values["leaves"].items()}
        group_size = values["group_size"]
        return cls(
            int(values["bits"]), None if group_size is None else int(group_size), leaves, read_files(values["files"])
        )


def read_files(values: Mapping[str, Any]) -> dict[str, FileRecord]:
    """Reads a table of files, whose paths must stay below the folder they are in.

    Raises:
        KeyError, TypeError, ValueError: it is something else, or a path leads out.
    """
    for path in values:
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise ValueError(f"the path {path!r} leads out of its folder")
    return {path: FileRecord(int(record["size"]), str(record["sha256"])) for path, record in values.items()}


def expected_folder(
    config: ModelConfig, name: str, precision: str, *, blocks: int, files: Mapping[str, FileRecord]
) -> Folder:
    """What a folder of this format must hold.

    Args:
        config: the model.
        name: a group, `embedding` or `norms`.
        precision: `bf16` or `int8`.
        blocks: scales along the contracting dimension; 1 is one scale an output channel. Not used by `bf16`.
        files: goes into the answer.

    Raises:
        CheckpointError: the format has no such folder.
    """
    group = model_groups(config).get(name)
    if precision == "bf16" and name == NORMS:
        stacked = Leaf((config.num_layers, config.hidden_size), "bfloat16")
        leaves = {"attention": stacked, "mlp": stacked, "final": Leaf((config.hidden_size,), "bfloat16")}
        return Folder(16, None, leaves, files)
    if precision == "bf16" and name == EMBEDDING:
        return Folder(16, None, {"values": Leaf((config.vocab_size, config.hidden_size), "bfloat16")}, files)
    if group is None or precision not in PRECISIONS:
        raise CheckpointError(f"an Elastic checkpoint of this model has no folder {WEIGHTS}/{name}/{precision}")
    shape = (group.out_size, group.in_size)
    if precision == "bf16":
        return Folder(16, None, {"values": Leaf(shape, "bfloat16")}, files)
    if blocks < 1 or group.in_size % blocks:
        raise CheckpointError(f"{WEIGHTS}/{name}/{precision}: {blocks} blocks do not divide {group.in_size} columns")
    leaves = {"values": Leaf(shape, "int8"), "scales": Leaf((group.out_size, blocks), "float32")}
    return Folder(8, group.in_size // blocks, leaves, files)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """elastic.json. It holds no time, host or absolute path, so that equal sources give equal files.

    Attributes:
        config: the model.
        folders: every stored folder.
        tokenizer: file name below `tokenizer/` -> what it must be.
        source: what the weights were converted from.
        versions: tool -> version that wrote the checkpoint.
    """

    config: ModelConfig
    folders: Mapping[FolderName, Folder]
    tokenizer: Mapping[str, FileRecord]
    source: Mapping[str, Any]
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON-ready values."""
        weights: dict[str, dict[str, Any]] = {}
        for (name, precision), folder in self.folders.items():
            weights.setdefault(name, {})[precision] = folder.to_json()
        return {
            "format": FORMAT_VERSION,
            "config": self.config.to_json(),
            "total_bytes": sum(record.size for folder in self.folders.values() for record in folder.files.values()),
            "source": dict(self.source),
            "versions": dict(self.versions),
            "tokenizer": {name: dataclasses.asdict(record) for name, record in sorted(self.tokenizer.items())},
            "weights": weights,
        }

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads elastic.json.

        Raises:
            CheckpointError: the file cannot be read, is no manifest, or is of another format version.
        """
        try:
            values = json.loads(path.read_text("utf-8"))
            version = values["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is not the manifest of an Elastic checkpoint, or is damaged ({error!r}): copy the checkpoint "
                "again, or convert its source again with --overwrite"
            ) from None
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: format version {version!r}, but this elastic-jax reads version {FORMAT_VERSION}: "
                "install the elastic-jax that wrote it, or convert the source again"
            )
        try:
            config = ModelConfig.from_json(values["config"])
            folders = {
                (name, precision): Folder.from_json(folder)
                for name, precisions in values["weights"].items()
                for precision, folder in precisions.items()
            }
            manifest = cls(config, folders, read_files(values["tokenizer"]), values["source"], values["versions"])
        except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
            raise CheckpointError(f"{path} is damaged: {error!r}; convert the source again with --overwrite") from None
        manifest._check(path)
        return manifest

    def _check(self, path: Path) -> None:
        for (name, precision), folder in self.folders.items():
            scales = folder.leaves.get("scales")
            blocks = scales.shape[-1] if scales is not None and scales.shape else 1
            expected = expected_folder(self.config, name, precision, blocks=blocks, files=folder.files)
            if folder != expected:
                raise CheckpointError(
                    f"{path}: {WEIGHTS}/{name}/{precision} should be {_describe(expected)}, found {_describe(folder)}"
                )


def _describe(folder: Folder) -> str:
    leaves = ", ".join(f"{name} {leaf.dtype}{list(leaf.shape)}" for name, leaf in folder.leaves.items())
    return f"{folder.bits} bits, group size {folder.group_size}, {leaves}"
