"""What of the process has to be otherwise while executables are compiled that are to be stored."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax._src import lib  # the path that JAX gives to XLA has no public name
from jax.experimental.compilation_cache import compilation_cache

type _Undo = Callable[[], None]


def _without_persistent_cache() -> _Undo:
    # An executable that came out of JAX's persistent cache may not serialize again. Whether the cache is used is
    # decided once a process, whatever the thread, so it is switched off for all and the decision is forgotten.
    enabled = jax.config.jax_enable_compilation_cache

    def switch(on: bool) -> None:
        jax.config.update("jax_enable_compilation_cache", on)
        compilation_cache.reset_cache()

    switch(False)
    return lambda: switch(enabled)


def _with_cuda_tools_on_path() -> _Undo:
    # XLA writes into every executable in which folder it was told to look for NVIDIA's tools, a path of this machine.
    # It finds them on PATH as well.
    folder, path = lib.cuda_path, os.environ.get("PATH", os.defpath)
    if folder is None:
        return lambda: None

    def undo() -> None:
        lib.cuda_path = folder
        os.environ["PATH"] = path

    lib.cuda_path = None
    os.environ["PATH"] = os.pathsep.join([str(Path(folder) / "bin"), path])
    return undo


_lock = threading.Lock()
_users = 0
_undo: list[_Undo] = []


@contextlib.contextmanager
def storable_executables() -> Iterator[None]:
    """While this is entered, in whatever thread, what is compiled can be stored and names no path of the machine."""
    global _users
    with _lock:
        if _users == 0:
            _undo.extend([_without_persistent_cache(), _with_cuda_tools_on_path()])
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            while _users == 0 and _undo:
                _undo.pop()()
