"""Greedy text of every mode, and where it parts from another device's.

Method. Every mode answers the prompts of the test fixtures with --tokens greedy tokens, ending or not; XL in float32
too. With each token goes its margin: the difference of the two best log-probabilities. --against names the result of
another device: reported are, over all prompts, the tokens before the texts part, the largest margin (the other
device's) at which they do, and whether that is below the noise: 0.001 nats in float32, 0.5 where activations have 16
bits, 1.0 where those of prompts have 8, since there the last bit of a sum decides over whole steps. Once they have
parted, nothing is compared. Compiling is allowed here.

    uv run python benches/greedy.py CHECKPOINT --out benches/results/<device>/greedy.json [--against OTHER.json]
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
from environment import report

from aot_cache.compiler import compile_units
from aot_cache.store import load
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.engine import Engine
from elastic_jax.executables import default_compiler_options, default_step_config
from elastic_jax.plan import MODES
from elastic_jax.requests import GenerateRequest, SamplingParams, TokenEvent
from elastic_jax.runner import Runner
from elastic_jax.step import Bucket, ComputeDtype
from elastic_jax.units import make_units
from elastic_jax.weights import load_weights

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures" / "smollm2_reference.json"


def greedy(checkpoint: Checkpoint, mode: str, dtype: ComputeDtype, prompts: list[list[int]], new: int) -> list[Any]:
    """[tokens, margins] of each prompt."""
    device, plan = jax.devices()[0], checkpoint.plan(mode)
    base = default_step_config(checkpoint.config, device.platform, dtype, kv_slots=16384, max_context=2048)
    step = dataclasses.replace(base, rows=8, buckets=(Bucket(8, 0), Bucket(0, 64)))
    units = [
        unit
        for unit in make_units(checkpoint.config, plan, step)
        if unit.name.endswith(("greedy", "admit", "start", "copy_page")) or unit.name.startswith("top.")
    ]
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "store"
        options = default_compiler_options(device.platform)
        compile_units(units, folder, {}, device, workers=4, progress=lambda *_: None, compiler_options=options)
        loaded = load(folder, {}, device, root=folder, units=None, trust=True, workers=4, hint="")
    weights = load_weights(checkpoint, plan, dtype, device, workers=4, progress=None)
    engine = Engine(Runner(checkpoint.config, step, loaded, weights, device), step.max_context)
    sampling = SamplingParams(top_log_probabilities=2)
    numbers = [engine.submit(GenerateRequest(tuple(ids), new, sampling, frozenset(), 1, None)) for ids in prompts]
    found: dict[int, tuple[list[int], list[float]]] = {number: ([], []) for number in numbers}
    while engine.busy:
        for event in engine.step():
            if not isinstance(event, TokenEvent):
                raise SystemExit(f"mode {mode} failed: {event}")
            (_, first), (_, second) = event.top
            found[event.request][0].append(event.token)
            found[event.request][1].append(round(first - second, 4))
    return list(found.values())


def compare(mine: list[Any], other: list[Any]) -> tuple[int, float]:
    """Equal tokens before the texts part, and the largest margin of the other where they do."""
    same, margin = 0, 0.0
    for (tokens, _), (expected, margins) in zip(mine, other, strict=True):
        parted = next((i for i, pair in enumerate(zip(tokens, expected, strict=True)) if pair[0] != pair[1]), None)
        same += len(expected) if parted is None else parted
        margin = max(margin, 0.0 if parted is None else margins[parted])
    return same, margin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    checkpoint = Checkpoint.open(arguments.checkpoint)
    prompts = [prompt["ids"] for prompt in json.loads(FIXTURES.read_text("utf-8"))["prompts"]]
    other = json.loads(arguments.against.read_text()) if arguments.against else None
    answers, rows = {}, []
    variants: list[tuple[str, ComputeDtype]] = [("XL", "float32"), *((mode, "bfloat16") for mode in MODES)]
    for mode, dtype in variants:
        mine = greedy(checkpoint, mode, dtype, prompts, arguments.tokens)
        answers[f"{mode}.{dtype}"] = mine
        row: dict[str, Any] = {"mode": mode, "dtype": dtype, "tokens": len(prompts) * arguments.tokens}
        if other is not None:
            same, margin = compare(mine, other["answers"][f"{mode}.{dtype}"])
            eight_bits = "w8a8" in checkpoint.plan(mode).counts()
            noise = 1e-3 if dtype == "float32" else 1.0 if eight_bits else 0.5
            row |= {"equal_before_parting": same, "largest_margin_at_parting": margin, "within_noise": margin < noise}
        rows.append(row)
        print(row, flush=True)
    against = None if other is None else other["environment"]["device"]
    report(rows, {"bench": "greedy", "against": against, "answers": answers}, arguments.out)


if __name__ == "__main__":
    main()
