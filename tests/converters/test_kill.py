"""A conversion killed at random moments, in a process of its own, and continued."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_jax.checkpoint import Checkpoint
from elastic_jax.errors import CheckpointError

KILLS = 3

# Waits for a line before it starts, so that the delay counts from the first byte and not from Python's own start; the
# sleep of each progress call makes the small conversion long enough to be hit anywhere.
CHILD = """
import sys, time
from converters import convert

print("ready", flush=True)
convert(sys.argv[1], sys.argv[2], only=None, overwrite=False, revision=None, token=None, workers=2,
        progress=lambda *_: time.sleep(0.02))
"""


def run(source: Path, destination: Path, seconds: float) -> int | None:
    """Converts for so long, then kills; returns the exit status if the conversion ended before."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(source), str(destination)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        try:
            return child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            return None


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_killed_anywhere_a_conversion_is_unfinished_and_can_be_continued(
    write_folder, convert_to, config, weights, tmp_path
):
    source, destination = write_folder(config, weights, shards=2), tmp_path / "out"
    convert_to(source, tmp_path / "whole")
    rng = random.Random(0)
    for _ in range(KILLS):
        run(source, destination, rng.uniform(0.0, 0.6))
        if (destination / "elastic.json").exists():
            assert Checkpoint.open(destination).verify() == []
        elif (destination / "conversion.json").exists():
            with pytest.raises(CheckpointError, match=f"unfinished conversion.*convert-weights {source}"):
                Checkpoint.open(destination)
    assert run(source, destination, 60) == 0
    assert files(destination) == files(tmp_path / "whole")
