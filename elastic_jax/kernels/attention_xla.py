"""Attention over the paged KV cache in plain XLA: the reference for every kernel, and what the CPU runs.

It loops over blocks of pages with a bound that depends on the data. Gathering the whole block table instead would make
a short context cost as much as the longest one the executable allows.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from elastic_jax.batch import TokenBatch
from elastic_jax.kv_cache import Cache, QuantizedCache

_BLOCK_TOKENS = 256
"""Context tokens a loop iteration reads: enough work to hide an iteration's overhead on CPU."""

_QUERY_TOKENS = 64
"""Prompt tokens a loop iteration computes."""

_MASKED = -1e30
"""Finite, so that a row without any live key gives zeros rather than NaN."""


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
    """
    parts = []
    if batch.generated:
        with jax.named_scope("attention_generated"):
            parts.append(_generated(query[: batch.generated], kv, batch))
    if batch.generated < query.shape[0]:
        with jax.named_scope("attention_prompt"):
            parts.append(_prompt(query[batch.generated :], kv, batch))
    return jnp.concatenate(parts)


def _block_pages(batch: TokenBatch) -> int:
    return min(max(_BLOCK_TOKENS // batch.page_size, 1), batch.block_table.shape[1])


def _padded_tables(batch: TokenBatch) -> Int32[Array, "rows pages"]:
    """Block tables padded to whole blocks: dynamic_slice would shift a partial one."""
    return jnp.pad(batch.block_table, ((0, 0), (0, -batch.block_table.shape[1] % _block_pages(batch))))


@dataclasses.dataclass(frozen=True)
class _Read:
    """Keys or values of a block of context; times `scales`, if there are some.

    Attributes:
        numbers: [n, kv_heads, block, dim].
        scales: float32 [n, kv_heads, block], or None.
    """

    numbers: Array
    scales: Array | None


def _read_block(
    kv: Cache, tables: Int32[Array, "n pages"], length: Int32[Array, " n"], block: Array, batch: TokenBatch
) -> tuple[_Read, _Read]:
    """Keys and values of context block number `block` of n block tables; zeros from each table's `length` on.

    Gather, mask and transposition are one fusion on CPU, and the dots that follow need no other layout.
    """
    n, pages = tables.shape[0], _block_pages(batch)
    taken = jax.lax.dynamic_slice(tables, (0, block * pages), (n, pages))
    # A slot that is not written yet may hold what a broken sequence left: NaN, which no zero weight removes.
    slots = jnp.arange(pages * batch.page_size, dtype=jnp.int32).reshape(1, pages, batch.page_size)
    written = block * pages * batch.page_size + slots < length[:, None, None]

    def gather(leaf: Array) -> Array:
        """[slots, 2, kv_heads, ...] -> [2, n, kv_heads, block, ...]."""
        paged = leaf.reshape(-1, batch.page_size, *leaf.shape[1:])
        gathered = paged.at[taken].get(mode="clip")  # n pages page_size 2 kv_heads ...
        rest = leaf.shape[3:]
        mask = written.reshape(*written.shape, *(1,) * (2 + len(rest)))
        gathered = jnp.where(mask, gathered, jnp.zeros((), leaf.dtype))
        both = gathered.transpose(3, 0, 4, 1, 2, *range(5, 5 + len(rest)))
        return both.reshape(2, n, leaf.shape[2], pages * batch.page_size, *rest)

    if not isinstance(kv, QuantizedCache):
        both = gather(kv)
        return _Read(both[0], None), _Read(both[1], None)
    # int8 is exact in every compute type.
    both, scales = gather(kv.values).astype(kv.dtype), gather(kv.scales)
    return _Read(both[0], scales[0]), _Read(both[1], scales[1])


def _generated(query: Float[Array, "d heads dim"], kv: Cache, batch: TokenBatch) -> Float32[Array, "d heads dim"]:
    d, heads, dim = query.shape
    block_tokens = _block_pages(batch) * batch.page_size
    rows = batch.row[:d]
    tables = _padded_tables(batch).at[rows].get(mode="clip")
    length = jnp.where(rows < batch.rows, batch.context_length.at[rows].get(mode="clip"), 0)
    grouped = query.reshape(d, kv.shape[2], -1, dim)

    def each_block(block: Array, carry: _Softmax) -> _Softmax:
        keys, values = _read_block(kv, tables, length, block, batch)
        position = block * block_tokens + jnp.arange(block_tokens, dtype=jnp.int32)
        live = position[None, :] < length[:, None]
        return _attend_block(carry, grouped, keys, values, live[:, None, None, :])

    blocks = (jnp.max(length) + block_tokens - 1) // block_tokens
    return _finish(jax.lax.fori_loop(0, blocks, each_block, _start(grouped))).reshape(d, heads, dim)


def _prompt(query: Float[Array, "p heads dim"], kv: Cache, batch: TokenBatch) -> Float32[Array, "p heads dim"]:
    p, heads, dim = query.shape
    kv_heads, group = kv.shape[2], heads // kv.shape[2]
    block_tokens = _block_pages(batch) * batch.page_size
    tables = _padded_tables(batch)
    rows, position = batch.row[batch.generated :], batch.position[batch.generated :]
    count = jnp.sum(rows[None, :] == jnp.arange(batch.rows, dtype=jnp.int32)[:, None], axis=1, dtype=jnp.int32)
    tile = min(_QUERY_TOKENS, p)
    query = jnp.pad(query, ((0, tile), (0, 0), (0, 0)))

    def each_chunk(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        start, out = carry
        row = rows[start]
        table = jax.lax.dynamic_slice_in_dim(tables, row, 1)
        first = position[start]

        def each_tile(number: Array, out: Array) -> Array:
            offset = start + number * tile
            part = jax.lax.dynamic_slice_in_dim(query, offset, tile).reshape(tile, kv_heads, group, dim)
            part = part.transpose(1, 2, 0, 3).reshape(1, kv_heads, group * tile, dim)
            at = jnp.tile(first + number * tile + jnp.arange(tile, dtype=jnp.int32), group)

            last = first + jnp.minimum((number + 1) * tile, count[row])

            def each_block(block: Array, carry: _Softmax) -> _Softmax:
                keys, values = _read_block(kv, table, last[None], block, batch)
                context = block * block_tokens + jnp.arange(block_tokens, dtype=jnp.int32)
                live = context[None, :] <= at[:, None]
                return _attend_block(carry, part, keys, values, live[None, None])

            blocks = (last + block_tokens - 1) // block_tokens
            done = _finish(jax.lax.fori_loop(0, blocks, each_block, _start(part)))
            done = done.reshape(kv_heads, group, tile, dim).transpose(2, 0, 1, 3).reshape(tile, heads, dim)
            return jax.lax.dynamic_update_slice_in_dim(out, done, offset, axis=0)

        out = jax.lax.fori_loop(0, (count[row] + tile - 1) // tile, each_tile, out)
        return start + count[row], out

    # Chunks follow each other from the first token on. A tile may run past its chunk; the next one overwrites that.
    chunks = jnp.sum(count > 0, dtype=jnp.int32)
    start = (jnp.int32(0), jnp.zeros(query.shape, jnp.float32))
    out = jax.lax.fori_loop(0, chunks, each_chunk, start)[1][:p]
    return jnp.where((rows < batch.rows)[:, None, None], out, 0.0)


type _Softmax = tuple[Array, Array, Array]
"""Running maximum, sum and weighted values of an online softmax (Milakov and Gimelshein, arXiv:1805.02867)."""


def _start(query: Float[Array, "n kv_heads m dim"]) -> _Softmax:
    total = jnp.zeros(query.shape[:-1], jnp.float32)
    return jnp.full_like(total, _MASKED), total, jnp.zeros(query.shape, jnp.float32)


def _attend_block(
    carry: _Softmax,
    query: Float[Array, "n kv_heads m dim"],
    keys: _Read,
    values: _Read,
    live: Bool[Array, "#n 1 #m block"],
) -> _Softmax:
    largest, total, out = carry
    scores = _einsum("nhmk,nhtk->nhmt", query, keys.numbers) / math.sqrt(query.shape[-1])
    if keys.scales is not None:
        scores *= keys.scales[:, :, None, :]
    scores = jnp.where(live, scores, _MASKED)
    new = jnp.maximum(largest, jnp.max(scores, axis=-1))
    weights = jnp.where(live, jnp.exp(scores - new[..., None]), 0.0)
    shrink = jnp.exp(largest - new)
    scaled = weights if values.scales is None else weights * values.scales[:, :, None, :]
    weighted = _einsum("nhmt,nhtk->nhmk", scaled, values.numbers.astype(jnp.float32))
    return new, total * shrink + jnp.sum(weights, axis=-1), out * shrink[..., None] + weighted


def _einsum(letters: str, a: Array, b: Array) -> Array:
    return jnp.einsum(letters, a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _finish(carry: _Softmax) -> Float32[Array, "n kv_heads m dim"]:
    _, total, out = carry
    return out / jnp.where(total == 0, 1.0, total)[..., None]
