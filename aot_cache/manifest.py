"""The manifest of an executable store: what its executables were made for, and what each file must be."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aot_cache.unit import Properties, check_name
from elastic_jax.errors import ExecutableError

MANIFEST = "manifest.json"
FORMAT = 1
"""Version of the manifest and of the blobs. Anything that an older reader would misread increases it."""

type Identity = Mapping[str, Any]
"""Flat: name -> JSON value. Everything that must be the same when the executables are loaded."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """XLA's own analysis of one executable, in bytes.

    Attributes:
        arguments: buffers that the caller passes.
        outputs: buffers that are returned, those shared with donated arguments included.
        aliased: the part of `outputs` that reuses donated arguments.
        temporaries: workspace during a call.
        code: machine code and constants.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def workspace(self) -> int:
        """Bytes a call needs beyond its arguments."""
        return self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class UnitRecord:
    """One compiled unit.

    Attributes:
        size: of the file, in bytes.
        sha256: of the file, in hexadecimal digits.
        compile_seconds: wall time of tracing, lowering, compiling and serializing.
        properties: the unit's bucket facts.
        memory: what a call needs.
    """

    size: int
    sha256: str
    compile_seconds: float
    properties: Properties
    memory: Memory


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a store holds.

    Attributes:
        identity: what the executables were made for.
        units: the record of each unit by name.
    """

    identity: Identity
    units: Mapping[str, UnitRecord]

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON-ready values; `from_json` reads it back."""
        units = {name: dataclasses.asdict(record) for name, record in sorted(self.units.items())}
        return {"format": FORMAT, "identity": dict(sorted(self.identity.items())), "units": units}

    def to_bytes(self) -> bytes:
        """The manifest as it is written."""
        return (json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n").encode()

    @classmethod
    def from_json(cls, values: Any, *, source: str) -> "Manifest":
        """Reads what `to_json` wrote; `source` names the file in errors.

        Raises:
            ExecutableError: the format is another, or the values are not a manifest.
        """
        if not isinstance(values, dict) or not isinstance(values.get("format"), int):
            raise _malformed(source, "no format number")
        if values["format"] != FORMAT:
            raise ExecutableError(
                f"{source} has format {values['format']}, this version reads format {FORMAT}: "
                "compile again, or use the version that wrote it"
            )
        _check_keys(values, {"format", "identity", "units"}, source, "the manifest")
        if not isinstance(values["identity"], dict) or not isinstance(values["units"], dict):
            raise _malformed(source, "identity and units must be objects")
        units = {
            check_name(name, source=source): _read_record(record, source, f"unit {name}")
            for name, record in values["units"].items()
        }
        return cls(values["identity"], units)


def blob_path(folder: Path, name: str) -> Path:
    """The file of a unit."""
    return folder / f"{name}.xla"


def read_manifest(folder: Path, *, hint: str) -> Manifest:
    """Reads the manifest of a store; `hint` says how to compile one.

    Raises:
        ExecutableError: there is no store, no manifest, or not a readable one.
    """
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        if not folder.is_dir():
            raise ExecutableError(f"no compiled executables at {folder}. {hint}") from None
        raise ExecutableError(f"{folder} has no {MANIFEST}: it is not a complete executable store. {hint}") from None
    except OSError as error:
        raise ExecutableError(f"{path} cannot be read: {error.strerror}. {hint}") from None
    except ValueError as error:
        raise ExecutableError(f"{_malformed(str(path), str(error))}. {hint}") from None
    return Manifest.from_json(values, source=str(path))


def _read_record(values: Any, source: str, where: str) -> UnitRecord:
    _check_keys(values, {field.name for field in dataclasses.fields(UnitRecord)}, source, where)
    _check_keys(values["memory"], {field.name for field in dataclasses.fields(Memory)}, source, f"{where}, memory")
    sizes = {"size": values["size"]} | {f"memory.{key}": value for key, value in values["memory"].items()}
    for key, value in sizes.items():
        if type(value) is not int or value < 0:
            raise _malformed(source, f"{where}: {key} is {value!r}, not a number of bytes")
    if not isinstance(values["compile_seconds"], int | float):
        raise _malformed(source, f"{where}: compile_seconds is {values['compile_seconds']!r}")
    if not isinstance(values["sha256"], str) or not isinstance(values["properties"], dict):
        raise _malformed(source, f"{where}: sha256 must be a string and properties an object")
    return UnitRecord(
        values["size"],
        values["sha256"],
        float(values["compile_seconds"]),
        values["properties"],
        Memory(**values["memory"]),
    )


def _check_keys(values: Any, expected: set[str], source: str, where: str) -> None:
    if not isinstance(values, dict):
        raise _malformed(source, f"{where} is not an object")
    if set(values) != expected:
        missing, unknown = sorted(expected - set(values)), sorted(set(values) - expected)
        raise _malformed(source, f"{where}: missing keys {missing}, unknown keys {unknown}")


def _malformed(source: str, reason: str) -> ExecutableError:
    return ExecutableError(f"{source} is not a manifest: {reason}")
