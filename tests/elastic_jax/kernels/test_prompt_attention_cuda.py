"""Which steps' attention the kernel takes, and how it is called; on a GPU, what it computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Packing, Shape, make_case, relative_error

from aot_cache.targets import absent_device, find
from elastic_jax import kernels
from elastic_jax.batch import TokenBatch
from elastic_jax.kernels import prompt_attention_cuda, prompt_library
from elastic_jax.kv_cache import QuantizedCache

MISTRAL_SMALL = Shape(32, 8, 128, 64, "bfloat16")


def batch_of(tokens: int, generated: int, page_size: int) -> TokenBatch:
    ints = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    table, context = jax.ShapeDtypeStruct((4, 32), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.int32)
    return TokenBatch(ints, ints, ints, table, context, generated, page_size)


def arguments_of(shape: Shape, tokens: int, generated: int = 0):
    dtype = jnp.dtype(shape.dtype)
    query = jax.ShapeDtypeStruct((tokens, shape.heads, shape.dim), dtype)
    cache_shape = 32 * shape.page_size, 2, shape.kv_heads, shape.dim
    kv = jax.ShapeDtypeStruct(cache_shape, dtype)
    if shape.int8:
        scales = jax.ShapeDtypeStruct(cache_shape[:-1], jnp.float32)
        kv = QuantizedCache(jax.ShapeDtypeStruct(cache_shape, jnp.int8), scales, shape.dtype)
    return query, kv, batch_of(tokens, generated, shape.page_size)


def test_prompts_of_mistral_small_are_taken_on_hopper():
    assert prompt_attention_cuda.takes(90, *arguments_of(MISTRAL_SMALL, 4096))
    assert prompt_attention_cuda.takes(90, *arguments_of(MISTRAL_SMALL, 64 + 1024, 64))


@pytest.mark.parametrize(
    ("capability", "tokens", "generated", "change"),
    [
        (80, 4096, 0, {}),
        (100, 4096, 0, {}),
        (90, 256, 0, {}),
        (90, 520, 64, {}),
        (90, 4096, 0, {"int8": True}),
        (90, 4096, 0, {"dtype": "float32"}),
        (90, 4096, 0, {"dim": 64}),
        (90, 4096, 0, {"heads": 24}),
        (90, 4096, 0, {"page_size": 16}),
    ],
    ids=str,
)
def test_other_steps_are_left_to_pallas(capability, tokens, generated, change):
    shape = dataclasses.replace(MISTRAL_SMALL, **change)
    assert not prompt_attention_cuda.takes(capability, *arguments_of(shape, tokens, generated))


def test_the_plugin_for_cuda_12_leaves_all_to_pallas(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    assert not prompt_attention_cuda.takes(90, *arguments_of(MISTRAL_SMALL, 4096))


@pytest.mark.cuda_plugin
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("generated", [0, 64])
def test_it_is_lowered_without_a_gpu_beside_generated_tokens_too(generated):
    arguments = arguments_of(MISTRAL_SMALL, 1024 + generated, generated)
    with jax.default_device(absent_device(find("h100"))):
        traced = jax.jit(kernels.attention("pallas")).trace(*arguments)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@elastic_prompt_attention") == 1
    assert ("attention_generated" in text) == bool(generated)


# -- on the device -----------------------------------------------------------------------------------------------------


RAGGED = Packing(prompt=((0, 0, 130), (1, 100, 40), (2, 447, 1), (4, 0, 1), (3, 64, 128)))
"""Chunks that begin anywhere, in the step and in their sequences, and padding after them."""


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("heads", [2, 4, 8, 16])
@pytest.mark.parametrize(("packing", "page_size"), [(RAGGED, 64), (RAGGED, 128), (Packing(prompt=((1, 0, 1),)), 64)])
def test_equals_the_dense_reference(heads, packing, page_size):
    case = make_case(packing, Shape(heads, 2, 128, page_size, "bfloat16"), p=330)
    prompt = slice(case.batch.generated, None)
    found = np.asarray(prompt_attention_cuda.attend_prompt(case.query, case.kv, case.batch))[prompt]
    assert relative_error(found, case.exact[prompt]) < 4e-3
    tokens = sum(tokens for *_, tokens in packing.prompt)
    assert not found[tokens:].any()  # padding


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_it_runs_beside_generated_tokens():
    packing = Packing(((3, 112), (0, 1), None), ((1, 0, 448), (2, 100, 64)))
    case = make_case(packing, Shape(8, 2, 128, 64, "bfloat16"), p=600)
    assert prompt_attention_cuda.takes(prompt_library.CAPABILITY, case.query, case.kv, case.batch)
    found = np.asarray(jax.jit(kernels.attention("pallas"))(case.query, case.kv, case.batch))
    assert relative_error(found, case.exact) < 4e-3


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
def test_repeated_calls_agree():
    """More tiles than multiprocessors: races would differ."""
    case = make_case(
        Packing(prompt=tuple((row, 0, 448) for row in range(5))), Shape(64, 8, 128, 64, "bfloat16"), p=2240
    )
    calls = [prompt_attention_cuda.attend_prompt(case.query, case.kv, case.batch)[3:] for _ in range(20)]
    assert all(bool(jnp.all(call == calls[0])) for call in calls)
