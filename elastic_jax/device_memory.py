"""A device that runs out of memory although the plan fitted: other processes may have taken some since."""

import contextlib
from collections.abc import Iterator

from elastic_jax.errors import DeviceMemoryError

_EXHAUSTED = "RESOURCE_EXHAUSTED"
"""What XLA's messages of it begin with, whatever the platform."""


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Says what to do where XLA says only what it could not allocate.

    Raises:
        DeviceMemoryError: in place of JAX's error, or of one of ours that it caused.
    """
    try:
        yield
    except DeviceMemoryError:
        raise
    except Exception as error:
        found = next((one for one in (error, error.__cause__) if str(one).startswith(_EXHAUSTED)), None)
        if found is None:
            raise
        words = str(found).removeprefix(_EXHAUSTED).lstrip(": ").partition("\n")[0].rstrip(". ")
        raise DeviceMemoryError(
            f"the device ran out of memory: {words}. Another process may have taken some of it (nvidia-smi shows a "
            "GPU's). Free some, or take less (a smaller mode, a smaller pool with --kv-slots, --kv int8), and load the "
            "model again"
        ) from error
