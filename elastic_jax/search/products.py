"""Products as measurements need them: float weights without the rounding of activations, int8 as the model computes it.

bfloat16 weights keep their type, so that a large model fits: activations are then split into two bfloat16 terms whose
sum has 16 bits, and both go through one product. Reading the weight once is what that costs a wide product twice.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from elastic_jax import kernels
from elastic_jax.model import Dot
from elastic_jax.norm import RMSNorm
from elastic_jax.quantization import Activations, QArray, quantize, swiglu


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded:
    """A float matrix that is rounded to int8 where it is used: for a device that cannot hold both.

    Attributes:
        values: [out, in].
        prompt_activations: of the `QArray` made of it.
    """

    values: Any
    prompt_activations: Activations = dataclasses.field(metadata={"static": True})


def _contract(x: Array, weight: Array) -> Array:
    precision = jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    dimensions = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, dimensions, precision=precision, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _split(x: Array, weight: Array) -> Array:
    # Not by converting there and back, which XLA may take for nothing.
    high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    both = _contract(jnp.concatenate([high, x - high]).astype(jnp.bfloat16), weight)
    return both[: x.shape[0]] + both[x.shape[0] :]


def _split_forward(x: Array, weight: Array) -> tuple[Array, Array]:
    return _split(x, weight), weight


def _split_backward(weight: Array, cotangent: Array) -> tuple[Array, None]:
    # A gradient weighs errors; 8 bits of it are enough. Nobody asks for the weight's.
    dimensions = (((1,), (0,)), ((), ()))
    back = jax.lax.dot_general(cotangent.astype(jnp.bfloat16), weight, dimensions, preferred_element_type=jnp.float32)
    return back, None


_split.defvjp(_split_forward, _split_backward)


def exact(x: Float[Array, "tokens in"], weight: Float[Array, "out in"]) -> Float32[Array, "tokens out"]:
    """A float product with activations of 16 bits or more; differentiable by the activations."""
    x = x.astype(jnp.float32)
    return _split(x, weight) if weight.dtype == jnp.bfloat16 else _contract(x, weight)


@functools.cache  # so that compiled units that share it are found again
def product(dot_name: str) -> Dot:
    """The product of any weight: `exact` for float matrices, the named implementation for `QArray` and `Rounded`."""
    named = kernels.dot(dot_name)

    def dot(
        x: Array,
        weight: Any,
        *,
        generated: int,
        norm: RMSNorm | None = None,
        gated: bool = False,
        residual: Array | None = None,
    ) -> Array:
        x = x if norm is None else norm(x)
        if isinstance(weight, Rounded):
            weight = quantize(weight.values, prompt_activations=weight.prompt_activations)
        if isinstance(weight, QArray):
            out = named(x, weight, generated=generated, gated=gated)
        else:
            out = exact(x, weight)
            out = swiglu(out) if gated else out
        return out if residual is None else residual + out

    return dot
