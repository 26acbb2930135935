"""Divergences that groups add, corrected by measured plans from mild to fast: the ladder.

Either end of the sensitivity is right only at its own end. A plan's divergence is modelled as a mixture of both ends'
sums, and the mixture of each role is fitted to what plans between the ends really measure.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from elastic_jax.config import ModelConfig
from elastic_jax.groups import model_groups
from elastic_jax.plan import CHOICES, Choice
from elastic_jax.search.forward import ROLES, Role
from elastic_jax.search.scores import End, Scores
from elastic_jax.search.sensitivity import contributions
from elastic_jax.search.solver import Problem

type Tables = Mapping[Role, Mapping[End, np.ndarray]]
"""role -> end -> [groups, choices], nats."""

type Mixture = Mapping[Role, Sequence[float]]
"""role -> share of each end, in the tables' order."""


def even(tables: Tables) -> dict[Role, tuple[float, ...]]:
    """The mixture before anything was measured."""
    return {role: (1 / len(tables[role]),) * len(tables[role]) for role in ROLES}


def end_tables(config: ModelConfig, scores: Scores) -> Tables:
    """What each group adds by choice, as each end sees it.

    Raises:
        ConfigError: a score is missing.
    """
    groups = list(model_groups(config))
    tables: dict[Role, dict[End, np.ndarray]] = {}
    for role in ROLES:
        tables[role] = {}
        for end in scores.ends:
            added = contributions(scores, groups, end, role, CHOICES)
            tables[role][end] = np.array([[added[g][c] for c in CHOICES] for g in groups])
    return tables


def mixed(tables: Tables, mixture: Mixture) -> dict[Role, np.ndarray]:
    """One table a role."""
    return {
        role: sum((w * table for w, table in zip(mixture[role], tables[role].values(), strict=True)), np.zeros(()))
        for role in ROLES
    }


def fit(
    problem: Problem,
    tables: Tables,
    plans: Sequence[Mapping[str, Choice]],
    measured: Sequence[Mapping[Role, float]],
) -> dict[Role, tuple[float, ...]]:
    """The mixture whose sums come nearest to measured divergences, by relative error; no share is negative.

    Args:
        problem: knows the groups.
        tables: of each end.
        plans: of the ladder.
        measured: their KL by role.
    """
    from scipy.optimize import nnls

    mixture: dict[Role, tuple[float, ...]] = {}
    for role in ROLES:
        rows = [
            [problem.total(table, plan) / found[role] for table in tables[role].values()]
            for plan, found in zip(plans, measured, strict=True)
            if found[role] > 0
        ]
        if not rows:
            mixture[role] = even(tables)[role]
            continue
        shares, _ = nnls(np.array(rows), np.ones(len(rows)))
        mixture[role] = tuple(float(share) for share in shares) if shares.any() else even(tables)[role]
    return mixture
