"""Drawn plans: every group is there once, in its choice's colour, in a document that parses."""

import xml.etree.ElementTree as ET
from typing import Any

import pytest
from tiny import MISTRAL_SMALL

from elastic_jax.groups import model_groups
from elastic_jax.plan import Plan, provisional_plans
from elastic_jax.plan_drawing import COLOURS, Sensitivity, draw_plans

SVG = "{http://www.w3.org/2000/svg}"
GROUPS = model_groups(MISTRAL_SMALL)
PLANS = list(provisional_plans(MISTRAL_SMALL).values())


def panels(text: str) -> list[dict[str, dict[str, Any]]]:
    """Of each panel the attributes of every cell, by the group's name, with what is told of it."""
    root = ET.fromstring(text)
    found = []
    for panel in root.iter(f"{SVG}g"):
        cells = {}
        for rectangle in panel.iter(f"{SVG}rect"):
            title = rectangle.find(f"{SVG}title")
            assert title is not None
            assert title.text is not None
            name, told = title.text.split(": ", 1)
            assert name not in cells
            cells[name] = {**rectangle.attrib, "told": told}
        found.append(cells)
    return found


def test_every_group_has_its_choices_colour() -> None:
    drawn = panels(draw_plans(MISTRAL_SMALL, PLANS, [], "model"))
    assert len(drawn) == 4
    for plan, cells in zip(PLANS, drawn, strict=True):
        assert set(cells) == set(GROUPS)
        for name, cell in cells.items():
            assert cell["fill"] == COLOURS[plan.choices[name]]
            assert cell["told"] == plan.choices[name]


def test_cells_do_not_overlap_and_lie_inside() -> None:
    text = draw_plans(MISTRAL_SMALL, PLANS, [Sensitivity("s", {})], "model")
    width, height = map(float, ET.fromstring(text).attrib["viewBox"].split()[2:])
    for cells in panels(text):
        boxes = [tuple(float(cell[side]) for side in ("x", "y", "width", "height")) for cell in cells.values()]
        assert all(x >= 0 and y >= 0 and x + w < width and y + h < height for x, y, w, h in boxes)
        assert len({(x, y) for x, y, _, _ in boxes}) == len(GROUPS)
    layers = {float(cell["x"]) for name, cell in panels(text)[0].items() if name.endswith(".down")}
    assert len(layers) == MISTRAL_SMALL.num_layers


def test_more_sensitive_groups_are_darker() -> None:
    names = list(GROUPS)
    kl = dict(zip(names, (1e-6, 1e-5, 1e-4, 0.0), strict=False))
    *_, cells = panels(draw_plans(MISTRAL_SMALL, PLANS[:1], [Sensitivity("measured", kl)], "model"))
    shades = [int(cells[name]["fill"][5:], 16) for name in names[:3]]  # blue falls from light to dark
    assert shades == sorted(shades, reverse=True)
    assert len(set(shades)) == 3
    assert cells[names[3]]["fill"] == cells[names[0]]["fill"]
    assert cells[names[4]]["told"] == "not measured"
    assert cells[names[1]]["told"] == "KL 1.00e-05"


def test_one_value_and_a_group_without_a_choice() -> None:
    plan = Plan("M<", {}, "", True, {})
    text = draw_plans(MISTRAL_SMALL, [plan], [Sensitivity("one", {"lm_head": 1e-3})], "a & b")
    drawn, _ = panels(text)
    assert {cell["told"] for cell in drawn.values()} == {"no choice"}
    assert "a &amp; b" in text


@pytest.mark.parametrize("count", [0, 4])
def test_the_legend_names_what_is_used(count: int) -> None:
    root = ET.fromstring(draw_plans(MISTRAL_SMALL, PLANS[:count], [], "model"))
    texts = {text.text for text in root.iter(f"{SVG}text")}
    assert texts & set(COLOURS) == ({"bf16", "w8a16", "w8a8"} if count else set())
