"""Weights of both precisions on a device that may not hold them all: what is used again stays, the rest comes and goes.

A measurement walks the layers again and again, mostly in one precision. In such a cycle the least recently used weight
is the next one needed, so that a plain cache larger than its memory would never find anything in it. Here what stays is
not displaced by what is only passing: a newcomer stays if there is room, or takes the place of weights that the walk
passed without using them (it took the other precision, or began behind them) or that the last whole walk left alone.
Any other newcomer is on the device while its layer is computed, beside those read ahead for the next one.

JAX dispatches computations before they run, and keeps what they read until they have run. So bytes count as free only
when the computation that used them last is done: `used_by` names one, and whoever needs its bytes waits for it.
"""

import collections
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import jax
from jaxtyping import Array

from elastic_jax.groups import LM_HEAD
from elastic_jax.plan import Precision
from elastic_jax.quantization import QArray
from elastic_jax.search.products import Rounded
from elastic_jax.weights import Weights

type Key = tuple[str, Precision]
"""A name in `Weights`, and which of its precisions."""


class Held(Protocol):
    """Whatever gives a model's weights; used by one thread."""

    def get(self, name: str, precision: Precision) -> Any:
        """A weight on the device: a float array, or a `QArray` (or `Rounded`) for int8."""
        ...

    def expect(self, keys: Iterable[Key]) -> None:
        """Says what will be asked for next, so that it is read while the device computes."""
        ...

    def used_by(self, result: Array) -> None:
        """Says that all weights given since the last call are used by what makes `result`, and no longer by others."""
        ...


class AllHeld:
    """Everything is on the device.

    Args:
        floats: weights for mode XL, of one float type.
        integers: the groups as `QArray`s by name; None rounds the floats wherever int8 is used, as `convert` would.
    """

    def __init__(self, floats: Weights, integers: Mapping[str, QArray] | None) -> None:
        self._floats, self._integers = floats, integers

    def get(self, name: str, precision: Precision) -> Any:
        """A weight on the device."""
        if precision == "int8" and self._integers is not None:
            return self._integers[name]
        matrix = self._floats.get(name, self._floats["embedding"])  # a tied head
        return matrix if precision == "bf16" else Rounded(matrix, "a16")

    def expect(self, keys: Iterable[Key]) -> None:
        """Nothing is to be read."""

    def used_by(self, result: Array) -> None:
        """Nothing will be let go."""


class _Weight:
    """One that is on the device, or on its way there."""

    def __init__(self, size: int, place: int, stays: bool, walk: int) -> None:
        self.size, self.place, self.stays, self.walk = size, place, stays, walk
        self.value: Any = None
        self.reading: Future[Any] | None = None
        self.asked_for = False
        self.use = self.layer_count = 0


