"""From token events to text: pieces that end on whole characters, stop strings, and finished answers."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from elastic_jax.detokenizer import Detokenizer, StopStrings
from elastic_jax.requests import FinishReason, TokenEvent


@dataclasses.dataclass(frozen=True)
class Generation:
    """One finished answer; `str()` gives its text.

    Attributes:
        text: without the stop string that ended it, and without special tokens.
        token_ids: every token generated, the ending one included.
        log_probabilities: of each token by the model itself, nats.
        top: per token the most likely tokens and their log-probabilities, as many as were asked for.
        finish_reason: `stop` (an end token or a stop string), `length`, or `not_finite`.
        stop: the stop string that ended it, or None.
        prompt_tokens: tokens of the prompt.
    """

    text: str
    token_ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    top: tuple[tuple[tuple[int, float], ...], ...]
    finish_reason: FinishReason
    stop: str | None
    prompt_tokens: int

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class Piece:
    """Part of an answer, as it comes; `str()` gives its text.

    Attributes:
        text: what is certain by now and was not given before; may be empty.
        token_ids: tokens read since the last piece of this answer.
        prompt: number of the prompt.
        choice: number of the answer to that prompt.
        generation: the whole answer, with its last piece; None before.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt: int
    choice: int
    generation: Generation | None

    def __str__(self) -> str:
        return self.text


type Verdict = Literal["going", "ended", "stopped"]
"""Of a token: the answer goes on; the engine has ended it; a stop string ended it, and the engine must be told."""


class AnswerText:
    """Builds the text of one answer.

    Args:
        detokenizer: turns its tokens into text.
        stop: strings that end it.
        prompt: number of its prompt.
        choice: its number among the answers to that prompt.
        prompt_tokens: tokens of the prompt.
    """

    def __init__(
        self, detokenizer: Detokenizer, stop: Sequence[str], *, prompt: int, choice: int, prompt_tokens: int
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stop)
        self._prompt, self._choice, self._prompt_tokens = prompt, choice, prompt_tokens
        self._text: list[str] = []
        self._events: list[TokenEvent] = []
        self.ended = False

    def feed(self, event: TokenEvent) -> tuple[Piece, Verdict]:
        """Takes a token, and returns what it adds to the text."""
        self._events.append(event)
        ends_answer = event.finish == "stop"
        text = "" if ends_answer else self._stops.feed(self._detokenizer.feed((event.token,)))
        verdict: Verdict = "going"
        if self._stops.hit is not None:
            verdict = "stopped" if event.finish is None else "ended"
        elif event.finish is not None:
            verdict = "ended"
            text += self._stops.feed(self._detokenizer.flush())
            if self._stops.hit is None:
                text += self._stops.flush()
        self._text.append(text)
        self.ended = verdict != "going"
        generation = self._generation(event) if self.ended else None
        return Piece(text, (event.token,), self._prompt, self._choice, generation), verdict

    def _generation(self, last: TokenEvent) -> Generation:
        return Generation(
            text="".join(self._text),
            token_ids=tuple(event.token for event in self._events),
            log_probabilities=tuple(event.log_probability for event in self._events),
            top=tuple(event.top for event in self._events),
            finish_reason="stop" if self._stops.hit is not None or last.finish is None else last.finish,
            stop=self._stops.hit,
            prompt_tokens=self._prompt_tokens,
        )
