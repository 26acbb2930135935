"""Several callers on one engine."""

import threading
from collections.abc import Sequence
from typing import Any

import pytest
from fake_runner import FakeRunner
from tiny import tiny_step_config

from elastic_jax.delivery import Delivery, Inbox
from elastic_jax.engine import Engine
from elastic_jax.errors import RequestError
from elastic_jax.requests import GenerateRequest, SamplingParams, ScoreEvent, ScoreRequest, TokenEvent


@pytest.fixture
def engine() -> Engine:
    return Engine(FakeRunner(tiny_step_config()), 256)


def request(prompt: Sequence[int], new: int = 6) -> GenerateRequest:
    return GenerateRequest(tuple(prompt), new, SamplingParams(), frozenset(), 1, None)


def collect(delivery: Delivery, inbox: Inbox, count: int) -> list[Any]:
    events: list[Any] = []
    while len(events) < count:
        events += delivery.wait(inbox)
    return events


def tokens(engine: Engine, prompt: Sequence[int], new: int = 6) -> list[int]:
    delivery = Delivery(engine)
    return [event.token for event in collect(delivery, delivery.submit([request(prompt, new)]), new)]


def test_each_caller_gets_its_own_whoever_steps(engine: Engine) -> None:
    expected = [tokens(engine, [i]) for i in range(2)]
    delivery = Delivery(engine)
    one, two = delivery.submit([request([0])]), delivery.submit([request([1])])
    first = collect(delivery, one, 6)  # meanwhile the other one's came too
    second = collect(delivery, two, 6)
    assert [event.token for event in first] == expected[0]
    assert [event.token for event in second] == expected[1]
    assert isinstance(first[0], TokenEvent)


def test_requests_queued_together_come_together(engine: Engine) -> None:
    delivery = Delivery(engine)
    inbox = delivery.submit([request([i], 3) for i in range(6)])
    events = collect(delivery, inbox, 18)
    assert {event.request for event in events} == set(inbox.numbers)
    assert list(dict.fromkeys(event.request for event in events)) == list(inbox.numbers), "first come, first served"
    assert [event.request for event in events] != sorted(event.request for event in events), "beside each other"


def test_all_are_queued_or_none(engine: Engine) -> None:
    delivery = Delivery(engine)
    with pytest.raises(RequestError):
        delivery.submit([request([1]), request([])])
    assert not engine.busy


def test_waiting_for_what_has_ended_is_an_error_not_a_loop(engine: Engine) -> None:
    delivery = Delivery(engine)
    inbox = delivery.submit([request([1])])
    collect(delivery, inbox, 6)
    with pytest.raises(RuntimeError, match="the requests have ended"):
        delivery.wait(inbox)


def test_events_of_a_closed_inbox_are_dropped(engine: Engine) -> None:
    delivery = Delivery(engine)
    one, two = delivery.submit([request([0])]), delivery.submit([request([1])])
    collect(delivery, two, 3)
    delivery.close(one)
    collect(delivery, two, 3)
    assert len(one.events) <= 4
    delivery.close(two)
    assert engine.pages.free == engine.pages.pages
    assert not delivery._inboxes


def test_one_answer_of_several_can_be_ended(engine: Engine) -> None:
    delivery = Delivery(engine)
    several = GenerateRequest((1, 2), 6, SamplingParams(), frozenset(), 3, None)
    inbox = delivery.submit([several])
    delivery.cancel(inbox.numbers[0], 1)
    events = collect(delivery, inbox, 12)
    assert {event.choice for event in events} == {0, 2}


def test_an_end_from_inside_a_step_waits_for_the_steps_end(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a generator that the garbage collector ends at any moment of the same thread."""
    delivery = Delivery(engine)
    one, two = delivery.submit([request([0])]), delivery.submit([request([1])])
    step = engine.step
    free = []

    def interrupted() -> list[Any]:
        free.append(engine.pages.free)
        delivery.close(one)
        free.append(engine.pages.free)
        return step()

    delivery.wait(two)
    monkeypatch.setattr(engine, "step", interrupted)
    delivery.wait(two)
    assert free[0] == free[1] == engine.pages.pages - 2, "nothing changes in the middle of a step"
    monkeypatch.undo()
    delivery.wait(two)
    assert engine.pages.free == engine.pages.pages - 1


def test_many_threads_share_the_steps(engine: Engine) -> None:
    expected = {i: tokens(engine, [i, 7 * i % 10], 12) for i in range(12)}
    assert isinstance(engine.runner, FakeRunner)
    before = len(engine.runner.steps)
    delivery, found, scores = Delivery(engine), {}, []
    start = threading.Barrier(12)

    def work(i: int) -> None:
        start.wait()
        events = collect(delivery, delivery.submit([request([i, 7 * i % 10], 12)]), 12)
        found[i] = [event.token for event in events]
        (event,) = collect(delivery, delivery.submit([ScoreRequest((1, 2, 3), 1, 0)]), 1)
        scores.append(event)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == expected
    assert all(isinstance(event, ScoreEvent) for event in scores)
    # four rows at a time, not one after the other
    assert len(engine.runner.steps) - before < 12 * 12
    assert engine.pages.free == engine.pages.pages
