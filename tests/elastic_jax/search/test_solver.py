import dataclasses
import itertools
import time

import numpy as np
import pytest
from tiny import MISTRAL_SMALL

from elastic_jax.errors import PlanError
from elastic_jax.groups import LM_HEAD, model_groups
from elastic_jax.plan import CHOICES, Plan
from elastic_jax.search.forward import ROLES
from elastic_jax.search.rivals import greedy, named_rivals, uniform
from elastic_jax.search.solver import Problem, solve
from elastic_jax.search.workload import fixed_bytes, group_bytes


def problem(groups=3, seed=0):
    """Random, with int8 faster and worse than bf16, as it is."""
    rng = np.random.default_rng(seed)
    names = tuple([f"layers.{i // 4}.{['qkv', 'o', 'gate_up', 'down'][i % 4]}" for i in range(groups - 1)] + [LM_HEAD])
    worse = np.sort(rng.uniform(0, 1, (groups, 4)), axis=1) * [0, 1, 1, 1]
    seconds = -np.sort(-rng.uniform(1, 2, (groups, 4)), axis=1)
    allowed = np.ones((groups, 4), bool)
    allowed[-1, 2:] = False
    kl = {"prompt": worse, "generated": np.where([0, 1, 1, 1], worse[:, 1:2], 0.0)}
    return Problem(names, CHOICES, allowed, seconds, np.tile([2.0, 1, 1, 1], (groups, 1)), kl, 0)


def every_plan(p):
    columns = [[c for c in range(4) if p.allowed[g, c]] for g in range(len(p.groups))]
    for chosen in itertools.product(*columns):
        yield {group: p.choices[c] for group, c in zip(p.groups, chosen, strict=True)}


@pytest.mark.parametrize("seed", range(6))
def test_the_fastest_within_a_divergence_is_found(seed):
    p = problem(4, seed)
    limit = 0.4 * p.kl["prompt"].max(axis=1).sum()
    found = solve(p, minimize="seconds", max_kl=limit)
    within = [plan for plan in every_plan(p) if all(p.total(p.kl[role], plan) <= limit for role in ROLES)]
    best = min(p.total(p.seconds, plan) for plan in within)
    assert p.total(p.seconds, found) <= best * 1.001
    assert all(p.total(p.kl[role], found) <= limit * 1.0001 for role in ROLES)


@pytest.mark.parametrize("seed", range(6))
def test_the_least_divergence_within_a_time_and_bytes_is_found(seed):
    p = problem(4, seed)
    limits = {"seconds": 0.8 * p.seconds[:, 0].sum(), "bytes": 6.0}
    found = solve(p, minimize="kl", max_seconds=limits["seconds"], max_bytes=limits["bytes"])
    within = [
        plan
        for plan in every_plan(p)
        if p.total(p.seconds, plan) <= limits["seconds"] and p.total(p.bytes, plan) <= limits["bytes"]
    ]
    assert p.total(p.kl_sum(), found) <= min(p.total(p.kl_sum(), plan) for plan in within) * 1.001 + 1e-6
    assert p.total(p.bytes, found) <= limits["bytes"]


def test_each_role_has_the_limit_by_itself():
    p = problem(4)
    p = p.with_kl({"prompt": np.zeros((4, 4)), "generated": np.tile([0.0, 1, 1, 1], (4, 1))})
    assert list(solve(p, minimize="seconds", max_kl=1.0).values()).count("bf16") == 3


def test_nothing_allowed_means_the_original():
    p = problem(5)
    assert set(solve(p, minimize="seconds", max_kl=0.0).values()) == {"bf16"}


def test_limits_that_no_plan_meets_are_named():
    with pytest.raises(PlanError, match=r"no plan is within bytes <= 3"):
        solve(problem(5), minimize="seconds", max_bytes=3)


def test_the_head_never_has_8_bit_activations():
    p = problem(5)
    assert Plan("S", solve(p, minimize="seconds"), "", False, {}).choices[LM_HEAD] == "w8a16"


def test_thirty_budgets_of_mistral_small_take_seconds():
    groups = model_groups(MISTRAL_SMALL)
    p = problem(len(groups), 1)
    start = time.monotonic()
    for share in np.linspace(0.02, 0.9, 30):
        solve(p, minimize="seconds", max_kl=share * p.kl["prompt"].max(axis=1).sum())
    assert time.monotonic() - start < 60  # 10 s on a quiet machine; this one may be shared


def test_bytes_are_those_of_the_weights():
    sizes = group_bytes(MISTRAL_SMALL)
    total = fixed_bytes(MISTRAL_SMALL) + sum(size["bf16"] for size in sizes.values())
    assert 47.0e9 < total < 47.3e9  # 23.6 billion parameters
    tied = dataclasses.replace(MISTRAL_SMALL, tie_word_embeddings=True)
    assert group_bytes(tied)[LM_HEAD]["bf16"] == 0


def test_rivals_are_plans():
    groups = model_groups(MISTRAL_SMALL)
    for choices in named_rivals(groups).values():
        Plan("rival", choices, "", False, {}).check(MISTRAL_SMALL)
    assert set(uniform(groups, "bf16").values()) == {"bf16"}


@pytest.mark.parametrize("seed", range(4))
def test_greedy_keeps_its_time_and_is_never_better_than_the_program(seed):
    p = problem(9, seed)
    limit = p.seconds.min(axis=1).sum() * 1.1
    plan = greedy(p, limit)
    assert p.total(p.seconds, plan) <= limit
    best = solve(p, minimize="kl", max_seconds=limit)
    assert p.total(p.kl_sum(), best) <= p.total(p.kl_sum(), plan) + 1e-4
