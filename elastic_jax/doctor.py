"""Looks at a machine: what generating needs, what is there, what is wrong, and the command that mends it.

Nothing here needs a working JAX: what cannot be imported is one of the findings. Nothing is downloaded or compiled.
"""

import dataclasses
import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

from elastic_jax import plugin_log
from elastic_jax.demo_model import CACHE_VARIABLE, default_cache
from elastic_jax.errors import ElasticError

type Status = Literal["ok", "note", "wrong"]
"""`wrong` keeps something from working that was set up to work; a `note` does not."""

_PACKAGES = ("elastic-jax", "jax", "jaxlib", "flax", "orbax-checkpoint", "transformers", "huggingface-hub", "numpy")
_PLUGINS = {"jax-cuda13-plugin": "cuda13", "jax-cuda12-plugin": "cuda12"}
_LEAST_DRIVER = {"cuda13": 580, "cuda12": 525}
"""Major versions of NVIDIA's driver (CUDA release notes, table of minor version compatibility)."""

_NO_GPU = "install NVIDIA's driver if there is a GPU; if there is none, JAX_PLATFORMS=cpu asks for the CPU"

_LITTLE_DISK = 2 << 30


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what.
        status: whether it is as it should be.
        found: what is there.
        mend: a command, or what to do; None where nothing need be done.
    """

    name: str
    status: Status
    found: str
    mend: str | None = None


def examine(checkpoint: Path | None) -> list[Finding]:
    """Everything that is looked at, in the order in which one thing needs another.

    Args:
        checkpoint: an Elastic checkpoint whose modes are looked at too.
    """
    driver = _nvidia_driver()
    works, device = _device(driver)  # first: whether plugins start is known when JAX has looked for devices
    findings = [_python(), *_packages(), _driver(driver), *_plugins(driver)]
    findings += [device, _disk("cache", default_cache(), CACHE_VARIABLE), _hub()]
    if works:
        findings += [_memory(), _kernels()]
        if checkpoint is not None:
            findings += _checkpoint(checkpoint)
    return findings


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    found = f"{platform.python_version()}, {sys.executable}"
    return Finding("python", "ok", found)


def _packages() -> list[Finding]:
    versions = {name: _version(name) for name in _PACKAGES}
    missing = [name for name, version in versions.items() if version is None]
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    if missing:
        return [Finding("packages", "wrong", f"missing: {', '.join(missing)}; {found}", "pip install elastic-jax")]
    jax, jaxlib = versions["jax"], versions["jaxlib"]
    if jax != jaxlib:
        return [Finding("packages", "wrong", f"jax {jax} with jaxlib {jaxlib}", f"pip install jax=={jax}")]
    return [Finding("packages", "ok", found)]


def _nvidia_driver() -> tuple[str, str] | None:
    """Name of the first GPU and version of the driver; None where the driver names no GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    first = done.stdout.strip().partition("\n")[0]
    name, comma, version = first.rpartition(",")
    return (name.strip(), version.strip()) if done.returncode == 0 and comma else None


def _driver(driver: tuple[str, str] | None) -> Finding:
    if driver is None:
        return Finding("driver", "ok", "no NVIDIA GPU (nvidia-smi is absent, or names none)")
    return Finding("driver", "ok", f"{driver[0]}, driver {driver[1]}")


def _plugins(driver: tuple[str, str] | None) -> list[Finding]:
    installed = {name: version for name in _PLUGINS if (version := _version(name))}
    if not installed:
        if driver is None:
            if plugin_log.failures():
                return [Finding("plugin", "note", f"no GPU is seen{_failures()}", _NO_GPU)]
            return [Finding("plugin", "ok", "none: JAX runs on the CPU")]
        extra = "cuda13" if _major(driver[1]) >= _LEAST_DRIVER["cuda13"] else "cuda12"
        found = f"none, though there is a GPU ({driver[0]}): JAX runs on the CPU"
        return [Finding("plugin", "wrong", found, f"pip install 'elastic-jax[{extra}]'")]
    findings = []
    for name, version in installed.items():
        found, extra = f"{name} {version}", _PLUGINS[name]
        if version != _version("jaxlib"):
            mend = f"pip install 'jax[{extra}]=={_version('jax')}'"
            findings.append(Finding("plugin", "wrong", f"{found} with jaxlib {_version('jaxlib')}", mend))
        elif driver is None:
            findings.append(Finding("plugin", "note", f"{found}, but no GPU is seen{_failures()}", _NO_GPU))
        elif _major(driver[1]) < (least := _LEAST_DRIVER[extra]):
            mend = f"install NVIDIA driver {least} or later" + (
                ", or: pip uninstall -y jax-cuda13-plugin jax-cuda13-pjrt && pip install 'elastic-jax[cuda12]'"
                if extra == "cuda13"
                else ""
            )
            findings.append(Finding("plugin", "wrong", f"{found} needs driver {least}, found {driver[1]}", mend))
        else:
            findings.append(Finding("plugin", "ok", found))
    return findings


