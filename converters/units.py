"""What is converted at once: the weights that are read together and the folders they become."""

import dataclasses
import math
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np

from converters.names import GROUP_PARTS
from converters.quantize import quantize_int8
from converters.source import NonFiniteError, Source
from elastic_jax.checkpoint_format import EMBEDDING, NORMS, FolderName, expected_folder
from elastic_jax.config import ModelConfig
from elastic_jax.groups import LM_HEAD, model_groups
from elastic_jax.plan import PRECISIONS, Precision

type Arrays = dict[str, np.ndarray]
"""The leaves of one folder by name."""


@dataclasses.dataclass(frozen=True)
class Fused:
    """One array and the parts whose rows follow each other in it.

    Attributes:
        name: in the folder.
        parts: names in converters.names.
        vector: whether it is one part, stored without the dimension of rows.
    """

    name: str
    parts: tuple[str, ...]
    vector: bool


@dataclasses.dataclass(frozen=True)
class Unit:
    """One piece of work.

    Attributes:
        name: shown in progress.
        leaves: the bfloat16 arrays to read.
        folders: what they become.
    """

    name: str
    leaves: tuple[Fused, ...]
    folders: tuple[FolderName, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        """Every weight that is read."""
        return tuple(part for leaf in self.leaves for part in leaf.parts)

    def input_bytes(self, source: Source) -> int:
        """Encoded bytes that are read."""
        return sum(source.tensors[part].nbytes for part in self.parts)

    def output_bytes(self, config: ModelConfig) -> int:
        """Bytes of the arrays that are written."""
        return sum(expected_folder(config, *folder, blocks=1, files={}).nbytes for folder in self.folders)

    def memory_bytes(self, source: Source) -> int:
        """Bytes of the arrays that are in memory together: the weights in bfloat16, and one folder made of them."""
        weights = sum(2 * math.prod(source.tensors[part].shape) for part in self.parts)
        return weights + weights // 2


def conversion_units(config: ModelConfig, only: Precision | None) -> Iterator[Unit]:
    """The whole conversion, in the order the model computes; a tied head is made from the embedding, in int8 alone."""
    precisions = PRECISIONS if only is None else (only,)
    tied = config.tie_word_embeddings
    from_embedding = ((LM_HEAD, "int8"),) if tied and "int8" in precisions else ()
    yield Unit(EMBEDDING, (Fused("values", ("embedding",), False),), ((EMBEDDING, "bf16"), *from_embedding))
    layers = range(config.num_layers)
    norms = (
        Fused("attention", tuple(f"layers.{i}.attention_norm" for i in layers), False),
        Fused("mlp", tuple(f"layers.{i}.mlp_norm" for i in layers), False),
        Fused("final", ("final_norm",), True),
    )
    yield Unit(NORMS, norms, ((NORMS, "bf16"),))
    for name, group in model_groups(config).items():
        if name == LM_HEAD and tied:
            continue
        prefix = name.removesuffix(group.kind)
        parts = tuple(prefix + part for part in GROUP_PARTS.get(group.kind, (group.kind,)))
        yield Unit(name, (Fused("values", parts, False),), tuple((name, precision) for precision in precisions))


def read_unit(unit: Unit, source: Source, progress: Callable[[int], None]) -> tuple[Arrays, dict[str, str]]:
    """Reads the arrays of a unit.

    Returns:
        The bfloat16 arrays by name, and the sha256 of each weight's encoded bytes by the weight's name.

    Raises:
        NonFiniteError: a weight is infinite or not a number; every such weight of the unit is named.
        ConversionError: a file cannot be read.
    """
    arrays, digests, bad = {}, {}, []
    for leaf in unit.leaves:
        tensors = [source.tensors[part] for part in leaf.parts]
        out = np.empty((sum(tensor.rows for tensor in tensors), tensors[0].shape[-1]), ml_dtypes.bfloat16)
        start = 0
        for part, tensor in zip(leaf.parts, tensors, strict=True):
            try:
                digests[part] = tensor.read(out[start : start + tensor.rows], progress)
            except NonFiniteError as error:
                bad.append(str(error))
            start += tensor.rows
        arrays[leaf.name] = out[0] if leaf.vector else out
    if bad:
        raise NonFiniteError("; ".join(bad))
    return arrays, digests


def folder_arrays(folder: FolderName, arrays: Arrays) -> Arrays:
    """The leaves of one of the unit's folders."""
    if folder[1] == "bf16":
        return arrays
    values, scales = quantize_int8(arrays["values"])
    return {"values": values, "scales": scales}
