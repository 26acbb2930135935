"""A conversation with a model: its turns, one answer at a time, and what each took."""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from elastic_jax.elastic import DEFAULT_NEW_TOKENS, ElasticMistral
from elastic_jax.errors import RequestError
from elastic_jax.system_errors import about


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one answer took.

    Attributes:
        mode: which answered.
        text: the answer, as far as it came.
        new_tokens: tokens of the answer.
        context_tokens: tokens of the conversation with the answer.
        max_context: the longest there can be.
        tokens_per_second: after the first token; None for answers of one.
        finish_reason: `stop`, `length`, `not_finite`, or `interrupted`.
    """

    mode: str
    text: str
    new_tokens: int
    context_tokens: int
    max_context: int
    tokens_per_second: float | None
    finish_reason: str

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        rate = f", {self.tokens_per_second} tok/s" if self.tokens_per_second else ""
        ended = {"length": ", cut at the length limit", "interrupted": ", stopped"}.get(self.finish_reason, "")
        context = f"context {self.context_tokens} of {self.max_context}"
        return f"[{self.mode}: {self.new_tokens} tokens{rate}, {context}{ended}]"


@dataclasses.dataclass
class Conversation:
    """Messages so far, with the options of every answer.

    Attributes:
        options: arguments of `ElasticMistral.generate`.
        max_new_tokens: most tokens of an answer; None for 256, or what the context leaves.
        system: the system prompt; None for none.
        messages: what was said, without the system prompt.
    """

    options: dict[str, Any]
    max_new_tokens: int | None
    system: str | None = None
    messages: list[dict[str, str]] = dataclasses.field(default_factory=list)

    @property
    def prompt(self) -> list[dict[str, str]]:
        """All messages as the model gets them."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]

    def ask(self, model: ElasticMistral, text: str, stopped: Callable[[], bool]) -> Iterator[str | Turn]:
        """Says something; gives pieces of the answer as they come, and last what it took.

        An answer that is stopped stays in the conversation as far as it came. If the model refuses, nothing was said.

        Args:
            model: who answers.
            text: what is said.
            stopped: is asked between tokens whether to stop.

        Raises:
            RequestError: the conversation has become longer than the context.
        """
        self.messages.append({"role": "user", "content": text})
        said: list[str] = []
        tokens = 0
        reason, first = "interrupted", None
        try:
            prompt = model.tokenizer.apply_chat_template(self.prompt, add_generation_prompt=True)
            longest = model.engine.limits.max_context
            room = longest - len(prompt)
            if room < 1:
                raise RequestError(
                    f"the conversation has {len(prompt)} tokens, and the context holds {longest}: /clear begins anew"
                )
            wanted = self.max_new_tokens or DEFAULT_NEW_TOKENS
            pieces = model.generate(prompt, max_new_tokens=min(wanted, room), stream=True, **self.options)
            for piece in pieces:
                first = first or time.perf_counter()
                tokens += len(piece.token_ids)
                said.append(piece.text)
                if piece.text:
                    yield piece.text
                if piece.generation is not None:
                    reason = piece.generation.finish_reason
                elif stopped():
                    break
            pieces.close()
        except BaseException:
            del self.messages[-1]
            raise
        seconds = time.perf_counter() - (first or 0)
        self.messages.append({"role": "assistant", "content": "".join(said)})
        yield Turn(
            mode=model.plan.name,
            text="".join(said),
            new_tokens=tokens,
            context_tokens=len(prompt) + tokens,
            max_context=longest,
            tokens_per_second=round((tokens - 1) / seconds, 1) if tokens > 1 else None,
            finish_reason=reason,
        )

    def save(self, path: Path) -> None:
        """Writes the messages as JSON: a list that `ElasticMistral.generate` takes as a prompt.

        Raises:
            OSError: it cannot be written; a file that was there is then as it was.
        """
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with about(path, instead_of=partial):
                partial.write_text(json.dumps(self.prompt, ensure_ascii=False, indent=1) + "\n", "utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
