"""Runs `generate` on the engine: padded prompts in, padded sequences out, as transformers would give them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Integer, UInt32

from elastic_jax.delivery import Delivery
from elastic_jax.errors import ElasticError, RequestError
from elastic_jax.memory import check_host_memory
from elastic_jax.requests import FailEvent, GenerateRequest, TokenEvent
from elastic_jax.tokenizer import Tokenizer
from elastic_jax.transformers.scores import processed_scores
from elastic_jax.transformers.settings import GenerationSettings


@dataclasses.dataclass(frozen=True)
class NoEndYet:
    """A grammar that forbids some tokens until an answer has a least length.

    Attributes:
        tokens: those tokens.
        least: of the answer, in tokens.
        vocab: size of the vocabulary.
    """

    tokens: tuple[int, ...]
    least: int
    vocab: int

    def allowed(self, output: Sequence[int]) -> UInt32[np.ndarray, " words"]:
        """Everything, but for the ends while the answer is too short."""
        bits = np.ones(-(-self.vocab // 32) * 32, np.uint8)
        if len(output) < self.least:
            bits[[token for token in self.tokens if token < self.vocab]] = 0
        return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32, copy=False)


class StopTexts:
    """Finds the token with which a stop string is complete, wherever in that token it ends.

    As in transformers, a stop string may begin in the prompt, and special tokens count as they are written.

    Args:
        tokenizer: of the model.
        stops: the strings.
        prompt: tokens before the answer.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], prompt: Sequence[int]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops))
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens=False)
        self._tail = self._detokenizer.feed(prompt)[-self._longest :]

    def feed(self, token: int) -> bool:
        """Takes a token; whether a stop string is complete with it."""
        text = self._detokenizer.feed((token,))
        whole = self._tail + text
        # A match must end in what is new: the strings that ended before are past.
        found = any(stop in whole[max(0, len(self._tail) - len(stop) + 1) :] for stop in self._stops) and bool(text)
        self._tail = whole[-self._longest :]
        return found


@dataclasses.dataclass
class Row:
    """One answer in progress.

    Attributes:
        prompt: its tokens, without padding.
        stops: finds stop strings; None if there are none.
        tokens: of the answer so far.
        scores: processed, one a token, if wanted.
        logits: by the model, one a token, if wanted.
        ended_at: tokens of the answer when a stop string was complete; None before.
        finished: whether no further token is wanted.
    """

    prompt: tuple[int, ...]
    stops: StopTexts | None
    tokens: list[int] = dataclasses.field(default_factory=list)
    scores: list[np.ndarray] = dataclasses.field(default_factory=list)
    logits: list[np.ndarray] = dataclasses.field(default_factory=list)
    ended_at: int | None = None
    finished: bool = False


def run(
    delivery: Delivery,
    tokenizer: Tokenizer,
    prompts: Sequence[tuple[int, ...]],
    settings: GenerationSettings,
    vocab: int,
    *,
    first: int = 0,
    on_token: Callable[[int], None] | None = None,
) -> list[Row]:
    """Continues prompts.

    Args:
        delivery: runs the requests.
        tokenizer: reads stop strings.
        prompts: tokens without padding.
        settings: what is wanted.
        vocab: size of the vocabulary.
        first: number of the first prompt, for its seed.
        on_token: is told every token, of a single answer.

    Returns:
        `settings.choices` rows a prompt, one prompt after the other.

    Raises:
        RequestError: a prompt is empty or too long, a value out of range, or the scores wanted exceed the host's
            memory. Nothing has run then.
        ElasticError: the model's logits are not finite.
    """
    grammar = NoEndYet(settings.end_tokens, settings.min_new_tokens, vocab) if settings.min_new_tokens else None
    requests = [
        GenerateRequest(
            prompt,
            settings.max_new_tokens,
            _own_seed(settings, first + index),
            frozenset(settings.end_tokens),
            settings.choices,
            grammar,
            logits=settings.as_dict and (settings.scores or settings.logits),
        )
        for index, prompt in enumerate(prompts)
    ]
    inbox = delivery.submit(requests)
    try:
        _check_scores_fit(settings, len(prompts) * settings.choices, vocab)
        rows = {
            (number, choice): Row(prompt, _stops(tokenizer, settings, prompt))
            for number, prompt in zip(inbox.numbers, prompts, strict=True)
            for choice in range(settings.choices)
        }
        while not all(row.finished for row in rows.values()):
            for event in delivery.wait(inbox):
                if isinstance(event, FailEvent):
                    raise event.error
                if not isinstance(event, TokenEvent) or rows[event.request, event.choice].finished:
                    continue  # a token that was on its way when its answer was stopped
                _take(rows[event.request, event.choice], event, settings, on_token)
                for number, choice in _stopped(rows, settings):
                    rows[number, choice].finished = True
                    delivery.cancel(number, choice)
        return list(rows.values())
    finally:
        delivery.close(inbox)


def streamed(
    generate: Callable[..., list[Row]], streamer: Any, ids: Integer[np.ndarray, "1 width"], back: Callable[..., Any]
) -> list[Row]:
    """Runs one answer whose prompt and tokens a streamer is given.

    Args:
        generate: `run` with all its arguments but `on_token`.
        streamer: has `put` and `end`, as transformers' streamers.
        ids: the prompt.
        back: makes arrays of the library that the streamer is to get.

    Raises:
        RequestError: it is no streamer; or as `run`.
    """
    put, end = getattr(streamer, "put", None), getattr(streamer, "end", None)
    if put is None or end is None:
        raise RequestError(f"streamer must have put and end, as TextStreamer has, found {streamer!r:.80}")
    put(back(ids))
    try:
        return generate(on_token=lambda token: put(back(np.array([token], ids.dtype))))
    finally:
        end()  # whoever iterates over it must not wait for ever


