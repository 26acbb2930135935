"""The tiny models of tests/fixtures: converted once, compiled once per mode, and steps for them made by hand."""

import dataclasses
import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

import converters
from aot_cache.store import Executable
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.config import ModelConfig
from elastic_jax.executables import ModeStore
from elastic_jax.frontier import FRONTIER, Frontier, Point
from elastic_jax.plan import Plan
from elastic_jax.runner import Runner
from elastic_jax.step import Bucket, ComputeDtype, StepConfig, StepInputs
from elastic_jax.weights import Weights, load_weights

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
TINY_MODELS = ("tiny_mistral", "tiny_llama")

MISTRAL_SMALL = ModelConfig(
    vocab_size=131072,
    hidden_size=5120,
    intermediate_size=32768,
    num_layers=40,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=1e9,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_ids=(2,),
    pad_token_id=11,
)
"""The shape of Mistral-Small-3.1-24B's language model."""


def tiny_step_config(**changes: Any) -> StepConfig:
    """Small sizes with every kind of bucket; float32 unless told otherwise."""
    sizes: dict[str, Any] = {
        "rows": 4,
        "page_size": 16,
        "kv_slots": 1024,
        "max_context": 256,
        "top_n": 8,
        "max_bias": 8,
        "dtype": "float32",
        "buckets": (Bucket(1, 0), Bucket(4, 0), Bucket(0, 16), Bucket(0, 64), Bucket(4, 16)),
        "attention": "xla",
        "dot": "xla",
        "decode": "xla",
        "sampling": "xla",
        "kv": "full",
    }
    return StepConfig(**(sizes | changes))


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """One test process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def tiny_checkpoint(folder: Path, name: str) -> Checkpoint:
    """A tiny model as an Elastic checkpoint below `folder`, shared by all test processes: do not change it."""
    with exclusive(folder / f"{name}.lock"):
        return converters.convert(
            FIXTURES / name,
            folder / f"{name}.elastic",
            only=None,
            overwrite=False,
            revision=None,
            token=None,
            workers=2,
            progress=None,
        )


def write_frontier(folder: Path) -> None:
    """Gives a checkpoint the frontier of a search that found its modes XL and S."""
    checkpoint = Checkpoint.open(folder)
    points = [
        Point(mode, checkpoint.plan(mode).choices, seconds, {}, 1 << 20, {"prompt": kl, "generated": kl}, {}, {})
        for mode, seconds, kl in (("XL", 2.0, 0.0), ("S", 1.0, 0.01))
    ]
    found = Frontier(points, {}, {"device": "a device", "costs_measured": False})
    (folder / FRONTIER).write_text(json.dumps(found.to_json()))


@dataclasses.dataclass(frozen=True)
class CompiledTiny:
    """One mode of a tiny model, compiled into its checkpoint; `ElasticMistral.load(checkpoint.path, mode)` works."""

    checkpoint: Checkpoint
    plan: Plan
    step: StepConfig
    units: Mapping[str, Executable]
    weights: Weights

    @property
    def config(self) -> ModelConfig:
        return self.checkpoint.config

    def runner(self) -> Runner:
        """A runner with fresh state; the units and weights are shared."""
        return Runner(self.config, self.step, self.units, self.weights, jax.devices()[0])


def compile_tiny(folder: Path, name: str, mode: str, dtype: ComputeDtype) -> CompiledTiny:
    """Compiles a mode for `tiny_step_config(dtype=dtype)`, unless another test process has."""
    checkpoint = tiny_checkpoint(folder, name)
    plan, step, device = checkpoint.plan(mode), tiny_step_config(dtype=dtype), jax.devices()[0]
    store = ModeStore(checkpoint, plan, dtype, device)
    with exclusive(folder / f"{name}.{mode}.{dtype}.lock"):
        store.compile(step, workers=2, progress=lambda *_: None)
    units = store.load(step, trust=False, workers=2, preload=False)
    weights = load_weights(checkpoint, plan, dtype, device, workers=2, progress=None)
    return CompiledTiny(checkpoint, plan, step, units, weights)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a sequence lives: its row, and the pages of its context in order."""

    row: int
    pages: tuple[int, ...]

    def slots(self, start: int, count: int, page_size: int) -> list[int]:
        """KV slots of `count` positions from `start` on."""
        return [self.pages[p // page_size] * page_size + p % page_size for p in range(start, start + count)]


@dataclasses.dataclass(frozen=True)
class Generated:
    """One generated token: the row's last one, at the position that the row's state says."""

    place: Place
    position: int


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive prompt tokens of one sequence, the first at `start`; `output` asks for the last one's logits."""

    place: Place
    tokens: Sequence[int]
    start: int
    output: bool = True


def step_inputs(
    bucket: Bucket, step: StepConfig, *, generated: Sequence[Generated] = (), chunks: Sequence[Chunk] = ()
) -> StepInputs:
    """Packs tokens into a bucket and pads the rest. Outputs: the generated tokens first, then each wanted chunk's."""
    rows, size = step.rows, step.page_size
    row = np.full(bucket.tokens, rows, np.int32)
    slot = np.full(bucket.tokens, step.kv_slots, np.int32)
    token, position = np.zeros(bucket.prompt, np.int32), np.zeros(bucket.prompt, np.int32)
    table, length = np.zeros((rows, step.pages), np.int32), np.zeros(rows, np.int32)
    out = []

    def place(where: Place, context: int) -> None:
        table[where.row, : len(where.pages)] = where.pages
        length[where.row] = context

    for i, one in enumerate(generated):
        row[i], slot[i] = one.place.row, one.place.slots(one.position, 1, size)[0]
        place(one.place, one.position + 1)
        out.append(i)
    at = bucket.generated
    for chunk in chunks:
        count = len(chunk.tokens)
        here, prompt = slice(at, at + count), slice(at - bucket.generated, at - bucket.generated + count)
        row[here], slot[here] = chunk.place.row, chunk.place.slots(chunk.start, count, size)
        token[prompt], position[prompt] = chunk.tokens, np.arange(chunk.start, chunk.start + count)
        place(chunk.place, chunk.start + count)
        at += count
        if chunk.output:
            out.append(at - 1)
    out_index = np.full(bucket.outputs(rows), bucket.tokens, np.int32)
    out_index[: len(out)] = out
    return StepInputs(token, position, row, slot, table, length, out_index)
