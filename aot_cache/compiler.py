"""Compiling units into an executable store, several at once."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
from jax._src import config as jax_config  # the thread-local form of the option below has no public name
from jax.sharding import SingleDeviceSharding

from aot_cache import payload
from aot_cache.identity import CompilerOptions
from aot_cache.manifest import MANIFEST, Identity, Manifest, Memory, UnitRecord, blob_path, read_manifest
from aot_cache.mismatch import differences
from aot_cache.process import storable_executables
from aot_cache.store import full_identity, verify
from aot_cache.target import Device, Target
from aot_cache.unit import Unit
from elastic_jax.errors import ExecutableError
from elastic_jax.system_errors import about

type Progress = Callable[[str, float | None, int, int], None]
"""Called with a unit's name, its seconds (None when it starts), how many units are done, and how many there are."""

_FOLDER_MODE, _FILE_MODE = 0o755, 0o644  # less what the umask takes: never writable by others

_MAX_CONSTANTS = 1 << 20
"""Bytes of arrays that a unit may close over: tables, not weights."""


def complete_store(
    units: Sequence[Unit],
    folder: Path,
    identity: Identity,
    device: Device,
    *,
    compiler_options: CompilerOptions | None = None,
) -> Manifest | None:
    """The manifest of a store that already holds exactly these units, undamaged, or None."""
    current = full_identity(identity, Target.of(device), compiler_options or {})
    if verify(folder, identity=current):
        return None
    manifest = read_manifest(folder, hint="")
    if manifest.units.keys() != {unit.name for unit in units}:
        return None
    if any(differences(manifest.units[unit.name].properties, unit.properties) for unit in units):
        return None
    return manifest


def compile_units(
    units: Sequence[Unit],
    folder: Path,
    identity: Identity,
    device: Device,
    *,
    workers: int,
    progress: Progress,
    compiler_options: CompilerOptions | None = None,
) -> Manifest:
    """Compiles units for a device and writes them as one store.

    A store that already holds them is kept, and `progress` is not called. Otherwise the store is written beside
    `folder` and renamed when it is complete: whenever this is interrupted, `folder` holds the old store or none.

    Args:
        units: what to compile.
        folder: the store to write; replaced if it holds something else.
        identity: the caller's part of what must match at load, JSON values by name.
        device: the one device the units run on.
        workers: units compiled at once; XLA uses several threads for each as well.
        progress: called from the compiling threads, one call at a time.
        compiler_options: XLA options for this compilation.

    Raises:
        ExecutableError: a unit cannot be compiled or stored, two have one name, or another process compiles here.
    """
    options = compiler_options or {}
    names = [unit.name for unit in units]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise ExecutableError(f"several units are called {', '.join(duplicates)}: give each its own name")
    existing = complete_store(units, folder, identity, device, compiler_options=options)
    if existing is not None:
        return existing
    _make_folder(folder.parent)
    with _partial_folder(folder) as partial, storable_executables():
        records = _compile_all(units, partial, device, options, workers, progress)
        manifest = Manifest(full_identity(identity, Target.of(device), options), records)
        _write(partial / MANIFEST, manifest.to_bytes())
        _sync_folder(partial)
        _replace_folder(partial, folder)
    return manifest


def _compile_all(
    units: Sequence[Unit],
    partial: Path,
    device: Device,
    options: CompilerOptions,
    workers: int,
    progress: Progress,
) -> dict[str, UnitRecord]:
    lock = threading.Lock()
    records: dict[str, UnitRecord] = {}

    def compile_one(unit: Unit) -> None:
        with lock:
            progress(unit.name, None, len(records), len(units))
        start = time.perf_counter()
        blob, memory = _compile(unit, device, options)
        seconds = time.perf_counter() - start
        _write(blob_path(partial, unit.name), blob)
        with lock:
            digest = hashlib.sha256(blob).hexdigest()
            records[unit.name] = UnitRecord(len(blob), digest, round(seconds, 3), dict(unit.properties), memory)
            progress(unit.name, seconds, len(records), len(units))

    pool = ThreadPoolExecutor(workers, thread_name_prefix="aot-compile")
    try:
        futures = [pool.submit(compile_one, unit) for unit in units]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return {unit.name: records[unit.name] for unit in units}


def _compile(unit: Unit, device: Device, options: CompilerOptions) -> tuple[bytes, Memory]:
    def function(*arguments: Any) -> tuple[Any, ...]:
        return unit.function(*arguments)

    # A new function each time: one that JAX has lowered before would bring the source locations of that time along.
    function.__name__ = function.__qualname__ = unit.name.replace(".", "_").replace("-", "_")
    here = SingleDeviceSharding(device)
    arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding or here) for a in unit.arguments]
    try:
        # Without frames no path of this machine enters the executable. Kernels ask the default device what they are
        # lowered for. Both are thread-local, as they should be.
        with jax_config.traceback_in_locations_limit(0), jax.default_device(device):
            traced = jax.jit(function, donate_argnums=unit.donate, keep_unused=True).trace(*arguments)
            _check_constants(unit.name, traced.jaxpr.consts)
            lowered = traced.lower()
            compiled = lowered.compile(compiler_options=dict(options))
    except ExecutableError:
        raise
    except Exception as error:
        raise ExecutableError(f"unit {unit.name} cannot be compiled: {type(error).__name__}: {error}") from error
    if not isinstance(lowered.out_info, tuple) or not jax.tree_util.all_leaves(lowered.out_info):
        raise ExecutableError(f"unit {unit.name} must return a flat tuple of arrays, not {compiled.out_tree}")
    return payload.to_bytes(compiled, name=unit.name), _memory(compiled, unit.name)


def _check_constants(name: str, constants: Iterable[Any]) -> None:
    # Weights that are closed over by mistake would be written into the executable, once for each unit.
    size = sum(getattr(constant, "nbytes", 0) for constant in constants)
    if size > _MAX_CONSTANTS:
        raise ExecutableError(f"unit {name} closes over {size} bytes of arrays: pass them as arguments")


def _memory(compiled: jax.stages.Compiled, name: str) -> Memory:
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise ExecutableError(
            f"unit {name}: XLA gives no memory analysis on this backend, so loading cannot be planned"
        )
    return Memory(
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes,
        aliased=analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
    )


@contextlib.contextmanager
def _partial_folder(folder: Path) -> Iterator[Path]:
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(_FOLDER_MODE, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        # The lock ends with the process that holds it, so what a killed one left is taken over.
        if not _try_lock(descriptor, partial):
            raise ExecutableError(f"another process is compiling {folder}: wait for it, or end it")
        _remove_files(partial)
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another process may have finished the folder and renamed it after it was opened here.
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _make_folder(folder: Path) -> None:
    # `parents=True` would give the folders between whatever mode the umask leaves.
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(_FOLDER_MODE, exist_ok=True)


def _remove_files(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _replace_folder(partial: Path, folder: Path) -> None:
    # A folder cannot be renamed over one that has files. Between the two renames there is no store, never half a one.
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    _sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write(path: Path, content: bytes) -> None:
    with about(path), os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _FILE_MODE), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
