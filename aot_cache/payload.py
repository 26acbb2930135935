"""What is inside a blob: one executable for one device, pickled by us and unpickled through an allow-list.

The layout follows `jax.experimental.serialize_executable`: XLA's executable as opaque bytes, and JAX's description of
its arguments and results beside it. Two things differ. Nothing but the classes of that description can be unpickled;
and the trees of arguments and results are not stored, because every unit takes and returns a flat tuple.
"""

import dataclasses
import io
import pickle
import types
from typing import Any

import jax
import numpy as np
from jax._src.interpreters import pxla  # no public name for the class whose instances are stored
from jaxlib import xla_client

from aot_cache.target import Device
from elastic_jax.errors import ExecutableError

_ALLOWED = frozenset(
    {
        ("jax", "P"),
        ("jax._src.core", "ManualAxisType"),
        ("jax._src.core", "MemorySpace"),
        ("jax._src.core", "ShapedArray"),
        ("jax._src.interpreters.pxla", "AllArgsInfo"),
        ("jax._src.interpreters.pxla", "UnloadedMeshExecutable"),
        ("jax._src.layout", "AutoLayoutSingleton"),
        ("jax._src.layout", "Layout"),
        ("jax._src.linear_util", "DebugInfo"),
        ("jax._src.mesh", "AbstractMesh"),
        ("jax._src.named_sharding", "_unpickle_named_sharding"),
        ("jax._src.sharding_impls", "_unpickle_single_device_sharding"),
        ("jax._src.stages", "ArgInfo"),
        ("jaxlib._jax", "DeviceList"),
        ("ml_dtypes", "bfloat16"),
        ("ml_dtypes", "int4"),
        ("ml_dtypes", "uint4"),
        ("numpy", "dtype"),
    }
)
"""Module and name of everything a blob may refer to, found by pickling executables of the pinned JAX version."""

_EXECUTABLE, _DEVICE, _CLIENT = "executable", "device", "client"


def to_bytes(compiled: jax.stages.Compiled, *, name: str) -> bytes:
    """Serializes a compiled function of flat arguments and results.

    Raises:
        ExecutableError: the backend cannot serialize it, it closes over arrays, spans several devices, or has arguments
            of a type that could not be loaded.
    """
    unloaded = getattr(compiled._executable, "_unloaded_executable", None)
    if not isinstance(unloaded, pxla.UnloadedMeshExecutable):
        raise ExecutableError(f"unit {name}: this JAX backend cannot serialize executables")
    if compiled._params.const_args or (unloaded.mut is not None and unloaded.mut.in_mut):
        raise ExecutableError(f"unit {name} closes over arrays: pass them as arguments, they cannot be stored")
    if len(unloaded.device_list) != 1:
        raise ExecutableError(f"unit {name} spans {len(unloaded.device_list)} devices: only one is implemented")
    arguments = jax.tree.leaves(compiled.args_info)
    buffer = io.BytesIO()
    _Pickler(buffer, name, unloaded.device_list[0].id).dump((_without_source(unloaded, name), arguments))
    return buffer.getvalue()


def from_bytes(blob: bytes, device: Device, *, source: str) -> jax.stages.Compiled:
    """Loads what `to_bytes` returned on a device; `source` names the file in errors.

    Loading native code is executing it: check where the bytes come from first.

    Raises:
        ExecutableError: the blob refers to a class that executables do not need, or XLA refuses it.
    """
    try:
        unloaded, arguments = _Unpickler(blob, device, source).load()
        executable = unloaded.load()
    except ExecutableError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        raise ExecutableError(f"{source} cannot be loaded on {device}: {type(error).__name__}: {error}") from error
    takes = jax.tree.structure((tuple(range(len(arguments))), {}))
    returns = jax.tree.structure(tuple(range(len(unloaded.output_avals))))
    return jax.stages.Compiled(executable, [], takes.unflatten(arguments), returns, no_kwargs=True)


def _without_source(unloaded: pxla.UnloadedMeshExecutable, name: str) -> pxla.UnloadedMeshExecutable:
    info = unloaded.all_args_info
    if info is None:
        return unloaded
    # `func_src_info` is the path and line of the Python function.
    debug_info = info.debug_info._replace(func_src_info=name)
    return dataclasses.replace(unloaded, all_args_info=info._replace(debug_info=debug_info))


class _Pickler(pickle.Pickler):
    def __init__(self, buffer: io.BytesIO, name: str, compiled_on: int) -> None:
        super().__init__(buffer, protocol=5)
        self._name = name
        self._compiled_on = compiled_on

    def reducer_override(self, obj: Any) -> Any:
        # Better refused here than after the compilation, when it is loaded.
        if isinstance(obj, type | types.FunctionType) and (obj.__module__, obj.__qualname__) not in _ALLOWED:
            raise ExecutableError(
                f"unit {self._name}: its arguments or results need {obj.__module__}.{obj.__qualname__}, which is not "
                "among what may be stored. Pass plain arrays (for a random key its `jax.random.key_data`)"
            )
        return NotImplemented

    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        if isinstance(obj, xla_client.LoadedExecutable):
            return _EXECUTABLE, self._compiled_on, obj.serialize()
        if isinstance(obj, xla_client.Executable):  # compiled for an absent device
            return _EXECUTABLE, self._compiled_on, obj.serialize()
        if isinstance(obj, xla_client.Device):
            return (_DEVICE,)
        if isinstance(obj, xla_client.Client):
            return (_CLIENT,)
        return None


class _Unpickler(pickle.Unpickler):
    def __init__(self, blob: bytes, device: Device, source: str) -> None:
        super().__init__(io.BytesIO(blob))
        self._device = device
        self._source = source

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) not in _ALLOWED:
            raise ExecutableError(
                f"{self._source} refers to {module_name}.{global_name}, which no executable needs: it was not written "
                "by this program, or by another version of JAX. Do not use it: delete it and compile again"
            )
        return super().find_class(module_name, global_name)

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case (str(kind), int(compiled_on), bytes(serialized)) if kind == _EXECUTABLE:
                return _load_executable(serialized, self._device, compiled_on)
            case (str(kind),) if kind == _DEVICE:
                return self._device
            case (str(kind),) if kind == _CLIENT:
                return self._device.client
        raise ExecutableError(f"{self._source} is damaged: it holds an unknown object")


def _load_executable(serialized: bytes, device: Device, compiled_on: int) -> Any:
    devices = xla_client.DeviceList((device,))
    if device.id == compiled_on:
        return device.client.deserialize_executable(serialized, executable_devices=devices)
    # XLA's bytes name the device's number, whatever `executable_devices` says.
    options = xla_client.CompileOptions()
    options.device_assignment = xla_client.DeviceAssignment.create(np.array([[device.id]]))
    return device.client.deserialize_executable(serialized, executable_devices=devices, compile_options=options)
