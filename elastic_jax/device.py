"""Which device is used when none is named, and which is compiled for."""

import jax

from aot_cache.identity import CompilerOptions
from aot_cache.target import Device
from elastic_jax.errors import ConfigError


def default_device() -> Device:
    """JAX's first device.

    Raises:
        ConfigError: JAX cannot use the platform that it was told to use.
    """
    try:
        return jax.devices()[0]
    except RuntimeError as error:
        raise ConfigError(f"JAX finds no device: {error}") from None
    except AssertionError:  # JAX's answer where it knows the platform and lacks its plugin or its device (0.11.2)
        raise ConfigError(
            f"JAX finds no device of JAX_PLATFORMS={jax.config.jax_platforms!r}: install what it needs (for NVIDIA "
            "GPUs the extra cuda13 or cuda12, and a driver), or unset JAX_PLATFORMS"
        ) from None


def device_to_compile_for(target: str | None) -> tuple[Device, CompilerOptions]:
    """A device that need not be there, and the XLA options that make up for that.

    Call it before anything else looks for devices: for an absent device it makes JAX use the CPU in this process.

    Args:
        target: a name or file for `aot_cache.targets.find`; None for the device at hand, where XLA tunes by itself.

    Raises:
        ConfigError: JAX cannot use the platform that it was told to use.
        ExecutableError: there is no such target, or what compiling for it needs is not installed.
    """
    if target is None:
        return default_device(), {}
    from aot_cache import targets

    description = targets.find(target)
    jax.config.update("jax_platforms", "cpu")
    return targets.absent_device(description), description.compiler_options
