"""Error-compensated rounding (GPTQ: Frantar et al., arXiv:2210.17323) of a weight to int8.

Columns are rounded one after another, and what the rounding of one adds to the group's output is taken back, as far as
the correlation of its inputs allows, by those that are still to be rounded. Scales stay those of rounding to nearest.
Inputs are the original model's: a checkpoint serves plans whose other groups are bf16 as well as int8.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int8

from elastic_jax.quantization import quantize

Rounding = Literal["nearest", "gptq"]

ROUNDINGS: tuple[Rounding, ...] = ("nearest", "gptq")

_BLOCK = 128
"""Columns whose errors are collected before they are taken back from those after them."""

_DAMPING = 0.01
"""Of the mean of the inputs' second moments, added to each: few tokens do not determine all correlations."""


@dataclasses.dataclass(frozen=True)
class RoundedWeight:
    """A weight in int8.

    Attributes:
        values: int8 [out, in].
        scales: float32 [out, 1].
        chosen: how it was rounded.
        errors: squared error of the group's output relative to the output, on held-out text, by way of rounding.
    """

    values: Int8[Array, "out in"]
    scales: Float32[Array, "out 1"]
    chosen: Rounding
    errors: Mapping[Rounding, float]

    def to_json(self) -> dict[str, Any]:
        """What is recorded of it."""
        return {"rounding": self.chosen, "rounding_errors": dict(self.errors)}


def round_with_compensation(
    weight: Float32[Array, "out in"], inputs: Float32[Array, "tokens in"], held_out: Float32[Array, "tokens2 in"]
) -> RoundedWeight:
    """The better of both ways of rounding on text that no correlation was taken from.

    Args:
        weight: the matrix.
        inputs: of the group, on calibration text.
        held_out: of the group, on other text.
    """
    nearest = quantize(weight, prompt_activations="a16")
    values = compensated(weight, nearest.scales, inputs)
    found: dict[Rounding, Array] = {"nearest": nearest.values, "gptq": values}
    errors: dict[Rounding, float] = {
        name: float(_output_error(weight, each, nearest.scales, held_out)) for name, each in found.items()
    }
    chosen = min(ROUNDINGS, key=lambda name: errors[name])
    return RoundedWeight(found[chosen], nearest.scales, chosen, errors)


@jax.jit
def _output_error(weight: Array, values: Array, scales: Array, x: Array) -> Array:
    error = weight - values.astype(jnp.float32) * scales
    product = functools.partial(jnp.einsum, "tk,nk->tn", precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(jnp.square(product(x, error))) / jnp.maximum(jnp.sum(jnp.square(product(x, weight))), 1e-30)


@jax.jit
def compensated(
    weight: Float32[Array, "out in"], scales: Float32[Array, "out 1"], inputs: Float32[Array, "tokens in"]
) -> Int8[Array, "out in"]:
    """The weight's integers, rounded so that the error of `inputs @ weight.T` is small."""
    size = weight.shape[1]
    block = math.gcd(size, _BLOCK)
    highest = jax.lax.Precision.HIGHEST
    moments = jnp.einsum("ti,tj->ij", inputs, inputs, precision=highest)
    diagonal = jnp.diagonal(moments)
    dead = diagonal == 0  # a channel that is never used: its weight stays as it is rounded
    damped = moments + jnp.diag(jnp.where(dead, 1.0, _DAMPING * jnp.mean(diagonal)))
    inverse = jnp.linalg.inv(damped)
    # Row j of the upper factor says how an error of column j is spread over the columns after it.
    upper = jnp.linalg.cholesky((inverse + inverse.T) / 2).T
    columns = jnp.arange(size, dtype=jnp.int32)

    def each_block(number: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        left, rounded = carry
        start = number * block
        part = jax.lax.dynamic_slice_in_dim(left, start, block, axis=1)
        rows = jax.lax.dynamic_slice_in_dim(upper, start, block, axis=0)
        square = jax.lax.dynamic_slice_in_dim(rows, start, block, axis=1)

        def each_column(j: Array, inner: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            part, errors, values = inner
            column = jax.lax.dynamic_slice_in_dim(part, j, 1, axis=1)
            value = jnp.clip(jnp.round(column / scales), -127, 127)
            row = jax.lax.dynamic_slice_in_dim(square, j, 1, axis=0)
            error = (column - value * scales) / jax.lax.dynamic_slice_in_dim(row, j, 1, axis=1)
            part = part - error * row  # the upper factor has zeros before its diagonal
            errors = jax.lax.dynamic_update_slice_in_dim(errors, error, j, axis=1)
            return part, errors, jax.lax.dynamic_update_slice_in_dim(values, value, j, axis=1)

        _, errors, values = jax.lax.fori_loop(0, block, each_column, (part, jnp.zeros_like(part), jnp.zeros_like(part)))
        after = jnp.where(columns[None, :] >= start + block, rows, 0.0)
        left = left - jnp.einsum("nb,bk->nk", errors, after, precision=highest)
        rounded = jax.lax.dynamic_update_slice_in_dim(rounded, values.astype(jnp.int8), start, axis=1)
        return left, rounded

    empty = jnp.zeros(weight.shape, jnp.int8)
    return jax.lax.fori_loop(0, size // block, each_block, (weight, empty))[1]
