"""Several callers on one engine: each gets the events of its own requests, whoever made the engine step.

A stream that is read while another is, a score asked for in the middle of a stream, and calls from several threads all
share the engine's steps. One lock guards the engine; it is held for one step at a time.
"""

import collections
import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float32

from elastic_jax.device_memory import explained
from elastic_jax.engine import Engine, Event
from elastic_jax.errors import DeviceMemoryError
from elastic_jax.prompt_logits import prompt_logits
from elastic_jax.requests import GenerateRequest, ScoreRequest


@dataclasses.dataclass(frozen=True)
class Inbox:
    """Requests that were queued together, and the events that came for them and nobody has read.

    Attributes:
        numbers: the engine's numbers of the requests, in their order.
        events: in the order they came.
    """

    numbers: tuple[int, ...]
    events: collections.deque[Event] = dataclasses.field(default_factory=collections.deque)


class Delivery:
    """Steps an engine for its callers, and sorts the events.

    Args:
        engine: nobody else may step it, or events would be missing here.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._inboxes: dict[int, Inbox] = {}
        self._cancelled: collections.deque[tuple[int, int | None]] = collections.deque()
        self._failure: str | None = None

    def submit(self, requests: Sequence[GenerateRequest | ScoreRequest]) -> Inbox:
        """Queues requests; all of them, or none.

        Raises:
            RequestError: one of them is impossible.
            DeviceMemoryError: the device has run out of memory before.
        """
        with self._lock:
            self._check_usable()
            for request in requests:
                self._engine.limits.check(request)
            inbox = Inbox(tuple(self._engine.submit(request) for request in requests))
            self._inboxes |= dict.fromkeys(inbox.numbers, inbox)
        return inbox

    def wait(self, inbox: Inbox) -> list[Event]:
        """The next events of some requests, at least one; steps the engine as often as that takes.

        Raises:
            RuntimeError: none can come: the requests have ended.
            DeviceMemoryError: the device has run out of memory, now or before.
        """
        while True:
            with self._lock:
                self._cancel_now()
                if inbox.events:
                    events = list(inbox.events)
                    inbox.events.clear()
                    return events
                self._check_usable()
                if not self._engine.busy:
                    raise RuntimeError("the requests have ended, or somebody else stepped the engine")
                self._step()

    def prompt_logits(self, tokens: Sequence[int]) -> Float32[np.ndarray, "tokens vocab"]:
        """What `prompt_logits` gives, once there is room beside what runs.

        Raises:
            RequestError: there is no token, or too many, or one outside the vocabulary.
            DeviceMemoryError: the device has run out of memory, now or before.
        """
        self._engine.limits.check_prompt(tuple(tokens))
        while True:
            with self._lock:
                self._cancel_now()
                self._check_usable()
                with self._failing():
                    logits = prompt_logits(self._engine, tokens)
                if logits is not None:
                    return logits
                self._step()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """A step that the device could not run has taken the engine's state with it: nothing works after it."""
        try:
            with explained():
                yield
        except DeviceMemoryError as error:
            self._failure = str(error)
            raise

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise DeviceMemoryError(self._failure)

    def _step(self) -> None:
        with self._failing():
            events = self._engine.step()
        for event in events:
            if event.request in self._inboxes:
                self._inboxes[event.request].events.append(event)

    def close(self, inbox: Inbox) -> None:
        """Ends all its requests; as `cancel`."""
        self._cancel([(number, None) for number in inbox.numbers])

    def cancel(self, number: int, choice: int) -> None:
        """Ends one answer of a request. It may be called at any moment, by a garbage collector too."""
        self._cancel([(number, choice)])

    def _cancel(self, answers: Sequence[tuple[int, int | None]]) -> None:
        self._cancelled.extend(answers)
        # Waiting here would be a deadlock where this interrupts a step of the same thread; the next step will do it.
        if self._lock.acquire(blocking=False):
            try:
                self._cancel_now()
            finally:
                self._lock.release()

    def _cancel_now(self) -> None:
        while self._cancelled:
            number, choice = self._cancelled.popleft()
            if self._failure is None:
                self._engine.cancel(number, choice)
            if choice is None:
                self._inboxes.pop(number, None)
