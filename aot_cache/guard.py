"""The proof that nothing is compiled: tracing forbidden for the whole process, and compile events counted."""

import collections
import threading
from types import TracebackType

import jax
import jax.monitoring

COMPILE_EVENTS = "/jax/core/compile/"
"""Prefix of the events that JAX records for tracing, lowering and compiling."""


def forbid_compilation() -> None:
    """Makes every later attempt to trace raise, in all threads. Nothing undoes it but the end of the process.

    `jax.no_tracing` as a context manager would cover the calling thread alone.
    """
    jax.config.update("jax_no_tracing", True)


class CompileCounter:
    """Counts compile events of the whole process from construction (or entry) until `close` (or exit).

    What JAX compiled before is not counted, so construct it first.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: collections.Counter[str] = collections.Counter()
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs  # the listener's signature is JAX's
        if event.startswith(COMPILE_EVENTS):
            with self._lock:
                self._events[event.removeprefix(COMPILE_EVENTS)] += 1

    def count(self) -> int:
        """Number of events so far: one compilation causes three, for tracing, lowering and compiling."""
        with self._lock:
            return self._events.total()

    def events(self) -> dict[str, int]:
        """The events so far by name, e.g. `{"backend_compile_duration": 1}`."""
        with self._lock:
            return dict(self._events)

    def close(self) -> None:
        """Stops counting."""
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def __enter__(self) -> "CompileCounter":
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.close()
