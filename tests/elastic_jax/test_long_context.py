"""A context of thousands of tokens over many pages: what chunks, pages and neighbours it has changes nothing."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
import pytest
from tiny import CompiledTiny, tiny_step_config

from elastic_jax.engine import Engine
from elastic_jax.requests import GenerateRequest, SamplingParams, TokenEvent
from elastic_jax.runner import Runner
from elastic_jax.step import Bucket, StepConfig
from elastic_jax.units import make_units

TOKENS = 4500
NEW = 4


def long_engine(compiled: CompiledTiny, chunk: int) -> Engine:
    """An engine for contexts of 8192 tokens, whose units are compiled when they are first called."""
    config = dataclasses.replace(compiled.config, max_position_embeddings=8192)
    step: StepConfig = tiny_step_config(
        rows=2, page_size=64, kv_slots=16384, max_context=8192, buckets=(Bucket(2, 0), Bucket(0, chunk))
    )
    units = {unit.name: jax.jit(unit.function) for unit in make_units(config, compiled.plan, step)}
    return Engine(Runner(config, step, units, compiled.weights, jax.devices()[0]), step.max_context)


def request(seed: int, count: int) -> GenerateRequest:
    prompt = np.random.default_rng(seed).integers(3, 300, count)
    sampling = SamplingParams(top_log_probabilities=5)
    return GenerateRequest(tuple(int(token) for token in prompt), NEW, sampling, frozenset(), 1, None)


def answer(engine: Engine, number: int) -> list[TokenEvent]:
    events = []
    while engine.busy:
        events += engine.step()
    return [event for event in events if event.request == number]


@pytest.fixture(scope="module")
def at_once(compiled_tiny: Callable[..., CompiledTiny]) -> Engine:
    """An engine that reads the prompt in one step."""
    return long_engine(compiled_tiny("XL", "float32"), 4608)


@pytest.fixture(scope="module")
def whole(at_once: Engine) -> list[TokenEvent]:
    """Its answer."""
    return answer(at_once, at_once.submit(request(1, TOKENS)))


def test_a_long_prompt_in_chunks_beside_another_sequence(
    compiled_tiny: Callable[..., CompiledTiny], whole: list[TokenEvent]
) -> None:
    engine = long_engine(compiled_tiny("XL", "float32"), 512)
    engine.submit(request(2, 700))  # takes the first pages, and ends in the middle of the other's prompt
    engine.step()
    found = answer(engine, engine.submit(request(1, TOKENS)))
    assert engine.pages.free == engine.pages.pages
    assert len(found) == len(whole) == NEW
    for one, other in zip(found, whole, strict=True):
        assert one.token == other.token
        assert [token for token, _ in one.top] == [token for token, _ in other.top]
        np.testing.assert_allclose([v for _, v in one.top], [v for _, v in other.top], atol=1e-3)


def test_the_first_tokens_of_a_long_prompt_matter(at_once: Engine, whole: list[TokenEvent]) -> None:
    other = request(1, TOKENS)
    changed = dataclasses.replace(other, prompt=((other.prompt[0] + 1) % 300, *other.prompt[1:]))
    found = answer(at_once, at_once.submit(changed))
    assert found[0].log_probability != whole[0].log_probability
