"""Writing what a search found into the checkpoint: the frontier, and the plan of each mode."""

import dataclasses
import importlib.metadata
import math
from collections.abc import Mapping
from typing import Any

from elastic_jax.checkpoint import Checkpoint
from elastic_jax.checkpoint_format import PLANS
from elastic_jax.checkpoint_io import write_json
from elastic_jax.frontier import FRONTIER, Frontier, Point
from elastic_jax.plan import MODES, Plan
from elastic_jax.search.promises import PROMISES, largest_kl
from elastic_jax.search.scores import Scores
from elastic_jax.search.search import Result
from elastic_jax.search.texts import Text
from elastic_jax.search.workload import Costs

TOOLS = ("elastic-jax", "jax", "scipy", "numpy")


def write_outcome(
    checkpoint: Checkpoint,
    result: Result,
    costs: Costs,
    text: Text,
    held_out: Text,
    *,
    scores: Scores,
    took: Mapping[str, float],
) -> tuple[Frontier, dict[str, Plan]]:
    """Replaces the checkpoint's plans and its frontier. A mode without a plan of its own is no mode any longer.

    Executables of a mode whose plan changed no longer fit, and are refused until they are compiled again.

    Args:
        checkpoint: is changed.
        result: of the search.
        costs: that it used.
        text: of the scores.
        held_out: of the plans' distances.
        scores: that it used.
        took: `wall_s` and `cpu_s` of the whole search.
    """
    facts: dict[str, Any] = {
        "device": costs.device,
        "costs_measured": costs.measured,
        "workload": dataclasses.asdict(costs.workload),
        "text": {**text.description, "windows": list(text.windows.shape), "token_ids_sha256": text.digest},
        "held_out": {
            **held_out.description,
            "windows": list(held_out.windows.shape),
            "token_ids_sha256": held_out.digest,
        },
        "rivals": list(result.rivals),
        "scores": scores.identity.get("method", "measured from both ends"),
        "took": dict(took),
        "mixture": {role: list(shares) for role, shares in result.mixture.items()},
        "versions": {tool: importlib.metadata.version(tool) for tool in TOOLS},
    }
    frontier = dataclasses.replace(result.frontier, facts=facts)
    plans = {mode: _plan(frontier, mode) for mode in MODES if mode in frontier.modes}
    write_json(checkpoint.path / FRONTIER, frontier.to_json())
    for mode in MODES:
        path = checkpoint.path / PLANS / f"{mode}.json"
        if mode in plans:
            write_json(path, plans[mode].to_json())
        else:
            path.unlink(missing_ok=True)
    return frontier, plans


def _plan(frontier: Frontier, mode: str) -> Plan:
    told = frontier.modes[mode]
    point = next(p for p in frontier.points if p.name == told["plan"])
    note = f"found by search: {told['why']}; {frontier.describe(point)}"
    return Plan(mode, point.choices, note, False, _measured(frontier, mode, point))


def _measured(frontier: Frontier, mode: str, point: Point) -> Mapping[str, Any]:
    promised = PROMISES.get(mode)
    return {
        # No task was evaluated: nothing is certified yet, whatever the divergence.
        "promise": None if promised is None else {"largest_loss": promised, "status": "estimated"},
        "largest_kl": None if promised is None else largest_kl(mode),
        "estimated_loss": math.expm1(point.worst_kl),
        "kl": dict(point.kl),
        "kl_stderr": dict(point.kl_stderr),
        "flips": dict(point.flips),
        "seconds": point.seconds,
        "step_seconds": dict(point.step_seconds),
        "speedup": frontier.speedup(point),
        **{key: frontier.facts[key] for key in ("device", "costs_measured", "workload", "held_out", "versions")},
    }
