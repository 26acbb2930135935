"""The shape of a Mistral-architecture model: everything about it that decides what is computed."""

import dataclasses
import hashlib
import json
import math
from typing import Any, Self

from elastic_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Hyper-parameters of one model. There are no defaults: a converter reads every one from its source.

    Attributes:
        vocab_size: rows of the embedding and of the language-model head.
        hidden_size: width of the residual stream.
        intermediate_size: width of the SwiGLU MLP.
        num_layers: transformer blocks.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides `num_heads`.
        head_dim: width of one head; need not be `hidden_size / num_heads`.
        rms_norm_eps: added to the mean square in RMSNorm.
        rope_theta: base of the rotary embedding's frequencies.
        max_position_embeddings: longest context the model was made for, in tokens.
        tie_word_embeddings: whether the language-model head is the embedding.
        bos_token_id: beginning of sequence, or None.
        eos_token_ids: tokens that end a generation.
        pad_token_id: padding, or None.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None

    def __post_init__(self) -> None:
        """Refuses sizes that cannot be a model.

        Raises:
            ConfigError: a size is not positive and finite, or the heads do not divide.
        """
        sizes = "vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim"
        for name in (*sizes.split(), "max_position_embeddings", "rms_norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"model config: {name} must be positive and finite, found {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model config: num_kv_heads ({self.num_kv_heads}) must divide num_heads ({self.num_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"model config: head_dim must be even for rotary embedding, found {self.head_dim}")

    @property
    def q_size(self) -> int:
        """Rows of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.num_kv_heads * self.head_dim

    def to_json(self) -> dict[str, Any]:
        """The config as JSON-ready values; `from_json` reads it back."""
        return dataclasses.asdict(self) | {"eos_token_ids": list(self.eos_token_ids)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Reads what `to_json` wrote.

        Raises:
            ConfigError: a key is missing or unknown.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            missing, unknown = sorted(names - set(values)), sorted(set(values) - names)
            raise ConfigError(f"model config: missing keys {missing}, unknown keys {unknown}")
        return cls(**{**values, "eos_token_ids": tuple(values["eos_token_ids"])})

    def digest(self) -> str:
        """sha256 of the config: executables name it, and are refused for any other."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()
