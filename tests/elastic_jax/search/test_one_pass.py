"""Scores of one pass forward and one backward, against measured ones."""

import jax
import numpy as np
import pytest
from scipy.stats import spearmanr

from elastic_jax.groups import LM_HEAD, model_groups
from elastic_jax.search.forward import Forward
from elastic_jax.search.measuring import PlanMeter
from elastic_jax.search.one_pass import METHOD, measure_fast
from elastic_jax.search.parallel import Shards
from elastic_jax.search.products import exact
from elastic_jax.search.rivals import uniform
from elastic_jax.search.scores import Scores

DEVICE = jax.devices()[0]


@pytest.fixture(scope="module")
def forward(checkpoint_of):
    checkpoint = checkpoint_of("tiny_mistral")
    ids = np.random.default_rng(1).integers(0, checkpoint.config.vocab_size, (6, 20)).astype(np.int32)
    return Forward.load(checkpoint, ids, DEVICE, 2)


def scored(forward):
    scores, told = Scores({"method": METHOD}), []
    measure_fast(forward, scores, seed=0, progress=lambda done, total, _: told.append((done, total)))
    assert told[-1][0] == told[-1][1]
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    return scores


@pytest.mark.slow
def test_scores_rank_groups_and_choices_as_measured_plans_do(forward):
    scores, meter = scored(forward), PlanMeter(forward)
    assert scores.ends == ("alone",)
    groups = list(model_groups(forward.config))
    fast, measured = [], []
    for group in groups:
        for choice in ("w8a16",) if group == LM_HEAD else ("w8a16", "w8a8b", "w8a8"):
            fast.append(scores.get("alone", "prompt", group, choice).kl)
            measured.append(meter.measure(uniform(groups, "bf16") | {group: choice}).kl["prompt"])
    assert spearmanr(fast, measured).statistic > 0.9
    ratios = np.array(fast) / np.array(measured)
    assert 0.5 < np.median(ratios) < 2  # nats, not only an order


def test_scores_of_parts_are_those_of_the_whole(forward):
    whole = scored(forward)
    parts = scored(Shards([forward.over(forward.windows[:2]), forward.over(forward.windows[2:])]))
    for name in model_groups(forward.config):
        a, b = (scores.get("alone", "prompt", name, "w8a16").kl for scores in (whole, parts))
        assert a == pytest.approx(b, rel=0.5)  # other labels are drawn


def test_activations_keep_16_bits_beside_bfloat16_weights():
    rng = np.random.default_rng(0)
    x, w = (jax.numpy.asarray(rng.standard_normal((8, 64)), jax.numpy.float32) for _ in range(2))
    w = w.astype(jax.numpy.bfloat16)
    wanted = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    found = np.asarray(exact(x, w))
    rounded = np.asarray(x.astype(jax.numpy.bfloat16), np.float64) @ np.asarray(w, np.float64).T
    assert np.abs(found - wanted).max() < 1e-2 * np.abs(rounded - wanted).max()
    # The gradient is the transposed product.
    back = jax.grad(lambda x: exact(x, w).sum())(x)
    assert np.asarray(back) == pytest.approx(np.asarray(w, np.float32).sum(0)[None, :].repeat(8, 0), rel=0.02, abs=0.02)
