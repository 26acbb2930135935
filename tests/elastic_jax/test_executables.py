"""Everything that can be wrong with a mode's executables, as the one who loads it is told; and what compiling mends."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from tiny import MISTRAL_SMALL, CompiledTiny, tiny_step_config

from aot_cache.guard import CompileCounter
from elastic_jax import ElasticMistral, executables, pools
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.errors import ConfigError, ExecutableError, MemoryPlanError, MismatchError, PlanError, TrustError
from elastic_jax.executables import ModeStore, default_step_config, store_folders
from elastic_jax.loading import usable_pool
from elastic_jax.step import Bucket, StepConfig


@pytest.fixture
def folder(compiled_tiny: Callable[..., CompiledTiny], tmp_path: Path) -> Path:
    """A copy of a checkpoint with executables for mode XL in float32 and one pool, to be spoilt."""
    compiled = compiled_tiny("XL", "float32")
    # Other test processes may be compiling other modes into it, in hidden folders.
    modes = {path.name for path in compiled.checkpoint.path.glob("executables/*/*")}
    copy = tmp_path / "tiny.elastic"
    shutil.copytree(
        compiled.checkpoint.path, copy, ignore=shutil.ignore_patterns(*(modes - {"XL.float32"}), ".*.partial", ".*.old")
    )
    return copy


@pytest.fixture
def store(folder: Path) -> Path:
    """The only store of the copy."""
    (found,) = store_folders(folder)
    return found


def load(folder: Path, **options: Any) -> ElasticMistral:
    return ElasticMistral.load(folder, "XL", **({"dtype": "float32", "workers": 2} | options))


def mode_store(folder: Path) -> ModeStore:
    checkpoint = Checkpoint.open(folder)
    return ModeStore(checkpoint, checkpoint.plan("XL"), "float32", jax.devices()[0])


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def blob(store: Path) -> Path:
    return store / "step.d0.p16.greedy.xla"


def test_an_undamaged_copy_loads(folder: Path) -> None:
    assert load(folder).generate([5], max_new_tokens=2).token_ids


def test_cpu_units_keep_every_rounding(store: Path) -> None:
    """Else what a token's neighbours are would decide which roundings XLA leaves out."""
    identity = json.loads((store / "manifest.json").read_text())["identity"]
    assert identity["compiler_options"] == {"xla_allow_excess_precision": False}


def test_no_executables_at_all(folder: Path, store: Path) -> None:
    shutil.rmtree(store)
    with pytest.raises(ExecutableError) as refused:
        load(folder)
    assert f"no compiled executables at {store.parent}" in str(refused.value)
    assert f"elastic-jax compile {folder} --mode XL --dtype float32" in str(refused.value)
    assert 'on_missing="compile"' in str(refused.value)


def test_another_compute_type_has_executables_of_its_own(folder: Path) -> None:
    with pytest.raises(ExecutableError, match="no compiled executables") as refused:
        load(folder, dtype=None)
    assert f"elastic-jax compile {folder} --mode XL  " in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax", "0.0.1"),
        ("jaxlib", "0.0.1"),
        ("device_kind", "abacus"),
        ("processor_features", ["mmx"]),
        ("package", "0.0.0"),
        ("plan_hash", "0" * 64),
        ("config_hash", "0" * 64),
        ("source_hash", "0" * 64),
        ("xla_flags", ["--xla_cpu_use_thunk_runtime=false"]),
    ],
)
def test_what_was_made_for_something_else_is_refused(folder: Path, store: Path, name: str, value: Any) -> None:
    edit(store / "manifest.json", lambda manifest: manifest["identity"].update({name: value}))
    with pytest.raises(MismatchError) as refused:
        load(folder)
    message = str(refused.value)
    assert message.count("\n") == 2, "one difference"
    assert f"elastic-jax compile {folder} --mode XL --dtype float32" in message


def test_executables_of_another_plan_are_refused(folder: Path) -> None:
    edit(folder / "plans" / "XL.json", lambda plan: plan["choices"].update({"layers.0.qkv": "w8a16"}))
    with pytest.raises(MismatchError, match="plan"):
        load(folder)


def test_executables_of_another_model_are_refused(folder: Path) -> None:
    edit(folder / "elastic.json", lambda manifest: manifest["config"].update({"rope_theta": 5.0}))
    with pytest.raises(MismatchError, match="config"):
        load(folder)


def test_executables_of_other_sources_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executables, "traced_source_digest", lambda: "f" * 64)
    with pytest.raises(MismatchError, match="source"):
        load(folder)


