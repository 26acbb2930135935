"""The engine over a runner without a model: rows, pages, order, ends. A wrong slot anywhere gives a wrong token."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from fake_runner import MODEL, FakeRunner, next_token
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_step_config

from elastic_jax.engine import Engine
from elastic_jax.errors import RequestError
from elastic_jax.requests import FailEvent, GenerateRequest, SamplingParams, ScoreEvent, ScoreRequest, TokenEvent
from elastic_jax.step import Bucket

BUCKET_SETS = (
    (Bucket(4, 0), Bucket(0, 4)),
    (Bucket(1, 0), Bucket(4, 0), Bucket(0, 16), Bucket(0, 64)),
    (Bucket(4, 0), Bucket(0, 16), Bucket(4, 16)),
    (Bucket(2, 0), Bucket(4, 0), Bucket(0, 3), Bucket(2, 5), Bucket(4, 40)),
)


def make_engine(**changes: Any) -> Engine:
    sizes: dict[str, Any] = {"page_size": 4, "kv_slots": 128, "max_context": 64} | changes
    runner = FakeRunner(tiny_step_config(**sizes))
    engine = Engine(runner, 10**9)
    runner.pages = engine.pages
    return engine


def steps_of(engine: Engine) -> list[tuple[Bucket, str]]:
    """Bucket and kind of every step so far."""
    assert isinstance(engine.runner, FakeRunner)
    return engine.runner.steps


def request(prompt: Sequence[int], new: int = 5, choices: int = 1, **changes: Any) -> GenerateRequest:
    fields = {"end_tokens": frozenset(), "grammar": None} | changes
    return GenerateRequest(tuple(prompt), new, SamplingParams(), choices=choices, **fields)


def answer(prompt: Sequence[int], new: int, end: frozenset[int] = frozenset()) -> list[int]:
    """What the fake model says after a prompt."""
    context = list(prompt)
    for _ in range(new):
        context.append(next_token(context))
        if context[-1] in end:
            break
    return context[len(prompt) :]


def drain(engine: Engine, steps: int = 2000) -> list[Any]:
    events = []
    while engine.busy:
        events += engine.step()
        steps -= 1
        assert steps, "the engine does not come to an end"
    return events


def answers(events: Sequence[Any]) -> dict[tuple[int, int], list[int]]:
    """Tokens by request and choice; checks that an end is said once, with the last token."""
    found: dict[tuple[int, int], list[int]] = {}
    ended = set()
    for event in events:
        if isinstance(event, TokenEvent):
            key = (event.request, event.choice)
            assert key not in ended, "nothing comes after an end"
            found.setdefault(key, []).append(event.token)
            if event.finish:
                ended.add(key)
    return found


def assert_empty(engine: Engine) -> None:
    assert not engine.busy
    assert engine.pages.free == engine.pages.pages
    assert sorted(engine._free_rows) == list(range(engine.config.rows))
    assert not engine._scores
    assert not engine._seeds
    assert not engine._unfinished


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_comes_when_everyone_gets_their_own_tokens(data: st.DataObject) -> None:
    engine = make_engine(
        buckets=data.draw(st.sampled_from(BUCKET_SETS)),
        kv_slots=data.draw(st.sampled_from([64, 72, 128])),
        page_size=data.draw(st.sampled_from([1, 4, 8])),
    )
    wanted: dict[tuple[int, int], list[int]] = {}
    scores: dict[int, ScoreRequest] = {}
    cancelled: set[tuple[int, int | None]] = set()
    events: list[Any] = []
    for _ in range(data.draw(st.integers(1, 25))):
        match data.draw(st.sampled_from(["generate", "generate", "score", "cancel", "step", "step"])):
            case "generate":
                length = data.draw(st.integers(1, 45))
                new = data.draw(st.integers(1, min(20, 64 - length)))
                prompt = [data.draw(st.integers(0, 3))] * (length // 2) + list(range(length - length // 2))
                end = frozenset(answer(prompt, new)[data.draw(st.integers(0, new - 1)) :][:1])
                end = end if data.draw(st.booleans()) else frozenset()
                choices = data.draw(st.sampled_from([1, 1, 2, 5]))
                number = engine.submit(request(prompt, new, choices, end_tokens=end))
                wanted |= {(number, choice): answer(prompt, new, end) for choice in range(choices)}
            case "score":
                tokens = tuple(range(data.draw(st.integers(2, 50))))
                asked = ScoreRequest(tokens, data.draw(st.integers(1, len(tokens) - 1)), 0)
                scores[engine.submit(asked)] = asked
            case "cancel" if wanted:
                number, choice = data.draw(st.sampled_from(sorted(wanted)))
                choice = data.draw(st.sampled_from([None, choice]))
                engine.cancel(number, choice)
                cancelled.add((number, choice))
            case _:
                events += engine.step()
    events += drain(engine)
    found = answers(events)
    for (number, choice), tokens in wanted.items():
        got = found.get((number, choice), [])
        stopped = {(number, choice), (number, None)} & cancelled
        assert got == (tokens[: len(got)] if stopped else tokens)
    got_scores = {event.request: event for event in events if isinstance(event, ScoreEvent)}
    assert got_scores.keys() == scores.keys()
    for number, asked in scores.items():
        expected = [next_token(list(asked.tokens[:i])) for i in range(asked.first, len(asked.tokens))]
        assert got_scores[number].argmax.tolist() == expected
        assert got_scores[number].log_probabilities.tolist() == [-t for t in asked.tokens[asked.first :]]
    assert_empty(engine)


def test_results_are_read_one_step_late() -> None:
    engine = make_engine()
    engine.submit(request([1, 2], 3))
    assert [len(engine.step()) for _ in range(4)] == [0, 1, 1, 1]
    assert len(steps_of(engine)) == 3


def test_an_end_that_is_read_late_wastes_one_step_and_nothing_else() -> None:
    engine = make_engine()
    expected = answer([1, 2], 9)
    engine.submit(request([1, 2], 9, end_tokens=frozenset(expected[2:3])))
    events = drain(engine)
    assert [event.token for event in events] == expected[:3]
    assert events[-1].finish == "stop"
    assert len(steps_of(engine)) == 4
    assert_empty(engine)


def test_one_new_token_needs_no_generating_step() -> None:
    engine = make_engine()
    engine.submit(request([1, 2], 1))
    events = drain(engine)
    assert [(event.token, event.finish) for event in events] == [(answer([1, 2], 1)[0], "length")]
    assert [bucket.generated for bucket, _ in steps_of(engine)] == [0]


def test_the_whole_context_can_be_used() -> None:
    engine = make_engine(max_context=64)
    engine.submit(request(range(40), 24))
    engine.submit(request([7] * 63, 1))
    found = answers(drain(engine))
    assert found[0, 0] == answer(range(40), 24)
    assert found[1, 0] == answer([7] * 63, 1)


def test_a_request_waits_until_the_whole_of_it_fits() -> None:
    engine = make_engine(kv_slots=64, page_size=4)
    engine.submit(request(range(30), 20))  # 49 slots: 13 of 16 pages
    engine.submit(request(range(12), 2))  # 13 slots: 4 pages
    engine.submit(request([1], 2))  # would fit, but the one before it was first
    engine.step()
    assert engine.pages.free == 3
    found = answers(drain(engine))
    assert len(found[1, 0]) == len(found[2, 0]) == 2
    assert_empty(engine)


def test_more_requests_than_rows_take_turns() -> None:
    engine = make_engine()
    numbers = [engine.submit(request([i, i + 1], 6)) for i in range(13)]
    found = answers(drain(engine))
    assert found == {(number, 0): answer([i, i + 1], 6) for i, number in enumerate(numbers)}


def test_a_long_prompt_does_not_stop_those_who_generate() -> None:
    engine = make_engine(buckets=(Bucket(4, 0), Bucket(0, 4)))
    engine.submit(request([1], 20))
    engine.step()
    engine.submit(request(range(40), 2))
    kinds = []
    while engine.busy:
        engine.step()
        kinds = [bucket.generated for bucket, _ in steps_of(engine)]
    assert kinds[:20] == [0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4]


def test_scores_and_generation_take_turns() -> None:
    engine = make_engine(buckets=(Bucket(4, 0), Bucket(0, 4)))
    engine.submit(request([1], 12))
    for _ in range(3):
        engine.submit(ScoreRequest(tuple(range(16)), 1, 0))
    drain(engine)
    kinds = [kind for _, kind in steps_of(engine)]
    # while both are there
    assert kinds[1:20].count("score") in (9, 10)
    assert all(set(kinds[i : i + 2]) == {"plain", "score"} for i in range(1, 18))


# -- several answers to one prompt -------------------------------------------------------------------------------------


def test_choices_share_the_pages_of_their_prompt() -> None:
    engine = make_engine(kv_slots=256, page_size=4)
    engine.submit(request(range(33), 4, choices=4))
    events = []
    while len(engine._running) < 4:
        events += engine.step()
    used = engine.pages.pages - engine.pages.free
    # 33 + 3 slots are 9 pages, of which 8 hold only prompt: one computes them, the others add their last one
    assert used == 9 + 3
    found = answers(events + drain(engine))
    assert found == {(0, choice): answer(range(33), 4) for choice in range(4)}
    assert [bucket.prompt for bucket, _ in steps_of(engine)].count(64) == 1
    assert_empty(engine)


@pytest.mark.parametrize("length", [1, 2, 4, 5, 8, 9])
def test_choices_part_inside_a_page_and_at_its_border(length: int) -> None:
    engine = make_engine(page_size=4)
    engine.submit(request(range(length), 7, choices=3))
    assert answers(drain(engine)) == {(0, choice): answer(range(length), 7) for choice in range(3)}
    assert_empty(engine)


@pytest.mark.parametrize("steps", range(8))
def test_the_others_go_on_when_the_first_answer_is_cancelled(steps: int) -> None:
    engine = make_engine(page_size=4, buckets=(Bucket(4, 0), Bucket(0, 4)))
    engine.submit(request(range(10), 6, choices=3))
    events = [event for _ in range(steps) for event in engine.step()]
    engine.cancel(0, 0)
    found = answers(events + drain(engine))
    assert found[0, 1] == found[0, 2] == answer(range(10), 6)
    assert_empty(engine)


def test_answers_that_find_a_row_only_after_the_first_has_ended() -> None:
    engine = make_engine(page_size=4)
    engine.submit(request(range(10), 2, choices=9))
    assert answers(drain(engine)) == {(0, choice): answer(range(10), 2) for choice in range(9)}
    assert_empty(engine)


# -- cancelling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(6))
def test_cancelling_leaves_nothing_behind(steps: int) -> None:
    engine = make_engine(buckets=(Bucket(4, 0), Bucket(0, 4)))
    numbers = [engine.submit(request(range(10), 5)), engine.submit(ScoreRequest(tuple(range(9)), 1, 0))]
    numbers += [engine.submit(request([3], 5, choices=5))]
    for _ in range(steps):
        engine.step()
    for number in numbers:
        engine.cancel(number)
        engine.cancel(number)
    assert engine.pages.free == engine.pages.pages
    assert drain(engine) == []
    assert_empty(engine)


def test_a_row_and_pages_given_on_at_once_serve_the_next_one_well() -> None:
    engine = make_engine(kv_slots=64, page_size=4, rows=1, buckets=(Bucket(1, 0), Bucket(0, 16)))
    first = engine.submit(request(range(40), 20))
    for _ in range(5):
        engine.step()
    engine.cancel(first)
    second = engine.submit(request(range(5, 45), 20))
    assert answers(drain(engine)) == {(second, 0): answer(range(5, 45), 20)}


def test_unknown_numbers_have_ended() -> None:
    engine = make_engine()
    engine.cancel(77)
    engine.cancel(77, 3)


# -- refusing ----------------------------------------------------------------------------------------------------------


def test_a_refused_request_changes_nothing() -> None:
    engine = make_engine()
    with pytest.raises(RequestError):
        engine.submit(request([], 1))
    assert_empty(engine)
    assert engine.submit(request([1], 1)) == 0


def test_max_context_can_be_shortened_but_not_lengthened() -> None:
    step = tiny_step_config(max_context=64)
    assert Engine(FakeRunner(step), 10).limits.max_context == 10
    assert Engine(FakeRunner(step), 100).limits.max_context == 64


# -- grammars ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Recorder:
    """Allows everything, and keeps what it was asked; fails after `fail_at` tokens."""

    asked: list[tuple[int, ...]]
    fail_at: int = -1
    words: np.ndarray = dataclasses.field(
        default_factory=lambda: np.full(-(-MODEL.vocab_size // 32), 0xFFFFFFFF, np.uint32)
    )

    def allowed(self, output: Sequence[int]) -> np.ndarray:
        self.asked.append(tuple(output))
        if len(output) == self.fail_at:
            raise KeyError("a bug in the grammar")
        return self.words


def test_a_grammar_is_asked_once_a_token_with_all_before_it() -> None:
    engine = make_engine(buckets=BUCKET_SETS[3])
    grammar = Recorder([])
    engine.submit(request(range(9), 5, grammar=grammar))
    engine.submit(request(range(40), 15))
    found = answers(drain(engine))
    expected = answer(range(9), 5)
    assert grammar.asked == [tuple(expected[:n]) for n in range(5)]
    assert found == {(0, 0): expected, (1, 0): answer(range(40), 15)}


def test_rows_with_a_grammar_run_every_other_step_and_hold_up_no_one() -> None:
    engine = make_engine(buckets=(Bucket(1, 0), Bucket(4, 0), Bucket(0, 16)))
    engine.submit(request([1], 4, grammar=Recorder([])))
    engine.submit(request([2], 8))
    drain(engine)
    assert len(steps_of(engine)) <= 10


@pytest.mark.parametrize("fail_at", [0, 1, 3])
def test_a_grammar_that_fails_ends_its_own_request_alone(fail_at: int) -> None:
    engine = make_engine()
    other = engine.submit(request(range(20), 8))
    bad = engine.submit(request(range(9), 5, choices=2, grammar=Recorder([], fail_at)))
    events = drain(engine)
    failed = [event for event in events if isinstance(event, FailEvent)]
    assert [(event.request, str(event.error)) for event in failed] == [(bad, "'a bug in the grammar'")]
    found = answers(events)
    assert found.pop((other, 0)) == answer(range(20), 8)
    assert all(tokens == answer(range(9), 5)[: len(tokens)] for tokens in found.values())
    assert_empty(engine)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (np.zeros(32, np.uint32), "allows no token after 0 tokens"),
        (np.ones(1, np.uint32), r"must give uint32\[32\], found uint32\[1\]"),
        (np.ones(32, np.int64), r"must give uint32\[32\], found int64\[32\]"),
        (np.array([0] * 31 + [1 << 31], np.uint32), "allows no token"),  # the bit of token 1023, which is none
    ],
)
def test_what_a_grammar_says_is_checked(words: np.ndarray, message: str) -> None:
    engine = make_engine()
    engine.submit(request([1], 5, grammar=Recorder([], words=words)))
    (event,) = drain(engine)
    assert isinstance(event, FailEvent)
    with pytest.raises(RequestError, match=message):
        raise event.error
    assert_empty(engine)
