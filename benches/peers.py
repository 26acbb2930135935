"""Hugging Face transformers at the same shape, with random bf16 weights made on the device: rows for `latency.json`.

Method. `transformers-eager` is `generate` as it comes (scaled-dot-product attention, dynamic cache): what a user has
without further ado. `transformers-compile` is `generate(cache_implementation="static")`, for which transformers itself
compiles the decoding step with torch.compile. Each cell is run 2 + 3 times, 100 new tokens, other random prompts,
greedy; the first call, which compiles, is reported as `first_use_s`. Times between tokens are taken by a stopping
criterion that waits for the device, as `generate` does at every step anyway. Formulas are those of `latency_rows.py`;
`compile_events` counts the graphs that torch.compile made in the repeats that are measured.

Needs torch and transformers, which this project does not; it imports neither JAX nor elastic_jax.

    python benches/peers.py --out benches/results/<device>/latency.json [--minutes 6]
    python benches/peers.py --small --device cpu --out FILE      # to check this script
"""

import argparse
import datetime
import json
import platform
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import commit, processor
from latency_rows import (
    PEER_CELLS,
    READ_LIMIT_TB_S,
    Cell,
    Clock,
    Run,
    Sizes,
    merged,
    read_result,
    row_of,
    write_result,
)

# This folder is no package; its `kernels.py` would be taken for Hugging Face's package of that name.
sys.path.pop(0)

import transformers

KINDS = ("transformers-eager", "transformers-compile")
SHAPE = {
    "vocab_size": 131072,
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e9},
    "max_position_embeddings": 131072,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 11,
}
"""Mistral-Small-3.1-24B's language model; `random_model.MISTRAL_SMALL`, in transformers' words."""

SMALL = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}


def make_model(shape: dict[str, Any], device: str) -> Any:
    """Random weights of standard deviation 0.02, drawn on the device."""
    config = transformers.MistralConfig(**shape)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = transformers.MistralForCausalLM._from_config(config, attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(before)
    wrong = {str(parameter.dtype) for parameter in model.parameters()} - {"torch.bfloat16"}
    if wrong:
        raise SystemExit(f"weights are {wrong}, expected bfloat16")
    return model.eval()


class Stopwatch(transformers.StoppingCriteria):
    """Notes when each token is there; stops nothing."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        del scores
        if self._device != "cpu":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def run_once(model: Any, kind: str, cell: Cell, new: int, device: str, rng: np.random.Generator) -> Run:
    tokens = rng.integers(12, model.config.vocab_size, (cell.batch, cell.context))
    ids = torch.tensor(tokens, device=device)
    watch = Stopwatch(device)
    more: dict[str, Any] = {}
    if kind == "transformers-compile":
        more["cache_implementation"] = "static"
        if device == "cpu":  # transformers compiles by itself on accelerators alone
            more["compile_config"] = transformers.CompileConfig()
            more["compile_config"]._compile_all_devices = True
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            stopping_criteria=transformers.StoppingCriteriaList([watch]),
            **more,
        )
    if tuple(out.shape) != (cell.batch, cell.context + new) or len(watch.times) != new:
        raise SystemExit(f"{kind} {cell}: {out.shape} after {len(watch.times)} steps, expected {new} new tokens")
    first = watch.times[0] - start
    steps = np.diff(watch.times).tolist()
    return Run((first,) * cell.batch, tuple(steps), cell.batch * (cell.context + 1 + (new - 2) / 2))


def graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def read_limit(device: str) -> float:
    """TB/s of the sum of a 4.3 GB float32 array."""
    if device == "cpu":
        return 0.02
    array = torch.ones(1 << 30, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            array.sum()
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / 10)
    return array.numel() * 4 / best / 1e12


def environment(device: str) -> dict[str, Any]:
    return {
        "device": processor() if device == "cpu" else torch.cuda.get_device_name(),
        "cores": torch.get_num_threads(),
        "platform": "cpu" if device == "cpu" else "gpu",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "commit": commit(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--cells", nargs="+", default=None)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--warm-ups", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    cells = [Cell.parse(cell) for cell in arguments.cells or (("1x64", "4x64") if arguments.small else PEER_CELLS)]
    here, device = environment(arguments.device), arguments.device
    # The earlier rows say what environment they are of; the file's own stays that of this project's runs.
    before = read_result(arguments.out) if arguments.out else None
    limit = READ_LIMIT_TB_S.get(here["device"]) or (before or {}).get("limit_tb_s") or read_limit(device)
    torch.cuda.empty_cache() if device != "cpu" else None
    torch.manual_seed(0)
    model = make_model(SHAPE | (SMALL if arguments.small else {}), device)
    skipped = {"lm_head.weight", "model.embed_tokens.weight"}
    linear = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and name not in skipped)
    read = sum(2 * p.numel() for name, p in model.named_parameters() if name != "model.embed_tokens.weight")
    shape = model.config
    kv_token = 4 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
    sizes = Sizes(read, kv_token, linear, limit)
    rng = np.random.default_rng(arguments.seed)
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    run: dict[str, Any] = {
        "id": f"{now} peers {here['commit'][:12]}",
        "command": shlex.join(["benches/peers.py", *sys.argv[1:]]),
        "model": "a tiny model" if arguments.small else "Mistral-Small-3.1-24B's shape",
        "environment": here,
        "warm_ups": arguments.warm_ups,
        "repeats": arguments.repeats,
        "anchors": {},
        "skipped": [],
        "limit_tb_s": limit,
    }
    clock = Clock(time.time() + 60 * arguments.minutes)
    rows: list[dict[str, Any]] = []
    times = arguments.warm_ups + arguments.repeats
    for kind in arguments.kinds:
        for cell in cells:
            compiling = 90 if kind == "transformers-compile" and not arguments.small else 0
            if not clock.allows(time.time() + compiling, cell, arguments.tokens, times):
                run["skipped"].append(f"{kind} {cell}: --minutes would not have sufficed")
                continue
            start, runs = time.perf_counter(), []
            for number in range(times):
                if number == arguments.warm_ups:
                    compiled = graphs()
                runs.append(run_once(model, kind, cell, arguments.tokens, device, rng))
                if number == 0:
                    first_use = time.perf_counter() - start
            measured = runs[arguments.warm_ups :]
            clock.learn(cell, measured)
            row = row_of(kind, cell, measured, sizes)
            row["first_use_s"] = first_use
            row["peak_gib"] = 0.0 if device == "cpu" else torch.cuda.max_memory_allocated() / 2**30
            row["compile_events"] = graphs() - compiled
            row["busy_fraction"] = None
            row["provisional"] = False
            rows.append(row)
            print(json.dumps(row), flush=True)
            if arguments.out:
                before = read_result(arguments.out)
                kept = here if before is None else before["environment"]
                write_result(arguments.out, merged(before, {**kept, "device": here["device"]}, run, rows))
    for line in run["skipped"]:
        print("skipped", line)


if __name__ == "__main__":
    main()
