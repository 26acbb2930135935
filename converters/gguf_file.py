"""Opens a GGUF file (llama.cpp's format): config and tokenizer from its metadata, weights dequantized while reading."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from converters.gguf_tokenizer import build_tokenizer
from converters.names import list_names, match_names
from converters.source import Decode, Source, SourceFile, SourceTensor, merge_tensors
from elastic_jax.config import ModelConfig
from elastic_jax.errors import ConfigError, ConversionError

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
"""Encodings of weights that are read."""

ARCHITECTURES = ("llama", "mistral3")
"""llama.cpp calls Mistral and Llama models `llama`."""

_READ = {
    "vocab_size",
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scale_linear": (1.0,),
    "rope.scaling.finetuned": (False,),
    "attention.sliding_window": (0,),
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "use_parallel_residual": (False,),
    "tensor_data_layout": ("Meta AI original pth",),  # a remark on where the rows' order comes from
}
_DEFAULT_ROPE_THETA = 10000.0  # of llama.cpp, for files older than the key

# Ids that end a text, a turn, or a message for a tool: llama.cpp stops at each.
_EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def open_gguf(path: Path) -> Source:
    """Reads metadata and checks everything that can be checked without reading weights.

    Raises:
        ConversionError: the file is truncated or malformed, or tensors are unknown, missing, mis-shaped or of a type
            that is not read.
        ConfigError: the model or its tokenizer is not implemented.
    """
    reader = _reader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = merge_tensors({path.name: {tensor.name: _tensor(path, tensor) for tensor in reader.tensors}})
    if wrong := [f"{name} ({tensor.encoding})" for name, tensor in tensors.items() if tensor.encoding not in TYPES]:
        raise ConversionError(f"{path}: tensors should be of {list(TYPES)}, found {len(wrong)}: {list_names(wrong)}")
    if "rope_freqs.weight" in tensors:
        raise ConfigError(f"{path}: rope_freqs.weight scales the rotary embedding, which is not implemented")
    config = _config(metadata, tensors, path)
    matched = match_names(tensors, config, lambda part: part.gguf, source=str(path))
    for name, tensor in matched.items():
        heads = {"q": config.num_heads, "k": config.num_kv_heads}.get(name.rpartition(".")[2])
        matched[name] = dataclasses.replace(tensor, interleaved_heads=heads)
    with path.open("rb") as file:
        header = hashlib.sha256(file.read(reader.data_offset)).hexdigest()
    record = SourceFile(path.name, path.stat().st_size, header)
    tokenizer = build_tokenizer(metadata, config, source=str(path))
    return Source("gguf", str(path), None, None, config, matched, (record,), tokenizer)


def _reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ConversionError("reading GGUF files needs the package gguf: `uv pip install gguf`") from None
    try:
        return GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError, OverflowError) as error:
        raise ConversionError(f"{path} is not a GGUF file, or is truncated ({error}): download it again") from None


def _tensor(path: Path, tensor: Any) -> SourceTensor:
    shape = tuple(int(size) for size in reversed(tensor.shape))  # GGUF lists the fastest dimension first
    rows = shape[0] if len(shape) == 2 else 1
    row_bytes = int(tensor.n_bytes) // max(rows, 1)
    encoding = tensor.tensor_type.name
    return SourceTensor(
        tensor.name, path, int(tensor.data_offset), shape, encoding, row_bytes, _decoder(tensor.tensor_type), None
    )


def _decoder(tensor_type: Any) -> Decode:
    from gguf.quants import dequantize

    def decode(block: UInt8[np.ndarray, "rows row_bytes"]) -> Float32[np.ndarray, "rows columns"]:
        return np.asarray(dequantize(block, tensor_type), np.float32)

    return decode


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, SourceTensor], path: Path) -> ModelConfig:
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ConfigError(
            f"{path}: general.architecture should be one of {list(ARCHITECTURES)}, found {architecture!r}"
        )
    prefix = f"{architecture}."
    values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    problems = []
    for key, value in values.items():
        if key in _NEUTRAL and value not in _NEUTRAL[key]:
            problems.append(f"{prefix}{key} = {value!r} is not implemented")
        elif key not in _READ and key not in _NEUTRAL:
            problems.append(f"unknown key {prefix}{key} = {value!r}, which may change what is computed")

    def size(key: str, default: int | None = None) -> int:
        value = values.get(key, default)
        if isinstance(value, int) and value > 0:
            return value
        problems.append(f"{prefix}{key} should be a positive integer, found {value!r}")
        return 1

    def number(key: str, default: float | None = None) -> float:
        value = values.get(key, default)
        if isinstance(value, float | int) and value > 0:
            # GGUF holds float32: the shortest decimal that rounds to it is the number the model was made with.
            return float(str(np.float32(value)))
        problems.append(f"{prefix}{key} should be a positive number, found {value!r}")
        return 1.0

    heads, hidden_size = size("attention.head_count"), size("embedding_length")

    head_dim = size("attention.key_length", hidden_size // heads)
    if {size("rope.dimension_count", head_dim), size("attention.value_length", head_dim)} != {head_dim}:
        problems.append("rope.dimension_count, attention.key_length and attention.value_length differ: not implemented")
    embedding = tensors.get("token_embd.weight")
    stored_rows = embedding.shape[0] if embedding is not None else None
    vocab_size = size("vocab_size", stored_rows)
    special = _special_tokens(metadata, vocab_size, problems)
    config = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": size("feed_forward_length"),
        "num_layers": size("block_count"),
        "num_heads": heads,
        "num_kv_heads": size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base", _DEFAULT_ROPE_THETA),
        "max_position_embeddings": size("context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if problems:
        raise ConfigError(f"{path} cannot be converted: " + "; ".join(problems))
    return ModelConfig(**config, **special)


def _special_tokens(metadata: Mapping[str, Any], vocab_size: int, problems: list[str]) -> dict[str, Any]:
    def token(key: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{key}")
        if value is not None and not 0 <= value < vocab_size:
            problems.append(f"tokenizer.ggml.{key} = {value} is not a token of a vocabulary of {vocab_size}")
        return value

    eos = dict.fromkeys(value for key in _EOS_KEYS if (value := token(key)) is not None)
    return {
        "bos_token_id": token("bos_token_id"),
        "eos_token_ids": tuple(eos),
        "pad_token_id": token("padding_token_id"),
    }
