"""Where and of what a measurement was made: the `environment` object of every result file."""

import functools
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("elastic-jax", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy")


def processor() -> str:
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return names[0] if names else platform.machine()


def commit() -> str:
    """The commit measured, with a mark if the tree had other changes than results. Where a copy of the tree is measured
    that is no repository, BENCH_COMMIT may say what it is a copy of."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
    except (subprocess.CalledProcessError, FileNotFoundError):
        return os.environ.get("BENCH_COMMIT", "unknown: not run in a repository")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benches/results")
    return head + ("+changes" if changed else "")


def versions() -> dict[str, str]:
    """Of the packages that are installed: this one need not be, where its folder is on the path."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed


@functools.cache  # results may be written after every row
def environment() -> dict[str, Any]:
    import jax

    device = jax.devices()[0]
    return {
        "device": processor() if device.platform == "cpu" else device.device_kind,
        "cores": os.cpu_count(),
        "platform": device.platform,
        "python": platform.python_version(),
        "versions": versions(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "commit": commit(),
    }


def write(rows: list[dict[str, Any]], facts: dict[str, Any], out: Path | None) -> dict[str, Any]:
    """The result as files have it; written whole or not at all, if a file is named."""
    result = {"environment": environment(), **facts, "rows": rows}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f".{out.name}.partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(out)
    return result


def report(rows: list[dict[str, Any]], facts: dict[str, Any], out: Path | None) -> None:
    """Prints rows as a table and everything as one JSON line; writes it to a file if one is named."""
    widths = {key: max(len(key), *(len(_show(row[key])) for row in rows)) for key in rows[0]}
    print("  ".join(key.rjust(width) for key, width in widths.items()))
    for row in rows:
        print("  ".join(_show(row[key]).rjust(width) for key, width in widths.items()))
    print(json.dumps(write(rows, facts, out)))


def _show(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