def _failures() -> str:
    return "".join(f"; {failure}" for failure in plugin_log.failures())


def _major(version: str) -> int:
    digits = version.partition(".")[0]
    return int(digits) if digits.isdecimal() else 0


def _device(driver: tuple[str, str] | None) -> tuple[bool, Finding]:
    """Whether JAX works, and what it uses."""
    try:
        device = importlib.import_module("elastic_jax.device").default_device()
    except ElasticError as error:
        chosen = os.environ.get("JAX_PLATFORMS")
        return False, Finding("device", "wrong", str(error), "unset JAX_PLATFORMS" if chosen else None)
    except Exception as error:  # whatever an installation that is not whole raises
        reinstall = "pip install --force-reinstall elastic-jax"
        return False, Finding("device", "wrong", f"JAX cannot be imported: {type(error).__name__}: {error}", reinstall)
    found = f"{device.device_kind} ({device.platform})"
    plugin = any(_version(name) for name in _PLUGINS)
    if driver is not None and plugin and device.platform == "cpu":
        chosen = os.environ.get("JAX_PLATFORMS")
        mend = "unset JAX_PLATFORMS" if chosen else "JAX_PLATFORMS=cuda python -c 'import jax; jax.devices()' says why"
        return True, Finding("device", "wrong", f"{found}, though there is a GPU: {driver[0]}{_failures()}", mend)
    return True, Finding("device", "ok", found)


def _memory() -> Finding:
    from elastic_jax.device import default_device
    from elastic_jax.memory import available_memory, gib

    available = available_memory(default_device())
    return Finding("memory", "ok", "the device does not say" if available is None else f"{gib(available)} free")


def _kernels() -> Finding:
    from elastic_jax.device import default_device

    if default_device().platform == "cpu":
        return Finding("kernels", "ok", "attention and dot: xla (Pallas's are for GPUs)")
    try:
        importlib.import_module("elastic_jax.kernels.attention_pallas")
        importlib.import_module("elastic_jax.kernels.integer_dot_pallas")
    except ImportError as error:
        return Finding("kernels", "wrong", f"Pallas cannot be imported: {error}", "pip install --force-reinstall jax")
    return Finding("kernels", "ok", "attention and dot: pallas, where the model's sizes allow")


def _disk(name: str, folder: Path, variable: str) -> Finding:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    found = f"{folder}, {free / 1e9:.1f} GB free"
    elsewhere = f"export {variable}=FOLDER   (one that you may write to)"
    if not existing.is_dir():
        return Finding(name, "wrong", f"{existing} is no folder", elsewhere)
    if not os.access(existing, os.W_OK):
        return Finding(name, "wrong", f"{found}, but it cannot be written to", elsewhere)
    if free < _LITTLE_DISK:
        return Finding(name, "note", found, f"free some space, or {elsewhere}")
    return Finding(name, "ok", found)


def _hub() -> Finding:
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    token = "a token in HF_TOKEN" if os.environ.get("HF_TOKEN") else "no token in HF_TOKEN"
    if offline:
        return Finding("hub", "note", f"offline (HF_HUB_OFFLINE): only the Hub's cache serves; {token}")
    return Finding("hub", "ok", f"not asked; {token}")


def _checkpoint(path: Path) -> list[Finding]:
    """Whether each stored mode can be loaded here, judged by its manifests; nothing is loaded."""
    from elastic_jax.checkpoint import Checkpoint
    from elastic_jax.device import default_device
    from elastic_jax.executables import ModeStore
    from elastic_jax.pools import choose_pool

    try:
        opened = Checkpoint.open(path)
    except ElasticError as error:
        return [Finding("checkpoint", "wrong", str(error), f"convert-weights SOURCE {path}")]
    findings = [Finding("checkpoint", "ok", str(path))]
    for plan in opened.stored_plans():
        store = ModeStore(opened, plan, "bfloat16", default_device())
        try:
            pool = choose_pool(store, kv_slots=None, max_context=None, say=lambda _: None)
        except ElasticError as error:
            absent = not store.pools
            found = "not compiled for this device" if absent else str(error)
            findings.append(Finding(f"mode {plan.name}", "note" if absent else "wrong", found, store.compile_command()))
            continue
        found = f"can be loaded, KV pool of {pool.step.kv_slots} tokens"
        findings.append(Finding(f"mode {plan.name}", "ok", found))
    return findings
