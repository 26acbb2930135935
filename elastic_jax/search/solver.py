"""The choice of every group: a mixed-integer linear program, solved by HiGHS through `scipy.optimize.milp`.

One binary variable stands for each group and choice, and exactly one of a group's is 1. Time, bytes and divergence are
sums over groups; how far divergence is from such a sum is the ladder's business.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

import numpy as np
from jaxtyping import Float64

from elastic_jax.config import ModelConfig
from elastic_jax.errors import PlanError
from elastic_jax.groups import LM_HEAD, model_groups
from elastic_jax.plan import CHOICES, Choice
from elastic_jax.search.forward import ROLES, Role
from elastic_jax.search.workload import Costs, fixed_bytes, group_bytes

_GAP = 5e-4
"""Relative distance to the optimum that is good enough: measurements are not that exact, and a fifth of it takes twice
the time."""

_SECONDS = 5.0
"""Longest time for one program; models of 161 groups take some hundredths."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is known of each group's choices. Rows are groups, columns their allowed choices.

    Attributes:
        groups: names, in the model's order.
        choices: what the columns are.
        allowed: [groups, choices], whether a group may have the choice.
        seconds: [groups, choices], of the workload.
        bytes: [groups, choices].
        kl: role -> [groups, choices], what each adds to the divergence, nats.
        fixed_bytes: of what every plan needs.
    """

    groups: tuple[str, ...]
    choices: tuple[Choice, ...]
    allowed: np.ndarray
    seconds: Float64[np.ndarray, "groups choices"]
    bytes: Float64[np.ndarray, "groups choices"]
    kl: Mapping[Role, Float64[np.ndarray, "groups choices"]]
    fixed_bytes: int

    @classmethod
    def of(cls, config: ModelConfig, costs: Costs, kl: Mapping[Role, np.ndarray]) -> "Problem":
        """The problem of one model.

        Args:
            config: the model.
            costs: of its groups.
            kl: role -> [groups, choices], in the order of `model_groups` and `CHOICES`, nats.
        """
        groups, sizes = model_groups(config), group_bytes(config)
        allowed = np.array([[not (g == LM_HEAD and c in ("w8a8", "w8a8b")) for c in CHOICES] for g in groups])

        def table(value: Mapping[str, Mapping[Choice, Any]]) -> np.ndarray:
            return np.array([[float(value[g][c]) for c in CHOICES] for g in groups])

        seconds: dict[str, dict[Choice, float]] = {
            name: {c: costs.of_group(group.kind, c) for c in CHOICES} for name, group in groups.items()
        }
        return cls(
            tuple(groups),
            CHOICES,
            allowed,
            table(seconds),
            table(sizes),
            kl,
            fixed_bytes(config),
        )

    def with_kl(self, kl: Mapping[Role, np.ndarray]) -> "Problem":
        """The same with other divergences."""
        return dataclasses.replace(self, kl=kl)

    def indices(self, choices: Mapping[str, Choice]) -> np.ndarray:
        """The column of each group's choice in a plan."""
        return np.array([self.choices.index(choices[group]) for group in self.groups])

    def kl_sum(self) -> np.ndarray:
        """Of both roles, [groups, choices]."""
        return np.sum([self.kl[role] for role in ROLES], axis=0)

    def total(self, table: np.ndarray, choices: Mapping[str, Choice]) -> float:
        """Sum of a table's entries over a plan."""
        return float(np.take_along_axis(table, self.indices(choices)[:, None], axis=1).sum())


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Keeps HiGHS, which prints lines of its own now and then, from standard output, where `--json` has its value."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def solve(
    problem: Problem,
    *,
    minimize: Literal["seconds", "kl"],
    max_kl: float | None = None,
    max_seconds: float | None = None,
    max_bytes: int | float | None = None,
) -> dict[str, Choice]:
    """The best plan within the limits.

    Args:
        problem: the groups.
        minimize: the time, or the sum of both roles' divergences.
        max_kl: nats, of each role by itself.
        max_seconds: of the groups, without what no plan changes.
        max_bytes: of all weights.

    Raises:
        PlanError: no plan is within the limits.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # takes long to import

    shape = problem.allowed.shape
    kl = problem.kl_sum()
    # What is not minimized decides between plans that are equal in what is.
    time_scale, kl_scale = max(problem.seconds.max(), 1e-30), max(np.max(kl), 1e-30)
    weights = (1.0, 1e-6) if minimize == "seconds" else (1e-6, 1.0)
    objective = (weights[0] * problem.seconds / time_scale + weights[1] * kl / kl_scale).reshape(-1)
    one = np.kron(np.eye(shape[0]), np.ones(shape[1]))
    constraints = [LinearConstraint(one, 1, 1)]

    def at_most(table: np.ndarray, limit: int | float) -> None:
        # In units of the limit, which the solver's tolerances are made for; a limit of nothing allows only zeros.
        scale = limit if limit > 0 else 1e-12
        constraints.append(LinearConstraint(table.reshape(1, -1) / scale, -np.inf, 1.0 if limit > 0 else 0.0))

    if max_kl is not None:
        for role in ROLES:
            at_most(problem.kl[role], max_kl)
    if max_seconds is not None:
        at_most(problem.seconds, max_seconds)
    if max_bytes is not None:
        at_most(problem.bytes, max_bytes - problem.fixed_bytes)
    with _silenced():
        found = milp(
            objective,
            constraints=constraints,
            integrality=np.ones(objective.size),
            bounds=cast(Any, Bounds)(
                0.0, problem.allowed.reshape(-1).astype(float)
            ),  # its stub knows single numbers only
            options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
        )
    if found.x is None:
        limits = {"KL of each role": max_kl, "seconds": max_seconds, "bytes": max_bytes}
        stated = ", ".join(f"{name} <= {limit:.4g}" for name, limit in limits.items() if limit is not None)
        raise PlanError(f"no plan is within {stated}: {found.message}")
    columns = found.x.reshape(shape).argmax(axis=1)
    return {group: problem.choices[column] for group, column in zip(problem.groups, columns, strict=True)}
