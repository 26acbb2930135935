"""Targets: what decides whether machine code made on one device runs on another."""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jax.experimental import topologies

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

    Construction only records: `of` asks a device, and a description of an absent device can be given instead.

    Attributes:
        platform: JAX's name, `cpu` or `gpu`.
        device_kind: e.g. `NVIDIA H200`.
        facts: what else must be equal, JSON values by name. CPU: `architecture` and `processor_features`. GPU:
            `compute_capability`, `cuda`, `cudnn`.
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
        facts = _processor_facts(device) if device.platform == "cpu" else _gpu_facts(device)
        return cls(device.platform, device.device_kind, facts)

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


def _gpu_facts(device: Device) -> dict[str, Any]:
    from jax._src.lib import cuda_versions  # absent from the CPU-only installation

    if cuda_versions is None:
        raise ExecutableError(f"{device} is a GPU, but JAX has no CUDA plugin: install elastic-jax[cuda13] or [cuda12]")
    cuda, cudnn = cuda_versions.cuda_runtime_get_version(), cuda_versions.cudnn_get_version()
    return {
        "compute_capability": str(device.compute_capability),
        "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
        "cudnn": str(cudnn),
    }
