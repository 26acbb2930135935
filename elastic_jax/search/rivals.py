"""What a searched plan must beat: plans that need no search, and a greedy one."""

from collections.abc import Iterable, Mapping

from elastic_jax.groups import LM_HEAD
from elastic_jax.plan import Choice
from elastic_jax.search.solver import Problem


def uniform(groups: Iterable[str], choice: Choice) -> dict[str, Choice]:
    """One choice everywhere; the head keeps 16-bit activations."""
    head: Choice = "bf16" if choice == "bf16" else "w8a16"
    return {group: head if group == LM_HEAD else choice for group in groups}


def protect_down(groups: Iterable[str]) -> dict[str, Choice]:
    """Every `down`, whose inputs have the largest outliers, with 16-bit activations, and w8a8 elsewhere."""
    return {g: "w8a16" if g == LM_HEAD or g.endswith(".down") else "w8a8" for g in groups}


def greedy(problem: Problem, max_seconds: float) -> dict[str, Choice]:
    """From the fastest choice of each group, the step with the most divergence saved per second, while time allows."""
    kl = problem.kl_sum()
    seconds = problem.seconds
    fastest = [
        min((c for c in range(len(problem.choices)) if ok[c]), key=lambda c, row=row: seconds[row, c])
        for row, ok in enumerate(problem.allowed)
    ]
    columns, spent = list(fastest), sum(seconds[row, c] for row, c in enumerate(fastest))
    while True:
        steps = [
            ((kl[row, now] - kl[row, c]) / max(seconds[row, c] - seconds[row, now], 1e-12), row, c)
            for row, now in enumerate(columns)
            for c in range(len(problem.choices))
            if problem.allowed[row, c]
            and kl[row, c] < kl[row, now]
            and spent + seconds[row, c] - seconds[row, now] <= max_seconds
        ]
        if not steps:
            return {group: problem.choices[c] for group, c in zip(problem.groups, columns, strict=True)}
        _, row, column = max(steps)
        spent += seconds[row, column] - seconds[row, columns[row]]
        columns[row] = column


def named_rivals(groups: Iterable[str]) -> Mapping[str, dict[str, Choice]]:
    """The plans that need no search, by name."""
    groups = list(groups)
    return {
        "uniform w8a16": uniform(groups, "w8a16"),
        "uniform w8a8b": uniform(groups, "w8a8b"),
        "uniform w8a8": uniform(groups, "w8a8"),
        "w8a8, down protected": protect_down(groups),
    }
