import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_jax.evaluation import statistics
from elastic_jax.evaluation.statistics import Pairs

COUNTS = st.integers(0, 400)


@given(COUNTS, COUNTS)
def test_mcnemar_is_the_exact_binomial_test(lost, gained):
    expected = scipy.stats.binomtest(lost, lost + gained, 0.5).pvalue if lost + gained else 1.0
    assert statistics.mcnemar(lost, gained) == pytest.approx(expected, rel=1e-9)


@given(st.integers(0, 60), st.integers(1, 60), st.floats(0.01, 0.99))
def test_the_tail_of_the_binomial_distribution(right, n, chance):
    right = min(right, n)
    assert statistics.binomial_tail(right, n, chance) == pytest.approx(
        scipy.stats.binom.sf(right - 1, n, chance), rel=1e-9, abs=1e-300
    )


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=200))
def test_pairs_count_what_the_answers_say(answers):
    mode, original = (np.array(each, int) for each in zip(*answers, strict=True))
    pairs = Pairs.of(mode.tolist(), original.tolist())
    assert pairs.n == len(answers)
    assert pairs.accuracy == pytest.approx(mode.mean())
    assert pairs.original_accuracy == pytest.approx(original.mean())
    assert pairs.flips == pytest.approx((mode != original).mean())
    expected = mode.std(ddof=1) / math.sqrt(len(mode))
    assert statistics.standard_error(pairs.accuracy, pairs.n) == pytest.approx(expected)


def test_the_loss_is_of_means_and_no_mean_of_losses():
    tasks = [Pairs(50, 40, 0, 10), Pairs(10, 0, 0, 90)]
    assert statistics.loss(tasks) == pytest.approx(1 - (0.5 + 0.1) / (0.9 + 0.1))
    with pytest.raises(ValueError, match="nothing to lose"):
        statistics.loss([Pairs(0, 0, 3, 7)])


def test_unequal_lengths_are_no_pairs():
    with pytest.raises(ValueError, match="equally long"):
        Pairs.of([1, 0], [1, 0, 1])


@pytest.mark.parametrize(
    ("n", "accuracy", "lost", "gained"),
    [(200, 0.65, 0.02, 0.02), (200, 0.65, 0.10, 0.05), (1800, 0.67, 0.03, 0.02), (1000, 0.30, 0.08, 0.08)],
)
def test_the_bound_covers_the_true_loss(n, accuracy, lost, gained):
    """On synthetic models whose loss is known; 400 trials have a standard error of 1.1 points."""
    random = np.random.default_rng(7)
    true = 1 - (accuracy - lost + gained) / accuracy
    kinds = [accuracy - lost, lost, gained, 1 - accuracy - gained]
    bounds = np.array(
        [
            statistics.loss_upper_bound(
                [Pairs(*(int(k) for k in random.multinomial(n, kinds)))], draws=2000, seed=trial
            )
            for trial in range(400)
        ]
    )
    covered = (bounds >= true).mean()
    assert 0.93 <= covered <= 0.99


def test_the_bound_of_several_tasks_covers_too():
    random = np.random.default_rng(8)
    kinds = {"easy": [0.78, 0.02, 0.01, 0.19], "hard": [0.30, 0.06, 0.05, 0.59]}
    true = 1 - sum(k[0] + k[2] for k in kinds.values()) / sum(k[0] + k[1] for k in kinds.values())
    bounds = [
        statistics.loss_upper_bound(
            [Pairs(*(int(c) for c in random.multinomial(500, k))) for k in kinds.values()], draws=2000, seed=trial
        )
        for trial in range(400)
    ]
    assert 0.93 <= (np.array(bounds) >= true).mean() <= 0.98


@settings(max_examples=30, deadline=None)
@given(st.integers(10, 3000))
def test_equal_answers_certify_no_more_than_the_rule_of_three(n):
    right = n // 2 + 1
    bound = statistics.loss_upper_bound([Pairs(right, 0, 0, n - right)])
    assert 1.5 / n <= bound * right / n <= 6 / n


def test_the_bound_is_repeatable_and_above_the_loss():
    tasks = [Pairs(1100, 60, 50, 628)]
    assert statistics.loss_upper_bound(tasks) == statistics.loss_upper_bound(tasks)
    assert statistics.loss_upper_bound(tasks) > statistics.loss(tasks)


def test_chance_is_the_best_constant_answer():
    assert statistics.constant_accuracy([0, 1, 1, 1], 2) == 0.75
    assert statistics.constant_accuracy([0, 1, 2, 3], 2) == 0.5
    assert statistics.constant_accuracy(["18", "3", "3", "7"], None) == 0.5
    assert statistics.above_chance(1200, 1838, 0.505)
    assert not statistics.above_chance(600, 1172, 0.5)
