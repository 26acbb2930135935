"""Opens a Hugging Face folder: config, tokenizer, and safetensors in one file or many. Reads headers only."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.config import MULTIMODAL_ARCHITECTURE, parse_config
from converters.names import list_names, match_names
from converters.safetensors_header import read_header, refuse_types
from converters.source import Source, SourceTensor, merge_tensors
from converters.tekken import TEKKEN_JSON, build_tokenizer
from elastic_jax.checkpoint_format import MANIFEST
from elastic_jax.errors import ConversionError
from elastic_jax.tokenizer import COMPLETE_TOKENIZER

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_FILES = (
    TOKENIZER_JSON,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    TEKKEN_JSON,
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION_CONFIG,
)
"""What is copied beside the weights, as far as it exists."""

_EMBEDDING, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Follow from rope_theta; old checkpoints store them.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_VISION = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
_TEXT_PREFIXES = {"language_model.model.": "model.", "model.language_model.": "model.", "language_model.": ""}


def open_folder(folder: Path, *, repository: str | None, commit: str | None) -> Source:
    """Reads config and headers, and checks everything that can be checked without reading weights.

    Raises:
        ConversionError: config, tokenizer or weights are absent, or weights are pickled, truncated, unknown, missing,
            stored twice or mis-shaped.
        ConfigError: the config asks for what is not implemented.
    """
    if not (folder / CONFIG).is_file():
        raise ConversionError(_no_config(folder))
    values = read_json(folder / CONFIG)
    files = [read_header(path) for path in _weight_files(folder)]
    stored = merge_tensors({file.name: tensors for file, tensors in files})
    _check_index(folder, stored)
    if (values.get("architectures") or []) == [MULTIMODAL_ARCHITECTURE]:
        stored = _text_tensors(stored, folder)
    stored = {name: tensor for name, tensor in stored.items() if not _DERIVED.fullmatch(name)}
    refuse_types(stored, source=str(folder))
    generation = read_json(folder / GENERATION_CONFIG) if (folder / GENERATION_CONFIG).is_file() else None
    config = parse_config(values, generation, lm_head_stored=_LM_HEAD in stored, source=str(folder / CONFIG))
    tensors = match_names(stored, config, lambda part: part.hugging_face, source=str(folder))
    if config.tie_word_embeddings and _LM_HEAD in stored:
        _check_tied(stored[_EMBEDDING], stored[_LM_HEAD], folder)
    tokenizer = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    if TOKENIZER_JSON not in tokenizer and TEKKEN_JSON in tokenizer:
        # What the folder has goes before what is made.
        source = str(folder / TEKKEN_JSON)
        made = build_tokenizer(tokenizer[TEKKEN_JSON], vocab_size=config.vocab_size, source=source)
        tokenizer = made | tokenizer
    if TOKENIZER_JSON not in tokenizer:
        raise ConversionError(f"{folder} holds no {TOKENIZER_JSON}. {COMPLETE_TOKENIZER}")
    records = tuple(sorted((file for file, _ in files), key=lambda file: file.name))
    return Source("safetensors", str(folder), repository, commit, config, tensors, records, tokenizer)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ConversionError: the file is missing or holds something else.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConversionError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConversionError(f"{path} should hold a JSON object, found {type(values).__name__}")
    return values


def _no_config(folder: Path) -> str:
    if (folder / MANIFEST).is_file():
        return f"{folder} is an Elastic checkpoint already: compile it (`elastic-jax compile`) and load it"
    if ggufs := sorted(path.name for path in folder.glob("*.gguf")):
        return f"{folder} holds GGUF files: {list_names(ggufs)}. Name the file, not its folder"
    return f"{folder} holds no {CONFIG}: it is not a Hugging Face folder"


def _weight_files(folder: Path) -> list[Path]:
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file() and single.is_file():
        raise ConversionError(f"{folder} holds both {INDEX} and {SINGLE}: move the one that is not wanted away")
    if index.is_file():
        paths = [folder / name for name in sorted(set(_weight_map(index).values()))]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise ConversionError(f"{index} names files that are not there: {list_names(missing)}; download them")
        return paths
    if single.is_file():
        return [single]
    if shards := sorted(folder.glob("model-*-of-*.safetensors")):
        return shards
    found = sorted(path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    if any(name.endswith(".safetensors") for name in found):
        raise ConversionError(
            f"{folder} has neither {SINGLE} nor {INDEX}; found {list_names(found)}. Weights in Mistral's own naming "
            "(consolidated.safetensors) are not read: use the repository's Hugging Face files"
        )
    if found:
        raise ConversionError(
            f"{folder} holds its weights as {list_names(found)}: opening a pickle can run any code, so these are not "
            "read. Convert them to safetensors first, where you trust them (save_pretrained does it)"
        )
    raise ConversionError(f"{folder} holds no weights: expected {SINGLE} or {INDEX}")


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise ConversionError(f"{index} should have a weight_map from tensors to files beside it")
    return weight_map


def _check_index(folder: Path, stored: Mapping[str, SourceTensor]) -> None:
    if (folder / INDEX).is_file():
        absent = [
            f"{name} (in {file})"
            for name, file in _weight_map(folder / INDEX).items()
            if name not in stored or stored[name].path.name != file
        ]
        if absent:
            raise ConversionError(f"{folder / INDEX} names tensors that are not there: {list_names(absent)}")


def _text_tensors(stored: Mapping[str, SourceTensor], folder: Path) -> dict[str, SourceTensor]:
    """The language model's tensors of a multimodal checkpoint, under the names of a plain one."""
    renamed: dict[str, SourceTensor] = {}
    for name, tensor in stored.items():
        if name.startswith(_VISION):
            continue
        prefix = next((prefix for prefix in _TEXT_PREFIXES if name.startswith(prefix)), "")
        plain = _TEXT_PREFIXES.get(prefix, "") + name.removeprefix(prefix)
        if plain in renamed:
            raise ConversionError(f"{folder}: {renamed[plain].name} and {name} are the same weight, stored twice")
        renamed[plain] = tensor
    return renamed


def _check_tied(embedding: SourceTensor, lm_head: SourceTensor, folder: Path) -> None:
    """A head stored beside tie_word_embeddings must be the embedding: versions of transformers differ on which wins."""
    if (embedding.shape, embedding.encoding, embedding.sha256()) != (lm_head.shape, lm_head.encoding, lm_head.sha256()):
        raise ConversionError(
            f"{folder}: config.json says tie_word_embeddings, but {lm_head.name} differs from {embedding.name}: "
            "set the one that is right (false, or delete the tensor)"
        )
