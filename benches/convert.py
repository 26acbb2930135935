"""Converts a synthetic checkpoint with the layer shapes of Mistral-Small-3.1-24B, and kills the conversion ten times.

Method. The source is a sharded bfloat16 Hugging Face folder with as many layers as reach --gigabytes. Its files are
dropped from the page cache (posix_fadvise) before the timed conversion. A conversion runs in a fresh process; seconds
are its wall time from the call of `convert` to its return, everything flushed to the disk, without the start of Python;
MB/s are bytes of the source's weight files / seconds / 1e6; CPU seconds include Python's start; peak RSS is what the
kernel counted for that process (ru_maxrss), and includes Python, JAX and Orbax. The load average before says whether
the machine was idle: the work of others shows in the rate.

Then the conversion starts anew and is killed (SIGKILL) after random delays, ten times, each time continued by the same
call; a run that ends before its kill counts as none and starts anew. The result must have an elastic.json equal to the
first's byte for byte (it names the sha256 of every array file), and every file must have the sha256 it names.

It does not measure the Hub, GGUF, or compressed sources. It needs 2.5 times --gigabytes of disk.

    uv run python benches/convert.py --gigabytes 12 --work /some/disk --out benches/results/<device>/convert.json
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from environment import report

from converters import convert
from converters.conversion import tool_versions
from converters.names import PARTS
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.config import ModelConfig

KILLS = 10
RSS_LIMIT_GIB, RATE_LIMIT_MB = 6, 150
SHARD_BYTES = 3 << 30


def synthetic_config(layers: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=131072,
        hidden_size=5120,
        intermediate_size=32768,
        num_layers=layers,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_theta=1e9,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=11,
    )


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {
        part.hugging_face.format(layer): part.shape(config)
        for part in PARTS
        for layer in (range(config.num_layers) if "{}" in part.name else (None,))
    }


def make_source(folder: Path, gigabytes: float, seed: int) -> int:
    """Writes the folder; returns the bytes of its weight files."""
    layers = 1
    while sum(2 * int(np.prod(shape)) for shape in tensor_shapes(synthetic_config(layers)).values()) < gigabytes * 1e9:
        layers += 1
    config = synthetic_config(layers)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    # Slices of one pool at random places: as good as new numbers for what is measured, at the speed of the disk.
    pool = (rng.standard_normal(1 << 25, dtype=np.float32) * 0.02).astype(ml_dtypes.bfloat16).view(np.uint8)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in tensor_shapes(config).items():
        nbytes = 2 * int(np.prod(shape))
        if size and size + nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        write_shard(folder / file, shard, pool, rng)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(hugging_face_config(config)))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def write_shard(path: Path, shard: dict[str, tuple[int, ...]], pool: np.ndarray, rng: np.random.Generator) -> None:
    header, offset = {}, 0
    for name, shape in shard.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for shape in shard.values():
            left = 2 * int(np.prod(shape))
            while left:
                start = 2 * int(rng.integers(0, pool.size // 4))
                count = min(left, pool.size - start)
                file.write(pool[start : start + count])
                left -= count
        file.flush()
        os.fsync(file.fileno())


def hugging_face_config(config: ModelConfig) -> dict:
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
    }


def drop_from_page_cache(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def run_child(source: Path, destination: Path, workers: int) -> None:
    """The measured process."""
    load_average, start = os.getloadavg()[0], time.perf_counter()
    convert(source, destination, only=None, overwrite=False, revision=None, token=None, workers=workers, progress=None)
    seconds = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_SELF)
    measured = {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss": usage.ru_maxrss * 1024,
        "load_average": load_average,
    }
    print(json.dumps(measured))


def start_child(arguments: argparse.Namespace, source: Path, destination: Path) -> subprocess.Popen:
    command = [sys.executable, __file__, "--child", str(source), str(destination), "--workers", str(arguments.workers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def timed_conversion(arguments: argparse.Namespace, source: Path, destination: Path) -> dict:
    drop_from_page_cache(source)
    child = start_child(arguments, source, destination)
    output, _ = child.communicate()
    if child.returncode:
        raise SystemExit(f"the conversion failed with status {child.returncode}")
    return json.loads(output.splitlines()[-1])


def killed_conversion(arguments: argparse.Namespace, source: Path, destination: Path, seconds: float) -> list[float]:
    """Kills and continues until it has been killed often enough, then lets it finish; returns the delays."""
    rng = random.Random(arguments.seed)
    delays: list[float] = []
    while len(delays) < KILLS:
        delay = rng.uniform(1.0, 2.0 + 0.2 * seconds)
        child = start_child(arguments, source, destination)
        try:
            child.wait(timeout=delay)
            shutil.rmtree(destination)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
            delays.append(round(delay, 2))
    child = start_child(arguments, source, destination)
    child.communicate()
    if child.returncode:
        raise SystemExit(f"the continued conversion failed with status {child.returncode}")
    return delays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=12.0)
    parser.add_argument("--work", type=Path, help="an empty or new folder on the disk to measure")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(*arguments.child, arguments.workers)
        return
    if arguments.work is None:
        parser.error("--work is needed")
    source, first, second = (arguments.work / name for name in ("source", "first", "killed"))
    source_bytes = make_source(source, arguments.gigabytes, arguments.seed)
    timed = timed_conversion(arguments, source, first)
    manifest = (first / "elastic.json").read_bytes()
    written = json.loads(manifest)["total_bytes"]
    shutil.rmtree(first)
    delays = killed_conversion(arguments, source, second, timed["seconds"])
    identical = (second / "elastic.json").read_bytes() == manifest
    problems = Checkpoint.open(second).verify()
    leftovers = sorted(path.name for path in second.iterdir() if path.name.startswith("conversion"))
    shutil.rmtree(second)
    shutil.rmtree(source)
    rate = source_bytes / timed["seconds"]
    row = {
        "source_gb": source_bytes / 1e9,
        "written_gb": written / 1e9,
        "seconds": timed["seconds"],
        "cpu_seconds": timed["cpu_seconds"],
        "input_mb_per_s": rate / 1e6,
        "peak_rss_gib": timed["peak_rss"] / 2**30,
        "kills": len(delays),
        "identical": identical and not problems and not leftovers,
    }
    passed = row["peak_rss_gib"] < RSS_LIMIT_GIB and row["input_mb_per_s"] >= RATE_LIMIT_MB and row["identical"]
    facts = {
        "bench": "convert",
        "limits": {"peak_rss_gib": RSS_LIMIT_GIB, "input_mb_per_s": RATE_LIMIT_MB},
        "passed": passed,
        "workers": arguments.workers,
        "seed": arguments.seed,
        "load_average_before": timed["load_average"],
        "kill_delays_s": delays,
        "problems": problems,
        "tools": tool_versions(),
    }
    report([row], facts, arguments.out)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
