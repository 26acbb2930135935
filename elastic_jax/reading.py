"""Arrays from disk to a device, by many threads at once and within a bound on host memory."""

import mmap
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from elastic_jax.stored_array import Piece, StoredArray

HOST_BYTES = 2 << 30
"""Host memory for arrays on their way to a device, or as much as the largest needs."""

_ALIGNMENT = mmap.PAGESIZE


class Cancelled(Exception):
    """Reading was stopped by the one who asked for it."""


def new_memory(size: int) -> mmap.mmap:
    """Zeroed host memory that begins at a page, so that every device can take it as it is."""
    return mmap.mmap(-1, max(size, 1))


class Staging:
    """Host memory that arrays pass through, used again and again: new memory costs more than reading a cached file.

    Args:
        size: bytes.
    """

    def __init__(self, size: int) -> None:
        self.memory = new_memory(size)
        self._free = [(0, _aligned(size))]
        self._changed = threading.Condition()
        self._cancelled = False

    def take(self, size: int) -> int:
        """Waits for `size` consecutive bytes, and returns where they begin.

        Raises:
            Cancelled: `cancel` was called.
        """
        size = _aligned(size)
        with self._changed:
            while not self._cancelled:
                for index, (start, free) in enumerate(self._free):
                    if free >= size:
                        self._free[index : index + 1] = [(start + size, free - size)] if free > size else []
                        return start
                self._changed.wait()
        raise Cancelled

    def give_back(self, start: int, size: int) -> None:
        """Allows bytes to be used again; nothing may look at them any more."""
        with self._changed:
            merged: list[tuple[int, int]] = []
            for first, count in sorted([*self._free, (start, _aligned(size))]):
                if merged and sum(merged[-1]) == first:
                    merged[-1] = (merged[-1][0], merged[-1][1] + count)
                else:
                    merged.append((first, count))
            self._free = merged
            self._changed.notify_all()

    def cancel(self) -> None:
        """Lets nobody wait any longer."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def read_to_device[Key](
    arrays: Mapping[Key, StoredArray],
    device: Any,
    *,
    workers: int,
    stop: threading.Event,
    arrived: Callable[[Key, int], None],
) -> dict[Key, jax.Array]:
    """Reads arrays, the largest first and each by many threads; traces and compiles nothing.

    Args:
        arrays: what to read.
        device: where it goes.
        workers: threads.
        stop: when set, reading ends soon.
        arrived: is told an array's key and bytes when it is there; called by one thread at a time.

    Raises:
        DamagedArrayError: an array cannot be read. Nothing is left on the device then.
        Cancelled: `stop` was set.
    """
    order = sorted(arrays, key=lambda key: -arrays[key].nbytes)
    run = _Run(arrays, device, stop, arrived)
    with ThreadPoolExecutor(workers, thread_name_prefix="read") as pool:
        try:
            for key in order:
                run.start(key, pool)
        except Cancelled:
            pass
        except BaseException:
            run.fail(Cancelled())
            raise
    if run.error is not None:
        run.on_device.clear()  # whoever keeps the error's traceback must not keep the arrays
        raise run.error
    return {key: run.on_device[key] for key in arrays}


class _Run[Key]:
    def __init__(
        self,
        arrays: Mapping[Key, StoredArray],
        device: Any,
        stop: threading.Event,
        arrived: Callable[[Key, int], None],
    ) -> None:
        self._arrays, self._device, self._stop, self._arrived = arrays, device, stop, arrived
        # The CPU device takes memory over instead of copying it, so it can neither be used again nor run short.
        self._staging = None if device.platform == "cpu" else Staging(_staging_bytes(arrays))
        self._lock = threading.Lock()
        self._left: dict[Key, int] = {}
        self.on_device: dict[Key, jax.Array] = {}
        self.error: BaseException | None = None

    def start(self, key: Key, pool: ThreadPoolExecutor) -> None:
        """Hands an array's pieces to the pool, once there is host memory for it."""
        array = self._arrays[key]
        start = self._staging.take(array.nbytes) if self._staging else 0
        memory = self._staging.memory if self._staging else new_memory(array.nbytes)
        count = array.nbytes // array.dtype.itemsize
        out = np.frombuffer(memory, array.dtype, count, offset=start).reshape(array.shape)
        pieces = list(array.pieces())
        self._left[key] = len(pieces)
        for piece in pieces:
            pool.submit(self._read, key, piece, out, start)

    def fail(self, error: BaseException) -> None:
        """Ends the run; the first error counts."""
        with self._lock:
            self.error = self.error or error
        if self._staging:
            self._staging.cancel()

    def _read(self, key: Key, piece: Piece, out: np.ndarray, start: int) -> None:
        if self._stop.is_set():
            self.fail(Cancelled())
        if self.error is not None:
            return
        stored = self._arrays[key]
        try:
            stored.read(piece, out)
            with self._lock:
                self._left[key] -= 1
                last = not self._left[key]
            if last:
                array = jax.device_put(out, self._device).block_until_ready()
                if self._staging:
                    self._staging.give_back(start, stored.nbytes)
                with self._lock:
                    self.on_device[key] = array
                    self._arrived(key, stored.nbytes)
        except BaseException as error:
            self.fail(error)


def _staging_bytes(arrays: Mapping[Any, StoredArray]) -> int:
    sizes = [_aligned(array.nbytes) for array in arrays.values()]
    return min(sum(sizes), max(HOST_BYTES, max(sizes, default=0)))
