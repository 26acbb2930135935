"""The software's part of an executable's identity: versions, flags, options and sources."""

import hashlib
import importlib.metadata
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jaxlib.version

from aot_cache.manifest import FORMAT
from aot_cache.target import Target
from elastic_jax.errors import ExecutableError

type CompilerOptions = Mapping[str, bool | int | float | str]

_PLUGINS = ("jax-cuda{}-plugin", "jax-cuda{}-pjrt")
_FLAG_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_WITHOUT_EFFECT = re.compile(r"--xla_(force_host_platform_device_count|dump_\w+|gpu_cuda_data_dir)(=|$)")
_JAX_OPTIONS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable")


def runtime_identity(target: Target, compiler_options: CompilerOptions) -> dict[str, Any]:
    """Everything outside the model that an executable depends on, as a flat mapping of JSON values.

    Args:
        target: the device it is compiled for.
        compiler_options: XLA options of this compilation, beside those of the environment.
    """
    return target.identity() | {
        "format": FORMAT,
        "package": importlib.metadata.version("elastic-jax"),
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "plugins": _plugin_versions(target),
        "xla_flags": _xla_flags(),
        "compiler_options": {name: compiler_options[name] for name in sorted(compiler_options)},
        "jax_options": {name: getattr(jax.config, name) for name in _JAX_OPTIONS},
    }


def source_digest(files: Iterable[Path], *, relative_to: Path) -> str:
    """sha256 over files, their names below `relative_to` and contents, in hexadecimal digits.

    Where the package is installed makes no difference.

    Raises:
        ExecutableError: a file is not below `relative_to`, or cannot be read.
    """
    digest = hashlib.sha256()
    try:
        contents = {path.relative_to(relative_to).as_posix(): path.read_bytes() for path in files}
    except (ValueError, OSError) as error:
        raise ExecutableError(f"the sources that executables depend on cannot be hashed: {error}") from None
    for name, content in sorted(contents.items()):
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _plugin_versions(target: Target) -> dict[str, str]:
    if target.platform == "cpu":
        return {}
    major = str(target.facts["cuda"]).split(".")[0]
    versions = {}
    for name in (plugin.format(major) for plugin in _PLUGINS):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _xla_flags() -> list[str]:
    flags = [flag for variable in _FLAG_VARIABLES for flag in os.environ.get(variable, "").split()]
    return sorted({_without_path(flag) for flag in flags if not _WITHOUT_EFFECT.match(flag)})


def _without_path(flag: str) -> str:
    # A manifest may be published; a path in it would tell where it was built, and differ on the next machine anyway.
    name, equals, value = flag.partition("=")
    if os.sep not in value:
        return flag
    return f"{name}{equals}path:{hashlib.sha256(value.encode()).hexdigest()[:8]}"
