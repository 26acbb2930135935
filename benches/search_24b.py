"""The search's work at Mistral-Small-3.1-24B's shape on one GPU, with random weights: time, memory, predicted latency.

Method. bfloat16 weights are drawn on the device (47 GB); int8 is rounded from them inside the compiled units, so that
both fit on 80 GB. `--tokens` random tokens in windows of 1024 run in parts of four windows.
1. Sensitivity: all choices from both ends of the four groups of two layers, and of the head, by the function that
   `elastic-jax search` calls. Work is linear in the layers that run after a group, so the times of the two layers give
   what a layer and a comparison take, and the sum over all 161 groups is extrapolated (and marked so). Units are
   compiled before on one window's part, by the same calls; that time is given apart.
2. `--fast`: scores of all 161 groups in one pass forward and backward, whole.
3. Costs from steps of a thin model (`cost_steps`), then whole 40-layer steps of six plans timed: XL, uniform w8a16,
   w8a8, and three mixtures that a search could find; int8 weights are drawn beside the others.
Random weights change no time; their KL means nothing, and is not reported.

With `--budget-gib` both precisions are drawn in the host's memory instead (one layer, which stands for all), the device
holds that much of them, and the rest is copied to it whenever it is needed, as by a search on a device that cannot hold
both; copying from the host stands for reading files that are cached. Parts 1 and 2 only.

    python benches/search_24b.py --parts sensitivity fast --out benches/results/<device>/search_24b.json
    python benches/search_24b.py --parts latency --out benches/results/<device>/search_24b.json
    python benches/search_24b.py --parts sensitivity fast --budget-gib 50 --out FILE
    python benches/search_24b.py --small --tokens 512 --window 64     # checks this script on a CPU
"""

import argparse
import dataclasses
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# Both precisions of all weights leave little of 80 GB; JAX would take three quarters of it for itself.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.96")

import jax
import numpy as np
from environment import environment
from random_model import MISTRAL_SMALL, SMALL

from elastic_jax.groups import LM_HEAD, model_groups
from elastic_jax.plan import CHOICES, PRECISIONS, Plan
from elastic_jax.quantization import QArray
from elastic_jax.search.cost_steps import measure_step_costs
from elastic_jax.search.forward import KINDS, ROLES, Forward
from elastic_jax.search.held import AllHeld, PartlyHeld
from elastic_jax.search.one_pass import METHOD, measure_fast
from elastic_jax.search.parallel import Shards
from elastic_jax.search.rivals import protect_down, uniform
from elastic_jax.search.room import Room, float_type, weight_sizes
from elastic_jax.search.scores import Scores
from elastic_jax.search.sensitivity import measure
from elastic_jax.search.timed_steps import RandomWeights, StepClock
from elastic_jax.search.workload import Workload

PART = 4
"""Windows that run at the same time."""

PARTS = ["sensitivity", "fast", "latency"]

WORKLOAD = Workload(1024, 128, 1)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def peak_gib(device: Any) -> float | None:
    stats = device.memory_stats()
    return None if stats is None else stats["peak_bytes_in_use"] / 2**30


