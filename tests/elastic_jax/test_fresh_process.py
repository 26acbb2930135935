"""The proof that nothing compiles at inference: a new process, tracing forbidden, JAX's own events recorded."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import CompiledTiny

SCRIPT = Path(__file__).resolve().parent.parent / "support" / "fresh_generation.py"


def in_fresh_process(*arguments: str, **environment: str) -> Any:
    clean = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT), *arguments],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(("mode", "dtype"), [("XL", "float32"), ("S", "bfloat16")])
def test_a_fresh_process_generates_and_scores_without_tracing_or_compiling(
    compiled_tiny: Callable[..., CompiledTiny], mode: str, dtype: str
) -> None:
    compiled = compiled_tiny(mode, dtype)
    # Nothing to find an assembler in, either.
    found = in_fresh_process(str(compiled.checkpoint.path), mode, dtype, PATH="/nowhere")
    assert found["forbidden"], "tracing was not forbidden at all"
    assert found["events"] == []
    first, again, *threads = found["results"]
    assert first == again
    assert len(threads) == 3
    assert first["greedy"] == first["stream"] == first["top"]
    # Beside each other, threads share steps: that may round an 8-bit activation the other way.
    assert dtype != "float32" or all(thread["greedy"] == first["greedy"] for thread in threads)
    assert all(other.keys() == first.keys() for other in threads)
    assert first["bias"] == [9] * 8
    assert max(first["grammar"]) < 160
    assert len({tuple(answer) for answer in first["choices"]}) == 3
    assert [len(answer) for answer in first["batch"]] == [8] * 6


def test_the_recorder_would_notice(compiled_tiny: Callable[..., CompiledTiny], tmp_path: Path) -> None:
    """The same script, tracing allowed, with one stray operation."""
    compiled = compiled_tiny("XL", "float32")
    script = SCRIPT.read_text().replace('jax.config.update("jax_no_tracing", True)', "")
    script = script.replace("    events = list(EVENTS)\n", "    jax.numpy.ones(3) + 1\n    events = list(EVENTS)\n")
    script = script.replace("use(model)", "{}")  # the stray operation is all that is looked for
    (tmp_path / "stray.py").write_text(script)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "stray.py"), str(compiled.checkpoint.path), "XL", "float32"],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    found = json.loads(done.stdout)
    assert not found["forbidden"]
    assert any("backend_compile" in event for event in found["events"])