@pytest.mark.parametrize("change", [{"kv_slots": 512}, {"rows": 3}, {"buckets": (Bucket(4, 0), Bucket(0, 16))}])
def test_executables_of_other_sizes_are_refused(folder: Path, store: Path, change: dict[str, Any]) -> None:
    step = tiny_step_config(**change)
    store.rename(store.with_name(f"kv{step.kv_slots}"))
    with pytest.raises(MismatchError, match=next(iter(change))):
        mode_store(folder).load(step, trust=False, workers=1, preload=True)


def test_a_store_in_the_folder_of_another_pool_is_refused(folder: Path, store: Path) -> None:
    store.rename(store.with_name("kv2048"))
    with pytest.raises(ExecutableError, match="describes a pool of 1024 slots"):
        load(folder)


def test_a_file_that_is_missing_cut_short_or_changed_is_named(folder: Path, store: Path) -> None:
    whole = blob(store).read_bytes()
    blob(store).write_bytes(whole[:-1])
    with pytest.raises(ExecutableError, match="cut short") as refused:
        load(folder)
    assert str(blob(store)) in str(refused.value)
    blob(store).write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    for preload in (True, False):
        with pytest.raises(ExecutableError, match="is damaged: its sha256"):
            load(folder, preload=preload)
    blob(store).unlink()
    with pytest.raises(ExecutableError, match="cannot be read"):
        load(folder)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"format": 99}'])
def test_a_manifest_that_is_missing_or_unreadable_is_named(folder: Path, store: Path, content: str | None) -> None:
    manifest = store / "manifest.json"
    manifest.unlink()
    if content is not None:
        manifest.write_text(content)
    with pytest.raises(ExecutableError, match=r"manifest\.json"):
        load(folder)


def test_a_manifest_without_sizes_is_refused(folder: Path, store: Path) -> None:
    edit(store / "manifest.json", lambda manifest: manifest["identity"].pop("kv_slots"))
    with pytest.raises(ExecutableError, match="does not describe a step") as refused:
        load(folder)
    assert "elastic-jax compile" in str(refused.value)


def test_what_others_may_have_written_needs_trust(folder: Path, store: Path) -> None:
    store.chmod(0o777)
    with pytest.raises(TrustError, match="trust=True"):
        load(folder)
    assert load(folder, trust=True).generate([5], max_new_tokens=1).token_ids


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_somebody_else_owns_needs_trust(folder: Path, store: Path) -> None:
    os.chown(blob(store), 12345, 12345)
    with pytest.raises(TrustError):
        load(folder)


# -- compiling instead -------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Lets nothing be compiled; holds the sizes that would have been."""
    sizes: list[Any] = []

    def compile_nothing(_: ModeStore, step: Any, **options: Any) -> None:
        del options
        sizes.append(step)

    monkeypatch.setattr(ModeStore, "compile", compile_nothing)
    return sizes


def sizes_for(folder: Path, max_context: int | None = None) -> list[str]:
    """What is said when executables are wanted, and compiling is allowed."""
    said: list[str] = []
    with contextlib.suppress(MismatchError):  # nothing was compiled after all
        usable_pool(mode_store(folder), "compile", kv_slots=None, max_context=max_context, workers=1, say=said.append)
    return said


def test_what_fits_is_not_compiled_again(folder: Path, compiled: list[Any]) -> None:
    assert sizes_for(folder) == sizes_for(folder, 256) == []
    assert compiled == []


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda store: edit(store / "manifest.json", lambda m: m["identity"].update(jax="0.0.1")), "do not fit"),
        (lambda store: blob(store).write_bytes(b"short"), "cut short"),
        (lambda store: blob(store).write_bytes(bytes(blob(store).stat().st_size)), "is damaged"),
        (lambda store: blob(store).unlink(), "cannot be read"),
    ],
)
def test_what_does_not_fit_or_is_damaged_is_compiled_again_in_its_size(
    folder: Path, store: Path, compiled: list[Any], spoil: Callable[[Path], Any], reason: str
) -> None:
    spoil(store)
    (said,) = sizes_for(folder)
    assert said.startswith("compiling mode XL for cpu-")
    assert reason in said
    assert [(step.kv_slots, step.max_context) for step in compiled] == [(1024, 256)]


def test_a_longer_context_is_compiled(folder: Path, compiled: list[Any]) -> None:
    with pytest.raises(Exception, match="257 was asked for"):  # nothing was compiled after all
        sizes_for(folder, 257)
    assert [(step.kv_slots, step.max_context) for step in compiled] == [(1024, 257)]


