"""`elastic-jax bench`: runs a measurement of the repository's folder `benches`, which the installed package lacks."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from elastic_jax.errors import ElasticError

BENCHES = Path(__file__).resolve().parent.parent / "benches"

BenchName = Literal["latency", "startup", "kernels", "cpu"]


class BenchError(ElasticError):
    """A bench cannot be run."""


def bench(
    name: Annotated[BenchName, typer.Argument(help="What to measure.", show_default=False)],
    arguments: Annotated[list[str] | None, typer.Argument(help="Of the bench, options too.")] = None,
) -> None:
    """Measure, in a checkout of the repository. What follows the name is the bench's own: `bench latency --help`."""
    raise typer.Exit(run_bench(name, arguments or []))


def run_bench(name: BenchName, arguments: list[str], folder: Path = BENCHES) -> int:
    """Runs a bench in a process of its own; returns its exit status.

    Raises:
        BenchError: the benches are not here.
    """
    script = folder / f"{name}.py"
    if not script.is_file():
        raise BenchError(
            f"no bench {script}: benches are part of the repository, not of the installed package; run this in a "
            "checkout, as `uv run elastic-jax bench`"
        )
    # The package need not be installed where its folder is on the path; nor is the bench's process started there.
    path = [str(folder.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    return subprocess.run([sys.executable, str(script), *arguments], env=environment, check=False).returncode
