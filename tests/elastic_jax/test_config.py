import dataclasses
import json
import math
from typing import Any

import pytest
from tiny import MISTRAL_SMALL

from elastic_jax.config import ModelConfig
from elastic_jax.errors import ConfigError

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
)


def change(**changes: Any) -> ModelConfig:
    return dataclasses.replace(MISTRAL_SMALL, **changes)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_are_positive(name, value):
    value = float(value) if name in ("rms_norm_eps", "rope_theta") else value
    with pytest.raises(ConfigError, match=rf"{name} must be positive and finite, found {value}"):
        change(**{name: value})


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
def test_sizes_are_finite(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be positive and finite, found {value}"):
        change(**{name: value})


def test_key_and_value_heads_divide_the_query_heads():
    with pytest.raises(ConfigError, match=r"num_kv_heads \(5\) must divide num_heads \(32\)"):
        change(num_kv_heads=5)


def test_rotary_embedding_needs_pairs():
    with pytest.raises(ConfigError, match="head_dim must be even for rotary embedding, found 127"):
        change(head_dim=127)


def test_heads_may_be_wider_than_the_residual_stream():
    # Mistral-Small: 32 heads of 128 are 4096, and the residual stream is 5120.
    assert MISTRAL_SMALL.q_size == 4096
    assert MISTRAL_SMALL.kv_size == 1024


def test_json_round_trip():
    config = change(eos_token_ids=(2, 7), bos_token_id=None, pad_token_id=None)
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_unknown_and_missing_keys_are_named():
    values = MISTRAL_SMALL.to_json()
    del values["rope_theta"]
    values["sliding_window"] = 4096
    with pytest.raises(ConfigError, match=r"missing keys \['rope_theta'\], unknown keys \['sliding_window'\]"):
        ModelConfig.from_json(values)


def test_nothing_has_a_default():
    assert all(field.default is dataclasses.MISSING for field in dataclasses.fields(ModelConfig))
    with pytest.raises(TypeError, match="vocab_size"):
        ModelConfig()  # pyright: ignore[reportCallIssue]


def test_digest_is_the_same_in_every_version_and_process():
    # Stored in manifests: changing it makes every existing store unusable, and must be on purpose.
    assert MISTRAL_SMALL.digest() == "b5fcbcb234e1a86c5ee0347d1650f4885d7b070adbf0b3e45c24c2a84c7f4768"


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ModelConfig)])
def test_digest_covers_every_field(name):
    value: Any = getattr(MISTRAL_SMALL, name)
    if isinstance(value, bool):
        changed: Any = not value
    elif isinstance(value, tuple):
        changed = (*value, 3)
    else:
        changed = value * 2
    assert change(**{name: changed}).digest() != MISTRAL_SMALL.digest()


def test_digest_survives_json():
    assert ModelConfig.from_json(MISTRAL_SMALL.to_json()).digest() == MISTRAL_SMALL.digest()
