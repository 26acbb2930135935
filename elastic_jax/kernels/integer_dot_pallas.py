"""Products of int8 as a Pallas kernel (Triton backend) for NVIDIA GPUs: int8 tensor cores, scales in the epilogue.

The interface is `dot_xla`'s; only the last rounding may differ. There is nothing in it for XLA to tune, so that
a program compiled without the device is as fast as one compiled on it.

Products of many rows on Hopper are left to `prompt_dot_cuda`.

A product of few rows is bound by reading the weight. Tiles of it are then the left operand, whose height the tensor
cores fill, and the contraction is split among programs wherever the outputs alone would leave multiprocessors idle.
"""

import dataclasses
import functools
import json
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas
from jax.experimental.pallas import triton
from jaxtyping import Array, BFloat16, Float, Float32, Int8

from elastic_jax.config import ModelConfig
from elastic_jax.errors import ConfigError
from elastic_jax.groups import model_groups
from elastic_jax.kernels import prompt_dot_cuda
from elastic_jax.kernels.pallas_device import LEAST_CAPABILITY, compute_capability, multiprocessors
from elastic_jax.quantization import add_product

_NAME = "the dot called 'pallas'"

_INSTEAD = "use the one called 'xla' instead"

_LEAST_OUT, _LEAST_IN = 16, 32
"""The smallest tile of the tensor cores."""

_SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
"""Bytes that a program may have, from a compute capability on (CUDA programming guide, technical specifications)."""

_FEW = 64
"""Rows up to which reading the weight is the limit."""

_PROGRAMS = 396
"""Programs that fill a device, three on each of an H200's multiprocessors; smaller devices queue them."""


@dataclasses.dataclass(frozen=True)
class DotTiles:
    """Sizes of the kernel; all but `warps` and `stages` are powers of two or divide their axis.

    Attributes:
        rows: rows a program.
        out: outputs a program.
        contracted: length of the contraction that is read at once.
        splits: programs that share one contraction.
        warps: warps a program.
        stages: tiles in flight a program.
        weight_first: whether the weight is the tensor cores' left operand.
    """

    rows: int
    out: int
    contracted: int
    splits: int
    warps: int
    stages: int
    weight_first: bool


def multiply(
    x: Int8[Array, "rows in"],
    row_scales: Float32[Array, "rows blocks"],
    values: Int8[Array, "out in"],
    scales: Float32[Array, "out 1"],
    residual: Float[Array, "rows out"] | None,
) -> Float[Array, "rows out"]:
    """`(x * row_scales) @ (values * scales).T`, with exact integer sums, added to `residual` if there is one.

    Raises:
        ConfigError: the device traced for is not an NVIDIA GPU that has what the kernel needs, or the sizes do not
            divide into its tiles.
    """
    width = _cuda_width_here(row_scales, values)
    if width is not None and (residual is None or residual.dtype == jnp.bfloat16):
        return prompt_dot_cuda.run(x, row_scales, values, scales, residual, width, gated=False)
    tiles = _tiles_here(x, row_scales, values)
    return run(x, row_scales, values, scales, residual, tiles, gated=False, interpret=False)


def multiply_gated(
    x: Int8[Array, "rows in"],
    row_scales: Float32[Array, "rows blocks"],
    values: Int8[Array, "out in"],
    scales: Float32[Array, "out 1"],
) -> BFloat16[Array, "rows half"]:
    """SwiGLU of the product, in the kernel: gate and up never go through memory.

    Raises:
        ConfigError: as `multiply`.
    """
    width = _cuda_width_here(row_scales, values)
    if width is not None:
        return prompt_dot_cuda.run(x, row_scales, values, scales, None, width, gated=True)
    tiles = dataclasses.replace(_tiles_here(x, row_scales, values), splits=1)
    return run(x, row_scales, values, scales, None, tiles, gated=True, interpret=False)


def _cuda_width_here(row_scales: Array, values: Array) -> int | None:
    """Tiles of the kernel in CUDA C++ that takes this product instead, if it does; it follows from shapes and GPU."""
    out, contraction = values.shape
    capability = compute_capability(_NAME, _INSTEAD)
    rows, blocks = row_scales.shape
    return prompt_dot_cuda.choose_width(capability, multiprocessors(), rows, out, contraction, blocks)


def _tiles_here(x: Array, row_scales: Array, values: Array) -> DotTiles:
    out, contraction = values.shape
    capability = compute_capability(_NAME, _INSTEAD)
    return choose_tiles(capability, x.shape[0], out, contraction, row_scales.shape[1])


