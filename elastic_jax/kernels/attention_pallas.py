"""Attention over the paged KV cache as Pallas kernels (Triton backend) for NVIDIA GPUs.

Its interface and mathematics are `attention_xla`'s. It differs in this: products of bf16 have float32 sums as there,
but the softmax's weights are rounded to bf16 before they multiply the values, as FlashAttention does.

Many prompt tokens on Hopper are left to `prompt_attention_cuda`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from elastic_jax.batch import TokenBatch
from elastic_jax.config import ModelConfig
from elastic_jax.errors import ConfigError
from elastic_jax.kernels import prompt_attention_cuda
from elastic_jax.kernels.attention_pallas_blocks import power_of_two
from elastic_jax.kernels.attention_pallas_generated import GeneratedTiles, attend_generated
from elastic_jax.kernels.attention_pallas_prompt import PromptTiles, attend_prompt
from elastic_jax.kernels.pallas_device import compute_capability
from elastic_jax.kv_cache import Cache

_DIMS = (16, 32, 64, 128, 256)

_INSTEAD = "use the attention called 'xla' instead"


def attention(
    query: Float[Array, "tokens heads dim"], kv: Cache, batch: TokenBatch
) -> Float32[Array, "tokens heads dim"]:
    """Causal grouped-query attention of every token to its own sequence, scaled by 1 / sqrt(dim).

    Args:
        query: rotated queries, generated tokens first.
        kv: one layer's cache, this step's keys and values already written.
        batch: the tokens.

    Returns:
        float32 [tokens, heads, dim]; zeros for padding tokens.

    Raises:
        ConfigError: the device traced for is not an NVIDIA GPU that has what the kernels need, they are not made for
            these shapes and types, or a library cannot be loaded on this machine.
    """
    capability = compute_capability("the attention called 'pallas'", _INSTEAD)
    generated, prompt = choose_tiles(capability, query, kv, batch)
    return run(query, kv, batch, generated, prompt, interpret=False)


# Jitted, so that a model's layers trace and lower the kernels once.
@functools.partial(jax.jit, static_argnames=("generated", "prompt", "interpret"))
def run(
    query: Float[Array, "tokens heads dim"],
    kv: Cache,
    batch: TokenBatch,
    generated: GeneratedTiles,
    prompt: PromptTiles | None,
    *,
    interpret: bool,
) -> Float32[Array, "tokens heads dim"]:
    """`attention` with given sizes of kernels, or in Pallas's interpreter, which runs anywhere.

    Without sizes, prompt tokens are left to `prompt_attention_cuda`, which no interpreter runs.

    Raises:
        ConfigError: the kernels are not made for these shapes and types.
    """
    check_supported(query, kv)
    out = None
    if batch.generated < query.shape[0]:
        with jax.named_scope("attention_prompt"):
            if prompt is None:
                out = prompt_attention_cuda.attend_prompt(query, kv, batch)
            else:
                out = attend_prompt(query, kv, batch, prompt, interpret=interpret)
    if batch.generated:
        with jax.named_scope("attention_generated"):
            out = attend_generated(query, kv, batch, out, generated, interpret=interpret)
    return jnp.zeros(query.shape, jnp.float32) if out is None else out


def choose_tiles(
    capability: int, query: Array, kv: Cache, batch: TokenBatch
) -> tuple[GeneratedTiles, PromptTiles | None]:
    """Sizes of the kernels for a GPU, none where `prompt_attention_cuda` takes over; `benches/attention.py` measures.

    They were tuned on an H200 (9.0) for heads of 128 in bf16; other cases get the same shared memory or less.
    """
    dim = kv.shape[3]
    if kv.dtype == jnp.float32:
        # Without tensor cores: for checks, not for speed.
        return GeneratedTiles(32, 512, 4, 1), PromptTiles(32, 32, 4, 1)
    stages = 3 if capability >= 90 else 2
    block = 32 if dim == 256 else 64
    if prompt_attention_cuda.takes(capability, query, kv, batch):
        return GeneratedTiles(block, 512, 4, stages), None
    rows = (query.shape[0] - batch.generated) * kv.shape[2] * power_of_two(query.shape[1] // kv.shape[2])
    # Two waves of a device: with fewer tiles, smaller ones use more of it.
    large = rows >= 128 * 256 and capability >= 90
    prompt = PromptTiles(128, block, 4, stages) if large else PromptTiles(64, block, 4, stages)
    return GeneratedTiles(block, 512, 4, stages), prompt


def check_model(config: ModelConfig) -> None:
    """Refuses models whose heads the kernels are not made for.

    Raises:
        ConfigError: it is so.
    """
    _check_heads(config.num_heads, config.num_kv_heads, config.head_dim)


def _check_heads(heads: int, kv_heads: int, dim: int) -> None:
    if dim not in _DIMS:
        raise ConfigError(f"the attention called 'pallas' takes heads of {_DIMS}, found {dim}; {_INSTEAD}")
    if heads % kv_heads or heads // kv_heads > 64:
        raise ConfigError(
            f"the attention called 'pallas' takes up to 64 query heads for each key-value head, found {heads} for "
            f"{kv_heads}; {_INSTEAD}"
        )


def check_supported(query: Array, kv: Cache) -> None:
    """Refuses shapes and types that the kernels are not made for.

    Raises:
        ConfigError: it is so.
    """
    _check_heads(query.shape[1], *kv.shape[2:])
    if query.dtype != kv.dtype or kv.dtype not in (jnp.bfloat16, jnp.float32):
        raise ConfigError(
            "the attention called 'pallas' takes bfloat16 or float32, the same for queries and cache; found "
            f"{query.dtype} and {kv.dtype}; {_INSTEAD}"
        )
