"""Which plan becomes a mode's, with numbers made up instead of measured: nothing here runs a model."""

import dataclasses

import numpy as np
import pytest
from tiny import MISTRAL_SMALL

from elastic_jax.groups import LM_HEAD, model_groups
from elastic_jax.plan import CHOICES
from elastic_jax.search.forward import ROLES
from elastic_jax.search.measuring import Measured
from elastic_jax.search.promises import largest_kl
from elastic_jax.search.rivals import named_rivals, uniform
from elastic_jax.search.scores import Score, Scores
from elastic_jax.search.search import Search
from elastic_jax.search.workload import Costs, Workload

CONFIG = dataclasses.replace(MISTRAL_SMALL, num_layers=4, hidden_size=64, intermediate_size=128, vocab_size=128)
GROUPS = list(model_groups(CONFIG))
ADDED = {"bf16": 0.0, "w8a16": 1.0, "w8a8b": 2.0, "w8a8": 4.0}
SPEED = {"bf16": 1.0, "w8a16": 0.7, "w8a8b": 0.65, "w8a8": 0.6}


def nats(group, choice, role, unit):
    """Groups differ by a factor of a hundred."""
    weight = 10 ** (2 * (GROUPS.index(group) / len(GROUPS)))
    return unit * weight * (ADDED["w8a16"] if role == "generated" and choice != "bf16" else ADDED[choice])


class Meter:
    """Measures by the numbers above, except for plans that are said to be otherwise."""

    def __init__(self, unit, surprises=()):
        self.unit, self.surprises = unit, list(surprises)

    def measure(self, choices):
        found = Measured()
        factor = next((factor for plan, factor in self.surprises if plan == choices), 1.0)
        for role in ROLES:
            found.kl[role] = factor * sum(nats(g, c, role, self.unit) for g, c in choices.items())
            found.kl_stderr[role], found.flips[role], found.perplexity[role] = 0.0, 0.0, 1.0
        return found


def scores(unit, one_pass=False):
    found = Scores({"method": "one pass"} if one_pass else {})
    total = {role: sum(nats(g, "w8a16" if g == LM_HEAD else "w8a8", role, unit) for g in GROUPS) for role in ROLES}
    for group in GROUPS:
        for choice in CHOICES[1:]:
            found.add("alone", "prompt", group, choice, Score(nats(group, choice, "prompt", unit), None))
        if one_pass:
            continue
        for role in ROLES:
            own = "w8a16" if group == LM_HEAD or role == "generated" else "w8a8"
            for choice in CHOICES:
                saved = nats(group, own, role, unit) - nats(group, choice, role, unit)
                found.add("last", role, group, choice, Score(total[role] - saved, 0.0))
    for role, fastest in (("prompt", "w8a8"), ("generated", "w8a16")):
        found.add("last", role, "*", fastest, Score(total[role], 0.0))
    return found


def search(unit=2e-5, surprises=(), one_pass=False):
    kinds = {g.kind: {c: g.parameters * 1e-9 * s for c, s in SPEED.items()} for g in model_groups(CONFIG).values()}
    both = dict.fromkeys(ROLES, kinds)
    costs = Costs("test", True, Workload(8, 4, 1), dict.fromkeys(ROLES, 1), {}, both, dict.fromkeys(ROLES, 1e-5))
    said = []
    made = Search(CONFIG, scores(unit, one_pass), costs, Meter(unit), Meter(unit, surprises), said.append)
    return made, said


@pytest.mark.parametrize("one_pass", [False, True])
def test_modes_are_within_their_limits_and_better_for_little_more_time(one_pass):
    made, _ = search(one_pass=one_pass)
    result = made.run(points=8, max_bytes=None)
    meter = Meter(2e-5)
    points = {point.name: point for point in result.frontier.points}
    assert set(result.frontier.modes) == {"XL", "L", "M", "S"}
    for mode, told in result.frontier.modes.items():
        if mode != "XL":
            plan = points[told["plan"]].choices
            assert meter.measure(plan).worst_kl <= largest_kl(mode)
            assert set(plan.values()) != {"bf16"}
    # For 2 % of time S is better than whatever is as fast as the fastest plan that keeps the limit.
    s = points[result.frontier.modes["S"]["plan"]]
    assert all(p.worst_kl >= s.worst_kl for p in result.frontier.points if p.seconds <= s.seconds)
    assert len(result.mixture["prompt"]) == (1 if one_pass else 2)


def test_a_rival_that_turns_out_better_takes_the_modes_place():
    rival = named_rivals(GROUPS)["uniform w8a8"]
    made, said = search(surprises=[(rival, 1e-6)])
    result = made.run(points=8, max_bytes=None)
    s = next(p for p in result.frontier.points if p.name == result.frontier.modes["S"]["plan"])
    assert s.choices == rival
    assert "uniform w8a8" in result.frontier.modes["S"]["why"]
    assert any(message.startswith("S: uniform w8a8 is ") and "takes its place" in message for message in said)
    # One plan satisfies all promises, and the modes that share it say so.
    assert {told["plan"] for mode, told in result.frontier.modes.items() if mode != "XL"} == {s.name}
    assert "the same plan as" in " ".join(told["why"] for told in result.frontier.modes.values())


def test_no_mode_is_beaten_by_any_plan_of_the_frontier():
    rng = np.random.default_rng(0)
    surprises = [(plan, float(rng.uniform(0.2, 2))) for plan in named_rivals(GROUPS).values()]
    result = search(surprises=surprises)[0].run(points=10, max_bytes=None)
    points = {point.name: point for point in result.frontier.points}
    for mode, told in result.frontier.modes.items():
        own = points[told["plan"]]
        if mode != "XL":
            assert not any(
                p.seconds <= own.seconds and p.worst_kl < own.worst_kl for p in points.values() if p.name != own.name
            )
    assert set(points["XL"].choices.items()) == set(uniform(GROUPS, "bf16").items())
