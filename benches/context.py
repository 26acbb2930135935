"""Whether a step's time depends on the longest context that it was compiled for, at equal live context.

Method. One mode is compiled twice, for --contexts tokens at most, with equal KV pools. Both engines get one prompt of
--live tokens, then generate in turn, one step each, so that whatever else the machine does meets both. Reported are
the medians of --steps step times after --warm-up steps, and the ratio of the medians. Each timed step grows the live
context by one.

    uv run python benches/context.py CHECKPOINT --mode S --out benches/results/<device>/context.json
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from environment import report

from aot_cache.compiler import compile_units
from aot_cache.guard import CompileCounter
from aot_cache.store import load
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.engine import Engine
from elastic_jax.executables import default_step_config
from elastic_jax.plan import Plan
from elastic_jax.requests import GenerateRequest, SamplingParams
from elastic_jax.runner import Runner
from elastic_jax.step import Bucket, StepConfig
from elastic_jax.units import make_units
from elastic_jax.weights import Weights, load_weights


def make_engine(checkpoint: Checkpoint, plan: Plan, step: StepConfig, weights: Weights, folder: Path) -> Engine:
    device = jax.devices()[0]
    wanted = ("greedy", "admit", "start")
    units = [unit for unit in make_units(checkpoint.config, plan, step) if unit.name.endswith(wanted)]
    compile_units(units, folder, {}, device, workers=2, progress=lambda *_: None)
    loaded = load(folder, {}, device, root=folder, units=None, trust=True, workers=2, hint="")
    return Engine(Runner(checkpoint.config, step, loaded, weights, device), step.max_context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--mode", default="S")
    parser.add_argument("--contexts", type=int, nargs=2, default=(1024, 8192))
    parser.add_argument("--live", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    checkpoint = Checkpoint.open(arguments.checkpoint)
    plan = checkpoint.plan(arguments.mode)
    weights = load_weights(checkpoint, plan, "bfloat16", jax.devices()[0], workers=2, progress=None)
    platform = jax.devices()[0].platform
    base = default_step_config(checkpoint.config, platform, "bfloat16", kv_slots=None, max_context=None)
    buckets = (Bucket(1, 0), Bucket(0, arguments.live))
    rng = np.random.default_rng(0)
    prompt = tuple(int(token) for token in rng.integers(0, checkpoint.config.vocab_size, arguments.live))
    with tempfile.TemporaryDirectory() as work:
        engines = []
        for context in arguments.contexts:
            step = dataclasses.replace(base, rows=1, max_context=context, buckets=buckets)
            engines.append(make_engine(checkpoint, plan, step, weights, Path(work) / str(context)))
        counter = CompileCounter()
        steps = arguments.warm_up + arguments.steps
        for engine in engines:
            engine.submit(GenerateRequest(prompt, steps + 2, SamplingParams(), frozenset(), 1, None))
            while not engine.step():
                pass
        seconds = np.empty((steps, 2))
        for i in range(steps):
            for j, engine in enumerate(engines):
                start = time.perf_counter()
                engine.step()
                seconds[i, j] = time.perf_counter() - start
    medians = np.median(seconds[arguments.warm_up :], axis=0) * 1e3
    rows = [
        {"max_context": context, "live_tokens": arguments.live, "step_ms": float(median)}
        for context, median in zip(arguments.contexts, medians, strict=True)
    ]
    facts = {
        "bench": "context",
        "mode": plan.name,
        "steps": arguments.steps,
        "ratio": float(medians[1] / medians[0]),
        "compile_events": counter.count(),
    }
    print(f"ratio of the medians: {facts['ratio']:.3f}")
    report(rows, facts, arguments.out)


if __name__ == "__main__":
    main()