def test_compiling_is_said_and_serves_the_next_load(
    folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(store)
    monkeypatch.setitem(executables._BUCKETS, "cpu", (Bucket(1, 0), Bucket(0, 16)))
    said: list[str] = []
    model = load(folder, on_missing="compile", max_context=100, say=said.append)
    first = model.generate([5, 6, 7], max_new_tokens=6, ignore_end=True)
    assert "because there are no executables for it" in said[0]
    assert sum(line.startswith("compiled step.d0.p16.greedy in ") for line in said) == 1
    assert model.info()["max_context"] == 100
    with CompileCounter() as counter:
        again = load(folder)
        assert again.generate([5, 6, 7], max_new_tokens=6, ignore_end=True).token_ids == first.token_ids
    assert counter.count() == 0
    (stored,) = store_folders(folder)
    manifest = (stored / "manifest.json").read_text()
    edit(stored / "manifest.json", lambda manifest: manifest["identity"].update(jaxlib="0.0.1"))

    def compile_again(_: ModeStore, step: StepConfig, **__: Any) -> None:
        """To the same bytes, in no time."""
        assert step.max_context == 100
        (stored / "manifest.json").write_text(manifest)

    monkeypatch.setattr(ModeStore, "compile", compile_again)
    load(folder, on_missing="compile")
    assert "because those stored do not fit" in capsys.readouterr().err
    assert load(folder).info()["max_context"] == 100


# -- memory ------------------------------------------------------------------------------------------------------------


def test_a_load_that_cannot_fit_allocates_nothing_and_says_what_would(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = load(folder).memory
    small = needed.total - needed.weights // 4
    monkeypatch.setattr(pools, "available_memory", lambda _: small)
    monkeypatch.setattr(ModeStore, "load", lambda *_, **__: pytest.fail("something was loaded"))
    with pytest.raises(MemoryPlanError) as refused:
        load(folder)
    message = str(refused.value)
    assert "mode XL needs" in message
    # int8 weights take half of the memory in float32
    assert "mode L or M or S fits as it is" in message
    assert "compile it with --kv-slots" in message
    monkeypatch.setattr(pools, "available_memory", lambda _: 1000)
    with pytest.raises(MemoryPlanError, match="No mode of this checkpoint fits"):
        load(folder)


# -- default sizes -----------------------------------------------------------------------------------------------------


def test_default_sizes_serve_the_whole_context_of_a_model_within_the_pool() -> None:
    for platform in ("cpu", "gpu"):
        step = default_step_config(MISTRAL_SMALL, platform, "bfloat16", kv_slots=32768, max_context=None)
        assert step.max_context == min(step.kv_slots, MISTRAL_SMALL.max_position_embeddings)
        assert step.rows == max(bucket.generated for bucket in step.buckets)
    small = default_step_config(MISTRAL_SMALL, "cpu", "bfloat16", kv_slots=100, max_context=None)
    assert (small.kv_slots, small.max_context) == (128, 128)
    long = default_step_config(MISTRAL_SMALL, "cpu", "bfloat16", kv_slots=100000, max_context=100000)
    assert (long.kv_slots, long.max_context) == (100032, 100000)
    huge = default_step_config(MISTRAL_SMALL, "gpu", "bfloat16", kv_slots=262144, max_context=None)
    assert (huge.kv_slots, huge.max_context) == (262144, 131072)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="no step sizes are known for platform 'tpu'"):
        default_step_config(MISTRAL_SMALL, "tpu", "bfloat16", kv_slots=64, max_context=None)
    with pytest.raises(ConfigError, match="131073 is more than the 131072 positions"):
        default_step_config(MISTRAL_SMALL, "cpu", "bfloat16", kv_slots=262144, max_context=131073)
    with pytest.raises(ConfigError, match="more than the pool's kv_slots"):
        default_step_config(MISTRAL_SMALL, "cpu", "bfloat16", kv_slots=64, max_context=128)


def test_a_plan_for_another_model_is_refused(folder: Path) -> None:
    edit(folder / "plans" / "XL.json", lambda plan: plan["choices"].pop("lm_head"))
    with pytest.raises(PlanError, match="lm_head"):
        load(folder)


def test_stores_are_found_whole_or_not_but_not_while_they_are_written(folder: Path, store: Path) -> None:
    (store.parent / ".kv64.partial").mkdir()
    (store.parent / "kv64").mkdir()
    assert [path.name for path in store_folders(folder)] == ["kv1024", "kv64"]
    shutil.rmtree(folder / "executables")
    assert store_folders(folder) == []
