"""The committed library of kernels for prompts: what it was built from, and what is said where it does not load."""

import ctypes
import hashlib

import pytest

from elastic_jax import kernels
from elastic_jax.errors import ConfigError
from elastic_jax.kernels import prompt_library


def test_the_committed_library_is_built_from_the_committed_sources():
    path = prompt_library.library_path()
    digest = hashlib.sha256()
    for name in ("prompt.cu", "prompt_dot.cuh", "prompt_attention.cuh", "hopper.cuh"):
        digest.update((path.parent / name).read_bytes())
    stored = (ctypes.c_char * 64).in_dll(ctypes.CDLL(str(path)), "ElasticPromptSources")
    assert stored.value.decode() == digest.hexdigest(), "run elastic_jax/kernels/cuda/build.sh (or make kernels)"


def test_a_library_that_cannot_be_loaded_is_named(monkeypatch, tmp_path):
    broken = tmp_path / "libelastic_prompt.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(prompt_library, "library_path", lambda: broken)
    prompt_library.register.cache_clear()
    try:
        with pytest.raises(ConfigError, match=str(broken)):
            kernels.prepare_to_load("xla", "pallas", "xla", "xla")
        with pytest.raises(ConfigError, match=str(broken)):
            kernels.prepare_to_load("pallas", "xla", "xla", "xla")
        kernels.prepare_to_load("xla", "xla", "xla", "xla")
    finally:
        prompt_library.register.cache_clear()
