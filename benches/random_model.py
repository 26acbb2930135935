"""Models with random weights, made on the device in seconds: for measuring shapes whose weights are not at hand.

They go through the same code as real ones: `abstract_weights` says what a plan needs, units are compiled and stored as
the model's are, and only the numbers are drawn.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aot_cache.unit import Unit
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

SMALL = dataclasses.replace(
    MISTRAL_SMALL,
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    vocab_size=1024,
    num_heads=8,
    num_kv_heads=2,
    head_dim=32,
)
"""A tiny one, to check benches on a CPU."""


type Draw = Mapping[str, Callable[[Any], Any]]
"""Unit's name -> (key uint32 [4]) -> (array,)."""


def draw_units(config: ModelConfig, plan: Plan, dtype: ComputeDtype) -> list[Unit]:
    """One unit for each shape of weight: compiled and stored like the model's own, so that a process that may not
    compile can draw its weights."""
    leaves = jax.tree.leaves(abstract_weights(config, plan, dtype))
    return [_draw_unit(leaf) for leaf in {_name(leaf): leaf for leaf in leaves}.values()]


def _name(leaf: Any) -> str:
    return f"draw.{leaf.dtype}.{'x'.join(map(str, leaf.shape))}"


def _draw_unit(leaf: Any) -> Unit:
    def draw(data: Any) -> tuple[Any]:
        return (_draw(jax.random.wrap_key_data(data, impl="unsafe_rbg"), leaf.shape, leaf.dtype),)

    return Unit(_name(leaf), draw, (jax.ShapeDtypeStruct((4,), jnp.uint32),), (), {})


def _draw(key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    if dtype == jnp.int8:
        return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), jnp.int8) // jnp.int8(2)
    if len(shape) == 1:
        return jnp.ones(shape, dtype)  # norms
    if shape[1] == 1:
        return jnp.full(shape, 0.02 / 37, dtype)  # scales: int8 of a standard deviation of 37
    return (0.02 * jax.random.normal(key, shape, jnp.bfloat16)).astype(dtype)


def random_weights(config: ModelConfig, plan: Plan, dtype: ComputeDtype, draw: Draw, *, seed: int) -> Weights:
    """Weights of standard deviation 0.02 on a device; never zeros, which run faster than real ones.

    Args:
        config: the model.
        plan: a choice for each group.
        dtype: type of unquantized weights.
        draw: `draw_units`, loaded, or `jitted`.
        seed: of all numbers.
    """
    leaves, tree = jax.tree.flatten(abstract_weights(config, plan, dtype))
    drawn = [draw[_name(leaf)](np.array([seed, i, 1, 2], np.uint32))[0] for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, jax.block_until_ready(drawn))


def jitted(units: Iterable[Unit], device: Any) -> Draw:
    """Units that compile when they are called, for processes that may."""
    here = jax.sharding.SingleDeviceSharding(device)
    return {unit.name: jax.jit(unit.function, out_shardings=here) for unit in units}
