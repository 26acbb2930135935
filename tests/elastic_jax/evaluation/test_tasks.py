import ast
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_jax.errors import EvaluationError
from elastic_jax.evaluation import items, tasks

REPOSITORY = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.usefixtures("task_index")


@pytest.fixture(scope="module")
def loaded(item_folder):
    return {task.name: task for task in tasks.load(list(items.SOURCES), item_folder)}


def test_prompts_are_those_of_lm_eval(loaded):
    first = {name: task.requests(1)[0].args for name, task in loaded.items()}
    assert first["piqa"] == ("Question: Use a stone\nAnswer:", " with a river")
    assert first["arc_challenge"] == ("Question: What is a stone?\nAnswer:", " stone")
    assert first["winogrande"] == ("The stone met a river as it", " fell.")
    assert first["mmlu"][0].startswith("The following are multiple choice questions (with answers) about anatomy.\n\n")
    assert first["gsm8k"][0].count("Question:") == 6
    assert first["gsm8k"][1]["until"][0] == "Question:"


def test_metrics_examples_and_data_are_told(loaded):
    assert loaded["arc_challenge"].metric == ("acc_norm", "none")
    assert loaded["gsm8k"].metric == ("exact_match", "strict-match")
    assert loaded["piqa"].metric == ("acc", "none")
    assert {name: task.fewshot for name, task in loaded.items()} == {
        "arc_challenge": 0,
        "gsm8k": 5,
        "mmlu": 0,
        "piqa": 0,
        "winogrande": 0,
    }
    assert loaded["piqa"].identity()["data"]["file"] == "piqa_valid.jsonl"


def test_the_same_items_make_the_same_prompts(loaded, item_folder):
    again = tasks.load(["gsm8k"], item_folder)[0]
    assert tasks.digests(again.requests(None)) == tasks.digests(loaded["gsm8k"].requests(None))
    few = tasks.digests(loaded["gsm8k"].requests(2))
    assert few.items() <= tasks.digests(loaded["gsm8k"].requests(None)).items()
    assert list(few) == ["gsm8k/0", "gsm8k/1"]


def test_a_limit_is_spread_over_the_parts_of_a_group(loaded):
    assert list(tasks.by_item(loaded["mmlu"].requests(3))) == [
        "mmlu_anatomy/0",
        "mmlu_anatomy/1",
        "mmlu_virology/0",
        "mmlu_virology/1",
    ]
    assert len(tasks.by_item(loaded["mmlu"].requests(None))) == 6


def test_limits():
    names = ["piqa", "mmlu"]
    assert tasks.parse_limit(None, names) == {"piqa": None, "mmlu": None}
    assert tasks.parse_limit("30", names) == {"piqa": 30, "mmlu": 30}
    assert tasks.parse_limit("mmlu=30", names) == {"piqa": None, "mmlu": 30}
    assert tasks.parse_limit("mmlu=30, piqa=5", names) == {"piqa": 5, "mmlu": 30}
    for wrong in ("", "0", "x", "-3", "3,4", "mmlu=", "mmlu=3=4", "mmlu=1.5"):
        with pytest.raises(EvaluationError, match="--limit must be"):
            tasks.parse_limit(wrong, names)
    with pytest.raises(EvaluationError, match="'gsm8k', which is not evaluated"):
        tasks.parse_limit("gsm8k=3", names)


def test_unknown_and_repeated_tasks_are_refused(item_folder):
    with pytest.raises(EvaluationError, match="lm-eval has no task 'no_such_task'"):
        tasks.load(["no_such_task"], None)
    with pytest.raises(EvaluationError, match="asked for twice: piqa"):
        tasks.load(["piqa", "piqa"], item_folder)
    with pytest.raises(EvaluationError, match="no task is asked for"):
        tasks.load([], item_folder)


def test_without_lm_eval_it_is_said_how_to_get_it(item_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(EvaluationError, match="uv sync --extra eval"):
        tasks.load(["piqa"], item_folder)


@pytest.mark.parametrize("name", ["__init__", "items", "tasks", "answers", "answering"])
def test_what_the_original_is_asked_by_is_python_3_11(name):
    file = REPOSITORY / "elastic_jax" / "evaluation" / f"{name}.py"
    ast.parse(file.read_text("utf-8"), feature_version=(3, 11))


def test_what_the_original_is_asked_by_needs_no_jax():
    code = "import sys; from elastic_jax.evaluation import answering; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
