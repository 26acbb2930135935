"""The engine: requests in, tokens out. No threads, no network; `.generate` and servers use this one.

Each call of `step` dispatches one step to the device and then reads the results of the one before, so that the device
is never idle while the host works. A sequence that turns out to have ended has then run one step too many; its
result is dropped. Pages for the whole answer are reserved at admission, so generating never runs out of them.

What this file does not do: text, stop strings, and waiting for requests.
"""

import collections
import dataclasses
import itertools
import secrets
from collections.abc import Iterator

import numpy as np

from elastic_jax.errors import RequestError
from elastic_jax.limits import Limits
from elastic_jax.pages import PageAllocator
from elastic_jax.requests import (
    FailEvent,
    FinishReason,
    GenerateRequest,
    Grammar,
    ScoreEvent,
    ScoreRequest,
    TokenEvent,
)
from elastic_jax.runner import Runner
from elastic_jax.scheduler import Packed, Phase, Track, choose_bucket, pack
from elastic_jax.step import ScoreOutputs, StepOutputs

type Event = TokenEvent | ScoreEvent | FailEvent


@dataclasses.dataclass
class _Scored:
    """What has been read of a score so far."""

    log_probabilities: list[np.ndarray]
    argmax: list[np.ndarray]
    top: list[tuple[tuple[int, float], ...]]
    finite: bool


