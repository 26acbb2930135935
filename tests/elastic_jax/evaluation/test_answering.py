"""Asking is compared with lm-eval's own evaluator, which does all of a task at once."""

import math
import zlib

import pytest
from lm_eval.api.model import LM

from elastic_jax.errors import EvaluationError
from elastic_jax.evaluation import answering, answers, items, tasks
from elastic_jax.evaluation.answers import Writer

pytestmark = pytest.mark.usefixtures("task_index")


class Guessing(LM):
    """Answers from a digest of the question: repeatable, and unlike for unlike questions."""

    def __init__(self):
        super().__init__()
        self.asked = 0

    def loglikelihood(self, requests):
        self.asked += len(requests)
        return [(-zlib.crc32(repr(r.args).encode()) / 2**30, False) for r in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        self.asked += len(requests)
        return [f" So it is.\n#### {2 * (zlib.crc32(r.args[0].encode()) % 3)}\n" for r in requests]

    def _loglikelihood_tokens(self, requests, **_):
        return [(-float(len(continuation)), True) for _, _, continuation in requests]


def answer(task, model, folder, limit=None, chunk=3):
    asked = task.requests(limit)
    file = answers.path_of(folder, "M", task.name)
    told = []
    writer = Writer(file, tasks.digests(asked), task.identity(), {"mode": "M"}, {})
    answering.answer_task(task, asked, model, writer, lambda *each: told.append(each), chunk)
    found = answers.read(file)
    assert found is not None
    return found.only(tasks.digests(asked)).items, told


# One that compares log-likelihoods and one that generates are quick enough for every run.
@pytest.mark.parametrize(
    "name",
    [name if name in ("piqa", "gsm8k") else pytest.param(name, marks=pytest.mark.slow) for name in items.SOURCES],
)
def test_what_is_right_is_what_lm_eval_finds(item_folder, tmp_path, name):
    from lm_eval.evaluator import evaluate

    task = tasks.load([name], item_folder)[0]
    found, told = answer(task, Guessing(), tmp_path)
    fresh = tasks.load([name], item_folder)[0]
    for part in fresh.parts.values():
        part.set_fewshot_seed(seed=tasks.SEED)
    results = evaluate(Guessing(), {"tasks": fresh.parts}, bootstrap_iters=0)
    metric, chosen = task.metric
    expected = {
        f"{part}/{sample['doc_id']}": sample[metric]
        for part, samples in results["samples"].items()
        for sample in samples
        if sample["filter"] == chosen
    }
    assert {item["id"]: item["right"] for item in found} == expected
    assert told[0][:2] == (0, len(found))
    assert told[-1][:2] == (len(found), len(found))


def test_answers_hold_what_was_chosen(item_folder, tmp_path):
    found, _ = answer(tasks.load(["arc_challenge"], item_folder)[0], Guessing(), tmp_path)
    for item in found:
        assert item["right"] == (item["answer"] == item["target"]) == item["metrics"]["acc_norm"]
    generated, _ = answer(tasks.load(["gsm8k"], item_folder)[0], Guessing(), tmp_path)
    assert [item["target"] for item in generated] == ["0", "2", "4"]
    assert all(item["right"] == (item["answer"] == item["target"]) for item in generated)
    assert generated[0]["metrics"].keys() == {"exact_match,strict-match", "exact_match,flexible-extract"}
    choices, _ = answer(tasks.load(["winogrande"], item_folder)[0], Guessing(), tmp_path)
    assert all(item["target"] == 1 and len(item["log_probabilities"]) == 2 for item in choices)


def test_only_what_is_missing_is_asked(item_folder, tmp_path):
    task = tasks.load(["piqa"], item_folder)[0]
    first, second, third = Guessing(), Guessing(), Guessing()
    few, _ = answer(task, first, tmp_path, limit=3)
    more, _ = answer(task, second, tmp_path, limit=8)
    answer(task, third, tmp_path)
    assert (first.asked, second.asked, third.asked) == (6, 10, 0)
    assert more[:3] == few


def test_windows_of_a_text(tmp_path):
    windows = answering.text_windows(list(range(100)), 3, 30)
    assert [window[0] for window in windows] == [0, 30, 60]
    file = answers.path_of(tmp_path, "M", answering.TEXT)
    identity = answering.text_identity(answering.TEXT, "text", 30)
    writer = Writer(file, answering.window_digests(windows), identity, {}, {})
    answering.answer_text(windows, Guessing(), writer, lambda *_: None, chunk=2)
    found = answers.read(file)
    assert found is not None
    assert [(item["log_probability"], item["tokens"]) for item in found.items] == [(-29.0, 29)] * 3
    assert len(answering.text_windows(list(range(100)), 9, 30)) == 3
    with pytest.raises(EvaluationError, match="has 10 tokens, expected 30"):
        answering.text_windows(list(range(10)), 3, 30)
    assert math.isclose(sum(item["tokens"] for item in found.items), 87)
