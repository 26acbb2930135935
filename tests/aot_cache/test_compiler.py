"""Stores are complete or absent, tell nothing of the machine, and ignore JAX's own compilation cache."""

import getpass
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from aot_cache.compiler import complete_store
from aot_cache.manifest import MANIFEST
from aot_cache.store import verify
from aot_cache.unit import Unit
from elastic_jax.errors import ExecutableError


def unit(name, function, *shapes, donate=()):
    arguments = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    return Unit(name, function, arguments, donate, {})


def test_manifest_records_files_and_memory(checkpoint):
    manifest = json.loads((checkpoint.folder / MANIFEST).read_text())
    record = manifest["units"]["step.d2.p0.greedy"]
    assert record["size"] == checkpoint.blob().stat().st_size
    assert record["compile_seconds"] > 0
    assert record["properties"] == {"decode_rows": 2, "prompt_tokens": 0, "variant": "greedy"}
    assert record["memory"]["arguments"] > record["memory"]["aliased"] > 0
    assert manifest["identity"]["kv_slots"] == 64
    assert manifest["identity"]["jax"] == jax.__version__


def test_progress_names_each_unit_at_start_and_end(empty):
    calls = []
    empty.compile(progress=lambda *call: calls.append(call))
    assert sorted((name, seconds is None) for name, seconds, _, _ in calls) == [
        ("step.d2.p0.greedy", False),
        ("step.d2.p0.greedy", True),
        ("step.d4.p0.greedy", False),
        ("step.d4.p0.greedy", True),
    ]
    assert [done for _, seconds, done, _ in calls if seconds is not None] == [1, 2]
    assert {total for *_, total in calls} == {2}


def test_equal_store_is_kept(checkpoint):
    before = checkpoint.blob().stat()
    manifest = checkpoint.compile(progress=lambda *_: pytest.fail("a unit was compiled again"))
    assert checkpoint.blob().stat().st_mtime_ns == before.st_mtime_ns
    assert set(manifest.units) == {"step.d2.p0.greedy", "step.d4.p0.greedy"}


def test_damaged_or_different_store_is_replaced(checkpoint):
    os.truncate(checkpoint.blob(), 10)
    checkpoint.compile()
    assert verify(checkpoint.folder) == []
    checkpoint.compile(identity={"kv_slots": 32})
    checkpoint.load(identity={"kv_slots": 32})
    assert sorted(path.name for path in checkpoint.folder.parent.iterdir()) == ["M"]


def test_complete_store_wants_exactly_these_units(checkpoint):
    device = jax.devices()[0]
    identity = {"plan_hash": "p1", "config_hash": "c1", "source_hash": "s1", "kv_slots": 64}
    extra = unit("extra", lambda x: (x,), (2,))
    assert complete_store([extra], checkpoint.folder, identity, device) is None


def test_failing_unit_is_named_and_leaves_no_store(empty):
    bad = unit("bad", lambda x: (x.no_such_attribute,), (2,))
    with pytest.raises(ExecutableError, match="unit bad cannot be compiled: AttributeError"):
        empty.compile(units=[unit("good", lambda x: (x + x,), (2,)), bad])
    assert list(empty.folder.parent.iterdir()) == []


def test_failure_keeps_the_old_store(checkpoint):
    bad = unit("bad", lambda x: (x.no_such_attribute,), (2,))
    with pytest.raises(ExecutableError, match="unit bad"):
        checkpoint.compile(units=[bad])
    assert len(checkpoint.load()) == 2


def test_nested_results_are_refused(empty):
    with pytest.raises(ExecutableError, match="unit nested must return a flat tuple of arrays"):
        empty.compile(units=[unit("nested", lambda x: (x, (x,)), (2,))])


def test_closed_over_weights_are_refused(empty):
    weights = jnp.ones((600, 600))
    with pytest.raises(
        ExecutableError, match="unit closed closes over 1440000 bytes of arrays: pass them as arguments"
    ):
        empty.compile(units=[unit("closed", lambda x: (x @ weights,), (2, 600))])


def test_same_name_twice_is_refused(empty):
    twice = unit("twice", lambda x: (x,), (2,))
    with pytest.raises(ExecutableError, match="several units are called twice"):
        empty.compile(units=[twice, twice])


