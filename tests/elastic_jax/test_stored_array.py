import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from elastic_jax import checkpoint_io, stored_array
from elastic_jax.checkpoint_io import write_arrays
from elastic_jax.stored_array import DamagedArrayError, StoredArray

DTYPES = {"int8": np.int8, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def write(folder: Path, shape: tuple[int, ...], dtype: str = "bfloat16") -> np.ndarray:
    values = (np.random.default_rng(0).standard_normal(shape) * 30).astype(DTYPES[dtype])
    write_arrays(folder, {"values": values})
    return values


def opened(folder: Path, shape: tuple[int, ...], dtype: str = "bfloat16") -> StoredArray:
    return StoredArray.open(folder / "values", jax.ShapeDtypeStruct(shape, DTYPES[dtype]))


def edit(folder: Path, **changes: object) -> None:
    file = folder / "values" / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("piece_bytes", [1, 700, 1 << 20])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "cut"),
    # cut across lines, cut between lines, and not cut
    [((64, 256), True), ((256, 64), True), ((3, 1), False), ((16,), False)],
)
def test_the_same_is_read_as_orbax_reads(tmp_path, monkeypatch, shape, cut, dtype, piece_bytes):
    monkeypatch.setattr(checkpoint_io, "_CHUNK_BYTES", 5000)
    monkeypatch.setattr(stored_array, "_PIECE_BYTES", piece_bytes)
    values = write(tmp_path / "a", shape, dtype)
    array = opened(tmp_path / "a", shape, dtype)
    assert array.nbytes == values.nbytes
    assert (array.chunk != shape) == cut
    out = np.empty(shape, DTYPES[dtype])
    pieces = list(array.pieces())
    filled = np.zeros(shape, int)
    for piece in reversed(pieces):
        array.read(piece, out)
        filled[piece.place] += 1
    assert (filled == 1).all()
    np.testing.assert_array_equal(out, values)
    with ocp.PyTreeCheckpointer() as checkpointer:
        np.testing.assert_array_equal(out, checkpointer.restore(tmp_path / "a")["values"])


def test_large_arrays_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_array, "_PIECE_BYTES", 1000)
    write(tmp_path / "a", (64, 256))
    assert len(list(opened(tmp_path / "a", (64, 256)).pieces())) == 64


@pytest.mark.parametrize(
    "changes",
    [
        {"compressor": {"id": "zstd", "level": 1}},
        {"filters": [{"id": "delta"}]},
        {"order": "F"},
        {"zarr_format": 3},
        {"dimension_separator": "/"},
        {"chunks": [5, 8]},
        {"chunks": [0, 8]},
        {"chunks": [16]},
    ],
)
def test_a_layout_that_is_not_written_is_not_read(tmp_path, changes):
    write(tmp_path / "a", (16, 8))
    edit(tmp_path / "a", **changes)
    with pytest.raises(DamagedArrayError, match="a layout that elastic-jax does not write"):
        opened(tmp_path / "a", (16, 8))


def test_another_array_than_was_expected_is_described(tmp_path):
    write(tmp_path / "a", (16, 8))
    with pytest.raises(DamagedArrayError, match=r"a/values should be bfloat16\[8, 16\], found bfloat16\[16, 8\]"):
        opened(tmp_path / "a", (8, 16))
    with pytest.raises(DamagedArrayError, match=r"should be int8\[16, 8\]"):
        opened(tmp_path / "a", (16, 8), "int8")
    edit(tmp_path / "a", dtype=">f8")
    with pytest.raises(DamagedArrayError, match=r"found >f8\[16, 8\]"):
        opened(tmp_path / "a", (16, 8))


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_description_that_is_missing_or_unreadable_is_named(tmp_path, content):
    write(tmp_path / "a", (16, 8))
    file = tmp_path / "a" / "values" / ".zarray"
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(DamagedArrayError, match=r"values: its \.zarray cannot be read"):
        opened(tmp_path / "a", (16, 8))


def test_a_file_that_is_missing_or_cut_short_is_named(tmp_path):
    write(tmp_path / "a", (16, 8))
    array = opened(tmp_path / "a", (16, 8))
    (piece,) = array.pieces()
    out = np.empty((16, 8), ml_dtypes.bfloat16)
    piece.file.write_bytes(piece.file.read_bytes()[:100])
    with pytest.raises(DamagedArrayError, match=r"values/0\.0 ends after 100 bytes"):
        array.read(piece, out)
    piece.file.unlink()
    with pytest.raises(DamagedArrayError, match=r"values/0\.0 cannot be read: No such file"):
        array.read(piece, out)
