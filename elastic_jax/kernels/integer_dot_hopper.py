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
from jax.experimental.pallas import mosaic_gpu
from jaxtyping import Array, Float, Float32, Int8

CAPABILITY = 90
"""The one compute capability that has these instructions."""

_WARPGROUPS = 2
"""That multiply; each has its own rows of a tile."""

_DEPTH = 128
"""Length of the contraction that is fetched at once: 128 bytes, the widest rows that shared memory swizzles."""

_STORED = 128
"""Bytes of a row that are stored at once, for the same reason."""


@dataclasses.dataclass(frozen=True)
class HopperTiles:
    """Sizes of the kernel.

    Attributes:
        rows: rows of a tile.
        out: outputs of a tile; with a gate, half of them are gates.
        stages: fetches in flight.
        together: tiles of rows that are walked for one tile of outputs after the other, for the L2 cache's sake.
        programs: the device's multiprocessors.
    """

    rows: int
    out: int
    stages: int
    together: int
    programs: int


@functools.partial(jax.jit, static_argnames=("tiles", "gated", "interpret"))
def run(
    x: Int8[Array, "rows in"],
    row_scales: Float32[Array, "rows 1"],
    values: Int8[Array, "out in"],
    scales: Float32[Array, "out 1"],
    residual: Float[Array, "rows out"] | None,
    tiles: HopperTiles,
    *,
    gated: bool,
    interpret: Any = False,
) -> Float[Array, "rows columns"]:
    """`integer_dot_pallas.multiply` or `multiply_gated`."""
    rows, out = x.shape[0], values.shape[0]
    dtype = jnp.bfloat16 if gated else jnp.float32 if residual is None else residual.dtype
    kernel = mosaic_gpu.kernel(
        functools.partial(integer_dot_hopper_kernel, tiles=tiles, gated=gated),
        out_type=jax.ShapeDtypeStruct((rows, out // 2 if gated else out), dtype),
        grid=(tiles.programs,),
        grid_names=("program",),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=mosaic_gpu.CompilerParams(lowering_semantics=mosaic_gpu.LoweringSemantics.Lane),
        interpret=interpret,
    )
    return kernel(x, row_scales[:, 0], values, scales[:, 0], *(() if residual is None else (residual,)))


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
    row_tiles, out_tiles = x_ref.shape[0] // tiles.rows, values_ref.shape[0] // tiles.out
    operand = (mosaic_gpu.TilingTransform((8, _DEPTH)), mosaic_gpu.SwizzleTransform(_DEPTH))
    stored = _STORED // out_ref.dtype.itemsize

    def pipeline(body: Any, context: Any) -> Any:
        def fetched(size: int) -> Any:
            return mosaic_gpu.BlockSpec(
                (size, _DEPTH),
                lambda step: (0, step),
                transforms=operand,
                memory_space=mosaic_gpu.SMEM,
                delay_release=1,
            )

        return mosaic_gpu.emit_pipeline_warp_specialized(
            body,
            grid=(x_ref.shape[1] // _DEPTH,),
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
            transforms=(mosaic_gpu.TilingTransform((8, stored)), mosaic_gpu.SwizzleTransform(_STORED)),
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

            def scaled(sums: Array, of_rows: Array, first: Array) -> Array:
                of_outs = mosaic_gpu.load(
                    scales_ref.at[pallas.ds(first, stored)], layout=layout.reduce(0), optimized=False
                )
                found = sums.astype(jnp.float32) * jax.lax.broadcast_in_dim(of_rows, sums.shape, (0,))
                return found * jax.lax.broadcast_in_dim(of_outs, sums.shape, (1,))

            def store(sums: list[Array]) -> None:
                of_rows = mosaic_gpu.load(
                    row_scales_ref.at[pallas.ds(row, height)], layout=layout.reduce(1), optimized=False
                )
                for piece in range(width // stored):  # of the whole, there would be too many registers
                    columns, first = slice(piece * stored, (piece + 1) * stored), column + piece * stored
                    place = pallas.ds(row, height), pallas.ds(first, stored)
                    found = scaled(sums[0][:, columns], of_rows, first)
                    if gated:
                        up = scaled(sums[1][:, columns], of_rows, apart + first)
                        found = found / (1.0 + jnp.exp(-found)) * up
                    if residual_ref:
                        there = mosaic_gpu.load(residual_ref[0].at[place], layout=layout, optimized=False)
                        # As `quantization.add_product`; see the other kernel.
                        found = there.astype(jnp.float32) + found.astype(there.dtype).astype(jnp.float32)
                    buffer = out_smem.at[warpgroup, piece % 2]
                    mosaic_gpu.wait_smem_to_gmem(1, wait_read_only=True)
                    buffer[...] = found.astype(out_ref.dtype)
                    mosaic_gpu.commit_smem()
                    mosaic_gpu.copy_smem_to_gmem(buffer, out_ref.at[place])

            def context(evaluate: Any) -> None:
                @functools.partial(pallas.run_scoped, sums=[mosaic_gpu.ACC((height, width), jnp.int32)] * parts)
                def _(sums: Any) -> None:
                    evaluate(tuple(sums))
                    store([each[...] for each in sums])

            def each_step(_: Any, x_smem: Any, *operands: Any) -> Any:
                *values_smem, sums = operands
                mine = x_smem.at[pallas.ds(warpgroup * height, height)]
                for total, part in zip(sums, values_smem, strict=True):
                    mosaic_gpu.wgmma(total, mine, mosaic_gpu.transpose_ref(part, (1, 0)))
                mosaic_gpu.wgmma_wait(parts)  # for the step before
                return sums

            weights = [values_ref.at[pallas.ds(part * apart + column, width), :] for part in range(parts)]
            pipeline(each_step, context)(
                x_ref.at[pallas.ds(row_tile * tiles.rows, tiles.rows), :], *weights, allocations=allocations
            )

    mosaic_gpu.wait_smem_to_gmem(0, wait_read_only=True)
