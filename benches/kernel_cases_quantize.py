"""Rounding activations of prompt tokens to int8: what stands before each product of `w8a8` and `w8a8b`."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from kernel_case import Case, Place, Random, bytes_of, copies, each_layer, first_layer, first_result, largest
from random_model import SMALL

from elastic_jax import kernels
from elastic_jax.norm import RMSNorm
from elastic_jax.quantization import activation_blocks, quantize_8bit

ROWS = 4096


def roundings(place: Place) -> Iterable[Case]:
    config = place.config
    # qkv's and gate_up's inputs come from a norm, o's from attention in float32, down's from SwiGLU.
    inputs = (
        ("after a norm", config.hidden_size, jnp.bfloat16),
        ("of attention", config.num_heads * config.head_dim, jnp.float32),
        ("of SwiGLU", config.intermediate_size, jnp.bfloat16),
    )
    for name, width, dtype in inputs:
        for blocks in (1, activation_blocks(width)):
            for implementation in place.implementations("dot"):
                yield _rounding(place, implementation, name, width, dtype, blocks)


def _rounding(place: Place, implementation: str, name: str, width: int, dtype: Any, blocks: int) -> Case:
    rows = 32 if place.config == SMALL else ROWS
    normed = name == "after a norm"
    moved = bytes_of(((rows, width), dtype), ((rows, width), jnp.int8), ((rows, blocks), jnp.float32))
    count = copies(moved)

    def operands(random: Random) -> tuple[Any, Any]:
        weight = random.weight((width,), jnp.bfloat16)
        return ((weight,), [(random.normal((rows, width), dtype),) for _ in range(count)]), ()

    def rounded(quantize: Any) -> Any:
        def call(weight: Any, x: Any) -> Any:
            return quantize(x, RMSNorm(weight, place.config.rms_norm_eps) if normed else None, blocks)

        return call

    return Case(
        kernel="quantize",
        implementation=implementation,
        work=f"[{rows} x {width}] {name}, {'w8a8b' if blocks > 1 else 'w8a8'}",
        turn=place.turn("dot", implementation, telling=normed and blocks == 1),
        read_bytes=moved,
        operations=0,
        arithmetic="bf16",
        layers=count,
        operands=operands,
        call=each_layer(rounded(kernels.DOT[implementation].quantize_8bit)),
        outcome=first_result,
        reference=first_layer(rounded(quantize_8bit)),
        error=rounding_error,
        tolerance=1e-3,
    )


def rounding_error(found: Any, expected: Any) -> jax.Array:
    """Numbers halfway between two integers may fall on either side, which few are; none is off by more than one."""
    (plane, scale), (exact, exact_scale) = found, expected
    apart = jnp.abs(plane.astype(jnp.int32) - exact.astype(jnp.int32))
    return largest([jnp.mean(apart > 0), jnp.max(apart) > 1, jnp.max(jnp.abs(scale - exact_scale) / exact_scale)])
