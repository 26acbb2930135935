"""What is compiled to be stored names no path of the machine, and the process is left as it was."""

import os

import jax
import pytest
from jax._src import lib

from aot_cache.process import storable_executables


@pytest.fixture
def tools(monkeypatch, tmp_path):
    monkeypatch.setattr(lib, "cuda_path", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin")
    return str(tmp_path)


def test_cuda_tools_are_found_on_the_path(tools):
    with storable_executables():
        assert lib.cuda_path is None
        assert os.environ["PATH"] == os.pathsep.join([os.path.join(tools, "bin"), "/usr/bin"])  # noqa: PTH118
    assert (lib.cuda_path, os.environ["PATH"]) == (tools, "/usr/bin")


def test_the_last_to_leave_restores(tools):
    with storable_executables():
        with storable_executables():
            pass
        assert lib.cuda_path is None
        assert not jax.config.jax_enable_compilation_cache
    assert lib.cuda_path == tools
    assert jax.config.jax_enable_compilation_cache


def test_without_cuda_tools(monkeypatch):
    monkeypatch.setattr(lib, "cuda_path", None)
    path = os.environ["PATH"]
    with storable_executables():
        assert os.environ["PATH"] == path


def test_an_error_restores(tools):
    with pytest.raises(KeyError), storable_executables():
        raise KeyError
    assert lib.cuda_path == tools
