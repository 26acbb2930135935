"""Converts a source into an Elastic checkpoint: streaming by group, several at once, and able to continue.

What a kill leaves: folders of weights are written whole or not at all, and each finished one is recorded; elastic.json
comes last. Until it exists, the folder says that it is unfinished and how to finish.
"""

import hashlib
import importlib.metadata
import json
import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from converters.journal import Journal, Record, locked
from converters.locate import Location, locate
from converters.names import list_names
from converters.source import NonFiniteError, Source
from converters.units import Unit, conversion_units, folder_arrays, read_unit
from elastic_jax.checkpoint import Checkpoint, Progress
from elastic_jax.checkpoint_format import (
    JOURNAL,
    MANIFEST,
    PLANS,
    TOKENIZER,
    WEIGHTS,
    FolderName,
    Manifest,
    expected_folder,
)
from elastic_jax.checkpoint_io import PARTIAL, describe_folder, new_folder, sync, write_arrays, write_json
from elastic_jax.device import check_platform
from elastic_jax.errors import CheckpointError, ConversionError
from elastic_jax.plan import Precision, provisional_plans

_MEMORY_BYTES = 5 << 29
"""Arrays in memory at the same time; a group larger than this is converted alone."""

_SPARE_DISK_BYTES = 64 << 20

_TOOLS = ("elastic-jax", "jax", "orbax-checkpoint", "tensorstore", "numpy", "ml-dtypes", "gguf")
"""Whose versions could change what is written."""


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    only: Precision | None,
    overwrite: bool,
    revision: str | None,
    token: str | None,
    workers: int,
    progress: Progress | None,
) -> Checkpoint:
    """Makes an Elastic checkpoint, or finishes one whose conversion was interrupted.

    Args:
        source: a Hugging Face folder, a `.gguf` file, or a Hub id `owner/name`.
        destination: a new or empty folder, an unfinished conversion of the same source, or a complete checkpoint.
        only: stores the groups in this precision alone; modes that need the other are then refused. The embedding and
            the norms are always bfloat16.
        overwrite: replaces what `destination` holds. Without it a complete checkpoint of the same source and options
            is returned as it is, and `progress` is never called.
        revision: branch, tag or commit of a Hub id.
        token: of the Hub, for private repositories.
        workers: groups being read, quantized and written at the same time.
        progress: is told the bytes of the source read so far, and the group being read.

    Returns:
        The complete checkpoint, opened.

    Raises:
        ConversionError: the source cannot be converted, or the destination is not fit for it.
        ConfigError: the model is not implemented, or JAX cannot use the platform that it was told to use.
        CheckpointError: the destination holds a damaged checkpoint, and `overwrite` is false.
    """
    destination = Path(destination).absolute()
    _check_destination(destination)
    location = locate(source, revision=revision, token=token)
    if (destination / MANIFEST).is_file() and not overwrite:
        return _existing(destination, location, only)
    check_platform()  # Orbax asks JAX for its devices, in the middle of writing
    opened = location.open()
    units = list(conversion_units(opened.config, only))
    fingerprint = opened.fingerprint()
    destination.mkdir(parents=True, exist_ok=True)
    with locked(destination):
        if (destination / MANIFEST).is_file() and not overwrite:
            raise ConversionError(f"another process has just finished {destination}: run the same command again")
        versions = tool_versions()
        journal = Journal(destination)
        _check_space(destination, opened, units, journal, overwrite=overwrite)
        journal.begin(
            {"source fingerprint": fingerprint, "--only": only, **versions},
            _finish_command(opened, only),
            overwrite=overwrite,
        )
        _Run(opened, destination, journal, progress).run(units, workers)
        _finish(destination, opened, units, journal.finished(), fingerprint, versions)
        journal.end()
    return Checkpoint.open(destination)


def tool_versions() -> dict[str, str]:
    """The installed versions of everything that decides what is written."""
    return {tool: importlib.metadata.version(tool) for tool in _TOOLS}


class _Run:
    """Converts the units that are not finished yet, as many at once as memory and workers allow."""

    def __init__(self, source: Source, destination: Path, journal: Journal, progress: Progress | None) -> None:
        self._source, self._destination, self._journal, self._progress = source, destination, journal, progress
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._done = self._total = 0

    def run(self, units: list[Unit], workers: int) -> None:
        finished = self._journal.finished().keys()
        remaining = [unit for unit in units if not finished >= set(unit.folders)]
        self._total = sum(unit.input_bytes(self._source) for unit in units)
        self._done = self._total - sum(unit.input_bytes(self._source) for unit in remaining)
        in_flight: dict[Future[None], int] = {}
        errors: list[Exception] = []
        with ThreadPoolExecutor(max_workers=workers) as pool:
            try:
                for unit in remaining:
                    size = unit.memory_bytes(self._source)
                    while in_flight and (len(in_flight) >= workers or sum(in_flight.values()) + size > _MEMORY_BYTES):
                        errors += _collect(in_flight)
                    if errors:
                        break
                    missing = [folder for folder in unit.folders if folder not in finished]
                    in_flight[pool.submit(self._convert, unit, missing)] = size
                while in_flight:
                    errors += _collect(in_flight)
            except BaseException:
                self._stop.set()
                raise
        _raise_all(errors)

    def _convert(self, unit: Unit, folders: list[FolderName]) -> None:
        arrays, digests = read_unit(unit, self._source, lambda count: self._advance(count, unit.name))
        for folder in folders:
            path = self._destination / WEIGHTS / Path(*folder)
            try:
                files = write_arrays(path, folder_arrays(folder, arrays))
            except Exception as error:  # TensorStore raises ValueError for a full disk
                raise ConversionError(
                    f"{path} cannot be written: {error}; when that is solved, the same command continues"
                ) from error
            described = expected_folder(self._source.config, *folder, blocks=1, files=files)
            self._journal.add(folder, Record(described, digests))

    def _advance(self, count: int, name: str) -> None:
        if self._stop.is_set():
            raise ConversionError("the conversion was stopped")
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self._total, name)


