"""From the start of a process to its first token, with a random int8-only checkpoint on a given disk.

Method. The checkpoint is written by the code that writes real ones (`random_checkpoint.py`), by default in the shape of
Mistral-Small-3.1-24B. Executables are copied from --executables, or compiled in a process of their own. Then every file
is read once, so that all are in the page cache as far as memory goes; that first read is reported too, and is the
disk's where writing has left nothing cached (what is written leaves the cache: `checkpoint_io.forget_pages`).
Each run is a fresh process, `python -m elastic_jax generate DIR --no-compile --json` for one token of a short prompt.
Seconds are from just before the process is started to its line of output; what precedes the imports (Python, the
command line) and follows the first token is counted. Phases are what the process says of itself; they overlap.
GB/s are bytes of arrays / seconds of the phase `weights` / 1e9.

Another fresh process each time opens every executable of the mode before it begins, as a server does, instead of those
that one token takes: `all_units_s` is until the last is open (weights are read meanwhile), `first_step_s` the first
prompt step after all is loaded.

    uv run python benches/startup.py --folder /some/disk/24b --out benches/results/<device>/startup.json
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from environment import report
from random_checkpoint import random_checkpoint
from random_model import MISTRAL_SMALL

from elastic_jax.checkpoint import Checkpoint
from elastic_jax.checkpoint_format import EXECUTABLES
from elastic_jax.config import ModelConfig

REPOSITORY = Path(__file__).resolve().parent.parent
SECONDS_LIMIT, RATE_LIMIT_GB = 30, 2
PROMPT = "Once upon a time"


def prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Makes the checkpoint, unless it is there; says how long that took."""
    folder = arguments.folder
    if folder.exists():
        return {"seconds": None, "gb": total_gb(Checkpoint.open(folder))}
    config = MISTRAL_SMALL
    if arguments.config is not None:
        config = ModelConfig.from_json(json.loads(arguments.config.read_text()))
    if arguments.layers is not None:
        config = dataclasses.replace(config, num_layers=arguments.layers)
    start = time.perf_counter()
    checkpoint = random_checkpoint(
        folder, config, "int8", arguments.tokenizer, seed=arguments.seed, workers=arguments.workers
    )
    return {"seconds": time.perf_counter() - start, "gb": total_gb(checkpoint)}


def total_gb(checkpoint: Checkpoint) -> float:
    return sum(record.size for record in checkpoint.files().values()) / 1e9


def compile_child(folder: Path, mode: str, workers: int) -> None:
    """The process that compiles two buckets alone."""
    from elastic_jax.device import default_device
    from elastic_jax.executables import ModeStore, default_step_config
    from elastic_jax.memory import available_memory
    from elastic_jax.pools import default_pool
    from elastic_jax.step import Bucket

    checkpoint, device = Checkpoint.open(folder), default_device()
    plan = checkpoint.plan(mode)
    pool = default_pool(
        checkpoint, plan, "bfloat16", device.platform, available=available_memory(device), max_context=None
    )
    step = default_step_config(checkpoint.config, device.platform, "bfloat16", kv_slots=pool, max_context=None)
    step = dataclasses.replace(step, rows=1, buckets=(Bucket(1, 0), Bucket(0, 64)))
    ModeStore(checkpoint, plan, "bfloat16", device).compile(step, workers=workers, progress=lambda *_: None)


def add_executables(arguments: argparse.Namespace) -> str:
    """Puts executables into the checkpoint, and says where they come from."""
    target = arguments.folder / EXECUTABLES
    if arguments.executables is not None:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(arguments.executables, target)
        return "copied"
    if target.exists():
        return "there already"
    if arguments.few_buckets:
        options = ["--workers", str(arguments.workers), "--mode", arguments.mode]
        run([sys.executable, str(Path(__file__).resolve()), "--compile", "--folder", str(arguments.folder), *options])
        return "compiled: (1, 0) and (0, 64) alone"
    run([sys.executable, "-m", "elastic_jax", "compile", str(arguments.folder), "--mode", arguments.mode])
    return "compiled"


def run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=REPOSITORY, env=child_environment(), check=False)
    if done.returncode:
        raise SystemExit(f"{command} ended with status {done.returncode}")


def child_environment() -> dict[str, str]:
    """The repository need not be installed; and a child is started from it, whatever the folder here."""
    path = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{path}" if path else str(REPOSITORY)}


def read_all(folder: Path, workers: int) -> float:
    """Reads every file once; returns GB/s."""
    files = [path for path in folder.rglob("*") if path.is_file()]

    def read(path: Path) -> int:
        buffer, size = bytearray(8 << 20), 0
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                size += count
        return size

    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        size = sum(pool.map(read, files))
    return size / 1e9 / (time.perf_counter() - start)


