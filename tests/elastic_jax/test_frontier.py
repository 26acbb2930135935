import json

import pytest

from elastic_jax.errors import PlanError
from elastic_jax.frontier import FRONTIER, Frontier, Point


def point(name, seconds, kl, gib):
    return Point(
        name,
        {"lm_head": "bf16" if name == "XL" else "w8a16"},
        seconds,
        {"prompt": seconds / 2, "generated": seconds / 2},
        int(gib * 2**30),
        {"prompt": kl, "generated": kl / 2},
        {"prompt": 0.0, "generated": 0.0},
        {"prompt": 0.0, "generated": 0.0},
    )


POINTS = [
    point("XL", 2.0, 0.0, 46),
    point("P01", 1.6, 0.003, 36),
    point("L", 1.4, 0.005, 30),
    point("S", 1.0, 0.02, 24),
]
FRONTIER_OF_FOUR = Frontier(POINTS, {}, {"device": "a device", "costs_measured": False})


@pytest.mark.parametrize(
    ("request_", "name"),
    [
        ("0", "S"),
        ("0.0", "S"),
        ("1.0", "XL"),
        ("1", "XL"),
        (".5", "P01"),
        ("0.3", "L"),
        ("P01", "P01"),
        ("max-loss=1%", "L"),
        ("max-loss=0.01", "L"),
        ("max-loss=5%", "S"),
        ("min-speedup=1.2", "P01"),
        ("min-speedup=1.3", "L"),
        ("max-gib=30", "L"),
        ("max-loss=5%,min-speedup=1.5", "S"),
        (" max-gib=40 ", "P01"),
    ],
)
def test_requests(request_, name):
    found = FRONTIER_OF_FOUR.resolve(request_)
    assert found is not None
    assert found[0].name == name


@pytest.mark.parametrize("request_", ["M", "fast", ""])
def test_other_words_are_no_request(request_):
    assert FRONTIER_OF_FOUR.resolve(request_) is None


@pytest.mark.parametrize(
    "request_", ["max-loss=1%%", "min-speedup=50%", "max-loss=1,max-loss=2", "speed=3", "max-gib=x"]
)
def test_malformed_requests_say_what_there_is(request_):
    with pytest.raises(PlanError, match=r"should be one of: 0\.0 \(the fastest\) to 1\.0"):
        FRONTIER_OF_FOUR.resolve(request_)


def test_what_no_plan_meets_says_what_there_is():
    with pytest.raises(PlanError, match=r"no plan meets min-speedup=3: the fastest has 2\.00 times XL's speed"):
        FRONTIER_OF_FOUR.resolve("min-speedup=3")
    with pytest.raises(PlanError, match=r"found 1\.5"):
        FRONTIER_OF_FOUR.resolve("1.5")


def test_a_plan_says_what_it_was_chosen_for():
    plan = FRONTIER_OF_FOUR.plan("max-loss=1%")
    assert plan is not None
    assert plan.note.startswith(
        "the fastest with max-loss=1%: plan L, 1.43 times XL's speed (predicted costs, a device)"
    )
    assert "estimated loss 0.50 %" in plan.note


def test_what_is_written_is_read(tmp_path):
    assert Frontier.read(tmp_path) is None
    (tmp_path / FRONTIER).write_text(json.dumps(FRONTIER_OF_FOUR.to_json()))
    assert Frontier.read(tmp_path) == FRONTIER_OF_FOUR
    (tmp_path / FRONTIER).write_text('{"format": 1, "points": []}')
    with pytest.raises(PlanError, match="is no frontier"):
        Frontier.read(tmp_path)
