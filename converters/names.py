"""The one table of weights: what each is called in every format, and its shape."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from elastic_jax.config import ModelConfig
from elastic_jax.errors import ConversionError
from elastic_jax.groups import LM_HEAD

SHOWN = 10
"""Names listed in one error message."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One weight of the model; `{}` in a name stands for the layer.

    Attributes:
        name: what it is called here.
        hugging_face: what safetensors files call it.
        gguf: what GGUF files call it.
        shape: its sizes, output dimension first.
    """

    name: str
    hugging_face: str
    gguf: str
    shape: Callable[[ModelConfig], tuple[int, ...]]


_BLOCK = "model.layers.{}."
PARTS = (
    Part("embedding", "model.embed_tokens.weight", "token_embd.weight", lambda c: (c.vocab_size, c.hidden_size)),
    Part(
        "layers.{}.attention_norm",
        _BLOCK + "input_layernorm.weight",
        "blk.{}.attn_norm.weight",
        lambda c: (c.hidden_size,),
    ),
    Part(
        "layers.{}.q", _BLOCK + "self_attn.q_proj.weight", "blk.{}.attn_q.weight", lambda c: (c.q_size, c.hidden_size)
    ),
    Part(
        "layers.{}.k", _BLOCK + "self_attn.k_proj.weight", "blk.{}.attn_k.weight", lambda c: (c.kv_size, c.hidden_size)
    ),
    Part(
        "layers.{}.v", _BLOCK + "self_attn.v_proj.weight", "blk.{}.attn_v.weight", lambda c: (c.kv_size, c.hidden_size)
    ),
    Part(
        "layers.{}.o",
        _BLOCK + "self_attn.o_proj.weight",
        "blk.{}.attn_output.weight",
        lambda c: (c.hidden_size, c.q_size),
    ),
    Part(
        "layers.{}.mlp_norm",
        _BLOCK + "post_attention_layernorm.weight",
        "blk.{}.ffn_norm.weight",
        lambda c: (c.hidden_size,),
    ),
    Part(
        "layers.{}.gate",
        _BLOCK + "mlp.gate_proj.weight",
        "blk.{}.ffn_gate.weight",
        lambda c: (c.intermediate_size, c.hidden_size),
    ),
    Part(
        "layers.{}.up",
        _BLOCK + "mlp.up_proj.weight",
        "blk.{}.ffn_up.weight",
        lambda c: (c.intermediate_size, c.hidden_size),
    ),
    Part(
        "layers.{}.down",
        _BLOCK + "mlp.down_proj.weight",
        "blk.{}.ffn_down.weight",
        lambda c: (c.hidden_size, c.intermediate_size),
    ),
    Part("final_norm", "model.norm.weight", "output_norm.weight", lambda c: (c.hidden_size,)),
    Part(LM_HEAD, "lm_head.weight", "output.weight", lambda c: (c.vocab_size, c.hidden_size)),
)

GROUP_PARTS = {
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}
"""Kind of group -> the parts whose rows follow each other in it."""


class Shaped(Protocol):
    """A weight of a source, as far as this table is concerned."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, output dimension first."""
        ...


def match_names[T: Shaped](
    found: Mapping[str, T], config: ModelConfig, spelling: Callable[[Part], str], *, source: str
) -> dict[str, T]:
    """Finds every weight of the model by its name in the source.

    Args:
        found: the source's weights by its own names.
        config: the model.
        spelling: which of the table's names the source uses.
        source: names the files in errors.

    Returns:
        The weights by this table's names. A tied head is left out: it is the embedding.

    Raises:
        ConversionError: weights are unknown, missing or mis-shaped; each kind is listed.
    """
    matched, problems = {}, []
    remaining = dict(found)
    missing, misshaped = [], []
    for name, original, shape in _expected(config, spelling):
        tensor = remaining.pop(original, None)
        if name == LM_HEAD and config.tie_word_embeddings:
            continue
        if tensor is None:
            missing.append(original)
        elif tensor.shape != shape:
            misshaped.append(f"{original} should be {list(shape)}, is {list(tensor.shape)}")
        else:
            matched[name] = tensor
    for what, names in (("unknown", sorted(remaining)), ("missing", missing), ("mis-shaped", misshaped)):
        if names:
            problems.append(f"{len(names)} {what} tensors: {list_names(names)}")
    if problems:
        raise ConversionError(f"{source} does not hold the weights of its config: " + "; ".join(problems))
    return matched


def list_names(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _expected(config: ModelConfig, spelling: Callable[[Part], str]) -> Iterable[tuple[str, str, tuple[int, ...]]]:
    for part in PARTS:
        layers = range(config.num_layers) if "{}" in part.name else (None,)
        for layer in layers:
            yield part.name.format(layer), spelling(part).format(layer), part.shape(config)
