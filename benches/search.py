"""What a search found on a real model, measured on text that neither calibration nor search has seen.

Method. The checkpoint's modes, the uniform plans, `w8a8` with `down` protected and a greedy plan run over windows of a
text (JSON lines with a field `text`; documents one after another) in the arithmetic of prompt and of generated tokens,
beside the original. KL in nats, top-1 flips, and perplexity against XL's. Times are
predicted by the costs that the search used. Unseen plans are drawn: each takes every group's choice from one of two
neighbouring plans of the frontier, and then a tenth of the groups get any choice; their KL as the search's corrected
scores predict it is compared with measured KL by Spearman's rank correlation. The solver is timed on 161 groups with
six choices and 30 budgets.

    python benches/search.py CHECKPOINT --text FILE.jsonl --out benches/results/<device>/search.json
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from environment import report

from elastic_jax.checkpoint import Checkpoint
from elastic_jax.errors import ConfigError
from elastic_jax.frontier import Frontier
from elastic_jax.groups import LM_HEAD, model_groups
from elastic_jax.plan import CHOICES, Choice
from elastic_jax.search.forward import ROLES
from elastic_jax.search.ladder import end_tables, mixed
from elastic_jax.search.measuring import PlanMeter
from elastic_jax.search.parallel import load
from elastic_jax.search.rivals import greedy, named_rivals, uniform
from elastic_jax.search.scores import FAST_SCORES, SCORES, Scores
from elastic_jax.search.solver import Problem, solve
from elastic_jax.search.texts import get_text
from elastic_jax.search.workload import COSTS, Costs

SOLVED_GROUPS, SOLVED_CHOICES, BUDGETS = 161, 6, 30


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def unseen(frontier: Frontier, count: int, groups: list[str]) -> list[dict[str, Choice]]:
    """Plans between neighbours of the frontier, disturbed."""
    rng = np.random.default_rng(0)
    plans: list[dict[str, Choice]] = []
    for number in range(count):
        place = 1 + number * (len(frontier.points) - 2) // max(count - 1, 1)
        a, b = frontier.points[place - 1].choices, frontier.points[place].choices
        plan: dict[str, Choice] = {g: a[g] if rng.random() < 0.5 else b[g] for g in groups}
        for group in groups:
            if group != LM_HEAD and rng.random() < 0.1:
                plan[group] = CHOICES[int(rng.integers(len(CHOICES)))]
        plans.append(plan)
    return plans


def solver_seconds() -> float:
    """Of all budgets, on numbers that are as far apart as real ones."""
    rng = np.random.default_rng(0)
    shape = (SOLVED_GROUPS, SOLVED_CHOICES)
    seconds = np.sort(rng.lognormal(0, 1, shape), axis=1)[:, ::-1].copy()
    kl = {role: np.sort(rng.lognormal(-7, 1.5, shape), axis=1) for role in ROLES}
    names = tuple(f"choice {n}" for n in range(SOLVED_CHOICES))
    groups = tuple(f"group {n}" for n in range(SOLVED_GROUPS))
    problem = Problem(groups, names, np.ones(shape, bool), seconds, seconds, kl, 0)  # pyright: ignore[reportArgumentType]  (more than there are names for)
    least = max(float(table.min(axis=1).sum()) for table in kl.values())
    most = max(float(table.max(axis=1).sum()) for table in kl.values())
    begun = time.perf_counter()
    for budget in np.geomspace(1.02 * least, most, BUDGETS):
        solve(problem, minimize="seconds", max_kl=float(budget))
    return time.perf_counter() - begun


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    from scipy.stats import rankdata

    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--unseen", type=int, default=10, help="plans drawn near the frontier")
    parser.add_argument("--unseen-windows", type=int, default=6, help="windows that those are measured on")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    checkpoint, device = Checkpoint.open(arguments.checkpoint), jax.devices()[0]
    frontier = Frontier.read(checkpoint.path)
    if frontier is None:
        raise ConfigError(f"{checkpoint.path} has no frontier: search it first")
    config, groups = checkpoint.config, list(model_groups(checkpoint.config))
    costs = Costs.read(checkpoint.path / COSTS)
    fast = frontier.facts["scores"] != "measured from both ends"
    scores = Scores.read(checkpoint.path / (FAST_SCORES if fast else SCORES))
    problem = Problem.of(config, costs, mixed(end_tables(config, scores), frontier.facts["mixture"]))

    begun = time.perf_counter()
    text = get_text(
        checkpoint,
        arguments.windows,
        arguments.length,
        file=arguments.text,
        tasks=[],
        seed=0,
        device=device,
        workers=2,
        say=say,
    )
    forward = load(checkpoint, text.windows, [device], 2)
    meter = PlanMeter(forward)
    modes = {mode: checkpoint.plan(mode).choices for mode in frontier.modes}
    known = {**modes, **named_rivals(groups)}
    if "S" in modes:
        known["greedy, S's time"] = greedy(problem, problem.total(problem.seconds, modes["S"]))
    original = meter.measure(uniform(groups, "bf16"))
    rows = []
    for number, (name, choices) in enumerate(known.items()):
        say(f"{number}/{len(known)} {name}, {time.perf_counter() - begun:.0f} s")
        found = meter.measure(choices)
        for role in ROLES:
            rows.append(
                {
                    "plan": name,
                    "role": role,
                    "kl": found.kl[role],
                    "kl_stderr": found.kl_stderr[role],
                    "flips": found.flips[role],
                    "perplexity": found.perplexity[role],
                    "perplexity_change": found.perplexity[role] / original.perplexity[role] - 1,
                    "seconds": costs.of_plan(config, choices),
                    "predicted_kl": problem.total(problem.kl[role], choices),
                }
            )
    few = PlanMeter(forward.over(text.windows[: arguments.unseen_windows]))
    drawn = []
    for number, plan in enumerate(unseen(frontier, arguments.unseen, groups)):
        say(f"unseen plan {number} of {arguments.unseen}, {time.perf_counter() - begun:.0f} s")
        found = few.measure(plan)
        predicted = {role: problem.total(problem.kl[role], plan) for role in ROLES}
        drawn.append({"predicted": predicted, "measured": dict(found.kl)})
    ranks = {role: spearman(*([d[k][role] for d in drawn] for k in ("predicted", "measured"))) for role in ROLES}
    ranks["sum of both"] = spearman(*([float(sum(d[k].values())) for d in drawn] for k in ("predicted", "measured")))
    by = {(row["plan"], row["role"]): row for row in rows}
    bars: dict[str, float] = {}
    if "S" in modes:
        s, w8a8, w8a16 = ({r: by[n, r] for r in ROLES} for n in ("S", "uniform w8a8", "uniform w8a16"))
        bars = {
            "S_kl_over_uniform_w8a8": s["prompt"]["kl"] / w8a8["prompt"]["kl"],
            "S_seconds_over_uniform_w8a8": s["prompt"]["seconds"] / w8a8["prompt"]["seconds"],
            "S_generated_kl_over_w8a16": s["generated"]["kl"] / w8a16["generated"]["kl"],
        }
    bars |= {
        f"{mode}_largest_perplexity_change": max(by[mode, role]["perplexity_change"] for role in ROLES)
        for mode in modes
        if mode != "XL"
    }
    source = checkpoint.manifest.source
    facts = {
        "bench": "search",
        "source": {k: v for k, v in source.items() if k != "calibration"},
        "rounding": source.get("calibration", {}).get("rounding"),
        "text_name": arguments.text.name,
        "tokens": int(text.windows.size),
        "window": arguments.length,
        "search": {key: value for key, value in frontier.facts.items() if key != "versions"},
        "frontier": [
            {"name": p.name, "speedup": frontier.speedup(p), "kl": dict(p.kl), "loss": p.loss} for p in frontier.points
        ],
        "modes": dict(frontier.modes),
        "unseen": drawn,
        "unseen_tokens": int(text.windows[: arguments.unseen_windows].size),
        "rank_correlation": ranks,
        "solver_seconds": solver_seconds(),
        "solver": {"groups": SOLVED_GROUPS, "choices": SOLVED_CHOICES, "budgets": BUDGETS},
        "bars": bars,
        "wall_seconds": time.perf_counter() - begun,
    }
    report(rows, facts, arguments.out)


if __name__ == "__main__":
    main()
