import json

import pytest

from elastic_jax.errors import EvaluationError
from elastic_jax.evaluation import answers
from elastic_jax.evaluation.answers import Writer

TASK, MODEL, FACTS = {"task": "piqa"}, {"mode": "S"}, {"versions": {}}
ASKED = {f"piqa/{n}": f"digest{n}" for n in range(4)}


def writer(file, asked=ASKED, model=MODEL):
    return Writer(file, asked, TASK, model, FACTS)


def item(n):
    return {"id": f"piqa/{n}", "right": n % 2}


@pytest.fixture
def file(tmp_path):
    return answers.path_of(tmp_path, "S", "piqa")


def test_a_later_run_goes_on_where_one_ended(file):
    first = writer(file)
    assert (first.done, first.missing, first.replaced) == (0, list(ASKED), False)
    first.append([item(0), item(2)])
    with file.open("a") as opened:
        opened.write('{"id": "piqa/3", "asked"')  # an interruption
    second = writer(file)
    assert (second.done, second.missing, second.replaced) == (2, ["piqa/1", "piqa/3"], False)
    second.append([item(3), item(1)])
    found = answers.read(file)
    assert found is not None
    assert (found.task, found.model, found.facts) == (TASK, MODEL, FACTS)
    only = found.only(ASKED)
    assert only is not None
    assert [each["id"] for each in only.items] == list(ASKED)
    assert only.items[1] == {"id": "piqa/1", "asked": "digest1", "right": 1}


def test_more_items_are_added_and_fewer_are_chosen(file):
    few = {name: ASKED[name] for name in list(ASKED)[:2]}
    writer(file, few).append([item(0), item(1)])
    more = writer(file)
    assert more.missing == ["piqa/2", "piqa/3"]
    assert not more.replaced
    more.append([item(2), item(3)])
    found = answers.read(file)
    assert found is not None
    assert len(found.only(few).items) == 2
    assert writer(file, few).missing == []
    assert found.only({**ASKED, "piqa/9": "new"}) is None


def test_answers_to_other_prompts_are_asked_for_again(file):
    writer(file).append([item(n) for n in range(4)])
    other = writer(file, {**ASKED, "piqa/1": "changed"})
    assert other.replaced
    assert other.missing == ["piqa/1"]
    found = answers.read(file)
    assert found is not None
    assert [each["id"] for each in found.items] == ["piqa/0", "piqa/2", "piqa/3"]


def test_answers_of_another_model_are_replaced(file):
    writer(file).append([item(0)])
    other = writer(file, model={"mode": "S", "plan": "other"})
    assert other.replaced
    assert other.done == 0


def test_no_file_is_no_answers_and_another_file_is_refused(file):
    assert answers.read(file) is None
    file.parent.mkdir()
    for content in ("text\n", "{}\n", json.dumps({"format": 99}) + "\n", "[]\n"):
        file.write_text(content)
        with pytest.raises(EvaluationError, match="holds no answers"):
            answers.read(file)
