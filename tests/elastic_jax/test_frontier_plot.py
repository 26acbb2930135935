import dataclasses
import math
import xml.etree.ElementTree as ET

import pytest

from elastic_jax.frontier import Frontier, Point
from elastic_jax.frontier_plot import interval, plot


def point(name, seconds, kl):
    roles = ("prompt", "generated")
    return Point(
        name,
        {"lm_head": "bf16"},
        seconds,
        dict.fromkeys(roles, seconds),
        int(seconds * 2**30),
        {"prompt": kl, "generated": kl / 2},
        {"prompt": kl / 10, "generated": kl},
        dict.fromkeys(roles, 0.0),
    )


FRONTIER = Frontier(
    [point("XL", 1.0, 0.0), point("P01", 0.8, 0.002), point("S", 0.5, 0.01)],
    {mode: {"plan": "XL" if mode == "XL" else "S", "why": "a < b"} for mode in ("XL", "M", "S")},
    {"device": "test", "costs_measured": False},
)


def test_every_plan_is_in_every_panel_and_modes_are_named():
    root = ET.fromstring(plot(FRONTIER))
    texts = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("M, S") == texts.count("XL") == 3
    assert "P01" not in texts
    points = [c for c in root.iter("{http://www.w3.org/2000/svg}circle") if c.get("r") == "3"]
    assert len(points) == 9
    assert any("predicted" in text for text in texts)


def test_the_interval_is_of_the_worse_role():
    low, high = interval(FRONTIER.points[2])
    assert low == pytest.approx(math.expm1(0.01 - 1.96e-3))
    assert high == pytest.approx(math.expm1(0.01 + 1.96e-3))
    wide = dataclasses.replace(FRONTIER.points[2], kl_stderr={"prompt": 1.0, "generated": 1.0})
    assert interval(wide)[0] == 0
