import json
from pathlib import Path

import pytest

from elastic_jax.checkpoint_format import EMBEDDING, NORMS, FileRecord, Leaf, Manifest, expected_folder
from elastic_jax.config import ModelConfig
from elastic_jax.errors import CheckpointError

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_ids=(2, 3),
    pad_token_id=None,
)
FILES = {"values/0.0": FileRecord(3, "abc")}


@pytest.fixture
def manifest() -> Manifest:
    """Three folders of CONFIG."""
    names = [(EMBEDDING, "bf16"), (NORMS, "bf16"), ("layers.1.qkv", "int8")]
    folders = {name: expected_folder(CONFIG, *name, blocks=2, files=FILES) for name in names}
    return Manifest(CONFIG, folders, {"tokenizer.json": FileRecord(2, "def")}, {"kind": "gguf"}, {"jax": "1"})


def read(values: object, tmp_path: Path) -> Manifest:
    path = tmp_path / "elastic.json"
    path.write_text(json.dumps(values))
    return Manifest.read(path)


def test_a_manifest_is_read_as_it_was_written(manifest, tmp_path):
    assert read(manifest.to_json(), tmp_path) == manifest


def test_leaves_follow_from_the_config():
    folder = expected_folder(CONFIG, "layers.0.gate_up", "int8", blocks=1, files={})
    assert (folder.bits, folder.group_size) == (8, 16)
    assert folder.leaves == {"values": Leaf((48, 16), "int8"), "scales": Leaf((48, 1), "float32")}
    assert folder.nbytes == 48 * 16 + 48 * 4
    assert expected_folder(CONFIG, "layers.0.gate_up", "int8", blocks=4, files={}).group_size == 4
    norms = expected_folder(CONFIG, NORMS, "bf16", blocks=1, files={}).leaves
    assert {name: leaf.shape for name, leaf in norms.items()} == {"attention": (2, 16), "mlp": (2, 16), "final": (16,)}


@pytest.mark.parametrize(
    ("name", "precision", "blocks"),
    [("layers.2.o", "bf16", 1), ("norms", "int8", 1), ("layers.0.o", "int4", 1), ("layers.0.o", "int8", 3)],
)
def test_other_folders_are_refused(name, precision, blocks):
    with pytest.raises(CheckpointError, match=name):
        expected_folder(CONFIG, name, precision, blocks=blocks, files={})


def test_another_format_version_is_refused(manifest, tmp_path):
    with pytest.raises(CheckpointError, match="format version 2, but this elastic-jax reads version 1"):
        read(manifest.to_json() | {"format": 2}, tmp_path)


@pytest.mark.parametrize("values", [[], {}, {"format": 1}, {"format": 1, "config": {}, "weights": {}}])
def test_what_is_no_manifest_is_refused(values, tmp_path):
    with pytest.raises(CheckpointError, match=r"elastic\.json"):
        read(values, tmp_path)


@pytest.mark.parametrize("path", ["/etc/passwd", "../../outside"])
def test_paths_may_not_lead_out_of_the_checkpoint(manifest, tmp_path, path):
    values = manifest.to_json()
    values["tokenizer"][path] = {"size": 1, "sha256": ""}
    with pytest.raises(CheckpointError, match="leads out"):
        read(values, tmp_path)


def test_folders_must_be_what_the_config_says(manifest, tmp_path):
    values = manifest.to_json()
    values["weights"]["layers.1.qkv"]["int8"]["leaves"]["values"]["shape"] = [64, 8]
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.qkv/int8 should be .* int8\[64, 16\].*found .*int8\[64, 8\]"
    ):
        read(values, tmp_path)
    values = manifest.to_json()
    values["weights"]["../../x"] = values["weights"]["embedding"]
    with pytest.raises(CheckpointError, match="no folder"):
        read(values, tmp_path)
