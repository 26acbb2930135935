import json
import shutil

import pytest

from elastic_jax.errors import EvaluationError
from elastic_jax.evaluation import items


def changed(item_folder, tmp_path, file, line):
    shutil.copytree(item_folder, tmp_path / "items")
    with (tmp_path / "items" / file).open("a", encoding="utf-8") as opened:
        opened.write(line + "\n")
    return tmp_path / "items"


def test_every_task_is_read(item_folder):
    found = {task: items.read_task(item_folder, task) for task in items.SOURCES}
    assert {task: list(splits) for task, splits in found.items()} == {
        "arc_challenge": ["test"],
        "gsm8k": ["test", "train"],
        "mmlu": ["test", "dev"],
        "piqa": ["validation"],
        "winogrande": ["validation"],
    }
    assert found["piqa"]["validation"][1]["sol2"] == "cloud"
    assert items.text(item_folder).startswith("A stone is near the stone . \nA river")


def test_a_line_separator_inside_an_item_ends_no_line(item_folder, tmp_path):
    line = json.dumps({"goal": "a\u2028b", "sol1": "c", "sol2": "d", "label": 1}, ensure_ascii=False)
    folder = changed(item_folder, tmp_path, "piqa_valid.jsonl", line)
    assert items.read_task(folder, "piqa")["validation"][-1]["goal"] == "a\u2028b"


@pytest.mark.parametrize(
    ("task", "file", "line", "message"),
    [
        ("piqa", "piqa_valid.jsonl", "{", r"piqa_valid.jsonl:9: expected a JSON object"),
        ("piqa", "piqa_valid.jsonl", "[1]", "expected a JSON object, found list"),
        ("piqa", "piqa_valid.jsonl", '{"goal": "x", "sol1": "y", "label": 0}', "`sol2` must be text, found only"),
        (
            "piqa",
            "piqa_valid.jsonl",
            '{"goal": "x", "sol1": 1, "sol2": "z", "label": 0}',
            "`sol1` must be text, found 1",
        ),
        ("piqa", "piqa_valid.jsonl", '{"goal": "x", "sol1": "y", "sol2": "z", "label": 2}', "label must be 0 or 1"),
        ("piqa", "piqa_valid.jsonl", '{"goal": "x", "sol1": "y", "sol2": "z", "label": true}', "whole number"),
        (
            "mmlu",
            "mmlu_test_few.jsonl",
            '{"question": "q", "subject": "anatomy", "choices": ["a", "b"], "answer": 1}',
            "four choices",
        ),
        (
            "arc_challenge",
            "arc_challenge_test.jsonl",
            '{"id": "1", "question": "q", "choices": {"text": ["a"], "label": ["A", "B"]}, "answerKey": "A"}',
            "two equally long lists",
        ),
        (
            "arc_challenge",
            "arc_challenge_test.jsonl",
            '{"id": "1", "question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "C"}',
            "one of the labels",
        ),
        (
            "winogrande",
            "winogrande_xl_valid.jsonl",
            '{"sentence": "s", "option1": "a", "option2": "b", "answer": "1"}',
            "`_`",
        ),
        ("gsm8k", "gsm8k_test.jsonl", '{"question": "q", "answer": "7"}', "#### NUMBER"),
    ],
)
def test_a_malformed_item_is_named(item_folder, tmp_path, task, file, line, message):
    with pytest.raises(EvaluationError, match=message):
        items.read_task(changed(item_folder, tmp_path, file, line), task)


def test_missing_and_ambiguous_files_are_refused(item_folder, tmp_path):
    with pytest.raises(EvaluationError, match=r"one file piqa_\*.jsonl in .*, found none"):
        items.read_task(tmp_path, "piqa")
    shutil.copytree(item_folder, tmp_path / "items")
    shutil.copy(tmp_path / "items" / "piqa_valid.jsonl", tmp_path / "items" / "piqa_more.jsonl")
    with pytest.raises(EvaluationError, match=r"piqa_more.jsonl, piqa_valid.jsonl"):
        items.read_task(tmp_path / "items", "piqa")
    with pytest.raises(EvaluationError, match="no local items are known for task 'hellaswag'"):
        items.read_task(item_folder, "hellaswag")
    (tmp_path / "items" / "piqa_more.jsonl").unlink()
    (tmp_path / "items" / "piqa_valid.jsonl").write_text("\n\n")
    with pytest.raises(EvaluationError, match="holds no item"):
        items.read_task(tmp_path / "items", "piqa")


def test_the_files_of_the_items_themselves_are_named(item_folder):
    names = [path.name for path in items.task_files(item_folder, ["gsm8k", "piqa"])]
    assert names == ["gsm8k_test.jsonl", "piqa_valid.jsonl"]
