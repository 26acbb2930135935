"""A whole evaluation of a tiny model: asked once, compared, written down."""

import dataclasses
import json
import shutil
from typing import Any

import jax
import pytest
from tiny import tiny_step_config

from elastic_jax.checkpoint import Checkpoint
from elastic_jax.elastic import ElasticMistral
from elastic_jax.errors import EvaluationError, PlanError
from elastic_jax.evaluation.evaluate import QUALITY, Evaluation, Settings
from elastic_jax.executables import ModeStore
from elastic_jax.info import describe, render
from elastic_jax.step import Bucket

pytestmark = pytest.mark.usefixtures("task_index")

DEVICE = jax.devices()[0]
TASKS = ("piqa", "mmlu", "winogrande")


@pytest.fixture(scope="module")
def checkpoint(compiled_tiny, tmp_path_factory):
    """Modes XL and L; a copy, since others rely on which modes the shared one has."""
    shared = compiled_tiny("XL", "float32").checkpoint.path
    folder = tmp_path_factory.mktemp("evaluate") / "tiny.elastic"
    shutil.copytree(shared, folder, ignore=shutil.ignore_patterns("executables"))
    for store in shared.glob("executables/*/XL.float32"):
        shutil.copytree(store, folder / store.relative_to(shared))
    copy = Checkpoint.open(folder)
    step = tiny_step_config(buckets=(Bucket(4, 0), Bucket(0, 64)))
    ModeStore(copy, copy.plan("L"), "float32", DEVICE).compile(step, workers=2, progress=lambda *_: None)
    return copy


@pytest.fixture(scope="module")
def settings(checkpoint, item_folder):
    return Settings(
        modes=("XL", "L", "W8A8"),
        tasks=TASKS,
        data=item_folder,
        limit="winogrande=1",
        out=checkpoint.path / "evaluation",
        text_windows=3,
        text_length=64,
        kl_windows=2,
        control=None,
        calibration=None,
        workers=2,
    )


def evaluation(checkpoint, settings, loaded: list[str], said: list[str]) -> Evaluation:
    def load(mode: str) -> ElasticMistral:
        loaded.append(mode)
        return ElasticMistral.load(checkpoint.path, mode, dtype="float32")

    return Evaluation(checkpoint, settings, DEVICE, load, said.append, lambda *_: None)


@pytest.fixture(scope="module")
def first(checkpoint, settings):
    loaded: list[str] = []
    quality = evaluation(checkpoint, settings, loaded, []).run()
    return quality, loaded


def written(settings) -> dict[str, Any]:
    return json.loads((settings.out / QUALITY).read_text())


def test_every_mode_answers_everything(first):
    quality, loaded = first
    assert loaded == ["XL", "L"]
    found = {(row["mode"], row["task"]): row["n"] for row in quality.rows if row["task"] != "mean"}
    assert found == {(mode, task): n for mode in ("L", "XL", "W8A8") for task, n in zip(TASKS, (8, 6, 1), strict=True)}
    row = quality.mean_row("L")
    assert 0 < row["kl"] < quality.mean_row("W8A8")["kl"]
    assert quality.mean_row("XL")["kl"] == 0
    assert row["perplexity"] == pytest.approx(quality.mean_row("XL")["perplexity"], rel=0.05)


def test_what_is_written_names_everything_and_no_folder(first, settings, checkpoint):
    values = written(settings)
    assert values["rows"] == first[0].rows
    assert values["environment"]["versions"]["lm_eval"]
    assert values["baseline"] == "XL"
    assert values["tasks"]["piqa"]["fewshot"] == 0
    assert values["tokenizer"].keys() >= {"tokenizer.json"}
    assert str(checkpoint.path.parent) not in json.dumps(values)


@pytest.mark.usefixtures("first")
def test_the_plan_and_info_say_whether_the_promise_is_certified(checkpoint):
    stored = checkpoint.plan("L").measured["promise"]
    assert stored["status"] == "estimated"
    assert stored["why_not"]
    shown = render(describe(checkpoint.path))
    assert "L promises to lose less than 1 %: estimated" in shown


def test_what_is_answered_is_not_asked_again(first, checkpoint, settings):
    loaded: list[str] = []
    said: list[str] = []
    again = evaluation(checkpoint, settings, loaded, said).run()
    assert loaded == []
    assert again.rows == first[0].rows
    assert said == [f"{mode}: everything is answered" for mode in settings.modes]


@pytest.mark.usefixtures("first")
def test_an_original_that_is_there_is_what_is_compared_with(checkpoint, settings, tmp_path):
    out = tmp_path / "evaluation"
    shutil.copytree(settings.out, out)
    shutil.copytree(out / "XL", out / "Original")
    quality = evaluation(checkpoint, dataclasses.replace(settings, out=out), [], []).run()
    assert quality.baseline == "Original"
    assert quality.differing == {task: {"answers": 0, "rights": 0} for task in TASKS}
    (out / "Original" / "mmlu.jsonl").unlink()
    with pytest.raises(EvaluationError, match=r"Original to mmlu are missing: `benches/original.py` makes them"):
        evaluation(checkpoint, dataclasses.replace(settings, out=out), [], []).run()


def test_what_cannot_be_evaluated_is_refused_before_anything_runs(checkpoint, settings):
    for change, error, message in (
        ({"modes": ("Q",)}, PlanError, "no mode 'Q'"),
        ({"modes": ("Original",)}, EvaluationError, "answers of the original are made by"),
        ({"modes": ("XL", "XL")}, EvaluationError, "a mode is asked for twice: XL"),
        ({"tasks": ("hellaswag",), "limit": None}, EvaluationError, "no local items are known"),
        ({"limit": "none"}, EvaluationError, "--limit must be"),
    ):
        with pytest.raises(error, match=message):
            evaluation(checkpoint, dataclasses.replace(settings, **change), [], [])
