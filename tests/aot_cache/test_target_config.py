"""XLA's descriptions of GPUs are written and read as protocol buffers' text."""

import pytest

from aot_cache.target_config import Enum, device_kind, facts, memory_bytes, to_text
from elastic_jax.errors import ExecutableError

H200 = """gpu_device_info {
  core_count: 132
  cuda_compute_capability {
    major: 9
    feature_extension: ACCELERATED_FEATURES
  }
  driver_version: "13.1.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "12.0.0"
  dnn_version: "9.12.0"
  name: "NVIDIA H200"
}
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
runtime_version {
  major: 13
}
"""


def test_every_kind_of_value():
    message = {
        "whole": 3,
        "broken": 1.5,
        "on": True,
        "text": 'say "\\"',
        "kind": Enum("NONE"),
        "inner": {"deep": {"n": 0}},
    }
    assert to_text(message) == (
        'whole: 3\nbroken: 1.5\non: true\ntext: "say \\"\\\\\\""\nkind: NONE\n'
        "inner {\n  deep {\n    n: 0\n  }\n}\n"
    )  # fmt: skip


def test_facts_of_a_description():
    assert facts(H200, source="s") == {"compute_capability": "9.0", "cuda": "13.0.0", "cudnn": "9.12.0"}
    assert device_kind(H200, source="s") == "NVIDIA H200"


def test_minor_number():
    assert facts(H200.replace("major: 9", "major: 8\n    minor: 9"), source="s")["compute_capability"] == "8.9"


@pytest.mark.parametrize(
    ("removed", "told"),
    [
        ("cuda_compute_capability", "no NVIDIA GPU"),
        ("    major: 9\n", "no major number"),
        ('runtime_version: "13.0.0"', "runtime_version"),
        ('dnn_version: "9.12.0"', "dnn_version"),
    ],
)
def test_missing_facts(removed, told):
    assert removed in H200
    with pytest.raises(ExecutableError, match=f"my.json.*{told}"):
        facts(H200.replace(removed, ""), source="my.json")


def test_missing_name():
    with pytest.raises(ExecutableError, match=r"my\.json.*device_description_str"):
        device_kind(H200.replace("device_description_str", "other"), source="my.json")


def test_the_size_of_memory():
    described = H200.replace("core_count", "device_memory_size: 150109880320\n  core_count")
    assert memory_bytes(described, source="s") == 150109880320
    with pytest.raises(ExecutableError, match=r"my\.json does not say what device_memory_size is"):
        memory_bytes(H200, source="my.json")
