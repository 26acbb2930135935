"""Steps by themselves, without an engine: fused decode checked and timed, prompts timed.

Method. Mistral-Small-3.1-24B's shape with random weights, on an NVIDIA GPU. The check runs the same step with
--check-layers layers fused and composed, and compares logits and written keys and values (norm of the difference over
the norm). Decode: the greedy step of D rows is dispatched --steps times, each with the state of the one before, and the
clock stops when the last is done. `read_tb_s` counts weights (without the embedding) and live keys and values once a
step; `limit_tb_s` is the reading limit measured in this run (`limits.py`). Prompts run --prompt-layers layers.

    python benches/decode.py --modes S XL --tokens 1 8 16 --out benches/results/<device>/decode.json
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from environment import report
from limits import read_limit
from random_model import MISTRAL_SMALL, draw_units, jitted, random_weights

from aot_cache.unit import Unit
from elastic_jax.executables import default_step_config
from elastic_jax.groups import model_groups
from elastic_jax.plan import Plan, provisional_plans
from elastic_jax.step import Bucket, StepConfig
from elastic_jax.units import build_model, make_units, step_name
from elastic_jax.weights import flatten, weight_bytes

PAGE = 64


def step_config(config: Any, tokens: int, context: int, decode: str) -> StepConfig:
    slots = -(-(context + 256) // PAGE) * PAGE * tokens
    step = default_step_config(config, "gpu", "bfloat16", kv_slots=slots, max_context=slots // tokens)
    if decode == "xla":  # of which nothing rounds softmax's weights, as the fused step does not
        step = dataclasses.replace(step, attention="xla")
    return dataclasses.replace(
        step, rows=tokens, buckets=(Bucket(tokens, 0), Bucket(0, 64)), decode=decode, max_context=slots // tokens
    )


def make_step(
    config: Any, mode: str, tokens: int, context: int, decode: str, *, variant: str, chooser: str, kv: str
) -> tuple[StepConfig, Unit]:
    """A decode step of so many rows, and the unit that runs it; `variant` is `greedy` or `sampling`."""
    step = dataclasses.replace(step_config(config, tokens, context, decode), sampling=chooser, kv=kv)
    units = make_units(config, provisional_plans(config)[mode], step)
    name = step_name(Bucket(tokens, 0), variant)
    return step, next(unit for unit in units if unit.name == name)


class Step:
    """One step with everything it takes.

    Attributes:
        sampling: of the variant `sampling`, how rows sample: flat `SamplingInputs`; empty of the variant `greedy`.
        executables: compiled units by name; without them the step is compiled here.
    """

    def __init__(
        self,
        config: Any,
        mode: str,
        tokens: int,
        context: int,
        decode: str,
        weights: Any,
        sampling: tuple[Any, ...] = (),
        chooser: str = "cuda",
        kv: str = "full",
        executables: Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:
        variant = "sampling" if sampling else "greedy"
        self.step, unit = make_step(config, mode, tokens, context, decode, variant=variant, chooser=chooser, kv=kv)
        leaves, _, _ = flatten(build_model(config, weights, self.step))
        self.weights = leaves
        self.tokens = tokens
        self.outputs = len(unit.donate)
        start = time.perf_counter()
        if executables is None:
            self.call = jax.jit(unit.function, donate_argnums=unit.donate).lower(*unit.arguments).compile()
        else:
            self.call = executables[unit.name]
        self.compile_seconds = time.perf_counter() - start
        pages = self.step.pages
        row = np.arange(tokens, dtype=np.int32)
        table = (row[:, None] * pages + np.arange(pages, dtype=np.int32)[None, :]).astype(np.int32)
        slot = (table[:, context // PAGE] * PAGE + context % PAGE).astype(np.int32)
        none = np.zeros(0, np.int32)
        inputs = (none, none, row, slot, table, np.full(tokens, context + 1, np.int32), row)
        self.inputs = [jax.device_put(x) for x in (*inputs, *sampling)]
        self.slot = slot
        self.shapes = [unit.arguments[i] for i in unit.donate]
        self.context = context

    def state(self, seed: int) -> list[Any]:
        """Caches of random numbers, and rows that stand at the context's end."""
        keys = iter(jax.random.split(jax.random.key(seed), len(self.shapes)))
        draw = jax.jit(_cache, static_argnums=1)
        state = []
        for shape in self.shapes:
            key = next(keys)
            cache = len(shape.shape) >= 3
            state.append(draw(key, shape) if cache else jnp.zeros(shape.shape, shape.dtype))
        rows = [i for i, shape in enumerate(self.shapes) if len(shape.shape) == 1]
        state[rows[0]] = jnp.arange(5, 5 + self.tokens, dtype=jnp.int32)
        state[rows[1]] = jnp.full(self.tokens, self.context, jnp.int32)
        return state

    def run(self, state: list[Any]) -> tuple[list[Any], Any]:
        found = self.call(*self.weights, *state, *self.inputs)
        return list(found[: self.outputs]), found[self.outputs :]

    def seconds(self, steps: int, repeats: int) -> list[float]:
        state = self.state(1)
        for _ in range(5):
            state, out = self.run(state)
        jax.block_until_ready(out)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            for _ in range(steps):
                state, out = self.run(state)
            jax.block_until_ready(out)
            times.append((time.perf_counter() - start) / steps)
        return times


