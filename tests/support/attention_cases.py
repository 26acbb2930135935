"""Cases of attention over a paged cache, each with a dense float64 reference."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastic_jax.batch import TokenBatch
from elastic_jax.kv_cache import QuantizedCache

D, P, ROWS, PAGES = 3, 40, 5, 7
"""One bucket for most cases, so that Pallas's interpreter compiles once."""


@dataclasses.dataclass(frozen=True)
class Shape:
    heads: int = 6
    kv_heads: int = 2
    dim: int = 16
    page_size: int = 16
    dtype: str = "float32"
    int8: bool = False


@dataclasses.dataclass(frozen=True)
class Packing:
    """(row, context) of generated tokens, padding None; (row, context before, tokens) of prompt chunks."""

    generated: tuple[tuple[int, int] | None, ...] = ()
    prompt: tuple[tuple[int, int, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Case:
    query: jax.Array
    kv: jax.Array | QuantizedCache
    batch: TokenBatch
    exact: np.ndarray


def dense(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """One token's attention in float64: query [heads, dim], keys and values [context, kv_heads, dim]."""
    group = query.shape[0] // keys.shape[1]
    out = np.empty(query.shape)
    for head in range(query.shape[0]):
        scores = keys[:, head // group] @ query[head] / np.sqrt(query.shape[1])
        weights = np.exp(scores - scores.max())
        out[head] = weights @ values[:, head // group] / weights.sum()
    return out


def make_case(packing: Packing, shape: Shape, d: int = D, p: int = P) -> Case:
    """Pages are shuffled, and every slot that no token was written to holds NaN."""
    rng = np.random.default_rng(0)
    pages = rng.permutation(ROWS * PAGES).reshape(ROWS, PAGES)
    table, context = np.zeros((ROWS, PAGES)), np.zeros(ROWS, int)
    row, position = np.full(d + p, ROWS), np.zeros(d + p, int)
    for i, one in enumerate(packing.generated):
        if one is not None:
            row[i], context[one[0]] = one
            position[i] = one[1] - 1
    start = d
    for r, before, tokens in packing.prompt:
        row[start : start + tokens] = r
        position[start : start + tokens] = np.arange(before, before + tokens)
        context[r] = before + tokens
        start += tokens
    kv = np.full((ROWS * PAGES * shape.page_size, 2, shape.kv_heads, shape.dim), np.nan)
    slots = []
    for r in range(ROWS):
        used = -(-context[r] // shape.page_size)
        table[r, :used] = pages[r, :used]
        place = np.arange(context[r])
        slots.append(pages[r][place // shape.page_size] * shape.page_size + place % shape.page_size)
        kv[slots[r]] = rng.standard_normal((context[r], *kv.shape[1:]))
    query = jnp.asarray(rng.standard_normal((d + p, shape.heads, shape.dim)), jnp.dtype(shape.dtype))
    if shape.int8:
        scales = (np.abs(kv).max(axis=-1) / 127).astype(np.float32)
        values = np.where(np.isnan(kv), 99, np.round(kv / scales[..., None])).astype(np.int8)
        cache = QuantizedCache(jnp.asarray(values), jnp.asarray(scales), shape.dtype)
        rounded = values.astype(np.float64) * scales[..., None]
    else:
        cache = jnp.asarray(kv, jnp.dtype(shape.dtype))
        rounded = np.asarray(cache, np.float64)
    rounded_query = np.asarray(query, np.float64)
    exact = np.zeros(query.shape)
    for i in np.flatnonzero(row < ROWS):
        seen = rounded[slots[row[i]][: position[i] + 1]]
        exact[i] = dense(rounded_query[i], seen[:, 0], seen[:, 1])

    def ints(values: Any) -> jax.Array:
        return jnp.asarray(np.asarray(values, np.int32))

    batch = TokenBatch(ints(row), ints(position), ints(np.zeros(d + p)), ints(table), ints(context), d, shape.page_size)
    return Case(query, cache, batch, exact)


def relative_error(out: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(out - exact) / np.linalg.norm(exact))
