"""Measurements on a device that holds only part of the weights, against those on one that holds all."""

import json
import shutil

import jax
import numpy as np
import pytest
from tiny import MISTRAL_SMALL
from typer.testing import CliRunner

from elastic_jax import cli
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.errors import CheckpointError, MemoryPlanError
from elastic_jax.groups import LM_HEAD, model_groups
from elastic_jax.plan import CHOICES
from elastic_jax.search import calibrate as calibration
from elastic_jax.search import held, parallel, room, sampled
from elastic_jax.search.forward import Forward
from elastic_jax.search.held import AllHeld, PartlyHeld
from elastic_jax.search.measuring import PlanMeter
from elastic_jax.search.one_pass import METHOD, measure_fast
from elastic_jax.search.parallel import Shards
from elastic_jax.search.rivals import uniform
from elastic_jax.search.room import Room, calibrating_bytes, searching_bytes, weight_sizes
from elastic_jax.search.scores import SCORES, Scores
from elastic_jax.search.sensitivity import measure
from elastic_jax.search.texts import Text

DEVICE = jax.devices()[0]


def room_of(config, part, device=DEVICE, **given):
    """Room for a part of what may come and go, and always for one layer."""
    whole = Room.of(config, device, beside=0, available=1 << 50, **given)
    most = sum(whole.sizes.values())
    budget = max(whole.fixed + whole.layer, int(part * most))
    free = whole.beside + budget  # on a CPU room for converting is added
    found = Room.of(config, device, beside=0, available=free, **given)
    assert found.budget == budget
    assert not found.everything
    return found


@pytest.fixture(scope="module", params=["tiny_mistral", pytest.param("tiny_llama", marks=pytest.mark.slow)])
def checkpoint(request, checkpoint_of):
    return checkpoint_of(request.param)


def windows(config, count=3, length=20):
    return np.random.default_rng(0).integers(0, config.vocab_size, (count, length)).astype(np.int32)


@pytest.fixture(scope="module")
def whole(checkpoint):
    return Forward.load(checkpoint, windows(checkpoint.config), DEVICE, 2)


@pytest.fixture(scope="module", params=[0.0, 0.5])
def part(request, checkpoint):
    """A forward with room for one layer, or for half of the weights."""
    config = checkpoint.config
    return Forward.load(checkpoint, windows(config), DEVICE, 2, room_of(config, request.param))


def scored(forward, fast):
    scores = Scores({"method": METHOD} if fast else {})
    if fast:
        measure_fast(forward, scores, seed=0, progress=lambda *_: None)
    else:
        measure(forward, scores, save=lambda: None, progress=lambda *_: None)
    return scores


def saved(scores, folder):
    scores.save(folder / "scores.json")
    return json.loads((folder / "scores.json").read_text())


@pytest.mark.parametrize("fast", [False, True])
def test_scores_are_exactly_those_of_a_device_that_holds_all(whole, part, fast, tmp_path):
    assert isinstance(whole._weights, AllHeld)
    assert isinstance(part._weights, PartlyHeld)
    assert saved(scored(part, fast), tmp_path) == saved(scored(whole, fast), tmp_path)
    assert part._weights.peak <= part._weights._budget


def test_plans_that_mix_precisions_measure_the_same(whole, part):
    groups = list(model_groups(whole.config))
    random, other = np.random.default_rng(3), windows(whole.config, 4)
    meters = [(PlanMeter(each), PlanMeter(each.over(other))) for each in (whole, part)]
    for _ in range(4):
        plan = {g: "w8a16" if g == LM_HEAD else str(random.choice(CHOICES)) for g in groups}
        for one, another in zip(*meters, strict=True):
            found = [vars(meter.measure(plan)) for meter in (one, another)]
            assert found[0] == found[1]
    assert part._weights.peak <= part._weights._budget


