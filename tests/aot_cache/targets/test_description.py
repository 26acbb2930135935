"""Descriptions are written to files and read back; what is no description is refused."""

import json

import jax
import pytest

from aot_cache.targets import Description, find
from elastic_jax.errors import ExecutableError


@pytest.fixture
def values():
    return find("h200").to_json()


def read(tmp_path, values):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(values))
    return find(str(path))


def test_there_and_back(tmp_path, values):
    found = read(tmp_path, values)
    assert (found.config, found.compiler_options) == (find("h200").config, find("h200").compiler_options)
    assert found.target == find("h200").target


def test_a_processor_is_not_described():
    with pytest.raises(ExecutableError, match="is not a GPU"):
        Description.of(jax.devices()[0])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": 2}, "expected format 1"),
        ({"more": 1}, "expected format 1"),
        ({"target_config": "text"}, "must be a list of lines"),
        ({"target_config": []}, "no NVIDIA GPU"),
        ({"compiler_options": {"xla_option": None}}, "compiler_options must be"),
    ],
)
def test_refused_values(tmp_path, values, change, told):
    with pytest.raises(ExecutableError, match=rf"gpu\.json.*{told}"):
        read(tmp_path, values | change)


def test_not_json(tmp_path):
    (tmp_path / "gpu.json").write_text("{")
    with pytest.raises(ExecutableError, match=r"gpu\.json is not a readable GPU description"):
        find(str(tmp_path / "gpu.json"))
