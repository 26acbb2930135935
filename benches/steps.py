"""Mistral-Small-3.1-24B's shape with random weights: compile all units, then load and run them where nothing compiles.

Method. For each mode one process compiles every unit that `elastic-jax compile` would (or --stores names a folder of
stores compiled elsewhere). A fresh process then forbids tracing, loads all of them in parallel, draws random weights by
executables of their own, and runs requests through the engine. --hide-ptxas renames NVIDIA's assembler meanwhile.
Events of JAX's compiler are counted from the process's first line on and must be zero.

Decode: `batch` sequences of `context` random tokens generate --tokens more; the median of the engine's step times after
8 is one step, host work included. `read_tb_s` counts weights (without the embedding) and live keys and values once.
Prompt: one prompt fills the (0; 4096) step; the median of 5 times from `submit` to the first token. `top_s` counts 2 x
weights x tokens (without lm_head, which runs for the last token) over that time.

    python benches/steps.py --modes XL S --work FOLDER --out benches/results/<device>/steps.json
    python benches/steps.py --target h200 --compile-only --work FOLDER    # without a GPU; --stores FOLDER runs them
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aot_cache.guard import CompileCounter, forbid_compilation
from elastic_jax.step import Bucket, StepConfig

LAYERS = 40
PROMPT = 4096
SKIPPED = 8
SHAPES = ((1, 256), (16, 1024), (1, 4096))


def sizes(layers: int, small: bool) -> tuple[Any, StepConfig]:
    """The model, and what its units are compiled for; `small` ones check this script on a CPU."""
    from random_model import MISTRAL_SMALL, SMALL

    from elastic_jax.executables import default_step_config

    config = dataclasses.replace(MISTRAL_SMALL, num_layers=layers)
    if small:
        config = dataclasses.replace(SMALL, num_layers=layers)
        step = default_step_config(config, "cpu", "bfloat16", kv_slots=32768, max_context=8192)
        return config, dataclasses.replace(step, buckets=(Bucket(1, 0), Bucket(16, 0), Bucket(0, PROMPT)))
    return config, default_step_config(config, "gpu", "bfloat16", kv_slots=131072, max_context=131072)


def all_units(config: Any, mode: str, step: StepConfig) -> list[Any]:
    from random_model import draw_units

    from elastic_jax.plan import provisional_plans
    from elastic_jax.units import make_units

    plan = provisional_plans(config)[mode]
    return make_units(config, plan, step) + draw_units(config, plan, step.dtype)


def compile_child(arguments: argparse.Namespace, mode: str) -> dict[str, Any]:
    from aot_cache.compiler import compile_units
    from elastic_jax.device import device_to_compile_for

    device, options = device_to_compile_for(arguments.target)
    config, step = sizes(arguments.layers, arguments.small)
    start = time.perf_counter()
    manifest = compile_units(
        all_units(config, mode, step),
        arguments.work / mode,
        {},
        device,
        workers=arguments.workers,
        progress=lambda name, seconds, done, total: (
            print(f"{mode} {done}/{total} {name} {seconds:.1f} s", flush=True) if seconds is not None else None
        ),
        compiler_options=options,
    )
    return describe(manifest) | {"compile_wall_seconds": time.perf_counter() - start}


def describe(manifest: Any) -> dict[str, Any]:
    """A store without the units that draw weights."""
    units = {name: record for name, record in manifest.units.items() if not name.startswith("draw")}
    return {
        "units": len(units),
        "bytes": sum(record.size for record in units.values()),
        "compile_unit_seconds": sum(record.compile_seconds for record in units.values()),
    }


def run_child(arguments: argparse.Namespace, mode: str, store: Path) -> dict[str, Any]:
    counter = CompileCounter()
    forbid_compilation()
    import jax
    from random_model import random_weights

    from aot_cache.manifest import read_manifest
    from aot_cache.store import load
    from elastic_jax import kernels
    from elastic_jax.engine import Engine
    from elastic_jax.groups import model_groups
    from elastic_jax.plan import provisional_plans
    from elastic_jax.runner import Runner
    from elastic_jax.weights import weight_bytes

    device = jax.devices()[0]
    config, step = sizes(arguments.layers, arguments.small)
    kernels.prepare_to_load(step.attention, step.dot, step.decode, step.sampling)
    start = time.perf_counter()
    units = load(
        store, {}, device, root=store.parent, units=None, trust=True, workers=arguments.workers, hint="", preload=True
    )
    load_seconds = time.perf_counter() - start
    start = time.perf_counter()
    weights = random_weights(config, provisional_plans(config)[mode], step.dtype, units, seed=0)
    draw_seconds = time.perf_counter() - start
    model = {name: unit for name, unit in units.items() if not name.startswith("draw")}
    engine = Engine(Runner(config, step, model, weights, device), step.max_context)
    linear = sum(g.out_size * g.in_size for name, g in model_groups(config).items() if name != "lm_head")
    read = weight_bytes({name: leaf for name, leaf in weights.items() if name != "embedding"})
    kv_token = 4 * config.num_layers * config.kv_size
    rng = np.random.default_rng(0)
    rows = [decode(engine, rng, batch, context, arguments.tokens, read, kv_token) for batch, context in SHAPES]
    rows.append(prompt(engine, rng, linear))
    for length in arguments.long:
        rows.append(decode(engine, rng, 1, length, 32, read, kv_token))
    checks = {"equal_seeds_equal_samples": sampled(engine, rng), "many_lengths": mixed(engine, rng)}
    for row in rows:
        row["mode"] = mode
        print(json.dumps(row), flush=True)
    return {
        **describe(read_manifest(store, hint="")),
        "load_seconds": load_seconds,
        "draw_weights_seconds": draw_seconds,
        "weight_bytes": weight_bytes(weights),
        "kv_slots": step.kv_slots,
        "max_context": step.max_context,
        "attention": step.attention,
        "dot": step.dot,
        "decode": step.decode,
        "sampling": step.sampling,
        "compile_events": counter.count(),
        "ptxas": shutil.which("ptxas"),
        "checks": checks,
        "rows": rows,
    }


def tokens_of(engine: Any, rng: np.random.Generator, lengths: list[int], new: int, **sampling: Any) -> dict[int, list]:
    """Runs random prompts together; request -> (seconds since the start, token) of each of its tokens."""
    from elastic_jax.requests import FailEvent, GenerateRequest, SamplingParams

    vocab = engine.runner.config.vocab_size
    numbers = []
    for length in lengths:
        prompt = tuple(int(token) for token in rng.integers(3, vocab, length))
        numbers.append(engine.submit(GenerateRequest(prompt, new, SamplingParams(**sampling), frozenset(), 1, None)))
    found: dict[int, list] = {number: [] for number in numbers}
    start = time.perf_counter()
    while engine.busy:
        for event in engine.step():
            if isinstance(event, FailEvent):
                raise event.error
            found[event.request].append((time.perf_counter() - start, event.token))
    return found


def decode(
    engine: Any, rng: np.random.Generator, batch: int, context: int, new: int, read: int, kv_token: int
) -> dict[str, Any]:
    found = tokens_of(engine, rng, [context] * batch, new)
    times = np.array([[seconds for seconds, _ in tokens] for tokens in found.values()])
    together = times[:, :].max(axis=0)  # when every row has its n-th token
    steps = np.diff(together[SKIPPED:])
    step = float(np.median(steps))
    live = batch * (context + new // 2)
    return {
        "what": "decode",
        "batch": batch,
        "context": context,
        "step_ms": step * 1e3,
        "tok_s": 1 / step,
        "read_tb_s": (read + live * kv_token) / step / 1e12,
        "first_token_ms": float(together[0]) * 1e3,
    }


def prompt(engine: Any, rng: np.random.Generator, linear: int) -> dict[str, Any]:
    times = []
    for _ in range(6):
        (tokens,) = tokens_of(engine, rng, [PROMPT], 1).values()
        times.append(tokens[0][0])
    step = float(np.median(times[1:]))
    return {
        "what": "prompt",
        "batch": 1,
        "context": PROMPT,
        "step_ms": step * 1e3,
        "tok_s": PROMPT / step,
        "top_s": 2 * linear * PROMPT / step / 1e12,
        "first_token_ms": step * 1e3,
    }


def sampled(engine: Any, rng: np.random.Generator) -> bool:
    state = rng.bit_generator.state
    drawn = []
    for _ in range(2):
        rng.bit_generator.state = state
        (tokens,) = tokens_of(engine, rng, [100], 16, temperature=1.0, top_p=0.9, seed=7).values()
        drawn.append([token for _, token in tokens])
    return drawn[0] == drawn[1]


def mixed(engine: Any, rng: np.random.Generator) -> bool:
    lengths = [3, 700, 64, 1500]
    return all(len(tokens) == 12 for tokens in tokens_of(engine, rng, lengths, 12, temperature=0.7).values())


@contextlib.contextmanager
def hidden_ptxas(hide: bool) -> Iterator[list[str]]:
    """Renames every ptxas that XLA could find, and names it back."""
    found: list[Path] = []
    if hide:
        folders = [*os.environ.get("PATH", "").split(os.pathsep), *map(str, Path("/usr/local").glob("cuda*/bin"))]
        found = [Path(folder) / "ptxas" for folder in dict.fromkeys(folders)]
        for root in sys.path:
            found += Path(root).glob("nvidia/**/ptxas")
            found += Path(root).glob("triton/**/ptxas*")
    hidden = []
    try:
        for path in dict.fromkeys(path.resolve() for path in found if path.is_file()):
            path.rename(path.with_name(path.name + ".hidden"))
            hidden.append(path)
        yield [str(path) for path in hidden]
    finally:
        for path in hidden:
            path.with_name(path.name + ".hidden").rename(path)


def child(kind: str, mode: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--child", kind, mode]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    last = ""
    for line in process.stdout or ():
        print(last, end="", flush=True)
        last = line
    if process.wait():
        print(last)
        raise SystemExit(f"{kind} {mode} failed with status {process.returncode}")
    return json.loads(last) | {f"{kind}_process_seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", default=["XL", "S"])
    parser.add_argument("--work", type=Path, default=Path("stores"), help="where stores are compiled to")
    parser.add_argument("--stores", type=Path, help="run these instead of compiling")
    parser.add_argument("--target", help="compile for this target, which need not be here")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--hide-ptxas", action="store_true")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--long", type=int, nargs="*", default=[])
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--small", action="store_true", help="a small model, to check this script")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        kind, mode = arguments.child
        store = (arguments.stores or arguments.work) / mode
        print(json.dumps(compile_child(arguments, mode) if kind == "compile" else run_child(arguments, mode, store)))
        return
    modes: dict[str, Any] = {mode: {} for mode in arguments.modes}
    if arguments.stores is None:
        for mode in modes:
            modes[mode] |= child("compile", mode)
            print(mode, json.dumps(modes[mode]), flush=True)
    if arguments.compile_only:
        return
    rows = []
    with hidden_ptxas(arguments.hide_ptxas) as hidden:
        for mode in modes:
            modes[mode] |= child("run", mode)
            rows += modes[mode].pop("rows")
            print(mode, json.dumps(modes[mode]), flush=True)
    from environment import report

    facts = {
        "bench": "steps",
        "layers": arguments.layers,
        "compiled": "elsewhere" if arguments.stores else "here",
        "hidden_ptxas": len(hidden),
        "modes": modes,
    }
    head = ("mode", "what", "batch", "context", "step_ms", "tok_s", "first_token_ms")
    rows = [{name: row[name] for name in head} | {k: row.get(k, "") for k in ("read_tb_s", "top_s")} for row in rows]
    report(rows, facts, arguments.out)


if __name__ == "__main__":
    main()
