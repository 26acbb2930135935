"""Targets name devices by what decides whether machine code runs."""

import re
import types

import jax
import pytest

from aot_cache.target import Target
from elastic_jax.errors import ExecutableError


def test_this_processor():
    target = Target.of(jax.devices()[0])
    assert target.platform == "cpu"
    assert re.fullmatch(r"cpu-\w+-[0-9a-f]{8}", target.folder)
    assert target.facts["processor_features"] == sorted(set(target.facts["processor_features"]))
    assert len(target.facts["processor_features"]) > 3


def test_fake_devices_are_one_target():
    assert len({Target.of(device).folder for device in jax.devices()}) == 1


def test_features_decide_the_folder():
    some = Target("cpu", "cpu", {"architecture": "x86_64-unknown-linux-gnu", "processor_features": ["avx", "fma"]})
    fewer = Target("cpu", "cpu", {"architecture": "x86_64-unknown-linux-gnu", "processor_features": ["avx"]})
    assert some.folder.startswith("cpu-x86_64-")
    assert some.folder != fewer.folder


H200 = """
gpu_device_info { cuda_compute_capability { major: 9 } runtime_version: "13.0.0" dnn_version: "9.12.0" }
device_description_str: "NVIDIA H200"
"""


def test_described_gpu():
    target = Target.described(H200, source="test")
    facts = {"compute_capability": "9.0", "cuda": "13.0.0", "cudnn": "9.12.0"}
    assert target == Target("gpu", "NVIDIA H200", facts)
    assert target.folder == "nvidia-h200-cuda13"
    assert target.identity() == {"platform": "gpu", "device_kind": "NVIDIA H200", **facts}


def test_cuda_versions_are_different_targets():
    assert Target.described(H200.replace("13.0.0", "12.9.0"), source="test").folder == "nvidia-h200-cuda12"


@pytest.mark.usefixtures("unchecked_types")
def test_unknown_platform():
    with pytest.raises(ExecutableError, match="tpu"):
        Target.of(types.SimpleNamespace(platform="tpu", device_kind="TPU v5"))
