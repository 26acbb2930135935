"""Loading and verifying executable stores. Nothing here traces or compiles."""

import functools
import hashlib
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from aot_cache import payload
from aot_cache.identity import CompilerOptions, runtime_identity
from aot_cache.manifest import MANIFEST, Identity, Manifest, Memory, UnitRecord, blob_path, read_manifest
from aot_cache.mismatch import differences
from aot_cache.target import Device, Target
from aot_cache.trust import reasons_for_distrust
from aot_cache.unit import Properties
from elastic_jax.errors import ExecutableError, MismatchError, TrustError


class Executable:
    """A verified unit: called with its arrays positionally, it returns a flat tuple of arrays.

    Attributes:
        name: of the unit.
        memory: what a call needs, in bytes.
        properties: the unit's bucket facts.
    """

    __slots__ = ("_call", "_lock", "_open", "memory", "name", "properties")

    def __init__(
        self, name: str, opener: Callable[[], jax.stages.Compiled], memory: Memory, properties: Properties
    ) -> None:
        self.name = name
        self.memory = memory
        self.properties = properties
        self._open = opener
        self._call: jax.stages.Compiled | None = None
        self._lock = threading.Lock()

    def open(self) -> jax.stages.Compiled:
        """Hands the machine code to XLA, once; a call does it if nobody has.

        Raises:
            ExecutableError: XLA refuses it, or it holds a class that executables do not need.
        """
        with self._lock:
            compiled = self._open()
            self._open = lambda: compiled  # lets go of the file's bytes
            self._call = compiled
            return compiled

    def __call__(self, *arguments: Any) -> tuple[jax.Array, ...]:
        """Runs the unit; donated arguments are deleted.

        Raises:
            TypeError: an argument's shape or dtype is not what was compiled.
        """
        return (self._call or self.open())(*arguments)

    def __repr__(self) -> str:
        return f"Executable({self.name})"


def load(
    folder: Path,
    identity: Identity,
    device: Device,
    *,
    root: Path,
    units: Mapping[str, Properties] | None,
    trust: bool,
    workers: int,
    hint: str,
    preload: bool = True,
    compiler_options: CompilerOptions | None = None,
) -> dict[str, Executable]:
    """Loads executables on a device, several at once, after checking all there is to check.

    Args:
        folder: the store.
        identity: the caller's part of what must match (plan, config, sources, KV slots); the runtime's is added.
        device: the one device they are to run on.
        root: the checkpoint that the store is part of: the folders up to it must be the user's own.
        units: the wanted units, and the properties each must have; None for all, whatever theirs.
        trust: load the store even if somebody else may have written it.
        workers: threads.
        hint: a sentence that says how to compile, ending the messages.
        preload: hand all machine code to XLA now. Otherwise each unit's waits in memory, verified, for its first call:
            a short-lived process needs few of them, and on CPU opening one takes most of a second.
        compiler_options: the XLA options it must have been compiled with; None for any.

    Raises:
        ExecutableError: the store or a unit is missing, incomplete or damaged.
        MismatchError: it was made for something else; the message lists every difference.
        TrustError: somebody else may have written it, and `trust` is False.
    """
    manifest = check(folder, identity, device, hint=hint, compiler_options=compiler_options)
    records = _wanted(folder, manifest, units, hint=hint)
    paths = {name: blob_path(folder, name) for name in records}
    for name, record in records.items():
        _check_size(paths[name], record, hint=hint)
    if not trust:
        _check_trust(folder, [folder / MANIFEST, *paths.values()], root=root)

    def load_one(name: str) -> Executable:
        blob = _read_checked(paths[name], records[name], hint=hint)
        opener = functools.partial(payload.from_bytes, blob, device, source=str(paths[name]))
        executable = Executable(name, opener, records[name].memory, records[name].properties)
        if preload:
            executable.open()
        return executable

    with ThreadPoolExecutor(workers, thread_name_prefix="aot-load") as pool:
        return dict(zip(records, pool.map(load_one, records), strict=True))