def _check_scores_fit(settings: GenerationSettings, rows: int, vocab: int) -> None:
    kinds = settings.as_dict * (settings.scores + settings.logits)
    check_host_memory(
        2 * kinds * 4 * settings.max_new_tokens * rows * vocab,  # float32, of each row, and then the same of each step
        f"scores or logits of {rows} answers of up to {settings.max_new_tokens} tokens over {vocab}",
        "pass fewer prompts, ask for fewer tokens, or leave output_scores and output_logits out",
    )


def _own_seed(settings: GenerationSettings, index: int) -> Any:
    seed = settings.sampling.seed
    return dataclasses.replace(settings.sampling, seed=None if seed is None else (seed + index) % 2**64)


def _stops(tokenizer: Tokenizer, settings: GenerationSettings, prompt: tuple[int, ...]) -> StopTexts | None:
    return StopTexts(tokenizer, settings.stop_strings, prompt) if settings.stop_strings else None


def _take(row: Row, event: TokenEvent, settings: GenerationSettings, on_token: Callable[[int], None] | None) -> None:
    if event.finish == "not_finite":
        raise ElasticError(
            f"the model's logits are not finite after {len(row.prompt) + len(row.tokens)} tokens; check the "
            "checkpoint with `elastic-jax verify`"
        )
    if event.logits is not None:
        if settings.scores:
            forbidden = settings.end_tokens if len(row.tokens) < settings.min_new_tokens else ()
            seen = (*row.prompt, *row.tokens)
            row.scores.append(processed_scores(event.logits, seen, forbidden, settings.sampling))
        row.logits.append(event.logits)
    row.tokens.append(event.token)
    if on_token is not None:
        on_token(event.token)
    if row.stops is not None and row.stops.feed(event.token) and row.ended_at is None:
        row.ended_at = len(row.tokens)
    row.finished = event.finish is not None


def _stopped(rows: dict[tuple[int, int], Row], settings: GenerationSettings) -> list[tuple[int, int]]:
    """The rows that go on in the engine and have to be ended.

    transformers pads a row that has met a stop string only if there are end tokens too. Without them every row goes on
    until all have met one.
    """
    going = {key: row for key, row in rows.items() if not row.finished}
    if settings.end_tokens:
        return [key for key, row in going.items() if row.ended_at is not None]
    if any(row.ended_at is None for row in rows.values()):
        return []
    longest = max(row.ended_at or 0 for row in rows.values())
    return [key for key, row in going.items() if len(row.tokens) >= longest]


def cut(rows: Sequence[Row], settings: GenerationSettings) -> None:
    """Takes away what rows generated while the last of them waited for its stop string."""
    if not settings.end_tokens and all(row.ended_at is not None for row in rows):
        longest = max(row.ended_at or 0 for row in rows)
        for row in rows:
            del row.tokens[longest:], row.scores[longest:], row.logits[longest:]


def assemble(
    ids: Integer[np.ndarray, "batch width"], rows: Sequence[Row], settings: GenerationSettings
) -> Integer[np.ndarray, "rows tokens"]:
    """Prompts and answers as one array, what follows an end filled with the padding token."""
    cut(rows, settings)
    longest = max(len(row.tokens) for row in rows)
    out = np.full((len(rows), ids.shape[1] + longest), settings.pad_token or 0, ids.dtype)
    out[:, : ids.shape[1]] = np.repeat(ids, settings.choices, axis=0)
    for index, row in enumerate(rows):
        out[index, ids.shape[1] : ids.shape[1] + len(row.tokens)] = row.tokens
    return out


def by_step(arrays: Sequence[Sequence[np.ndarray]]) -> tuple[Float32[np.ndarray, "rows vocab"], ...]:
    """One array [rows, vocab] a step, from each row's arrays; zeros where a row has ended."""
    steps = max(len(each) for each in arrays)
    blank = np.zeros_like(arrays[0][0])
    return tuple(np.stack([each[step] if step < len(each) else blank for each in arrays]) for step in range(steps))


def without_padding(
    ids: Integer[np.ndarray, "batch width"], mask: np.ndarray | None, *, pad: Any, ends: Sequence[int]
) -> list[tuple[int, ...]]:
    """The tokens of each prompt.

    Args:
        ids: token ids, padded on the left.
        mask: [batch, width], 0 on padding; None to infer it as transformers does: padding is what equals `pad`,
            if that ends nothing, and is in the ids at all.
        pad: the padding token, or None.
        ends: tokens that end an answer.

    Raises:
        RequestError: the mask has another shape, or is not padding on the left.
    """
    if mask is None:
        inferred = pad is not None and pad not in ends and bool((ids == pad).any())
        real: np.ndarray = ids != pad if inferred else np.ones(ids.shape, bool)
    else:
        real = np.asarray(mask != 0)
    if real.shape != ids.shape:
        raise RequestError(f"attention_mask has shape {list(real.shape)}, and input_ids {list(ids.shape)}")
    if wrong := [index for index, line in enumerate(real) if (np.diff(line.astype(np.int8)) < 0).any()]:
        raise RequestError(
            f"row {wrong[0]}: padding must be on the left, but the attention mask (or padding tokens) has zeros after "
            "ones; set tokenizer.padding_side = 'left'"
        )
    if empty := [index for index, line in enumerate(real) if not line.any()]:
        raise RequestError(f"row {empty[0]} is all padding: a prompt needs at least one token")
    return [tuple(int(token) for token in line[keep]) for line, keep in zip(ids, real, strict=True)]
