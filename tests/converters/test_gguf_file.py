import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import dequantize, quantize

from converters.gguf_file import TYPES, open_gguf
from converters.names import PARTS
from elastic_jax.config import ModelConfig
from elastic_jax.errors import ConfigError, ConversionError

# Rows of 256, which K-quants need.
MODEL = ModelConfig(
    vocab_size=40,
    hidden_size=256,
    intermediate_size=512,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_ids=(2, 3),
    pad_token_id=0,
)


def random_bytes(rows: int, columns: int, kind: GGMLQuantizationType, rng: np.random.Generator) -> np.ndarray:
    """Encoded rows. K-quants can be read but not written by the gguf package, so they are made of random bytes."""
    values = rng.standard_normal((rows, columns), dtype=np.float32)
    try:
        return quantize(values, kind)
    except NotImplementedError:
        from gguf.constants import GGML_QUANT_SIZES

        block, size = GGML_QUANT_SIZES[kind]
        encoded = rng.integers(0, 256, (rows, columns // block, size), np.uint8)
        scale = np.float16(0.01).tobytes()
        if kind.name == "Q6_K":
            encoded[..., -2:] = np.frombuffer(scale, np.uint8)
        else:
            encoded[..., :4] = np.frombuffer(2 * scale, np.uint8)
        return encoded.reshape(rows, -1)


@dataclasses.dataclass
class File:
    """A GGUF file about to be written; tests change it."""

    metadata: dict[str, Any]
    tensors: dict[str, tuple[np.ndarray, GGMLQuantizationType]]
    architecture: str = "llama"

    def write(self, path: Path) -> Path:
        writer = GGUFWriter(path, self.architecture)
        for key, value in self.metadata.items():
            if isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            else:
                writer.add_array(key, value)
        for name, (data, kind) in self.tensors.items():
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


@pytest.fixture
def file(request) -> File:
    """The file of MODEL with matrices of the type the test names (F32 unless it does)."""
    kind = GGMLQuantizationType[getattr(request, "param", "F32")]
    rng = np.random.default_rng(0)
    tensors = {}
    for part in PARTS:
        shape = part.shape(MODEL)
        if len(shape) == 1:
            data, encoding = rng.standard_normal(shape, dtype=np.float32), GGMLQuantizationType.F32
        else:
            data, encoding = random_bytes(*shape, kind, rng), kind
        tensors[part.gguf.format(0)] = (data, encoding)
    tokens = ["<pad>", "<s>", "</s>", "<|eot|>", *(chr(ord("a") + i) for i in range(26)), "th", "he", "the"]
    types = [TokenType.CONTROL] * 4 + [TokenType.NORMAL] * (len(tokens) - 4)
    metadata = {
        "llama.vocab_size": 40,
        "llama.context_length": 64,
        "llama.embedding_length": 256,
        "llama.block_count": 1,
        "llama.feed_forward_length": 512,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 1e6,
        "llama.rope.dimension_count": 64,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.merges": ["t h", "h e", "th e"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
    }
    return File(metadata, tensors)


def read(source, name: str) -> np.ndarray:
    tensor = source.tensors[name]
    out = np.empty((tensor.rows, tensor.shape[-1]), ml_dtypes.bfloat16)
    tensor.read(out, lambda _: None)
    return out


def test_the_config_is_read_with_its_decimals(file, tmp_path):
    source = open_gguf(file.write(tmp_path / "m.gguf"))
    assert source.config == MODEL  # 1e-5, though the file holds 9.99999974e-06
    assert source.kind == "gguf"
    assert source.files[0].name == "m.gguf"


@pytest.mark.parametrize("file", TYPES, indirect=True)
def test_every_type_is_read_as_the_gguf_package_does(file, tmp_path):
    source = open_gguf(file.write(tmp_path / "m.gguf"))
    for name, original in (("layers.0.v", "blk.0.attn_v.weight"), ("embedding", "token_embd.weight")):
        expected = dequantize(*file.tensors[original]).astype(ml_dtypes.bfloat16)
        assert np.ptp(expected.astype(np.float32)) > 0
        np.testing.assert_array_equal(read(source, name), expected)


@pytest.mark.parametrize(("part", "original", "heads"), [("q", "attn_q", 4), ("k", "attn_k", 2)])
def test_query_and_key_rows_return_to_hugging_faces_order(file, tmp_path, part, original, heads):
    name = f"blk.0.{original}.weight"
    data, kind = file.tensors[name]
    # Row i of head h holds the number it has in Hugging Face's order, written as llama.cpp's converter moves it.
    numbers = np.arange(len(data), dtype=np.float32).reshape(heads, 2, 32).swapaxes(1, 2).reshape(-1)
    file.tensors[name] = (np.repeat(numbers[:, None], 256, axis=1), kind)
    source = open_gguf(file.write(tmp_path / "m.gguf"))
    np.testing.assert_array_equal(read(source, f"layers.0.{part}")[:, 0], np.arange(len(data)))


def test_without_an_output_matrix_the_head_is_tied(file, tmp_path):
    del file.tensors["output.weight"]
    source = open_gguf(file.write(tmp_path / "m.gguf"))
    assert source.config.tie_word_embeddings
    assert "lm_head" not in source.tensors


def test_the_whole_way_to_a_checkpoint(file, tmp_path, convert_to):
    checkpoint = convert_to(file.write(tmp_path / "m.gguf"), tmp_path / "out")
    assert checkpoint.config == MODEL
    assert checkpoint.verify() == []
    assert (checkpoint.tokenizer_path / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.rope.scaling.type", "yarn"),
        ("llama.rope.scaling.factor", 4.0),
        ("llama.attention.sliding_window", 4096),
        ("llama.expert_count", 8),
        ("llama.attention.strange", 1),
        ("llama.rope.dimension_count", 32),
        ("llama.attention.head_count_kv", [2, 1]),
        ("tokenizer.ggml.eos_token_id", 40),
        ("tokenizer.ggml.pre", "qwen2"),
        ("tokenizer.ggml.model", "bert"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(file, tmp_path, key, value):
    file.metadata[key] = value
    with pytest.raises(ConfigError, match=key.removeprefix("llama.").replace(".", r"\.")):
        open_gguf(file.write(tmp_path / "m.gguf"))


def test_values_that_change_nothing_are_accepted(file, tmp_path):
    file.metadata |= {"llama.rope.scaling.type": "none", "llama.attention.key_length": 64, "llama.expert_count": 0}
    assert open_gguf(file.write(tmp_path / "m.gguf")).config == MODEL


def test_other_architectures_are_refused(file, tmp_path):
    file.architecture = "qwen2"
    with pytest.raises(ConfigError, match=r"general\.architecture"):
        open_gguf(file.write(tmp_path / "m.gguf"))


def test_other_types_are_refused_by_name(file, tmp_path):
    data = np.zeros((40, 256), np.float32)
    file.tensors["output.weight"] = (quantize(data, GGMLQuantizationType.Q5_0), GGMLQuantizationType.Q5_0)
    with pytest.raises(ConversionError, match=r"output\.weight \(Q5_0\)"):
        open_gguf(file.write(tmp_path / "m.gguf"))


def test_scaled_rotary_frequencies_are_refused(file, tmp_path):
    file.tensors["rope_freqs.weight"] = (np.ones(32, np.float32), GGMLQuantizationType.F32)
    with pytest.raises(ConfigError, match="rope_freqs"):
        open_gguf(file.write(tmp_path / "m.gguf"))


def test_missing_and_unknown_tensors_are_named(file, tmp_path):
    file.tensors["blk.0.attn_q.bias"] = file.tensors.pop("blk.0.attn_norm.weight")
    with pytest.raises(ConversionError, match=r"unknown tensors: blk\.0\.attn_q\.bias.*missing.*attn_norm"):
        open_gguf(file.write(tmp_path / "m.gguf"))


@pytest.mark.parametrize("size", [0, 3, 100, 20_000, -1])
def test_truncated_files_are_refused(file, tmp_path, size):
    path = file.write(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ConversionError, match=r"m\.gguf"):
        open_gguf(path)
