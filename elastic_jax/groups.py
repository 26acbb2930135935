"""Groups: matrices that share one fused dot, hence one precision, one stored array and one executable argument."""

import dataclasses
from collections.abc import Iterator

from elastic_jax.config import ModelConfig

LM_HEAD = "lm_head"
"""The group whose activations are always 16-bit, and which may be the embedding itself (tied)."""


@dataclasses.dataclass(frozen=True)
class Group:
    """One fused matrix.

    Attributes:
        name: `layers.<i>.<kind>`, or `lm_head`.
        kind: `qkv`, `o`, `gate_up`, `down` or `lm_head`.
        out_size: rows. Fused parts follow each other: q, k, v rows; gate, up rows.
        in_size: columns: the contracting dimension comes last, because a [in, out] weight is transposed on every call.
    """

    name: str
    kind: str
    out_size: int
    in_size: int

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return self.out_size * self.in_size


def layer_groups(config: ModelConfig, layer: int) -> Iterator[Group]:
    """The four groups of one layer, in the order they are computed."""
    sizes = {
        "qkv": (config.q_size + 2 * config.kv_size, config.hidden_size),
        "o": (config.hidden_size, config.q_size),
        "gate_up": (2 * config.intermediate_size, config.hidden_size),
        "down": (config.hidden_size, config.intermediate_size),
    }
    for kind, (out_size, in_size) in sizes.items():
        yield Group(f"layers.{layer}.{kind}", kind, out_size, in_size)


def model_groups(config: ModelConfig) -> dict[str, Group]:
    """Every group of a model by name, in the order they are computed; Mistral-Small has 161."""
    groups = {group.name: group for layer in range(config.num_layers) for group in layer_groups(config, layer)}
    return groups | {LM_HEAD: Group(LM_HEAD, LM_HEAD, config.vocab_size, config.hidden_size)}
