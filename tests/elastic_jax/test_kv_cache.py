import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import MISTRAL_SMALL, tiny_step_config

from elastic_jax import executables
from elastic_jax.elastic import ElasticMistral
from elastic_jax.errors import ConfigError, ExecutableError
from elastic_jax.executables import default_step_config, store_folders
from elastic_jax.info import describe
from elastic_jax.kv_cache import QuantizedCache, abstract_cache, write
from elastic_jax.memory import plan_memory
from elastic_jax.step import Bucket, abstract_state, copy_page

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


def test_every_kernel_takes_it():
    step = default_step_config(MISTRAL_SMALL, "gpu", "bfloat16", kv_slots=4096, max_context=None, kv="int8")
    assert (step.attention, step.dot, step.decode) == ("pallas", "pallas", "cuda")


# -- a whole mode ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def int8(checkpoint_of, tmp_path_factory):
    """A tiny model, compiled and loaded with a cache in int8."""
    folder = tmp_path_factory.mktemp("int8") / "tiny.elastic"
    shutil.copytree(checkpoint_of("tiny_mistral").path, folder, ignore=shutil.ignore_patterns("executables"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(executables._BUCKETS, "cpu", (Bucket(4, 0), Bucket(0, 32)))
        return load(folder, "int8", on_missing="compile")


def load(folder, kv, **options):
    return ElasticMistral.load(folder, "XL", dtype="float32", kv=kv, max_context=128, say=lambda _: None, **options)


PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]


def test_a_mode_runs_with_it(int8, compiled_tiny):
    full = load(compiled_tiny("XL", "float32").checkpoint.path, "full")
    assert (int8.info()["kv"], full.info()["kv"]) == ("int8", "full")
    assert full.memory.kv_token > 2 * int8.memory.kv_token  # of float32
    pair = [(PROMPT, [21, 22, 23, 24, 25, 26])]
    rounded, exact = (model.score(pair)[0].log_probability for model in (int8, full))
    assert rounded != exact
    assert rounded == pytest.approx(exact, abs=0.05)
    # Generating reads what prompts wrote, in pages that answers share and then copy.
    for options in ({}, {"temperature": 1.0, "top_p": 0.9, "seed": 3, "choices": 3}):
        answers = int8.generate(PROMPT, max_new_tokens=9, ignore_end=True, **options)
        again = int8.generate(PROMPT, max_new_tokens=9, ignore_end=True, **options)
        listed = [answers] if not options else answers
        assert [a.token_ids for a in listed] == [a.token_ids for a in ([again] if not options else again)]
        assert all(np.isfinite(a.log_probabilities).all() and len(a.token_ids) == 9 for a in listed)


def test_stores_are_kept_apart(int8):
    folder = int8.checkpoint.path
    assert {path.parent.name for path in store_folders(folder)} == {"XL.float32.kv-int8"}
    assert [store["kv"] for store in describe(folder)["executables"]] == ["int8"]
    again = load(folder, "int8", on_missing="error")
    assert again.info()["executables"]["folder"].endswith("XL.float32.kv-int8/kv16384")
    with pytest.raises(ExecutableError, match=r"elastic-jax compile \S+ --mode XL --dtype float32   "):
        load(folder, "full", on_missing="error")
    shutil.rmtree(folder / "executables")
    with pytest.raises(ExecutableError, match=r"elastic-jax compile \S+ --mode XL --dtype float32 --kv int8   "):
        load(folder, "int8", on_missing="error")


@pytest.mark.usefixtures("unchecked_types")
def test_other_precisions_are_refused(checkpoint_of):
    with pytest.raises(ConfigError, match='kv must be "full" or "int8", found \'fp8\''):
        load(checkpoint_of("tiny_mistral").path, "fp8")