def parts_of(config: Any, weights: Any, windows: np.ndarray, device: Any) -> Shards:
    split = np.array_split(windows, -(-len(windows) // PART))
    return Shards([Forward(config, weights, own, device) for own in split])


def held_in_part(config: Any, device: Any, budget: int) -> PartlyHeld:
    """Random weights of which the device holds `budget` bytes at a time."""
    beside = 2 * max(weight_sizes(config, device, PRECISIONS).values()) if device.platform == "cpu" else 0
    room = Room.of(config, device, beside=0, available=budget + beside)
    say(room.message() or f"{budget} bytes hold everything: nothing will be streamed")
    rng, drawn = np.random.default_rng(0), {}
    dtype = np.dtype(float_type(device)) if device.platform == "cpu" else jax.numpy.bfloat16
    groups = model_groups(config)

    def read(key: Any) -> Any:
        name, precision = key
        kind = (name.split(".")[-1], precision)
        if kind not in drawn:
            group = groups.get(name, groups[LM_HEAD])
            values = rng.integers(-127, 128, (group.out_size, group.in_size), np.int8)
            scales = np.full((group.out_size, 1), 0.02 / 37, np.float32)
            drawn[kind] = (values, scales) if precision == "int8" else ((values * scales).astype(dtype),)
        arrays = [jax.device_put(array, device).block_until_ready() for array in drawn[kind]]
        return QArray(*arrays, "a16") if precision == "int8" else arrays[0]

    norm = jax.device_put(np.ones(config.hidden_size, dtype), device)
    always = {key: norm if key[0].endswith("norm") else read(key) for key in room.always}
    return PartlyHeld(room.sizes, read, budget=budget, always=always, fixed=room.fixed, passing=room.passing)


def timed_measure(forward: Any, only: set[str]) -> dict[str, float]:
    """Seconds of each (end, role, group), by when the next one began."""
    begun: list[tuple[str, float]] = []

    def note(_done: int, _total: int, name: str) -> None:
        begun.append((name, time.perf_counter()))

    measure(forward, Scores({}), only=only, save=lambda: None, progress=note)
    return {name: after - at for (name, at), (_, after) in itertools.pairwise(begun)}


def sensitivity(forward: Shards, layers: int, threads: int) -> dict[str, Any]:
    """Seconds of some groups, and of all by extrapolation."""
    near, far = layers - 1 - layers // 16, layers - 1 - layers // 4
    only = {f"layers.{layer}.{kind}" for layer in (near, far) for kind in KINDS} | {LM_HEAD}
    start = time.perf_counter()
    forward.compile(threads)
    say(f"units of layers compiled in {time.perf_counter() - start:.0f} s")
    compiling = Shards(forward.parts[:1])
    timed_measure(compiling, {f"layers.{near}.{kind}" for kind in KINDS} | {LM_HEAD})
    compiled = time.perf_counter() - start
    say(f"units compiled and run once in {compiled:.0f} s")
    start = time.perf_counter()
    found = timed_measure(forward, only)
    whole = time.perf_counter() - start
    say(f"{len(only)} groups measured in {whole:.0f} s")
    rows, total = [], 0.0
    for phase in sorted({name.split(", ", 1)[1] for name in found if ", " in name}):
        by_layer = {
            layer: float(np.mean([found[f"layers.{layer}.{kind}, {phase}"] for kind in KINDS[:3]]))
            for layer in (near, far)
        }
        # Three of four kinds: the last group of a layer is followed by the base's way to the next one measured.
        slope = (by_layer[far] - by_layer[near]) / (near - far)
        fixed = by_layer[near] - slope * (layers - near)
        head = found[f"{LM_HEAD}, {phase}"]
        # A layer of the base's own way is at most a layer of a measured group's.
        extrapolated = sum(4 * (fixed + slope * (layers - layer)) for layer in range(layers)) + head + slope * layers
        total += extrapolated
        rows.append(
            {
                "phase": phase,
                "seconds_a_layer": slope,
                "seconds_beside": fixed,
                "head_seconds": head,
                "all_groups_seconds": extrapolated,
            }
        )
    return {
        "measured_groups": len(only),
        "groups": len(model_groups(forward.config)),
        "measured_seconds": whole,
        "compile_and_first_run_seconds": compiled,
        "extrapolated_seconds": total,
        "phases": rows,
    }


def fast(forward: Shards) -> dict[str, Any]:
    start = time.perf_counter()
    measure_fast(Shards(forward.parts[:1]), Scores({"method": METHOD}), seed=0, progress=lambda *_: None)
    first = time.perf_counter() - start
    start = time.perf_counter()
    measure_fast(forward, Scores({"method": METHOD}), seed=0, progress=lambda *_: None)
    seconds = time.perf_counter() - start
    say(f"--fast: {seconds:.0f} s after {first:.0f} s of compiling and a first part")
    return {"seconds": seconds, "compile_and_first_part_seconds": first}


def plans(config: Any) -> dict[str, Plan]:
    groups = list(model_groups(config))
    rng = np.random.default_rng(0)
    alternating = uniform(groups, "w8a8") | {
        g: "bf16" for g in groups if g != LM_HEAD and int(g.split(".")[1]) % 2 == 0
    }
    mixed = {g: "w8a16" if g == LM_HEAD else str(rng.choice(CHOICES, p=(0.2, 0.3, 0.2, 0.3))) for g in groups}
    named: dict[str, Any] = {
        "XL": uniform(groups, "bf16"),
        "uniform w8a16": uniform(groups, "w8a16"),
        "uniform w8a8": uniform(groups, "w8a8"),
        "w8a8, down protected": protect_down(groups),
        "every other layer bf16, else w8a8": alternating,
        "drawn at random": mixed,
    }
    return {name: Plan(name, choices, "", True, {}) for name, choices in named.items()}


def latency(config: Any, floats: Any, step: Any, device: Any, workers: int) -> dict[str, Any]:
    """Predicted and measured milliseconds of a step of each role, by plan."""
    start = time.perf_counter()
    costs = measure_step_costs(
        config,
        WORKLOAD,
        step,
        device,
        workers=workers,
        floats=floats,
        progress=lambda done, total, name: say(f"{done}/{total} {name}"),
    )
    say(f"costs in {time.perf_counter() - start:.0f} s")
    rows = []
    buckets = WORKLOAD.buckets(step.buckets)
    six = plans(config)
    start = time.perf_counter()
    clocks = {role: StepClock(config, WORKLOAD, buckets[role][0], step, device) for role in ROLES}
    for role in ROLES:  # before the int8 weights are there: XLA tunes in what memory is left
        clocks[role].compile(six.values(), workers)
        say(f"{len(six)} steps of {role} tokens compiled, {time.perf_counter() - start:.0f} s")
    weights = RandomWeights(config, step.dtype, device, floats)
    for role in ROLES:
        for name, plan in six.items():
            measured = clocks[role].seconds(plan, weights.of(plan))
            predicted = costs.of_step(config, plan.choices, role)
            rows.append(
                {
                    "plan": name,
                    "role": role,
                    "predicted_ms": 1e3 * predicted,
                    "measured_ms": 1e3 * measured,
                    "error": predicted / measured - 1,
                }
            )
            say(f"{role}, {name}: predicted {1e3 * predicted:.2f} ms, measured {1e3 * measured:.2f} ms")
    largest = max(abs(row["error"]) for row in rows)
    return {"costs": dataclasses.asdict(costs), "largest_error": largest, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--budget-gib", type=float, help="weights on the device at a time, of both precisions drawn")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8), help="steps compiled at once")
    parser.add_argument("--small", action="store_true", help="a small model, to check this script")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.budget_gib is not None and "latency" in arguments.parts:
        parser.error("--budget-gib is for --parts sensitivity fast")
    from random_model import draw_units, jitted, random_weights

    from elastic_jax.executables import default_step_config

    device = jax.devices()[0]
    config = dataclasses.replace(SMALL, num_layers=8) if arguments.small else MISTRAL_SMALL
    step = default_step_config(config, device.platform, "bfloat16", kv_slots=4096, max_context=4096)
    xl = plans(config)["XL"]
    start = time.perf_counter()
    floats: Any = None
    if arguments.budget_gib is not None:
        weights = held_in_part(config, device, int(arguments.budget_gib * 2**30))
    else:
        floats = random_weights(config, xl, "bfloat16", jitted(draw_units(config, xl, "bfloat16"), device), seed=0)
        weights = AllHeld(floats, None)
    drawn = time.perf_counter() - start
    say(f"weights drawn in {drawn:.0f} s")
    windows = np.random.default_rng(0).integers(
        3, config.vocab_size, (arguments.tokens // arguments.window, arguments.window)
    )
    forward = parts_of(config, weights, windows.astype(np.int32), device)
    facts: dict[str, Any] = {
        "bench": "search_24b",
        "environment": environment(),
        "layers": config.num_layers,
        "tokens": windows.size,
        "window": arguments.window,
        "budget_gib": arguments.budget_gib,
        "dot": forward.dot_name,
        "attention": step.attention,
        "decode": step.decode,
        "workload": dataclasses.asdict(WORKLOAD),
    }
    if arguments.out and arguments.out.exists():  # parts may be measured by several commands
        kept = json.loads(arguments.out.read_text())
        same = all(kept.get(key) == facts[key] for key in ("bench", "layers", "tokens", "window", "dot"))
        same = same and kept.get("budget_gib") == arguments.budget_gib
        facts = (kept if same else {}) | facts
    for part in arguments.parts:
        start = time.perf_counter()
        if part == "sensitivity":
            facts[part] = sensitivity(forward, config.num_layers, arguments.workers)
        elif part == "fast":
            facts[part] = fast(forward)
        else:
            facts |= latency(config, floats, step, device, arguments.workers)
        facts[f"{part}_wall_seconds"] = time.perf_counter() - start
        facts[f"peak_gib_until_{part}"] = peak_gib(device)
        if arguments.out:  # what is measured is kept, whatever happens to the rest
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