def test_several_devices_each_hold_a_part(checkpoint):
    devices, config = jax.devices()[:2], checkpoint.config
    rooms = [room_of(config, 0.3, device) for device in devices]
    spread = parallel.load(checkpoint, windows(config), devices, 2, rooms)
    every = parallel.load(checkpoint, windows(config), devices, 2)
    assert isinstance(spread, Shards)
    assert [type(each._weights) for each in spread.parts] == [PartlyHeld] * 2
    plan = uniform(list(model_groups(config)), "w8a8")
    assert vars(PlanMeter(spread).measure(plan)) == vars(PlanMeter(every).measure(plan))


def test_cpu_devices_share_one_memory(checkpoint, monkeypatch):
    monkeypatch.setattr(room, "available_memory", lambda _: 8 << 30)
    rooms = parallel.rooms(checkpoint.config, (3, 20), jax.devices())
    assert [each.available for each in rooms] == [(8 << 30) // 3] * 3


def test_bytes_of_weights_are_those_on_the_device(checkpoint, whole):
    for (name, precision), size in weight_sizes(checkpoint.config, DEVICE, ("bf16", "int8")).items():
        arrays = jax.tree.leaves(whole._weights.get(name, precision))
        assert sum(array.nbytes for array in arrays) == size, name


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_calibration_makes_the_same_checkpoint(checkpoint, tmp_path, rounding):
    config, made = checkpoint.config, []
    for name, its in (("whole", None), ("part", room_of(checkpoint.config, 0.0, precisions=("bf16",), once=True))):
        text = Text(windows(config, 6, 24), {"source": "random"})
        given = {"strengths": (0.0, 0.5), "rounding": rounding, "device": DEVICE, "workers": 2}
        result = calibration.calibrate(checkpoint, tmp_path / name, text, **given, progress=lambda *_: None, room=its)
        made.append(result)
    assert made[0].record == made[1].record
    assert made[0].checkpoint.manifest.folders == made[1].checkpoint.manifest.folders  # sha256 of every file


def test_calibration_reads_each_weight_once(checkpoint, tmp_path, monkeypatch):
    read, kept = [], held.PartlyHeld.__init__

    def noted(self, sizes, reader, **given):
        kept(self, sizes, lambda key: read.append(key) or reader(key), **given)

    monkeypatch.setattr(held.PartlyHeld, "__init__", noted)
    text = Text(windows(checkpoint.config, 6, 24), {"source": "random"})
    given = {"strengths": (0.0, 0.5), "device": DEVICE, "workers": 2, "progress": lambda *_: None}
    its = room_of(checkpoint.config, 0.75, precisions=("bf16",), once=True)
    calibration.calibrate(checkpoint, tmp_path / "new", text, **given, room=its)
    assert len(read) == len(set(read))
    assert {precision for _, precision in read} == {"bf16"}


def test_the_message_says_what_does_not_fit_and_what_is_read_again(checkpoint):
    config = checkpoint.config
    assert Room.of(config, DEVICE, beside=0, available=1 << 40).message() is None
    told = room_of(config, 0.5).message()
    assert "of bf16 and" in told
    assert "in each pass of bf16" in told
    assert "slower" in told
    assert "\n" not in told
    once = room_of(config, 0.5, precisions=("bf16",), once=True).message()
    assert "int8" not in once
    assert once.endswith("each once")


@pytest.mark.usefixtures("unchecked_types")
def test_the_message_has_mistral_smalls_sizes():
    class Gpu:
        platform, device_kind = "gpu", "NVIDIA H100 80GB HBM3"

    config = MISTRAL_SMALL
    beside = searching_bytes(config, 12, 128, "gpu")
    found = Room.of(config, Gpu(), beside=beside, available=59 << 30)
    assert not found.everything
    assert "43.91 GiB of bf16 and" in found.message()
    assert "0.00 GiB in each pass of bf16 and 0.00 GiB in each pass of int8" in found.message()
    # Measured by benches/search_24b.py with four windows of 1024 tokens: 54.3 GiB in all, 43.9 of them weights.
    assert 10.4 * 2**30 < searching_bytes(config, 4, 1024, "gpu") < 13 * 2**30


def test_less_than_one_layer_is_refused(checkpoint):
    config = checkpoint.config
    found = room_of(config, 0.0)
    with pytest.raises(MemoryPlanError, match=r"are free, and at least .* are needed.*--windows"):
        Room.of(config, DEVICE, beside=0, available=found.available - 1)


def test_a_missing_precision_is_refused_before_anything_runs(checkpoint, tmp_path):
    manifest = checkpoint.manifest
    folders = {key: folder for key, folder in manifest.folders.items() if key != ("layers.1.o", "int8")}
    lacking = Checkpoint(checkpoint.path, type(manifest)(**{**vars(manifest), "folders": folders}), home=tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.o"):
        Forward.load(lacking, windows(checkpoint.config), DEVICE, 2, room_of(checkpoint.config, 0.0))


def test_compensation_and_longer_windows_need_more(checkpoint):
    config = checkpoint.config
    assert calibrating_bytes(config, 6, 24, compensated=True) > calibrating_bytes(config, 6, 24, compensated=False)
    assert searching_bytes(config, 6, 48, "cpu") > searching_bytes(config, 6, 24, "cpu")


@pytest.fixture
def own(checkpoint_of, tmp_path):
    shutil.copytree(checkpoint_of("tiny_mistral").path, tmp_path / "own.elastic")
    (tmp_path / "text.txt").write_text("A text about nothing in particular, written for a test. " * 200)
    return tmp_path / "own.elastic"


def command(*arguments):
    return CliRunner().invoke(cli.app, [str(each) for each in arguments])


def searching(own, *more):
    text, sizes = own.parent / "text.txt", ("--windows", 2, "--held-out", 2, "--length", 16, "--points", 3)
    return command("search", own, "--calibration", text, *sizes, "--target", "h100", *more)


def with_memory(monkeypatch, own, part):
    """Makes the device look as if it had room for a part of the weights."""
    config = Checkpoint.open(own).config
    beside = searching_bytes(config, 2, 16, "cpu")
    free = room_of(config, part).available + beside
    for module in (room, sampled):
        monkeypatch.setattr(module, "available_memory", lambda _: free * len(jax.local_devices()[:2]))


def test_the_command_says_that_it_streams_and_continues_where_it_was_interrupted(own, monkeypatch):
    with_memory(monkeypatch, own, 0.5)
    save, saves = Scores.save, []

    def interrupted(self, file):
        save(self, file)
        saves.append(file)
        if len(saves) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Scores, "save", interrupted)
    assert searching(own).exit_code != 0
    some = json.loads((own / SCORES).read_text())
    again = searching(own)
    assert again.exit_code == 0, again.output
    assert "continuing with" in again.stderr
    assert "in each pass of bf16" in again.stderr
    assert len(json.loads((own / SCORES).read_text())["scores"]) > len(some["scores"])


def test_the_commands_refuse_before_any_work(own, monkeypatch, tmp_path):
    for module in (room, sampled):
        monkeypatch.setattr(module, "available_memory", lambda _: 1000)
    found = searching(own)
    assert isinstance(found.exception, MemoryPlanError)
    assert "one layer of weights" in str(found.exception)
    assert not (own / "search").exists()
    found = command("calibrate", own, tmp_path / "new")
    assert "one layer of weights" in str(found.exception)
    assert not (tmp_path / "new").exists()


def test_text_that_the_model_cannot_write_is_asked_for(own, monkeypatch):
    monkeypatch.setattr(sampled, "available_memory", lambda _: 1000)
    found = command("search", own, "--target", "h100")
    assert isinstance(found.exception, MemoryPlanError)
    assert "--calibration FILE" in str(found.exception)
