"""Integer weights, and the one dot that every matrix product of the model goes through.

Precision follows the token's role. Generated tokens are bound by reading weights, prompt tokens by arithmetic, and both
read the same int8 weights in one integer dot: a generated token brings two rows (the planes of a 16-bit activation), a
prompt token one row (8 bits, with one scale or several along the contraction) or two. To how many bits a token's
activations are rounded depends on its role alone, never on the step it happens to be computed in.

What this file does not do: calibration, static activation scales, weights of fewer than 8 bits.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8

from elastic_jax.norm import RMSNorm

type Activations = Literal["a8", "a8b", "a16"]
"""How a prompt token's activations are rounded: to 8 bits with one scale a token, to 8 bits with a scale for each block
of the contraction (`activation_blocks`), or to 16 bits. A generated token's are always 16-bit."""

_BLOCKS = 10
"""Blocks along the contraction that `a8b` comes closest to: a few outliers then spoil the scale of a tenth."""

_BLOCK_MULTIPLE = 32
"""What a block's length is a multiple of where the contraction is: the depth of the tensor cores' int8 tile."""

_PLANE_MAX = 127 * 256
"""Largest 16-bit activation: 256 * 127 + 0. Scaling by 32767 instead would let the high plane reach 128."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QArray:
    """A matrix of integers with scales: `weight[n, k] = values[n, k] * scales[n, 0]`.

    Invariant: `values` lie in [-127, 127] (never -128, so that negation is exact), `scales` are positive and finite,
    and `scales.shape == (values.shape[0], 1)`. A zero row has scale 1. Leaves may be `jax.ShapeDtypeStruct`s, so that
    lowering, memory planning and restoring need no real weights.

    Attributes:
        values: int8 [out, in].
        scales: float32 [out, 1], one scale an output channel. Several columns would be blocks along `in`: stored
            checkpoints describe them, this dot does not compute them yet.
        prompt_activations: how prompt tokens' activations are rounded before the dot.
    """

    values: Any
    scales: Any
    prompt_activations: Activations = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.values.shape

    def dequantize(self) -> Float32[Array, "out in"]:
        """The matrix the integers stand for."""
        return self.values.astype(jnp.float32) * self.scales


def quantize(weight: Float[Array, "out in"], *, prompt_activations: Activations) -> QArray:
    """Rounds a matrix to int8 per output channel, symmetrically: scale = absmax / 127, ties to even."""
    weight = weight.astype(jnp.float32)
    scales = _scale(weight, 127)
    values = jnp.clip(jnp.round(weight / scales), -127, 127).astype(jnp.int8)
    return QArray(values, scales, prompt_activations)


def _scale(x: Float32[Array, "rows in"], largest: int) -> Float32[Array, "rows 1"]:
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / largest
    # Devices flush denormals to zero, and a scale must not be zero: a row that small counts as a zero row.
    return jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)


def quantize_8bit(
    x: Float[Array, "rows in"], norm: RMSNorm | None = None, blocks: int = 1
) -> tuple[Int8[Array, "rows in"], Float32[Array, "rows blocks"]]:
    """One int8 plane per token: x is about `plane * scale`, scale = absmax / 127.

    Args:
        x: activations.
        norm: normalizes them first.
        blocks: scales a token, one for each of so many equally long runs of columns.
    """
    x = x.astype(jnp.float32) if norm is None else norm(x)
    rows, in_size = x.shape
    x = x.reshape(rows * blocks, in_size // blocks)
    scale = _scale(x, 127)
    plane = jnp.clip(jnp.round(x / scale), -127, 127).astype(jnp.int8)
    return plane.reshape(rows, in_size), scale.reshape(rows, blocks)


def activation_blocks(in_size: int) -> int:
    """Blocks that `a8b` cuts a contraction of this length into, all equally long: about ten.

    Of the numbers whose blocks are multiples of 32 long (of 16, 8, ... where the contraction is not), the one nearest
    to ten by ratio; the larger of two equally near. 576 gives 9 blocks of 64, 1536 12 of 128, 5120 10 of 512, 32768 8
    of 4096.
    """
    multiple = math.gcd(in_size, _BLOCK_MULTIPLE)
    counts = [n for n in range(1, in_size // multiple + 1) if in_size // multiple % n == 0]
    return min(counts, key=lambda n: (max(n / _BLOCKS, _BLOCKS / n), -n))


def quantize_16bit(
    x: Float[Array, "rows in"],
) -> tuple[Int8[Array, "rows in"], Int8[Array, "rows in"], Float32[Array, "rows 1"]]:
    """Two int8 planes per token: x is about `(256 * high + low) * scale`, scale = absmax / 32512."""
    x = x.astype(jnp.float32)
    scale = _scale(x, _PLANE_MAX)
    q = jnp.clip(jnp.round(x / scale), -_PLANE_MAX, _PLANE_MAX).astype(jnp.int32)
    high = (q + 128) >> 8  # floors, so that low lies in [-128, 127]
    return high.astype(jnp.int8), (q - (high << 8)).astype(jnp.int8), scale


@dataclasses.dataclass(frozen=True)
class DotKernels:
    """An implementation of matrix products.

    Attributes:
        multiply: (x int8 [rows, in], row_scales float32 [rows, blocks], values int8 [out, in], scales float32 [out, 1],
            residual [rows, out] or None) -> [rows, out]: the product of `x * row_scales` and `values * scales`, by
            integer sums. `blocks` divides `in`; column `b` of `row_scales` is for the b-th of `blocks` equally long
            runs of columns of `x`. Without residual, the product in float32; else `add_product` of both.
        multiply_gated: (the first four) -> bfloat16 [rows, out / 2]: `swiglu` of the product.
        quantize_8bit: what the function of that name does.
        multiply_float: (x [rows, in], weight float [out, in], residual [rows, out] or None) -> [rows, out]: `x` is cast
            to the weight's type, sums are float32. Without residual, the product in float32; else `add_product` of
            both.
        multiply_float_gated: (the first two) -> [rows, out / 2]: `swiglu` of the product, rounded to the weight's type.
    """

    multiply: Callable[[Array, Array, Array, Array, Array | None], Array]
    multiply_gated: Callable[[Array, Array, Array, Array], Array]
    quantize_8bit: Callable[[Array, RMSNorm | None, int], tuple[Array, Array]]
    multiply_float: Callable[[Array, Array, Array | None], Array]
    multiply_float_gated: Callable[[Array, Array], Array]


def swiglu(gate_up: Float[Array, "tokens both"]) -> Float[Array, "tokens half"]:
    """silu(first half) * second half (Shazeer, arXiv:2002.05202)."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