class Engine:
    """Runs requests on a runner.

    Args:
        runner: the units of one mode on one device.
        max_context: longest context of a sequence in tokens, at most what the units were compiled for.
    """

    def __init__(self, runner: Runner, max_context: int) -> None:
        self.runner = runner
        self.config = runner.step_config
        self.limits = Limits(runner.config, self.config, min(max_context, self.config.max_context))
        self.pages = PageAllocator(self.config.kv_slots // self.config.page_size)
        self._numbers = itertools.count()
        self._waiting: collections.deque[Track] = collections.deque()
        self._running: list[Track] = []
        self._unfinished: dict[int, list[Track]] = {}
        self._free_rows = list(range(self.config.rows - 1, -1, -1))
        self._pending: tuple[Packed, StepOutputs | ScoreOutputs] | None = None
        self._scores: dict[int, _Scored] = {}
        self._seeds: dict[int, int] = {}
        self._failed: list[FailEvent] = []
        self._prompt_turn = True
        self._score_turn = False

    @property
    def busy(self) -> bool:
        """Whether `step` has anything left to do."""
        return bool(self._waiting or self._running or self._pending or self._failed)

    def submit(self, request: GenerateRequest | ScoreRequest) -> int:
        """Queues a request and returns its number.

        Raises:
            RequestError: it is beyond `limits`.
        """
        self.limits.check(request)
        tokens = request.prompt if isinstance(request, GenerateRequest) else request.tokens
        number = next(self._numbers)
        choices = request.choices if isinstance(request, GenerateRequest) else 1
        first = Track(number, 0, request, tuple(tokens))
        others = [Track(number, i, request, tuple(tokens), source=first) for i in range(1, choices)]
        self._unfinished[number] = [first, *others]
        self._waiting.extend(self._unfinished[number])
        if isinstance(request, ScoreRequest):
            self._scores[number] = _Scored([], [], [], True)
        else:
            seed = request.sampling.seed
            self._seeds[number] = secrets.randbits(64) if seed is None else seed
        return number

    def cancel(self, number: int, choice: int | None = None) -> None:
        """Ends a request, or one of its answers, without further events; unknown numbers have ended already."""
        for track in list(self._unfinished.get(number, ())):
            if choice in (None, track.choice):
                self._finish(track)

    def step(self) -> list[Event]:
        """Dispatches one step if there is work, then returns what the step before it found."""
        self._admit()
        self._ask_grammars()
        packed = self._dispatch()
        done, self._pending = self._pending, packed
        events: list[Event] = list(self._failed)
        self._failed.clear()
        if done is not None:
            read, out = done
            events += self._read_scores(read, out) if isinstance(out, ScoreOutputs) else self._read_tokens(read, out)
        return events

    def borrow(self, slots: int) -> tuple[int, list[int]] | None:
        """A row and pages for work that is no request, or None while there are not enough; `give_back` them."""
        count = -(-slots // self.config.page_size)
        if not self._free_rows or count > self.pages.free:
            return None
        return self._free_rows.pop(), self.pages.allocate(count)

    def give_back(self, row: int, pages: list[int]) -> None:
        """Returns what `borrow` gave."""
        self._free_rows.append(row)
        self.pages.release(pages)

    # -- admission -----------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Admits waiting tracks in order while there is a row and room for the whole of each."""
        while self._waiting and self._free_rows:
            track = self._waiting[0]
            source = track.source
            if source is not None and source.phase in (Phase.WAITING, Phase.PROMPT):
                return
            slots = len(track.tokens)
            if isinstance(track.request, GenerateRequest):
                slots += track.request.max_new_tokens - 1  # the last token's keys are never needed
            size = self.config.page_size
            # A source that was cancelled has given its pages back: then the prompt is computed again.
            shared = (len(track.tokens) - 1) // size if source is not None and source.pages else 0
            if -(-slots // size) - shared > self.pages.free:
                return
            self._waiting.popleft()
            track.pages = self.pages.allocate(-(-slots // size) - shared)
            if source is not None and source.pages:
                kept = source.pages[:shared]
                self.pages.share(kept)
                track.pages = kept + track.pages
                track.computed = len(track.tokens) - 1
                if track.computed % size:
                    self.runner.copy_page(source.pages[shared], track.pages[shared])
            track.row = self._free_rows.pop()
            track.phase = Phase.PROMPT
            self._running.append(track)
            if isinstance(track.request, GenerateRequest):
                self._prepare_row(track, track.request)

    def _prepare_row(self, track: Track, request: GenerateRequest) -> None:
        seed = self._seeds[track.number]
        key = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
        bits = np.zeros(-(-self.runner.config.vocab_size // 32) * 32, np.uint8)
        bits[list(track.tokens)] = 1
        words = np.packbits(bits, bitorder="little").view("<u4")
        self.runner.admit(track.row, key=key, prompt_mask=words)
        self.runner.sampling.set(track.row, request.sampling, choice=track.choice)

    def _finish(self, track: Track) -> None:
        if track.phase is Phase.WAITING:
            self._waiting.remove(track)
        else:
            self._running.remove(track)
            self._free_rows.append(track.row)
            self.pages.release(track.pages)
            track.pages = []
        track.phase = Phase.FINISHED
        self._unfinished[track.number].remove(track)
        if not self._unfinished[track.number]:
            del self._unfinished[track.number]
            self._seeds.pop(track.number, None)
            self._scores.pop(track.number, None)

    # -- grammars ------------------------------------------------------------------------------------------------------

    def _ask_grammars(self) -> None:
        """Sets the masks of rows that may generate next; before any step is packed, since a grammar may fail."""
        for track in list(self._running):
            request = track.request
            if not isinstance(request, GenerateRequest) or request.grammar is None or track.waits_for_read:
                continue
            if track.masked == len(track.output) or track.phase is Phase.FINISHED:
                continue
            try:
                words = _allowed(request.grammar, tuple(track.output), self.runner.config.vocab_size)
            except Exception as error:
                self.cancel(track.number)
                self._failed.append(FailEvent(track.number, error))
                continue
            self.runner.sampling.allow(track.row, words)
            track.masked = len(track.output)

    # -- dispatching ---------------------------------------------------------------------------------------------------

    def _dispatch(self) -> tuple[Packed, StepOutputs | ScoreOutputs] | None:
        scores = [t for t in self._running if isinstance(t.request, ScoreRequest) and t.computed < len(t.tokens)]
        prompts = [t for t in self._running if isinstance(t.request, GenerateRequest) and t.phase is Phase.PROMPT]
        ready = [t for t in self._running if self._can_generate(t)]
        if scores and (self._score_turn or not (prompts or ready)):
            self._score_turn = False
            return self._dispatch_score(scores)
        self._score_turn = bool(scores)
        prompt_tokens = sum(len(t.tokens) - t.computed for t in prompts)
        bucket = choose_bucket(self.config.buckets, len(ready), prompt_tokens, prompt_turn=self._prompt_turn)
        if bucket is None:
            return None
        self._prompt_turn = not bucket.prompt
        packed = pack(bucket, self.config, ready, prompts)
        for chunk in packed.chunks:
            if chunk.last:
                chunk.track.phase = Phase.GENERATING
        return packed, self._run(packed)

    def _can_generate(self, track: Track) -> bool:
        request = track.request
        return (
            isinstance(request, GenerateRequest)
            and track.phase is Phase.GENERATING
            and track.dispatched < request.max_new_tokens
            and not track.waits_for_read
        )

    def _run(self, packed: Packed) -> StepOutputs:
        sampling = top = False
        for track in packed.outputs:
            request = track.request
            if not isinstance(request, GenerateRequest):
                raise TypeError(f"request {track.number} is no generation")
            sampling |= not request.sampling.greedy or request.grammar is not None
            top |= request.sampling.top_log_probabilities > 0
        return self.runner.step(packed.bucket, packed.inputs, sampling=sampling, top=top)

    def _dispatch_score(self, scores: list[Track]) -> tuple[Packed, ScoreOutputs]:
        waiting = sum(len(t.tokens) - t.computed for t in scores)
        bucket = choose_bucket(self.config.buckets, 0, waiting, prompt_turn=True)
        if bucket is None:
            raise RuntimeError("a score without tokens left was scheduled")
        packed = pack(bucket, self.config, [], scores)
        target = np.full(bucket.prompt, -1, np.int32)
        for chunk in packed.chunks:
            following = chunk.track.tokens[chunk.start + 1 : chunk.start + chunk.count + 1]
            target[chunk.at : chunk.at + len(following)] = following
        requests = [chunk.track.request for chunk in packed.chunks]
        top = any(isinstance(request, ScoreRequest) and request.top_log_probabilities for request in requests)
        return packed, self.runner.score(bucket, packed.inputs, target, top=top)

    # -- reading -------------------------------------------------------------------------------------------------------

    def _read_tokens(self, packed: Packed, out: StepOutputs) -> Iterator[TokenEvent]:
        token, log_probability = np.asarray(out.token), np.asarray(out.log_probability)
        finite = np.asarray(out.finite)
        wanted = any(isinstance(track.request, GenerateRequest) and track.request.logits for track in packed.outputs)
        logits = np.asarray(out.logits) if wanted else None
        for track, at in zip(packed.outputs, packed.out_at, strict=True):
            request = track.request
            if track.phase is Phase.FINISHED or not isinstance(request, GenerateRequest):
                continue
            track.output.append(int(token[at]))
            finish: FinishReason | None = None
            if not finite[at]:
                finish = "not_finite"
            elif track.output[-1] in request.end_tokens:
                finish = "stop"
            elif len(track.output) == request.max_new_tokens:
                finish = "length"
            top = _top(out.top_token, out.top_log_probability, at, request.sampling.top_log_probabilities)
            if finish is not None:
                self._finish(track)
            own = logits[at].copy() if logits is not None and request.logits else None
            yield TokenEvent(track.number, track.choice, track.output[-1], float(log_probability[at]), top, finish, own)

    def _read_scores(self, packed: Packed, out: ScoreOutputs) -> Iterator[ScoreEvent]:
        log_probability, argmax = np.asarray(out.log_probability), np.asarray(out.argmax)
        finite = np.asarray(out.finite)
        for chunk in packed.chunks:
            track, request = chunk.track, chunk.track.request
            if track.phase is Phase.FINISHED or not isinstance(request, ScoreRequest):
                continue
            scored = self._scores[track.number]
            # What follows token i is scored at i; the last token has nothing after it.
            start = max(request.first - 1, chunk.start)
            stop = min(len(track.tokens) - 1, chunk.start + chunk.count)
            here = slice(chunk.at, chunk.at + chunk.count)
            scored.finite &= bool(finite[here].all())
            if start < stop:
                places = slice(chunk.at + start - chunk.start, chunk.at + stop - chunk.start)
                scored.log_probabilities.append(log_probability[places])
                scored.argmax.append(argmax[places])
                n = request.top_log_probabilities
                scored.top += [
                    _top(out.top_token, out.top_log_probability, at, n) for at in range(places.start, places.stop)
                ]
            if chunk.last:
                self._finish(track)
                yield ScoreEvent(
                    track.number,
                    np.concatenate(scored.log_probabilities),
                    np.concatenate(scored.argmax),
                    tuple(scored.top),
                    scored.finite,
                )


def _allowed(grammar: Grammar, output: tuple[int, ...], vocab: int) -> np.ndarray:
    """What a grammar allows, checked: NumPy would stretch a wrong shape, and a row must have a token to take."""
    words = np.asarray(grammar.allowed(output))
    expected = -(-vocab // 32)
    if words.shape != (expected,) or words.dtype != np.uint32:
        raise RequestError(f"the grammar must give uint32[{expected}], found {words.dtype}{list(words.shape)}")
    if not np.unpackbits(words.astype("<u4").view(np.uint8), bitorder="little")[:vocab].any():
        raise RequestError(f"the grammar allows no token after {len(output)} tokens: it must at least allow an end")
    return words


def _top(tokens: object, log_probabilities: object, at: int, n: int) -> tuple[tuple[int, float], ...]:
    if not n:
        return ()
    ids, values = np.asarray(tokens)[at, :n], np.asarray(log_probabilities)[at, :n]
    return tuple((int(token), float(value)) for token, value in zip(ids, values, strict=True))
