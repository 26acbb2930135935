"""Root-mean-square normalization, which stands before most products of the model."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32


class RMSNorm(nnx.Module):
    """Root-mean-square normalization (Zhang and Sennrich, arXiv:1910.07467), computed and returned in float32."""

    def __init__(self, weight: Any, eps: float) -> None:
        self.weight = nnx.Param(weight)
        self.eps = eps

    def __call__(self, x: Float[Array, "tokens hidden"]) -> Float32[Array, "tokens hidden"]:
        """Normalizes over the last axis."""
        x = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return x * scale * self.weight.get_value().astype(jnp.float32)[None, :]
