import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import MISTRAL_SMALL, tiny_step_config

from elastic_jax.batch import TokenBatch
from elastic_jax.errors import ConfigError
from elastic_jax.executables import default_step_config
from elastic_jax.kernels import decode_cuda
from elastic_jax.kv_cache import QuantizedCache, abstract_cache, write
from elastic_jax.memory import plan_memory
from elastic_jax.step import abstract_state, copy_page

SHAPE = (32, 2, 3, 8)
store = jax.jit(write)


def empty(precision):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_cache(SHAPE, "float32", precision))


def test_int8_is_within_half_a_step_of_each_head():
    keys, values = np.random.default_rng(0).standard_normal((2, 5, 3, 8)).astype(np.float32) * 7
    slot = np.array([4, 0, 31, 32, 7], np.int32)  # one is past the last
    cache = store(empty("int8"), slot, keys, values)
    assert isinstance(cache, QuantizedCache)
    assert (cache.values.dtype, cache.scales.dtype, cache.dtype) == (jnp.int8, jnp.float32, jnp.float32)
    found = np.asarray(cache.values, np.float32) * np.asarray(cache.scales)[..., None]
    for which, given in ((0, keys), (1, values)):
        step = np.abs(given).max(axis=-1, keepdims=True) / 127
        kept = [0, 1, 2, 4]
        assert (np.abs(found[slot[kept], which] - given[kept]) <= step[kept] / 2 * (1 + 1e-5)).all()
    written = {4, 0, 31, 7}
    assert not np.asarray(cache.values)[[i for i in range(32) if i not in written]].any()


def test_heads_have_scales_of_their_own():
    keys = np.ones((1, 3, 8), np.float32) * np.float32([[[1.0], [1000.0], [0.001]]])
    cache = store(empty("int8"), np.zeros(1, np.int32), keys, keys)
    assert isinstance(cache, QuantizedCache)
    assert (np.asarray(cache.values)[0] == 127).all()
    np.testing.assert_allclose(np.asarray(cache.scales)[0] * 127, [[1, 1000, 0.001]] * 2, rtol=1e-6)


def test_zeros_and_broken_numbers():
    keys = np.zeros((2, 3, 8), np.float32)
    keys[1, 1, 4] = np.nan
    cache = store(empty("int8"), np.arange(2, dtype=np.int32), keys, keys)
    assert isinstance(cache, QuantizedCache)
    assert np.isfinite(np.asarray(cache.scales)[0]).all()
    assert not np.asarray(cache.values)[0].any()
    # A broken number stays visible, so that the step reports it.
    assert np.isnan(np.asarray(cache.scales)[1, :, 1]).all()


def test_full_precision_is_the_compute_type():
    keys, values = np.random.default_rng(0).standard_normal((2, 5, 3, 8)).astype(np.float32)
    cache = store(empty("full"), np.arange(5, dtype=np.int32), keys, values)
    assert (np.asarray(cache)[:5, 0] == keys).all()
    assert abstract_cache(SHAPE, "bfloat16", "full").dtype == jnp.bfloat16


def test_pages_are_copied_with_their_scales():
    keys, values = np.random.default_rng(0).standard_normal((2, 16, 3, 8)).astype(np.float32)
    cache = store(empty("int8"), np.arange(16, dtype=np.int32), keys, values)
    (copied,) = jax.jit(copy_page, static_argnums=3)((cache,), jnp.int32(0), jnp.int32(1), 16)
    for leaf in jax.tree.leaves(copied):
        assert (np.asarray(leaf)[16:] == np.asarray(leaf)[:16]).all()
        assert np.asarray(leaf)[:16].any()


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_it_takes_half_the_memory():
    plans = {}
    for kv in ("full", "int8"):
        step = default_step_config(MISTRAL_SMALL, "gpu", "bfloat16", kv_slots=4096, max_context=None, kv=kv)
        assert step.kv == kv
        plans[kv] = plan_memory(MISTRAL_SMALL, {}, step, [])
    assert plans["full"].kv_token == 40 * 2 * 8 * 128 * 2
    assert plans["int8"].kv_token == 40 * 2 * 8 * (128 + 4)
    assert plans["int8"].kv == 4096 * plans["int8"].kv_token


def test_the_state_has_two_leaves_a_layer():
    config = dataclasses.replace(MISTRAL_SMALL, num_layers=3)
    state = abstract_state(config, tiny_step_config(kv="int8", dtype="bfloat16"))
    assert [leaf.dtype for leaf in jax.tree.leaves(state.kv)] == [jnp.int8, jnp.float32] * 3


def test_decode_in_cuda_refuses_it_by_name_and_is_not_the_default():
    step = default_step_config(MISTRAL_SMALL, "gpu", "bfloat16", kv_slots=4096, max_context=None, kv="int8")
    assert (step.attention, step.integer_dot, step.decode) == ("pallas", "pallas", "xla")
    none = jnp.zeros(0, jnp.int32)
    batch = TokenBatch(none, none, none, jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32), 0, 16)
    with pytest.raises(ConfigError, match="the decode called 'cuda' takes a KV cache in bfloat16, found int8"):
        decode_cuda.run_layers([], jnp.zeros((0, 8), jnp.bfloat16), (empty("int8"),), batch)
