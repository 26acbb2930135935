"""A description of a GPU: XLA's own, and the choices that tuning on the device would make."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from jaxlib import xla_client

from aot_cache import target_config
from aot_cache.identity import CompilerOptions
from aot_cache.target import Device, Target
from elastic_jax.errors import ExecutableError

FORMAT = 1
"""Version of the files that `dump` writes."""

UNTUNED: CompilerOptions = {"xla_gpu_enable_triton_gemm": False}
"""XLA options for compiling without the device. Nothing is tuned then, and Triton's untuned tiles are a seventh as fast
as cuBLASLt, which chooses among its kernels when it runs. In int8 modes they also gave wrong logits on an H200 (jax
0.11.2)."""

_FIELDS = {"format", "target_config", "compiler_options"}


@dataclasses.dataclass(frozen=True)
class Description:
    """Enough about a GPU to compile for it.

    Attributes:
        config: XLA's description as text (`aot_cache.target_config`).
        compiler_options: XLA options for compiling without the device.
        source: where it comes from, for errors.
    """

    config: str
    compiler_options: CompilerOptions
    source: str

    @property
    def target(self) -> Target:
        """The target that is described.

        Raises:
            ExecutableError: the description does not say enough.
        """
        return Target.described(self.config, source=self.source)

    @classmethod
    def of(cls, device: Device) -> "Description":
        """What XLA says about a GPU at hand.

        Raises:
            ExecutableError: the device is no GPU.
        """
        if device.platform != "gpu":
            raise ExecutableError(
                f"{device} is not a GPU: only GPUs are described, since any processor compiles for itself"
            )
        config = xla_client.get_topology_for_devices([device]).target_config
        return cls(config, UNTUNED, source=str(device))

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values; `read` reads them back."""
        return {
            "format": FORMAT,
            "compiler_options": dict(self.compiler_options),
            "target_config": self.config.splitlines(),
        }

    @classmethod
    def read(cls, path: Path) -> "Description":
        """Reads a file of `to_json`'s values.

        Raises:
            ExecutableError: there is no such file, or it is no description.
        """
        try:
            values = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ExecutableError(f"{path} is not a readable GPU description: {error}") from None
        if not isinstance(values, dict) or values.keys() != _FIELDS or values["format"] != FORMAT:
            raise ExecutableError(
                f"{path} is not a GPU description of this version: expected format {FORMAT} with the keys "
                f"{sorted(_FIELDS)}; `elastic-jax dump-target` on a machine with the GPU writes one"
            )
        lines, options = values["target_config"], values["compiler_options"]
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise ExecutableError(f"{path}: target_config must be a list of lines")
        if not isinstance(options, dict) or not all(isinstance(v, bool | int | float | str) for v in options.values()):
            raise ExecutableError(f"{path}: compiler_options must be an object of booleans, numbers and strings")
        description = cls("\n".join(lines) + "\n", options, source=str(path))
        target_config.facts(description.config, source=description.source)
        return description
