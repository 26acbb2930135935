import math

import pytest

from elastic_jax.errors import EvaluationError
from elastic_jax.evaluation import statistics
from elastic_jax.evaluation.answers import Answers
from elastic_jax.evaluation.quality import MEAN, assess, perplexity, render

LOGS = [-1.0, -2.0]


def answers(name, rights, prompt="p"):
    items = [
        {
            "id": f"{name}/{n}",
            "asked": prompt,
            "right": right,
            "answer": n % 2 if right else 1 - n % 2,
            "target": n % 2,
            "log_probabilities": LOGS,
        }
        for n, right in enumerate(rights)
    ]
    return Answers({"task": name}, {}, {}, items)


def text(value):
    items = [{"id": f"window/{n}", "asked": "w", "log_probability": value, "tokens": 10} for n in range(3)]
    return Answers({"task": "wikitext2"}, {}, {}, items)


GOOD = [1] * 800 + [0] * 200
LIKE_COINS = [1, 0] * 50


@pytest.fixture
def quality():
    lossy = [0] * 100 + [1] * 700 + [0] * 200
    found = {
        "S": {"piqa": answers("piqa", lossy), "winogrande": answers("winogrande", LIKE_COINS)},
        "L": {"piqa": answers("piqa", GOOD), "winogrande": answers("winogrande", LIKE_COINS[::-1])},
        "XL": {"piqa": answers("piqa", [*GOOD[:-1], 1]), "winogrande": answers("winogrande", LIKE_COINS)},
        "Original": {"piqa": answers("piqa", GOOD), "winogrande": answers("winogrande", LIKE_COINS)},
        "W8A8": {"piqa": answers("piqa", [1, 0] * 500), "winogrande": answers("winogrande", LIKE_COINS)},
    }
    texts = {"S": text(-31.0), "L": text(-30.1), "XL": text(-30.0), "Original": text(-30.0), "W8A8": text(-60.0)}
    kl = {"S": {"prompt": {"kl": 0.02, "stderr": 0.001}, "generated": {"kl": 0.01, "stderr": 0.001}}}
    return assess(found, texts, kl)


def test_rows_are_every_mode_by_every_task_and_the_mean(quality):
    modes = ["S", "L", "XL", "Original", "W8A8"]
    assert [(row["mode"], row["task"]) for row in quality.rows] == [
        (mode, task) for mode in modes for task in ("piqa", "winogrande", MEAN)
    ]
    row = quality.rows[0]
    assert row["n"] == 1000
    assert row["accuracy"] == pytest.approx(0.7)
    assert row["recovery"] == pytest.approx(0.875)
    assert row["loss"] == pytest.approx(0.125)
    assert row["loss_upper95"] > 0.125
    assert row["flips"] == pytest.approx(0.1)
    assert (row["lost"], row["gained"]) == (100, 0)
    assert row["mcnemar_p"] == pytest.approx(statistics.mcnemar(100, 0))


def test_tasks_at_chance_are_left_out_of_the_mean_and_named(quality):
    assert quality.counted == ["piqa"]
    assert "at chance level: the original has 50.0 % of 100" in quality.left_out["winogrande"]
    assert quality.mean_row("S")["accuracy"] == pytest.approx(0.7)
    assert quality.mean_row("S")["n"] == 1000


def test_a_promise_is_kept_where_the_bound_is_under_it(quality):
    assert quality.mean_row("L")["certified"] is True
    assert quality.mean_row("L")["promise"] == 0.01
    assert quality.mean_row("S")["certified"] is False
    for mode in ("XL", "Original", "W8A8"):
        assert quality.mean_row(mode)["certified"] is None


def test_distances_are_on_the_mean_rows(quality):
    row = quality.mean_row("S")
    assert (row["kl"], row["kl_generated"]) == (0.02, 0.01)
    assert row["perplexity"] == pytest.approx(math.exp(3.1))
    assert row["perplexity_change"] == pytest.approx(math.exp(0.1) - 1)
    assert quality.mean_row("Original")["kl"] == 0
    assert quality.mean_row("L")["kl"] is None
    assert perplexity(text(-60.0)) == pytest.approx(math.exp(6))


def test_xl_is_compared_with_the_original_item_by_item(quality):
    assert quality.baseline == "Original"
    assert quality.differing == {
        "piqa": {"answers": 1, "rights": 1},
        "winogrande": {"answers": 0, "rights": 0},
    }


def test_without_the_original_xl_stands_for_it():
    found = {mode: {"piqa": answers("piqa", GOOD)} for mode in ("XL", "S")}
    quality = assess(found, {}, {})
    assert quality.baseline == "XL"
    assert quality.differing is None
    assert quality.mean_row("S")["loss"] == 0
    assert 0 < quality.mean_row("S")["loss_upper95"] < 0.01
    with pytest.raises(EvaluationError, match="compared with nothing"):
        assess({"S": found["S"]}, {}, {})


def test_a_mean_of_no_task_is_nothing():
    found = {mode: {"winogrande": answers("winogrande", LIKE_COINS)} for mode in ("XL", "S")}
    row = assess(found, {}, {}).mean_row("S")
    assert row["accuracy"] is None
    assert row["certified"] is False


def test_other_questions_are_not_compared():
    found = {"XL": {"piqa": answers("piqa", GOOD)}, "S": {"piqa": answers("piqa", GOOD, prompt="q")}}
    with pytest.raises(EvaluationError, match="asked for different items of piqa"):
        assess(found, {}, {})
    found["S"] = {"piqa": Answers({"task": "piqa", "fewshot": 5}, {}, {}, found["XL"]["piqa"].items)}
    with pytest.raises(EvaluationError, match=r"different things in piqa \(fewshot"):
        assess(found, {}, {})
    with pytest.raises(EvaluationError, match="S has no answers to piqa"):
        assess({"XL": found["XL"], "S": {}}, {}, {})


def test_people_see_everything(quality):
    shown = render(quality, ["S", "L", "XL", "Original", "W8A8"])
    for expected in ("70.00 ± 1.45", "winogrande*", "certified", "estimated", "McNemar p", "compared with Original"):
        assert expected in shown
    assert "different answers: piqa 1, winogrande 0" in shown
