"""A frontier as a picture: estimated loss with its interval against speed and against memory, modes marked."""

import math

from elastic_jax.frontier import Frontier, Point
from elastic_jax.svg import Panel, Series, draw

_Z = 1.96
"""Standard errors on either side: 95 % of a normal distribution."""


def interval(point: Point) -> tuple[float, float]:
    """The estimated loss's 95 % interval, as fractions: of the role with the larger divergence."""
    role = max(point.kl, key=lambda each: point.kl[each])
    spread = _Z * point.kl_stderr[role]
    return math.expm1(max(point.kl[role] - spread, 0.0)), math.expm1(point.kl[role] + spread)


def plot(frontier: Frontier) -> str:
    """The text of an SVG file: tokens a second of one sequence, and GiB of weights, against the loss in percent."""
    modes: dict[str, list[str]] = {}
    for mode, told in frontier.modes.items():
        modes.setdefault(told["plan"], []).append(mode)
    how = "measured" if frontier.facts.get("costs_measured") else "predicted"
    device = frontier.facts.get("device")

    def series(x: dict[str, float]) -> list[Series]:
        found = []
        for name, marked in (("other plans of the frontier", False), ("modes", True)):
            points = [p for p in frontier.points if (p.name in modes) == marked]
            if points:
                low, high = zip(*(interval(p) for p in points), strict=True)
                found.append(
                    Series(
                        name,
                        [(x[p.name], 100 * p.loss) for p in points],
                        low=[100 * each for each in low],
                        high=[100 * each for each in high],
                        labels=[", ".join(modes[p.name]) for p in points] if marked else None,
                    )
                )
        return found

    speeds = {p.name: 1 / p.step_seconds["generated"] for p in frontier.points}
    prompts = {p.name: frontier.points[0].step_seconds["prompt"] / p.step_seconds["prompt"] for p in frontier.points}
    sizes = {p.name: p.weight_bytes / 2**30 for p in frontier.points}
    loss = "estimated loss, % (95 % interval)"
    panels = [
        Panel("generation", f"tok/s of a sequence ({how} costs)", loss, series(speeds)),
        Panel("prompts", f"speed of prompts, times XL's ({how} costs)", loss, series(prompts)),
        Panel("memory", "GiB of weights", loss, series(sizes)),
    ]
    said = "; ".join(f"{mode}: {told['plan']}, {told['why']}" for mode, told in frontier.modes.items())
    return draw(panels, description=f"Plans of a frontier on {device}. {said}")
