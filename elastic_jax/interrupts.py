"""Ctrl-C while an answer is made."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed meanwhile, which then ends nothing by itself.

    An exception in the middle of a step would leave the engine without the state that the step took over; in the middle
    of what JAX does when memory is collected, it would be lost.
    """
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        del number, frame
        pressed = True

    previous: Any = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)
