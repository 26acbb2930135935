"""Arrays of NumPy, JAX and PyTorch, told apart: what comes in decides what goes out.

Neither JAX nor PyTorch is imported for that; who passes one of their arrays has imported them. Between the libraries
arrays go through DLPack.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from elastic_jax.errors import RequestError

type Back = Callable[[np.ndarray], Any]
"""Turns a NumPy array into what the caller uses."""


class HostTensor(np.ndarray):
    """A NumPy array with the few methods of a torch tensor that examples call; `return_tensors="pt"` without PyTorch.

    It has one place to be, the host's memory, so that moving it returns it as it is.
    """

    def to(self, *_: Any, **__: Any) -> "HostTensor":
        """Itself; the model copies what it needs to its device."""
        return self

    def cpu(self) -> "HostTensor":
        """Itself."""
        return self

    def cuda(self) -> "HostTensor":
        """Itself; the model copies what it needs to its device."""
        return self

    def detach(self) -> "HostTensor":
        """Itself: there are no gradients."""
        return self

    def numpy(self) -> np.ndarray:
        """The same memory as a plain NumPy array."""
        return self.view(np.ndarray)


def is_torch(value: Any) -> bool:
    """Whether a value is a tensor of PyTorch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_jax(value: Any) -> bool:
    """Whether a value is an array of JAX."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(value, jax.Array)


def is_array(value: Any) -> bool:
    """Whether a value is an array of one of the three libraries."""
    return isinstance(value, np.ndarray) or is_jax(value) or is_torch(value)


def to_numpy(value: Any, name: str) -> np.ndarray:
    """The values of an array on the host.

    Raises:
        RequestError: it is no array of NumPy, JAX or PyTorch; `name` says which argument.
    """
    if is_torch(value):
        return np.from_dlpack(value.detach().cpu())
    if isinstance(value, np.ndarray) or is_jax(value):
        return np.asarray(value)
    raise RequestError(
        f"{name} must be an array of NumPy, JAX or PyTorch, found {type(value).__name__}; tokenizers give one with "
        'return_tensors="np" or "pt"'
    )


def like(value: Any) -> Back:
    """Makes arrays of the library of `value`, on its device: NumPy's, JAX's or PyTorch's."""
    if is_torch(value):
        torch, device = sys.modules["torch"], value.device
        return lambda array: torch.from_dlpack(_owned(array)).to(device)
    if is_jax(value):
        jax, devices = sys.modules["jax"], value.devices()
        device = next(iter(devices)) if len(devices) == 1 else None
        return lambda array: jax.device_put(_narrow(array), device)  # nothing is traced
    if isinstance(value, HostTensor):
        return lambda array: array.view(HostTensor)
    return lambda array: array


def _owned(array: np.ndarray) -> np.ndarray:
    """PyTorch takes only arrays that may be written to."""
    return array if array.flags.writeable and array.flags.c_contiguous else array.copy()


def _narrow(array: np.ndarray) -> np.ndarray:
    """Token ids as JAX holds them unless 64 bits are switched on."""
    return array.astype(np.int32) if array.dtype == np.int64 else array
