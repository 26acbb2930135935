"""Tiny sources: Hugging Face folders made of random weights, as many layers and files as a test wants."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from converters.conversion import convert
from converters.names import PARTS
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.config import ModelConfig

CONFIG: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}

MODEL = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_ids=(2,),
    pad_token_id=None,
)


@pytest.fixture
def config() -> dict[str, Any]:
    """A config.json that may be changed."""
    return json.loads(json.dumps(CONFIG))


@pytest.fixture
def model() -> ModelConfig:
    """What CONFIG means."""
    return MODEL


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    """Random bfloat16 weights of CONFIG under their Hugging Face names; may be changed."""
    rng = np.random.default_rng(0)
    shapes = {
        part.hugging_face.format(layer): part.shape(MODEL)
        for part in PARTS
        for layer in (range(MODEL.num_layers) if "{}" in part.name else (None,))
    }
    return {
        name: rng.standard_normal(shape, dtype=np.float32).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()
    }


type WriteFolder = Callable[..., Path]


@pytest.fixture
def write_folder(tmp_path: Path) -> WriteFolder:
    """Writes a Hugging Face folder with one file of weights, or several."""

    def write(
        config: Mapping[str, Any], weights: Mapping[str, np.ndarray], *, name: str = "source", shards: int = 1
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.json").write_text("{}")
        if shards == 1:
            save_file(dict(weights), folder / "model.safetensors")
            return folder
        weight_map = {}
        for number in range(shards):
            file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
            part = dict(list(weights.items())[number::shards])
            save_file(part, folder / file)
            weight_map |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    return write


type Convert = Callable[..., Checkpoint]


@pytest.fixture
def convert_to() -> Convert:
    """`convert` with what most tests ask for."""

    def run(source: Path | str, destination: Path, **changes: Any) -> Checkpoint:
        options: dict[str, Any] = {"only": None, "overwrite": False, "revision": None, "token": None, "workers": 2}
        return convert(source, destination, **(options | {"progress": None} | changes))

    return run
