"""Which device is compiled for, and the commands about targets."""

import json
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
