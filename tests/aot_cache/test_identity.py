"""The runtime's identity changes with what matters, and tells no paths."""

import jax
import pytest

from aot_cache.identity import runtime_identity, source_digest
from aot_cache.store import full_identity
from aot_cache.target import Target
from elastic_jax.errors import ExecutableError

TARGET = Target("cpu", "cpu", {"architecture": "x86_64-unknown-linux-gnu", "processor_features": ["avx"]})


def flags(monkeypatch, value):
    monkeypatch.setenv("XLA_FLAGS", value)
    return runtime_identity(TARGET, {})["xla_flags"]


def test_versions_and_target():
    identity = runtime_identity(TARGET, {"xla_option": True})
    assert identity["jax"] == jax.__version__
    assert identity["processor_features"] == ["avx"]
    assert identity["compiler_options"] == {"xla_option": True}


def test_order_of_flags_does_not_matter(monkeypatch):
    assert flags(monkeypatch, "--xla_b=1 --xla_a=2") == flags(monkeypatch, "--xla_a=2  --xla_b=1")


def test_flags_that_do_not_change_code_are_left_out(monkeypatch):
    assert flags(monkeypatch, "--xla_force_host_platform_device_count=8 --xla_dump_to=/somewhere") == []


def test_paths_in_flags_are_hidden_but_compared(monkeypatch):
    (flag,) = flags(monkeypatch, "--xla_gpu_load_autotune_results_from=/secret/place")
    assert "secret" not in flag
    assert flag.startswith("--xla_gpu_load_autotune_results_from=path:")
    assert flags(monkeypatch, "--xla_gpu_load_autotune_results_from=/another/place") != [flag]


def test_runtime_keys_cannot_be_overridden():
    with pytest.raises(ExecutableError, match=r"the keys \['jax'\] are the runtime's own"):
        full_identity({"jax": "mine"}, TARGET, {})


def write(folder, files):
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    return source_digest(folder.iterdir(), relative_to=folder)


def test_source_digest_depends_on_contents_and_names_alone(tmp_path):
    files = {"a.py": "x = 1\n", "b.py": "y = 2\n"}
    digest = write(tmp_path / "one", files)
    assert write(tmp_path / "two", files) == digest
    assert write(tmp_path / "changed", files | {"b.py": "y = 3\n"}) != digest
    assert write(tmp_path / "renamed", {"a.py": "x = 1\n", "c.py": "y = 2\n"}) != digest
    assert write(tmp_path / "shifted", {"a.py": "x = 1\ny = 2\n", "b.py": ""}) != digest


def test_source_digest_of_a_missing_file(tmp_path):
    with pytest.raises(ExecutableError, match="cannot be hashed"):
        source_digest([tmp_path / "none.py"], relative_to=tmp_path)
