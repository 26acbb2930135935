import hashlib

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from elastic_jax import checkpoint_io
from elastic_jax.checkpoint_io import (
    describe_file,
    new_folder,
    write_arrays,
    write_file,
)


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    assert write_file(path, b"first").size == 5

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint_io.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_file(path, b"second")
    assert path.read_bytes() == b"first"


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()

    def fail() -> None:
        with new_folder(path) as partial:
            (partial / "new").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [entry.name for entry in path.iterdir()] == ["old"]
    with new_folder(path) as partial:
        assert list(partial.iterdir()) == []  # what the failure left is gone
        (partial / "new").touch()
    assert [entry.name for entry in path.iterdir()] == ["new"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_describe_file_reads_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_io, "_READ_BYTES", 7)
    content = bytes(range(100))
    (tmp_path / "file").write_bytes(content)
    described = describe_file(tmp_path / "file")
    assert (described.size, described.sha256) == (100, hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("shape", [(256, 64), (64, 256), (254, 64), (16,)])
def test_arrays_come_back_whatever_files_they_were_split_into(tmp_path, monkeypatch, shape):
    monkeypatch.setattr(checkpoint_io, "_CHUNK_BYTES", 5000)
    array = np.random.default_rng(0).standard_normal(shape, dtype=np.float32).astype(ml_dtypes.bfloat16)
    files = write_arrays(tmp_path / "a", {"values": array, "scales": np.ones((3, 1), np.float32)})
    with ocp.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.restore(tmp_path / "a")
    np.testing.assert_array_equal(found["values"], array)
    assert found["values"].dtype == ml_dtypes.bfloat16
    # 32 KiB in halves of at most 5000 bytes; 254 rows cannot be halved three times, and stay one file.
    chunks = [name for name in files if name.startswith("values/") and not name.endswith(".zarray")]
    assert len(chunks) == {256: 8, 64: 8, 254: 1, 16: 1}[shape[0]]


def test_equal_arrays_give_equal_files(tmp_path):
    arrays = {"values": np.arange(12, dtype=np.int8).reshape(3, 4), "scales": np.ones((3, 1), np.float32)}
    assert write_arrays(tmp_path / "a", arrays) == write_arrays(tmp_path / "b", arrays)
    assert (tmp_path / "a" / "_METADATA").read_bytes() == (tmp_path / "b" / "_METADATA").read_bytes()
