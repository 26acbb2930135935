"""Attention of generated tokens: one query a row, its context split among programs (flash-decoding).

A row's context is cut into pieces of equal length, and that length follows from how much context all rows have
together: one long row spreads over the device as many short ones do, and a short context starts few programs whatever
the longest one allowed. Each piece gives a partial softmax; a second, small kernel combines them.
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
    MASKED,
    VALUES,
    attend,
    block_slots,
    deal,
    last_pieces,
    power_of_two,
    read_cache,
    start,
)
from elastic_jax.kv_cache import Cache

_LEAST_ROWS = 16
"""Rows of the smallest tensor-core product: a group of query heads is padded to it."""


@dataclasses.dataclass(frozen=True)
class GeneratedTiles:
    """Sizes of the kernel.

    Attributes:
        block: context tokens read at once; a power of two, at least 16.
        programs: programs that a full device should run: a multiple of what fits at once.
        warps: warps a program.
        stages: blocks in flight a program.
    """

    block: int
    programs: int
    warps: int
    stages: int


def attend_generated(
    query: Float[Array, "tokens heads dim"],
    kv: Cache,
    batch: TokenBatch,
    out: Float32[Array, "tokens heads dim"] | None,
    tiles: GeneratedTiles,
    *,
    interpret: bool,
) -> Float32[Array, "tokens heads dim"]:
    """Attention of the generated tokens, written into their places of `out`.

    Args:
        query: rotated queries of all tokens; only the generated ones are read.
        kv: one layer's cache.
        batch: the tokens.
        out: the result for the other tokens; None if there are no others.
        tiles: sizes of the kernel.
        interpret: whether to run the kernels in Pallas's interpreter.
    """
    tokens, heads, dim = query.shape
    kv_heads = kv.shape[2]
    most = power_of_two(-(-tiles.programs // kv_heads))
    work, first, count = _split_contexts(batch, tiles.block, most)
    partial = pallas.pallas_call(
        functools.partial(attention_generated, heads=heads, block=tiles.block, page_size=batch.page_size),
        grid=(work.shape[0], kv_heads),
        out_shape=(
            jax.ShapeDtypeStruct((work.shape[0], heads), jnp.float32),
            jax.ShapeDtypeStruct((work.shape[0], heads), jnp.float32),
            jax.ShapeDtypeStruct((work.shape[0], heads, dim), jnp.float32),
        ),
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
    )(query, kv, batch.block_table, work)
    operands = (first, count, *partial)
    # What a token has if contexts are alike.
    tile = max(most // power_of_two(batch.generated), min(most, 8))
    return pallas.pallas_call(
        functools.partial(attention_generated_combine, most=most, tile=tile),
        grid=(batch.generated, heads),
        out_shape=jax.ShapeDtypeStruct((tokens, heads, dim), jnp.float32),
        input_output_aliases={} if out is None else {len(operands): 0},
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(*operands, *(() if out is None else (out,)))


def _split_contexts(
    batch: TokenBatch, block: int, most: int
) -> tuple[Int32[Array, "pieces 4"], Int32[Array, " d"], Int32[Array, " d"]]:
    """Pieces of context: for each its token, its row, and its first and last position + 1; `most` or fewer a token.

    Also each token's first piece and how many it has. Every layer asks the same, and XLA computes it once a step.
    """
    row = batch.row[: batch.generated]
    length = jnp.where(row < batch.rows, batch.context_length.at[row].get(mode="clip"), 0)
    piece = -(-jnp.maximum(jnp.sum(length, dtype=jnp.int32), 1) // (most * block)) * block
    count = (length + piece - 1) // piece
    token, number = deal(count, batch.generated + most)
    begin = number * piece
    end = jnp.minimum(begin + piece, length.at[token].get(mode="fill", fill_value=0))
    owner = jnp.minimum(row.at[token].get(mode="clip"), batch.rows - 1)
    return jnp.stack([token, owner, begin, end], axis=1), last_pieces(count) - count, count


def attention_generated(
    query_ref: Any,
    kv_ref: Any,
    table_ref: Any,
    work_ref: Any,
    largest_ref: Any,
    total_ref: Any,
    out_ref: Any,
    *,
    heads: int,
    block: int,
    page_size: int,
) -> None:
    """The kernel: one piece of one token's context, for the query heads of one kv head. Profilers show its name."""
    piece, kv_head = pallas.program_id(0), pallas.program_id(1)
    token, row, begin, end = (work_ref[piece, i] for i in range(4))
    group, dim = heads // kv_ref.shape[2], kv_ref.shape[3]
    member = jnp.arange(max(power_of_two(group), _LEAST_ROWS), dtype=jnp.int32)
    mine = (member < group) & (begin < end)
    head = kv_head * group + member
    dims = jnp.arange(dim, dtype=jnp.int32)
    tile_mask = jnp.broadcast_to(mine[:, None], (member.shape[0], dim))
    query = triton.load(
        query_ref.at[token, head[:, None], dims[None, :]], mask=tile_mask, other=jnp.zeros((), query_ref.dtype)
    )

    def each_block(number: Array, carry: Any) -> Any:
        slots = block_slots(table_ref, row, number * block, block, page_size)
        live = number * block + jnp.arange(block, dtype=jnp.int32) < end
        keys = read_cache(kv_ref, slots, KEYS, kv_head, live)
        values = read_cache(kv_ref, slots, VALUES, kv_head, live)
        return attend(carry, query, keys, values, live[None, :])

    blocks = (begin // block, (end + block - 1) // block)
    largest, total, out = jax.lax.fori_loop(*blocks, each_block, start(member.shape[0], dim))
    triton.store(largest_ref.at[piece, head], largest, mask=mine)
    triton.store(total_ref.at[piece, head], total, mask=mine)
    triton.store(out_ref.at[piece, head[:, None], dims[None, :]], out, mask=tile_mask)


def attention_generated_combine(
    first_ref: Any, count_ref: Any, largest_ref: Any, total_ref: Any, partial_ref: Any, *refs: Any, most: int, tile: int
) -> None:
    """The kernel that joins the pieces of one token and one query head. Profilers show its name."""
    # Where the output has an input for its other tokens, that reference comes before it.
    out_ref = refs[-1]
    token, head = pallas.program_id(0), pallas.program_id(1)
    first, count = first_ref[token], count_ref[token]
    dims = jnp.arange(partial_ref.shape[2], dtype=jnp.int32)

    def read(number: Array) -> tuple[Array, Array]:
        live = number < count
        mask = jnp.broadcast_to(live[:, None], (number.shape[0], dims.shape[0]))
        largest = triton.load(largest_ref.at[first + number, head], mask=live, other=-jnp.inf)
        at = partial_ref.at[(first + number)[:, None], head, dims[None, :]]
        return largest, triton.load(at, mask=mask, other=0.0)

    every = jnp.arange(most, dtype=jnp.int32)
    live = every < count
    mine = triton.load(largest_ref.at[first + every, head], mask=live, other=-jnp.inf)
    total = triton.load(total_ref.at[first + every, head], mask=live, other=0.0)
    # A padding token has no piece.
    largest = jnp.maximum(jnp.max(mine, axis=0), MASKED)
    divisor = jnp.sum(jnp.exp2(mine - largest) * total, axis=0)

    def each_tile(i: Array, out: Array) -> Array:
        mine, partial = read(i * tile + jnp.arange(tile, dtype=jnp.int32))
        return out + jnp.sum(jnp.exp2(mine - largest)[:, None] * partial, axis=0)

    tiles = (count + tile - 1) // tile
    out = jax.lax.fori_loop(jnp.int32(0), tiles, each_tile, jnp.zeros(dims.shape, jnp.float32))
    triton.store(out_ref.at[token, head, dims], out / jnp.where(divisor == 0.0, 1.0, divisor))
