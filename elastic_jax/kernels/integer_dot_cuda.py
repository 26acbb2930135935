"""The integer dot of many rows on Hopper, in CUDA C++ (`cuda/integer_dot.cuh`).

It computes what `integer_dot_pallas` does, in another way: tiles twice as large, which halve what the L2 cache must
deliver; operands fetched by a thread of their own (the tensor memory accelerator), so that the tensor cores never wait
for them to be issued; and products that overlap, which Pallas's Triton backend has for float32 sums alone. Blocks are
as many as multiprocessors, and go from tile to tile.

It is called by `integer_dot_pallas`, which has the other products. Pallas's Mosaic backend could express it, but its
executables are assembled when they are loaded.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int8

from elastic_jax.kernels import cuda_library

CAPABILITY = 90
"""The one compute capability that has these instructions, ten times its number."""

_NAME = "the integer dot called 'pallas'"
_INSTEAD = "use the one called 'xla' instead"

_TARGET = "elastic_prompt_dot"

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


def library_path() -> Path:
    """The library of kernels, which `cuda/build.sh` builds."""
    return cuda_library.path_of("libelastic_prompt.so")


@functools.cache
def register() -> None:
    """Makes the kernels known to XLA; needed before a program with them is compiled or loaded. Needs no GPU.

    Raises:
        ConfigError: the library cannot be loaded on this machine.
    """
    cuda_library.register(library_path(), {_TARGET: "ElasticPromptDot"}, _NAME, _INSTEAD)


def choose_width(
    capability: int, multiprocessors: int, rows: int, out: int, contraction: int, blocks: int
) -> int | None:
    """Outputs of a tile for a product, or None where the kernel is not for it.

    It is not for other GPUs, few rows, sizes that tiles do not divide, nor JAX's plugin for CUDA 12, whose runtime the
    library does not have.

    Args:
        capability: the GPU's compute capability, ten times its number.
        multiprocessors: the GPU's.
        rows: rows of activations.
        out: outputs.
        contraction: length of the contraction.
        blocks: scales a row, for equal parts of the contraction.
    """
    widths = [width for width in (_WIDTHS if blocks == 1 else _BLOCKED_WIDTHS) if out % width == 0]
    if capability != CAPABILITY or rows < _LEAST_ROWS or contraction % (blocks * _STEP) or not widths:
        return None
    if cuda_library.has_cuda_12():
        return None

    def cost(width: int) -> int:
        """Rounds that the multiprocessors go through, times how long one is."""
        tiles = -(-rows // _ROWS) * (out // width)
        return -(-tiles // multiprocessors) * (width + _BESIDE)

    return min(widths, key=cost)


# Jitted, so that a model's layers trace and lower the call once.
@functools.partial(jax.jit, static_argnames=("width", "gated"))
def run(
    x: Int8[Array, "rows in"],
    row_scales: Float32[Array, "rows blocks"],
    values: Int8[Array, "out in"],
    scales: Float32[Array, "out 1"],
    residual: Float[Array, "rows out"] | None,
    width: int,
    *,
    gated: bool,
) -> Float[Array, "rows columns"]:
    """`integer_dot_pallas.multiply` or `multiply_gated`, by this kernel.

    Args:
        x: rows of int8.
        row_scales: their scales.
        values: the weight.
        scales: its scales.
        residual: as in `multiply`, in bfloat16.
        width: outputs of a tile, as `choose_width` finds it.
        gated: whether to gate.

    Raises:
        ConfigError: the library cannot be loaded on this machine.
    """
    register()
    rows, out = x.shape[0], values.shape[0]
    shape = (rows, out // 2) if gated else (rows, out)
    dtype = jnp.float32 if residual is None and not gated else jnp.bfloat16
    return jax.ffi.ffi_call(_TARGET, jax.ShapeDtypeStruct(shape, dtype))(
        x,
        row_scales,
        values,
        scales,
        jnp.zeros((0, out), jnp.bfloat16) if residual is None else residual,
        gated=np.int32(gated),
        width=np.int32(width),
        together=np.int32(_TOGETHER),
    )
