"""What both attention kernels share: reading the cache through a block table, the online softmax, dealing out work.

The kernels are written for Pallas's Triton backend. They index every reference with arrays of all its axes: that is
what both Triton and the interpreter take, and what keeps the last axis visibly contiguous to Triton.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton
from jaxtyping import Array, Int32

from elastic_jax.kv_cache import QuantizedCache

MASKED = -1e30
"""Score of a key that must not be seen: finite, so that differences of two are not NaN."""

KEYS, VALUES = 0, 1
"""Where they are on the second axis of the cache."""


def score_scale(dim: int) -> float:
    """1 / sqrt(dim) for a softmax in base 2, which GPUs compute in one instruction."""
    return math.log2(math.e) / math.sqrt(dim)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`: the only sizes Triton has."""
    return 1 << max(n - 1, 0).bit_length()


def deal(counts: Int32[Array, " owners"], pieces: int) -> tuple[Int32[Array, " pieces"], Int32[Array, " pieces"]]:
    """Numbers the pieces of work of all owners one after the other.

    Args:
        counts: pieces of each owner.
        pieces: a bound of their sum.

    Returns:
        the owner of each piece, the number of owners where there is none; and its number among that owner's pieces.
    """
    ends = last_pieces(counts)
    piece = jnp.arange(pieces, dtype=jnp.int32)
    owner = jnp.sum(ends[None, :] <= piece[:, None], axis=1, dtype=jnp.int32)
    start = (ends - counts).at[owner].get(mode="fill", fill_value=0)
    return owner, piece - start


def last_pieces(counts: Int32[Array, " owners"]) -> Int32[Array, " owners"]:
    """Inclusive sums: one comparison fused with one reduction, where a cumulative sum is several kernels."""
    n = jnp.arange(counts.shape[0], dtype=jnp.int32)
    return jnp.sum(jnp.where(n[None, :] <= n[:, None], counts[None, :], 0), axis=1, dtype=jnp.int32)


def block_slots(table_ref: Any, row: Array, first: Array, block: int, page_size: int) -> Array:
    """Slots [block] of the context positions from `first` on, a multiple of `block`. In a kernel.

    Positions past the row's context give slots that must not be read.
    """
    offset = jnp.arange(block, dtype=jnp.int32)
    if page_size % block == 0:
        return table_ref[row, first // page_size] * page_size + first % page_size + offset
    position = first + offset
    # A block may reach past the last page.
    page = jnp.minimum(position // page_size, table_ref.shape[1] - 1)
    return triton.load(table_ref.at[jnp.full_like(page, row), page]) * page_size + position % page_size


type Read = tuple[Array, Array | None]
"""Keys or values [block, dim] in the compute type; what they are multiplied by [block], or None."""


def read_cache(kv_ref: Any, slots: Array, which: int, head: Array, live: Array | None) -> Read:
    """Keys or values of one head; zeros where not `live` [block]. In a kernel.

    What lies in other slots is not read, so that it may be anything, NaN too.
    """
    quantized = isinstance(kv_ref, QuantizedCache)
    values_ref = kv_ref.values if quantized else kv_ref
    dims = jnp.arange(values_ref.shape[3], dtype=jnp.int32)
    mask = None if live is None else jnp.broadcast_to(live[:, None], (slots.shape[0], dims.shape[0]))

    def load(ref: Any, at: tuple[Any, ...], mask: Array | None) -> Array:
        place = ref.at[at]
        return triton.load(place) if mask is None else triton.load(place, mask=mask, other=jnp.zeros((), ref.dtype))

    numbers = load(values_ref, (slots[:, None], which, head, dims[None, :]), mask)
    if not quantized:
        return numbers, None
    # int8 is exact in every compute type.
    return numbers.astype(kv_ref.dtype), load(kv_ref.scales, (slots, which, head), live)


type Softmax = tuple[Array, Array, Array]
"""Running maximum [m] in base 2, sum [m] and weighted values [m, dim] of an online softmax (arXiv:1805.02867)."""


def start(rows: int, dim: int) -> Softmax:
    """The softmax of nothing."""
    return jnp.full(rows, MASKED, jnp.float32), jnp.zeros(rows, jnp.float32), jnp.zeros((rows, dim), jnp.float32)


def attend(carry: Softmax, query: Array, keys: Read, values: Read, live: Array | None) -> Softmax:
    """Adds a block of keys and values to the softmax of queries [m, dim]. In a kernel.

    Weights are rounded to the values' type before they multiply them, as in FlashAttention-2 (arXiv:2307.08691); their
    sum is of the unrounded ones.

    Args:
        carry: the softmax so far.
        query: queries, unscaled.
        keys: keys.
        values: values; finite.
        live: whether a query may see a key, [m or 1, block]; None if all may. The first block must have a live key for
            every query.
    """
    largest, total, out = carry
    scale = score_scale(query.shape[1])
    scores = _dot(query, keys[0], 1)
    if keys[1] is not None:
        scores *= keys[1][None, :]
    if live is not None:
        scores = jnp.where(live, scores, MASKED)
    new = jnp.maximum(largest, jnp.max(scores, axis=1) * scale)
    weights = jnp.exp2(scores * scale - new[:, None])
    shrink = jnp.exp2(largest - new)
    scaled = weights if values[1] is None else weights * values[1][None, :]
    weighted = _dot(scaled.astype(values[0].dtype), values[0], 0)
    return new, total * shrink + jnp.sum(weights, axis=1), out * shrink[:, None] + weighted


def _dot(a: Array, b: Array, contracted: int) -> Array:
    # Highest precision means IEEE float32 for float32, and changes nothing for bf16.
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (contracted,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