def _collect(in_flight: dict[Future[None], int]) -> list[Exception]:
    """Waits for a unit; returns what went wrong with those that are done."""
    done, _ = wait(in_flight, return_when=FIRST_COMPLETED)
    errors = []
    for future in done:
        del in_flight[future]
        if (error := future.exception()) is not None:
            if not isinstance(error, Exception):
                raise error
            errors.append(error)
    return errors


def _raise_all(errors: list[Exception]) -> None:
    if others := [error for error in errors if not isinstance(error, NonFiniteError)]:
        raise others[0]
    if errors:
        names = [name for error in errors for name in str(error).split("; ")]
        raise ConversionError(
            f"weights should be finite in bfloat16, found {len(names)} that are not: {list_names(names)}"
        )


def _check_destination(destination: Path) -> None:
    if destination.exists() and not destination.is_dir():
        raise ConversionError(f"{destination} is a file: name a new folder for the checkpoint")
    if not destination.is_dir() or (destination / MANIFEST).is_file() or (destination / JOURNAL).is_file():
        return
    # A kill can leave the journal's first, partial write alone.
    if found := sorted(path.name for path in destination.iterdir() if path.name != JOURNAL + PARTIAL):
        raise ConversionError(
            f"{destination} is neither empty nor an Elastic checkpoint (it holds {list_names(found)}): "
            "name a new folder; nothing was changed"
        )


def _existing(destination: Path, location: Location, only: Precision | None) -> Checkpoint:
    """The complete checkpoint that is there, if it is what was asked for; a Hub source is not downloaded for that."""
    checkpoint = Checkpoint.open(destination)
    stored = checkpoint.manifest.source
    if location.commit is not None:
        same = (stored.get("repository"), stored.get("commit")) == (location.repository, location.commit)
    else:
        same = stored.get("fingerprint") == location.open().fingerprint()
    if not same:
        raise ConversionError(
            f"{destination} already holds a complete checkpoint, of another source: name another folder, or replace it "
            "with --overwrite"
        )
    wanted = {folder for unit in conversion_units(checkpoint.config, only) for folder in unit.folders}
    if set(checkpoint.manifest.folders) != wanted:
        raise ConversionError(
            f"{destination} already holds a complete checkpoint of this source, made with another --only: name another "
            "folder, or replace it with --overwrite"
        )
    with locked(destination):
        Journal(destination).end()
    return checkpoint


def _check_space(destination: Path, source: Source, units: list[Unit], journal: Journal, *, overwrite: bool) -> None:
    finished = {} if overwrite else journal.finished()
    kept = sum(record.folder.nbytes for record in finished.values())
    stored = sum(path.stat().st_size for path in (destination / WEIGHTS).rglob("*") if path.is_file())
    needed = sum(unit.output_bytes(source.config) for unit in units) - kept + _SPARE_DISK_BYTES
    free = shutil.disk_usage(destination).free + max(0, stored - kept)
    if needed > free:
        raise ConversionError(
            f"converting needs {needed / 1e9:.1f} GB at {destination}, but {free / 1e9:.1f} GB are free: free "
            f"{(needed - free) / 1e9:.1f} GB, name a folder on another disk, or store one precision alone with --only"
        )


def _finish_command(source: Source, only: Precision | None) -> dict[str, list[str]]:
    options = [] if only is None else ["--only", only]
    if source.repository is None:
        return {"arguments": [source.location], "options": options}
    return {"arguments": [source.repository], "options": [*options, "--revision", str(source.commit)]}


def _finish(
    destination: Path,
    source: Source,
    units: list[Unit],
    finished: Mapping[FolderName, Record],
    fingerprint: str,
    versions: Mapping[str, str],
) -> None:
    """Writes everything beside the weights, elastic.json last."""
    names = [folder for unit in units for folder in unit.folders]
    if lost := [folder for folder in names if folder not in finished]:
        raise CheckpointError(f"{destination}: finished folders have changed: {lost[:5]}; run the same command again")
    with new_folder(destination / TOKENIZER) as folder:
        for name, content in source.tokenizer.items():
            (folder / name).write_bytes(content)
        tokenizer = describe_folder(folder)
    with new_folder(destination / PLANS) as folder:
        for mode, plan in provisional_plans(source.config).items():
            write_json(folder / f"{mode}.json", plan.to_json())
    sha256: dict[str, str] = {}
    for record in finished.values():
        for part, digest in record.source_sha256.items():
            if sha256.setdefault(part, digest) != digest:
                raise ConversionError(f"{source.location} changed during the conversion ({part}): use --overwrite")
    weights = json.dumps({part: [source.tensors[part].encoding, digest] for part, digest in sorted(sha256.items())})
    description = source.describe() | {
        "fingerprint": fingerprint,
        "weights_sha256": hashlib.sha256(weights.encode()).hexdigest(),
    }
    folders = {name: finished[name].folder for name in names}
    for folder in (*(destination / WEIGHTS).iterdir(), destination / WEIGHTS):
        sync(folder)  # the names of folders outlive a power failure only once their parents are flushed
    manifest = Manifest(source.config, folders, tokenizer, description, versions)
    write_json(destination / MANIFEST, manifest.to_json())
