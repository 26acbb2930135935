"""Generating on a CPU, paired with other runtimes: SmolLM2-135M-Instruct, a prompt of 256 and 100 new tokens, greedy.

Method. Every runtime has a process of its own, is loaded once, and waits while others run. A repeat sends the same
random prompt to one after the other, in another order each time; prompts differ from repeat to repeat. After 2 warm-ups
come --repeats, and what counts are medians over repeats, and medians of the ratio within a repeat: only paired runs
compare. prefill_tok_s is 256 / time to the first token; decode_tok_s is 99 / (time of all - time of the first).

Runtimes: this project's mode S and XL, executables compiled ahead; transformers bf16 eager; llama.cpp with Q8_0;
OpenVINO GenAI from the same Q8_0 file. Each peer has an environment below --peers, which --install makes (with
python3.11, and minutes of building for llama.cpp); one that is not there is left out, and named. All start from one
GGUF file, the demo's: its weights are rounded to bf16 for transformers and this project's checkpoint, to Q8_0 for the
others.

    python benches/cpu.py --install --peers FOLDER              # once
    python benches/cpu.py --peers FOLDER --out benches/results/<device>/cpu.json
"""

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from environment import report

REPOSITORY = Path(__file__).resolve().parent.parent
PROMPT = 256
ENVIRONMENTS = {
    "transformers": ["torch==2.13.0", "transformers", "safetensors"],
    "llamacpp": ["llama-cpp-python"],
    "openvino": ["openvino", "openvino-genai", "openvino-tokenizers"],
}
"""Packages of each peer's environment."""

PEERS = {"transformers": "transformers", "llama.cpp": "llamacpp", "openvino": "openvino"}
"""A runtime's environment."""

BASE = "transformers"
"""What ratios are to, and what the bars are about."""


def python_of(peers: Path, environment: str) -> Path:
    return peers / environment / "bin" / "python"


def installed(peers: Path, environment: str) -> bool:
    """Whether an environment is whole; the mark comes last."""
    return (peers / environment / "installed").exists()


def install(peers: Path, python: str) -> None:
    """Makes the environments that are missing; says which cannot be made, and goes on."""
    for name, packages in ENVIRONMENTS.items():
        if installed(peers, name):
            continue
        for command in (
            [python, "-m", "venv", peers / name],
            [python_of(peers, name), "-m", "pip", "install", *packages],
        ):
            if subprocess.run(list(map(str, command)), check=False).returncode:
                print(f"{name}: could not be installed; remove {peers / name} and try again", file=sys.stderr)
                break
        else:
            (peers / name / "installed").touch()


def prepare(peers: Path) -> dict[str, Path]:
    """Each runtime's model, made where it is not there yet; only of runtimes whose environment is there."""
    from elastic_jax.demo_model import default_cache, demo_model

    source, models = demo_model(default_cache()), peers / "models"
    models.mkdir(parents=True, exist_ok=True)
    folder, elastic, q8 = models / "smollm2", models / "smollm2.elastic", models / "smollm2-q8_0.gguf"
    script = REPOSITORY / "tests" / "fixtures" / "make_smollm2_folder.py"
    _make(folder, [sys.executable, script, source, folder])
    _make(elastic, [sys.executable, "-m", "elastic_jax", "convert", folder, elastic])
    for mode in ("S", "XL"):  # keeps executables that fit
        _run([sys.executable, "-m", "elastic_jax", "compile", elastic, "--mode", mode])
    found = {"ours-S": elastic, "ours-XL": elastic}
    if installed(peers, "transformers"):
        found["transformers"] = folder
    if not q8.exists() and installed(peers, "llamacpp"):
        _make(q8, [python_of(peers, "llamacpp"), "-c", _QUANTIZE, source, q8])
    if q8.exists():
        found |= {name: q8 for name in ("llama.cpp", "openvino") if installed(peers, PEERS[name])}
    return found


_QUANTIZE = """
import sys, llama_cpp
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
parameters.allow_requantize = True
source, destination = (path.encode() for path in sys.argv[1:])
sys.exit(llama_cpp.llama_model_quantize(source, destination, parameters))
"""


def _make(path: Path, command: list[Any]) -> None:
    if not path.exists():
        _run(command)


def _run(command: list[Any]) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(list(map(str, command)), env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} ended with status {done.returncode}")


