"""Models with random weights, made on the device in seconds: for measuring shapes whose weights are not at hand.

They go through the same code as real ones: `abstract_weights` says what a plan needs, and only the numbers are drawn.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from elastic_jax.config import ModelConfig
from elastic_jax.plan import Plan
from elastic_jax.step import ComputeDtype
from elastic_jax.weights import Weights, abstract_weights

MISTRAL_SMALL = ModelConfig(
    vocab_size=131072,
    hidden_size=5120,
    intermediate_size=32768,
    num_layers=40,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=1e9,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_ids=(2,),
    pad_token_id=11,
)
"""Mistral-Small-3.1-24B's language model."""


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    if dtype == jnp.int8:
        return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), jnp.int8) // jnp.int8(2)
    if len(shape) == 1:
        return jnp.ones(shape, dtype)  # norms
    if shape[1] == 1:
        return jnp.full(shape, 0.02 / 37, dtype)  # scales: int8 of a standard deviation of 37
    return (0.02 * jax.random.normal(key, shape, jnp.bfloat16)).astype(dtype)


def random_weights(config: ModelConfig, plan: Plan, dtype: ComputeDtype, device: Any, *, seed: int) -> Weights:
    """Weights of standard deviation 0.02 on a device; never zeros, which run faster than real ones."""
    leaves, tree = jax.tree.flatten(abstract_weights(config, plan, dtype))
    rng = "unsafe_rbg" if device.platform == "gpu" else "threefry2x32"
    with jax.default_device(device):
        keys = [jax.random.key(seed * len(leaves) + i, impl=rng) for i in range(len(leaves))]
        drawn = [_draw(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, jax.block_until_ready(drawn))
