import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import pytest
from tiny import MISTRAL_SMALL, tiny_step_config

from aot_cache.target import Target
from elastic_jax.executables import default_step_config
from elastic_jax.kernels import measured

STEP = default_step_config(MISTRAL_SMALL, "gpu", "bfloat16", kv_slots=4096, max_context=None)
REPOSITORY = Path(__file__).resolve().parents[3]


class Gpu:
    """A device of some compute capability."""

    platform, device_kind, id, client = "gpu", "NVIDIA Something", 0, None

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


@pytest.fixture
def gpu(monkeypatch):
    def of(capability: str) -> Gpu:
        target = Target("gpu", Gpu.device_kind, {"compute_capability": capability})
        monkeypatch.setattr(measured.Target, "of", lambda _: target)
        return Gpu()

    return of


def test_nothing_is_said_of_measured_devices(gpu):
    assert measured.unmeasured(STEP, gpu("9.0")) is None


def test_others_are_named_with_the_commands_that_measure(gpu):
    message = measured.unmeasured(STEP, gpu("8.9"))
    assert message is not None
    assert message.startswith("NVIDIA Something: ")
    assert "compute capability 8.9" in message
    commands = re.findall(r"python (benches/\w+\.py)(?: --tiles (\S+\.json))?", message)
    assert {script for script, _ in commands} == {"benches/integer_dot.py", "benches/decode_tiles.py"}
    for script, table in commands:
        assert (REPOSITORY / script).is_file()
        assert not table or json.loads((REPOSITORY / table).read_text())


def test_only_kernels_in_use_are_named(gpu):
    message = measured.unmeasured(dataclasses.replace(STEP, decode="xla"), gpu("8.0"))
    assert message is not None
    assert "decode_tiles" not in message
    composed = dataclasses.replace(STEP, decode="xla", dot="xla")
    assert measured.unmeasured(composed, gpu("8.0")) is None


def test_a_cpu_has_nothing_to_measure():
    assert measured.unmeasured(tiny_step_config(), jax.devices()[0]) is None


@pytest.mark.cuda_plugin
@pytest.mark.parametrize(("name", "told"), [("h200", False), ("a100", True), ("l40s", True)])
def test_described_gpus(name, told):
    from aot_cache.targets import absent_device, find

    assert (measured.unmeasured(STEP, absent_device(find(name))) is not None) == told
