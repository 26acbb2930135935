"""Latency and throughput of Mistral-Small-3.1-24B's shape with random weights, through the real engine.

Method. For each mode one process compiles the units that are missing (all that `elastic-jax compile` would, or with
--few-buckets only those that the cells take), several at once. A fresh process then forbids tracing, loads them, draws
random weights by executables of their own, and runs batches of random prompts through the engine, other prompts every
time: 2 warm-ups and 3 repeats of 100 new tokens. JAX's compile events are counted from the process's first line on and
must be zero. `latency_rows.py` gives the formulas of all columns.

One table may be made by several commands: rows are merged into --out after every cell, and each command measures the
anchor 1 x 256 first and last in each mode. Status 1 if any two anchors of a mode differ by more than 2 %. Nothing new
is begun when --minutes would not suffice. Cells whose keys and values do not fit are skipped, and named in the result.

With --kv int8 the KV cache is int8; with --sampling every row samples with temperature, top-k, top-p and penalties
(`latency_rows.SAMPLED`). Their rows go into files of their own: one of others is refused before anything runs.

    python benches/latency.py --modes S --few-buckets --out benches/results/<device>/latency.json
    python benches/latency.py --modes XL --batches 1 8 --contexts 256 1024 --few-buckets --out ...
    python benches/latency.py --kv int8 --out benches/results/<device>/latency-kv-int8.json ...
    python benches/latency.py --sampling --out benches/results/<device>/latency-sampling.json ...
    python benches/latency.py --small --out FILE     # a tiny model on a CPU, to check this script
"""

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latency_mode import ANCHOR_LINE, DONE_LINE, ROW_LINE, anchor_of, compile_child, run_child
from latency_rows import COLUMNS, SAMPLED, ResultError, merged, read_result, write_result

REPOSITORY = Path(__file__).resolve().parent.parent


def child(kind: str, mode: str, more: list[str], take: Callable[[str, Any], None]) -> dict[str, Any]:
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
        if line.startswith((ROW_LINE, ANCHOR_LINE)):
            name, value = line.split(" ", 1)
            take(name + " ", json.loads(value))
        elif line.startswith(DONE_LINE):
            done = json.loads(line.removeprefix(DONE_LINE))
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
    parser.add_argument("--kv", choices=["full", "int8"], default="full", help="precision of the KV cache")
    parser.add_argument("--sampling", action="store_true", help="every row samples, and has penalties")
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
        "kv": arguments.kv,
        "sampling": SAMPLED if arguments.sampling else "greedy",
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

    if arguments.out and (before := read_result(arguments.out)) is not None:
        try:
            merged(before, environment, run, [])  # before anything is measured
        except ResultError as error:
            sys.exit(f"{arguments.out}: {error}")
    for mode in arguments.modes:
        if time.time() >= deadline:
            run["skipped"].append(f"{mode}: --minutes did not suffice")
            continue
        # One limit for all modes of a command, so that rows can be compared.
        limit = [] if run["limit_tb_s"] is None else ["--read-limit", str(run["limit_tb_s"])]
        facts = child("compile", mode, limit, lambda *_: None)
        run["modes"][mode], run["limit_tb_s"] = facts, facts["limit_tb_s"]
        if arguments.compile_only:
            continue

        def take(kind: str, value: Any, mode: str = mode) -> None:
            if kind == ANCHOR_LINE:
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
    print(json.dumps({"environment": environment, "anchors": result["anchors"], "rows": rows}))
    apart = {mode: found for mode, found in result["anchors"].items() if not found["within_2_percent"]}
    for mode, found in apart.items():
        print(f"mode {mode}: anchors {anchor_of(arguments)} are {100 * found['spread']:.1f} % apart: {found['tok_s']}")
    sys.exit(1 if apart else 0)


if __name__ == "__main__":
    main()
