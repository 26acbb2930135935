import fcntl
import json
import os
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from converters import conversion
from converters.quantize import quantize_int8
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.errors import CheckpointError, ConversionError


def restore(checkpoint: Checkpoint) -> dict:
    arrays = checkpoint.restore(checkpoint.manifest.folders, jax.devices()[0], 2)
    return {folder: {name: np.asarray(leaf) for name, leaf in leaves.items()} for folder, leaves in arrays.items()}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_weight_arrives_in_its_place(write_folder, convert_to, config, weights, tmp_path):
    checkpoint = convert_to(write_folder(config, weights, shards=2), tmp_path / "out")
    arrays = restore(checkpoint)

    def rows(layer: int, *names: str) -> np.ndarray:
        return np.concatenate([weights[f"model.layers.{layer}.{name}.weight"] for name in names])

    for layer in range(2):
        expected = {
            "qkv": rows(layer, *(f"self_attn.{name}_proj" for name in "qkv")),
            "o": rows(layer, "self_attn.o_proj"),
            "gate_up": rows(layer, "mlp.gate_proj", "mlp.up_proj"),
            "down": rows(layer, "mlp.down_proj"),
        }
        for kind, weight in expected.items():
            np.testing.assert_array_equal(arrays[f"layers.{layer}.{kind}", "bf16"]["values"], weight)
            values, scales = quantize_int8(weight)
            np.testing.assert_array_equal(arrays[f"layers.{layer}.{kind}", "int8"]["values"], values)
            np.testing.assert_array_equal(arrays[f"layers.{layer}.{kind}", "int8"]["scales"], scales)
        norms = arrays["norms", "bf16"]
        np.testing.assert_array_equal(norms["attention"][layer], rows(layer, "input_layernorm"))
        np.testing.assert_array_equal(norms["mlp"][layer], rows(layer, "post_attention_layernorm"))
    np.testing.assert_array_equal(arrays["norms", "bf16"]["final"], weights["model.norm.weight"])
    np.testing.assert_array_equal(arrays["embedding", "bf16"]["values"], weights["model.embed_tokens.weight"])
    np.testing.assert_array_equal(arrays["lm_head", "bf16"]["values"], weights["lm_head.weight"])
    assert len(arrays) == 2 + 2 * (4 * 2 + 1)
    assert checkpoint.verify() == []
    assert (checkpoint.tokenizer_path / "tokenizer.json").read_text() == "{}"


def test_a_tied_head_is_stored_in_int8_alone(write_folder, convert_to, config, weights, tmp_path):
    del weights["lm_head.weight"]
    source = write_folder(config | {"tie_word_embeddings": True}, weights)
    checkpoint = convert_to(source, tmp_path / "out")
    arrays = restore(checkpoint)
    assert ("lm_head", "bf16") not in arrays
    np.testing.assert_array_equal(
        arrays["lm_head", "int8"]["values"], quantize_int8(weights["model.embed_tokens.weight"])[0]
    )
    assert ("lm_head", "bf16") not in checkpoint.folders(checkpoint.plan("XL"))
    only_bf16 = convert_to(source, tmp_path / "bf16", only="bf16")
    assert only_bf16.folders(only_bf16.plan("XL"))


