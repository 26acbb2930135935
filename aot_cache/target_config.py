"""XLA's description of a GPU, `stream_executor.GpuTargetConfigProto` as text: what it compiles for.

Text, because the protocol buffer's classes are not part of any Python package. Only what is needed of the format is
understood: a field and its value a line, as XLA prints it.
"""

import re
from collections.abc import Mapping

from elastic_jax.errors import ExecutableError

type Message = Mapping[str, int | float | bool | str | Enum | Message]
"""Fields of a protocol buffer by name, in the order they are written."""


class Enum(str):
    """The name of an enumeration's value, which is written without quotes."""

    __slots__ = ()


def to_text(message: Message, *, indent: str = "") -> str:
    """A message in the text format of protocol buffers."""
    lines = []
    for name, value in message.items():
        if isinstance(value, Mapping):
            lines.append(f"{indent}{name} {{\n{to_text(value, indent=indent + '  ')}{indent}}}\n")
        else:
            lines.append(f"{indent}{name}: {_scalar(value)}\n")
    return "".join(lines)


def _scalar(value: int | float | bool | str | Enum) -> str:
    if isinstance(value, Enum):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return str(value)


def facts(config: str, *, source: str) -> dict[str, str]:
    """What decides whether machine code runs: `compute_capability`, and the least `cuda` and `cudnn` it needs.

    Args:
        config: a description as XLA prints it.
        source: names it in errors.

    Raises:
        ExecutableError: it does not say.
    """
    capability = re.search(r"\bcuda_compute_capability\s*\{([^}]*)\}", config)
    if capability is None:
        raise ExecutableError(f"{source} does not name a CUDA compute capability: it describes no NVIDIA GPU")
    # Zeros are left out of the text format.
    major, minor = (re.search(rf"\b{name}:\s*(\d+)", capability[1]) for name in ("major", "minor"))
    if major is None:
        raise ExecutableError(f"{source} does not name a CUDA compute capability: it has no major number")
    return {
        "compute_capability": f"{major[1]}.{minor[1] if minor else 0}",
        "cuda": _string(config, "runtime_version", source),
        "cudnn": _string(config, "dnn_version", source),
    }


def device_kind(config: str, *, source: str) -> str:
    """JAX's name of the device, e.g. `NVIDIA H200`.

    Raises:
        ExecutableError: the description does not say.
    """
    return _string(config, "device_description_str", source)


def memory_bytes(config: str, *, source: str) -> int:
    """Bytes of the device's memory.

    Raises:
        ExecutableError: the description does not say.
    """
    found = re.search(r"\bdevice_memory_size:\s*(\d+)", config)
    if found is None:
        raise ExecutableError(f"{source} does not say what device_memory_size is: it is no GPU description")
    return int(found[1])


def _string(config: str, name: str, source: str) -> str:
    found = re.search(rf'\b{name}:\s*"([^"]+)"', config)
    if found is None:
        raise ExecutableError(f"{source} does not say what {name} is: it is no GPU description of this JAX version")
    return found[1]
