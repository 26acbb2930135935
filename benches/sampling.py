"""What sampling costs a decode step over taking the most likely token.

Method. Mistral-Small-3.1-24B's shape with random weights, on an NVIDIA GPU. The greedy step of D rows and the sampling
step with several parameters take turns, --repeats times; a turn dispatches --steps steps, each with the state of the
one before, and the clock stops when the last is done. `over_greedy` is the ratio of the medians, less one.
`dispatch_ms` is the host's part of a step: near `step_ms`, the host would have waited for the device.
`--implementations` names those of choosing tokens.

Steps are compiled here, on the device, or elsewhere for it: then a store of them is loaded.

    python benches/sampling.py --out benches/results/<device>/sampling.json
    python benches/sampling.py --target h200 --work FOLDER      # compiles, without a GPU
    python benches/sampling.py --store FOLDER --out benches/results/<device>/sampling-cross.json
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from decode import Step, draw, make_step
from environment import report
from random_model import MISTRAL_SMALL

from aot_cache.compiler import compile_units
from aot_cache.store import Executable, load
from elastic_jax import kernels
from elastic_jax.device import device_to_compile_for
from elastic_jax.executables import default_step_config
from elastic_jax.requests import SamplingParams
from elastic_jax.runner import SamplingTable

PARAMETERS: dict[str, SamplingParams | None] = {
    "greedy": None,
    "temperature": SamplingParams(temperature=0.8),
    "top-k, top-p": SamplingParams(temperature=0.8, top_k=50, top_p=0.95),
    "everything": SamplingParams(
        temperature=0.8,
        top_k=50,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logit_bias={5: 1.0, 70000: -2.0},
    ),
}


def sampling_inputs(config: Any, rows: int, params: SamplingParams | None) -> tuple[Any, ...]:
    if params is None:
        return ()
    step = default_step_config(config, "gpu", "bfloat16", kv_slots=4096, max_context=1024)
    table = SamplingTable(config, dataclasses.replace(step, rows=min(rows, step.rows)), jax.devices()[0])
    for row in range(rows):
        table.set(row, params, choice=row)
    return tuple(jax.tree.leaves(table.on_device()))


def turn(step: Step, state: list[Any], steps: int) -> tuple[list[Any], float, float]:
    """Seconds a step, and those of them until the last was dispatched."""
    start = time.perf_counter()
    for _ in range(steps):
        state, out = step.run(state)
    dispatched = time.perf_counter()
    jax.block_until_ready(out)
    return state, (time.perf_counter() - start) / steps, (dispatched - start) / steps


def compile_for(config: Any, arguments: argparse.Namespace) -> None:
    """Compiles what is measured for an absent device, one store for each mode."""
    device, options = device_to_compile_for(arguments.target)
    for mode in arguments.modes:
        units = [
            make_step(config, mode, rows, arguments.context, "cuda", variant=variant, chooser="cuda", kv="full")[1]
            for rows in arguments.rows
            for variant in ("greedy", "sampling")
        ]
        compile_units(
            units,
            arguments.work / mode,
            {},
            device,
            workers=2,
            progress=lambda name, seconds, done, total: print(f"{done}/{total} {name} {seconds}", flush=True),
            compiler_options=options,
        )


def load_compiled(folder: Path, mode: str) -> dict[str, Executable]:
    kernels.prepare_to_load("pallas", "pallas", "cuda", "cuda")
    return load(
        folder / mode, {}, jax.devices()[0], root=folder, units=None, trust=True, workers=4, hint="", preload=True
    )


def measure(config: Any, mode: str, weights: Any, rows: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    made = {}
    executables = None if arguments.store is None else load_compiled(arguments.store, mode)
    for chooser in arguments.implementations:
        for name, params in PARAMETERS.items():
            given = sampling_inputs(config, rows, params)
            step = Step(config, mode, rows, arguments.context, "cuda", weights, given, chooser, executables=executables)
            made[chooser, name] = step, step.state(1)
    times: dict[Any, list[tuple[float, float]]] = {key: [] for key in made}
    for number in range(arguments.repeats + 1):
        for key, (step, state) in made.items():
            state, whole, dispatch = turn(step, state, arguments.steps if number else 5)
            made[key] = step, state
            if number:
                times[key].append((whole, dispatch))
    found = []
    for (chooser, name), measured in times.items():
        whole, dispatch = (float(np.median(column)) for column in zip(*measured, strict=True))
        greedy = float(np.median([seconds for seconds, _ in times[chooser, "greedy"]]))
        found.append(
            {
                "mode": mode,
                "rows": rows,
                "implementation": chooser,
                "parameters": name,
                "step_ms": whole * 1e3,
                "dispatch_ms": dispatch * 1e3,
                "over_greedy": whole / greedy - 1,
                "over_greedy_us": (whole - greedy) * 1e6,
            }
        )
        print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", default=["S"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--implementations", nargs="+", default=["cuda"], choices=["cuda", "xla"])
    parser.add_argument("--most", type=float, default=0.03, help="status 1 if `cuda` costs more than that")
    parser.add_argument("--target", help="compile for this device into --work, and measure nothing")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--store", type=Path, help="run what --target compiled there")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if (arguments.target is None) != (arguments.work is None):
        parser.error("--target and --work go together")
    if arguments.target is not None and arguments.store is not None:
        parser.error("--target compiles and --store measures: give one of them")
    if (arguments.target or arguments.store) and arguments.implementations != ["cuda"]:
        parser.error("stores have the implementation cuda alone")
    rows = []
    config = dataclasses.replace(MISTRAL_SMALL, num_layers=arguments.layers)
    if arguments.target is not None:
        compile_for(config, arguments)
        return
    for mode in arguments.modes:
        weights = draw(config, mode)
        for count in arguments.rows:
            rows += measure(config, mode, weights, count, arguments)
        del weights
    compiled = "on the device" if arguments.store is None else "elsewhere"
    facts: dict[str, Any] = {
        "bench": "sampling",
        "context": arguments.context,
        "steps": arguments.steps,
        "compiled": compiled,
    }
    if arguments.layers != MISTRAL_SMALL.num_layers:
        facts["layers"] = arguments.layers
    report(rows, facts, arguments.out)
    slow = [row for row in rows if row["implementation"] == "cuda" and row["over_greedy"] > arguments.most]
    for row in slow:
        print(f"{row['rows']} rows, {row['parameters']}: {100 * row['over_greedy']:.1f} % more than greedy")
    sys.exit(1 if slow else 0)


if __name__ == "__main__":
    main()