def first_token(folder: Path, mode: str) -> dict[str, Any]:
    """One run: seconds, and what the process said."""
    command = [sys.executable, "-m", "elastic_jax", "generate", str(folder), "--mode", mode, "--prompt", PROMPT]
    command += ["--max-new-tokens", "1", "--no-compile", "--json"]
    start = time.perf_counter()
    child = subprocess.Popen(command, cwd=REPOSITORY, env=child_environment(), stdout=subprocess.PIPE, text=True)
    output, _ = child.communicate()
    seconds = time.perf_counter() - start
    if child.returncode:
        raise SystemExit(f"{command} ended with status {child.returncode}")
    return {"seconds": seconds, **json.loads(output.splitlines()[-1])}


def all_units(folder: Path, mode: str) -> dict[str, Any]:
    """Runs `all_units_child` in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--all-units", "--folder", str(folder), "--mode", mode]
    child = subprocess.run(
        command, cwd=REPOSITORY, env=child_environment(), stdout=subprocess.PIPE, text=True, check=False
    )
    if child.returncode:
        raise SystemExit(f"{command} ended with status {child.returncode}")
    return json.loads(child.stdout.splitlines()[-1])


def all_units_child(folder: Path, mode: str) -> None:
    """The process that opens everything, then runs the first step."""
    from aot_cache.guard import CompileCounter, forbid_compilation

    counter = CompileCounter()
    forbid_compilation()
    sys.path.pop(0)  # this folder, whose `kernels.py` libraries would take for Hugging Face's package of that name
    from elastic_jax.elastic import ElasticMistral

    model = ElasticMistral.load(folder, mode)
    executables = model.loading.to_json()["executables"]
    start = time.perf_counter()
    model.generate(PROMPT, max_new_tokens=1)
    told = {
        "units": len(model.engine.runner.unit_names),
        "all_units_s": executables["seconds"],
        "first_step_s": time.perf_counter() - start,
        "compile_events": counter.count(),
    }
    print(json.dumps(told))


def row(number: int, run: dict[str, Any], opened: dict[str, Any]) -> dict[str, Any]:
    phases = run["loading"]
    told = run["import_seconds"] + run["load_seconds"] + run["first_token_seconds"]
    return {
        "run": number,
        "process_to_token_s": run["seconds"],
        "python_and_exit_s": run["seconds"] - told,
        "import_s": run["import_seconds"],
        **{f"{name}_s": phases[name]["seconds"] for name in phases if name != "total"},
        "load_s": run["load_seconds"],
        "first_token_s": run["first_token_seconds"],
        "weights_gb_per_s": phases["weights"]["gb_per_second"],
        "units": opened["units"],
        "all_units_s": opened["all_units_s"],
        "first_step_s": opened["first_step_s"],
        "compile_events": run["compile_events"] + opened["compile_events"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="the checkpoint; a new folder, or one of --keep")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there")
    parser.add_argument("--config", type=Path, help="JSON of a ModelConfig; Mistral-Small by default")
    parser.add_argument("--layers", type=int, help="instead of the config's")
    parser.add_argument("--tokenizer", type=Path, default=REPOSITORY / "tests" / "fixtures" / "tiny_mistral")
    parser.add_argument("--executables", type=Path, help="the folder `executables` of another checkpoint")
    parser.add_argument("--few-buckets", action="store_true", help="compile only what the runs need")
    parser.add_argument("--mode", default="S")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 16))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--all-units", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.folder = arguments.folder.resolve()
    if arguments.compile:
        compile_child(arguments.folder, arguments.mode, arguments.workers)
        return
    if arguments.all_units:
        all_units_child(arguments.folder, arguments.mode)
        return
    made = prepare(arguments)
    executables = add_executables(arguments)
    first_read = read_all(arguments.folder, arguments.workers)
    cached_read = read_all(arguments.folder, arguments.workers)
    runs = [first_token(arguments.folder, arguments.mode) for _ in range(arguments.repeats)]
    opened = [all_units(arguments.folder, arguments.mode) for _ in range(arguments.repeats)]
    rows = [row(number, *both) for number, both in enumerate(zip(runs, opened, strict=True), 1)]
    checkpoint = Checkpoint.open(arguments.folder)
    passed = all(
        row["process_to_token_s"] <= SECONDS_LIMIT
        and row["weights_gb_per_s"] >= RATE_LIMIT_GB
        and row["compile_events"] == 0
        for row in rows
    )
    facts = {
        "bench": "startup",
        "limits": {"process_to_token_s": SECONDS_LIMIT, "weights_gb_per_s": RATE_LIMIT_GB},
        "passed": passed,
        "mode": arguments.mode,
        "config": checkpoint.config.to_json(),
        "weights_gb": checkpoint.weight_bytes(checkpoint.plan(arguments.mode)) / 1e9,
        "checkpoint_gb": made["gb"],
        "made_in_s": made["seconds"],
        "made_gb_per_s": made["gb"] / made["seconds"] if made["seconds"] else None,
        "executables": executables,
        "kv_slots": runs[0]["kv_slots"],
        "first_read_gb_per_s": first_read,
        "cached_read_gb_per_s": cached_read,
        "workers": arguments.workers,
        "phases": [run["loading"] for run in runs],
    }
    if not arguments.keep:
        shutil.rmtree(arguments.folder)
    report(rows, facts, arguments.out)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
