"""Targets: what decides whether machine code made on one device runs on another."""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jax.experimental import topologies
from jaxlib import xla_client

from aot_cache import target_config
from elastic_jax.errors import ExecutableError

_FEATURES = re.compile(rb"[+-][a-z0-9_.-]+(?:,[+-][a-z0-9_.-]+)+")
_TRIPLE = re.compile(rb"(?:x86_64|aarch64|arm64|riscv64|powerpc64le|s390x)-[a-z0-9_.-]+")


@runtime_checkable
class Device(Protocol):
    """What is asked of a `jax.Device`, whose own class is opaque to type checkers."""

    platform: str
    device_kind: str
    id: int
    client: Any

    def __getattr__(self, name: str, /) -> Any:
        """Attributes of one platform: GPUs have `compute_capability`."""
        ...


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of device that executables are compiled for.

    Construction only records: `of` asks a device, `described` reads XLA's description of one that may be absent.

    Attributes:
        platform: JAX's name, `cpu` or `gpu`.
        device_kind: e.g. `NVIDIA H200`.
        facts: what else must fit, JSON values by name. CPU: `architecture` and `processor_features`. GPU:
            `compute_capability`, and the versions `cuda` and `cudnn`, which may be newer at load.
    """

    platform: str
    device_kind: str
    facts: Mapping[str, Any]

    @classmethod
    def of(cls, device: Device) -> "Target":
        """The target that a device is.

        Raises:
            ExecutableError: the device does not say what machine code it runs.
        """
        if device.platform == "cpu":
            return cls("cpu", device.device_kind, _processor_facts(device))
        if device.platform != "gpu":
            raise ExecutableError(f"{device} is of platform {device.platform}: only cpu and gpu are known")
        config = xla_client.get_topology_for_devices([device]).target_config
        return cls("gpu", device.device_kind, target_config.facts(config, source=str(device)))

    @classmethod
    def described(cls, config: str, *, source: str) -> "Target":
        """The target that XLA's description of a GPU is of (`aot_cache.target_config`); `source` is named in errors.

        Raises:
            ExecutableError: the description does not say enough.
        """
        kind = target_config.device_kind(config, source=source)
        return cls("gpu", kind, target_config.facts(config, source=source))

    @property
    def folder(self) -> str:
        """A folder name: `cpu-x86_64-3f2a91c0` (the digits stand for the features), `nvidia-h200-cuda13`."""
        if self.platform == "cpu":
            architecture = str(self.facts["architecture"])
            features = ",".join([architecture, *self.facts["processor_features"]])
            digest = hashlib.sha256(features.encode()).hexdigest()[:8]
            return f"cpu-{architecture.split('-')[0]}-{digest}"
        kind = re.sub(r"[^a-z0-9]+", "-", self.device_kind.lower()).strip("-")
        return f"{kind}-cuda{str(self.facts['cuda']).split('.')[0]}"

    def identity(self) -> dict[str, Any]:
        """The target's part of an executable's identity."""
        return {"platform": self.platform, "device_kind": self.device_kind, **self.facts}


def memory_bytes(device: Device) -> int:
    """Bytes of a GPU's memory, as XLA describes it: the GPU need not be there.

    Raises:
        ExecutableError: XLA does not say.
    """
    config = xla_client.get_topology_for_devices([device]).target_config
    return target_config.memory_bytes(config, source=str(device))


def _processor_facts(device: Device) -> dict[str, Any]:
    # XLA's own view of the host, the one it generates code for, on every operating system. It is reachable only as a
    # serialized protocol buffer (xla.CpuTopologyProto: triple, processor name, LLVM feature string).
    topology = topologies.TopologyDescription([device]).serialize()
    triple = _TRIPLE.search(topology)
    features = max(_FEATURES.findall(topology), key=len, default=None)
    if triple is None or features is None:
        raise ExecutableError(
            f"XLA does not say which processor {device} is, so its executables could not be told from those of "
            "another: use the jax version in uv.lock"
        )
    enabled = sorted(feature[1:] for feature in features.decode().split(",") if feature.startswith("+"))
    return {"architecture": triple.group().decode(), "processor_features": enabled}
