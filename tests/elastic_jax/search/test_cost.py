import dataclasses
import json
from pathlib import Path

import jax
import pytest
from tiny import MISTRAL_SMALL, tiny_step_config

from elastic_jax.errors import ConfigError, ExecutableError
from elastic_jax.executables import default_step_config
from elastic_jax.groups import model_groups
from elastic_jax.plan import CHOICES, provisional_plans
from elastic_jax.search.cost_measured import measure_costs
from elastic_jax.search.cost_predicted import predict_costs
from elastic_jax.search.forward import ROLES
from elastic_jax.search.workload import Workload
from elastic_jax.step import Bucket

STEP = default_step_config(MISTRAL_SMALL, "gpu", "bfloat16", kv_slots=131072, max_context=None)
PLANS = provisional_plans(MISTRAL_SMALL)


LATENCY = Path(__file__).parents[3] / "benches" / "results" / "nvidia-h200" / "latency.json"


@pytest.mark.parametrize("mode", ["S", "XL"])
@pytest.mark.parametrize(
    "cell",
    [(batch, context) for batch in (1, 8, 16) for context in (256, 1024, 4096)]
    + [(batch, context) for batch in (32, 64) for context in (256, 1024)],
)
def test_predictions_are_within_5_percent_of_what_an_h200_measured(mode, cell):
    batch, context = cell
    costs = predict_costs(MISTRAL_SMALL, Workload(context, 128, batch), "h200", STEP)
    assert not costs.measured
    rows = json.loads(LATENCY.read_text())["rows"]
    (row,) = (row for row in rows if (row["mode"], row["batch"], row["context"]) == (mode, batch, context))
    choices = PLANS[mode].choices
    generated = costs.of_step(MISTRAL_SMALL, choices, "generated")
    assert generated == pytest.approx(1 / row["decode_tok_s_per_seq"], rel=0.05)
    if cell == (1, 4096):  # one step, and little beside it
        assert 1e3 * costs.of_step(MISTRAL_SMALL, choices, "prompt") == pytest.approx(row["ttft_ms"], rel=0.05)


def test_a_slower_gpu_is_slower_and_the_workload_weighs_the_roles():
    def speedup(workload, target="h200"):
        costs = predict_costs(MISTRAL_SMALL, workload, target, STEP)
        return costs.of_plan(MISTRAL_SMALL, PLANS["XL"].choices), costs.of_plan(MISTRAL_SMALL, PLANS["L"].choices)

    assert speedup(Workload(1024, 128, 1), "a100")[0] > speedup(Workload(1024, 128, 1))[0]
    xl, w8a16 = speedup(Workload(64, 512, 1))
    assert w8a16 < xl  # reading weights is the limit
    xl, w8a16 = speedup(Workload(8192, 1, 1))
    assert w8a16 > xl  # two rows a token are multiplied


def test_workloads_choose_buckets():
    buckets = (Bucket(1, 0), Bucket(8, 0), Bucket(0, 64), Bucket(0, 1024), Bucket(8, 64))
    assert Workload(100, 10, 1).buckets(buckets) == {"prompt": (Bucket(0, 1024), 1), "generated": (Bucket(1, 0), 10)}
    assert Workload(100, 10, 16).buckets(buckets) == {"prompt": (Bucket(0, 1024), 2), "generated": (Bucket(8, 0), 20)}
    with pytest.raises(ConfigError, match="batch must be at least 1"):
        Workload(1, 1, 0)


def test_unknown_targets_are_refused():
    with pytest.raises(ExecutableError, match="no target is called 'gpu9000'"):
        predict_costs(MISTRAL_SMALL, Workload(1, 1, 1), "gpu9000", STEP)


@pytest.mark.slow  # compiles every product of two steps
def test_costs_of_this_device(checkpoint_of):
    config = checkpoint_of("tiny_mistral").config
    told = []
    costs = measure_costs(
        config, Workload(40, 4, 2), tiny_step_config(), jax.devices()[0], progress=lambda *step: told.append(step)
    )
    assert costs.measured
    assert costs.steps == {"prompt": 2, "generated": 4}
    assert set(costs.groups["prompt"]) == {group.kind for group in model_groups(config).values()}
    for role in ROLES:
        for kind, by_choice in costs.groups[role].items():
            assert set(by_choice) == set(CHOICES)
            assert all(0 < seconds < 10 for seconds in by_choice.values())
            if role == "generated" or kind == "lm_head":
                assert by_choice["w8a16"] == by_choice["w8a8"] == by_choice["w8a8b"]
    plan = provisional_plans(config)["S"].choices
    doubled = dataclasses.replace(costs, steps={role: 2 * n for role, n in costs.steps.items()})
    assert doubled.of_plan(config, plan) == pytest.approx(2 * costs.of_plan(config, plan))
    assert told[-1][0] == told[-1][1]
