"""Which device is compiled for, and the commands about targets."""

import json
import os
import subprocess
import sys

import jax
import pytest

from aot_cache.targets import names
from elastic_jax.device import default_device, device_to_compile_for
from elastic_jax.errors import ExecutableError


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "elastic_jax", *arguments], capture_output=True, text=True, check=False
    )


def test_the_device_at_hand():
    assert device_to_compile_for(None) == (default_device(), {})


@pytest.mark.parametrize("platform", ["cuda", "abacus"])
def test_a_platform_that_is_not_there_is_one_message(platform):
    script = "from elastic_jax.device import default_device; default_device()"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"JAX_PLATFORMS": platform, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 1
    assert "ConfigError: JAX finds no device" in done.stderr
    assert platform in done.stderr.splitlines()[-1]


def test_unknown_target_changes_nothing():
    platforms = jax.config.jax_platforms
    with pytest.raises(ExecutableError, match="no target is called 'h300'"):
        device_to_compile_for("h300")
    assert jax.config.jax_platforms == platforms


@pytest.mark.cuda_plugin
def test_an_absent_gpu():
    device, options = device_to_compile_for("l40s")
    assert (device.platform, device.device_kind) == ("gpu", "NVIDIA L40S")
    assert options == {"xla_gpu_enable_triton_gemm": False}


def test_list_of_targets():
    listed = command("targets", "--json")
    assert json.loads(listed.stdout) == names()
    assert "h200-cuda12" in command("targets").stdout


def test_a_processor_is_not_dumped():
    refused = command("dump-target")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "is not a GPU" in refused.stderr
    assert "Traceback" not in refused.stderr
