"""The engine over real, tiny models in float32: what is computed never depends on what runs beside it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY_MODELS, CompiledTiny

from elastic_jax.engine import Engine
from elastic_jax.requests import GenerateRequest, SamplingParams, ScoreEvent, ScoreRequest, TokenEvent
from elastic_jax.runner import Runner
from elastic_jax.step import Bucket

type Compiled = Callable[..., CompiledTiny]

MARGIN = 1e-3
"""Reordered float32 sums change a logit by less: where the two best are farther apart, the best one must stay."""

BUCKET_SETS = (
    (Bucket(1, 0), Bucket(4, 0), Bucket(0, 16), Bucket(0, 64), Bucket(4, 16)),
    (Bucket(4, 0), Bucket(0, 16)),
    (Bucket(4, 0), Bucket(0, 16), Bucket(4, 16)),
    (Bucket(1, 0), Bucket(4, 0), Bucket(0, 64)),
)


def engine_of(compiled: CompiledTiny, buckets: tuple[Bucket, ...] | None = None) -> Engine:
    step = compiled.step if buckets is None else dataclasses.replace(compiled.step, buckets=buckets)
    runner = Runner(compiled.config, step, compiled.units, compiled.weights, jax.devices()[0])
    return Engine(runner, step.max_context)


def request(prompt: Sequence[int], new: int = 8, choices: int = 1, **changes: Any) -> GenerateRequest:
    grammar, end = changes.pop("grammar", None), changes.pop("end_tokens", frozenset())
    return GenerateRequest(tuple(prompt), new, SamplingParams(**changes), end, choices, grammar)


def run(engine: Engine, *requests: GenerateRequest | ScoreRequest) -> list[Any]:
    """The events of some requests, in order of request and answer."""
    for each in requests:
        engine.submit(each)
    events = []
    while engine.busy:
        events += engine.step()
    return sorted(events, key=lambda event: (event.request, getattr(event, "choice", 0)))


def tokens_of(engine: Engine, *requests: GenerateRequest) -> list[list[int]]:
    """The tokens of each answer, answers in order."""
    answers: dict[tuple[int, int], list[int]] = {}
    for event in run(engine, *requests):
        assert isinstance(event, TokenEvent)
        answers.setdefault((event.request, event.choice), []).append(event.token)
    return list(answers.values())


def assert_empty(engine: Engine) -> None:
    assert engine.pages.free == engine.pages.pages
    assert len(engine._free_rows) == engine.config.rows


@pytest.fixture(scope="module")
def tiny(compiled_tiny: Compiled) -> CompiledTiny:
    return compiled_tiny("XL", "float32")


@pytest.fixture(scope="module")
def engine(tiny: CompiledTiny) -> Engine:
    return engine_of(tiny)


@pytest.fixture(scope="module")
def random_prompt(tiny: CompiledTiny) -> Callable[[int], tuple[int, ...]]:
    def prompt(length: int) -> tuple[int, ...]:
        return tuple(int(t) for t in np.random.default_rng(length).integers(3, tiny.config.vocab_size, length))

    return prompt


# -- against transformers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY_MODELS)
def test_greedy_tokens_are_those_of_transformers(compiled_tiny: Compiled, fixtures_path: Path, name: str) -> None:
    reference = np.load(fixtures_path / "tiny_reference.npz")
    engine = engine_of(compiled_tiny("XL", "float32", name))
    lengths = (1, 7, 24, 60)
    found = tokens_of(engine, *(request(reference[f"{name}/ids_{n}"].tolist(), 40) for n in lengths))
    for length, tokens in zip(lengths, found, strict=True):
        assert tokens == reference[f"{name}/greedy_{length}"].tolist()
    assert_empty(engine)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_scores_are_those_of_transformers(compiled_tiny: Compiled, fixtures_path: Path, name: str) -> None:
    reference = np.load(fixtures_path / "tiny_reference.npz")
    engine = engine_of(compiled_tiny("XL", "float32", name))
    for length in (7, 24, 60):
        ids = reference[f"{name}/ids_{length}"]
        logits = reference[f"{name}/logits_{length}"]
        expected = np.asarray(jax.nn.log_softmax(jnp.asarray(logits), axis=-1))
        for first in {1, length // 2, length - 1}:
            (event,) = run(engine, ScoreRequest(tuple(ids.tolist()), first, 3))
            assert isinstance(event, ScoreEvent)
            places = np.arange(first - 1, length - 1)
            wanted = expected[places, ids[places + 1]]
            np.testing.assert_allclose(event.log_probabilities, wanted, atol=1e-4, rtol=0)
            assert event.argmax.tolist() == logits[places].argmax(axis=1).tolist()
            assert event.finite
            for place, top in zip(places, event.top, strict=True):
                best = np.argsort(-expected[place])[:3]
                assert [token for token, _ in top] == best.tolist()
                np.testing.assert_allclose([value for _, value in top], expected[place, best], atol=1e-4, rtol=0)
    assert_empty(engine)


class Alone:
    """What requests give when nothing else runs, in small buckets; computed once each."""

    def __init__(self, compiled: CompiledTiny) -> None:
        self._compiled = compiled
        self._engine = engine_of(compiled, (Bucket(4, 0), Bucket(0, 16)))
        self._known: dict[Any, list[Any]] = {}
        self.engine_with = functools.cache(functools.partial(engine_of, compiled))

    def events(self, each: GenerateRequest | ScoreRequest) -> list[Any]:
        if repr(each) not in self._known:
            self._known[repr(each)] = run(self._engine, each)
        return self._known[repr(each)]

    def answer(self, each: GenerateRequest, choice: int) -> list[TokenEvent]:
        """The first answer comes from a run that asks for no other."""
        each = each if choice else dataclasses.replace(each, choices=1)
        return [event for event in self.events(each) if event.choice == choice]


@pytest.fixture(scope="module")
def alone(tiny: CompiledTiny) -> Alone:
    return Alone(tiny)


# -- packing -----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_packing_never_changes_an_answer(
    alone: Alone, random_prompt: Callable[[int], tuple[int, ...]], data: st.DataObject
) -> None:
    """Any order, chunking and interleaving gives the tokens of one-at-a-time runs."""
    engine = alone.engine_with(data.draw(st.sampled_from(BUCKET_SETS)))
    asked: dict[int, GenerateRequest] = {}
    scored: dict[int, ScoreRequest] = {}
    cancelled: set[int] = set()
    events: list[Any] = []
    for _ in range(data.draw(st.integers(2, 14))):
        prompt = random_prompt(data.draw(st.sampled_from([1, 2, 5, 15, 16, 17, 33, 64, 70, 130])))
        match data.draw(st.sampled_from(["greedy", "sampled", "score", "cancel", "step", "steps"])):
            case "greedy":
                each = request(prompt, data.draw(st.sampled_from([1, 6, 12])), data.draw(st.sampled_from([1, 1, 3])),
                               top_log_probabilities=2)  # fmt: skip
                asked[engine.submit(each)] = each
            case "sampled":
                seed = data.draw(st.integers(0, 2))
                each = request(prompt, 8, data.draw(st.sampled_from([1, 2])), temperature=0.8, top_k=5, seed=seed)
                asked[engine.submit(each)] = each
            case "score" if len(prompt) > 1:
                score = ScoreRequest(prompt, 1, 0)
                scored[engine.submit(score)] = score
            case "cancel" if asked:
                cancelled.add(data.draw(st.sampled_from(sorted(asked))))
                for number in cancelled:
                    engine.cancel(number)
            case "steps":
                events += [event for _ in range(5) for event in engine.step()]
            case _:
                events += engine.step()
    while engine.busy:
        events += engine.step()
    for number, each in asked.items():
        for choice in range(each.choices):
            found = [e for e in events if e.request == number and getattr(e, "choice", None) == choice]
            assert number in cancelled or len(found) == each.max_new_tokens
            for one, other in zip(found, alone.answer(each, choice), strict=False):
                best = [value for _, value in other.top]
                if len(best) == 2 and best[0] - best[1] <= MARGIN:
                    break  # from here on the two may part
                assert one.token == other.token
                assert abs(one.log_probability - other.log_probability) < 1e-4
    for number, score in scored.items():
        (found,) = (e for e in events if isinstance(e, ScoreEvent) and e.request == number)
        expected = alone.events(score)[0].log_probabilities
        np.testing.assert_allclose(found.log_probabilities, expected, atol=1e-4, rtol=0)
    assert_empty(engine)


# -- sampling through the engine ---------------------------------------------------------------------------------------


def test_equal_seeds_give_equal_answers_and_other_seeds_others(engine: Engine) -> None:
    requests = [request([5, 9, 7], 16, temperature=1.0, seed=seed) for seed in (3, 3, 4)]
    first, again, other = tokens_of(engine, *requests)
    assert first == again
    assert first != other


def test_without_a_seed_answers_differ(engine: Engine) -> None:
    first, second = tokens_of(engine, *[request([5, 9, 7], 24, temperature=1.5) for _ in range(2)])
    assert first != second


def test_seeds_of_64_bits_are_told_apart(engine: Engine) -> None:
    seeds = (1, 1 + 2**32, 2**64 - 1)
    answers = tokens_of(engine, *[request([5, 9], 16, temperature=1.5, seed=seed) for seed in seeds])
    assert len({tuple(answer) for answer in answers}) == 3


def test_answers_to_one_prompt_differ_and_the_first_is_that_of_a_single_one(engine: Engine) -> None:
    several = tokens_of(engine, request(range(20), 16, 3, temperature=1.0, seed=8))
    again = tokens_of(engine, request(range(20), 16, 3, temperature=1.0, seed=8))
    (single,) = tokens_of(engine, request(range(20), 16, temperature=1.0, seed=8))
    assert several == again
    assert several[0] == single
    assert len({tuple(answer) for answer in several}) == 3


def test_greedy_answers_to_one_prompt_are_equal(engine: Engine) -> None:
    for length in (1, 16, 17, 40):
        answers = tokens_of(engine, request(range(10, 10 + length), 8, 4))
        assert answers == [answers[0]] * 4


def test_a_tiny_temperature_takes_the_most_likely(engine: Engine) -> None:
    cold, greedy = tokens_of(engine, request([5, 9], 12, temperature=1e-5, seed=1), request([5, 9], 12))
    assert cold == greedy


@dataclasses.dataclass(frozen=True)
class OnlyThese:
    """A grammar of some tokens in any order."""

    tokens: tuple[int, ...]
    vocab: int

    def allowed(self, output: Sequence[int]) -> np.ndarray:
        del output
        bits = np.zeros(-(-self.vocab // 32) * 32, np.uint8)
        bits[list(self.tokens)] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)


@dataclasses.dataclass(frozen=True)
class Counting:
    """A grammar with one sentence: 10, 11, 12 and so on."""

    vocab: int

    def allowed(self, output: Sequence[int]) -> np.ndarray:
        return OnlyThese((10 + len(output),), self.vocab).allowed(output)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_is_obeyed_and_rows_beside_it_do_not_notice(
    tiny: CompiledTiny, engine: Engine, temperature: float
) -> None:
    vocab, few = tiny.config.vocab_size, (0, 31, 32, 63, 319)
    sampled = {"temperature": temperature, "seed": 2}
    (free,) = tokens_of(engine, request([5, 9], 12))
    beside, some, counted, greedy = tokens_of(
        engine,
        request([5, 9], 12),
        request([5, 9], 12, grammar=OnlyThese(few, vocab), **sampled),
        request([7], 12, grammar=Counting(vocab), **sampled),
        request([5, 9], 12, grammar=OnlyThese(tuple(range(vocab)), vocab)),
    )
    assert beside == greedy == free
    assert set(some) <= set(few)
    assert counted == list(range(10, 22))
    # The row that a grammar used is free of it afterwards.
    assert tokens_of(engine, *[request([5, 9], 12)] * 4) == [free] * 4


def test_bias_forbids_and_demands(engine: Engine) -> None:
    (free,) = tokens_of(engine, request([5, 9], 6))
    forbidden, demanded, beside = tokens_of(
        engine,
        request([5, 9], 6, logit_bias={token: -math.inf for token in set(free)}),
        request([5, 9], 6, logit_bias={42: 1000.0}),
        request([5, 9], 6),
    )
    assert not set(forbidden) & set(free)
    assert demanded == [42] * 6
    assert beside == free


def _spied(tiny: CompiledTiny, each: GenerateRequest) -> tuple[list[TokenEvent], np.ndarray]:
    """The events of a request that runs alone, and the logits of each of its tokens."""
    engine, logits = engine_of(tiny, BUCKET_SETS[3]), []
    step = engine.runner.step

    def spy(bucket: Bucket, inputs: Any, **options: bool) -> Any:
        out = step(bucket, inputs, **options)
        if (inputs.out_index < bucket.tokens).any():
            logits.append(np.asarray(out.logits)[inputs.out_index < bucket.tokens][0])
        return out

    engine.runner.step = spy  # pyright: ignore[reportAttributeAccessIssue]
    return run(engine, each), np.stack(logits)


@pytest.mark.parametrize(
    "penalties",
    [
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.0},
        {"frequency_penalty": 1.5},
        {"repetition_penalty": 1.3, "presence_penalty": -0.5, "frequency_penalty": 0.7, "logit_bias": {9: 2.0}},
    ],
)
def test_penalties_are_those_of_a_simulation(tiny: CompiledTiny, penalties: dict[str, Any]) -> None:
    prompt = [5, 9, 9, 5, 301]
    events, logits = _spied(tiny, request(prompt, 24, top_log_probabilities=8, **penalties))
    output: list[int] = []
    for event, original in zip(events, logits, strict=True):
        seen = sorted({*prompt, *output})
        adjusted = original.copy()
        penalty = np.float32(penalties.get("repetition_penalty", 1.0))
        adjusted[seen] = np.where(adjusted[seen] > 0, adjusted[seen] / penalty, adjusted[seen] * penalty)
        for token in set(output):
            adjusted[token] -= penalties.get("presence_penalty", 0.0)
            adjusted[token] -= penalties.get("frequency_penalty", 0.0) * output.count(token)
        for token, bias in penalties.get("logit_bias", {}).items():
            adjusted[token] += bias
        assert event.token == adjusted.argmax()
        output.append(event.token)
        log_probabilities = np.asarray(jax.nn.log_softmax(jnp.asarray(original)))
        assert abs(event.log_probability - log_probabilities[event.token]) < 1e-5
        best = np.argsort(-original)[:8]
        assert [token for token, _ in event.top] == best.tolist()
        np.testing.assert_allclose([value for _, value in event.top], log_probabilities[best], atol=1e-5, rtol=0)
    (free,) = tokens_of(engine_of(tiny), request(prompt, 24))
    assert output != free


def test_top_tokens_are_reported_to_those_who_asked(engine: Engine) -> None:
    events = run(engine, request([5], 4, top_log_probabilities=3), request([5], 4), request([5], 4, temperature=1.0,
                 top_log_probabilities=1))  # fmt: skip
    assert [len(event.top) for event in events] == [3] * 4 + [0] * 4 + [1] * 4
    assert all(event.top[0][0] == event.token for event in events[:4])


def test_an_end_token_ends_and_is_given(engine: Engine) -> None:
    (free,) = tokens_of(engine, request([5, 9], 12))
    end = free[4]
    events = run(engine, request([5, 9], 12, end_tokens=frozenset([end])))
    assert [event.token for event in events] == free[: free.index(end) + 1]
    assert [event.finish for event in events][-1] == "stop"
    assert_empty(engine)


# -- what is not finite ------------------------------------------------------------------------------------------------


def test_a_sequence_that_is_not_finite_ends_and_harms_no_other(tiny: CompiledTiny) -> None:
    """Its pages go to others, who read them whole and mask what they have not written."""
    bad_token = 17
    embedding = np.asarray(tiny.weights["embedding"]).copy()
    embedding[bad_token] = np.nan
    broken = dataclasses.replace(tiny, weights=tiny.weights | {"embedding": jax.device_put(embedding)})
    engine = engine_of(broken)
    (expected,) = tokens_of(engine, request([5, 9], 10))
    events = run(engine, *[request([bad_token] * 100, 10)] * 4, request([5, 9], 10))
    bad = [event for event in events if event.request < events[-1].request]
    assert [event.finish for event in bad] == ["not_finite"] * 4
    assert [event.token for event in events[4:]] == expected
    score = run(engine, ScoreRequest((5, bad_token, 9), 1, 0), ScoreRequest((5, 9, 8), 1, 0))
    assert [event.finite for event in score] == [False, True]
    assert tokens_of(engine, *[request([5, 9], 10)] * 4) == [expected] * 4
    assert_empty(engine)
