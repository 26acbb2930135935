"""Devices and types as people who come from PyTorch name them."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from elastic_jax.device import default_device
from elastic_jax.errors import ConfigError
from elastic_jax.step import ComputeDtype

_PLATFORMS = {"cpu": "cpu", "cuda": "gpu", "gpu": "gpu"}
_DTYPES: dict[str, ComputeDtype] = {"bfloat16": "bfloat16", "float32": "float32", "auto": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class DeviceName:
    """What `torch.device` says of a device, without PyTorch; its text is "cpu" or "cuda:0".

    Attributes:
        type: `cpu` or `cuda`.
        index: number of the GPU.
    """

    type: str
    index: int | None

    def __str__(self) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"


def compute_dtype(dtype: Any) -> ComputeDtype:
    """The compute type that a name, or a type of NumPy, JAX or PyTorch, means; None and "auto" are bfloat16.

    Raises:
        ConfigError: there is no such compute type.
    """
    if dtype is None:
        return "bfloat16"
    name = dtype if isinstance(dtype, str) else str(dtype)
    if not isinstance(dtype, str) and not name.startswith("torch."):
        try:
            name = np.dtype(dtype).name
        except TypeError:
            name = str(dtype)
    name = name.removeprefix("torch.")
    if name not in _DTYPES:
        raise ConfigError(
            f"dtype {dtype!r} is not supported: weights and the KV cache are bfloat16, or float32 for checks; how "
            "precise products are is what the mode says"
        )
    return _DTYPES[name]


def is_dtype(value: Any) -> bool:
    """Whether a value names a type of numbers, rather than a device."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.dtype):
        return True
    if isinstance(value, str):
        return value in ("bfloat16", "float32", "float16")
    return isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic))


def find_device(wanted: Any) -> Any:
    """JAX's device for `device_map` or a device's name; None for JAX's own choice.

    Args:
        wanted: None, "auto", "cpu", "cuda", "cuda:0", a number, a `torch.device`, a JAX device, or a mapping from "" to
            one of these.

    Raises:
        ConfigError: it is none of these, JAX has no such device, or it spreads the model over several.
    """
    import jax

    if isinstance(wanted, Mapping):
        if len(wanted) != 1:
            raise ConfigError(f"device_map names {len(wanted)} modules: the whole model runs on one device")
        (wanted,) = wanted.values()
    if wanted is None or (isinstance(wanted, str) and wanted in ("auto", "balanced", "sequential")):
        return None
    if isinstance(wanted, jax.Device):
        return wanted
    text = f"cuda:{wanted}" if isinstance(wanted, int) and not isinstance(wanted, bool) else str(wanted)
    kind, _, number = text.partition(":")
    if kind not in _PLATFORMS or (number and not number.isdecimal()):
        raise ConfigError(f'device {wanted!r} is unknown: expected "auto", "cpu", "cuda" or "cuda:0"')
    try:
        devices = jax.devices(_PLATFORMS[kind])
    except (RuntimeError, AssertionError):  # what JAX raises where a platform is not installed, or not there
        raise ConfigError(
            f"device {text} was asked for, and JAX has none: it sees {_names([default_device()])}. NVIDIA GPUs need "
            "the extra cuda13 or cuda12, and a driver"
        ) from None
    index = int(number or 0)
    if index >= len(devices):
        raise ConfigError(
            f"device {text} was asked for, and JAX sees {_names(devices)}: name one of these, or leave it out"
        )
    return devices[index]


def _names(devices: list[Any]) -> str:
    return ", ".join(f"{device_name(device)} ({device.device_kind})" for device in devices)


def device_name(device: Any) -> DeviceName:
    """The name PyTorch gives a device of JAX's."""
    return DeviceName("cpu", None) if device.platform == "cpu" else DeviceName("cuda", device.local_hardware_id or 0)


def inputs_device(device: Any) -> Any:
    """Where inputs for a device should be: `torch.device` if PyTorch is imported, else a `DeviceName`.

    Inputs are read on the host, so that a PyTorch without CUDA serves a model on a GPU from "cpu".
    """
    name, torch = device_name(device), sys.modules.get("torch")
    if torch is None:
        return name
    return torch.device(str(name) if name.type == "cpu" or torch.cuda.is_available() else "cpu")


def user_dtype(dtype: ComputeDtype) -> Any:
    """A compute type as PyTorch's type if that is imported, else as NumPy's."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return getattr(torch, dtype)
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
