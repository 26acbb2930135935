"""Which device is used when none is named, and which is compiled for."""

import jax

from aot_cache.identity import CompilerOptions
from aot_cache.target import Device
from elastic_jax import plugin_log
from elastic_jax.errors import ConfigError


def default_device() -> Device:
    """JAX's first device.

    Raises:
        ConfigError: JAX cannot use the platform that it was told to use.
    """
    device = _first()
    if device.platform == "cpu":
        plugin_log.tell()
    return device


def check_platform() -> None:
    """Asks JAX for its devices, for work that runs on none of them and uses a library that asks too.

    Raises:
        ConfigError: JAX cannot use the platform that it was told to use.
    """
    _first()


def _first() -> Device:
    try:
        return jax.devices()[0]
    except RuntimeError as error:
        raise _no_device(str(error)) from None
    except AssertionError:  # JAX's answer where it knows the platform and lacks its plugin or its device (0.11.2)
        raise _no_device("") from None


def _no_device(found: str) -> ConfigError:
    """Which platform JAX was told to use, what it found in its own words, and what to do."""
    # JAX's own advice names another way to say the same.
    found = " ".join(found.partition("(set JAX_PLATFORMS=")[0].split()).rstrip(".")
    reasons = "; ".join(filter(None, (found, *plugin_log.failures())))
    chosen = jax.config.jax_platforms
    return ConfigError(
        "JAX finds no device"
        + (f" of JAX_PLATFORMS={chosen!r}" if chosen else "")
        + (f" ({reasons})" if reasons else "")
        + ": install what it needs (for NVIDIA GPUs the extra cuda13 or cuda12, and a driver)"
        + (", or unset JAX_PLATFORMS" if chosen else "; `elastic-jax doctor` looks for the cause")
    )


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
