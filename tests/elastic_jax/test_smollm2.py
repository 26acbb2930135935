"""SmolLM2-135M-Instruct, a real model, against what transformers computed (tests/fixtures/README.md)."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import exclusive

import converters
from elastic_jax.batch import TokenBatch
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.engine import Engine
from elastic_jax.executables import default_step_config
from elastic_jax.requests import GenerateRequest, SamplingParams, ScoreEvent, ScoreRequest
from elastic_jax.runner import Runner
from elastic_jax.step import Bucket, ComputeDtype, StepConfig
from elastic_jax.tokenizer import Tokenizer
from elastic_jax.units import build_model, make_units
from elastic_jax.weights import load_weights

LONGEST = 384
"""No prompt of the fixtures has more tokens with its continuation."""

TRANSFORMERS_BF16_KL = 0.0011846
"""KL(float32 || bf16) of transformers itself; `bf16` in smollm2_reference.json, asserted below to be the same."""


@pytest.fixture(scope="module")
def reference(fixtures_path: Path) -> dict[str, Any]:
    return json.loads((fixtures_path / "smollm2_reference.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def checkpoint(shared_folder: Path, smollm2_gguf: Path) -> Checkpoint:
    with exclusive(shared_folder / "smollm2.lock"):
        return converters.convert(
            smollm2_gguf,
            shared_folder / "smollm2.elastic",
            only="bf16",
            overwrite=False,
            revision=None,
            token=None,
            workers=2,
            progress=None,
        )


@pytest.fixture(scope="module")
def sizes(checkpoint: Checkpoint) -> StepConfig:
    default = default_step_config(checkpoint.config, "cpu", "float32", kv_slots=2048, max_context=512)
    return dataclasses.replace(default, rows=8, buckets=(Bucket(8, 0), Bucket(0, 64)))


@pytest.fixture(scope="module")
def weights_in(checkpoint: Checkpoint) -> Callable[[ComputeDtype], Any]:
    def load(dtype: ComputeDtype) -> Any:
        device = jax.devices()[0]
        return load_weights(checkpoint, checkpoint.plan("XL"), dtype, device, workers=2, progress=None)

    return load


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint, sizes: StepConfig, weights_in: Callable[[ComputeDtype], Any]) -> Engine:
    """Mode XL in float32. Its units are compiled when they are first called: half of them never are."""
    units = {
        unit.name: jax.jit(unit.function, donate_argnums=unit.donate, keep_unused=True)
        for unit in make_units(checkpoint.config, checkpoint.plan("XL"), sizes)
    }
    runner = Runner(checkpoint.config, sizes, units, weights_in("float32"), jax.devices()[0])
    return Engine(runner, sizes.max_context)


def run(engine: Engine, requests: list[Any]) -> list[list[Any]]:
    """The events of each request."""
    numbers = [engine.submit(request) for request in requests]
    events = []
    while engine.busy:
        events += engine.step()
    return [[event for event in events if event.request == number] for number in numbers]


def greedy(prompt: list[int], new: int) -> GenerateRequest:
    return GenerateRequest(tuple(prompt), new, SamplingParams(), frozenset(), 1, None)


def test_greedy_tokens_are_those_of_transformers(engine: Engine, reference: dict[str, Any]) -> None:
    """All prompts at once, so that they share steps."""
    prompts = reference["prompts"]
    answers = run(engine, [greedy(prompt["ids"], 48) for prompt in prompts])
    for prompt, events in zip(prompts, answers, strict=True):
        assert [event.token for event in events] == prompt["greedy_ids"], prompt["name"]
        found = [event.log_probability for event in events]
        np.testing.assert_allclose(found, prompt["greedy_log_probabilities"], atol=1e-3, rtol=0)


def test_logits_are_those_of_transformers(
    engine: Engine, reference: dict[str, Any], fixtures_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = np.load(fixtures_path / "smollm2_reference.npz")
    logits: list[np.ndarray] = []
    step = engine.runner.step

    def spy(bucket: Bucket, inputs: Any, **options: bool) -> Any:
        out = step(bucket, inputs, **options)
        logits.extend(np.asarray(out.logits)[inputs.out_index < bucket.tokens])
        return out

    monkeypatch.setattr(engine.runner, "step", spy)
    for prompt in reference["prompts"]:
        run(engine, [greedy(prompt["ids"], 1)])
    errors = []
    for index, prompt in enumerate(reference["prompts"]):
        errors.append(np.abs(logits[index][arrays["top_ids"][index]] - arrays["top_logits"][index]).max())
        normalizer = np.logaddexp.reduce(logits[index].astype(np.float64))
        errors.append(abs(normalizer - arrays["logsumexp"][index]))
        if (whole := f"last_logits_{prompt['name']}") in arrays:
            errors.append(np.abs(logits[index] - arrays[whole]).max())
    print(f"largest error of a logit: {max(errors):.2e}")
    assert len(errors) == 8 * 2 + 2
    assert max(errors) < 1e-3


def test_scores_are_those_of_transformers(engine: Engine, checkpoint: Checkpoint, reference: dict[str, Any]) -> None:
    tokenizer = Tokenizer.load(checkpoint.tokenizer_path)
    pairs = reference["scores"]
    asked = []
    for pair in pairs:
        context, continuation = tokenizer.encode_pair(pair["context"], pair["continuation"])
        assert (context, continuation) == (pair["context_ids"], pair["continuation_ids"])
        asked.append(ScoreRequest((*context, *continuation), len(context), 0))
    for prompt in reference["prompts"]:
        asked.append(ScoreRequest(tuple(prompt["ids"]), 1, 0))
    events = [events[0] for events in run(engine, asked)]
    for pair, event in zip(pairs, events, strict=False):
        assert isinstance(event, ScoreEvent)
        np.testing.assert_allclose(event.log_probabilities, pair["token_log_probabilities"], atol=1e-3, rtol=0)
        assert abs(event.log_probabilities.sum() - pair["log_probability"]) < 1e-3 * len(event.argmax)
        assert (event.argmax.tolist() == pair["continuation_ids"]) == pair["is_greedy"]
    for prompt, event in zip(reference["prompts"], events[len(pairs) :], strict=True):
        np.testing.assert_allclose(event.log_probabilities, prompt["prompt_log_probabilities"], atol=1e-3, rtol=0)


def test_the_tokenizer_is_that_of_transformers(checkpoint: Checkpoint, reference: dict[str, Any]) -> None:
    """As rebuilt from the GGUF."""
    tokenizer = Tokenizer.load(checkpoint.tokenizer_path)
    for case in reference["tokenizer"]["encodings"]:
        assert tokenizer.encode(case["text"], True) == case["ids"]
        assert tokenizer.decode(case["ids"], True) == case["decoded_skip_special"]
    for case in reference["tokenizer"]["chats"]:
        assert tokenizer.apply_chat_template(case["messages"], case["add_generation_prompt"]) == case["ids"]


@pytest.mark.slow
def test_bf16_is_as_near_to_float32_as_that_of_transformers(
    checkpoint: Checkpoint,
    sizes: StepConfig,
    weights_in: Callable[[ComputeDtype], Any],
    reference: dict[str, Any],
) -> None:
    """KL(float32 || bf16) over every position of prompt and continuation, as in the fixtures."""
    sequences = [prompt["ids"] + prompt["greedy_ids"] for prompt in reference["prompts"]]
    float32 = _log_probabilities(checkpoint, sizes, weights_in("float32"), "float32", sequences)
    bf16 = _log_probabilities(checkpoint, sizes, weights_in("bfloat16"), "bfloat16", sequences)
    divergences = np.concatenate(
        [(np.exp(p.astype(np.float64)) * (p - q)).sum(axis=1) for p, q in zip(float32, bf16, strict=True)]
    )
    theirs = reference["bf16"]
    assert round(theirs["mean_kl"], 7) == TRANSFORMERS_BF16_KL
    assert len(divergences) == theirs["positions"]
    print(f"mean KL(float32 || bf16): {divergences.mean():.6f}, of transformers {theirs['mean_kl']:.6f}")
    assert divergences.mean() <= TRANSFORMERS_BF16_KL


def _log_probabilities(
    checkpoint: Checkpoint, sizes: StepConfig, weights: Any, dtype: ComputeDtype, sequences: list[list[int]]
) -> list[np.ndarray]:
    config, page = checkpoint.config, sizes.page_size

    @jax.jit
    def every_position(weights: Any, tokens: Any) -> Any:
        place = jnp.arange(LONGEST, dtype=jnp.int32)
        batch = TokenBatch(
            row=jnp.zeros_like(place),
            position=place,
            slot=place,
            block_table=jnp.arange(LONGEST // page, dtype=jnp.int32)[None, :],
            context_length=jnp.full(1, LONGEST, jnp.int32),
            generated=0,
            page_size=page,
        )
        model = build_model(config, weights, sizes)
        cache = jnp.zeros((LONGEST, 2, config.num_kv_heads, config.head_dim), jnp.dtype(dtype))
        x, _ = model(tokens, (cache,) * config.num_layers, batch)
        return jax.nn.log_softmax(model.logits(x), axis=-1)

    found = []
    for tokens in sequences:
        # What comes after a token changes nothing before it.
        padded = np.zeros(LONGEST, np.int32)
        padded[: len(tokens)] = tokens
        found.append(np.asarray(every_position(weights, padded))[: len(tokens)])
    return found
