"""The integer dot of many rows on Hopper, as a Pallas kernel of the Mosaic backend.

It computes what `integer_dot_pallas` does, bit for bit, in another way: tiles twice as large, which halve what the L2
cache must deliver; operands fetched by a warpgroup of their own (the tensor memory accelerator), so that the tensor
cores of two others never wait for them to be issued; and products that overlap, which the Triton backend has for
float32 sums alone. Programs are as many as multiprocessors, and go from tile to tile.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas
from jax.experimental.pallas import mosaic_gpu as typed_mosaic_gpu
from jaxtyping import Array, Float, Float32, Int8

mosaic_gpu: Any = typed_mosaic_gpu  # Its annotations miss some of what it exports and implements.

CAPABILITY = 90
"""The one compute capability that has these instructions."""

_WARPGROUPS = 2
"""That multiply; each has its own rows of a tile."""

_SWIZZLE = 128
"""Bytes: the widest rows that shared memory swizzles."""


_LEAST_ROWS = 512
"""Rows from which on the kernel is used: with fewer, tiles of its size leave multiprocessors idle."""


@dataclasses.dataclass(frozen=True)
class HopperTiles:
    """Sizes of the kernel.

    Attributes:
        rows: rows of a tile.
        out: outputs of a tile; with a gate, half of them are gates.
        contracted: length of the contraction that is fetched at once. With scales of blocks, its products' sums are
            scaled, so that it divides a block.
        stages: fetches in flight.
        together: tiles of rows that are walked for one tile of outputs after the other, for the L2 cache's sake.
        programs: the device's multiprocessors.
    """

    rows: int
    out: int
    contracted: int
    stages: int
    together: int
    programs: int


# As many fetches as fit into shared memory beside what is stored.
_WHOLE = (HopperTiles(128, 256, 128, 4, 8, 0), HopperTiles(128, 128, 128, 5, 8, 0))
_BLOCKED = (HopperTiles(128, 128, 256, 3, 8, 0),)

_BESIDE = 32
"""Outputs that take as long as all that a tile of any width takes beside its outputs."""


@functools.partial(jax.jit, static_argnames=("tiles", "gated", "interpret"))
def run(
    x: Int8[Array, "rows in"],
    row_scales: Float32[Array, "rows blocks"],
    values: Int8[Array, "out in"],
    scales: Float32[Array, "out 1"],
    residual: Float[Array, "rows out"] | None,
    tiles: HopperTiles,
    *,
    gated: bool,
    interpret: Any = False,
) -> Float[Array, "rows columns"]:
    """`integer_dot_pallas.multiply` or `multiply_gated`, by this kernel.

    Args:
        x: rows of int8.
        row_scales: their scales.
        values: the weight.
        scales: its scales.
        residual: as in `multiply`.
        tiles: sizes of the kernel, which divide those of the weight.
        gated: whether to gate.
        interpret: what Pallas calls so; for tests.
    """
    rows, out = x.shape[0], values.shape[0]
    dtype = jnp.bfloat16 if gated else jnp.float32 if residual is None else residual.dtype
    missing = -rows % tiles.rows
    if missing:  # of the activations, which are small; the weight is never copied
        x, row_scales = (jnp.pad(array, ((0, missing), (0, 0))) for array in (x, row_scales))
        residual = None if residual is None else jnp.pad(residual, ((0, missing), (0, 0)))
    kernel = mosaic_gpu.kernel(
        functools.partial(integer_dot_hopper_kernel, tiles=tiles, gated=gated),
        out_type=jax.ShapeDtypeStruct((rows + missing, out // 2 if gated else out), dtype),
        grid=(tiles.programs,),
        grid_names=("program",),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=mosaic_gpu.CompilerParams(lowering_semantics=mosaic_gpu.LoweringSemantics.Lane),
        interpret=interpret,
    )
    found = kernel(x, row_scales.T, values, scales[:, 0], *(() if residual is None else (residual,)))
    return found[:rows] if missing else found


def choose_tiles(
    capability: int, programs: int, rows: int, out: int, contraction: int, blocks: int
) -> HopperTiles | None:
    """Sizes of the kernel for a product, or None where it is not for it: another GPU, few rows, odd sizes.

    Args:
        capability: the GPU's compute capability, ten times its number.
        programs: its multiprocessors.
        rows: rows of activations.
        out: outputs.
        contraction: length of the contraction.
        blocks: scales a row, for equal parts of the contraction.
    """
    kinds = _WHOLE if blocks == 1 else _BLOCKED
    fitting = [k for k in kinds if out % k.out == 0 and contraction // blocks % k.contracted == 0]
    if capability != CAPABILITY or rows < _LEAST_ROWS or not fitting:
        return None

    def cost(tiles: HopperTiles) -> int:
        """Rounds that the programs go through, times how long one is."""
        number = -(-rows // tiles.rows) * (out // tiles.out)
        return -(-number // programs) * (tiles.out + _BESIDE)

    return dataclasses.replace(min(fitting, key=cost), programs=programs)


def integer_dot_hopper_kernel(
    x_ref: Any,
    row_scales_ref: Any,
    values_ref: Any,
    scales_ref: Any,
    *residual_and_out: Any,
    tiles: HopperTiles,
    gated: bool,
) -> None:
    """The kernel: tiles of outputs, one after the other. Profilers do not show its name."""
    *residual_ref, out_ref = residual_and_out
    height = tiles.rows // _WARPGROUPS
    # Gates and the numbers that they gate are products of their own: their weights lie far apart.
    parts = 2 if gated else 1
    width = tiles.out // parts
    apart = values_ref.shape[0] // 2
    blocks = row_scales_ref.shape[0]
    # Products of a step may run into the next one, unless their sums are wanted.
    delayed = 1 if blocks == 1 else 0
    row_tiles, out_tiles = x_ref.shape[0] // tiles.rows, values_ref.shape[0] // tiles.out
    operand = (mosaic_gpu.TilingTransform((8, _SWIZZLE)), mosaic_gpu.SwizzleTransform(_SWIZZLE))
    stored = _SWIZZLE // out_ref.dtype.itemsize

    def pipeline(body: Any, context: Any) -> Any:
        def fetched(size: int) -> Any:
            return mosaic_gpu.BlockSpec(
                (size, tiles.contracted),
                lambda step: (0, step),
                transforms=operand,
                memory_space=mosaic_gpu.SMEM,
                delay_release=delayed,
            )

        return mosaic_gpu.emit_pipeline_warp_specialized(
            body,
            grid=(x_ref.shape[1] // tiles.contracted,),
            memory_registers=40,
            in_specs=[fetched(tiles.rows), *[fetched(width)] * parts],
            wg_axis="warpgroup",
            num_compute_wgs=_WARPGROUPS,
            max_concurrent_steps=tiles.stages,
            compute_context=context,
        )

    def nothing(*_: Any) -> None:
        pass

    @functools.partial(
        pallas.run_scoped,
        # What the functions do does not matter for what the pipeline allocates.
        allocations=pipeline(nothing, nothing).get_allocations(x_ref, *[values_ref] * parts),
        out_smem=mosaic_gpu.SMEM(
            (_WARPGROUPS, 2, height, stored),
            out_ref.dtype,
            transforms=(mosaic_gpu.TilingTransform((8, stored)), mosaic_gpu.SwizzleTransform(_SWIZZLE)),
        ),
        collective_axes="warpgroup",
    )
    def _(allocations: Any, out_smem: Any) -> None:
        warpgroup = jax.lax.axis_index("warpgroup")

        @mosaic_gpu.nd_loop((row_tiles * out_tiles,), collective_axes="program")
        def _(loop: Any) -> None:
            (number,) = loop.index
            row_tile, out_tile = mosaic_gpu.planar_snake(number, (row_tiles, out_tiles), 0, tiles.together)
            row, column = row_tile * tiles.rows + warpgroup * height, out_tile * width

            layout = mosaic_gpu.Layout.WGMMA

            def row_scale(block: Any) -> Array:
                place = row_scales_ref.at[block, pallas.ds(row, height)]
                return mosaic_gpu.load(place, layout=layout.reduce(1), optimized=False)

            def of_rows(sums: Array, scale: Array) -> Array:
                return sums.astype(jnp.float32) * jax.lax.broadcast_in_dim(scale, sums.shape, (0,))

            def of_outs(sums: Array, first: Array) -> Array:
                place = scales_ref.at[pallas.ds(first, stored)]
                scale = mosaic_gpu.load(place, layout=layout.reduce(0), optimized=False)
                return sums * jax.lax.broadcast_in_dim(scale, sums.shape, (1,))

            def store(totals: list[Array]) -> None:
                scale = row_scale(0) if blocks == 1 else None
                for piece in range(width // stored):  # of the whole, there would be too many registers
                    columns, first = slice(piece * stored, (piece + 1) * stored), column + piece * stored
                    place = pallas.ds(row, height), pallas.ds(first, stored)
                    parted = [total[:, columns] for total in totals]
                    if scale is not None:
                        parted = [of_rows(part, scale) for part in parted]
                    found = of_outs(parted[0], first)
                    if gated:
                        found = found / (1.0 + jnp.exp(-found)) * of_outs(parted[1], apart + first)
                    if residual_ref:
                        there = mosaic_gpu.load(residual_ref[0].at[place], layout=layout, optimized=False)
                        # As `quantization.add_product`; see the other kernel.
                        found = there.astype(jnp.float32) + found.astype(there.dtype).astype(jnp.float32)
                    buffer = out_smem.at[warpgroup, piece % 2]
                    mosaic_gpu.wait_smem_to_gmem(1, wait_read_only=True)
                    buffer[...] = found.astype(out_ref.dtype)
                    mosaic_gpu.commit_smem()
                    mosaic_gpu.copy_smem_to_gmem(buffer, out_ref.at[place])

            accumulators = [mosaic_gpu.ACC((height, width), jnp.int32)] * parts

            def multiply(sums: Any, x_smem: Any, values_smem: Any) -> None:
                mine = x_smem.at[pallas.ds(warpgroup * height, height)]
                for total, part in zip(sums, values_smem, strict=True):
                    mosaic_gpu.wgmma(total, mine, part.transpose((1, 0)))

            def whole(evaluate: Any) -> None:
                @functools.partial(pallas.run_scoped, sums=accumulators)
                def _(sums: Any) -> None:
                    evaluate(tuple(sums))
                    store([each[...] for each in sums])

            def whole_step(_: Any, x_smem: Any, *operands: Any) -> Any:
                *values_smem, sums = operands
                multiply(sums, x_smem, values_smem)
                mosaic_gpu.wgmma_wait(parts)  # for the step before
                return sums

            def blocked(evaluate: Any) -> None:
                zeros = mosaic_gpu.layout_cast(jnp.zeros((height, width), jnp.float32), layout)
                store(list(evaluate((zeros,) * parts)))

            def blocked_step(index: Any, x_smem: Any, *operands: Any) -> Any:
                *values_smem, totals = operands
                scale = row_scale(index[0] // (x_ref.shape[1] // blocks // tiles.contracted))

                @functools.partial(pallas.run_scoped, sums=accumulators)
                def added(sums: Any) -> tuple[Array, ...]:
                    multiply(sums, x_smem, values_smem)
                    return tuple(each[...] for each in sums)

                return tuple(total + of_rows(each, scale) for total, each in zip(totals, added, strict=True))

            weights = [values_ref.at[pallas.ds(part * apart + column, width), :] for part in range(parts)]
            pipeline(*((whole_step, whole) if blocks == 1 else (blocked_step, blocked)))(
                x_ref.at[pallas.ds(row_tile * tiles.rows, tiles.rows), :], *weights, allocations=allocations
            )

    mosaic_gpu.wait_smem_to_gmem(0, wait_read_only=True)
