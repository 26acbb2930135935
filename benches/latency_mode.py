"""The two processes of one mode of `latency.py`: one compiles, the other runs where nothing may be traced."""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from latency_rows import ANCHOR, READ_LIMIT_TB_S, SAMPLED, Cell, Clock, Sizes, cells_of, row_of

from aot_cache.guard import CompileCounter, forbid_compilation

REPLAYS = 100
SMALL_CELLS = ("1x64", "4x64", "4x256")
ROW_LINE, ANCHOR_LINE, DONE_LINE = "ROW ", "ANCHOR ", "DONE "
"""How lines for the parent begin; the rest of each is JSON."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a mode's processes agree on."""

    config: Any
    plan: Any
    step: Any
    cells: list[Cell]
    ahead: dict[Cell, int]
    skipped: list[str]
    folder: Path

    @property
    def identity(self) -> dict[str, Any]:
        from unit_stores import identity_of

        return identity_of(self.config, self.plan, self.step)


def anchor_of(arguments: argparse.Namespace) -> Cell:
    return Cell.parse(SMALL_CELLS[0]) if arguments.small else ANCHOR


def wanted(arguments: argparse.Namespace, mode: str) -> list[Cell]:
    if not arguments.small:
        return cells_of(mode, arguments.batches, arguments.contexts, arguments.cells)
    return [Cell.parse(text) for text in dict.fromkeys((SMALL_CELLS[0], *(arguments.cells or SMALL_CELLS)))]


def kv_token_bytes(config: Any, kv: str) -> int:
    """Keys and values of one token: bf16, or int8 with a float32 scale for each head."""
    head = 2 * config.head_dim if kv == "full" else config.head_dim + 4
    return 2 * config.num_layers * config.num_kv_heads * head


def prepare(arguments: argparse.Namespace, mode: str) -> Setup:
    """Sizes and buckets of a mode: the pool holds every cell of the mode's whole table that fits on the device, so that
    commands with other cells use the same executables."""
    import jax
    from batch_run import dry_run, slots_of
    from random_model import MISTRAL_SMALL, SMALL

    from elastic_jax.executables import default_step_config
    from elastic_jax.memory import available_memory
    from elastic_jax.plan import provisional_plans
    from elastic_jax.weights import abstract_weights

    device = jax.devices()[0]
    config = SMALL if arguments.small else dataclasses.replace(MISTRAL_SMALL, num_layers=arguments.layers)
    plan = provisional_plans(config)[mode]
    step = default_step_config(config, device.platform, "bfloat16", kv_slots=1 << 20, max_context=8192, kv=arguments.kv)
    cells = wanted(arguments, mode)
    table = cells if arguments.small else cells_of("S", None, None, None) + cells
    known = {cell: dry_run(config, step, cell) for cell in dict.fromkeys(table)}
    slots = {cell: slots_of(cell, arguments.tokens, known[cell][1], step.page_size) for cell in known}
    most = arguments.kv_slots
    if most is None:
        leaves = jax.tree.leaves(abstract_weights(config, plan, "bfloat16"))
        weights = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        available = available_memory(device)
        left = None if available is None else available - weights - arguments.spare_gib * 2**30
        most = max(slots.values()) if left is None else int(left) // kv_token_bytes(config, arguments.kv)
    fitting = [slots[cell] for cell in known if slots[cell] <= most]
    if not fitting:
        raise SystemExit(f"mode {mode}: no cell fits into {most} KV slots beside the weights")
    skipped = [f"{mode} {cell}: {slots[cell]} KV slots, {most} fit" for cell in cells if slots[cell] > most]
    cells = [cell for cell in cells if slots[cell] <= most]
    step = dataclasses.replace(step, kv_slots=max(fitting), max_context=min(131072, max(fitting)))
    if arguments.few_buckets:
        buckets = {bucket for cell in cells for bucket in known[cell][0]}
        buckets |= {bucket for bucket in step.buckets if bucket.generated == step.rows and not bucket.prompt}
        step = dataclasses.replace(step, buckets=tuple(bucket for bucket in step.buckets if bucket in buckets))
    ahead = {cell: known[cell][1] for cell in cells}
    return Setup(config, plan, step, cells, ahead, skipped, arguments.work / folder_name(mode, step))


def folder_name(mode: str, step: Any) -> str:
    """Of a mode's executables; with another KV cache they are others."""
    return f"{mode}-{step.kv_slots}" + ("" if step.kv == "full" else f".kv-{step.kv}")


def tell(kind: str, value: Any) -> None:
    print(kind + json.dumps(value), flush=True)


def compile_child(arguments: argparse.Namespace, mode: str) -> None:
    """Compiles what is missing, and measures the device's reading limit where none is known."""
    import jax
    from limits import read_limit
    from unit_stores import compile_missing

    from elastic_jax.executables import default_compiler_options

    device, setup = jax.devices()[0], prepare(arguments, mode)
    start, compiled = time.perf_counter(), 0

    def progress(name: str, seconds: float | None, done: int, total: int) -> None:
        nonlocal compiled
        if seconds is not None:
            compiled += 1
            print(f"{mode} {done}/{total} {name} {seconds:.1f} s", flush=True)

    units = needed_units(arguments, setup)
    options = default_compiler_options(device.platform)
    records = compile_missing(
        units, setup.folder, setup.identity, device, workers=arguments.workers, options=options, progress=progress
    )
    model = {name: record for name, record in records.items() if not name.startswith("draw")}
    limit = arguments.read_limit or READ_LIMIT_TB_S.get(device.device_kind) or read_limit(device) / 1e12
    tell(
        DONE_LINE,
        {
            "units": len(model),
            "bytes": sum(record.size for record in model.values()),
            "compile_unit_seconds": sum(record.compile_seconds for record in model.values()),
            "compiled_now": compiled,
            "compile_wall_seconds": time.perf_counter() - start,
            "limit_tb_s": limit,
        },
    )


