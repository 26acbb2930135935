"""Executables, weights and tokenizer, loaded at the same time."""

import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import jax
import pytest
from tiny import CompiledTiny

from elastic_jax import parts
from elastic_jax.errors import CheckpointError, ExecutableError, TokenizerError
from elastic_jax.executables import ModeStore
from elastic_jax.parts import load_parts
from elastic_jax.phases import Phases
from elastic_jax.reading import Cancelled
from elastic_jax.tokenizer import Tokenizer


@pytest.fixture
def tiny(compiled_tiny: Callable[..., CompiledTiny]) -> CompiledTiny:
    return compiled_tiny("XL", "float32")


def load(tiny: CompiledTiny, phases: Phases | None = None) -> Any:
    store = ModeStore(tiny.checkpoint, tiny.plan, "float32", jax.devices()[0])
    return load_parts(store, tiny.step, trust=False, preload=False, workers=2, phases=phases or Phases())


def fail(error: Exception) -> Callable[..., Any]:
    def raising(*_: Any, **__: Any) -> Any:
        raise error

    return raising


def test_everything_is_there_and_timed(tiny: CompiledTiny) -> None:
    phases = Phases()
    loaded = load(tiny, phases)
    assert set(loaded.units) == set(tiny.units)
    assert loaded.weights.keys() == tiny.weights.keys()
    assert loaded.tokenizer.encode("a", add_special_tokens=False)
    told = phases.to_json()
    assert set(told) == {"executables", "weights", "tokenizer"}
    assert told["weights"]["bytes"] == tiny.checkpoint.weight_bytes(tiny.plan)


def test_the_parts_are_loaded_at_the_same_time(tiny: CompiledTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = threading.Barrier(3, timeout=10)
    monkeypatch.setattr(ModeStore, "load", lambda *_, **__: (meeting.wait(), {})[1])
    monkeypatch.setattr(parts, "load_weights", lambda *_, **__: (meeting.wait(), {})[1])
    tokenizer = Tokenizer.load(tiny.checkpoint.tokenizer_path)
    monkeypatch.setattr(Tokenizer, "load", lambda _: (meeting.wait(), tokenizer)[1])
    assert load(tiny).tokenizer is tokenizer


@pytest.mark.parametrize(
    ("where", "name", "error"),
    [
        (ModeStore, "load", ExecutableError("no executable")),
        (parts, "load_weights", CheckpointError("no weights")),
        (Tokenizer, "load", TokenizerError("no tokenizer")),
    ],
)
def test_an_error_of_any_part_is_raised_as_it_is(
    tiny: CompiledTiny, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, error: Exception
) -> None:
    monkeypatch.setattr(where, name, fail(error))
    with pytest.raises(type(error)) as raised:
        load(tiny)
    assert raised.value is error


def test_an_error_stops_the_reading_of_weights(tiny: CompiledTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    def read(*_: Any, stop: threading.Event, **__: Any) -> Any:
        ended.append(stop.wait(10))
        raise Cancelled

    monkeypatch.setattr(parts, "load_weights", read)
    monkeypatch.setattr(ModeStore, "load", fail(ExecutableError("first")))
    start = time.perf_counter()
    with pytest.raises(ExecutableError, match="first"):
        load(tiny)
    assert ended == [True]
    assert time.perf_counter() - start < 5


def test_weights_that_were_read_are_let_go_after_an_error(tiny: CompiledTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    read, loaded = parts.load_weights, threading.Event()
    kept: list[Any] = []

    def weights(*args: Any, **options: Any) -> Any:
        result = read(*args, **options)
        kept.append(weakref.ref(result["embedding"]))
        loaded.set()
        return result

    def tokenizer(_: Any) -> Any:
        loaded.wait(10)
        time.sleep(0.05)
        raise TokenizerError("late")

    monkeypatch.setattr(parts, "load_weights", weights)
    monkeypatch.setattr(Tokenizer, "load", tokenizer)
    with pytest.raises(TokenizerError, match="late") as raised:
        load(tiny)
    gc.collect()
    assert raised.tb is not None, "the error and its traceback are still here"
    assert [reference() for reference in kept] == [None]
