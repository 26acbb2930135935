"""What importing the package and asking the command line for help take.

Method. Each in fresh processes, by turns, --repeats times after one that warms the page cache; the medians of seconds
from just before the process is started to its end. `python` does nothing, and is part of both others.

    uv run python benches/imports.py --out benches/results/<device>/imports.json
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from environment import report

COMMANDS = {
    "python": ["-c", ""],
    "import elastic_jax": ["-c", "import elastic_jax"],
    "elastic-jax --help": ["-m", "elastic_jax", "--help"],
}


def seconds(arguments: list[str]) -> float:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(arguments.repeats + 1):
        for name, command in COMMANDS.items():
            taken = seconds(command)
            if number:
                times[name].append(taken)
    rows = [{"what": name, "seconds": statistics.median(found), "most": max(found)} for name, found in times.items()]
    report(rows, {"bench": "imports", "repeats": arguments.repeats}, arguments.out)


if __name__ == "__main__":
    main()
