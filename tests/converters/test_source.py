import dataclasses

import ml_dtypes
import numpy as np
import pytest

from converters.safetensors_header import read_header
from converters.source import NonFiniteError, SourceTensor, merge_tensors, split_halves
from elastic_jax.errors import ConversionError


@pytest.fixture
def tensor(tmp_path):
    """Writes an array behind a few other bytes."""

    def write(array: np.ndarray, name: str = "weight") -> SourceTensor:
        path = tmp_path / f"{name}.bin"
        path.write_bytes(b"head" + array.tobytes())
        row_bytes = array.nbytes // (array.shape[0] if array.ndim == 2 else 1)
        return SourceTensor(
            name, path, 4, array.shape, str(array.dtype), row_bytes, lambda block: block.view(array.dtype), None
        )

    return write


def read(tensor: SourceTensor) -> np.ndarray:
    out = np.empty((tensor.rows, tensor.shape[-1]), ml_dtypes.bfloat16)
    tensor.read(out, lambda _: None)
    return out


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_reads_and_rounds_to_bfloat16(tensor, dtype):
    array = np.random.default_rng(0).standard_normal((2100, 1024), dtype=np.float32).astype(dtype)  # several blocks
    np.testing.assert_array_equal(read(tensor(array)), array.astype(ml_dtypes.bfloat16))


def test_a_vector_is_one_row(tensor):
    assert read(tensor(np.arange(5, dtype=np.float32))).tolist() == [[0, 1, 2, 3, 4]]


def test_progress_adds_up_to_the_bytes_of_the_file(tensor):
    array, counts = np.zeros((2100, 1024), np.float32), []
    tensor(array).read(np.empty(array.shape, ml_dtypes.bfloat16), counts.append)
    assert sum(counts) == array.nbytes
    assert len(counts) > 1


def test_digests_agree_and_depend_on_every_byte(tensor):
    array = np.zeros((4, 4), np.float32)
    first = tensor(array)
    out = np.empty(array.shape, ml_dtypes.bfloat16)
    assert first.read(out, lambda _: None) == first.sha256()
    array[3, 3] = 1
    assert tensor(array, "other").sha256() != first.sha256()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38])  # the last is finite in float32 alone
def test_what_is_not_finite_in_bfloat16_is_named_with_its_place(tensor, value):
    array = np.zeros((2100, 1024), np.float32)
    array[2050, 7] = value
    with pytest.raises(NonFiniteError, match=r"weight \[2050, 7\] is"):
        read(tensor(array))


def test_a_truncated_file_is_named(tensor):
    whole = tensor(np.zeros((4, 4), np.float32))
    longer = dataclasses.replace(whole, shape=(8, 4))
    with pytest.raises(ConversionError, match="ends inside weight"):
        read(longer)


def test_split_halves_turns_neighbours_into_halves():
    heads, head_dim, columns = 3, 8, 2
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((heads * head_dim, columns), dtype=np.float32).astype(ml_dtypes.bfloat16)
    # What llama.cpp does to Hugging Face's order: row i and row i + head_dim / 2 become neighbours.
    interleaved = np.empty_like(weight)
    for head in range(heads):
        for i in range(head_dim // 2):
            interleaved[head * head_dim + 2 * i] = weight[head * head_dim + i]
            interleaved[head * head_dim + 2 * i + 1] = weight[head * head_dim + i + head_dim // 2]
    np.testing.assert_array_equal(split_halves(interleaved, heads), weight)


def test_duplicates_in_two_files_are_named(tensor):
    one = tensor(np.zeros((1, 1), np.float32))
    with pytest.raises(ConversionError, match=r"stored twice: weight \(in weight\.bin and b\)"):
        merge_tensors({"a": {"weight": one}, "b": {"weight": one}})


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 8 + b"{}", (2).to_bytes(8, "little") + b"[]"])
def test_malformed_safetensors_are_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConversionError, match=r"model\.safetensors"):
        read_header(path)