def add_product(
    residual: Float[Array, "rows out"] | None, product: Float[Array, "rows out"]
) -> Float[Array, "rows out"]:
    """A product added to what is there, if anything is, in the latter's type, to which the product is rounded first."""
    if residual is None:
        return product
    return residual + rounded(product, residual.dtype).astype(residual.dtype)


def rounded(x: Float[Array, "rows columns"], dtype: jnp.dtype) -> Float[Array, "rows columns"]:
    """Rounded as a conversion would, which between fused operations XLA may leave out."""
    kind = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, kind.nexp, kind.nmant)


def _quantized_dot(
    x: Float[Array, "tokens in"],
    weight: QArray,
    wide: int,
    kernels: DotKernels,
    norm: RMSNorm | None,
    gated: bool,
    residual: Float[Array, "tokens out"] | None,
) -> Float[Array, "tokens columns"]:
    """The first `wide` tokens bring two planes each, the others one; all rows share one integer dot."""
    planes: list[Array] = []
    scales: list[Array] = []
    if wide:
        high, low, scale = quantize_16bit(x[:wide] if norm is None else norm(x[:wide]))
        planes += [high, low]
        # 256 * high overflows int32 for wide K, so the planes are joined in float32.
        scales += [256.0 * scale, scale]
    if wide < x.shape[0]:
        blocks = activation_blocks(x.shape[1]) if weight.prompt_activations == "a8b" else 1
        plane, scale = kernels.quantize_8bit(x[wide:], norm, blocks)
        planes.append(plane)
        # Rows of 16-bit activations beside rows with block scales have the same scale in each block.
        scales = [jnp.broadcast_to(each, (each.shape[0], scale.shape[1])) for each in scales]
        scales.append(scale)
    if not wide:
        operands = planes[0], scales[0], weight.values, weight.scales
        return kernels.multiply_gated(*operands) if gated else kernels.multiply(*operands, residual)
    out = kernels.multiply(jnp.concatenate(planes), jnp.concatenate(scales), weight.values, weight.scales, None)
    out = jnp.concatenate([out[:wide] + out[wide : 2 * wide], out[2 * wide :]])
    if not gated:
        return add_product(residual, out)
    out = swiglu(out)
    # As `multiply_gated` rounds them: what a prompt token is given must not depend on the step's other tokens.
    return jnp.concatenate([out[:wide], rounded(out[wide:], jnp.dtype(jnp.bfloat16))])


def dot(
    x: Float[Array, "tokens in"],
    weight: Float[Array, "out in"] | QArray,
    *,
    generated: int,
    kernels: DotKernels,
    norm: RMSNorm | None = None,
    gated: bool = False,
    residual: Float[Array, "tokens out"] | None = None,
) -> Float[Array, "tokens columns"]:
    """Multiplies tokens by a weight stored [out, in]; the weight's type decides how.

    Args:
        x: activations, the generated tokens' rows first.
        weight: a float matrix (activations are cast to its dtype, sums are float32), or a `QArray`.
        generated: how many of the first rows are generated tokens.
        kernels: the implementation (`kernels.DOT`).
        norm: normalizes the activations first.
        gated: whether the weight's outputs are gate and up, and `swiglu` of them is wanted.
        residual: what the product is added to (`add_product`); not if gated.

    Returns:
        float32 [tokens, out], or the residual's type; [tokens, out / 2] if gated. A gated result of a float matrix is
        rounded to that matrix's type. 8-bit activations are too coarse to tell one from its rounding to bfloat16, so
        prompt tokens that have them get that: bfloat16 values, and bfloat16 as their type where no token has 16-bit
        activations.
    """
    if isinstance(weight, QArray):
        wide = x.shape[0] if weight.prompt_activations == "a16" else generated
        return _quantized_dot(x, weight, wide, kernels, norm, gated, residual)
    x = x if norm is None else norm(x)
    return kernels.multiply_float_gated(x, weight) if gated else kernels.multiply_float(x, weight, residual)
