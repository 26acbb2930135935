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
