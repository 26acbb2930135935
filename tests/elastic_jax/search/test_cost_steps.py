import dataclasses

import jax
import pytest
from tiny import MISTRAL_SMALL, tiny_step_config

from elastic_jax.groups import LM_HEAD, model_groups
from elastic_jax.plan import CHOICES
from elastic_jax.search.cost_steps import _shared, measure_step_costs, thin
from elastic_jax.search.forward import ROLES
from elastic_jax.search.rivals import uniform
from elastic_jax.search.workload import Costs, Workload

TINY = dataclasses.replace(
    MISTRAL_SMALL,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    vocab_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)


@pytest.mark.slow
def test_every_choice_of_every_kind_is_timed_in_whole_steps(tmp_path):
    config, told = dataclasses.replace(TINY, num_layers=3), []
    costs = measure_step_costs(
        config,
        Workload(16, 4, 1),
        tiny_step_config(dtype="bfloat16"),
        jax.devices()[0],
        workers=2,
        progress=lambda done, total, _: told.append((done, total)),
    )
    assert costs.measured
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]
    for role in ROLES:
        assert set(costs.groups[role]) == {"qkv", "o", "gate_up", "down", LM_HEAD}
        for by_choice in costs.groups[role].values():
            assert set(by_choice) == set(CHOICES)
            assert min(by_choice.values()) >= 0
        assert costs.of_step(config, uniform(model_groups(config), "bf16"), role) > 0
    for by_choice in costs.groups["generated"].values():
        assert by_choice["w8a8"] == by_choice["w8a8b"] == by_choice["w8a16"]
    costs.save(tmp_path / "costs.json")
    assert Costs.read(tmp_path / "costs.json").groups == costs.groups


def test_a_plans_step_is_the_thick_ones_time_less_what_its_choices_save():
    kinds = {group.kind: group for group in model_groups(MISTRAL_SMALL).values()}
    layer, beside = 250e-6, 600e-6
    saved = {(kind, "w8a16"): 0.4 * layer * n / 10 for n, kind in enumerate(("qkv", "o", "gate_up", "down"), 1)}
    saved[LM_HEAD, "w8a16"] = 100e-6
    groups, rest = _shared(kinds, layer, beside, saved)
    costs = Costs("test", True, Workload(1, 1, 1), {}, {}, dict.fromkeys(ROLES, groups), dict.fromkeys(ROLES, rest))
    names = model_groups(MISTRAL_SMALL)
    bf16 = costs.of_step(MISTRAL_SMALL, uniform(names, "bf16"), "generated")
    assert bf16 == pytest.approx(40 * layer + beside)
    w8a16 = costs.of_step(MISTRAL_SMALL, uniform(names, "w8a16"), "generated")
    assert bf16 - w8a16 == pytest.approx(40 * 0.4 * layer + 100e-6)


def test_the_thin_model_is_a_few_layers_of_the_real_shape():
    one, several = thin(MISTRAL_SMALL)
    assert (one.num_layers, several.num_layers) == (1, 3)
    assert dataclasses.replace(several, num_layers=40) == MISTRAL_SMALL
    assert thin(TINY)[1].num_layers == 2
