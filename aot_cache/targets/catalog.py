"""The descriptions that are shipped: numbers of GPUs and of CUDA versions, put together by name.

`gpus/*.json` holds what NVIDIA's data sheets and CUDA programming guide say of a GPU, in bytes, GHz and units. A GPU
made otherwise than described (another memory size, say) still runs what is compiled for it, as long as its name and
compute capability are the same: the numbers steer XLA's choices only.

`toolkits/*.json` holds the CUDA and cuDNN versions that the plugin of the pinned JAX was built with. They are the least
that it, and so an executable, needs on the device's machine.
"""

import json
from importlib import resources
from pathlib import Path
from typing import Any

from aot_cache.target_config import Enum, Message, to_text
from aot_cache.targets.description import Description
from elastic_jax.errors import ExecutableError

_DEFAULT_TOOLKIT = "cuda13"

# The same for every GPU of compute capability 7.0 to 9.0 (CUDA programming guide, technical specifications).
_COMMON: Message = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49152,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 2**16 - 1,
    "block_dim_limit_z": 2**16 - 1,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "registers_per_core_limit": 2**16,
    "registers_per_block_limit": 2**16,
}

_FOLDER = resources.files(__name__.rpartition(".")[0])


def names() -> dict[str, str]:
    """What is shipped: name -> what it is, for people."""
    return {
        gpu if toolkit == _DEFAULT_TOOLKIT else f"{gpu}-{toolkit}": f"{_read('gpus', gpu)['title']}, {toolkit.upper()}"
        for gpu in _stems("gpus")
        for toolkit in sorted(_stems("toolkits"), reverse=True)
    }


def find(name: str) -> Description:
    """A shipped description by name, or one in a file that `elastic-jax dump-target` wrote.

    Raises:
        ExecutableError: there is none of that name, or the file is no description.
    """
    if name in names():
        gpu, _, toolkit = name.partition("-")
        return _description(name, _read("gpus", gpu), _read("toolkits", toolkit or _DEFAULT_TOOLKIT))
    if Path(name).suffix == ".json":
        return Description.read(Path(name))
    raise ExecutableError(
        f"no target is called {name!r}; there are {', '.join(names())}. For another GPU give the path of a .json file "
        "that `elastic-jax dump-target --out FILE` wrote on a machine that has it"
    )


def _description(name: str, gpu: dict[str, Any], toolkit: dict[str, Any]) -> Description:
    major, minor = (int(number) for number in gpu["compute_capability"].split("."))
    feature = "ACCELERATED_FEATURES" if gpu["architecture_specific"] else "NONE"
    config: Message = {
        "gpu_device_info": {
            **_COMMON,
            "cuda_compute_capability": {"major": major, "minor": minor, "feature_extension": Enum(feature)},
            "core_count": gpu["multiprocessors"],
            "fpus_per_core": gpu["float32_units_per_multiprocessor"],
            "clock_rate_ghz": gpu["clock_ghz"],
            "device_memory_size": gpu["memory_bytes"],
            "memory_bandwidth": gpu["memory_bytes_per_second"],
            "l2_cache_size": gpu["l2_bytes"],
            "threads_per_core_limit": gpu["threads_per_multiprocessor"],
            "shared_memory_per_core": gpu["shared_memory_per_multiprocessor"],
            "shared_memory_per_block_optin": gpu["shared_memory_per_block"],
            "driver_version": toolkit["cuda"],
            "runtime_version": toolkit["cuda"],
            "compile_time_toolkit_version": toolkit["cuda"],
            "dnn_version": toolkit["cudnn"],
            "name": gpu["device_kind"],
        },
        "platform_name": "CUDA",
        "device_description_str": gpu["device_kind"],
    }
    return Description(to_text(config), gpu["compiler_options"], source=f"target {name}")


def _stems(folder: str) -> list[str]:
    return sorted(Path(file.name).stem for file in _FOLDER.joinpath(folder).iterdir() if file.name.endswith(".json"))


def _read(folder: str, stem: str) -> dict[str, Any]:
    return json.loads(_FOLDER.joinpath(folder, f"{stem}.json").read_text())
