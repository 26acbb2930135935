"""Which GPUs the Pallas kernels are for."""

from jax.experimental.pallas import triton
from jax.extend import backend

from elastic_jax.errors import ConfigError

LEAST_CAPABILITY = 80
"""Compute capability 8.0, Ampere: the first with bf16 tensor cores."""


def compute_capability(name: str, instead: str) -> int:
    """Of the device traced for, ten times its number.

    Args:
        name: what asks, for errors.
        instead: what to do on other devices, for errors.

    Raises:
        ConfigError: the kernels do not run on it.
    """
    need = f"{name} needs an NVIDIA GPU of compute capability 8.0 or newer"
    try:
        info = triton.get_gpu_info()
    except ValueError as error:
        raise ConfigError(f"{need}, and the program is for another device ({error}); {instead}") from error
    if info.compute_capability < LEAST_CAPABILITY:
        found = info.compute_capability / 10
        raise ConfigError(f"{need}, found {info.arch_name} ({found}); {instead}")
    return info.compute_capability


def multiprocessors() -> int:
    """Of the device traced for."""
    return backend.get_default_device().core_count
