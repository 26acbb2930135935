"""Differences are told with both values."""

import pytest

from aot_cache.mismatch import differences


def test_equal_values_as_json():
    assert differences({"a": [1, 2], "b": {"x": 1, "y": 2}}, {"b": {"y": 2, "x": 1}, "a": (1, 2)}) == []


@pytest.mark.parametrize(
    ("stored", "current", "line"),
    [
        ({"rows": 4}, {"rows": 8}, "rows: compiled for 4, here 8 (the number of rows of the running batch is another)"),
        ({}, {"mine": "x"}, 'mine: compiled for nothing, here "x"'),
        ({"mine": 1}, {}, "mine: compiled for 1, here nothing"),
        ({"mine": 1}, {"mine": True}, "mine: compiled for 1, here true"),
        ({"mine": ["a", "b"]}, {"mine": ["b", "c"]},
         'mine: compiled with ["a"] that are not here; here with ["c"] that were not'),
        ({"mine": ["a", "b"]}, {"mine": ["b", "a"]}, 'mine: compiled for ["a", "b"], here ["b", "a"]'),
    ],
)  # fmt: skip
def test_difference(stored, current, line):
    assert differences(stored, current) == [line]


@pytest.mark.parametrize(
    ("key", "stored", "current"),
    [
        ("cuda", "13.0.0", "13.0.0"),
        ("cuda", "13.0.0", "13.2.0"),
        ("cudnn", "9.9.0", "9.12.0"),
        ("cudnn", "9.1", "9.1.0"),
    ],
)
def test_newer_libraries_fit(key, stored, current):
    assert differences({key: stored}, {key: current}) == []


@pytest.mark.parametrize(
    ("key", "stored", "current"),
    [
        ("cuda", "13.1.0", "13.0.0"),
        ("cuda", "12.9.0", "13.0.0"),
        ("cudnn", "9.12.0", "9.9.0"),
        ("cudnn", "9.12.0", "none"),
        ("compute_capability", "8.0", "8.9"),
        ("jax", "0.11.2", "0.11.3"),
    ],
)
def test_versions_that_do_not_fit(key, stored, current):
    (line,) = differences({key: stored}, {key: current})
    assert line.startswith(f'{key}: compiled for "{stored}", here "{current}" (')
