import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from converters import convert
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.errors import CheckpointError, PlanError
from elastic_jax.groups import model_groups
from elastic_jax.plan import MODES, Plan

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(fixtures_path, tmp_path_factory) -> Path:
    """A checkpoint of the untied tiny model; not to be changed."""
    return convert_fixture(fixtures_path / "tiny_mistral", tmp_path_factory.mktemp("made") / "out")


@pytest.fixture(scope="module")
def made_tied(fixtures_path, tmp_path_factory) -> Path:
    """A checkpoint of the tied tiny model; not to be changed."""
    return convert_fixture(fixtures_path / "tiny_llama", tmp_path_factory.mktemp("made") / "out")


def convert_fixture(source: Path, destination: Path) -> Path:
    convert(source, destination, only=None, overwrite=False, revision=None, token=None, workers=2, progress=None)
    return destination


@pytest.fixture
def copy(made, tmp_path) -> Path:
    """A checkpoint that may be changed."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


def test_restore_reads_only_what_is_asked_for(copy):
    checkpoint = Checkpoint.open(copy)
    folders = checkpoint.folders(checkpoint.plan("S"))
    assert ("layers.0.qkv", "int8") in folders
    for precision in copy.glob("weights/*/bf16"):
        if precision.parent.name not in ("embedding", "norms"):
            shutil.rmtree(precision)
    arrays = checkpoint.restore(folders, jax.devices()[0], 2)
    assert list(arrays) == folders
    for folder, leaves in arrays.items():
        expected = checkpoint.leaves(*folder)
        assert {name: (leaf.shape, leaf.dtype) for name, leaf in leaves.items()} == {
            name: (struct.shape, struct.dtype) for name, struct in expected.items()
        }


def test_restore_puts_arrays_on_the_device_that_was_named(made):
    checkpoint, device = Checkpoint.open(made), jax.devices()[3]
    arrays = checkpoint.restore([("norms", "bf16")], device, 1)
    assert arrays["norms", "bf16"]["final"].devices() == {device}


def test_int8_and_bf16_are_the_same_weights(made):
    checkpoint = Checkpoint.open(made)
    arrays = checkpoint.restore([("layers.1.down", "bf16"), ("layers.1.down", "int8")], jax.devices()[0], 1)
    original = np.asarray(arrays["layers.1.down", "bf16"]["values"]).astype(np.float32)
    stored = {name: np.asarray(leaf) for name, leaf in arrays["layers.1.down", "int8"].items()}
    assert np.all(np.abs(stored["values"] * stored["scales"] - original) <= stored["scales"] * 0.501)


RESTORE_WITHOUT_TRACING = """
import json, sys
import jax
import jax.monitoring
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
jax.monitoring.register_event_duration_secs_listener(lambda name, _, **__: events.append(name))
jax.config.update("jax_no_tracing", True)
from elastic_jax.checkpoint import Checkpoint
checkpoint = Checkpoint.open(sys.argv[1])
arrays = checkpoint.restore(checkpoint.manifest.folders, jax.devices()[0], 3)
print(json.dumps([len(arrays), [name for name in events if name.startswith("/jax/core/compile")]]))
"""


def test_restore_traces_and_compiles_nothing(made):
    done = subprocess.run(
        [sys.executable, "-c", RESTORE_WITHOUT_TRACING, made],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [len(Checkpoint.open(made).manifest.folders), []]


def test_progress_reaches_the_bytes_of_the_plan(made):
    checkpoint, calls = Checkpoint.open(made), []
    plan = checkpoint.plan("M")
    checkpoint.restore(checkpoint.folders(plan), jax.devices()[0], 2, lambda *call: calls.append(call))
    assert calls[-1][:2] == (checkpoint.weight_bytes(plan),) * 2
    assert len(calls) == sum(len(checkpoint.leaves(*folder)) for folder in checkpoint.folders(plan))


def test_weight_bytes_are_the_arrays_bytes(made):
    checkpoint = Checkpoint.open(made)
    for mode in MODES:
        plan = checkpoint.plan(mode)
        arrays = checkpoint.restore(checkpoint.folders(plan), jax.devices()[0], 2)
        assert checkpoint.weight_bytes(plan) == sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    assert checkpoint.weight_bytes(checkpoint.plan("S")) < checkpoint.weight_bytes(checkpoint.plan("XL"))


def test_a_tied_head_reads_nothing_more_in_bf16(made_tied):
    checkpoint = Checkpoint.open(made_tied)
    assert checkpoint.config.tie_word_embeddings
    names = [name for name, _ in checkpoint.folders(checkpoint.plan("XL"))]
    assert names[:2] == ["embedding", "norms"]
    assert names[2:] == [name for name in model_groups(checkpoint.config) if name != "lm_head"]
    assert checkpoint.folders(checkpoint.plan("L"))[-1] == ("lm_head", "int8")


def test_the_four_modes_are_there_and_say_that_they_are_provisional(made):
    plans = Checkpoint.open(made).plans()
    assert set(plans) == set(MODES)
    assert all(plan.provisional for plan in plans.values())


def test_an_unknown_mode_names_those_there(made):
    with pytest.raises(PlanError, match=r"no mode 'XXL'; modes there: \['L', 'M', 'S', 'XL'\]"):
        Checkpoint.open(made).plan("XXL")


def test_a_plan_of_another_model_is_refused(made):
    with pytest.raises(PlanError, match="does not fit"):
        Checkpoint.open(made).folders(Plan("P", {"lm_head": "bf16"}, "", False, {}))


def test_a_missing_folder_names_what_is_stored(made_tied):
    with pytest.raises(CheckpointError, match=r"lm_head in bf16; precisions stored: \['int8'\]"):
        Checkpoint.open(made_tied).leaves("lm_head", "bf16")


@pytest.mark.parametrize("name", ["weights/layers.0.o/int8/values/0.0", "weights/norms/bf16/_METADATA"])
def test_sizes_are_checked_when_opening(copy, name):
    path = copy / name
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=f"{name}: should have .* bytes, has"):
        Checkpoint.open(copy)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name}: missing"):
        Checkpoint.open(copy)


def test_tokenizer_files_are_checked_too(copy):
    (copy / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer/tokenizer\.json"):
        Checkpoint.open(copy)


def test_verify_finds_a_flipped_byte(copy):
    assert Checkpoint.open(copy).verify() == []
    path = copy / "weights/layers.0.o/int8/values/0.0"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    (problem,) = Checkpoint.open(copy).verify()
    assert problem.startswith("weights/layers.0.o/int8/values/0.0: sha256 should be ")


def test_damaged_arrays_are_named_when_restored(copy):
    checkpoint = Checkpoint.open(copy)
    metadata = copy / "weights/layers.0.o/int8/values/.zarray"
    values = json.loads(metadata.read_text())
    metadata.write_text(json.dumps(values | {"shape": [values["shape"][0] // 2, values["shape"][1]]}))
    with pytest.raises(CheckpointError, match=r"weights/layers\.0\.o/int8"):
        checkpoint.restore([("layers.0.o", "int8")], jax.devices()[0], 1)
    metadata.unlink()
    with pytest.raises(CheckpointError, match=r"weights/layers\.0\.o/int8.*verify"):
        checkpoint.restore([("layers.0.o", "int8")], jax.devices()[0], 1)


def test_what_is_no_checkpoint_is_named_for_what_it_is(fixtures_path, tmp_path):
    with pytest.raises(CheckpointError, match=r"no such folder; make one with `convert-weights"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is a Hugging Face folder, not an Elastic checkpoint; convert it"):
        Checkpoint.open(fixtures_path / "tiny_mistral")
    with pytest.raises(CheckpointError, match=r"no elastic\.json"):
        Checkpoint.open(tmp_path)
    (tmp_path / "conversion.json").write_text("damaged")
    with pytest.raises(CheckpointError, match=r"unfinished.*--overwrite"):
        Checkpoint.open(tmp_path)


def test_orbax_itself_reads_the_folders(made):
    import orbax.checkpoint as ocp

    checkpoint = Checkpoint.open(made)
    with ocp.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.restore(made / "weights/layers.0.o/int8")
    assert set(found) == {"values", "scales"}
    ours = checkpoint.restore([("layers.0.o", "int8")], jax.devices()[0], 1)["layers.0.o", "int8"]
    np.testing.assert_array_equal(found["values"], ours["values"])


# -- parts of a checkpoint ---------------------------------------------------------------------------------------------


def test_a_part_can_be_read_and_says_what_a_plan_lacks(copy):
    shutil.rmtree(copy / "weights" / "layers.0.qkv" / "bf16")
    part = Checkpoint.read(copy)
    assert part.wrong_sizes(part.plan("S")) == []
    assert all(problem.endswith(": missing") for problem in part.wrong_sizes(part.plan("XL")))
    assert {problem.split("/")[1] for problem in part.wrong_sizes(part.plan("XL"))} == {"layers.0.qkv"}
    with pytest.raises(CheckpointError, match="is damaged"):
        Checkpoint.open(copy)
    with pytest.raises(CheckpointError, match=r"it has no elastic\.json"):
        Checkpoint.read(copy / "plans")


def test_a_plans_files_are_its_folders_and_the_tokenizer(made):
    checkpoint = Checkpoint.open(made)
    files = set(checkpoint.files(checkpoint.plan("S")))
    assert files < set(checkpoint.files())
    assert {Path(name).parts[:3] for name in files if name.startswith("weights/")} == {
        ("weights", *folder) for folder in checkpoint.folders(checkpoint.plan("S"))
    }
    assert {name for name in files if not name.startswith("weights/")} == {
        f"tokenizer/{path.name}" for path in (made / "tokenizer").iterdir()
    }


def test_files_may_be_links(made, tmp_path):
    """The Hub's cache is made of them."""
    for file in [file for file in made.rglob("*") if file.is_file()]:
        link = tmp_path / "links" / file.relative_to(made)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    linked, plain = Checkpoint.open(tmp_path / "links"), Checkpoint.open(made)
    assert linked.verify() == []
    folders = plain.folders(plain.plan("S"))
    arrays, expected = (checkpoint.restore(folders, jax.devices()[0], 2) for checkpoint in (linked, plain))
    for folder, leaves in expected.items():
        for name, array in leaves.items():
            np.testing.assert_array_equal(np.asarray(arrays[folder][name]), np.asarray(array))


def test_executables_may_be_elsewhere(made, tmp_path):
    checkpoint = Checkpoint.open(made)
    assert checkpoint.executables_path == made / "executables"
    assert checkpoint.with_home(tmp_path).executables_path == tmp_path / "executables"
    assert checkpoint.with_home(tmp_path).path == made


def test_a_plan_has_its_files_name(copy):
    (copy / "plans" / "S.json").rename(copy / "plans" / "T.json")
    with pytest.raises(PlanError, match=r"T\.json should hold the plan 'T', found 'S'"):
        Checkpoint.open(copy).plan("T")
