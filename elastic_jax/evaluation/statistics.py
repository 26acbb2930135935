"""Paired statistics of answers that are right or wrong: how much accuracy a mode loses, and how sure that is.

Two models answered the same items, so only the items on which they differ say anything about their difference. An item
is one of four kinds: both right, *lost* (only the original right), *gained* (only the mode right), both wrong. Drawing
items with replacement draws these four counts from a multinomial distribution, which is all the bootstrap here does.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

ONE_SIDED = 0.95
"""Confidence of every bound."""

DRAWS = 20000
SEED = 0


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Answers of a mode and of the original to the same items of one task.

    Attributes:
        both: items that both answered right.
        lost: items that only the original answered right.
        gained: items that only the mode answered right.
        neither: items that neither answered right.
    """

    both: int
    lost: int
    gained: int
    neither: int

    @classmethod
    def of(cls, mode: Sequence[int], original: Sequence[int]) -> "Pairs":
        """Counts items; both sequences hold 1 (right) or 0, item by item."""
        ours, theirs = np.asarray(mode, bool), np.asarray(original, bool)
        if ours.shape != theirs.shape or ours.ndim != 1:
            raise ValueError(f"expected two equally long sequences, found {ours.shape} and {theirs.shape}")
        return cls(
            int((ours & theirs).sum()),
            int((~ours & theirs).sum()),
            int((ours & ~theirs).sum()),
            int((~ours & ~theirs).sum()),
        )

    @property
    def n(self) -> int:
        """Items."""
        return self.both + self.lost + self.gained + self.neither

    @property
    def accuracy(self) -> float:
        """Of the mode."""
        return (self.both + self.gained) / self.n

    @property
    def original_accuracy(self) -> float:
        """Of the original."""
        return (self.both + self.lost) / self.n

    @property
    def flips(self) -> float:
        """Part of the items whose answer became right or became wrong (Dutta et al., arXiv:2407.09141)."""
        return (self.lost + self.gained) / self.n


def standard_error(accuracy: float, n: int) -> float:
    """Of an accuracy over `n` items: the sample's standard deviation / sqrt(n), as lm-eval has it; 0 for one item."""
    return math.sqrt(accuracy * (1 - accuracy) / max(n - 1, 1))


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided p-value of McNemar's exact test: lost and gained items are equally likely if the models are equal."""
    trials, least = lost + gained, min(lost, gained)
    if not trials:
        return 1.0
    tail = sum(math.comb(trials, k) for k in range(least + 1))
    return min(1.0, 2 * tail / 2**trials)


def loss(tasks: Sequence[Pairs]) -> float:
    """1 - mean accuracy / mean accuracy of the original, over tasks; never a mean of ratios.

    Raises:
        ValueError: there is no task, or the original answered nothing right.
    """
    theirs = sum(pairs.original_accuracy for pairs in tasks)
    if not theirs:
        raise ValueError("the original answered nothing right: there is nothing to lose")
    return 1 - sum(pairs.accuracy for pairs in tasks) / theirs


def loss_upper_bound(tasks: Sequence[Pairs], *, draws: int = DRAWS, seed: int = SEED) -> float:
    """The one-sided 95 % upper bound of `loss`, by a paired bootstrap of each task's items.

    One lost and one gained item are added to every task before drawing. Where few or no items differ, a plain bootstrap
    would be sure of what it has hardly seen (of no difference at all, from ten equal items); with them the bound over n
    equal items is about 3 / n, as it should be (the rule of three), and over many items they do not matter.
    """
    random = np.random.default_rng(seed)
    ours, theirs = np.zeros(draws), np.zeros(draws)
    for pairs in tasks:
        counts = np.array([pairs.both, pairs.lost + 1, pairs.gained + 1, pairs.neither], float)
        n = pairs.n + 2
        both, lost, gained, _ = random.multinomial(n, counts / n, size=draws).T
        ours += (both + gained) / n
        theirs += (both + lost) / n
    with np.errstate(divide="ignore", invalid="ignore"):
        losses = np.where(theirs > 0, 1 - ours / theirs, np.where(ours > 0, -np.inf, 1.0))
    return float(np.quantile(losses, ONE_SIDED, method="higher"))


def constant_accuracy(targets: Sequence[object], choices: int | None) -> float:
    """What somebody reaches who knows no item: the best single answer to all, or guessing among the choices."""
    counts: dict[object, int] = {}
    for target in targets:
        counts[target] = counts.get(target, 0) + 1
    return max(max(counts.values()) / len(targets), 1 / choices if choices else 0.0)


def above_chance(right: int, n: int, chance: float) -> bool:
    """Whether so many right answers are more than chance, by an exact one-sided binomial test at 5 %."""
    return binomial_tail(right, n, chance) < 1 - ONE_SIDED


def binomial_tail(right: int, n: int, chance: float) -> float:
    """The probability of at least `right` successes in `n` trials."""
    if right <= 0:
        return 1.0
    if chance in (0.0, 1.0):
        return chance
    logs = [
        math.lgamma(n + 1)
        - math.lgamma(k + 1)
        - math.lgamma(n - k + 1)
        + k * math.log(chance)
        + (n - k) * math.log1p(-chance)
        for k in range(right, n + 1)
    ]
    return min(1.0, math.fsum(math.exp(value) for value in logs))


def mean_standard_error(accuracies: Mapping[str, tuple[float, int]]) -> float:
    """Of the mean of accuracies of independent tasks, each (accuracy, items)."""
    return math.sqrt(sum(standard_error(*each) ** 2 for each in accuracies.values())) / len(accuracies)
