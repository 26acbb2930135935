import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from elastic_jax import reading, stored_array
from elastic_jax.checkpoint_io import write_arrays
from elastic_jax.reading import Cancelled, Staging, read_to_device
from elastic_jax.stored_array import DamagedArrayError, StoredArray

PAGE = 4096
CPU = jax.devices()[0]


def stored(folder: Path, rows: dict[str, int]) -> tuple[dict[str, StoredArray], dict[str, np.ndarray]]:
    """Arrays of 1 KiB a row on disk."""
    rng = np.random.default_rng(0)
    values = {name: rng.integers(-127, 128, (count, 1024), np.int8) for name, count in rows.items()}
    write_arrays(folder, values)
    return {
        name: StoredArray.open(folder / name, jax.ShapeDtypeStruct(v.shape, v.dtype)) for name, v in values.items()
    }, values


def read(arrays: dict[str, StoredArray], device: Any = CPU, **options: Any) -> dict[str, Any]:
    defaults = {"workers": 3, "stop": threading.Event(), "arrived": lambda *_: None}
    return read_to_device(arrays, device, **(defaults | options))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A device that copies what it is given, and is slow enough at it that arrays have to wait for memory."""

    device_put = jax.device_put

    def copy(out: np.ndarray, device: Any) -> Any:
        time.sleep(0.002)
        device.addresses.append(out.ctypes.data)
        return device_put(out.copy(), CPU)

    monkeypatch.setattr(jax, "device_put", copy)
    return SimpleNamespace(platform="gpu", addresses=[])


# -- staging -----------------------------------------------------------------------------------------------------------


def test_memory_is_given_out_once_and_again_when_it_comes_back():
    staging = Staging(4 * PAGE)
    first, second = staging.take(PAGE), staging.take(3 * PAGE - 5)
    assert sorted([first, second]) == [0, PAGE]
    staging.give_back(first, PAGE)
    staging.give_back(second, 3 * PAGE - 5)
    assert staging.take(4 * PAGE) == 0  # what was apart is whole again


def test_who_asks_for_too_much_waits_until_there_is_room():
    staging = Staging(2 * PAGE)
    held = staging.take(2 * PAGE)
    threading.Timer(0.05, lambda: staging.give_back(held, 2 * PAGE)).start()
    start = time.perf_counter()
    assert staging.take(PAGE) == 0
    assert time.perf_counter() - start > 0.04


def test_nobody_waits_for_what_was_cancelled():
    staging = Staging(PAGE)
    staging.take(PAGE)
    threading.Timer(0.05, staging.cancel).start()
    with pytest.raises(Cancelled):
        staging.take(PAGE)


# -- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 4])
def test_arrays_arrive_whole_on_the_device(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(stored_array, "_PIECE_BYTES", 5000)
    arrays, values = stored(tmp_path / "a", {"small": 1, "large": 40, "middle": 13})
    told: list[tuple[str, int]] = []
    found = read(arrays, jax.devices()[2], workers=workers, arrived=lambda *call: told.append(call))
    assert list(found) == ["small", "large", "middle"]
    for name, value in values.items():
        assert found[name].devices() == {jax.devices()[2]}
        np.testing.assert_array_equal(np.asarray(found[name]), value)
    assert sorted(told) == sorted((name, value.nbytes) for name, value in values.items())


def test_host_memory_is_bounded_and_used_again(tmp_path, monkeypatch, gpu):
    monkeypatch.setattr(reading, "HOST_BYTES", 64 << 10)
    monkeypatch.setattr(stored_array, "_PIECE_BYTES", 8 << 10)
    made: list[int] = []
    new_memory = reading.new_memory
    monkeypatch.setattr(reading, "new_memory", lambda size: made.append(size) or new_memory(size))
    arrays, values = stored(tmp_path / "a", {str(i): 8 + i % 5 for i in range(40)})
    found = read(arrays, gpu)
    assert made == [64 << 10]
    assert max(gpu.addresses) - min(gpu.addresses) < 64 << 10
    assert len(set(gpu.addresses)) < len(values)
    for name, value in values.items():
        np.testing.assert_array_equal(found[name], value)


def test_an_array_larger_than_the_bound_is_read_too(tmp_path, monkeypatch, gpu):
    monkeypatch.setattr(reading, "HOST_BYTES", 8 << 10)
    arrays, values = stored(tmp_path / "a", {"large": 64, "small": 2})
    found = read(arrays, gpu)
    assert all((found[name] == value).all() for name, value in values.items())


def test_little_to_read_takes_little_memory(tmp_path, monkeypatch, gpu):
    made: list[int] = []
    new_memory = reading.new_memory
    monkeypatch.setattr(reading, "new_memory", lambda size: made.append(size) or new_memory(size))
    read(stored(tmp_path / "a", {"a": 4, "b": 8})[0], gpu)
    assert made == [12 << 10]


def test_the_first_error_ends_the_reading_and_leaves_nothing(tmp_path, monkeypatch, gpu):
    monkeypatch.setattr(reading, "HOST_BYTES", 16 << 10)
    arrays, _ = stored(tmp_path / "a", {str(i): 8 for i in range(40)})
    (tmp_path / "a" / "20" / "0.0").write_bytes(b"short")
    told: list[str] = []
    with pytest.raises(DamagedArrayError, match=r"20/0\.0 ends after 5 bytes") as refused:
        read(arrays, gpu, workers=2, arrived=lambda name, _: told.append(name))
    assert len(told) < 40
    frame = refused.tb
    while frame.tb_next:
        frame = frame.tb_next
        assert not getattr(frame.tb_frame.f_locals.get("run"), "on_device", None)


def test_an_error_of_the_device_is_not_lost(tmp_path, monkeypatch):
    def full(*_: Any) -> Any:
        raise RuntimeError("RESOURCE_EXHAUSTED")

    arrays, _ = stored(tmp_path / "a", {"a": 4, "b": 8})
    monkeypatch.setattr(jax, "device_put", full)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        read(arrays)


def test_reading_ends_when_it_is_stopped(tmp_path, monkeypatch, gpu):
    monkeypatch.setattr(reading, "HOST_BYTES", 16 << 10)
    arrays, _ = stored(tmp_path / "a", {str(i): 8 for i in range(40)})
    stop, told = threading.Event(), []

    def arrived(name: str, _: int) -> None:
        told.append(name)
        stop.set()

    with pytest.raises(Cancelled):
        read(arrays, gpu, stop=stop, arrived=arrived)
    assert 1 <= len(told) < 10


@pytest.mark.gpu
def test_a_gpu_has_copied_before_memory_is_used_again(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "HOST_BYTES", 24 << 20)
    arrays, values = stored(tmp_path / "a", {str(i): 8192 + 1024 * (i % 5) for i in range(40)})
    found = read(arrays, jax.devices("gpu")[0], workers=8)
    for name, value in values.items():
        np.testing.assert_array_equal(np.asarray(found[name]), value)
