"""The libraries of CUDA kernels beside this file (`cuda/`), and making them known to XLA."""

import ctypes
import importlib.util
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import jax

from elastic_jax.errors import ConfigError


def path_of(library: str) -> Path:
    """Where a library is, which `cuda/build.sh` builds."""
    return Path(str(resources.files(__package__))) / "cuda" / library


def register(path: Path, targets: Mapping[str, str], name: str, instead: str) -> None:
    """Makes a library's kernels known to XLA. Needs no GPU.

    Args:
        path: the library.
        targets: name of a custom call in programs -> the library's symbol (`jax.ffi`).
        name: what needs the library, for the error.
        instead: what a user can do without it.

    Raises:
        ConfigError: the library cannot be loaded on this machine.
    """
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ConfigError(
            f"{name} needs the library {path}, which cannot be loaded: {error}; it is made for Linux on x86-64 "
            f"(cuda/build.sh beside it builds another); {instead}"
        ) from error
    for target, symbol in targets.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, symbol)), platform="CUDA")


def has_cuda_12() -> bool:
    """Whether JAX's plugin here is that of CUDA 12, whose runtime the libraries do not have."""
    return bool(importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda12"))


def refuse_cuda_12(name: str, instead: str) -> None:
    """Refuses CUDA 12 where a library is needed.

    Args:
        name: what needs it, for the error.
        instead: what a user can do without it.

    Raises:
        ConfigError: JAX's plugin here is that of CUDA 12.
    """
    if has_cuda_12():
        raise ConfigError(f"{name} has the runtime of CUDA 13, and JAX's plugin here is that of CUDA 12; {instead}")
