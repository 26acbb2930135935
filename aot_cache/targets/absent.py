"""A device to compile for that is not there."""

import importlib.util
import shutil
from pathlib import Path

from jax._src import lib  # where JAX found the CUDA tools has no public name
from jax.experimental import topologies

from aot_cache.target import Device
from aot_cache.targets.description import Description
from elastic_jax.errors import ExecutableError

_HOST = 'triple: "x86_64-unknown-linux-gnu" cpu: "x86-64"'
"""The least processor beside the GPU. XLA would write this machine's into every executable instead."""


def absent_device(description: Description) -> Device:
    """A device that programs can be compiled for, and nothing else.

    JAX sets its CUDA plugin up when it first looks for devices, and gives up on it where there is no driver. So in a
    process that compiles for an absent GPU, set JAX's platform to `cpu` first (`JAX_PLATFORMS=cpu`).

    Raises:
        ExecutableError: what compiling for CUDA needs is not installed or not set up, or the description is no good.
    """
    target = description.target
    _check_installed(target.device_kind, target.facts["cuda"].split(".")[0])
    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            target_config=description.config,
            host_target_machine_options=_HOST,
            topology="1x1x1",
        )
    except NotImplementedError:
        raise ExecutableError(
            f"compiling for {target.device_kind}: JAX has not set up its CUDA plugin, which it refuses to do without a "
            "driver unless its platform is the CPU. Set JAX_PLATFORMS=cpu and start again"
        ) from None
    except Exception as error:
        raise ExecutableError(f"{description.source}: XLA does not accept this description: {error}") from error
    (device,) = topology.devices
    return device


def _check_installed(device_kind: str, cuda: str) -> None:
    purpose = f"compiling for {device_kind} with CUDA {cuda}"
    install = f"install elastic-jax[cuda{cuda}] on Linux (no GPU or driver is needed)"
    if not _is_installed(f"jax_plugins.xla_cuda{cuda}"):
        others = [other for other in ("12", "13") if other != cuda and _is_installed(f"jax_plugins.xla_cuda{other}")]
        found = f"; the one for CUDA {others[0]} is, and the two exclude each other" if others else ""
        raise ExecutableError(f"{purpose} needs JAX's plugin for CUDA {cuda}, which is not installed{found}: {install}")
    if lib.cuda_path is None and shutil.which("ptxas") is None:
        raise ExecutableError(f"{purpose} needs NVIDIA's assembler, ptxas, which is not installed: {install}")
    if lib.cuda_path is not None and not (Path(lib.cuda_path) / "bin" / "ptxas").exists():
        raise ExecutableError(f"{purpose} needs NVIDIA's assembler, ptxas, and {lib.cuda_path} has none: {install}")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False
