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

ENDS: tuple[End, ...] = ("alone", "last")

type Tables = Mapping[Role, Mapping[End, np.ndarray]]
"""role -> end -> [groups, choices], nats."""

EVEN: Mapping[Role, tuple[float, float]] = {role: (0.5, 0.5) for role in ROLES}
"""The mixture before anything was measured."""


def end_tables(config: ModelConfig, scores: Scores) -> Tables:
    """What each group adds by choice, as each end sees it.

    Raises:
        ConfigError: a score is missing.
    """
    groups = list(model_groups(config))
    tables: dict[Role, dict[End, np.ndarray]] = {}
    for role in ROLES:
        tables[role] = {}
        for end in ENDS:
            added = contributions(scores, groups, end, role, CHOICES)
            tables[role][end] = np.array([[added[g][c] for c in CHOICES] for g in groups])
    return tables


def mixed(tables: Tables, mixture: Mapping[Role, Sequence[float]]) -> dict[Role, np.ndarray]:
    """One table a role."""
    return {
        role: sum((w * tables[role][e] for w, e in zip(mixture[role], ENDS, strict=True)), np.zeros(()))
        for role in ROLES
    }


def fit(
    problem: Problem,
    tables: Tables,
    plans: Sequence[Mapping[str, Choice]],
    measured: Sequence[Mapping[Role, float]],
) -> dict[Role, tuple[float, float]]:
    """The mixture whose sums come nearest to measured divergences, by relative error; no share is negative.

    Args:
        problem: knows the groups.
        tables: both ends'.
        plans: of the ladder.
        measured: their KL by role.
    """
    from scipy.optimize import nnls

    mixture: dict[Role, tuple[float, float]] = {}
    for role in ROLES:
        rows = [
            [problem.total(tables[role][end], plan) / found[role] for end in ENDS]
            for plan, found in zip(plans, measured, strict=True)
            if found[role] > 0
        ]
        if not rows:
            mixture[role] = EVEN[role]
            continue
        shares, _ = nnls(np.array(rows), np.ones(len(rows)))
        mixture[role] = (float(shares[0]), float(shares[1])) if shares.any() else EVEN[role]
    return mixture