def test_nothing_is_writable_by_others(empty):
    old = os.umask(0)
    try:
        empty.root.mkdir(mode=0o755)
        empty.compile()
    finally:
        os.umask(old)
    assert len(empty.load()) == 2


def test_second_compiler_of_one_store_is_refused(empty):
    def slow(*_):
        with pytest.raises(ExecutableError, match="another process is compiling"):
            empty.compile()

    empty.compile(units=[unit("one", lambda x: (x + x,), (2,))], progress=slow)
    assert verify(empty.folder) == []


def start_slow_compile(checkpoint):
    program = f"""
        import pathlib, time, jax, jax.numpy as jnp
        from aot_cache.compiler import compile_units
        from aot_cache.unit import Unit
        def hang(name, seconds, done, total):
            if done == 1:
                print("half", flush=True)
                time.sleep(60)
        unit = lambda name: Unit(name, lambda x: (x + x,), (jax.ShapeDtypeStruct((2,), jnp.float32),), (), {{}})
        compile_units([unit("a"), unit("b")], pathlib.Path({str(checkpoint.folder)!r}), {{}}, jax.devices()[0],
                      workers=1, progress=hang)
    """
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)


def test_killed_compile_leaves_no_store_and_can_be_repeated(empty):
    with start_slow_compile(empty) as process:
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    assert list(empty.folder.parent.iterdir()) != []
    with pytest.raises(ExecutableError, match="no compiled executables at"):
        empty.load()
    empty.compile()
    assert len(empty.load()) == 2
    assert [path.name for path in empty.folder.parent.iterdir()] == ["M"]


def test_store_tells_nothing_of_this_machine(pristine):
    """No path, user or host of the machine that compiled; short names are left out, for bytes hold them by chance."""
    secrets = {
        str(Path.cwd()), str(Path(__file__).parent), sys.prefix, str(Path.home()), str(pristine.root),
        str(Path(jax.__file__).parent), "conftest", "repeated_int8_dot at", "site-packages",
    }  # fmt: skip
    secrets |= {name for name in (socket.gethostname(), getpass.getuser()) if len(name) > 5}
    for path in pristine.folder.iterdir():
        content = path.read_bytes()
        for secret in secrets:
            assert secret.encode() not in content, f"{path.name} holds {secret}"
        assert content.count(b".py") == 0


def test_locations_lowered_before_do_not_come_back(empty):
    """A function that was jitted with source locations is stored without them."""

    def function(x):
        return (jnp.sin(x),)

    jitted = jax.jit(function)
    jitted(jnp.ones(2))
    empty.compile(units=[unit("seen", lambda x: jitted(x), (2,))])
    assert b"test_compiler" not in empty.blob("seen").read_bytes()


def test_jax_persistent_cache_is_neither_read_nor_written(tmp_path):
    """An executable that JAX's cache returned serializes into one that cannot run."""
    program = """
        import pathlib, sys, jax, jax.numpy as jnp, numpy as np
        from aot_cache.compiler import compile_units
        from aot_cache.store import load
        from aot_cache.unit import Unit
        root, cache = map(pathlib.Path, sys.argv[1:])
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
        jax.jit(lambda x: x + 1)(np.ones(3, np.float32))
        before = len(list(cache.iterdir()))
        def function(x):
            return (jnp.sort(jnp.exp(x) + 1),)
        unit = Unit("sorted", function, (jax.ShapeDtypeStruct((3,), jnp.float32),), (), {})
        device = jax.devices()[0]
        for folder in (root / "a", root / "b"):
            compile_units([unit], folder, {}, device, workers=1, progress=lambda *_: None)
            loaded = load(folder, {}, device, root=root, units=None, trust=False, workers=1, hint="")
            (result,) = loaded["sorted"](np.zeros(3, np.float32))
            assert np.asarray(result).tolist() == [2.0, 2.0, 2.0]
        assert len(list(cache.iterdir())) == before > 0
        assert jax.config.jax_enable_compilation_cache
    """
    arguments = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "root"), str(tmp_path / "cache")]
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
