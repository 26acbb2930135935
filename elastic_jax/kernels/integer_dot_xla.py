"""The integer dot in plain XLA: the reference, for every platform."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int8


def integer_dot(
    x: Int8[Array, "rows in"],
    row_scales: Float32[Array, "rows 1"],
    values: Int8[Array, "out in"],
    scales: Float32[Array, "out 1"],
) -> Float32[Array, "rows out"]:
    """`(x * row_scales) @ (values * scales).T`, with exact integer sums."""
    # int32 must be asked for: an int8 result takes a slow path on GPU. Sums fit: 32768 * 127 * 128 < 2**31.
    sums = jax.lax.dot_general(x, values, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return sums.astype(jnp.float32) * row_scales * scales[:, 0][None, :]
