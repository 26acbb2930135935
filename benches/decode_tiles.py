"""Chooses the sizes of decode's products on the GPU at hand, for the table that the kernels read.

Builds `elastic_jax/kernels/cuda/tune.cu` (nvcc of CUDA 13), which describes the method, runs it for the shape of
Mistral-Small-3.1-24B, and writes elastic_jax/kernels/decode_tiles.json; other devices' entries stay.

    python benches/decode_tiles.py                   # about 10 s for each precision and number of tokens
    python benches/decode_tiles.py --lines FILE...   # only the table, from the tuner's output elsewhere
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import jax
from random_model import MISTRAL_SMALL
from tiles import write_tiles

from elastic_jax.kernels import decode_cuda

KERNELS = Path(__file__).parent.parent / "elastic_jax" / "kernels"
TABLE = KERNELS / "decode_tiles.json"
KEPT = ("precision", "out", "contraction", "tokens", "tiles")


def tune(precisions: Iterable[str], tokens: Iterable[int], context: int, capability: int) -> list[str]:
    """The tuner's lines."""
    shape = MISTRAL_SMALL
    heads = shape.num_heads, shape.num_kv_heads, shape.head_dim
    sizes = [shape.hidden_size, shape.intermediate_size, *heads, shape.vocab_size, context]
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "tune"
        source = KERNELS / "cuda" / "tune.cu"
        arch = "sm_90a" if capability == 90 else f"sm_{capability}"
        subprocess.run(["nvcc", "-O3", "-std=c++17", f"-arch={arch}", "-o", program, source], check=True)
        for precision in precisions:
            for count in tokens:
                kind = "streamed" if decode_cuda.streams(capability, count) else "packed"
                command = [program, *map(str, sizes), precision, kind, str(count)]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                print(output, end="", flush=True)
                lines += output.splitlines()
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="+", default=["int8", "bf16"])
    parser.add_argument("--tokens", nargs="+", type=int, help="as many as the device's kernels take, by default")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--lines", nargs="+", type=Path)
    parser.add_argument("--capability", type=int, help="ten times the compute capability; that of this machine's GPU")
    arguments = parser.parse_args()
    capability = arguments.capability or int(jax.devices()[0].compute_capability.replace(".", ""))
    if arguments.lines:
        lines = [line for file in arguments.lines for line in file.read_text().splitlines()]
    else:
        many = [32, 64] if decode_cuda.streams(capability, 64) else []
        lines = tune(arguments.precisions, arguments.tokens or [1, 8, 16, *many], arguments.context, capability)
    found = [json.loads(line) for line in lines]
    write_tiles(TABLE, [{"capability": capability} | {name: entry[name] for name in KEPT} for entry in found])


if __name__ == "__main__":
    main()
