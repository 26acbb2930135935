"""Attention of prompt tokens: causal, chunks of several rows packed one after the other (ragged prefill).

It is FlashAttention-2 (Dao, arXiv:2307.08691) over pages. A tile holds some tokens of one chunk times all query heads
of one kv head, so that keys and values are read once for the whole group. Which tile has which tokens is found on the
device: chunks begin anywhere, in the step and in their sequences.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Float32, Int32

from elastic_jax.batch import TokenBatch
from elastic_jax.kernels.attention_pallas_blocks import (
    KEYS,
    VALUES,
    attend,
    block_slots,
    deal,
    power_of_two,
    read_cache,
    start,
)
from elastic_jax.kv_cache import Cache


@dataclasses.dataclass(frozen=True)
class PromptTiles:
    """Sizes of the kernel.

    Attributes:
        queries: rows of a tile, tokens times the query heads of a kv head; a power of two, at least 16.
        block: context tokens read at once; a power of two, at least 16.
        warps: warps a program.
        stages: blocks in flight a program.
    """

    queries: int
    block: int
    warps: int
    stages: int


def attend_prompt(
    query: Float[Array, "tokens heads dim"],
    kv: Cache,
    batch: TokenBatch,
    tiles: PromptTiles,
    *,
    interpret: bool,
) -> Float32[Array, "tokens heads dim"]:
    """Attention of the prompt tokens, zeros for padding; generated tokens' places are left unwritten.

    Args:
        query: rotated queries of all tokens; only the prompt's are read.
        kv: one layer's cache.
        batch: the tokens.
        tiles: sizes of the kernel.
        interpret: whether to run the kernel in Pallas's interpreter.
    """
    heads, kv_heads = query.shape[1], kv.shape[2]
    tile_tokens = max(tiles.queries // power_of_two(heads // kv_heads), 1)
    work = cut_chunks(batch, tile_tokens)
    return pallas.pallas_call(
        functools.partial(attention_prompt, tile_tokens=tile_tokens, block=tiles.block, page_size=batch.page_size),
        grid=(work.shape[0], kv_heads),
        out_shape=jax.ShapeDtypeStruct(query.shape, jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
    )(query, kv, batch.block_table, work)


def cut_chunks(batch: TokenBatch, tile_tokens: int) -> Int32[Array, "tiles 4"]:
    """Tiles of consecutive tokens of one chunk: for each its first token, how many, their row, their first position.

    Padding is one more chunk, whose first position is negative: a tile of it sees nothing and writes zeros. The bound
    of tiles is static; those left over have no tokens. Every layer asks the same, and XLA computes it once a step.
    """
    row, position = batch.row[batch.generated :], batch.position[batch.generated :]
    token = jnp.arange(row.shape[0], dtype=jnp.int32)
    owned = row[None, :] == jnp.arange(batch.rows + 1, dtype=jnp.int32)[:, None]
    count = jnp.sum(owned, axis=1, dtype=jnp.int32)
    begin = jnp.min(jnp.where(owned, token[None, :], row.shape[0]), axis=1)
    chunks = min(batch.rows + 1, row.shape[0])
    owner, number = deal((count + tile_tokens - 1) // tile_tokens, row.shape[0] // tile_tokens + chunks)
    offset = begin.at[owner].get(mode="clip") + number * tile_tokens
    left = count.at[owner].get(mode="fill", fill_value=0) - number * tile_tokens
    first = jnp.where(owner < batch.rows, position.at[offset].get(mode="clip"), -tile_tokens)
    tokens = jnp.clip(left, 0, tile_tokens)
    work = jnp.stack([batch.generated + offset, tokens, jnp.minimum(owner, batch.rows - 1), first], axis=1)
    # A chunk's later tiles see more: begun first, they do not make the others wait at the end.
    return work[::-1]


def attention_prompt(
    query_ref: Any,
    kv_ref: Any,
    table_ref: Any,
    work_ref: Any,
    out_ref: Any,
    *,
    tile_tokens: int,
    block: int,
    page_size: int,
) -> None:
    """The kernel: one tile, for the query heads of one kv head. Profilers show its name."""
    tile, kv_head = pallas.program_id(0), pallas.program_id(1)
    offset, tokens, row, first = (work_ref[tile, i] for i in range(4))
    group, dim = query_ref.shape[1] // kv_ref.shape[2], query_ref.shape[2]
    padded = power_of_two(group)
    index = jnp.arange(tile_tokens * padded, dtype=jnp.int32)
    token, member = index // padded, index % padded
    mine = (token < tokens) & (member < group)
    mask = jnp.broadcast_to(mine[:, None], (index.shape[0], dim))
    dims = jnp.arange(dim, dtype=jnp.int32)
    place = ((offset + token)[:, None], (kv_head * group + member)[:, None], dims[None, :])
    query = triton.load(query_ref.at[place], mask=mask, other=jnp.zeros((), query_ref.dtype))

    def seen_by_all(number: Array, carry: Any) -> Any:
        slots = block_slots(table_ref, row, number * block, block, page_size)
        keys = read_cache(kv_ref, slots, KEYS, kv_head, None)
        values = read_cache(kv_ref, slots, VALUES, kv_head, None)
        return attend(carry, query, keys, values, None)

    end = jnp.maximum(first + tokens, 0)

    def seen_by_some(number: Array, carry: Any) -> Any:
        slots = block_slots(table_ref, row, number * block, block, page_size)
        position = number * block + jnp.arange(block, dtype=jnp.int32)
        written = position < end
        keys = read_cache(kv_ref, slots, KEYS, kv_head, written)
        values = read_cache(kv_ref, slots, VALUES, kv_head, written)
        return attend(carry, query, keys, values, position[None, :] <= (first + token)[:, None])

    whole = jnp.maximum(first + 1, 0) // block
    carry = jax.lax.fori_loop(jnp.int32(0), whole, seen_by_all, start(index.shape[0], dim))
    blocks = jnp.where(tokens > 0, (end + block - 1) // block, 0)
    _, total, out = jax.lax.fori_loop(whole, blocks, seen_by_some, carry)
    out = out / jnp.where(total == 0.0, 1.0, total)[:, None]
    triton.store(out_ref.at[place], out, mask=mask)
