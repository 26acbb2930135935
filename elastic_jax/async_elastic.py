"""`AsyncElasticMistral`: the same model for programs that run on an event loop, which it never blocks."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any, Self

from elastic_jax.elastic import ElasticMistral
from elastic_jax.errors import RequestError
from elastic_jax.generation import Piece
from elastic_jax.prompts import Prompt, list_prompts
from elastic_jax.scoring import Score


class AsyncElasticMistral:
    """A loaded model on an event loop; make it with `load`, or from an `ElasticMistral`, which stays usable.

    Attributes:
        model: the one that works. Calls share its engine's steps, so many at once are answered together.

    Each call waits in a thread of its own. Whoever stops listening, by `break`, an error or a cancelled task, ends the
    answers.
    """

    def __init__(self, model: ElasticMistral) -> None:
        self.model = model

    @classmethod
    async def load(cls, path: str | Path, mode: str = "M", **options: Any) -> Self:
        """`ElasticMistral.load`, with its arguments and errors."""
        return cls(await asyncio.to_thread(ElasticMistral.load, path, mode, **options))

    async def generate(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> Any:
        """`ElasticMistral.generate` with its arguments, errors and results, but for `stream`.

        Raises:
            RequestError: as there; or `stream` was given, which `stream` is for.
        """
        if "stream" in options:
            raise RequestError("generate gives finished answers: iterate over `stream(...)` for pieces")
        stop = threading.Event()

        def work() -> Any:
            choices, answers = options.get("choices", 1), {}
            pieces = self.model.generate(prompts, **options, stream=True)
            try:
                for piece in pieces:
                    if stop.is_set():
                        return None
                    if piece.generation is not None:
                        answers[piece.prompt, piece.choice] = piece.generation
            finally:
                pieces.close()
            many = 1 + max(prompt for prompt, _ in answers)
            groups = [[answers[prompt, choice] for choice in range(choices)] for prompt in range(many)]
            flat = [group if choices > 1 else group[0] for group in groups]
            return flat if list_prompts(prompts)[0] else flat[0]

        try:
            return await asyncio.to_thread(work)
        except asyncio.CancelledError:
            stop.set()
            raise

    async def stream(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> AsyncGenerator[Piece]:
        """Pieces of the answers as they come: `async for piece in model.stream("Once")`.

        Arguments and errors are those of `ElasticMistral.generate`; an error comes with the first piece.
        """
        loop, queue, stop = asyncio.get_running_loop(), asyncio.Queue[Any](), threading.Event()

        def put(item: Any) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)

        worker = asyncio.create_task(asyncio.to_thread(self._pump, prompts, options, put, stop))
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            await asyncio.shield(worker)  # until it has given the answers up

    def _pump(self, prompts: Any, options: dict[str, Any], put: Callable[[Any], None], stop: threading.Event) -> None:
        try:
            pieces = self.model.generate(prompts, **options, stream=True)
            try:
                for piece in pieces:
                    if stop.is_set():
                        return
                    put(piece)
            finally:
                pieces.close()
        except BaseException as error:
            put(error)
            return
        put(None)

    async def score(self, pairs: Sequence[tuple[str | Sequence[int], str | Sequence[int]]]) -> list[Score]:
        """`ElasticMistral.score`."""
        return await asyncio.to_thread(self.model.score, pairs)

    def info(self) -> dict[str, Any]:
        """`ElasticMistral.info`."""
        return self.model.info()
