"""How strongly each group is smoothed: measured on text that the factors were not made from."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from elastic_jax import kernels
from elastic_jax.config import ModelConfig
from elastic_jax.quantization import quantize
from elastic_jax.search.smoothing import exponents, share_heads

STRENGTHS = (0.0, 0.25, 0.4, 0.5, 0.6, 0.7, 0.85)
"""Strengths that are tried by default; 0 is no smoothing."""

_ALLOWED_LOSS = 1.25
"""Largest growth of the squared error with 16-bit activations: generated tokens must not pay for the prompt's."""


@dataclasses.dataclass(frozen=True)
class Strength:
    """What was found for one group.

    Attributes:
        strength: the one chosen.
        outliers_only: whether outliers alone are smoothed (`smoothing.exponents`).
        before: squared error of the group's output relative to the output itself, by width of activations, unsmoothed.
        after: the same with what was chosen.
    """

    strength: float
    outliers_only: bool
    before: Mapping[str, float]
    after: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return dataclasses.asdict(self)


def choose_strength(
    config: ModelConfig,
    kind: str,
    weight: Float32[Array, "out in"],
    largest: Float32[np.ndarray, " in"],
    held_out: Float32[Array, "tokens in"],
    strengths: Sequence[float],
    dot_name: str,
) -> tuple[Strength, np.ndarray]:
    """The strength with the least product of both errors, with 8-bit and with 16-bit activations.

    The product, because the two stand for prompt and generated tokens, and a tenth less of either is worth the same.

    Args:
        config: the model.
        kind: the group's.
        weight: its weight, unsmoothed.
        largest: largest magnitude of each input channel on calibration text.
        held_out: the group's input on other text.
        strengths: to try; 0 is added if it is missing.
        dot_name: the implementation of matrix products.

    Returns:
        what was found, and the chosen exponents.
    """
    columns = np.asarray(jnp.max(jnp.abs(weight), axis=0))
    if kind == "o":
        largest, columns = share_heads(config, largest), share_heads(config, columns)
    tried = {
        (s, outliers): exponents(largest, columns, s, outliers_only=outliers)
        for s in sorted({0.0, *strengths})
        for outliers in ((False, True) if s else (False,))
    }
    errors = {}
    for key, e in tried.items():
        a8, a16 = _errors(weight, held_out, jnp.asarray(e), dot_name)
        errors[key] = {"a8": float(a8), "a16": float(a16)}
    before = errors[0.0, False]
    allowed = [key for key in tried if errors[key]["a16"] <= _ALLOWED_LOSS * before["a16"]]
    best = min(allowed, key=lambda key: errors[key]["a8"] * errors[key]["a16"])
    return Strength(*best, before, errors[best]), tried[best]


@functools.partial(jax.jit, static_argnames="dot_name")
def _errors(weight: Array, x: Array, e: Array, dot_name: str) -> tuple[Array, Array]:
    """Relative squared errors of int8 weights with 8-bit and with 16-bit activations, after smoothing by 2**e."""
    dot, factor = kernels.dot(dot_name), jnp.exp2(e.astype(jnp.float32))[None, :]
    exact = dot(x, weight, generated=0)
    smoothed, quantized = x / factor, quantize(weight * factor, prompt_activations="a8")
    size = jnp.sum(jnp.square(exact))
    narrow, wide = (dot(smoothed, quantized, generated=generated) for generated in (0, x.shape[0]))
    return jnp.sum(jnp.square(narrow - exact)) / size, jnp.sum(jnp.square(wide - exact)) / size
