"""A device that runs out of memory after all: one message, and nothing that goes on as if nothing had happened."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from fake_runner import FakeRunner
from tiny import CompiledTiny, tiny_step_config

from elastic_jax import ElasticMistral
from elastic_jax.batch_run import read_done, run_batch
from elastic_jax.delivery import Delivery
from elastic_jax.device_memory import explained
from elastic_jax.engine import Engine
from elastic_jax.errors import DeviceMemoryError, ExecutableError
from elastic_jax.requests import GenerateRequest, SamplingParams
from elastic_jax.runner import Runner

XLA = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5.00GiB.\n[tf-allocator-allocation-error='']"


def exhausted(*_: Any, **__: Any) -> Any:
    raise jax.errors.JaxRuntimeError(XLA)


def test_the_message_says_what_to_lower() -> None:
    with (
        pytest.raises(DeviceMemoryError, match=r"while trying to allocate 5\.00GiB\. Another.*--kv-slots"),
        explained(),
    ):
        exhausted()


def test_an_error_that_it_caused_is_one_too() -> None:
    with pytest.raises(DeviceMemoryError, match="out of memory"), explained():
        raise ExecutableError("cannot be loaded") from jax.errors.JaxRuntimeError(XLA)


@pytest.mark.parametrize("error", [ValueError(XLA[:5]), jax.errors.JaxRuntimeError("INTERNAL: " + XLA), SystemExit(1)])
def test_other_errors_stay_what_they_are(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, explained():
        raise error
    assert caught.value is error


def test_an_engine_whose_step_failed_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(FakeRunner(tiny_step_config()), 256)
    delivery = Delivery(engine)
    request = GenerateRequest((1, 2), 6, SamplingParams(), frozenset(), 1, None)
    one, two = delivery.submit([request]), delivery.submit([request])
    monkeypatch.setattr(engine.runner, "step", exhausted)
    with pytest.raises(DeviceMemoryError):
        delivery.wait(one)
    monkeypatch.undo()  # the memory is free again; the state that the step took over is gone
    with pytest.raises(DeviceMemoryError, match="load the model again"):
        delivery.wait(two)
    with pytest.raises(DeviceMemoryError):
        delivery.submit([request])
    with pytest.raises(DeviceMemoryError):
        delivery.prompt_logits((1, 2))
    delivery.close(one)
    delivery.close(two)


def test_loading_says_it(compiled_tiny: Callable[..., CompiledTiny], monkeypatch: pytest.MonkeyPatch) -> None:
    path = compiled_tiny("S", "bfloat16").checkpoint.path
    monkeypatch.setattr(Runner, "__init__", exhausted)
    with pytest.raises(DeviceMemoryError, match="--kv-slots"):
        ElasticMistral.load(path, "S", say=lambda _: None)


def test_a_batch_leaves_its_lines_for_later(
    compiled_tiny: Callable[..., CompiledTiny], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They are not bad, and a later run must not count them as done."""
    model = ElasticMistral.load(compiled_tiny("S", "bfloat16").checkpoint.path, "S", say=lambda _: None)
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"prompt": "x", "max_tokens": 4}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    source.write_text("".join(json.dumps(line | {"custom_id": name}) + "\n" for name in "abc"))
    monkeypatch.setattr(model.engine.runner, "step", exhausted)
    with pytest.raises(DeviceMemoryError):
        run_batch(model, source, out, stop=threading.Event(), progress=lambda _: None)
    assert read_done(source, out) == set()
    assert not out.exists()
