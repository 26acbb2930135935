"""The whole search on a tiny model, whose sizes make it seconds long."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from elastic_jax.checkpoint import Checkpoint
from elastic_jax.errors import ConfigError, PlanError
from elastic_jax.groups import LM_HEAD, model_groups
from elastic_jax.plan import CHOICES
from elastic_jax.search.forward import ROLES, Forward
from elastic_jax.search.ladder import end_tables, fit, mixed
from elastic_jax.search.measuring import PlanMeter
from elastic_jax.search.outcome import write_outcome
from elastic_jax.search.promises import largest_kl
from elastic_jax.search.rivals import uniform
from elastic_jax.search.scores import Score, Scores, identify
from elastic_jax.search.search import Search
from elastic_jax.search.sensitivity import FASTEST, base_plan, contributions, measure
from elastic_jax.search.solver import Problem
from elastic_jax.search.texts import Text
from elastic_jax.search.workload import Costs, Workload

DEVICE = jax.devices()[0]


def costs(groups, fast=True):
    speed = {"bf16": 1.0, "w8a16": 0.9, "w8a8b": 0.7, "w8a8": 0.6} if fast else dict.fromkeys(CHOICES, 1.0)
    kinds = {group.kind: {c: group.parameters * 1e-6 * s for c, s in speed.items()} for group in groups.values()}
    workload = Workload(8, 4, 1)
    both = {role: kinds for role in ROLES}
    return Costs(
        "test",
        True,
        workload,
        {"prompt": 1, "generated": 4},
        {"prompt": 8, "generated": 1},
        both,
        {"prompt": 0.1, "generated": 0.1},
    )


@pytest.fixture(scope="module")
def tiny(checkpoint_of, tmp_path_factory):
    path = tmp_path_factory.mktemp("search") / "own.elastic"
    shutil.copytree(checkpoint_of("tiny_mistral").path, path)
    return Checkpoint.open(path)


@pytest.fixture(scope="module")
def texts(tiny):
    ids = np.random.default_rng(0).integers(0, tiny.config.vocab_size, (7, 20)).astype(np.int32)
    return Text(ids, {"source": "random"}).split(3, 4)


@pytest.fixture(scope="module")
def forward(tiny, texts):
    return Forward.load(tiny, texts[0].windows, DEVICE, 2)


@pytest.fixture(scope="module")
def scores(tiny, texts, forward):
    found = Scores(identify(tiny, texts[0], forward.dot_name))
    measure(forward, found, save=lambda: None, progress=lambda *_: None)
    return found


def searched(tiny, texts, forward, scores, *, fast=True, max_bytes=None, said=None):
    meters = PlanMeter(forward), PlanMeter(forward.over(texts[1].windows))
    known = costs(model_groups(tiny.config), fast)
    say = (said if said is not None else []).append
    return Search(tiny.config, scores, known, *meters, say).run(points=6, max_bytes=max_bytes), known


def test_scores_are_what_whole_plans_measure(tiny, forward, scores):
    """From either end, by the way that runs everything."""
    groups, meter = list(model_groups(tiny.config)), PlanMeter(forward)
    for group, choice in (("layers.1.down", "w8a8"), ("layers.0.qkv", "w8a8b"), (LM_HEAD, "w8a16")):
        plan = uniform(groups, "bf16") | {group: choice}
        assert scores.get("alone", "prompt", group, choice).kl == pytest.approx(
            meter.measure(plan).kl["prompt"], rel=1e-3
        )
    for role in ROLES:
        plan = base_plan(groups, "last", role) | {"layers.2.o": "bf16"}
        assert scores.get("last", role, "layers.2.o", "bf16").kl == pytest.approx(
            meter.measure(plan).kl[role], rel=1e-3
        )
        base = scores.get("last", role, "*", FASTEST[role])
        assert base.kl == pytest.approx(meter.measure(base_plan(groups, "last", role)).kl[role], rel=1e-3)


def test_contributions_are_not_negative_and_bf16_adds_nothing(tiny, scores):
    groups = list(model_groups(tiny.config))
    for end in ("alone", "last"):
        for role in ROLES:
            for by_choice in contributions(scores, groups, end, role, CHOICES).values():
                assert by_choice["bf16"] == 0
                assert min(by_choice.values()) >= 0


def test_an_interrupted_measurement_continues(tiny, texts, forward, scores, tmp_path):
    file = tmp_path / "scores.json"
    half = Scores(scores.identity)

    class Stop(Exception):
        pass

    def stop():
        half.save(file)
        if len(half) > 20:
            raise Stop

    with pytest.raises(Stop):
        measure(forward, half, save=stop, progress=lambda *_: None)
    said = []
    resumed = Scores.resume(file, identify(tiny, texts[0], forward.dot_name), said.append)
    assert said == [f"continuing with {len(half)} scores of {file}"]
    told = []
    measure(forward, resumed, save=lambda: None, progress=lambda done, total, _: told.append((done, total)))
    assert told[0][0] > 0  # what was found done counts as done
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1]
    resumed.save(file)
    scores.save(tmp_path / "whole.json")
    assert json.loads(file.read_text()) == json.loads((tmp_path / "whole.json").read_text())


def test_scores_of_something_else_are_refused_or_replaced(scores, tmp_path):
    other = Scores(scores.identity | {"text": "another"})
    with pytest.raises(ConfigError, match="must be of the same text"):
        other.merge(scores)
    scores.save(tmp_path / "s.json")
    said = []
    assert len(Scores.resume(tmp_path / "s.json", other.identity, said.append)) == 0
    assert "other weights or text" in said[0]
    (tmp_path / "s.json").write_text("{}")
    with pytest.raises(ConfigError, match="no file of scores"):
        Scores.read(tmp_path / "s.json")


def test_merged_scores_complete_each_other(scores):
    mine, theirs = Scores(scores.identity), Scores(scores.identity)
    mine.add("alone", "prompt", "layers.0.o", "w8a8", Score(1.0, 0.5))
    theirs.add("alone", "prompt", "layers.0.o", "w8a8", Score(2.0, 0.5))
    theirs.add("alone", "prompt", "layers.1.o", "w8a8", Score(3.0, 0.5))
    mine.merge(theirs)
    assert mine.get("alone", "prompt", "layers.0.o", "w8a8").kl == 1.0
    assert mine.get("alone", "prompt", "layers.1.o", "w8a8").kl == 3.0
    with pytest.raises(ConfigError, match="was not measured"):
        mine.get("alone", "prompt", "layers.2.o", "w8a8")


def test_the_ladder_finds_the_mixture_that_made_the_numbers(tiny, scores):
    tables = end_tables(tiny.config, scores)
    true = {"prompt": (0.3, 0.9), "generated": (1.2, 0.1)}
    problem = Problem.of(tiny.config, costs(model_groups(tiny.config)), mixed(tables, true))
    rng = np.random.default_rng(0)
    plans = [
        {
            g: ("bf16" if rng.random() < 0.5 else "w8a16") if g == LM_HEAD else str(rng.choice(CHOICES))
            for g in problem.groups
        }
        for _ in range(8)
    ]
    measured = [{role: problem.total(problem.kl[role], plan) for role in ROLES} for plan in plans]
    found = fit(problem, tables, plans, measured)
    for role in ROLES:
        assert found[role] == pytest.approx(true[role], rel=1e-3, abs=1e-3)


def test_a_search_ends_in_plans_that_keep_their_limits(tiny, texts, forward, scores):
    result, known = searched(tiny, texts, forward, scores)
    frontier, plans = write_outcome(tiny, result, known, *texts, scores=scores, took={"wall_s": 1.0, "cpu_s": 1.0})
    assert frontier.points[0].name == "XL"
    assert set(frontier.points[0].choices.values()) == {"bf16"}
    times = [point.seconds for point in frontier.points]
    assert times == sorted(times, reverse=True)
    meter = PlanMeter(forward.over(texts[1].windows))
    for mode, plan in plans.items():
        plan.check(tiny.config)
        assert not plan.provisional
        if mode != "XL":
            assert meter.measure(plan.choices).worst_kl <= largest_kl(mode)
            assert set(plan.choices.values()) != {"bf16"}
            assert plan.measured["promise"]["status"] == "estimated"
    assert {"XL", "S"} <= set(plans)
    assert plans["S"].measured["seconds"] <= plans["L"].measured["seconds"]
    # As a checkpoint: modes, places on the frontier, requests.
    opened = Checkpoint.open(tiny.path)
    assert opened.plan("S").choices == plans["S"].choices
    assert opened.plan("1.0").name == "XL"
    assert opened.plan("0").choices == frontier.points[-1].choices
    assert "the fastest with max-loss=100%" in opened.plan("max-loss=100%").note
    with pytest.raises(PlanError, match=r"no mode 'Q'.*or of its frontier 0\.0"):
        opened.plan("Q")
    assert {rival["rival"] for rival in frontier.facts["rivals"]} >= {"uniform w8a8", "greedy", "w8a8, down protected"}


def test_where_int8_is_no_faster_no_mode_is_offered_but_the_original(tiny, texts, forward, scores, tmp_path):
    said = []
    result, known = searched(tiny, texts, forward, scores, fast=False, said=said)
    assert set(result.frontier.modes) == {"XL"}
    assert any(message.startswith("S: no plan faster than XL") for message in said)
    copy = tmp_path / "copy.elastic"
    shutil.copytree(tiny.path, copy)
    write_outcome(Checkpoint.open(copy), result, known, *texts, scores=scores, took={"wall_s": 1.0, "cpu_s": 1.0})
    assert set(Checkpoint.open(copy).plans()) == {"XL"}


def test_a_cap_on_memory_holds_for_every_plan_but_the_original(tiny, texts, forward, scores):
    xl = tiny.weight_bytes(tiny.plan("XL"))
    result, _ = searched(tiny, texts, forward, scores, max_bytes=int(0.8 * xl))
    points = result.frontier.points
    assert len(points) > 1
    assert max(point.weight_bytes for point in points[1:]) <= 0.8 * xl
    assert points[0].weight_bytes == xl


def test_costs_are_kept_in_a_file(tiny, tmp_path):
    known = costs(model_groups(tiny.config))
    known.save(tmp_path / "costs.json")
    assert dataclasses.asdict(Costs.read(tmp_path / "costs.json")) == dataclasses.asdict(known)
    (tmp_path / "costs.json").write_text('{"format": 1}')
    with pytest.raises(ConfigError, match="no file of costs"):
        Costs.read(tmp_path / "costs.json")
