import dataclasses
import shutil

import pytest

from elastic_jax.checkpoint import Checkpoint
from elastic_jax.evaluation import promise

SAMPLED = {"source": "sampled from the original model at temperature 1", "tasks": []}
ROW = {"promise": 0.02, "loss_upper95": 0.015, "loss": 0.004, "accuracy": 0.7, "recovery": 0.996, "n": 1838}


@pytest.fixture
def checkpoint(checkpoint_of, tmp_path):
    shutil.copytree(checkpoint_of("tiny_mistral").path, tmp_path / "own.elastic")
    return Checkpoint.open(tmp_path / "own.elastic")


def searched(plan, text):
    return dataclasses.replace(plan, provisional=False, measured={"held_out": text})


def test_items_are_unseen_by_hand_and_by_text_that_the_model_wrote(checkpoint):
    plan = checkpoint.plan("S")
    assert promise.seen_by(checkpoint, plan, ["piqa_valid.jsonl"]) is None
    assert promise.seen_by(checkpoint, searched(plan, SAMPLED), ["piqa_valid.jsonl"]) is None


def test_text_from_a_file_must_have_been_compared_with_the_items(checkpoint):
    plan = searched(checkpoint.plan("S"), {"source": "own.txt", "tasks": ["piqa_valid.jsonl"]})
    assert promise.seen_by(checkpoint, plan, ["piqa_valid.jsonl"]) is None
    seen = promise.seen_by(checkpoint, plan, ["piqa_valid.jsonl", "mmlu_test.jsonl"])
    assert seen == (
        "the search read own.txt, which was not compared with mmlu_test.jsonl: name the items to it with --tasks"
    )
    untold = dataclasses.replace(plan, measured={})
    assert "does not say which text" in promise.seen_by(checkpoint, untold, ["piqa_valid.jsonl"])


def test_what_calibration_read_counts_too(checkpoint):
    source = {**checkpoint.manifest.source, "calibration": {"text": {"source": "own.txt", "tasks": []}}}
    manifest = dataclasses.replace(checkpoint.manifest, source=source)
    calibrated = Checkpoint(checkpoint.path, manifest, home=checkpoint.path)
    assert promise.seen_by(calibrated, checkpoint.plan("S"), ["piqa_valid.jsonl"]).startswith(
        "the calibration read own"
    )


@pytest.mark.parametrize(
    ("change", "seen", "why"),
    [
        ({}, None, None),
        ({}, "the search read own.txt", "the search read own.txt"),
        ({"loss_upper95": 0.02}, None, "below 2.00 % with 95 % confidence, which is not under 2.0 %"),
        ({"loss_upper95": None}, None, "at chance level in every task"),
    ],
)
def test_certified_or_why_not(change, seen, why):
    found = promise.apply(ROW | change, seen)
    assert found["certified"] is (why is None)
    assert found["why_not"] is None if why is None else why in found["why_not"]


def test_the_original_promises_nothing():
    assert promise.apply({"promise": None, "certified": None}, None)["certified"] is None


def test_the_plan_file_says_what_was_found_and_keeps_its_choices(checkpoint):
    plan = checkpoint.plan("S")
    promise.record(checkpoint, plan, promise.apply(ROW, None), {"items": {"piqa": {"file": "piqa_valid.jsonl"}}})
    read = Checkpoint.open(checkpoint.path).plan("S")
    assert read.digest() == plan.digest()
    assert read.measured["promise"]["status"] == "certified"
    assert read.measured["promise"]["items"] == {"piqa": {"file": "piqa_valid.jsonl"}}
    promise.record(checkpoint, read, promise.apply(ROW | {"loss_upper95": 0.03}, None), {})
    assert checkpoint.plan("S").measured["promise"]["status"] == "estimated"
