"""Manifests survive writing and reading; anything else is refused with the reason."""

import json

import pytest

from aot_cache.manifest import Manifest, Memory, UnitRecord
from elastic_jax.errors import ExecutableError

MANIFEST = Manifest({"jax": "0.11.2"}, {"step": UnitRecord(7, "ab", 0.5, {"rows": 1}, Memory(1, 2, 3, 4, 5))})


def values():
    return json.loads(MANIFEST.to_bytes())


def test_round_trip():
    assert Manifest.from_json(values(), source="m") == MANIFEST


def test_equal_manifests_have_equal_bytes():
    other = Manifest(dict(MANIFEST.identity), dict(MANIFEST.units))
    assert other.to_bytes() == MANIFEST.to_bytes()


def test_workspace_leaves_out_aliased_outputs():
    assert Memory(arguments=100, outputs=50, aliased=40, temporaries=7, code=3).workspace == 20


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda v: v.clear(), "no format number"),
        (lambda v: v.update(format="1"), "no format number"),
        (lambda v: v.pop("identity"), r"missing keys \['identity'\]"),
        (lambda v: v.update(more=1), r"unknown keys \['more'\]"),
        (lambda v: v.update(units=[]), "must be objects"),
        (lambda v: v["units"].update(step=3), "unit step is not an object"),
        (lambda v: v["units"]["step"].update(size=-1), "size is -1"),
        (lambda v: v["units"]["step"].update(sha256=3), "sha256 must be a string"),
        (lambda v: v["units"]["step"]["memory"].pop("code"), r"unit step, memory: missing keys \['code'\]"),
        (lambda v: v["units"]["step"]["memory"].update(code=1.5), "memory.code is 1.5"),
        (lambda v: v["units"].update({"../x": v["units"]["step"]}), "'../x' is not a unit name"),
    ],
)
def test_malformed(edit, reason):
    broken = values()
    edit(broken)
    with pytest.raises(ExecutableError, match=reason):
        Manifest.from_json(broken, source="m")
