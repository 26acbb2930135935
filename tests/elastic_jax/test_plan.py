import dataclasses
import json
from typing import Any

import pytest
from tiny import MISTRAL_SMALL

from elastic_jax.errors import PlanError
from elastic_jax.groups import LM_HEAD, model_groups
from elastic_jax.plan import CHOICES, MODES, PRECISIONS, Plan, provisional_plans, read_plan, stored_precision

PLANS = provisional_plans(MISTRAL_SMALL)


def plan(**changes: Any) -> Plan:
    return dataclasses.replace(PLANS["M"], **changes)


def test_every_mode_has_a_provisional_plan_that_says_so():
    assert tuple(PLANS) == MODES == ("XL", "L", "M", "S")
    for name, each in PLANS.items():
        assert each.name == name
        assert each.provisional
        assert "provisional" in each.note
        assert each.measured == {}
        each.check(MISTRAL_SMALL)


def expected_choice(mode: str, kind: str) -> str:
    """The plans of the specification."""
    if mode == "XL":
        return "bf16"
    if mode == "L" or kind == LM_HEAD:
        return "w8a16"
    return "w8a16" if (mode, kind) == ("M", "down") else "w8a8"


@pytest.mark.parametrize("mode", MODES)
def test_provisional_choices(mode):
    groups = model_groups(MISTRAL_SMALL)
    assert PLANS[mode].choices == {name: expected_choice(mode, group.kind) for name, group in groups.items()}


def test_counts():
    assert PLANS["M"].counts() == {"w8a16": 41, "w8a8": 120}
    assert PLANS["XL"].counts() == {"bf16": 161}


def test_each_choice_reads_one_stored_precision():
    assert {choice: stored_precision(choice) for choice in CHOICES} == {
        "bf16": "bf16",
        "w8a16": "int8",
        "w8a8b": "int8",
        "w8a8": "int8",
    }
    assert set(PRECISIONS) == {"bf16", "int8"}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("choice", ["w4a16", "W8A8", "", None])
def test_unknown_choices_are_named(choice):
    with pytest.raises(PlanError, match=rf"layers\.3\.o: unknown choice {choice!r}; known: \['bf16', 'w8a16'"):
        plan(choices={**PLANS["M"].choices, "layers.3.o": choice})


@pytest.mark.parametrize("choice", ["w8a8", "w8a8b"])
def test_the_head_keeps_16_bit_activations(choice):
    with pytest.raises(PlanError, match=f"lm_head keeps 16-bit activations: use bf16 or w8a16, not {choice}$"):
        plan(choices={**PLANS["M"].choices, LM_HEAD: choice})


def test_a_plan_is_for_one_model():
    smaller = dataclasses.replace(MISTRAL_SMALL, num_layers=39)
    with pytest.raises(PlanError, match=r"unknown \['layers\.39\.down', .*'layers\.39\.qkv'\]"):
        PLANS["M"].check(smaller)
    larger = dataclasses.replace(MISTRAL_SMALL, num_layers=41)
    with pytest.raises(PlanError, match=r"missing groups \['layers\.40\.down', "):
        PLANS["M"].check(larger)


def test_json_round_trip(tmp_path):
    original = plan(measured={"kl": 0.01, "seeds": [1, 2]}, provisional=False, note="searched")
    path = tmp_path / "M.json"
    path.write_text(json.dumps(original.to_json()))
    assert read_plan(path) == original


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("note"), "expected keys.*'note'.*found"),
        (lambda v: v.update(speed=3), "found.*'speed'"),
        (lambda v: v.update(choices=["bf16"]), "choices must be"),
        (lambda v: v.update(choices={"layers.0.o": "w2"}), "unknown choice 'w2'"),
        (lambda v: v.update(choices={"layers.0.o": ["w8a8"]}), "unknown choice"),
        (lambda v: v.update(measured=None), "measured must be"),
        (lambda v: v.update(name=7), "name must be"),
        (lambda v: v.update(provisional="no"), "provisional must be"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_a_damaged_plan_is_refused_by_name(tmp_path, change, message):
    values = PLANS["M"].to_json()
    change(values)
    path = tmp_path / "M.json"
    path.write_text(json.dumps(values))
    with pytest.raises(PlanError, match=message):
        read_plan(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"M"', "\xff"])
def test_what_is_no_plan_is_refused_by_path(tmp_path, text):
    path = tmp_path / "M.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(PlanError, match=r"M\.json is not a plan"):
        read_plan(path)


def test_a_missing_plan_names_those_there_are(tmp_path):
    (tmp_path / "S.json").write_text("{}")
    (tmp_path / "XL.json").write_text("{}")
    with pytest.raises(PlanError, match=r"no plan .*XXL\.json: modes found there: \['S', 'XL'\]"):
        read_plan(tmp_path / "XXL.json")
    with pytest.raises(PlanError, match=r"modes found there: \[\]"):
        read_plan(tmp_path / "absent" / "M.json")


def test_digest_depends_on_the_choices_alone():
    assert plan(note="x", name="N", provisional=False, measured={"a": 1}).digest() == PLANS["M"].digest()
    assert len({each.digest() for each in PLANS.values()}) == 4
    reordered = dict(reversed(PLANS["M"].choices.items()))
    assert plan(choices=reordered).digest() == PLANS["M"].digest()
    assert plan(choices={**PLANS["M"].choices, "layers.7.o": "w8a16"}).digest() != PLANS["M"].digest()


def test_digest_is_the_same_in_every_version_and_process():
    # Stored in manifests: changing it makes every existing store unusable, and must be on purpose.
    assert PLANS["M"].digest() == "c96d98cdb3c12783524ced71fb4b2e46fa0856dc21b431484bcf8f4ee7040821"
