"""Attention of many prompt tokens on Hopper, in CUDA C++ (`cuda/prompt_attention.cuh`).

It computes what `attention_pallas_prompt` does, with the same rounding, in another way: keys and values are fetched by
a thread of their own (the tensor memory accelerator), and one warpgroup's products hide the other's softmax, which
Pallas's Triton backend has no means for. `attention_pallas` calls it, and has the other cases.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float32

from elastic_jax.batch import TokenBatch
from elastic_jax.kernels import cuda_library, prompt_library
from elastic_jax.kernels.attention_pallas_prompt import cut_chunks
from elastic_jax.kv_cache import QuantizedCache

_DIM, _GROUPS = 128, (1, 2, 4, 8)
"""The head's size, and query heads a key-value head, that the kernel is built for."""

_ROWS, _PAGE_PIECE = 128, 64
"""Of a tile, tokens times the query heads of a key-value head; and what must divide the size of a page."""

_LEAST_TOKENS = 512
"""Prompt tokens of a step from which on the kernel is used: with fewer, its tiles leave multiprocessors idle."""


def takes(capability: int, query: Any, kv: Any, batch: TokenBatch) -> bool:
    """Whether the kernel is for the prompt tokens of a step; it follows from shapes, types and the GPU.

    It is not for other GPUs, few tokens, heads of other sizes, an int8 cache, nor JAX's plugin for CUDA 12, whose
    runtime the library does not have.

    Args:
        capability: the GPU's compute capability, ten times its number.
        query: queries of all tokens, or their shape.
        kv: one layer's cache, or its shape.
        batch: the tokens.
    """
    if capability != prompt_library.CAPABILITY or query.shape[0] - batch.generated < _LEAST_TOKENS:
        return False
    if isinstance(kv, QuantizedCache) or query.dtype != jnp.bfloat16 or kv.dtype != jnp.bfloat16:
        return False
    heads, kv_heads = query.shape[1], kv.shape[2]
    if kv.shape[3] != _DIM or heads % kv_heads or heads // kv_heads not in _GROUPS or batch.page_size % _PAGE_PIECE:
        return False
    return not cuda_library.has_cuda_12()


# Jitted, so that a model's layers trace and lower the call once.
@jax.jit
def attend_prompt(
    query: BFloat16[Array, "tokens heads dim"], kv: BFloat16[Array, "slots 2 kv_heads dim"], batch: TokenBatch
) -> Float32[Array, "tokens heads dim"]:
    """Attention of the prompt tokens, zeros for padding; generated tokens' places are left unwritten.

    Args:
        query: rotated queries of all tokens; only the prompt's are read.
        kv: one layer's cache.
        batch: the tokens.

    Raises:
        ConfigError: the library cannot be loaded on this machine.
    """
    prompt_library.register()
    work = cut_chunks(batch, _ROWS // (query.shape[1] // kv.shape[2]))
    return jax.ffi.ffi_call(prompt_library.ATTENTION, jax.ShapeDtypeStruct(query.shape, jnp.float32))(
        query, kv, batch.block_table, work, page_size=np.int32(batch.page_size)
    )
