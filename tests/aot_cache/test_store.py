"""Each way in which a store can be wrong is found and named; a right one loads and computes."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from aot_cache import payload
from aot_cache.manifest import MANIFEST
from aot_cache.store import full_identity, verify
from aot_cache.target import Target
from elastic_jax.errors import ExecutableError, MismatchError


def arguments(device, rows=2, repeats=3):
    """Weights of one, tokens of two: each dot of 16 gives 32."""
    values = [np.ones((32, 16), np.int8), np.full((rows, 16), 2, np.int8), np.zeros(64, np.float32), np.int32(repeats)]
    return [jax.device_put(value, device) for value in values]


def expect_mismatch(checkpoint, key, *parts, **changes):
    with pytest.raises(MismatchError) as caught:
        checkpoint.load(**changes)
    message = str(caught.value)
    (line,) = [line for line in message.splitlines() if line.strip().startswith(f"{key}:")]
    for part in parts:
        assert part in line
    assert str(checkpoint.folder) in message
    assert message.endswith("elastic-jax compile DIR --mode M")


def stored(checkpoint, key, value):
    checkpoint.edit_manifest(lambda manifest: manifest["identity"].update({key: value}))


def test_loads_and_computes(checkpoint):
    executables = checkpoint.load()
    assert sorted(executables) == ["step.d2.p0.greedy", "step.d4.p0.greedy"]
    for rows in (2, 4):
        total, counts = executables[f"step.d{rows}.p0.greedy"](*arguments(jax.devices()[0], rows))
        np.testing.assert_array_equal(total, np.full((rows, 32), 96))
        np.testing.assert_array_equal(counts, np.ones(64))


def test_unopened_until_called(checkpoint, monkeypatch):
    opened = []
    real = payload.from_bytes
    monkeypatch.setattr(payload, "from_bytes", lambda *a, **k: opened.append(k["source"]) or real(*a, **k))
    executable = checkpoint.load(preload=False)["step.d2.p0.greedy"]
    assert not opened
    for _ in range(2):
        total, _ = executable(*arguments(jax.devices()[0]))
        np.testing.assert_array_equal(total, np.full((2, 32), 96))
    assert [Path(source).name for source in opened] == ["step.d2.p0.greedy.xla"]


def test_damage_is_found_before_opening(checkpoint):
    blob = checkpoint.folder / "step.d2.p0.greedy.xla"
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.write_bytes(content)
    with pytest.raises(ExecutableError, match="damaged"):
        checkpoint.load(preload=False)


def test_donation_is_kept(checkpoint):
    executable = checkpoint.load()["step.d2.p0.greedy"]
    weight, tokens, counts, repeats = arguments(jax.devices()[0])
    executable(weight, tokens, counts, repeats)
    assert counts.is_deleted()
    assert not weight.is_deleted()


def test_loads_on_the_given_device(checkpoint):
    device = jax.devices()[5]
    executable = checkpoint.load(device=device)["step.d2.p0.greedy"]
    total, _ = executable(*arguments(device))
    assert total.devices() == {device}
    np.testing.assert_array_equal(total, np.full((2, 32), 96))


def test_wrong_shapes_are_refused_at_the_call(checkpoint):
    executable = checkpoint.load()["step.d2.p0.greedy"]
    with pytest.raises(TypeError, match="compiled"):
        executable(*arguments(jax.devices()[0], rows=3))


def test_parallel_load_gives_each_its_own(checkpoint):
    for _ in range(5):
        executables = checkpoint.load(workers=4)
        assert all(executable.name == name for name, executable in executables.items())
        assert all(f"step.d{e.properties['decode_rows']}.p0.greedy" == name for name, e in executables.items())


def test_memory_of_a_loaded_unit(checkpoint):
    memory = checkpoint.load()["step.d2.p0.greedy"].memory
    assert memory.arguments == 32 * 16 + 2 * 16 + 64 * 4 + 4
    assert memory.aliased == 64 * 4
    # Results and the table of pointers to them.
    assert memory.outputs >= 2 * 32 * 4 + 64 * 4
    assert 0 < memory.workspace < 10_000


def test_only_wanted_units_are_loaded(checkpoint):
    checkpoint.blob("step.d4.p0.greedy").unlink()
    wanted = {"step.d2.p0.greedy": {"decode_rows": 2, "prompt_tokens": 0, "variant": "greedy"}}
    assert list(checkpoint.load(units=wanted)) == ["step.d2.p0.greedy"]


def test_jax_version(checkpoint):
    stored(checkpoint, "jax", "0.11.1")
    expect_mismatch(checkpoint, "jax", '"0.11.1"', f'"{jax.__version__}"', "only good for the JAX version")


def test_jaxlib_version(checkpoint):
    stored(checkpoint, "jaxlib", "0.11.1")
    expect_mismatch(checkpoint, "jaxlib", '"0.11.1"', "XLA (jaxlib) version")


def test_package_version(checkpoint):
    stored(checkpoint, "package", "0.0.1")
    expect_mismatch(checkpoint, "package", '"0.0.1"', "another version of elastic-jax")


def test_device_kind(checkpoint):
    stored(checkpoint, "device_kind", "NVIDIA H200")
    expect_mismatch(checkpoint, "device_kind", '"NVIDIA H200"', '"cpu"', "the device is of another kind")


def test_compute_capability(checkpoint):
    stored(checkpoint, "compute_capability", "9.0")
    expect_mismatch(checkpoint, "compute_capability", '"9.0"', "nothing", "GPU is of another generation")


def test_processor_features(checkpoint):
    checkpoint.edit_manifest(lambda manifest: manifest["identity"]["processor_features"].append("avx4096"))
    expect_mismatch(checkpoint, "processor_features", '"avx4096"', "the processor has other instructions")


def test_plan(checkpoint):
    identity = {"plan_hash": "p2", "config_hash": "c1", "source_hash": "s1", "kv_slots": 64}
    expect_mismatch(checkpoint, "plan_hash", '"p1"', '"p2"', "plan computes some groups otherwise", identity=identity)


def test_config(checkpoint):
    identity = {"plan_hash": "p1", "config_hash": "c2", "source_hash": "s1", "kv_slots": 64}
    expect_mismatch(checkpoint, "config_hash", '"c1"', '"c2"', "model's shape is another", identity=identity)


def test_source_hash(checkpoint):
    identity = {"plan_hash": "p1", "config_hash": "c1", "source_hash": "s2", "kv_slots": 64}
    expect_mismatch(checkpoint, "source_hash", '"s1"', '"s2"', "sources that are compiled", identity=identity)


def test_kv_slots(checkpoint):
    identity = {"plan_hash": "p1", "config_hash": "c1", "source_hash": "s1", "kv_slots": 128}
    expect_mismatch(checkpoint, "kv_slots", "64", "128", "KV cache has another size", identity=identity)


def test_key_that_was_not_compared_before(checkpoint):
    identity = {"plan_hash": "p1", "config_hash": "c1", "source_hash": "s1", "kv_slots": 64, "mesh": [2]}
    expect_mismatch(checkpoint, "mesh", "nothing", "[2]", identity=identity)


def test_xla_flags(checkpoint, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_cpu_enable_fast_math=true")
    expect_mismatch(checkpoint, "xla_flags", "--xla_cpu_enable_fast_math=true", "XLA_FLAGS are others")


def test_compiler_options(checkpoint):
    changes = {"compiler_options": {"xla_cpu_enable_fast_min_max": True}}
    expect_mismatch(checkpoint, "compiler_options", "xla_cpu_enable_fast_min_max", "other options", **changes)


def test_any_compiler_options_serve_unless_some_are_asked_for(empty):
    empty.compile(compiler_options={"xla_cpu_enable_fast_min_max": True})
    assert "step.d2.p0.greedy" in empty.load()
    expect_mismatch(empty, "compiler_options", "xla_cpu_enable_fast_min_max", "other options", compiler_options={})


def test_jax_options(checkpoint):
    with jax.default_matmul_precision("highest"):
        expect_mismatch(checkpoint, "jax_options", '"highest"', "JAX is configured otherwise")


def test_all_differences_are_listed_at_once(checkpoint):
    stored(checkpoint, "jax", "0.11.1")
    with pytest.raises(MismatchError) as caught:
        checkpoint.load(identity={"plan_hash": "p2", "config_hash": "c1", "source_hash": "s1", "kv_slots": 64})
    assert [line.split(":")[0] for line in str(caught.value).splitlines()[1:-1]] == ["  jax", "  plan_hash"]


def test_bucket(checkpoint):
    wanted = {"step.d2.p0.greedy": {"decode_rows": 2, "prompt_tokens": 64, "variant": "greedy"}}
    with pytest.raises(MismatchError, match=r"unit step.d2.p0.greedy, prompt_tokens: compiled for 0, here 64"):
        checkpoint.load(units=wanted)


def test_unit_that_was_not_compiled(checkpoint):
    with pytest.raises(ExecutableError, match=r"has no unit step.d8.p0.greedy; it has step.d2.p0.greedy, step.d4"):
        checkpoint.load(units={"step.d8.p0.greedy": {}})


def test_truncated_blob(checkpoint):
    size = checkpoint.blob().stat().st_size
    os.truncate(checkpoint.blob(), size - 7)
    with pytest.raises(ExecutableError, match=rf"d2.p0.greedy.xla has {size - 7} bytes, the manifest says {size}.*cut"):
        checkpoint.load()


def test_flipped_byte(checkpoint):
    content = bytearray(checkpoint.blob().read_bytes())
    content[len(content) // 2] ^= 1
    checkpoint.blob().write_bytes(content)
    with pytest.raises(ExecutableError, match=r"d2.p0.greedy.xla is damaged: its sha256 is"):
        checkpoint.load()


def test_missing_blob(checkpoint):
    checkpoint.blob().unlink()
    with pytest.raises(ExecutableError, match=r"d2.p0.greedy.xla is in the manifest but cannot be read: No such file"):
        checkpoint.load()


def test_missing_store(empty):
    with pytest.raises(ExecutableError, match=r"no compiled executables at .*elastic-jax compile DIR --mode M"):
        empty.load()


def test_missing_manifest(checkpoint):
    (checkpoint.folder / MANIFEST).unlink()
    with pytest.raises(ExecutableError, match=r"has no manifest.json: it is not a complete executable store"):
        checkpoint.load()


def test_malformed_manifest(checkpoint):
    (checkpoint.folder / MANIFEST).write_text('{"format": 1, "iden')
    with pytest.raises(ExecutableError, match=r"manifest.json is not a manifest: .*elastic-jax compile"):
        checkpoint.load()


def test_manifest_of_a_later_format(checkpoint):
    checkpoint.edit_manifest(lambda manifest: manifest.update(format=2))
    with pytest.raises(ExecutableError, match=r"has format 2, this version reads format 1: compile again, or use"):
        checkpoint.load()


def test_verify_finds_nothing_in_a_good_store(checkpoint):
    identity = full_identity(
        {"plan_hash": "p1", "config_hash": "c1", "source_hash": "s1", "kv_slots": 64}, Target.of(jax.devices()[0]), {}
    )
    assert verify(checkpoint.folder) == []
    assert verify(checkpoint.folder, identity=identity) == []


def test_verify_names_every_problem(checkpoint):
    checkpoint.blob("step.d2.p0.greedy").unlink()
    os.truncate(checkpoint.blob("step.d4.p0.greedy"), 10)
    (checkpoint.folder / "stranger.xla").write_bytes(b"")
    problems = verify(checkpoint.folder, identity={})
    assert any("step.d2.p0.greedy.xla is in the manifest" in problem for problem in problems)
    assert any("step.d4.p0.greedy.xla has 10 bytes" in problem for problem in problems)
    assert any("['stranger.xla']" in problem for problem in problems)
    assert any(problem.startswith("plan_hash:") for problem in problems)


def test_verify_of_no_store(empty):
    (problem,) = verify(empty.folder)
    assert problem.startswith("no compiled executables at")


def test_verify_loads_no_executable(checkpoint, monkeypatch):
    monkeypatch.setattr("aot_cache.payload.from_bytes", lambda *_, **__: pytest.fail("a blob was opened"))
    checkpoint.blob().write_bytes(b"")
    assert len(verify(checkpoint.folder)) == 1


def test_fresh_process_runs_with_tracing_forbidden(checkpoint):
    """Loading and running in a process that may not compile causes no compile event."""
    program = f"""
        import json, pathlib
        from aot_cache.guard import CompileCounter, forbid_compilation
        counter = CompileCounter()
        forbid_compilation()
        import jax, numpy as np
        from aot_cache.store import load
        device = jax.devices()[0]
        identity = {{"plan_hash": "p1", "config_hash": "c1", "source_hash": "s1", "kv_slots": 64}}
        executables = load(pathlib.Path({str(checkpoint.folder)!r}), identity, device, workers=2, trust=False, hint="",
                           units=None, root=pathlib.Path({str(checkpoint.root)!r}))
        values = [np.ones((32, 16), np.int8), np.full((2, 16), 2, np.int8), np.zeros(64, np.float32), np.int32(5)]
        counts = jax.device_put(values[2], device)
        for _ in range(3):
            total, counts = executables["step.d2.p0.greedy"](values[0], values[1], counts, values[3])
        print(json.dumps([np.asarray(total).tolist(), np.asarray(counts).tolist(), counter.events()]))
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    total, counts, events = json.loads(result.stdout)
    assert total == [[160] * 32] * 2
    assert counts == [3.0] * 64
    assert events == {}
