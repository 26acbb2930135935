import json
import os

import ml_dtypes
import numpy as np
import pytest

from converters.huggingface import open_folder
from elastic_jax.errors import ConfigError, ConversionError


def opened(folder):
    return open_folder(folder, repository=None, commit=None)


@pytest.mark.parametrize("shards", [1, 3])
def test_reads_one_file_or_many(write_folder, config, weights, model, shards):
    source = opened(write_folder(config, weights, shards=shards))
    assert source.config == model
    assert len(source.tensors) == len(weights)
    assert len(source.files) == shards
    assert source.tokenizer == {"tokenizer.json": b"{}"}


def test_shards_without_an_index_are_read(write_folder, config, weights):
    folder = write_folder(config, weights, shards=3)
    (folder / "model.safetensors.index.json").unlink()
    assert len(opened(folder).tensors) == len(weights)


def test_a_tensor_in_two_shards_is_refused(write_folder, config, weights):
    from safetensors.numpy import save_file

    folder = write_folder(config, weights, shards=2)
    (folder / "model.safetensors.index.json").unlink()
    save_file({"model.norm.weight": weights["model.norm.weight"]}, folder / "model-00003-of-00003.safetensors")
    with pytest.raises(ConversionError, match=r"stored twice: model\.norm\.weight"):
        opened(folder)


def test_a_missing_shard_is_named(write_folder, config, weights):
    folder = write_folder(config, weights, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConversionError, match="not there: model-00002-of-00003"):
        opened(folder)


def test_an_index_that_contradicts_its_files_is_refused(write_folder, config, weights):
    folder = write_folder(config, weights, shards=2)
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.norm.bias"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(ConversionError, match=r"model\.norm\.bias \(in model-00001"):
        opened(folder)


def test_an_index_may_not_lead_out_of_its_folder(write_folder, config, weights):
    folder = write_folder(config, weights, shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
    with pytest.raises(ConversionError, match="weight_map"):
        opened(folder)


def test_truncated_weights_are_found_before_anything_is_read(write_folder, config, weights):
    folder = write_folder(config, weights)
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ConversionError, match="truncated"):
        opened(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_with_the_reason(write_folder, config, weights, name):
    folder = write_folder(config, weights)
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ConversionError, match="pickle can run any code"):
        opened(folder)


def test_mistrals_own_naming_is_refused(write_folder, config, weights):
    folder = write_folder(config, weights)
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    with pytest.raises(ConversionError, match="Mistral's own naming"):
        opened(folder)


def test_a_folder_without_weights_or_config_is_refused(tmp_path, config):
    with pytest.raises(ConversionError, match=r"holds no config\.json: it is not a Hugging Face folder"):
        opened(tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ConversionError, match=r"holds GGUF files: model\.gguf\. Name the file"):
        opened(tmp_path)
    (tmp_path / "elastic.json").touch()
    with pytest.raises(ConversionError, match="is an Elastic checkpoint already"):
        opened(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match="holds no weights"):
        opened(tmp_path)


def test_a_tokenizer_that_cannot_be_loaded_is_refused_before_the_work(write_folder, config, weights):
    folder = write_folder(config, weights)
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(ConversionError, match=r"holds no tokenizer\.json.*AutoTokenizer"):
        opened(folder)


def test_other_types_are_refused_by_name(write_folder, config, weights):
    weights["lm_head.weight"] = np.zeros((40, 16), np.int8)
    with pytest.raises(ConversionError, match=r"lm_head\.weight \(I8\)"):
        opened(write_folder(config, weights))


def test_a_config_that_does_not_fit_the_weights_is_refused(write_folder, config, weights):
    with pytest.raises(ConversionError, match="should be"):
        opened(write_folder(config | {"intermediate_size": 32}, weights))


def test_derived_rotary_tables_are_ignored(write_folder, config, weights):
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    assert len(opened(write_folder(config, weights)).tensors) == len(weights) - 1


def test_the_generation_config_is_read(write_folder, config, weights):
    folder = write_folder(config, weights)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    source = opened(folder)
    assert source.config.eos_token_ids == (2, 3)
    assert "generation_config.json" in source.tokenizer


def layout(name: str, style: str) -> str:
    """A plain name as multimodal checkpoints of transformers before and after 4.52 spell it."""
    if style == "old":
        return f"language_model.{name}"
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


@pytest.mark.parametrize("style", ["old", "new"])
def test_multimodal_checkpoints_give_their_language_model(write_folder, config, weights, model, style):
    text = {key: value for key, value in config.items() if key != "architectures"}
    values = {"architectures": ["Mistral3ForConditionalGeneration"], "vision_config": {}, "text_config": text}
    stored = {layout(name, style): array for name, array in weights.items()}
    prefix = "" if style == "old" else "model."
    stored[f"{prefix}vision_tower.patch_conv.weight"] = np.zeros((2, 3, 4, 4), np.float32)
    stored[f"{prefix}multi_modal_projector.linear_1.weight"] = np.zeros((2, 2), np.float32)
    source = opened(write_folder(values, stored))
    assert source.config == model
    assert len(source.tensors) == len(weights)
    stored["audio_tower.weight"] = np.zeros((2, 2), np.float32)
    with pytest.raises(ConversionError, match=r"unknown tensors: audio_tower\.weight"):
        opened(write_folder(values, stored, name="audio"))


def test_vision_weights_are_unknown_in_a_plain_model(write_folder, config, weights):
    weights["vision_tower.patch_conv.weight"] = np.zeros((2, 2), np.float32)
    with pytest.raises(ConversionError, match="unknown tensors: vision_tower"):
        opened(write_folder(config, weights))


def test_a_tied_head_must_be_the_embedding(write_folder, config, weights):
    config["tie_word_embeddings"] = True
    with pytest.raises(ConversionError, match=r"lm_head\.weight differs from"):
        opened(write_folder(config, weights))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    assert "lm_head" not in opened(write_folder(config, weights, name="same")).tensors
    del weights["lm_head.weight"]
    assert opened(write_folder(config, weights, name="absent")).config.tie_word_embeddings


def test_the_fingerprint_sees_other_weights_under_an_equal_header(write_folder, config, weights):
    first = opened(write_folder(config, weights, name="first"))
    assert first.fingerprint() == opened(write_folder(config, weights, name="same")).fingerprint()
    weights["model.layers.1.mlp.up_proj.weight"][-1, -1] += ml_dtypes.bfloat16(1)
    other = opened(write_folder(config, weights, name="other"))
    assert first.files[0].header_sha256 == other.files[0].header_sha256
    assert first.fingerprint() != other.fingerprint()


def test_config_errors_pass_through(write_folder, config, weights):
    with pytest.raises(ConfigError, match="attention_bias"):
        opened(write_folder(config | {"attention_bias": True}, weights))
