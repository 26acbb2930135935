"""Packs running sequences and waiting prompts into steps.

A step takes every sequence that generates, and as many prompt tokens as its bucket has room for, first come first
served. Which bucket runs never changes what is computed for a token, only when.
"""

import dataclasses
import enum
from collections.abc import Iterable, Sequence

import numpy as np

from elastic_jax.requests import GenerateRequest, ScoreRequest
from elastic_jax.step import Bucket, StepConfig, StepInputs


class Phase(enum.Enum):
    """Where a sequence stands."""

    WAITING = enum.auto()
    PROMPT = enum.auto()
    GENERATING = enum.auto()
    FINISHED = enum.auto()


@dataclasses.dataclass(eq=False)
class Track:
    """One sequence in progress: an answer, or a score.

    Attributes:
        number: the request's number.
        choice: the answer's number among the request's.
        request: what was asked.
        tokens: the prompt, or the tokens to score.
        phase: where it stands.
        row: its row, once admitted.
        pages: its pages in order, once admitted.
        computed: tokens whose keys and values are in the cache, or will be once the dispatched steps have run.
        dispatched: output tokens that dispatched steps give.
        output: output tokens that have been read.
        masked: output tokens for which the row's grammar mask was set; -1 before the first.
        source: the answer to the same prompt whose pages are shared once they are computed.
    """

    number: int
    choice: int
    request: GenerateRequest | ScoreRequest
    tokens: tuple[int, ...]
    phase: Phase = Phase.WAITING
    row: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0
    dispatched: int = 0
    output: list[int] = dataclasses.field(default_factory=list)
    masked: int = -1
    source: "Track | None" = None

    @property
    def waits_for_read(self) -> bool:
        """Whether a grammar needs a token that no one has read yet."""
        grammar = isinstance(self.request, GenerateRequest) and self.request.grammar is not None
        return grammar and self.dispatched > len(self.output)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Prompt tokens [start, start + count) of a track in a step, from index `at` of its prompt tokens."""

    track: Track
    start: int
    count: int
    at: int

    @property
    def last(self) -> bool:
        """Whether the prompt ends with this chunk."""
        return self.start + self.count == len(self.track.tokens)


@dataclasses.dataclass(frozen=True)
class Packed:
    """One step: its bucket, its host arrays, and whose each output is.

    Attributes:
        bucket: which executable runs.
        inputs: host arrays in the bucket's shapes.
        outputs: the track of each live output, in order of `out_index`.
        out_at: index among the step's outputs of each of them.
        chunks: the prompt tokens it computes.
    """

    bucket: Bucket
    inputs: StepInputs
    outputs: tuple[Track, ...]
    out_at: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def choose_bucket(buckets: Sequence[Bucket], generating: int, prompt: int, *, prompt_turn: bool) -> Bucket | None:
    """The bucket for a step with these many tokens ready, or None if there are none.

    Args:
        buckets: what is compiled.
        generating: sequences ready to generate.
        prompt: prompt tokens waiting.
        prompt_turn: where no bucket holds both, whether it is the prompts' turn.
    """
    if not generating and not prompt:
        return None
    if generating and prompt:
        mixed = [b for b in buckets if b.prompt and b.generated >= generating]
        if mixed:
            return _fitting(mixed, prompt)
        if not prompt_turn:
            prompt = 0
    if prompt:
        return _fitting([b for b in buckets if not b.generated], prompt)
    return min(b for b in buckets if not b.prompt and b.generated >= generating)


def _fitting(buckets: Iterable[Bucket], prompt: int) -> Bucket:
    """The bucket that wastes least: the smallest that holds all if over half full, else the largest that gets full."""
    narrowest: dict[int, Bucket] = {}
    for bucket in sorted(buckets):
        narrowest.setdefault(bucket.prompt, bucket)
    ordered = [narrowest[size] for size in sorted(narrowest)]
    for index, bucket in enumerate(ordered):
        if bucket.prompt >= prompt:
            return bucket if index == 0 or prompt > bucket.prompt // 2 else ordered[index - 1]
    return ordered[-1]


def pack(bucket: Bucket, config: StepConfig, generating: Sequence[Track], prompts: Sequence[Track]) -> Packed:
    """Fills a bucket; advances the tracks it takes.

    Args:
        bucket: what to fill.
        config: sizes.
        generating: tracks ready to generate, at most `bucket.generated`.
        prompts: tracks with prompt tokens waiting, in order.
    """
    d = bucket.generated
    row = np.full(bucket.tokens, config.rows, np.int32)
    slot = np.full(bucket.tokens, config.kv_slots, np.int32)
    token, position = np.zeros(bucket.prompt, np.int32), np.zeros(bucket.prompt, np.int32)
    block_table = np.zeros((config.rows, config.pages), np.int32)
    context_length = np.zeros(config.rows, np.int32)
    out_index = np.full(bucket.outputs(config.rows), bucket.tokens, np.int32)
    outputs: list[Track] = []
    out_at: list[int] = []

    for at, track in enumerate(generating[:d]):
        row[at] = track.row
        slot[at] = _slots(track, track.computed, 1, config.page_size)[0]
        out_index[at] = at
        _advance(track, 1, block_table, context_length)
        track.dispatched += 1
        outputs.append(track)
        out_at.append(at)

    chunks: list[Chunk] = []
    filled, ends = 0, len(out_index) - d
    for track in prompts:
        count = min(bucket.prompt - filled, len(track.tokens) - track.computed)
        last = track.computed + count == len(track.tokens)
        wants_output = isinstance(track.request, GenerateRequest)
        if count == 0 or (last and wants_output and not ends):
            break
        chunk = Chunk(track, track.computed, count, filled)
        here = slice(filled, filled + count)
        token[here] = track.tokens[chunk.start : chunk.start + count]
        position[here] = np.arange(chunk.start, chunk.start + count)
        row[d + filled : d + filled + count] = track.row
        slot[d + filled : d + filled + count] = _slots(track, chunk.start, count, config.page_size)
        _advance(track, count, block_table, context_length)
        filled += count
        chunks.append(chunk)
        if last and wants_output:
            at = len(out_index) - ends
            out_index[at] = d + filled - 1
            outputs.append(track)
            out_at.append(at)
            track.dispatched += 1
            ends -= 1
    inputs = StepInputs(token, position, row, slot, block_table, context_length, out_index)
    return Packed(bucket, inputs, tuple(outputs), tuple(out_at), tuple(chunks))


def _slots(track: Track, start: int, count: int, page_size: int) -> np.ndarray:
    """Where positions [start, start + count) of a track lie in the KV cache."""
    places = np.arange(start, start + count)
    pages = np.asarray(track.pages, np.int32)
    return pages[places // page_size] * page_size + places % page_size


def _advance(track: Track, count: int, block_table: np.ndarray, context_length: np.ndarray) -> None:
    track.computed += count
    block_table[track.row, : len(track.pages)] = track.pages
    context_length[track.row] = track.computed
