"""Named, timed phases of a long operation. They may overlap, and run in different threads."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase.

    Attributes:
        start: seconds after the operation's own start.
        end: the same.
        nbytes: bytes that were moved; None where there is nothing to count.
    """

    start: float
    end: float
    nbytes: int | None

    def to_json(self) -> dict[str, Any]:
        """Start, end and length in seconds; bytes and GB/s (1e9 bytes) where there are any."""
        described: dict[str, Any] = {
            "start": round(self.start, 3),
            "end": round(self.end, 3),
            "seconds": round(self.end - self.start, 3),
        }
        if self.nbytes is not None:
            rate = self.nbytes / 1e9 / max(self.end - self.start, 1e-9)
            described |= {"bytes": self.nbytes, "gb_per_second": round(rate, 3)}
        return described


class Phases:
    """Measures phases from its own making on. Each name is used once, so threads do not disturb each other."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._phases: dict[str, Phase] = {}

    @contextlib.contextmanager
    def measure(self, name: str, *, nbytes: int | None = None) -> Iterator[None]:
        """Measures what is done inside, unless that raises.

        Args:
            name: the phase's.
            nbytes: bytes that it moves.
        """
        start = self._now()
        yield
        self._phases[name] = Phase(start, self._now(), nbytes)

    def finish(self) -> None:
        """Adds `total`, from the making of this object to now."""
        self._phases["total"] = Phase(0.0, self._now(), None)

    def __getitem__(self, name: str) -> Phase:
        return self._phases[name]

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Every phase by name, in the order in which they began; `total` is last."""
        order = sorted(self._phases, key=lambda name: (name == "total", self._phases[name].start))
        return {name: self._phases[name].to_json() for name in order}

    def _now(self) -> float:
        return time.perf_counter() - self._start
