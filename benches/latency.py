"""Latency and throughput of Mistral-Small-3.1-24B's shape with random weights, through the real engine.

Method. For each mode one process compiles the units that are missing (all that `elastic-jax compile` would, or with
--few-buckets only those that the cells take), several at once. A fresh process then forbids tracing, loads them, draws
random weights by executables of their own, and runs batches of random prompts through the engine, other prompts every
time: 2 warm-ups and 3 repeats of 100 new tokens. JAX's compile events are counted from the process's first line on and
must be zero. `latency_rows.py` gives the formulas of all columns.

One table may be made by several commands: rows are merged into --out after every cell, and each command measures the
anchor 1 x 256 first and last in each mode. Status 1 if any two anchors of a mode differ by more than 2 %. Nothing new
is begun when --minutes would not suffice. Cells whose keys and values do not fit are skipped, and named in the result.

    python benches/latency.py --modes S --few-buckets --out benches/results/<device>/latency.json
    python benches/latency.py --modes XL --batches 1 8 --contexts 256 1024 --few-buckets --out ...
    python benches/latency.py --small --out /tmp/latency.json     # a tiny model on a CPU, to check this script
"""

import argparse
import dataclasses
import datetime
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from latency_rows import (
    ANCHOR,
    COLUMNS,
    READ_LIMIT_TB_S,
    Cell,
    Clock,
    Sizes,
    cells_of,
    merged,
    read_result,
    row_of,
    write_result,
)

from aot_cache.guard import CompileCounter, forbid_compilation

REPOSITORY = Path(__file__).resolve().parent.parent
REPLAYS = 100
SMALL_CELLS = ("1x64", "4x64", "4x256")
_ROW, _ANCHOR, _DONE = "ROW ", "ANCHOR ", "DONE "
"""How a child's lines begin; the rest of each is JSON."""


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


def kv_token_bytes(config: Any) -> int:
    """Keys and values of one token in bf16."""
    return 4 * config.num_layers * config.kv_size


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
    step = default_step_config(config, device.platform, "bfloat16", kv_slots=1 << 20, max_context=8192)
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
        most = max(slots.values()) if left is None else int(left) // kv_token_bytes(config)
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
    return Setup(config, plan, step, cells, ahead, skipped, arguments.work / f"{mode}-{step.kv_slots}")


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
        _DONE,
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
    """Of the model and of the weights; with --few-buckets only those that greedy generation takes."""
    from random_model import draw_units

    from elastic_jax.units import make_units

    units = make_units(setup.config, setup.plan, setup.step)
    if arguments.few_buckets:
        units = [unit for unit in units if unit.name.endswith(("greedy", "admit", "start"))]
    return units + draw_units(setup.config, setup.plan, setup.step.dtype)