# Jitted, so that a model's layers trace and lower the kernel once.
@functools.partial(jax.jit, static_argnames=("tiles", "gated", "interpret"))
def run(
    x: Int8[Array, "rows in"],
    row_scales: Float32[Array, "rows blocks"],
    values: Int8[Array, "out in"],
    scales: Float32[Array, "out 1"],
    residual: Float[Array, "rows out"] | None,
    tiles: DotTiles,
    *,
    gated: bool,
    interpret: bool,
) -> Float[Array, "rows columns"]:
    """`multiply` or `multiply_gated` with a given size of tiles, or in Pallas's interpreter, which runs anywhere.

    Raises:
        ConfigError: the weight does not divide into the tiles.
    """
    rows, contraction = x.shape
    out = values.shape[0]
    check_tiles(tiles, out, contraction, row_scales.shape[1])
    missing = -rows % tiles.rows
    if missing:  # of the activations, which are small; the weight is never copied
        x, row_scales = (jnp.pad(array, ((0, missing), (0, 0))) for array in (x, row_scales))
    # A part of a sum can be neither rounded nor added to what is there.
    inside = () if residual is None or tiles.splits > 1 else (residual,)
    dtype = jnp.dtype(jnp.bfloat16) if gated else inside[0].dtype if inside else jnp.dtype(jnp.float32)
    partial = pallas.pallas_call(
        functools.partial(integer_dot_kernel, tiles=tiles, gated=gated),
        # Programs that start together read the same weights.
        grid=(x.shape[0] // tiles.rows, out // tiles.out, tiles.splits),
        out_shape=jax.ShapeDtypeStruct((tiles.splits, rows, out // 2 if gated else out), dtype),
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
    )(x, row_scales, values, scales, *inside)
    return partial[0] if tiles.splits == 1 else add_product(residual, jnp.sum(partial, axis=0))


def integer_dot_kernel(
    x_ref: Any,
    row_scales_ref: Any,
    values_ref: Any,
    scales_ref: Any,
    *residual_and_out: Any,
    tiles: DotTiles,
    gated: bool,
) -> None:
    """The kernel: one tile of outputs, over one part of the contraction. Profilers show its name."""
    *residual_ref, out_ref = residual_and_out
    # Gated, a tile is half gate and half up.
    width = tiles.out // 2 if gated else tiles.out
    row_tile, out_tile, split = (pallas.program_id(axis) for axis in range(3))
    row = row_tile * tiles.rows + jnp.arange(tiles.rows, dtype=jnp.int32)
    place = jnp.arange(tiles.out, dtype=jnp.int32)
    half = jnp.where(place < width, 0, out_ref.shape[2] - width) if gated else 0
    out = out_tile * width + place + half
    blocks = row_scales_ref.shape[1]
    steps = values_ref.shape[1] // (tiles.contracted * tiles.splits)

    def scale_of(block: Array) -> Array:
        column = jnp.full(1, block, jnp.int32)
        found = triton.load(row_scales_ref.at[row[:, None], column[None, :]])
        return found.T if tiles.weight_first else found

    def each_step(step: Array, sums: Array) -> Array:
        at = (split * steps + step) * tiles.contracted + jnp.arange(tiles.contracted, dtype=jnp.int32)
        x = triton.load(x_ref.at[row[:, None], at[None, :]])
        values = triton.load(values_ref.at[out[:, None], at[None, :]])
        operands = (values, x) if tiles.weight_first else (x, values)
        product = jax.lax.dot_general(*operands, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        return sums + product

    shape = (tiles.out, tiles.rows) if tiles.weight_first else (tiles.rows, tiles.out)
    zeros = jnp.zeros(shape, jnp.int32)
    if blocks == 1:
        sums = jax.lax.fori_loop(jnp.int32(0), jnp.int32(steps), each_step, zeros)
        total = sums.astype(jnp.float32) * scale_of(jnp.int32(0))
    else:
        # One loop, with a turn at each block's end: a loop in a loop would empty the pipeline of loads at each.
        block_steps = values_ref.shape[1] // blocks // tiles.contracted

        def each_block_step(step: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            sums, total = each_step(step, carry[0]), carry[1]
            ended = split * steps + step + 1

            def add() -> tuple[Array, Array]:
                return zeros, total + sums.astype(jnp.float32) * scale_of(ended // block_steps - 1)

            return jax.lax.cond(ended % block_steps == 0, add, lambda: (sums, total))

        _, total = jax.lax.fori_loop(
            jnp.int32(0), jnp.int32(steps), each_block_step, (zeros, jnp.zeros(shape, jnp.float32))
        )
    total = total.T if tiles.weight_first else total
    first = jnp.zeros(1, jnp.int32)
    scaled = total * triton.load(scales_ref.at[out[:, None], first[None, :]]).T
    column = out_tile * width + jnp.arange(width, dtype=jnp.int32)
    if gated:
        gate, up = jnp.split(scaled, 2, axis=1)
        scaled = gate / (1.0 + jnp.exp(-gate)) * up
    mask = None
    if out_ref.shape[1] % tiles.rows:
        mask = jnp.broadcast_to((row < out_ref.shape[1])[:, None], scaled.shape)
    if residual_ref:
        there = triton.load(residual_ref[0].at[row[:, None], column[None, :]], mask=mask)
        # As `quantization.add_product`. A sum of two bfloat16 in float32 is rounded as one in bfloat16 would be.
        scaled = there.astype(jnp.float32) + scaled.astype(there.dtype).astype(jnp.float32)
    triton.store(out_ref.at[split, row[:, None], column[None, :]], scaled.astype(out_ref.dtype), mask=mask)


def choose_tiles(capability: int, rows: int, out: int, contraction: int, blocks: int = 1) -> DotTiles:
    """Sizes of the kernel for a product: measured ones (`integer_dot_tiles.json`) where there are some.

    Args:
        capability: the GPU's compute capability, ten times its number.
        rows: rows of activations.
        out: outputs.
        contraction: length of the contraction.
        blocks: scales a row, for equal parts of the contraction.

    Raises:
        ConfigError: the sizes do not divide into tiles.
    """
    tiles = _measured(capability, rows, out, contraction, blocks) if rows > _FEW or blocks == 1 else None
    if tiles is None:
        tiles = _measured(capability, rows, out, contraction, 1) or usual_tiles(capability, rows, out, contraction)
        if blocks > 1:
            tiles = tiles_for_blocks(tiles, contraction // blocks, blocks)
    check_tiles(tiles, out, contraction, blocks)
    return tiles


def _measured(capability: int, rows: int, out: int, contraction: int, blocks: int) -> DotTiles | None:
    measured = measured_tiles().get((capability, out, contraction, blocks), {})
    bound = min((bound for bound in measured if bound >= rows), default=max(measured, default=None))
    return None if bound is None else measured[bound]


def tiles_for_blocks(tiles: DotTiles, block: int, blocks: int) -> DotTiles:
    """The tiles that a dot with several scales a row takes instead: parts and steps that end where blocks do.

    It has two sums, and twice the warps to hold them.
    """
    depth = min(tiles.contracted, _power_of_two_in(block))
    splits = max(n for n in range(1, tiles.splits + 1) if blocks % n == 0)
    return dataclasses.replace(tiles, contracted=depth, splits=splits, warps=min(8, 2 * tiles.warps))


@functools.cache
def measured_tiles() -> dict[tuple[int, int, int, int], dict[int, DotTiles]]:
    """(compute capability, outputs, contraction, blocks) -> the most rows that tiles were chosen for -> tiles."""
    table: dict[tuple[int, int, int, int], dict[int, DotTiles]] = {}
    for entry in json.loads(resources.files(__package__).joinpath("integer_dot_tiles.json").read_text()):
        key = entry["capability"], entry["out"], entry["contraction"], entry.get("blocks", 1)
        table.setdefault(key, {})[entry["rows"]] = DotTiles(**entry["tiles"])
    return table


def usual_tiles(capability: int, rows: int, out: int, contraction: int) -> DotTiles:
    """Sizes of the kernel for a product that nobody has measured; they may not divide it."""
    few = rows <= _FEW
    height = max(16, 1 << (rows - 1).bit_length()) if few else 128
    width = min(_power_of_two_in(out), 64 if few else 128)
    depth = min(_power_of_two_in(contraction), 256 if few else 128)
    splits = split_contraction(-(-rows // height) * (out // width), depth, contraction, _PROGRAMS)
    held = _SHARED_MEMORY[max(known for known in _SHARED_MEMORY if known <= capability)] // ((height + width) * depth)
    return DotTiles(height, width, depth, splits, 4, min(held, 4 if few else 3), few)


def split_contraction(programs: int, depth: int, contraction: int, wanted: int) -> int:
    """Into how many parts to split a contraction so that there are enough programs, each of at least four steps."""
    splits = 1
    while programs * splits < wanted and contraction % (2 * splits * depth) == 0 and 8 * splits * depth <= contraction:
        splits *= 2
    return splits


def check_model(config: ModelConfig) -> None:
    """Refuses models whose weights do not divide into tiles.

    Raises:
        ConfigError: it is so.
    """
    for group in model_groups(config).values():
        check_tiles(usual_tiles(LEAST_CAPABILITY, 1, group.out_size, group.in_size), group.out_size, group.in_size)


def _power_of_two_in(n: int) -> int:
    """The largest power of two that divides a number."""
    return n & -n


def check_tiles(tiles: DotTiles, out: int, contraction: int, blocks: int = 1) -> None:
    """Refuses sizes that do not divide into tiles.

    Raises:
        ConfigError: it is so.
    """
    fits = out % tiles.out == 0 and contraction % (tiles.contracted * tiles.splits) == 0
    # Sums are scaled where a block ends, so a part that ended inside one would lose what it has added since.
    fits &= contraction // blocks % tiles.contracted == 0 and (blocks == 1 or blocks % tiles.splits == 0)
    if not fits or tiles.out < _LEAST_OUT or tiles.contracted < _LEAST_IN:
        raise ConfigError(
            f"{_NAME} takes weights whose outputs divide by {_LEAST_OUT} and whose inputs divide by {_LEAST_IN}, in "
            f"tiles that divide both and end where blocks of scales do; found [{out}, {contraction}], {blocks} "
            f"block(s) of scales and {tiles}; {_INSTEAD}"
        )