class Worker:
    """A runtime's process."""

    def __init__(self, name: str, python: Path | str, model: Path, threads: int, new: int) -> None:
        self.name = name
        script = Path(__file__).with_name("cpu_runtime.py")
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        if name not in PEERS:
            environment["PYTHONPATH"] = str(REPOSITORY)
        # Threads of one runtime must not spin while another runs.
        environment |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
        command = [str(python), str(script), name, str(model), str(threads), str(new)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.loaded = self._read()

    def run(self, prompt: list[int]) -> dict[str, Any]:
        stdin = self._process.stdin
        if stdin is None:
            raise SystemExit(f"{self.name} has no standard input")
        stdin.write(json.dumps(prompt) + "\n")
        stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        stdout = self._process.stdout
        line = stdout.readline() if stdout is not None else ""
        if not line:
            raise SystemExit(f"{self.name} ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(timeout=60)


def rows_of(times: dict[str, list[dict[str, Any]]], prompt: int, new: int) -> list[dict[str, Any]]:
    """A row for each runtime: medians, and the medians of its ratios to `BASE` and of mode S's ratio to it."""

    def speeds(name: str) -> tuple[np.ndarray, np.ndarray]:
        for run in times[name]:
            if len(run["steps_s"]) != new - 1:
                raise ValueError(f"{name} gave {len(run['steps_s']) + 1} tokens, expected {new}")
        prefill = np.array([prompt / run["first_s"] for run in times[name]])
        decode = np.array([(new - 1) / sum(run["steps_s"]) for run in times[name]])
        return prefill, decode

    rows = []
    for name in times:
        prefill, decode = speeds(name)
        row: dict[str, Any] = {"runtime": name}
        for what, values in (("prefill", prefill), ("decode", decode)):
            row[f"{what}_tok_s"] = float(np.median(values))
            row[f"{what}_spread"] = float(values.max() / values.min() - 1)
        for what, number in (("prefill", 0), ("decode", 1)):
            mine = speeds(name)[number]
            row[f"{what}_to_{BASE}"] = float(np.median(mine / speeds(BASE)[number])) if BASE in times else ""
            row[f"S_{what}_to_it"] = float(np.median(speeds("ours-S")[number] / mine)) if "ours-S" in times else ""
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=Path(".cache/peers"), help="environments and models")
    parser.add_argument("--install", action="store_true", help="make the environments that are missing, and end")
    parser.add_argument("--python", default="python3.11", help="for --install")
    parser.add_argument("--runtimes", nargs="+", help="all that are there by default")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--warm-ups", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.peers = arguments.peers.resolve()
    if arguments.install:
        install(arguments.peers, arguments.python)
        return
    models = prepare(arguments.peers)
    absent = sorted({"ours-S", "ours-XL", *PEERS} - models.keys())
    for name in absent:
        needs = "its environment" if name in ("transformers", "llama.cpp") else "its environment, or llama.cpp's"
        print(f"{name} is left out: {needs} is not whole below {arguments.peers}; see --install")
    names = arguments.runtimes or list(models)
    workers = [
        Worker(
            name,
            python_of(arguments.peers, PEERS[name]) if name in PEERS else sys.executable,
            models[name],
            arguments.threads,
            arguments.tokens,
        )
        for name in names
    ]
    times: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    order = random.Random(0)
    rng = np.random.default_rng()
    for repeat in range(arguments.warm_ups + arguments.repeats):
        prompt = rng.integers(20, 40000, PROMPT).tolist()
        for worker in order.sample(workers, len(workers)):
            run = worker.run(prompt)
            print(f"{repeat} {worker.name} {run['first_s']:.3f} s, then {sum(run['steps_s']):.3f} s", flush=True)
            if repeat >= arguments.warm_ups:
                times[worker.name].append(run)
    for worker in workers:
        worker.close()
    facts = {
        "bench": "cpu",
        "prompt": PROMPT,
        "new_tokens": arguments.tokens,
        "repeats": arguments.repeats,
        "threads": arguments.threads,
        "absent": absent,
        "load_average": os.getloadavg()[0],
        "runtimes": {worker.name: worker.loaded for worker in workers},
    }
    report(rows_of(times, PROMPT, arguments.tokens), facts, arguments.out)


if __name__ == "__main__":
    main()
