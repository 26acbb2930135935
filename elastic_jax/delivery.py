"""Several callers on one engine: each gets the events of its own requests, whoever made the engine step.

A stream that is read while another is, a score asked for in the middle of a stream, and calls from several threads all
share the engine's steps. One lock guards the engine; it is held for one step at a time.
"""

import collections
import threading
from collections.abc import Collection, Sequence

from elastic_jax.engine import Engine, Event
from elastic_jax.requests import GenerateRequest, ScoreRequest


class Delivery:
    """Steps an engine for its callers, and sorts the events.

    Args:
        engine: nobody else may step it, or events would be missing here.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._inboxes: dict[int, collections.deque[Event]] = {}
        self._cancelled: collections.deque[tuple[int, int | None]] = collections.deque()

    def submit(self, requests: Sequence[GenerateRequest | ScoreRequest]) -> list[int]:
        """Queues requests and returns their numbers; all of them, or none.

        Raises:
            RequestError: one of them is impossible.
        """
        with self._lock:
            for request in requests:
                self._engine.limits.check(request)
            numbers = [self._engine.submit(request) for request in requests]
            self._inboxes |= {number: collections.deque() for number in numbers}
        return numbers

    def wait(self, numbers: Collection[int]) -> list[Event]:
        """The next events of some requests, at least one; steps the engine as often as that takes.

        Raises:
            RuntimeError: none can come: the requests have ended.
        """
        while True:
            with self._lock:
                self._cancel_now()
                events = [event for number in numbers for event in self._empty(number)]
                if events:
                    return events
                if not self._engine.busy:
                    raise RuntimeError(f"requests {sorted(numbers)} have ended, or somebody else stepped the engine")
                for event in self._engine.step():
                    if event.request in self._inboxes:
                        self._inboxes[event.request].append(event)

    def cancel(self, number: int, choice: int | None = None) -> None:
        """Ends a request, or one of its answers. It may be called at any moment, by a garbage collector too."""
        self._cancelled.append((number, choice))
        # Waiting here would be a deadlock where this interrupts a step of the same thread; the next step will do it.
        if self._lock.acquire(blocking=False):
            try:
                self._cancel_now()
            finally:
                self._lock.release()

    def _cancel_now(self) -> None:
        while self._cancelled:
            number, choice = self._cancelled.popleft()
            self._engine.cancel(number, choice)
            if choice is None:
                self._inboxes.pop(number, None)

    def _empty(self, number: int) -> list[Event]:
        inbox = self._inboxes.get(number, collections.deque())
        events = list(inbox)
        inbox.clear()
        return events
