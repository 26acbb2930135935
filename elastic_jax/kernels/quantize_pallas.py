"""Rounding activations to int8 as Pallas kernels (Triton backend), after a norm or not: no float32 goes through memory.

A program has one row, in pieces. A row that would need so many registers that few programs share a multiprocessor is
read twice: once for its largest value, then, from a cache, to be rounded.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Float32, Int8

from elastic_jax.norm import RMSNorm
from elastic_jax.quantization import quantize_8bit as quantize_8bit_reference

_FEW = 16
"""Rows up to which XLA fuses the rounding with what is before it, and a kernel of its own would only wait longer."""

_HELD = 8192
"""Columns up to which a row is kept in registers."""

_INTEGER = 1.5 * 2**23
"""A float32 whose last bit is 1, and remains so when less than 2**22 is added: the sum is rounded to an integer, of two
equally near to the even one, and its last bits are that integer."""


@dataclasses.dataclass(frozen=True)
class QuantizeTiles:
    """Sizes of the kernels.

    Attributes:
        piece: columns handled at once; a power of two.
        warps: warps a program.
        held: whether a row is kept in registers, not read twice.
    """

    piece: int
    warps: int
    held: bool


def quantize_8bit(
    x: Float[Array, "rows in"], norm: RMSNorm | None, blocks: int
) -> tuple[Int8[Array, "rows in"], Float32[Array, "rows blocks"]]:
    """`quantization.quantize_8bit`; numbers halfway between two integers may fall on either side."""
    if x.shape[0] <= _FEW:
        return quantize_8bit_reference(x, norm, blocks)
    tiles = choose_tiles(x.shape[1], blocks, normed=norm is not None)
    if norm is None:
        return run(x, blocks, tiles, interpret=False)
    return run_normed(x, norm.weight.get_value(), norm.eps, blocks, tiles, interpret=False)


def choose_tiles(width: int, blocks: int, *, normed: bool) -> QuantizeTiles:
    """Sizes of the kernels for rows of a width."""
    block = width // blocks
    row = width if normed else block
    if normed or row <= _HELD:
        warps = 4 if row <= _HELD else 8
        return QuantizeTiles(min(1024, _power_of_two(block)), warps, held=True)
    return QuantizeTiles(4096, 8, held=False)


@functools.partial(jax.jit, static_argnames=("blocks", "tiles", "interpret"))
def run(
    x: Float[Array, "rows in"], blocks: int, tiles: QuantizeTiles, *, interpret: bool
) -> tuple[Int8[Array, "rows in"], Float32[Array, "rows blocks"]]:
    """`quantize_8bit` without a norm by the kernel, or in Pallas's interpreter, which runs anywhere."""
    rows, width = x.shape
    plane, scale = pallas.pallas_call(
        functools.partial(quantize_kernel, tiles=tiles),
        grid=(rows * blocks,),
        out_shape=_out_shape(rows * blocks, width // blocks, 1),
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=1),
        interpret=interpret,
    )(x.reshape(rows * blocks, width // blocks))
    return plane.reshape(rows, width), scale.reshape(rows, blocks)


@functools.partial(jax.jit, static_argnames=("eps", "blocks", "tiles", "interpret"))
def run_normed(
    x: Float[Array, "rows in"],
    weight: Float[Array, " in"],
    eps: float,
    blocks: int,
    tiles: QuantizeTiles,
    *,
    interpret: bool,
) -> tuple[Int8[Array, "rows in"], Float32[Array, "rows blocks"]]:
    """`quantize_8bit` after `RMSNorm` by the kernel, or in Pallas's interpreter."""
    rows, width = x.shape
    return pallas.pallas_call(
        functools.partial(quantize_normed_kernel, eps=eps, tiles=tiles),
        grid=(rows,),
        out_shape=_out_shape(rows, width, blocks),
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=1),
        interpret=interpret,
    )(x, weight)


def _out_shape(rows: int, width: int, blocks: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return jax.ShapeDtypeStruct((rows, width), jnp.int8), jax.ShapeDtypeStruct((rows, blocks), jnp.float32)


def quantize_kernel(x_ref: Any, plane_ref: Any, scale_ref: Any, *, tiles: QuantizeTiles) -> None:
    """The kernel: one row. Profilers show its name."""
    row = pallas.program_id(0)
    width = x_ref.shape[1]
    if tiles.held:
        pieces = [(*place, _load(x_ref, row, *place)) for place in _places(0, width, tiles.piece)]
        scale = _scale(functools.reduce(jnp.maximum, [_magnitude(x) for *_, x in pieces]))
        for column, live, x in pieces:
            _store(plane_ref, row, column, live, x * (1.0 / scale))
    else:
        count = jnp.int32(-(-width // tiles.piece))

        def place(number: Array) -> tuple[Array, Array | None]:
            column = number * tiles.piece + jnp.arange(tiles.piece, dtype=jnp.int32)
            return column, column < width if width % tiles.piece else None

        def largest(number: Array, found: Array) -> Array:
            return jnp.maximum(found, _magnitude(_load(x_ref, row, *place(number))))

        def store(number: Array, inverse: Array) -> Array:
            _store(plane_ref, row, *place(number), _load(x_ref, row, *place(number)) * inverse)
            return inverse

        found = jax.lax.fori_loop(jnp.int32(0), count, largest, jnp.zeros(tiles.piece, jnp.int32))
        scale = _scale(found)
        jax.lax.fori_loop(jnp.int32(0), count, store, 1.0 / scale)
    triton.store(scale_ref.at[row, jnp.zeros(1, jnp.int32)], jnp.full(1, scale))


def quantize_normed_kernel(
    x_ref: Any, weight_ref: Any, plane_ref: Any, scale_ref: Any, *, eps: float, tiles: QuantizeTiles
) -> None:
    """The kernel after a norm: one row. Profilers show its name."""
    row = pallas.program_id(0)
    width, blocks = x_ref.shape[1], scale_ref.shape[1]
    size = width // blocks
    pieces = [
        [(*place, _load(x_ref, row, *place)) for place in _places(block * size, size, tiles.piece)]
        for block in range(blocks)
    ]
    squares = functools.reduce(jnp.add, [x * x for block in pieces for *_, x in block])
    factor = jax.lax.rsqrt(jnp.sum(squares) / width + eps)

    def normed(column: Array, live: Array | None, x: Array) -> Array:
        weight = triton.load(weight_ref.at[column], mask=live, other=_zero(weight_ref, live))
        return x * factor * weight.astype(jnp.float32)

    for number, block in enumerate(pieces):
        block = [(column, live, normed(column, live, x)) for column, live, x in block]
        scale = _scale(functools.reduce(jnp.maximum, [_magnitude(x) for *_, x in block]))
        for column, live, x in block:
            _store(plane_ref, row, column, live, x * (1.0 / scale))
        triton.store(scale_ref.at[row, jnp.full(1, number, jnp.int32)], jnp.full(1, scale))


def _places(start: int, size: int, piece: int) -> Iterator[tuple[Array, Array | None]]:
    """Columns of the pieces that `size` columns from `start` on are cut into, and which of them exist, if not all."""
    for begin in range(0, size, piece):
        offset = begin + jnp.arange(piece, dtype=jnp.int32)
        yield start + offset, offset < size if begin + piece > size else None


def _load(x_ref: Any, row: Array, column: Array, live: Array | None) -> Array:
    return triton.load(x_ref.at[row, column], mask=live, other=_zero(x_ref, live)).astype(jnp.float32)


def _zero(ref: Any, live: Array | None) -> Array | None:
    return None if live is None else jnp.zeros((), ref.dtype)


def _magnitude(x: Array) -> Array:
    """The bits of absolute values, which as integers are in the same order, and NaN above them all.

    A maximum of float32 would be one without NaN on this backend, and so hide it.
    """
    return jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(0x7FFFFFFF)


def _scale(magnitude: Array) -> Array:
    scale = jax.lax.bitcast_convert_type(jnp.max(magnitude, axis=0), jnp.float32) / 127
    return jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)


def _store(plane_ref: Any, row: Array, column: Array, live: Array | None, quotient: Array) -> None:
    """Rounds quotients, which are 127 at most but for the last bit, and stores them."""
    integer = jax.lax.bitcast_convert_type(quotient + jnp.float32(_INTEGER), jnp.int32)
    triton.store(plane_ref.at[row, column], integer.astype(jnp.int8), mask=live)


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`: the only sizes Triton has."""
    return 1 << (n - 1).bit_length()