class PartlyHeld:
    """As many weights as fit into a budget, the others read whenever they are needed.

    Args:
        sizes: bytes on the device of every weight.
        read: brings one onto the device; is called by a thread of its own, too.
        budget: bytes that all of them may take at the same time, those that computations still use included.
        always: weights that never leave.
        fixed: bytes of those, which count as well.
        passing: bytes of the budget that are for weights that do not stay: those of two layers, say.
    """

    def __init__(
        self,
        sizes: Mapping[Key, int],
        read: Callable[[Key], Any],
        *,
        budget: int,
        always: Mapping[Key, Any],
        fixed: int,
        passing: int,
    ) -> None:
        self._sizes, self._read, self._budget, self._always = sizes, read, budget, always
        self._most_staying = max(budget - fixed - passing, 0)
        self._total = fixed
        self.peak = fixed
        """The most bytes that were counted at any time."""
        self._there: dict[Key, _Weight] = {}
        self._expected: frozenset[Key] = frozenset()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._place, self._walk, self._layer_count = -1, 0, 0
        # Computations are numbered; those of one device are done in order.
        self._dispatched = self._done = 0
        self._marks: collections.deque[tuple[int, Any]] = collections.deque()
        self._leaving: collections.deque[tuple[int, int]] = collections.deque()

    def get(self, name: str, precision: Precision) -> Any:
        """A weight on the device, read now if it is not there.

        Raises:
            CheckpointError: it cannot be read, now or by the thread that read it ahead.
        """
        key = (name, precision)
        if key in self._always:
            return self._always[key]
        self._go_to(_place(name))
        weight = self._there.get(key)
        if weight is None:
            weight = self._admit(key)
            if weight is None:
                raise RuntimeError(f"{key}: {self._sizes[key]} bytes in {self._budget} while all others are in use")
            try:
                weight.value = self._read(key)
            except BaseException:
                self._forget(key)
                raise
        elif weight.reading is not None:
            try:
                weight.value = weight.reading.result()
            except BaseException:
                self._forget(key)
                raise
            weight.reading = None
        weight.asked_for, weight.walk, weight.layer_count = True, self._walk, self._layer_count
        weight.use = self._dispatched + 1
        return weight.value

    def expect(self, keys: Iterable[Key]) -> None:
        """Reads ahead as much of `keys`, in their order, as there is room for; earlier expectations are given up."""
        wanted = [key for key in dict.fromkeys(keys) if key not in self._always]
        self._expected = frozenset(wanted)
        for key in wanted:
            if key in self._there:
                continue
            weight = self._admit(key, ahead=True)
            if weight is None:
                break
            weight.reading = self._reader.submit(self._read, key)

    def used_by(self, result: Array) -> None:
        """Says that all weights given since the last call are used by what makes `result`, and no longer by others."""
        self._dispatched += 1
        self._marks.append((self._dispatched, _mark(result)))
        while self._marks and self._marks[0][1].is_ready():
            self._done = self._marks.popleft()[0]

    def _go_to(self, place: int) -> None:
        if place != self._place:
            self._layer_count += 1
            self._walk += place < self._place
            self._place = place

    def _admit(self, key: Key, *, ahead: bool = False) -> _Weight | None:
        """Makes room for a weight and counts it; None if there is no room."""
        size, stays = self._sizes[key], self._make_place(self._sizes[key])
        if not self._make_room(size, ahead=ahead):
            return None
        weight = _Weight(size, _place(key[0]), stays, self._walk)
        weight.layer_count = self._layer_count
        self._there[key] = weight
        self._total += size
        self.peak = max(self.peak, self._total)
        return weight

    def _make_place(self, size: int) -> bool:
        """Whether a newcomer may stay; if so, lets go of the idle weights whose place it takes."""
        free = self._most_staying - sum(weight.size for weight in self._there.values() if weight.stays)
        idle = [key for key, weight in self._by_use() if weight.stays and self._idle(key, weight)]
        leave: list[Key] = []
        for key in idle:
            if free >= size:
                break
            leave.append(key)
            free += self._there[key].size
        if free < size:
            return False
        for key in leave:
            self._forget(key)
        return True

    def _idle(self, key: Key, weight: _Weight) -> bool:
        """Whether the walk passed a weight without using it, or the whole walk before did not use it."""
        if key in self._expected or weight.use > self._dispatched:
            return False
        passed = weight.place < self._place and weight.walk < self._walk
        return passed or weight.walk < self._walk - 1

    def _make_room(self, size: int, *, ahead: bool) -> bool:
        while (over := self._total + size - self._budget) > 0:
            while self._leaving and self._leaving[0][0] <= self._done:
                self._total -= self._leaving.popleft()[1]
            over = self._total + size - self._budget
            if over <= 0:
                break
            victim = None
            if sum(each for _, each in self._leaving) < over:
                victim = next((key for key, weight in self._by_use() if self._passing(key, weight, ahead)), None)
            if victim is not None:
                self._forget(victim)
            elif self._leaving:
                self._wait_for(self._leaving[0][0])
            else:
                return False
        return True

    def _passing(self, key: Key, weight: _Weight, ahead: bool) -> bool:
        """Whether a weight that does not stay may go; for one that is read ahead, nothing of this layer need go."""
        if weight.stays:
            return False
        if not weight.asked_for:
            return key not in self._expected or not ahead
        return weight.use <= self._dispatched and (not ahead or weight.layer_count < self._layer_count)

    def _by_use(self) -> list[tuple[Key, _Weight]]:
        """What was read ahead in vain comes first, then what was used longest ago; last what is expected."""
        return sorted(self._there.items(), key=lambda each: (each[0] in self._expected, each[1].use))

    def _forget(self, key: Key) -> None:
        weight = self._there.pop(key)
        if weight.reading is not None and not weight.reading.cancel():
            weight.reading.exception()  # it is over; an error is met again if the weight is needed
        if weight.use <= self._done:
            self._total -= weight.size
        else:
            self._leaving.append((weight.use, weight.size))
            self._leaving = collections.deque(sorted(self._leaving))

    def _wait_for(self, use: int) -> None:
        while self._done < use:
            number, mark = self._marks.popleft()
            jax.block_until_ready(mark)
            self._done = number


def _place(name: str) -> int:
    """Where a walk comes to a weight: the embedding first, then layers by number, and the head."""
    if name == LM_HEAD:
        return sys.maxsize
    return int(name.split(".")[1]) if name.startswith("layers.") else -1


@jax.jit
def _first(x: Array) -> Array:
    return x.reshape(-1)[0]


def _mark(result: Array) -> Array:
    """Something small that is ready when `result` is: keeping that itself would keep its memory."""
    return _first(result)
