"""The Pallas integer dot on a GPU: which sizes of the kernel are fastest, first checking that each is right.

Method. For every weight of Mistral-Small-3.1-24B and several numbers of rows, candidates are tried, then variants of
the best. One jitted call multiplies as many different weights as 256 MB hold, so that nothing comes from the L2 cache
that would not in a model; as many calls as fill 20 ms are put in flight and waited for once, three times after a
warm-up, and the fastest counts. Correctness: the largest difference from the same product in bf16 (int8 is exact in
bf16, and so are float32 sums of products below 2**24), over the largest output, must be below 2e-6.
`read_tb_s` counts the weight once, `top_s` counts 2 x rows x out x in. On Hopper the kernel for many rows is tried as
well; its sizes are not written, since a rule in `prompt_dot_cuda` chooses them.

    python benches/integer_dot.py --tiles elastic_jax/kernels/integer_dot_tiles.json --out RESULT.json
    python benches/integer_dot.py --blocks --rows 1024 4096 ...    # with activation scales of blocks (w8a8b)
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from environment import report
from random_model import MISTRAL_SMALL
from tiles import write_tiles

from elastic_jax.groups import LM_HEAD, Group, model_groups
from elastic_jax.kernels import integer_dot_pallas, prompt_dot_cuda
from elastic_jax.kernels.integer_dot_pallas import DotTiles, split_contraction, tiles_for_blocks
from elastic_jax.kernels.pallas_device import LEAST_CAPABILITY, multiprocessors
from elastic_jax.quantization import activation_blocks

ROWS = (16, 32, 64, 128, 256, 1152, 4096)
"""Rows of activations that tiles are chosen for, or fewer: two for each generated token, one for each of a prompt."""

SHARED_MEMORY = 220 * 1024
BURST_SECONDS = 0.02
COPIES_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class CudaTiles:
    """Outputs of a tile of `prompt_dot_cuda`."""

    width: int


def candidates(rows: int, out: int, contraction: int) -> Iterable[DotTiles]:
    if rows <= 128:
        height = max(16, rows)
        for width, depth in ((32, 256), (32, 512), (64, 128), (64, 256), (128, 128), (128, 256)):
            for programs in (264, 528):
                splits = split_contraction(out // width, depth, contraction, programs)
                yield DotTiles(height, width, depth, splits, 4, 4, True)
    if rows >= 128:
        for height, width, depth, warps, stages in (
            (128, 128, 128, 4, 3),
            (128, 128, 128, 8, 3),
            (128, 128, 64, 4, 4),
            (128, 256, 128, 8, 3),
            (256, 128, 128, 8, 3),
            (128, 64, 128, 4, 4),
            (64, 256, 128, 4, 3),
        ):
            programs = -(-rows // height) * (out // width)
            yield DotTiles(
                height, width, depth, split_contraction(programs, depth, contraction, 132), warps, stages, False
            )


def cuda_candidates(rows: int, out: int, contraction: int, blocks: int) -> Iterable[CudaTiles]:
    capability = int(float(jax.devices()[0].compute_capability) * 10)
    if prompt_dot_cuda.choose_width(capability, multiprocessors(), rows, out, contraction, blocks) is not None:
        yield from (CudaTiles(width) for width in (128, 256) if out % width == 0 and (blocks == 1 or width == 128))


def variants(tiles: DotTiles, rows: int, blocks: int) -> Iterable[DotTiles]:
    def changed(**sizes: Any) -> DotTiles:
        return dataclasses.replace(tiles, **sizes)

    if blocks > 1:
        yield changed(warps=4 if tiles.warps == 8 else 8)
    yield changed(weight_first=not tiles.weight_first)
    yield changed(stages=tiles.stages + 2)
    yield changed(stages=tiles.stages - 1)
    if rows <= 128:
        yield changed(warps=8)
        yield changed(warps=2)


def fits(tiles: DotTiles) -> bool:
    return tiles.stages * (tiles.rows + tiles.out) * tiles.contracted <= SHARED_MEMORY


class Case:
    """One product: its operands, and the time of each size of the kernel."""

    def __init__(self, rows: int, group: Group, key: Any, *, blocked: bool) -> None:
        self.rows, self.out, self.contraction = rows, group.out_size, group.in_size
        self.blocks = activation_blocks(group.in_size) if blocked else 1
        copies = max(1, min(16, COPIES_BYTES // (self.out * self.contraction)))
        keys = jax.random.split(key, copies + 3)
        self.x = _bytes(keys[0], (rows, self.contraction))
        self.row_scales = jax.random.uniform(keys[1], (rows, self.blocks), minval=0.5)
        self.scales = jax.random.uniform(keys[2], (self.out, 1), minval=0.5)
        self.weights = [_bytes(k, (self.out, self.contraction)) for k in keys[3:]]
        self.expected = _exact(self.x, self.row_scales, self.weights[0], self.scales)
        self.seconds: dict[DotTiles | CudaTiles, float] = {}

    def candidates(self) -> list[DotTiles | CudaTiles]:
        tiles = list(candidates(self.rows, self.out, self.contraction))
        if self.blocks > 1:
            tiles = [tiles_for_blocks(each, self.contraction // self.blocks, self.blocks) for each in tiles]
        cuda = cuda_candidates(self.rows, self.out, self.contraction, self.blocks)
        return [*(each for each in dict.fromkeys(tiles) if fits(each)), *cuda]

    def compile(self, tiles: DotTiles | CudaTiles) -> Any:
        def product(x: Any, row_scales: Any, weight: Any, scales: Any) -> Any:
            if isinstance(tiles, CudaTiles):
                return prompt_dot_cuda.run(x, row_scales, weight, scales, None, tiles.width, gated=False)
            return integer_dot_pallas.run(x, row_scales, weight, scales, None, tiles, gated=False, interpret=False)

        def call(x: Any, row_scales: Any, scales: Any, *weights: Any) -> Any:
            return [product(x, row_scales, weight, scales) for weight in weights]

        try:
            return jax.jit(call).lower(self.x, self.row_scales, self.scales, *self.weights).compile()
        except Exception as error:  # too much shared memory, say: not a candidate
            return f"{type(error).__name__}: {str(error)[:200]}"

    def measure(self, tiles: DotTiles | CudaTiles, call: Any) -> None:
        if isinstance(call, str):
            print(f"rows {self.rows} [{self.out}, {self.contraction}] {tiles}: {call}", flush=True)
            return
        arguments = (self.x, self.row_scales, self.scales, *self.weights)
        error = float(_difference(call(*arguments)[0], self.expected))
        if not error < 2e-6:
            print(f"rows {self.rows} [{self.out}, {self.contraction}] {tiles}: WRONG, {error:.3g}", flush=True)
            return
        start = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        once = time.perf_counter() - start
        calls = max(1, int(BURST_SECONDS / once))
        times = []
        for _ in range(3):
            start = time.perf_counter()
            for _ in range(calls):
                out = call(*arguments)
            jax.block_until_ready(out)
            times.append((time.perf_counter() - start) / calls / len(self.weights))
        self.seconds[tiles] = min(times)

    def fastest(self) -> DotTiles | CudaTiles:
        return min(self.seconds, key=lambda tiles: self.seconds[tiles])

    def best(self) -> DotTiles:
        """Of the kernel that sizes are written for."""
        return min((t for t in self.seconds if isinstance(t, DotTiles)), key=lambda tiles: self.seconds[tiles])

    def row(self, tiles: DotTiles | CudaTiles) -> dict[str, Any]:
        seconds = self.seconds[tiles]
        return {
            "rows": self.rows,
            "out": self.out,
            "in": self.contraction,
            "blocks": self.blocks,
            "kernel": type(tiles).__name__.removesuffix("Tiles"),
            "us": seconds * 1e6,
            "read_tb_s": self.out * self.contraction / seconds / 1e12,
            "top_s": 2 * self.rows * self.out * self.contraction / seconds / 1e12,
            "tiles": str(tuple(dataclasses.asdict(tiles).values())),
        }


def _bytes(key: Any, shape: tuple[int, int]) -> Any:
    return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), jnp.int8)


@jax.jit
def _exact(x: Any, row_scales: Any, values: Any, scales: Any) -> Any:
    rows, blocks = row_scales.shape
    x, values = (a.astype(jnp.bfloat16).reshape(a.shape[0], blocks, -1) for a in (x, values))
    sums = jnp.einsum("rbk,obk->bro", x, values, preferred_element_type=jnp.float32)
    return jnp.sum(sums * row_scales.T.reshape(blocks, rows, 1), axis=0) * scales[:, 0][None, :]


@jax.jit
def _difference(out: Any, expected: Any) -> Any:
    return jnp.max(jnp.abs(out - expected)) / jnp.max(jnp.abs(expected))


def sweep(rows: Sequence[int], threads: int, *, blocked: bool) -> list[Case]:
    groups = {(g.out_size, g.in_size): (name, g) for name, g in model_groups(MISTRAL_SMALL).items()}
    cases = []
    with ThreadPoolExecutor(threads) as pool:
        for name, group in groups.values():
            for count in rows:
                if name == LM_HEAD and count > 128:
                    continue  # its activations are few: the last tokens of prompts
                case = Case(count, group, jax.random.key(count, impl="unsafe_rbg"), blocked=blocked)
                first = case.candidates()
                for tiles, call in zip(first, pool.map(case.compile, first), strict=True):
                    case.measure(tiles, call)
                if not any(isinstance(tiles, DotTiles) for tiles in case.seconds):
                    continue
                second = [tiles for tiles in variants(case.best(), count, case.blocks) if fits(tiles)]
                for tiles, call in zip(second, pool.map(case.compile, second), strict=True):
                    case.measure(tiles, call)
                case.weights.clear()
                cases.append(case)
                print(json.dumps(case.row(case.fastest())), flush=True)
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--blocks", action="store_true", help="rows have a scale for each block of the contraction")
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--tiles", type=Path, help="write the fastest sizes here, for the kernel to use")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = jax.devices()[0]
    capability = int(float(device.compute_capability) * 10)
    if capability < LEAST_CAPABILITY:
        raise SystemExit(f"{device.device_kind} cannot run the kernel")
    cases = sweep(arguments.rows, arguments.threads, blocked=arguments.blocks)
    if arguments.tiles:
        entries = [
            {
                "capability": capability,
                "rows": case.rows,
                "out": case.out,
                "contraction": case.contraction,
                **({"blocks": case.blocks} if case.blocks > 1 else {}),
                "tiles": dataclasses.asdict(case.best()),
            }
            for case in cases
        ]
        write_tiles(arguments.tiles, entries)
    tried = [case.row(tiles) for case in cases for tiles in sorted(case.seconds, key=lambda t: case.seconds[t])]
    report([case.row(case.fastest()) for case in cases], {"bench": "integer_dot", "tried": tried}, arguments.out)


if __name__ == "__main__":
    main()