def needed_units(arguments: argparse.Namespace, setup: Setup) -> list[Any]:
    """Of the model and of the weights; with --few-buckets only those that this generation takes."""
    from random_model import draw_units

    from elastic_jax.units import make_units

    units = make_units(setup.config, setup.plan, setup.step)
    if arguments.few_buckets:
        variant = "sampling" if arguments.sampling else "greedy"
        units = [unit for unit in units if unit.name.endswith((variant, "admit", "start"))]
    return units + draw_units(setup.config, setup.plan, setup.step.dtype)


def run_child(arguments: argparse.Namespace, mode: str) -> None:
    """Runs a mode's cells where nothing may be traced; a line for each row."""
    counter = CompileCounter()
    forbid_compilation()
    import jax
    from batch_run import GREEDY, RecordingRunner, run_batch
    from random_model import random_weights
    from unit_stores import load_units

    from elastic_jax.engine import Engine
    from elastic_jax.groups import LM_HEAD, model_groups
    from elastic_jax.requests import SamplingParams
    from elastic_jax.weights import weight_bytes

    device, setup = jax.devices()[0], prepare(arguments, mode)
    config, step = setup.config, setup.step
    names = [unit.name for unit in needed_units(arguments, setup)]
    start = time.perf_counter()
    units = load_units(names, setup.folder, setup.identity, device, workers=arguments.workers)
    load_seconds = time.perf_counter() - start
    weights = random_weights(config, setup.plan, step.dtype, units, seed=0)
    model = {name: unit for name, unit in units.items() if not name.startswith("draw")}
    runner = RecordingRunner(config, step, model, weights, device)
    engine = Engine(runner, step.max_context)
    rng = np.random.default_rng(arguments.seed)
    start = time.perf_counter()
    runner.remember(1)
    sampling = SamplingParams(**SAMPLED) if arguments.sampling else GREEDY
    run_batch(engine, rng, setup.cells[0], 2, setup.ahead[setup.cells[0]], sampling)
    first_steps = time.perf_counter() - start
    sizes = Sizes(
        weight_bytes({name: leaf for name, leaf in weights.items() if name != "embedding"}),
        kv_token_bytes(config, arguments.kv),
        sum(group.out_size * group.in_size for name, group in model_groups(config).items() if name != LM_HEAD),
        arguments.read_limit,
    )
    clock, times = Clock(arguments.deadline), arguments.warm_ups + arguments.repeats

    def measure(cell: Cell) -> dict[str, Any]:
        runs = []
        for _ in range(times):
            runner.remember(arguments.tokens // 2)
            runs.append(run_batch(engine, rng, cell, arguments.tokens, setup.ahead[cell], sampling)[0])
        runs = runs[arguments.warm_ups :]
        row = row_of(mode, cell, runs, sizes)
        row["replay_ms"] = runner.replay(REPLAYS) * 1e3
        row["busy_fraction"] = min(1.0, row["replay_ms"] * row["decode_tok_s_per_seq"] / 1e3)
        row["peak_gib"] = peak_bytes(device) / 2**30
        row["compile_events"] = counter.count()
        # bf16 throughout is the original model: no search could find another plan for it.
        row["provisional"] = setup.plan.provisional and set(setup.plan.choices.values()) != {"bf16"}
        clock.learn(cell, runs)
        return row

    anchor = setup.cells[0]
    for number, cell in enumerate(setup.cells):
        # The last anchor is part of every command, so its time is kept free.
        if number and not clock.allows(
            time.time() + clock.seconds(anchor, arguments.tokens, times), cell, arguments.tokens, times
        ):
            setup.skipped.append(f"{mode} {cell}: --minutes would not have sufficed")
            continue
        row = measure(cell)
        tell(ROW_LINE, row)
        if number == 0:
            tell(ANCHOR_LINE, row["decode_tok_s_per_seq"])
    if len(setup.cells) > 1:
        tell(ANCHOR_LINE, measure(anchor)["decode_tok_s_per_seq"])
    tell(
        DONE_LINE,
        {
            "load_seconds": load_seconds,
            "first_steps_seconds": first_steps,
            "weight_bytes": weight_bytes(weights),
            "kv_slots": step.kv_slots,
            "max_context": step.max_context,
            "attention": step.attention,
            "dot": step.dot,
            "compile_events": counter.count(),
            "skipped": setup.skipped,
        },
    )


def peak_bytes(device: Any) -> int:
    """Most memory taken so far: of the device, or of the process where the device is the host's processor."""
    statistics = device.memory_stats()
    if statistics:
        return statistics["peak_bytes_in_use"]
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