def run_child(arguments: argparse.Namespace, mode: str) -> None:
    """Runs a mode's cells where nothing may be traced; a line for each row."""
    counter = CompileCounter()
    forbid_compilation()
    import jax
    from batch_run import RecordingRunner, run_batch
    from random_model import random_weights
    from unit_stores import load_units

    from elastic_jax.engine import Engine
    from elastic_jax.groups import LM_HEAD, model_groups
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
    run_batch(engine, rng, setup.cells[0], 2, setup.ahead[setup.cells[0]])
    first_steps = time.perf_counter() - start
    sizes = Sizes(
        weight_bytes({name: leaf for name, leaf in weights.items() if name != "embedding"}),
        kv_token_bytes(config),
        sum(group.out_size * group.in_size for name, group in model_groups(config).items() if name != LM_HEAD),
        arguments.read_limit,
    )
    clock, times = Clock(arguments.deadline), arguments.warm_ups + arguments.repeats

    def measure(cell: Cell) -> dict[str, Any]:
        runs = []
        for _ in range(times):
            runner.remember(arguments.tokens // 2)
            runs.append(run_batch(engine, rng, cell, arguments.tokens, setup.ahead[cell])[0])
        runs = runs[arguments.warm_ups :]
        row = row_of(mode, cell, runs, sizes)
        row["replay_ms"] = runner.replay(REPLAYS) * 1e3
        row["busy_fraction"] = min(1.0, row["replay_ms"] * row["decode_tok_s_per_seq"] / 1e3)
        row["peak_gib"] = peak_bytes(device) / 2**30
        row["compile_events"] = counter.count()
        row["provisional"] = setup.plan.provisional
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
        tell(_ROW, row)
        if number == 0:
            tell(_ANCHOR, row["decode_tok_s_per_seq"])
    if len(setup.cells) > 1:
        tell(_ANCHOR, measure(anchor)["decode_tok_s_per_seq"])
    tell(
        _DONE,
        {
            "load_seconds": load_seconds,
            "first_steps_seconds": first_steps,
            "weight_bytes": weight_bytes(weights),
            "kv_slots": step.kv_slots,
            "max_context": step.max_context,
            "attention": step.attention,
            "integer_dot": step.integer_dot,
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


# -- the command -------------------------------------------------------------------------------------------------------


def child(kind: str, mode: str, more: list[str], take: Any) -> dict[str, Any]:
    """Runs a process of a mode; `take` gets its rows and anchors as they come."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        # By default JAX takes three quarters of a GPU, which XL with a large pool does not fit into.
        "XLA_PYTHON_CLIENT_MEM_FRACTION": os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92"),
    }
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], *more, "--child", kind, mode]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    done = None
    for line in process.stdout or ():
        if line.startswith((_ROW, _ANCHOR)):
            name, value = line.split(" ", 1)
            take(name + " ", json.loads(value))
        elif line.startswith(_DONE):
            done = json.loads(line.removeprefix(_DONE))
        else:
            print(line, end="", flush=True)
    if process.wait() or done is None:
        raise SystemExit(f"{kind} {mode} ended with status {process.returncode}")
    return done


def show(row: dict[str, Any]) -> str:
    values = [row[name] for name in COLUMNS]
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in zip(COLUMNS, values, strict=True)
    )


def environment_of_child() -> dict[str, Any]:
    """In a process of its own: this one must not take the device's memory."""
    code = "import json; from environment import environment; print(json.dumps(environment()))"
    path = os.pathsep.join([str(Path(__file__).parent), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    small = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    output = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | small | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return json.loads(output.splitlines()[-1])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", default=["S", "XL", "L", "M"], choices=["S", "M", "L", "XL"])
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--contexts", nargs="+", type=int)
    parser.add_argument("--cells", nargs="+", help="instead of --batches and --contexts, as 16x1024")
    parser.add_argument("--few-buckets", action="store_true", help="compile only what the cells take")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--tokens", type=int, default=100, help="new tokens")
    parser.add_argument("--warm-ups", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing that would end later")
    parser.add_argument("--work", type=Path, default=Path(".cache/latency"), help="where executables are kept")
    parser.add_argument("--kv-slots", type=int, help="of the pool at most; by default what fits")
    parser.add_argument("--spare-gib", type=float, default=4, help="memory for the steps' workspace")
    parser.add_argument("--read-limit", type=float, help="TB/s; by default the H200's, or measured")
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--seed", type=int, help="of prompts; drawn by default")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--small", action="store_true", help="a tiny model on any device, to check this script")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--deadline", type=float, default=float("inf"), help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.child:
        kind, mode = arguments.child
        (compile_child if kind == "compile" else run_child)(arguments, mode)
        return
    deadline = time.time() + 60 * arguments.minutes
    environment = environment_of_child()
    name = "a tiny model" if arguments.small else "Mistral-Small-3.1-24B's shape"
    name += "" if arguments.layers == 40 else f", {arguments.layers} layers"
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    run: dict[str, Any] = {
        "id": f"{now} {environment['commit'][:12]}",
        "command": shlex.join(["benches/latency.py", *sys.argv[1:]]),
        "model": name,
        "environment": environment,
        "warm_ups": arguments.warm_ups,
        "repeats": arguments.repeats,
        "anchors": {},
        "modes": {},
        "skipped": [],
        "limit_tb_s": None,
    }
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {}

    def save() -> None:
        nonlocal result
        before = read_result(arguments.out) if arguments.out else None
        result = merged(before, environment, run, rows)
        if arguments.out:
            write_result(arguments.out, result)

    for mode in arguments.modes:
        if time.time() >= deadline:
            run["skipped"].append(f"{mode}: --minutes did not suffice")
            continue
        facts = child("compile", mode, [], lambda *_: None)
        run["modes"][mode], run["limit_tb_s"] = facts, facts["limit_tb_s"]
        if arguments.compile_only:
            continue

        def take(kind: str, value: Any, mode: str = mode) -> None:
            if kind == _ANCHOR:
                run["anchors"].setdefault(mode, []).append(value)
            else:
                rows.append(value)
                print(show(value), flush=True)
            save()

        more = ["--deadline", str(deadline), "--read-limit", str(facts["limit_tb_s"])]
        run["modes"][mode] |= child("run", mode, more, take)
        run["skipped"] += run["modes"][mode].pop("skipped")
        save()
    for line in run["skipped"]:
        print("skipped", line)
    if not rows:
        return
    print(json.dumps(result))
    apart = {mode: found for mode, found in result["anchors"].items() if not found["within_2_percent"]}
    for mode, found in apart.items():
        print(f"mode {mode}: anchors {anchor_of(arguments)} are {100 * found['spread']:.1f} % apart: {found['tok_s']}")
    sys.exit(1 if apart else 0)


if __name__ == "__main__":
    main()