def _cache(key: Any, shape: Any) -> Any:
    """Numbers of a deviation of one; in int8, numbers of 40 and their scales."""
    if shape.dtype == jnp.int8:
        return jnp.clip(40 * jax.random.normal(key, shape.shape, jnp.bfloat16), -127, 127).astype(jnp.int8)
    if shape.dtype == jnp.float32:
        return jnp.full(shape.shape, 1 / 40, jnp.float32)
    return jax.random.normal(key, shape.shape, shape.dtype)


class PromptStep:
    """One compiled greedy step of P prompt tokens of one sequence, with everything it takes."""

    def __init__(self, config: Any, plan: Plan, tokens: int, weights: Any) -> None:
        step = default_step_config(config, "gpu", "bfloat16", kv_slots=tokens + PAGE, max_context=tokens + PAGE)
        bucket = Bucket(0, tokens)
        step = dataclasses.replace(step, rows=1, buckets=(Bucket(1, 0), bucket))
        unit = {unit.name: unit for unit in make_units(config, plan, step)}[step_name(bucket, "greedy")]
        self.weights, _, _ = flatten(build_model(config, weights, step))
        self.donated = [unit.arguments[i] for i in unit.donate]
        self.call = jax.jit(unit.function, donate_argnums=unit.donate).lower(*unit.arguments).compile()
        place = np.arange(tokens, dtype=np.int32)
        token = np.random.default_rng(0).integers(3, config.vocab_size, tokens).astype(np.int32)
        table = np.arange(step.pages, dtype=np.int32)[None, :]
        inputs = (token, place, 0 * place, place, table, np.array([tokens], np.int32), np.array([tokens - 1], np.int32))
        self.inputs = [jax.device_put(x) for x in inputs]

    def seconds(self, repeats: int) -> list[float]:
        state = [jnp.zeros(shape.shape, shape.dtype) for shape in self.donated]
        times = []
        for _ in range(repeats + 2):
            start = time.perf_counter()
            found = jax.block_until_ready(self.call(*self.weights, *state, *self.inputs))
            times.append(time.perf_counter() - start)
            state = list(found[: len(state)])
        return times[2:]


def measure_prompt(config: Any, mode: str, weights: Any, tokens: int, blocked: bool) -> dict[str, Any]:
    plan = provisional_plans(config)[mode]
    if blocked:
        choices = {name: "w8a8b" if choice == "w8a8" else choice for name, choice in plan.choices.items()}
        plan = dataclasses.replace(plan, choices=choices)
        weights = {
            name: dataclasses.replace(leaf, prompt_activations="a8b") if choices.get(name) == "w8a8b" else leaf
            for name, leaf in weights.items()
        }
    seconds = float(np.median(PromptStep(config, plan, tokens, weights).seconds(7)))
    linear = sum(g.out_size * g.in_size for name, g in model_groups(config).items() if name != "lm_head")
    return {
        "mode": mode,
        "w8a8b": blocked,
        "prompt": tokens,
        "step_ms": seconds * 1e3,
        "top_s": 2 * linear * tokens / seconds / 1e12,
    }


