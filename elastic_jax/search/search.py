"""The search: from scores and costs to plans S, M, L and XL and a frontier, each measured on text it was not made from.

Scores propose; plans measured on the way (the ladder) correct how scores add up; the final plans, and those they must
beat, are measured on held-out text. Where a rival is better at no more time there, it takes the plan's place.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from elastic_jax.config import ModelConfig
from elastic_jax.errors import PlanError
from elastic_jax.frontier import Frontier, Point
from elastic_jax.groups import model_groups
from elastic_jax.plan import Choice
from elastic_jax.search.forward import ROLES, Role
from elastic_jax.search.ladder import end_tables, even, fit, mixed
from elastic_jax.search.measuring import Measured, Meter
from elastic_jax.search.promises import PROMISES, largest_kl
from elastic_jax.search.rivals import greedy, named_rivals, uniform
from elastic_jax.search.scores import Scores
from elastic_jax.search.solver import Problem, solve
from elastic_jax.search.workload import Costs, fixed_bytes, group_bytes

type Choices = Mapping[str, Choice]

_LADDER = 5
"""Plans measured to correct the scores, each time: geometric in divergence, beside those that need no search."""

_ROUNDS = 2
_SHRINK = 0.85
"""A budget is made this much smaller when the plan it gave is over its limit on held-out text."""

_TRIES = 6

_SPARE, _LEAST_SAVED = 0.012, 0.1
"""How much slower than the fastest plan within its limit a mode may be, if this saves at least that part of its
divergence: the frontier is steep where its fastest plans are."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a search found.

    Attributes:
        frontier: plans and modes.
        rivals: what searched plans were compared with at equal predicted time, on held-out text.
        mixture: role -> shares of both ends' scores that fit the ladder.
    """

    frontier: Frontier
    rivals: Sequence[Mapping[str, Any]]
    mixture: Mapping[Role, Sequence[float]]


class Search:
    """One search over one model.

    Args:
        config: the model.
        scores: complete.
        costs: of its groups.
        meter: over the text that the scores are of.
        held_out: over other text.
        say: is told what is done.
    """

    def __init__(
        self,
        config: ModelConfig,
        scores: Scores,
        costs: Costs,
        meter: Meter,
        held_out: Meter,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._costs, self._meter, self._held_out, self._say = config, costs, meter, held_out, say
        self._groups = list(model_groups(config))
        self._tables = end_tables(config, scores)
        self._mixture = even(self._tables)
        self._problem = Problem.of(config, costs, mixed(self._tables, self._mixture))
        self._ladder: list[tuple[Choices, Measured]] = []

    def run(self, *, points: int, max_bytes: int | None) -> Result:
        """Corrects, solves, measures and compares.

        Args:
            points: of the frontier, about.
            max_bytes: of all weights, for every plan but the original; None for no limit.

        Raises:
            PlanError: no plan fits into `max_bytes`.
        """
        self._climb(max_bytes)
        modes, why = self._modes(max_bytes)
        candidates = [uniform(self._groups, "bf16"), *modes.values(), *self._spread(points, max_bytes)]
        self._say(f"measuring {len(_unique(candidates))} plans on held-out text")
        rivals = self._compare()
        names = [(rival["rival"], rival["choices"]) for rival in rivals]
        candidates += [plan for rival in rivals for plan in (rival["searched_choices"], rival["choices"])]
        if max_bytes is not None:
            candidates = candidates[:1] + [c for c in candidates[1:] if self._bytes(c) <= max_bytes]
        candidates = _unique(candidates)
        self._replace_beaten(modes, why, candidates, names)
        frontier = self._frontier(candidates, modes, why)
        shown = [{k: v for k, v in rival.items() if k not in ("choices", "searched_choices")} for rival in rivals]
        return Result(frontier, shown, self._mixture)

    def predict(self, choices: Choices) -> dict[str, float]:
        """KL of a plan by role, as corrected scores have it."""
        return {role: self._problem.total(self._problem.kl[role], choices) for role in ROLES}

    # -- correcting ------------------------------------------------------------------------------------------------

    def _climb(self, max_bytes: int | None) -> None:
        known = named_rivals(self._groups).values()
        self._ladder = [(plan, self._meter.measure(plan)) for plan in known]
        self._refit()
        for _ in range(_ROUNDS):
            largest = max(measured.worst_kl for _, measured in self._ladder)
            for budget in np.geomspace(largest / 30, largest, _LADDER, endpoint=False):
                try:
                    plan = solve(self._problem, minimize="seconds", max_kl=float(budget), max_bytes=max_bytes)
                except PlanError:
                    continue  # too small a budget for a cap on memory; larger ones follow
                if all(plan != old for old, _ in self._ladder):
                    self._ladder.append((plan, self._meter.measure(plan)))
            self._refit()
        errors = [
            abs(self.predict(plan)[role] / measured.kl[role] - 1)
            for plan, measured in self._ladder
            for role in ROLES
            if measured.kl[role] > 0
        ]
        self._say(
            f"{len(self._ladder)} plans of the ladder: scores predict their KL within {np.median(errors):.0%} (median)"
        )

    def _refit(self) -> None:
        measured = [found.kl for _, found in self._ladder]
        self._mixture = fit(self._problem, self._tables, [plan for plan, _ in self._ladder], measured)
        self._problem = self._problem.with_kl(mixed(self._tables, self._mixture))

    # -- plans -----------------------------------------------------------------------------------------------------

    def _modes(self, max_bytes: int | None) -> tuple[dict[str, Choices], dict[str, str]]:
        """The fastest plan within each mode's limit on held-out text; modes that none but the original meets fail."""
        original = uniform(self._groups, "bf16")
        found: dict[str, Choices] = {"XL": original}
        why = {"XL": "the original model"}
        for mode in PROMISES:
            limit = budget = largest_kl(mode)
            for _ in range(_TRIES):
                try:
                    plan = solve(self._problem, minimize="seconds", max_kl=budget, max_bytes=max_bytes)
                except PlanError:
                    break
                measured = self._held_out.measure(plan)
                if measured.worst_kl <= limit:
                    plan, spent = self._spare(plan, max_bytes)
                    if self._seconds(plan) < self._seconds(original):
                        found[mode] = plan
                        why[mode] = (
                            f"the fastest plan found with a held-out KL of at most {limit:.4f} nats in each role{spent}"
                        )
                    break
                budget *= _SHRINK * max(0.5, limit / measured.worst_kl)
            if mode not in found:
                self._say(
                    f"{mode}: no plan faster than XL was found within a held-out KL of {limit:.4f}; it is left out"
                )
        return found, why

    def _spare(self, plan: Choices, max_bytes: int | None) -> tuple[Choices, str]:
        """The least divergence for a little more time than a plan takes, if it is much less, and that in words."""
        seconds = self._problem.total(self._problem.seconds, plan) + _SPARE * self._seconds(plan)
        better = solve(self._problem, minimize="kl", max_seconds=seconds, max_bytes=max_bytes)
        before, after = self._held_out.measure(plan), self._held_out.measure(better)
        if after.worst_kl > (1 - _LEAST_SAVED) * before.worst_kl:
            return plan, ""
        slower = self._seconds(better) / self._seconds(plan) - 1
        fewer = 1 - after.worst_kl / before.worst_kl
        return better, f", and {100 * slower:.1f} % slower for {100 * fewer:.0f} % less of it"

    def _replace_beaten(
        self,
        modes: dict[str, Choices],
        why: dict[str, str],
        candidates: Sequence[Choices],
        rivals: Sequence[tuple[str, Choices]],
    ) -> None:
        """Gives a mode the plan that beats its own in both time and held-out KL, whoever made it."""
        for mode in [mode for mode in modes if mode in PROMISES]:
            seconds, kl = self._seconds(modes[mode]), self._held_out.measure(modes[mode]).worst_kl
            better = [
                (found, plan)
                for plan in candidates
                if self._seconds(plan) <= seconds
                and (found := self._held_out.measure(plan).worst_kl) <= kl
                and (self._seconds(plan), found) != (seconds, kl)
            ]
            if not better:
                continue
            found, plan = min(better, key=lambda each: each[0])
            name = next((name for name, other in rivals if other == plan), "another plan of the frontier")
            told = f"{1 - self._seconds(plan) / seconds:.1%} faster and with {1 - found / max(kl, 1e-30):.1%} less KL"
            self._say(f"{mode}: {name} is {told} on held-out text, and takes its place")
            modes[mode], why[mode] = plan, f"{name}, {told} than the plan found for this promise"

    def _spread(self, points: int, max_bytes: int | None) -> list[Choices]:
        """Plans of about equal distances in time, from the original to the fastest."""
        fastest = self._seconds(solve(self._problem, minimize="seconds", max_bytes=max_bytes))
        slowest = self._seconds(uniform(self._groups, "bf16"))
        fixed = self._fixed()
        plans = []
        for seconds in np.linspace(fastest, max(fastest, slowest), points, endpoint=False):
            limit = float(seconds) - fixed
            plans.append(
                solve(self._problem, minimize="kl", max_seconds=limit * (1 + 1e-6) + 1e-12, max_bytes=max_bytes)
            )
        return plans

    def _compare(self) -> list[dict[str, Any]]:
        """Each rival beside the plan that is searched for its time."""
        rivals = dict(named_rivals(self._groups))
        total = self._problem.total
        rivals["greedy"] = greedy(self._problem, total(self._problem.seconds, rivals["w8a8, down protected"]))
        found = []
        for name, rival in rivals.items():
            seconds = total(self._problem.seconds, rival)
            own = solve(self._problem, minimize="kl", max_seconds=seconds * (1 + 1e-6))
            ours, theirs = self._held_out.measure(own), self._held_out.measure(rival)
            sums = [sum(measured.kl.values()) for measured in (ours, theirs)]
            found.append(
                {
                    "rival": name,
                    "seconds": seconds + self._fixed(),
                    "kl": theirs.kl,
                    "searched_seconds": self._seconds(own),
                    "searched_kl": ours.kl,
                    "ratio": sums[0] / sums[1] if sums[1] > 0 else 1.0,
                    "choices": rival,
                    "searched_choices": own,
                }
            )
        return found

    def _frontier(
        self, candidates: Sequence[Choices], modes: Mapping[str, Choices], why: Mapping[str, str]
    ) -> Frontier:
        """Points that no other beats in both time and held-out KL; those of modes stay."""
        points: list[Point] = []
        for choices in candidates:
            mode = next((name for name, plan in modes.items() if plan == choices), "")
            measured = self._held_out.measure(choices)
            points.append(
                Point(
                    mode,
                    choices,
                    self._seconds(choices),
                    {role: self._costs.of_step(self._config, choices, role) for role in ROLES},
                    self._bytes(choices),
                    dict(measured.kl),
                    dict(measured.kl_stderr),
                    dict(measured.flips),
                )
            )

        def beaten(point: Point) -> bool:
            return any(
                other.seconds <= point.seconds
                and other.worst_kl <= point.worst_kl
                and (other.seconds, other.worst_kl) != (point.seconds, point.worst_kl)
                for other in points
            )

        # The original is the frontier's beginning even where int8 should be faster and, by chance, no worse.
        slower = [p for p in points if p.name or (not beaten(p) and p.seconds < points[0].seconds)]
        ordered = sorted(slower, key=lambda p: (p.name != "XL", -p.seconds))
        named = [p if p.name else dataclasses.replace(p, name=f"P{number:02d}") for number, p in enumerate(ordered)]
        plan_of = {mode: next(p.name for p in named if p.choices == plan) for mode, plan in modes.items()}
        described = {
            mode: {
                "plan": name,
                "why": why[mode] + ("" if name == mode else f"; the same plan as {name}, which meets both promises"),
            }
            for mode, name in plan_of.items()
        }
        return Frontier(named, described, {})

    def _fixed(self) -> float:
        original = uniform(self._groups, "bf16")
        return self._costs.of_plan(self._config, original) - self._problem.total(self._problem.seconds, original)

    def _seconds(self, choices: Choices) -> float:
        return self._costs.of_plan(self._config, choices)

    def _bytes(self, choices: Choices) -> int:
        sizes = group_bytes(self._config)
        return fixed_bytes(self._config) + sum(sizes[group][choice] for group, choice in choices.items())


def _unique(plans: Sequence[Choices]) -> list[Choices]:
    kept: list[Choices] = []
    for plan in plans:
        if plan not in kept:
            kept.append(plan)
    return kept
