"""The frontier: the plans that a search found, from the original to the fastest, and which one a request means.

It is read by whoever loads a mode, so it knows files and numbers only: nothing here measures, solves or needs a device.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from elastic_jax.errors import PlanError
from elastic_jax.plan import Choice, Plan

FRONTIER = "frontier.json"
"""Its file, beside elastic.json."""

FORMAT = 1

_LIMIT = re.compile(r"(max-loss|min-speedup|max-gib)=([0-9.]+(?:[eE]-?[0-9]+)?)(%?)")

REQUESTS = "0.0 (the fastest) to 1.0 (the original), max-loss=1%, min-speedup=1.5, max-gib=30, or several with commas"
"""What can be asked of a frontier, in words."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One plan.

    Attributes:
        name: of the mode that uses it, or `P<number>`.
        choices: group -> choice.
        seconds: of the workload, by the costs.
        step_seconds: role -> of one step.
        weight_bytes: of all weights on the device.
        kl: role -> KL(original || plan) on held-out text, nats.
        kl_stderr: role -> its standard error, from windows as units.
        flips: role -> fraction of positions whose most likely token differs.
    """

    name: str
    choices: Mapping[str, Choice]
    seconds: float
    step_seconds: Mapping[Any, float]
    weight_bytes: int
    kl: Mapping[Any, float]
    kl_stderr: Mapping[Any, float]
    flips: Mapping[Any, float]

    @property
    def worst_kl(self) -> float:
        """Of both roles."""
        return max(self.kl.values())

    @property
    def loss(self) -> float:
        """What is taken for the loss of quality: by how much perplexity would rise on the original's own text.

        It is exp(KL) - 1 of the worse role; an estimate that no task has confirmed.
        """
        return math.expm1(self.worst_kl)


@dataclasses.dataclass(frozen=True)
class Frontier:
    """Plans, slowest first; the first is the original.

    Attributes:
        points: the plans.
        modes: mode -> {"plan": name of its point, "why": in words}.
        facts: how it was made: device, workload, texts, rivals, mixture, versions.
    """

    points: Sequence[Point]
    modes: Mapping[str, Mapping[str, str]]
    facts: Mapping[str, Any]

    def speedup(self, point: Point) -> float:
        """How many times faster than the original the workload is, by the costs."""
        return self.points[0].seconds / point.seconds

    def resolve(self, request: str) -> tuple[Point, str] | None:
        """The plan that a request means, and why; None if it is no request of a frontier.

        Raises:
            PlanError: the request is malformed, or no plan meets it.
        """
        request = request.strip()
        for point in self.points:
            if point.name == request:
                return point, "asked for by name"
        if re.fullmatch(r"[0-9]*\.?[0-9]+", request):
            return self._slide(float(request))
        if "=" not in request:
            return None
        limits: dict[str, float] = {}
        for part in request.split(","):
            match = _LIMIT.fullmatch(part.strip())
            if match is None or match[1] in limits or (match[3] and match[1] != "max-loss"):
                raise PlanError(f"{request!r} should be one of: {REQUESTS}; found {part.strip()!r}")
            limits[match[1]] = float(match[2]) / (100 if match[3] else 1)
        return self._within(request, limits)

    def plan(self, request: str) -> Plan | None:
        """The same as a plan, which says what it was chosen for."""
        found = self.resolve(request)
        if found is None:
            return None
        point, why = found
        note = f"{why}: {self.describe(point)}"
        return Plan(point.name, point.choices, note, False, {"kl": dict(point.kl), "seconds": point.seconds})

    def describe(self, point: Point) -> str:
        """A point in one line."""
        how = "measured" if self.facts.get("costs_measured") else "predicted"
        return (
            f"plan {point.name}, {self.speedup(point):.2f} times XL's speed ({how} costs, {self.facts.get('device')}), "
            f"{point.weight_bytes / 2**30:.2f} GiB of weights, estimated loss {100 * point.loss:.2f} % "
            f"(KL {point.kl['prompt']:.4f} prompt, {point.kl['generated']:.4f} generated)"
        )

    def _slide(self, position: float) -> tuple[Point, str]:
        if not 0 <= position <= 1:
            raise PlanError(f"a position on the frontier is 0.0 (the fastest) to 1.0 (the original), found {position}")
        slowest, fastest = self.points[0].seconds, self.points[-1].seconds
        wanted = fastest + position * (slowest - fastest)
        return min(self.points, key=lambda p: abs(p.seconds - wanted)), f"nearest to {position:g} by time"

    def _within(self, request: str, limits: Mapping[str, float]) -> tuple[Point, str]:
        kept = [
            point
            for point in self.points
            if point.loss <= limits.get("max-loss", math.inf)
            and self.speedup(point) >= limits.get("min-speedup", 0.0)
            and point.weight_bytes <= limits.get("max-gib", math.inf) * 2**30
        ]
        if not kept:
            fastest, smallest = self.points[-1], min(point.weight_bytes for point in self.points)
            raise PlanError(
                f"no plan meets {request}: the fastest has {self.speedup(fastest):.2f} times XL's speed and an "
                f"estimated loss of {100 * fastest.loss:.2f} %, the smallest {smallest / 2**30:.2f} GiB of weights"
            )
        if "max-loss" in limits:
            return min(kept, key=lambda p: p.seconds), f"the fastest with {request}"
        return min(kept, key=lambda p: p.loss), f"the least loss with {request}"

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values; `read` reads them back."""
        points = [dataclasses.asdict(p) | {"loss": p.loss, "speedup": self.speedup(p)} for p in self.points]
        return {"format": FORMAT, "modes": dict(self.modes), "facts": dict(self.facts), "points": points}

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The frontier below a checkpoint's folder; None if it was never searched.

        Raises:
            PlanError: the file is damaged.
        """
        file = path / FRONTIER
        try:
            values = json.loads(file.read_text("utf-8"))
            if values["format"] != FORMAT:
                raise ValueError(f"format {values['format']!r}, expected {FORMAT}")
            names = [field.name for field in dataclasses.fields(Point)]
            points = [Point(**{name: point[name] for name in names}) for point in values["points"]]
            if not points:
                raise ValueError("no points")
            return cls(points, values["modes"], values["facts"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PlanError(f"{file} is no frontier: {error!r}; `elastic-jax search` writes it again") from None
