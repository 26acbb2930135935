"""Elastic checkpoints with random weights, written by the code that writes real ones: for measuring how they load."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from elastic_jax.checkpoint import Checkpoint
from elastic_jax.checkpoint_format import (
    EMBEDDING,
    MANIFEST,
    NORMS,
    PLANS,
    TOKENIZER,
    WEIGHTS,
    FolderName,
    Manifest,
    expected_folder,
)
from elastic_jax.checkpoint_io import describe_folder, new_folder, write_arrays, write_json
from elastic_jax.config import ModelConfig
from elastic_jax.groups import LM_HEAD, model_groups
from elastic_jax.plan import Precision, provisional_plans

_SCALE = np.float32(0.02 / 37)
"""Weights of standard deviation 0.02: the int8 values' is 37."""

_BF16 = (np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32) * _SCALE).astype(ml_dtypes.bfloat16)
"""The bf16 weight of each int8 value, by its byte."""

_BLOCK = 1 << 22
"""Weights drawn at once, so that they stay in the processor's cache."""


def random_checkpoint(
    folder: Path, config: ModelConfig, precision: Precision, tokenizer: Path, *, seed: int, workers: int
) -> Checkpoint:
    """Writes a checkpoint that stores its groups in one precision; equal seeds give equal files.

    Args:
        folder: a new folder.
        config: the model.
        precision: of the groups; embedding and norms are always bf16.
        tokenizer: a folder of tokenizer files.
        seed: of all weights.
        workers: folders written at once; each needs its arrays in host memory.
    """
    folder.mkdir(parents=True)
    names: list[FolderName] = [(EMBEDDING, "bf16"), (NORMS, "bf16")]
    tied = config.tie_word_embeddings and precision == "bf16"
    names += [(group, precision) for group in model_groups(config) if not (tied and group == LM_HEAD)]

    def write(numbered: tuple[int, FolderName]) -> None:
        number, name = numbered
        leaves = expected_folder(config, *name, blocks=1, files={}).leaves
        rng = np.random.Generator(np.random.SFC64((seed, number)))
        arrays = {leaf: _draw(rng, leaf, described.struct) for leaf, described in leaves.items()}
        files = write_arrays(folder / WEIGHTS / Path(*name), arrays)
        written[name] = expected_folder(config, *name, blocks=1, files=files)

    written = {}
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(write, enumerate(names)))
    with new_folder(folder / TOKENIZER) as partial:
        for file in sorted(tokenizer.glob("*token*")):
            shutil.copyfile(file, partial / file.name)
        files = describe_folder(partial)
    with new_folder(folder / PLANS) as partial:
        for mode, plan in provisional_plans(config).items():
            write_json(partial / f"{mode}.json", plan.to_json())
    source = {"random weights": seed}
    manifest = Manifest(config, {name: written[name] for name in names}, files, source, {})
    write_json(folder / MANIFEST, manifest.to_json())
    return Checkpoint.open(folder)


def _draw(rng: np.random.Generator, leaf: str, struct: Any) -> np.ndarray:
    """Never zeros, which load and run like nothing real."""
    if leaf in ("attention", "mlp", "final"):
        return np.ones(struct.shape, struct.dtype)
    if leaf == "scales":
        return np.full(struct.shape, _SCALE, struct.dtype)
    values = np.empty(struct.shape, struct.dtype)
    flat = values.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        drawn = _int8(rng, block.size)
        block[...] = drawn if struct.dtype == np.int8 else _BF16[drawn.view(np.uint8)]
    return values


def _int8(rng: np.random.Generator, count: int) -> np.ndarray:
    """Uniform from -64 to 63: raw bits, because drawing is what takes the time."""
    words = rng.bit_generator.random_raw(-(-count // 8))
    return words.view(np.int8)[:count] >> 1
