"""One layer's cache of keys and values: in the compute type, or in int8 with a scale for each token and head.

int8 halves what long contexts take and what reading them costs. A key's or value's head has one scale, its largest
magnitude over 127; attention multiplies scores by the scales of keys and weights by those of values, so that nothing is
rounded a second time.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from elastic_jax.quantization import quantize_8bit

type KvPrecision = Literal["full", "int8"]
"""`full` is the compute type."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedCache:
    """Keys (0) and values (1) of every slot; the leaves may be arrays, shapes, or references of a kernel.

    Attributes:
        values: int8 [slots, 2, kv_heads, dim]; times its scale it is the number meant.
        scales: float32 [slots, 2, kv_heads].
        compute: name of the type that queries have, and that int8 is converted to for products.
    """

    values: Any
    scales: Any
    compute: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """[slots, 2, kv_heads, dim]."""
        return self.values.shape

    @property
    def dtype(self) -> np.dtype:
        """Of queries."""
        return jnp.dtype(self.compute)


type Cache = Float[Array, "slots 2 kv_heads dim"] | QuantizedCache
"""What a layer's attention reads; both have `shape` and `dtype`."""


def abstract_cache(shape: tuple[int, int, int, int], dtype: str, precision: KvPrecision) -> Any:
    """Shapes of a cache.

    Args:
        shape: [slots, 2, kv_heads, dim].
        dtype: name of the compute type.
        precision: of keys and values.
    """
    if precision == "full":
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    values, scales = jax.ShapeDtypeStruct(shape, jnp.int8), jax.ShapeDtypeStruct(shape[:-1], jnp.float32)
    return QuantizedCache(values, scales, dtype)


def write(
    cache: Cache,
    slot: Int32[Array, " tokens"],
    keys: Float32[Array, "tokens kv_heads dim"],
    values: Float32[Array, "tokens kv_heads dim"],
) -> Cache:
    """The cache with keys and values of some tokens in their slots; slots past the last are dropped."""
    both = jnp.stack([keys, values], axis=1)
    if not isinstance(cache, QuantizedCache):
        return cache.at[slot].set(both.astype(cache.dtype), mode="drop")
    plane, scale = quantize_8bit(both.reshape(-1, both.shape[-1]))
    return dataclasses.replace(
        cache,
        values=cache.values.at[slot].set(plane.reshape(both.shape), mode="drop"),
        scales=cache.scales.at[slot].set(scale.reshape(both.shape[:-1]), mode="drop"),
    )
