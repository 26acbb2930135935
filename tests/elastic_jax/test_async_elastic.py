"""The asynchronous model gives what the synchronous one gives, never blocks the loop, and ends what nobody hears."""

import asyncio
from collections.abc import Callable

import pytest
from tiny import CompiledTiny

from elastic_jax import AsyncElasticMistral, ElasticMistral
from elastic_jax.errors import RequestError


@pytest.fixture(scope="module")
def model(compiled_tiny: Callable[..., CompiledTiny]) -> AsyncElasticMistral:
    return asyncio.run(AsyncElasticMistral.load(compiled_tiny("S", "bfloat16").checkpoint.path, "S"))


def sync(model: AsyncElasticMistral) -> ElasticMistral:
    return model.model


@pytest.mark.parametrize("prompts", ["one", ["one"], ["one", "two"]])
@pytest.mark.parametrize("choices", [1, 2])
def test_answers_are_the_synchronous_ones(model: AsyncElasticMistral, prompts: str | list[str], choices: int) -> None:
    options = {"max_new_tokens": 5, "choices": choices, "temperature": 1.0, "seed": 3}
    assert asyncio.run(model.generate(prompts, **options)) == sync(model).generate(prompts, **options)


def test_streams_run_together_and_the_loop_goes_on(model: AsyncElasticMistral) -> None:
    async def listen(prompt: str) -> str:
        return "".join([piece.text async for piece in model.stream(prompt, max_new_tokens=8, ignore_end=True)])

    async def both() -> tuple[list[str], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticker = asyncio.create_task(tick())
        texts = await asyncio.gather(listen("one"), listen("two"))
        ticker.cancel()
        return texts, ticks

    texts, ticks = asyncio.run(both())
    assert texts == [str(a) for a in sync(model).generate(["one", "two"], max_new_tokens=8, ignore_end=True)]
    assert ticks > 8


def test_who_stops_listening_ends_the_answer(model: AsyncElasticMistral) -> None:
    async def listen() -> None:
        stream = model.stream("one", max_new_tokens=200, ignore_end=True)
        async for _ in stream:
            break
        await stream.aclose()

    asyncio.run(listen())
    assert len(sync(model).generate("two", max_new_tokens=3, ignore_end=True).token_ids) == 3
    assert not sync(model).engine.busy


def test_a_cancelled_task_ends_its_answer(model: AsyncElasticMistral) -> None:
    async def cancel() -> None:
        task = asyncio.create_task(model.generate("one", max_new_tokens=200, ignore_end=True))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert len(sync(model).generate("two", max_new_tokens=3, ignore_end=True).token_ids) == 3


def test_errors_come_through(model: AsyncElasticMistral) -> None:
    async def first(prompt: str) -> None:
        async for _ in model.stream(prompt, temperature=-1.0):
            pass

    with pytest.raises(RequestError, match="temperature"):
        asyncio.run(first("one"))
    with pytest.raises(RequestError, match="empty"):
        asyncio.run(model.generate([[]]))
    with pytest.raises(RequestError, match="stream"):
        asyncio.run(model.generate("one", stream=True))


def test_scores(model: AsyncElasticMistral) -> None:
    assert asyncio.run(model.score([("one", " two")])) == sync(model).score([("one", " two")])