def test_float_sources_are_rounded_once(write_folder, convert_to, config, weights, tmp_path):
    wide = {name: array.astype(np.float32) * np.float32(1.001) for name, array in weights.items()}
    arrays = restore(convert_to(write_folder(config, wide), tmp_path / "out"))
    expected = wide["lm_head.weight"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(arrays["lm_head", "bf16"]["values"], expected)
    np.testing.assert_array_equal(arrays["lm_head", "int8"]["values"], quantize_int8(expected)[0])


def test_equal_sources_give_equal_files(write_folder, convert_to, config, weights, tmp_path):
    source = write_folder(config, weights)
    convert_to(source, tmp_path / "one", workers=1)
    moved = tmp_path / "elsewhere"
    source.rename(moved)
    convert_to(moved, tmp_path / "two", workers=4)
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert one == two
    assert str(tmp_path).encode() not in b"".join(one.values())


def test_sharding_changes_only_what_is_said_of_the_source(write_folder, convert_to, config, weights, tmp_path):
    whole = convert_to(write_folder(config, weights, name="whole"), tmp_path / "one").manifest
    sharded = convert_to(write_folder(config, weights, name="sharded", shards=4), tmp_path / "two").manifest
    assert whole.folders == sharded.folders
    assert whole.source["weights_sha256"] == sharded.source["weights_sha256"]
    assert len(sharded.source["files"]) == 4


@pytest.mark.parametrize("only", ["int8", "bf16"])
def test_only_stores_one_precision(write_folder, convert_to, config, weights, tmp_path, only):
    checkpoint = convert_to(write_folder(config, weights), tmp_path / "out", only=only)
    assert {precision for name, precision in checkpoint.manifest.folders if name.startswith("layers")} == {only}
    assert ("embedding", "bf16") in checkpoint.manifest.folders
    refused, possible = ("XL", "S") if only == "int8" else ("S", "XL")
    assert checkpoint.folders(checkpoint.plan(possible))
    with pytest.raises(CheckpointError, match=f"{refused}.*without --only.*{possible}"):
        checkpoint.folders(checkpoint.plan(refused))


def test_progress_reaches_the_total(write_folder, convert_to, config, weights, tmp_path):
    calls = []
    convert_to(write_folder(config, weights), tmp_path / "out", progress=lambda *call: calls.append(call))
    done, total, _ = calls[-1]
    assert done == total == sum(array.nbytes for array in weights.values())
    assert [call[0] for call in calls] == sorted(call[0] for call in calls)
    assert {"embedding", "norms", "layers.1.gate_up", "lm_head"} <= {name for _, _, name in calls}


def test_a_complete_checkpoint_is_left_as_it_is(write_folder, convert_to, config, weights, tmp_path):
    source = write_folder(config, weights)
    convert_to(source, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    calls = []
    convert_to(source, tmp_path / "out", progress=lambda *call: calls.append(call))
    assert calls == []
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    with pytest.raises(ConversionError, match=r"complete checkpoint of this source.*--only"):
        convert_to(source, tmp_path / "out", only="int8")


def test_a_complete_checkpoint_of_another_source_is_replaced_only_when_asked(
    write_folder, convert_to, config, weights, tmp_path
):
    convert_to(write_folder(config, weights), tmp_path / "out")
    (tmp_path / "out" / "executables").mkdir()
    weights["model.norm.weight"] *= ml_dtypes.bfloat16(2)
    other = write_folder(config, weights, name="other")
    with pytest.raises(ConversionError, match=r"another source.*--overwrite"):
        convert_to(other, tmp_path / "out")
    replaced = convert_to(other, tmp_path / "out", overwrite=True, only="bf16")
    assert replaced.verify() == []
    convert_to(other, tmp_path / "fresh", only="bf16")
    assert files(tmp_path / "out") == files(tmp_path / "fresh")
    assert not (tmp_path / "out" / "executables").exists()


def test_a_foreign_folder_is_never_touched(write_folder, convert_to, config, weights):
    source = write_folder(config, weights)
    before = files(source)
    for overwrite in (False, True):
        with pytest.raises(ConversionError, match=r"neither empty nor an Elastic checkpoint.*config\.json"):
            convert_to(source, source, overwrite=overwrite)
    assert files(source) == before
    with pytest.raises(ConversionError, match="is a file"):
        convert_to(source, source / "config.json")


def test_a_kill_before_the_journal_was_written_leaves_no_foreign_folder(
    write_folder, convert_to, config, weights, tmp_path
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "conversion.json.partial").write_text("{")
    assert convert_to(write_folder(config, weights), tmp_path / "out").verify() == []
    assert not list((tmp_path / "out").glob("conversion*"))


def test_nothing_is_written_for_a_source_with_a_bad_header(write_folder, convert_to, config, weights, tmp_path):
    del weights["model.norm.weight"]
    with pytest.raises(ConversionError, match=r"model\.norm\.weight"):
        convert_to(write_folder(config, weights), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_non_finite_weights_are_listed_and_leave_an_unfinished_folder(
    write_folder, convert_to, config, weights, tmp_path
):
    weights["model.layers.0.self_attn.q_proj.weight"][3, 5] = np.nan
    weights["model.layers.0.self_attn.v_proj.weight"][0, 0] = np.inf
    with pytest.raises(ConversionError, match=r"should be finite.*q_proj.weight \[3, 5\].*v_proj.weight \[0, 0\]"):
        convert_to(write_folder(config, weights), tmp_path / "out", workers=1)
    with pytest.raises(CheckpointError, match=r"unfinished conversion.*convert-weights \S+source \S+out"):
        Checkpoint.open(tmp_path / "out")


class Interrupted(BaseException):
    """What a test raises in the middle of a conversion."""


def interrupt_at(count: int):
    calls = []

    def progress(*call: object) -> None:
        calls.append(call)
        if len(calls) == count:
            raise Interrupted

    return progress


def interrupt(convert_to, source: Path, destination: Path, **options) -> None:
    # One worker reads a weight at a time, so the place of the interruption is known.
    with pytest.raises((Interrupted, ConversionError)):
        convert_to(source, destination, workers=1, progress=interrupt_at(12), **options)


def test_an_interrupted_conversion_continues_without_repeating_finished_folders(
    write_folder, convert_to, config, weights, tmp_path
):
    source = write_folder(config, weights)
    interrupt(convert_to, source, tmp_path / "out")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("weights/*/*/values/0.0")}
    assert written
    calls = []
    convert_to(source, tmp_path / "out", progress=lambda *call: calls.append(call))
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert calls[0][0] > weights["model.embed_tokens.weight"].nbytes
    assert calls[-1][0] == calls[-1][1]
    convert_to(source, tmp_path / "fresh")
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


def test_a_finished_folder_of_another_size_is_made_again(write_folder, convert_to, config, weights, tmp_path):
    source = write_folder(config, weights)
    interrupt(convert_to, source, tmp_path / "out")
    damaged = next((tmp_path / "out").glob("weights/*/*/values/0.0"))
    os.truncate(damaged, damaged.stat().st_size - 1)
    assert convert_to(source, tmp_path / "out").verify() == []


def test_continuing_with_something_else_is_refused(write_folder, convert_to, config, weights, tmp_path):
    source = write_folder(config, weights)
    interrupt(convert_to, source, tmp_path / "out")
    with pytest.raises(ConversionError, match=r"unfinished conversion of something else.*--only was None, now 'int8'"):
        convert_to(source, tmp_path / "out", only="int8")
    weights["model.norm.weight"] *= ml_dtypes.bfloat16(2)
    other = write_folder(config, weights, name="other")
    with pytest.raises(ConversionError, match="source fingerprint was"):
        convert_to(other, tmp_path / "out")
    assert convert_to(other, tmp_path / "out", overwrite=True).verify() == []


def test_the_command_that_finishes_is_the_one_that_began(write_folder, convert_to, config, weights, tmp_path):
    source = write_folder(config, weights, name="with space")
    interrupt(convert_to, source, tmp_path / "out", only="int8")
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(tmp_path / "out")
    assert f"convert-weights '{source}' {tmp_path / 'out'} --only int8" in str(error.value)


def test_an_interrupted_replacement_is_not_mistaken_for_the_old_checkpoint(
    write_folder, convert_to, config, weights, tmp_path
):
    source = write_folder(config, weights)
    convert_to(source, tmp_path / "out")
    interrupt(convert_to, source, tmp_path / "out", overwrite=True)
    with pytest.raises(CheckpointError, match="unfinished"):
        Checkpoint.open(tmp_path / "out")
    assert convert_to(source, tmp_path / "out").verify() == []


def test_two_conversions_into_one_folder_are_refused(write_folder, convert_to, config, weights, tmp_path):
    source = write_folder(config, weights)
    (tmp_path / "out").mkdir()
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ConversionError, match="another process is converting"):
        convert_to(source, tmp_path / "out")
    os.close(descriptor)
    assert convert_to(source, tmp_path / "out").verify() == []


def test_space_is_checked_before_anything_is_written(write_folder, convert_to, config, weights, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ConversionError, match=r"needs 0\.1 GB .* 0\.0 GB are free"):
        convert_to(write_folder(config, weights), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failing_disk_leaves_a_conversion_that_can_be_continued(
    write_folder, convert_to, config, weights, tmp_path, monkeypatch
):
    source = write_folder(config, weights)
    with monkeypatch.context() as patched:

        def fail(path: Path, _: object) -> None:
            raise ValueError(f"RESOURCE_EXHAUSTED: {path.name}")

        patched.setattr(conversion, "write_arrays", fail)
        with pytest.raises(ConversionError, match=r"cannot be written: RESOURCE_EXHAUSTED.*the same command continues"):
            convert_to(source, tmp_path / "out")
    assert convert_to(source, tmp_path / "out").verify() == []


def test_elastic_json_names_what_it_was_made_from(write_folder, convert_to, config, weights, tmp_path):
    convert_to(write_folder(config, weights), tmp_path / "out")
    values = json.loads((tmp_path / "out" / "elastic.json").read_text())
    assert values["source"]["kind"] == "safetensors"
    assert values["source"]["files"][0]["name"] == "model.safetensors"
    assert {"jax", "orbax-checkpoint", "elastic-jax"} <= set(values["versions"])
    assert values["weights"]["layers.0.down"]["int8"]["group_size"] == 24
    assert values["weights"]["layers.0.down"]["int8"]["bits"] == 8
    stored = sum(len(content) for content in files(tmp_path / "out" / "weights").values())
    assert values["total_bytes"] == stored


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/at/all", "no file or folder nowhere/at/all.*no Hub id"),
        ("./nowhere", "no file or folder nowhere"),
        ("model.gguf", "no file or folder"),
    ],
)
def test_a_source_that_does_not_exist(convert_to, tmp_path, name, message):
    with pytest.raises(ConversionError, match=message):
        convert_to(name, tmp_path / "out")


def test_files_that_are_no_source_are_refused(convert_to, tmp_path):
    for name, message in (("m.bin", "pickle"), ("m.safetensors", "name its folder"), ("m.txt", "should be")):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ConversionError, match=message):
            convert_to(tmp_path / name, tmp_path / "out")


def test_a_revision_of_a_local_folder_is_refused(write_folder, convert_to, config, weights, tmp_path):
    with pytest.raises(ConversionError, match="is local"):
        convert_to(write_folder(config, weights), tmp_path / "out", revision="main")
