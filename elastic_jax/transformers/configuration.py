"""A checkpoint's configuration in transformers' words."""

from typing import Any

from transformers import GenerationConfig, MistralConfig

from elastic_jax.checkpoint import Checkpoint


def model_config(checkpoint: Checkpoint, name: str) -> MistralConfig:
    """The model's shape as a `MistralConfig`, whatever the family it was published as.

    Args:
        checkpoint: whose.
        name: what it was loaded by.
    """
    values: dict[str, Any] = checkpoint.config.to_json()
    values |= {
        "num_attention_heads": values.pop("num_heads"),
        "num_key_value_heads": values.pop("num_kv_heads"),
        "num_hidden_layers": values.pop("num_layers"),
        "rope_parameters": {"rope_type": "default", "rope_theta": values.pop("rope_theta")},
        "eos_token_id": _one_or_more(values.pop("eos_token_ids")),
        "sliding_window": None,
        "name_or_path": name,
    }
    return MistralConfig(**values)


def generation_config(checkpoint: Checkpoint) -> GenerationConfig:
    """The model's own `GenerationConfig`; where it has none, the special tokens of its configuration."""
    if (checkpoint.tokenizer_path / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(str(checkpoint.tokenizer_path))
    config = checkpoint.config
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=_one_or_more(list(config.eos_token_ids)),
        pad_token_id=config.pad_token_id,
    )


def _one_or_more(ends: list[int]) -> int | list[int] | None:
    return ends[0] if len(ends) == 1 else ends or None
