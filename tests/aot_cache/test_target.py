"""Targets name devices by what decides whether machine code runs."""

import re

import jax

from aot_cache.target import Target


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


def test_described_gpu():
    facts = {"compute_capability": "9.0", "cuda": "13.0", "cudnn": "91300"}
    target = Target("gpu", "NVIDIA H200", facts)
    assert target.folder == "nvidia-h200-cuda13"
    assert target.identity() == {"platform": "gpu", "device_kind": "NVIDIA H200", **facts}
