"""Matrix products of many rows on Hopper, of int8 and of bfloat16, in CUDA C++ (`cuda/prompt_dot.cuh`).

Of int8 it computes what `integer_dot_pallas` does, in another way: tiles twice as large, which halve what the L2 cache
must deliver; operands fetched by a thread of their own (the tensor memory accelerator), so that the tensor cores never
wait for them to be issued; and products that overlap, which Pallas's Triton backend has for float32 sums alone. Blocks
are as many as multiprocessors, and go from tile to tile. `integer_dot_pallas` calls it, and has the other products.

Of bfloat16 it leaves XLA nothing to tune, and SwiGLU and the residual stream are applied to the sums as they are made.

Pallas's Mosaic backend could express it, but its executables are assembled when they are loaded.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Float32, Int8

from elastic_jax.kernels import cuda_library, dot_xla, prompt_library
from elastic_jax.kernels.pallas_device import compute_capability, multiprocessors

_NAME = "the dot called 'pallas'"
_INSTEAD = "use the one called 'xla' instead"

_ROWS, _STEP = 128, 128
"""Of a tile; and bytes of the contraction that are fetched at once."""

_WIDTHS = (256, 128)
"""Outputs of a tile; with a gate, half of them are gates."""

_BLOCKED_WIDTHS = (128,)
"""With scales of blocks there are float sums besides, and no registers for more."""

_TOGETHER = 16
"""Tiles of rows that are walked for one tile of outputs after the other, for the L2 cache's sake."""

_BESIDE = 32
"""Outputs that take as long as all that a tile of any width takes beside its outputs."""

_LEAST_ROWS = 512
"""Rows from which on the kernel is used: with fewer, tiles of its size leave multiprocessors idle."""


def choose_width(capability: int, multiprocessors: int, rows: int, out: int, row_bytes: int, blocks: int) -> int | None:
    """Outputs of a tile for a product, or None where the kernel is not for it.

    It is not for other GPUs, few rows, sizes that tiles do not divide, nor JAX's plugin for CUDA 12, whose runtime the
    library does not have.

    Args:
        capability: the GPU's compute capability, ten times its number.
        multiprocessors: the GPU's.
        rows: rows of activations.
        out: outputs.
        row_bytes: the contraction's, of a row.
        blocks: scales a row, for equal parts of the contraction.
    """
    widths = [width for width in (_WIDTHS if blocks == 1 else _BLOCKED_WIDTHS) if out % width == 0]
    if capability != prompt_library.CAPABILITY or rows < _LEAST_ROWS or row_bytes % (blocks * _STEP) or not widths:
        return None
    if cuda_library.has_cuda_12():
        return None

    def cost(width: int) -> int:
        """Rounds that the multiprocessors go through, times how long one is."""
        tiles = -(-rows // _ROWS) * (out // width)
        return -(-tiles // multiprocessors) * (width + _BESIDE)

    return min(widths, key=cost)


def multiply_float(
    x: Float[Array, "rows in"], weight: Float[Array, "out in"], residual: Float[Array, "rows out"] | None
) -> Float[Array, "rows out"]:
    """`dot_xla.multiply_float`, of bfloat16 by the kernel where it is for the product.

    Raises:
        ConfigError: the device traced for is not an NVIDIA GPU, or the library cannot be loaded on this machine.
    """
    width = _width_here(x, weight)
    if width is None or (residual is not None and residual.dtype != jnp.bfloat16):
        return dot_xla.multiply_float(x, weight, residual)
    return run(x.astype(jnp.bfloat16), None, weight, None, residual, width, gated=False)


def multiply_float_gated(x: Float[Array, "rows in"], weight: Float[Array, "out in"]) -> Float[Array, "rows half"]:
    """`dot_xla.multiply_float_gated`, of bfloat16 by the kernel where it is for the product.

    Raises:
        ConfigError: as `multiply_float`.
    """
    width = _width_here(x, weight)
    if width is None:
        return dot_xla.multiply_float_gated(x, weight)
    return run(x.astype(jnp.bfloat16), None, weight, None, None, width, gated=True)


def _width_here(x: Array, weight: Array) -> int | None:
    if weight.dtype != jnp.bfloat16 or x.shape[0] < _LEAST_ROWS:
        return None  # XLA's, on every platform
    capability = compute_capability(_NAME, _INSTEAD)
    out, contraction = weight.shape
    return choose_width(capability, multiprocessors(), x.shape[0], out, 2 * contraction, 1)


# Jitted, so that a model's layers trace and lower the call once.
@functools.partial(jax.jit, static_argnames=("width", "gated"))
def run(
    x: Int8[Array, "rows in"] | BFloat16[Array, "rows in"],
    row_scales: Float32[Array, "rows blocks"] | None,
    values: Int8[Array, "out in"] | BFloat16[Array, "out in"],
    scales: Float32[Array, "out 1"] | None,
    residual: BFloat16[Array, "rows out"] | None,
    width: int,
    *,
    gated: bool,
) -> Float[Array, "rows columns"]:
    """The products of `DotKernels` by the kernel: of int8, or of bfloat16, which has no scales.

    Args:
        x: rows, of the weight's type.
        row_scales: their scales.
        values: the weight.
        scales: its scales.
        residual: what the product is added to.
        width: outputs of a tile, as `choose_width` finds it.
        gated: whether to gate.

    Returns:
        float32 [rows, out]; bfloat16 [rows, out] with a residual, [rows, out / 2] if gated.

    Raises:
        ConfigError: the library cannot be loaded on this machine.
    """
    prompt_library.register()
    rows, out = x.shape[0], values.shape[0]
    shape = (rows, out // 2) if gated else (rows, out)
    dtype = jnp.float32 if residual is None and not gated else jnp.bfloat16
    none = jnp.zeros((0, 1), jnp.float32)
    return jax.ffi.ffi_call(prompt_library.DOT, jax.ShapeDtypeStruct(shape, dtype))(
        x,
        none if row_scales is None else row_scales,
        values,
        none if scales is None else scales,
        jnp.zeros((0, out), jnp.bfloat16) if residual is None else residual,
        gated=np.int32(gated),
        width=np.int32(width),
        together=np.int32(_TOGETHER),
    )
