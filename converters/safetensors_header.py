"""Reads the headers of safetensors files: where each tensor lies. The format: huggingface.co/docs/safetensors."""

import hashlib
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt8

from converters.names import list_names
from converters.source import Decode, SourceFile, SourceTensor
from elastic_jax.errors import ConversionError

_MAX_HEADER_BYTES = 100 << 20
_DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}


def read_header(path: Path) -> tuple[SourceFile, dict[str, SourceTensor]]:
    """Reads the header of one file, and checks it against the file's size.

    Raises:
        ConversionError: the file is missing, truncated or malformed.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise ConversionError(f"{path} is not a safetensors file, or is truncated: it has {size} bytes")
            header = file.read(length)
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        start = 8 + length
        tensors = {name: _tensor(name, path, start, entry) for name, entry in entries.items()}
        end = start + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror}; download it again") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{path} has a malformed safetensors header: {error!r}; download it again") from None
    if end != size:
        raise ConversionError(f"{path} should have {end} bytes, has {size}: it is truncated; download it again")
    return SourceFile(path.name, size, hashlib.sha256(header).hexdigest()), tensors


def _tensor(name: str, path: Path, start: int, entry: dict) -> SourceTensor:
    shape = tuple(int(size) for size in entry["shape"])
    first, last = entry["data_offsets"]
    dtype = _DTYPES.get(entry["dtype"])
    rows = shape[0] if len(shape) == 2 else 1
    if dtype is not None and last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name}: {last - first} bytes for {entry['dtype']}{list(shape)}")
    row_bytes = (last - first) // max(rows, 1)
    return SourceTensor(name, path, start + first, shape, entry["dtype"], row_bytes, _decoder(dtype), None)


def _decoder(dtype: np.dtype | None) -> Decode:
    def decode(block: UInt8[np.ndarray, "rows row_bytes"]) -> Float[np.ndarray, "rows columns"]:
        if dtype is None:
            raise ConversionError("a tensor of this type should have been refused")
        return block.view(dtype)

    return decode


def refuse_types(tensors: dict[str, SourceTensor], *, source: str) -> None:
    """Refuses tensors of types that are not plain floats.

    Raises:
        ConversionError: there are some; they are listed.
    """
    wrong = [f"{name} ({tensor.encoding})" for name, tensor in tensors.items() if tensor.encoding not in _DTYPES]
    if wrong:
        raise ConversionError(f"{source}: tensors should be {list(_DTYPES)}, found {len(wrong)}: {list_names(wrong)}")
