"""Which device is used when none is named."""

import jax

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
