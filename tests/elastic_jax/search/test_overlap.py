import json

import pytest

from elastic_jax.errors import ConfigError
from elastic_jax.search.overlap import grams, leave_out, task_grams

ITEM = "One two, three four five six seven: eight nine ten eleven twelve thirteen fourteen."


@pytest.fixture
def tasks(tmp_path):
    file = tmp_path / "items.jsonl"
    lines = [{"question": "too short"}, {"goal": ITEM, "label": 1}, {"a": ["left right up down in"], "b": "out " * 9}]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


def test_runs_of_thirteen_words():
    assert len(list(grams(ITEM))) == 2
    assert list(grams("a b c")) == []


def test_an_item_inside_a_text_is_found_whatever_its_case_and_punctuation(tasks):
    texts = ["harmless", "He said: ONE TWO three-four five six seven eight, nine ten eleven twelve thirteen! And left."]
    assert leave_out(texts, task_grams([tasks])) == ([0], ["text 2 holds 13 words in a row of items.jsonl:2"])


def test_twelve_words_in_a_row_are_kept(tasks):
    text = "two three four five six seven eight nine ten eleven twelve thirteen and more that is different"
    assert leave_out([text], task_grams([tasks]))[0] == [0]


def test_fields_are_also_read_one_after_another(tasks):
    assert leave_out(["left right up down in" + " out" * 9], task_grams([tasks]))[0] == []


def test_without_items_nothing_is_left_out():
    assert leave_out([ITEM], {}) == ([0], [])


def test_a_file_that_is_no_json_lines_is_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(ConfigError, match=r"must be JSON lines, but .*bad\.jsonl"):
        task_grams([tmp_path / "bad.jsonl"])
    with pytest.raises(ConfigError, match=r"absent\.jsonl"):
        task_grams([tmp_path / "absent.jsonl"])
