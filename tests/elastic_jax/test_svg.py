import xml.etree.ElementTree as ET

import pytest

from elastic_jax.svg import Panel, Series, draw, linear_ticks

SVG = "{http://www.w3.org/2000/svg}"


def panel(**changes):
    points = [(1.0, 2.0), (10.0, 4.0)]
    series = Series("a < b", points, low=[1.0, 3.0], high=[3.0, 5.0], labels=["S & M", "L"], line=True)
    return Panel(**({"title": "t", "x_label": "x", "y_label": "y", "series": [series]} | changes))


def test_a_plot_is_xml_with_every_point_interval_and_label():
    root = ET.fromstring(draw([panel()], description="made of <this>"))
    assert root.findtext(f"{SVG}desc") == "made of <this>"
    points = [c for c in root.iter(f"{SVG}circle") if c.get("r") == "3"]
    assert len(points) == 2
    assert float(points[0].get("cx")) < float(points[1].get("cx"))
    assert float(points[0].get("cy")) > float(points[1].get("cy"))  # upwards is more
    intervals = [p for p in root.iter(f"{SVG}path") if p.get("stroke-width") == "3"]
    assert len(intervals) == 2
    texts = {t.text for t in root.iter(f"{SVG}text")}
    assert {"S & M", "L", "a < b", "t", "x", "y"} <= texts
    width, height = float(root.get("width")), float(root.get("height"))
    for circle in root.iter(f"{SVG}circle"):
        assert 0 < float(circle.get("cx")) < width
        assert 0 < float(circle.get("cy")) < height


def test_panels_stand_beside_each_other():
    one, two = (ET.fromstring(draw([panel()] * n, description="")) for n in (1, 2))
    assert float(two.get("width")) == 2 * float(one.get("width"))


def test_equal_ratios_are_equally_far_apart_on_a_logarithmic_axis():
    series = Series("", [(1.0, 1.0), (10.0, 1.0), (100.0, 1.0)])
    root = ET.fromstring(draw([panel(series=[series], log_x=True)], description=""))
    x = [float(c.get("cx")) for c in root.iter(f"{SVG}circle")]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)


def test_ticks_are_round_and_inside():
    for low, high in ((0.0, 1.0), (0.0031, 0.0047), (120.0, 187.0), (-3.0, 5.0)):
        ticks = linear_ticks(low, high)
        assert 3 <= len(ticks) <= 7
        assert low <= ticks[0] < ticks[-1] <= high


def test_one_point_alone_and_equal_values_have_axes():
    ET.fromstring(draw([panel(series=[Series("", [(3.0, 0.0)])])], description=""))


@pytest.mark.parametrize(("changes", "match"), [({"series": []}, "no points"), ({"log_y": True}, "positive")])
def test_what_cannot_be_drawn_is_refused(changes, match):
    if changes.get("log_y"):
        changes |= {"series": [Series("", [(1.0, 0.0)])]}
    with pytest.raises(ValueError, match=match):
        draw([panel(**changes)], description="")
