"""The shipped descriptions: their names, numbers and targets."""

import pytest

from aot_cache.target import Target
from aot_cache.targets import find, names
from elastic_jax.errors import ExecutableError

KINDS = {
    "a100": ("NVIDIA A100-SXM4-80GB", "8.0", 108),
    "h100": ("NVIDIA H100 80GB HBM3", "9.0", 132),
    "h200": ("NVIDIA H200", "9.0", 132),
    "l40s": ("NVIDIA L40S", "8.9", 142),
}


def test_every_gpu_with_both_cuda_versions():
    assert set(names()) == {name + suffix for name in KINDS for suffix in ("", "-cuda12")}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("suffix", "cuda", "cudnn"), [("", "13.0.0", "9.12.0"), ("-cuda12", "12.9.0", "9.10.2")])
def test_targets(name, suffix, cuda, cudnn):
    kind, capability, multiprocessors = KINDS[name]
    description = find(name + suffix)
    assert description.target == Target("gpu", kind, {"compute_capability": capability, "cuda": cuda, "cudnn": cudnn})
    assert description.target.folder.endswith(f"-cuda{cuda[:2]}")
    assert f"  core_count: {multiprocessors}\n" in description.config


def test_targets_have_folders_of_their_own():
    assert len({find(name).target.folder for name in names()}) == len(names())


def test_architecture_specific_instructions_where_there_are_any():
    assert "feature_extension: ACCELERATED_FEATURES" in find("h100").config
    assert "feature_extension: NONE" in find("l40s").config


def test_unknown_name():
    with pytest.raises(ExecutableError, match=r"no target is called 'h300'; there are a100, .*dump-target"):
        find("h300")


def test_a_file(tmp_path):
    with pytest.raises(ExecutableError, match=r"absent\.json is not a readable GPU description"):
        find(str(tmp_path / "absent.json"))