def relative(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def check(mode: str, tokens: int, layers: int, context: int, kv: str) -> dict[str, Any]:
    config = dataclasses.replace(MISTRAL_SMALL, num_layers=layers)
    weights = draw(config, mode)
    results = {}
    for decode in ("cuda", "xla"):
        step = Step(config, mode, tokens, context, decode, weights, kv=kv)
        state, out = step.run(step.state(0))
        logits = max(out, key=lambda a: a.size)
        caches = [np.asarray(kv[step.slot], np.float32) for kv in state if kv.ndim == 4]
        results[decode] = np.asarray(logits), caches
    logits, caches = results["cuda"]
    expected, expected_caches = results["xla"]
    return {
        "mode": mode,
        "tokens": tokens,
        "context": context,
        "layers": layers,
        "logits": relative(logits, expected),
        "kv": max(relative(a, b) for a, b in zip(caches, expected_caches, strict=True)),
        "argmax_equal": bool((logits.argmax(1) == expected.argmax(1)).all()),
    }


def draw(config: Any, mode: str) -> Any:
    plan = provisional_plans(config)[mode]
    device = jax.devices()[0]
    units = draw_units(config, plan, "bfloat16")
    return random_weights(config, plan, "bfloat16", jitted(units, device), seed=0)


def measure(
    config: Any, mode: str, weights: Any, tokens: int, context: int, decode: str, steps: int, kv: str
) -> dict[str, Any]:
    step = Step(config, mode, tokens, context, decode, weights, kv=kv)
    times = step.seconds(steps, 3)
    read = weight_bytes({name: leaf for name, leaf in weights.items() if name != "embedding"})
    head = 2 * config.head_dim if kv == "full" else config.head_dim + 4
    live = tokens * (context + 1) * config.num_layers * 2 * config.num_kv_heads * head
    seconds = float(np.median(times))
    return {
        "mode": mode,
        "decode": decode,
        "kv": kv,
        "batch": tokens,
        "context": context,
        "step_ms": seconds * 1e3,
        "tok_s_per_seq": 1 / seconds,
        "read_tb_s": (read + live) / seconds / 1e12,
        "spread": (max(times) - min(times)) / seconds,
        "compile_seconds": step.compile_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", default=["S", "XL"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument("--contexts", nargs="+", type=int, default=[256, 4096])
    parser.add_argument("--prompts", nargs="*", type=int, default=[4096])
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--check-layers", type=int, default=2)
    parser.add_argument("--check-contexts", nargs="*", type=int, default=[77, 1000])
    parser.add_argument("--prompt-layers", type=int, default=40)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--kv", choices=["full", "int8"], default="full", help="precision of the KV cache")
    parser.add_argument("--composed", action="store_true", help="time the composed step too")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    limit = read_limit(jax.devices()[0]) / 1e12
    print(f"reading limit {limit:.2f} TB/s", flush=True)
    checks = []
    for mode in arguments.modes:
        for tokens in arguments.tokens:
            for context in arguments.check_contexts:
                checks.append(check(mode, tokens, arguments.check_layers, context, arguments.kv))
                print(json.dumps(checks[-1]), flush=True)
    rows, prompts = [], []
    config = dataclasses.replace(MISTRAL_SMALL, num_layers=arguments.layers)
    for mode in arguments.modes:
        if arguments.prompts:
            short = dataclasses.replace(config, num_layers=arguments.prompt_layers)
            weights = draw(short, mode)
            for tokens in arguments.prompts:
                for blocked in (False, True) if mode == "S" else (False,):
                    prompts.append(measure_prompt(short, mode, weights, tokens, blocked))
                    print(json.dumps(prompts[-1]), flush=True)
        weights = draw(config, mode)
        for tokens in arguments.tokens:
            for context in arguments.contexts:
                for decode in ("cuda", "xla") if arguments.composed else ("cuda",):
                    rows.append(measure(config, mode, weights, tokens, context, decode, arguments.steps, arguments.kv))
                    rows[-1]["fraction_of_limit"] = rows[-1]["read_tb_s"] / limit
                    print(json.dumps(rows[-1]), flush=True)
        del weights
    facts = {"bench": "decode", "limit_tb_s": limit, "checks": checks, "prompts": prompts}
    report(rows, facts, arguments.out)


if __name__ == "__main__":
    main()
