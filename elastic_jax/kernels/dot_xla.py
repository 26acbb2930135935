"""Matrix products in plain XLA: the reference, for every platform."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Float32, Int8

from elastic_jax.quantization import DotKernels, add_product, quantize_8bit, rounded, swiglu


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


def multiply_float_gated(x: Float[Array, "rows in"], weight: Float[Array, "out in"]) -> Float[Array, "rows half"]:
    """SwiGLU of the product, rounded to the weight's type."""
    return rounded(swiglu(multiply_float(x, weight, None)), weight.dtype).astype(weight.dtype)


def multiply_float(
    x: Float[Array, "rows in"], weight: Float[Array, "out in"], residual: Float[Array, "rows out"] | None
) -> Float[Array, "rows out"]:
    """`x @ weight.T` with `x` in the weight's type and float32 sums, added to `residual`."""
    rows = x.shape[0]
    x = x.astype(weight.dtype)
    if rows == 1:
        # XLA takes one row for no product and converts the whole weight to float32 first: 7 times slower on CPU, and
        # 3 times a whole step on a GPU that it cannot tune for. Where it tunes, two rows cost what one costs.
        x = jnp.concatenate([x, x])
    # GPUs would multiply float32 as TF32, with 10 bits.
    precision = jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    sums = jax.lax.dot_general(
        x, weight, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
    return add_product(residual, sums[:rows])


IMPLEMENTATION = DotKernels(multiply, multiply_gated, quantize_8bit, multiply_float, multiply_float_gated)
