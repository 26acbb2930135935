"""The integer dot in plain XLA: the reference, for every platform."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Float32, Int8

from elastic_jax.quantization import IntegerDot, add_product, quantize_8bit, swiglu


def multiply_gated(
    x: Int8[Array, "rows in"],
    row_scales: Float32[Array, "rows blocks"],
    values: Int8[Array, "out in"],
    scales: Float32[Array, "out 1"],
) -> BFloat16[Array, "rows half"]:
    """SwiGLU of the product, rounded to bfloat16."""
    return swiglu(multiply(x, row_scales, values, scales, None)).astype(jnp.bfloat16)


def multiply(
    x: Int8[Array, "rows in"],
    row_scales: Float32[Array, "rows blocks"],
    values: Int8[Array, "out in"],
    scales: Float32[Array, "out 1"],
    residual: Float[Array, "rows out"] | None,
) -> Float[Array, "rows out"]:
    """`(x * row_scales) @ (values * scales).T`, with exact integer sums in each block of columns, added to `residual`.

    Column `b` of `row_scales` is for the b-th of `blocks` equally long runs of columns of `x`. The blocks' sums are
    added in float32, in order. `add_product` says how the product is added.
    """
    blocks = row_scales.shape[1]
    size = x.shape[1] // blocks

    def block_sum(block: int) -> Float32[Array, "rows out"]:
        columns = slice(block * size, (block + 1) * size)
        part, weight = (x, values) if blocks == 1 else (x[:, columns], values[:, columns])
        # int32 must be asked for: an int8 result takes a slow path on GPU. Sums fit: 32768 * 127 * 128 < 2**31.
        sums = jax.lax.dot_general(part, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        return sums.astype(jnp.float32) * row_scales[:, block, None]

    total = block_sum(0)
    for block in range(1, blocks):
        total = total + block_sum(block)
    return add_product(residual, total * scales[:, 0][None, :])


IMPLEMENTATION = IntegerDot(multiply, multiply_gated, quantize_8bit)
