"""The demo: the whole path on a small real model, each mode in a process of its own that may not compile."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elastic_jax.demo_model import default_cache, demo_model
from elastic_jax.errors import ElasticError
from elastic_jax.plan import MODES

_STANDARD_ERROR = 2  # the descriptor: `sys.stderr` may be something else than a file

PROMPT = "Name three things that make a good library, and say why in one sentence each."


def fetch_model(destination: Path) -> int:
    """Copies the demo's model to a file, from the cache, into which it is fetched once.

    Returns:
        its bytes.

    Raises:
        ElasticError: the file is there already, or the model cannot be fetched.
        OSError: the file cannot be written; nothing is left of it then.
    """
    if destination.exists():
        raise ElasticError(f"{destination} is there already: name a file that is not, or use this one")
    source = demo_model(default_cache())
    partial = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
    try:
        shutil.copyfile(source, partial)
        partial.replace(destination)
    finally:
        partial.unlink(missing_ok=True)
    return destination.stat().st_size


def run_demo(directory: Path | None, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Fetches, converts, compiles and generates; what is there already is used.

    Args:
        directory: where the checkpoint goes; a folder of the cache by default.
        say: is told what happens.

    Returns:
        what `elastic-jax generate --json` printed for each mode.

    Raises:
        ElasticError: a step failed; the message is its own.
    """
    cache = default_cache()
    source = demo_model(cache)
    checkpoint = directory or cache / "smollm2-135m-instruct.elastic"
    say(f"model: SmolLM2-135M-Instruct, {source}")
    _command(say, "convert", str(source), str(checkpoint))
    _command(say, "compile", str(checkpoint))
    _command(say, "info", str(checkpoint))
    results = []
    for mode in MODES:
        output = _command(
            say,
            *("generate", str(checkpoint), "--mode", mode, "--chat", "--prompt", PROMPT),
            *("--max-new-tokens", "64", "--no-compile", "--json"),
        )
        result = json.loads(output)
        results.append(result)
        provisional = " (provisional plan)" if result["provisional"] else ""
        say(f"\n--- {mode}{provisional}\n{result['text']}\n")
        say(
            f"{mode}: {result['new_tokens']} tokens, {result['decode_tokens_per_second']} tok/s, loaded in "
            f"{result['load_seconds']} s, compile events: {result['compile_events']}"
        )
    return results


def _command(say: Callable[[str], None], *arguments: str) -> str:
    """Runs one command of this program in a fresh process, and returns what it printed if that is JSON.

    All else goes to standard error, so that the demo's own JSON stands alone.
    """
    shown = shlex.join(["elastic-jax", *arguments])
    say(f"\n$ {shown}")
    command = [sys.executable, "-m", "elastic_jax", *arguments]
    captured = "--json" in arguments
    done = subprocess.run(command, stdout=subprocess.PIPE if captured else _STANDARD_ERROR, text=True, check=False)
    if done.returncode:
        raise ElasticError(f"`{shown}` ended with exit status {done.returncode}")
    return done.stdout or ""
