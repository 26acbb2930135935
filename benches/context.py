"""Whether a step's time depends on the longest context that it was compiled for, at equal live context.

Method. One mode is compiled twice, for --contexts tokens at most, with equal KV pools. Both engines get one prompt of
--live tokens, then generate in turn, one step each, so that whatever else the machine does meets both. Reported are
the medians of --steps step times after --warm-up steps, and the ratio of the medians. Each timed step grows the live
context by one.

    uv run python benches/context.py CHECKPOINT --mode S --out benches/results/<device>/context.json
    uv run python benches/context.py --mistral-small --contexts 1024 32768 --out ...   # the 24B shape, random weights
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from environment import report
from random_model import MISTRAL_SMALL, draw_units, jitted, random_weights

from aot_cache.compiler import compile_units
from aot_cache.guard import CompileCounter
from aot_cache.store import load
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.config import ModelConfig
from elastic_jax.engine import Engine
from elastic_jax.executables import default_compiler_options, default_step_config
from elastic_jax.plan import Plan, provisional_plans
from elastic_jax.requests import GenerateRequest, SamplingParams
from elastic_jax.runner import Runner
from elastic_jax.step import Bucket, StepConfig
from elastic_jax.units import make_units
from elastic_jax.weights import Weights, load_weights


def make_engine(config: ModelConfig, plan: Plan, step: StepConfig, weights: Weights, folder: Path) -> Engine:
    device = jax.devices()[0]
    wanted = ("greedy", "admit", "start")
    units = [unit for unit in make_units(config, plan, step) if unit.name.endswith(wanted)]
    options = default_compiler_options(device.platform)
    compile_units(units, folder, {}, device, workers=2, progress=lambda *_: None, compiler_options=options)
    loaded = load(folder, {}, device, root=folder, units=None, trust=True, workers=2, hint="")
    return Engine(Runner(config, step, loaded, weights, device), step.max_context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--mistral-small", action="store_true", help="instead of a checkpoint")
    parser.add_argument("--mode", default="S")
    parser.add_argument("--contexts", type=int, nargs=2, default=(1024, 8192))
    parser.add_argument("--live", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    if (arguments.checkpoint is None) != arguments.mistral_small:
        parser.error("name a checkpoint, or --mistral-small")
    device = jax.devices()[0]
    if arguments.mistral_small:
        config, plan = MISTRAL_SMALL, provisional_plans(MISTRAL_SMALL)[arguments.mode]
        draw = jitted(draw_units(config, plan, "bfloat16"), device)
        weights = random_weights(config, plan, "bfloat16", draw, seed=0)
    else:
        checkpoint = Checkpoint.open(arguments.checkpoint)
        config, plan = checkpoint.config, checkpoint.plan(arguments.mode)
        weights = load_weights(checkpoint, plan, "bfloat16", device, workers=2, progress=None)
    slots = max(arguments.contexts)
    base = default_step_config(config, device.platform, "bfloat16", kv_slots=max(slots, 16384), max_context=None)
    buckets = (Bucket(1, 0), Bucket(0, arguments.live))
    rng = np.random.default_rng(0)
    prompt = tuple(int(token) for token in rng.integers(0, config.vocab_size, arguments.live))
    with tempfile.TemporaryDirectory() as work:
        engines = []
        for context in arguments.contexts:
            step = dataclasses.replace(base, rows=1, max_context=context, buckets=buckets)
            engines.append(make_engine(config, plan, step, weights, Path(work) / str(context)))
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
        "model": "Mistral-Small-3.1-24B's shape" if arguments.mistral_small else arguments.checkpoint.name,
        "steps": arguments.steps,
        "ratio": float(medians[1] / medians[0]),
        "compile_events": counter.count(),
    }
    print(f"ratio of the medians: {facts['ratio']:.3f}")
    report(rows, facts, arguments.out)


if __name__ == "__main__":
    main()
