"""Writes what `elastic_jax/kernels/cuda/tune.cu` found into the table of decode's tiles.

make tune-decode                         # on the device: builds the tuner, runs it, and then this
python benches/decode_tiles.py FILE...   # the tuner's JSON lines
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax

TABLE = Path(__file__).parent.parent / "elastic_jax" / "kernels" / "decode_tiles.json"
KEY = ("capability", "precision", "out", "contraction", "tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--capability", type=int, help="ten times the compute capability; that of this machine's GPU")
    arguments = parser.parse_args()
    capability = arguments.capability or int(jax.devices()[0].compute_capability.replace(".", ""))
    entries = json.loads(TABLE.read_text())
    for line in (line for file in arguments.files for line in file.read_text().splitlines()):
        found = json.loads(line)
        entries.append({"capability": capability} | {name: found[name] for name in (*KEY[1:], "tiles")})
    table: dict[tuple[Any, ...], dict[str, Any]] = {tuple(entry[name] for name in KEY): entry for entry in entries}
    TABLE.write_text(json.dumps([table[key] for key in sorted(table)], indent=1) + "\n")
    print(f"{TABLE.name}: {len(table)} entries")


if __name__ == "__main__":
    main()