def check(
    folder: Path, identity: Identity, device: Device, *, hint: str, compiler_options: CompilerOptions | None = None
) -> Manifest:
    """Checks that a store was made for what is here; its executables are not looked at. The arguments are `load`'s.

    XLA options decide how fast an executable is, not where it runs: those compiled without the device have other
    options than those tuned on it, and both serve.

    Raises:
        ExecutableError: there is no readable store.
        MismatchError: it was made for something else; the message lists every difference.
    """
    manifest = read_manifest(folder, hint=hint)
    current = full_identity(identity, Target.of(device), compiler_options or {})
    if compiler_options is None:
        current["compiler_options"] = manifest.identity.get("compiler_options", {})
    check_identity(folder, manifest, current, hint=hint)
    return manifest


def verify(folder: Path, *, identity: Identity | None = None) -> list[str]:
    """Checks a store without loading any executable; returns its problems, a sentence each.

    Args:
        folder: the store.
        identity: the full identity (`full_identity`) it should have; None to check the files alone.
    """
    try:
        manifest = read_manifest(folder, hint="")
    except ExecutableError as error:
        return [str(error).strip()]
    problems = differences(manifest.identity, identity) if identity is not None else []
    for name, record in manifest.units.items():
        try:
            _check_size(blob_path(folder, name), record, hint="")
            _read_checked(blob_path(folder, name), record, hint="")
        except ExecutableError as error:
            problems.append(str(error).strip())
    expected = {MANIFEST, *(blob_path(folder, name).name for name in manifest.units)}
    strangers = sorted(path.name for path in folder.iterdir() if path.name not in expected)
    if strangers:
        problems.append(f"{folder} holds files that its manifest does not name: {strangers}")
    return problems


def full_identity(identity: Identity, target: Target, compiler_options: CompilerOptions) -> dict[str, Any]:
    """The caller's identity and the runtime's together.

    Raises:
        ExecutableError: a key is in both.
    """
    runtime = runtime_identity(target, compiler_options)
    if clash := sorted(runtime.keys() & identity.keys()):
        raise ExecutableError(f"identity: the keys {clash} are the runtime's own, name yours otherwise")
    return runtime | dict(identity)


def check_identity(folder: Path, manifest: Manifest, current: Identity, *, hint: str) -> None:
    """Compares a store's identity with the current one.

    Raises:
        MismatchError: they differ; the message lists every difference with both values.
    """
    if lines := differences(manifest.identity, current):
        listing = "\n".join(f"  {line}" for line in lines)
        raise MismatchError(f"the executables at {folder} were compiled for something else:\n{listing}\n{hint}")


def _wanted(
    folder: Path, manifest: Manifest, units: Mapping[str, Properties] | None, *, hint: str
) -> dict[str, UnitRecord]:
    if units is None:
        return dict(manifest.units)
    if missing := sorted(units.keys() - manifest.units.keys()):
        raise ExecutableError(f"{folder} has no unit {_listed(missing)}; it has {_listed(manifest.units)}. {hint}")
    lines = [
        f"  unit {name}, {line}"
        for name, expected in units.items()
        for line in differences(manifest.units[name].properties, expected)
    ]
    if lines:
        raise MismatchError("\n".join([f"units at {folder} were compiled for other buckets:", *lines, hint]))
    return {name: manifest.units[name] for name in units}


def _check_trust(folder: Path, files: Collection[Path], *, root: Path) -> None:
    if reasons := reasons_for_distrust(folder, files, root=root):
        listing = "\n".join(f"  {reason}" for reason in reasons)
        raise TrustError(
            f"the executables at {folder} may have been written by somebody else, and loading them runs their code:\n"
            f"{listing}\nIf you know who made them, load with trust=True; otherwise delete them and compile your own."
        )


def _check_size(path: Path, record: UnitRecord, *, hint: str) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ExecutableError(f"{path} is in the manifest but cannot be read: {error.strerror}. {hint}") from None
    if size != record.size:
        raise ExecutableError(f"{path} has {size} bytes, the manifest says {record.size}: it was cut short. {hint}")


def _read_checked(path: Path, record: UnitRecord, *, hint: str) -> bytes:
    # What is hashed is what is loaded: the file is read once.
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise ExecutableError(f"{path} cannot be read: {error.strerror}. {hint}") from None
    found = hashlib.sha256(blob).hexdigest()
    if found != record.sha256:
        raise ExecutableError(
            f"{path} is damaged: its sha256 is {found[:16]}..., the manifest says {record.sha256[:16]}... {hint}"
        )
    return blob


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
