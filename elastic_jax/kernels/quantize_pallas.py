"""Rounding activations to int8 as a Pallas kernel (Triton backend): each is read once, where XLA reads it twice."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Float32, Int8

from elastic_jax.quantization import quantize_8bit as quantize_8bit_reference

_FEW = 16
"""Rows up to which XLA fuses the rounding with what is before it, and a kernel of its own would only wait longer."""


def quantize_8bit(x: Float[Array, "rows in"]) -> tuple[Int8[Array, "rows in"], Float32[Array, "rows 1"]]:
    """`quantization.quantize_8bit`."""
    return quantize_8bit_reference(x) if x.shape[0] <= _FEW else run(x, interpret=False)


@functools.partial(jax.jit, static_argnames="interpret")
def run(x: Float[Array, "rows in"], *, interpret: bool) -> tuple[Int8[Array, "rows in"], Float32[Array, "rows 1"]]:
    """`quantize_8bit` by the kernel, or in Pallas's interpreter, which runs anywhere."""
    rows, width = x.shape
    block = 1 << (width - 1).bit_length()
    return pallas.pallas_call(
        functools.partial(quantize_kernel, block=block),
        grid=(rows,),
        out_shape=(jax.ShapeDtypeStruct((rows, width), jnp.int8), jax.ShapeDtypeStruct((rows, 1), jnp.float32)),
        compiler_params=triton.CompilerParams(num_warps=min(16, max(4, block // 2048)), num_stages=1),
        interpret=interpret,
    )(x)


def quantize_kernel(x_ref: Any, plane_ref: Any, scale_ref: Any, *, block: int) -> None:
    """The kernel: one row. Profilers show its name."""
    row = pallas.program_id(0)
    column = jnp.arange(block, dtype=jnp.int32)
    live = column < x_ref.shape[1]
    x = triton.load(x_ref.at[row, column], mask=live, other=jnp.zeros((), x_ref.dtype)).astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=0) / 127
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)
    above = x / scale + 0.5
    nearest = jnp.floor(above)
    # Of two equally near, the even one. The backend has no rounding to even.
    odd_tie = (above == nearest) & (nearest != 2 * jnp.floor(nearest / 2))
    nearest = jnp.clip(jnp.where(odd_tie, nearest - 1, nearest), -127, 127)
    triton.store(plane_ref.at[row, column], nearest.astype(jnp.int8), mask=live)
    triton.store(scale_ref.at[row, jnp.zeros(1, jnp.int32)], jnp.full(1, scale))
