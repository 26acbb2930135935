"""Which pools are compiled, and which of those compiled are loaded."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from tiny import MISTRAL_SMALL, CompiledTiny

from aot_cache.manifest import Memory, read_manifest
from aot_cache.target_config import memory_bytes
from aot_cache.targets import find
from elastic_jax import ElasticMistral, loading, pools
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.checkpoint_format import Manifest, expected_folder
from elastic_jax.errors import ConfigError, ExecutableError, MemoryPlanError, MismatchError, RequestError
from elastic_jax.executables import ModeStore, default_step_config, store_folders
from elastic_jax.groups import model_groups
from elastic_jax.memory import estimated_workspace, plan_memory
from elastic_jax.plan import provisional_plans
from elastic_jax.pools import LADDER, choose_pool, default_pool
from elastic_jax.step import Bucket
from elastic_jax.units import START
from elastic_jax.weights import abstract_weights

GIB = 1 << 30
ALLOTTED = {name: int(0.75 * size) for name, size in {"h200": 150109880320, "h100": 84942979072, "l40s": 48e9}.items()}


# -- which are compiled ------------------------------------------------------------------------------------------------


@pytest.fixture
def small_24b(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """A checkpoint of the 24B shape without any weights."""
    names = [("embedding", "bf16"), ("norms", "bf16")]
    names += [(group, precision) for group in model_groups(MISTRAL_SMALL) for precision in ("int8", "bf16")]
    folders = {name: expected_folder(MISTRAL_SMALL, *name, blocks=1, files={}) for name in names}
    checkpoint = Checkpoint(tmp_path, Manifest(MISTRAL_SMALL, folders, {}, {}, {}), home=tmp_path)
    monkeypatch.setattr(Checkpoint, "plans", lambda _: provisional_plans(MISTRAL_SMALL))
    return checkpoint


def pool_for(checkpoint: Checkpoint, mode: str, available: int | None, max_context: int | None = None) -> int:
    plan = provisional_plans(MISTRAL_SMALL)[mode]
    return default_pool(checkpoint, plan, "bfloat16", "gpu", available=available, max_context=max_context)


@pytest.mark.parametrize(
    ("target", "mode", "slots"),
    [
        ("h200", "XL", 131072),
        ("h200", "S", 131072),
        ("h100", "XL", 65536),
        ("h100", "S", 131072),
        ("l40s", "S", 32768),
        ("l40s", "M", 32768),
    ],
)
def test_mistral_small_gets_the_largest_pool_that_a_gpu_holds(
    small_24b: Checkpoint, target: str, mode: str, slots: int
) -> None:
    assert pool_for(small_24b, mode, ALLOTTED[target]) == slots


def test_the_memory_of_gpus_that_are_not_here_is_known() -> None:
    for name, allotted in ALLOTTED.items():
        assert int(0.75 * memory_bytes(find(name).config, source=name)) == allotted


def test_a_mode_that_fits_no_pool_is_refused_with_those_that_do(small_24b: Checkpoint) -> None:
    with pytest.raises(MemoryPlanError) as refused:
        pool_for(small_24b, "XL", ALLOTTED["l40s"])
    message = str(refused.value)
    assert "mode XL needs about" in message
    assert "with a KV pool of 8192 tokens (43.91 GiB weights, 1.25 GiB KV cache" in message
    assert "What fits: mode L or M or S; or name a pool with --kv-slots" in message
    with pytest.raises(MemoryPlanError, match="No mode of this checkpoint fits"):
        pool_for(small_24b, "S", 10 * GIB)


def test_a_pool_holds_the_longest_context_that_is_wanted(small_24b: Checkpoint) -> None:
    assert pool_for(small_24b, "S", None, 32768) == 131072
    assert pool_for(small_24b, "S", ALLOTTED["l40s"], 32768) == 32768
    with pytest.raises(MemoryPlanError, match="KV pool of 65536 tokens"):
        pool_for(small_24b, "S", ALLOTTED["l40s"], 32769)
    with pytest.raises(ConfigError, match="131073 is more than the 131072 positions"):
        pool_for(small_24b, "S", None, 131073)


def test_the_largest_pool_holds_the_whole_context_of_mistral_small() -> None:
    assert LADDER[0] == MISTRAL_SMALL.max_position_embeddings
    assert list(LADDER) == sorted(LADDER, reverse=True)


def test_the_estimate_of_workspace_covers_what_xla_reported() -> None:
    # Of Mistral-Small for an H200, jax 0.11.2: the largest step in modes S and XL.
    step = default_step_config(MISTRAL_SMALL, "gpu", "bfloat16", kv_slots=131072, max_context=None)
    estimate = estimated_workspace(MISTRAL_SMALL, step)
    for outputs, aliased, temporaries in (
        (21543006168, 21509440512, 1333790736),
        (21543006168, 21509440512, 1551935760),
    ):
        reported = Memory(0, outputs, aliased, temporaries, 0)
        assert reported.workspace < estimate.workspace - estimate.code < 1.4 * reported.workspace


def test_a_cpu_s_pool_does_not_depend_on_its_memory(small_24b: Checkpoint) -> None:
    plan = provisional_plans(MISTRAL_SMALL)["XL"]

    def slots(max_context: int | None) -> int:
        return default_pool(small_24b, plan, "bfloat16", "cpu", available=1, max_context=max_context)

    assert (slots(None), slots(100), slots(100_000)) == (16384, 16384, 100_032)


# -- which is loaded ---------------------------------------------------------------------------------------------------


def edit(manifest: Path, **changes: Any) -> None:
    values = json.loads(manifest.read_text())
    values["identity"].update(changes)
    manifest.write_text(json.dumps(values))


@pytest.fixture
def folder(compiled_tiny: Callable[..., CompiledTiny], tmp_path: Path) -> Path:
    """A copy of a checkpoint whose mode XL in float32 seems to be compiled for pools of 2048, 1024 and 512 tokens."""
    source = compiled_tiny("XL", "float32").checkpoint.path
    copy = tmp_path / "tiny.elastic"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("executables"))
    store = ModeStore(Checkpoint.open(source), Checkpoint.open(source).plan("XL"), "float32", jax.devices()[0])
    for slots in (512, 1024, 2048):
        target = mode_store(copy).pool_folder(slots)
        shutil.copytree(store.pool_folder(1024), target)
        edit(target / "manifest.json", kv_slots=slots, max_context=slots // 4)
    return copy


def mode_store(folder: Path) -> ModeStore:
    checkpoint = Checkpoint.open(folder)
    return ModeStore(checkpoint, checkpoint.plan("XL"), "float32", jax.devices()[0])


def chosen(folder: Path, *, kv_slots: int | None = None, max_context: int | None = None) -> tuple[int, list[str]]:
    said: list[str] = []
    pool = choose_pool(mode_store(folder), kv_slots=kv_slots, max_context=max_context, say=said.append)
    assert pool.memory.kv == pool.step.kv_slots * pool.memory.kv_token
    return pool.step.kv_slots, said


def needs(folder: Path, slots: int) -> int:
    store = mode_store(folder)
    weights = abstract_weights(store.checkpoint.config, store.plan, store.dtype)
    step = store.stored_step(slots)
    return plan_memory(store.checkpoint.config, weights, step, store.memory(slots).values()).total


def test_the_largest_is_chosen_without_a_word(folder: Path) -> None:
    assert mode_store(folder).pools == [2048, 1024, 512]
    assert chosen(folder) == (2048, [])


def test_the_state_is_counted_once(folder: Path) -> None:
    """As KV cache and rows, and not as what the unit that makes it returns."""
    store = mode_store(folder)
    units = read_manifest(store.pool_folder(2048), hint="").units
    assert units[START].memory.workspace > 0
    assert set(store.memory(2048)) == set(units) - {START}


def test_less_memory_means_a_smaller_pool_and_that_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "available_memory", lambda _: needs(folder, 2048))
    assert chosen(folder) == (2048, [])
    monkeypatch.setattr(pools, "available_memory", lambda _: needs(folder, 2048) - 1)
    slots, (said,) = chosen(folder)
    assert slots == 1024
    assert "using a KV pool of 1024 tokens; the one of 2048 that is compiled too needs" in said
    monkeypatch.setattr(pools, "available_memory", lambda _: needs(folder, 512) - 1)
    with pytest.raises(MemoryPlanError, match="compile it with --kv-slots 496"):
        chosen(folder)


def test_a_context_that_only_larger_pools_hold_takes_one_of_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "available_memory", lambda _: needs(folder, 1024))
    assert chosen(folder, max_context=256)[0] == 1024
    with pytest.raises(MemoryPlanError):
        chosen(folder, max_context=512)
    with pytest.raises(RequestError, match="513 was asked for, and the executables were compiled for up to 512"):
        chosen(folder, max_context=513)


def test_a_pool_that_is_named_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(folder, kv_slots=512) == (512, [])
    assert chosen(folder, kv_slots=1000) == (1024, []), "pools have whole pages"
    with pytest.raises(ExecutableError, match=r"not compiled for a KV pool of 4096 tokens; .*\[2048, 1024, 512\]"):
        chosen(folder, kv_slots=4096)
    monkeypatch.setattr(pools, "available_memory", lambda _: needs(folder, 512))
    with pytest.raises(MemoryPlanError):
        chosen(folder, kv_slots=1024)


def test_a_store_for_something_else_is_passed_over_and_that_is_said(folder: Path) -> None:
    edit(mode_store(folder).pool_folder(2048) / "manifest.json", jax="0.0.1")
    slots, (said,) = chosen(folder)
    assert slots == 1024
    assert "the executables for a KV pool of 2048 tokens are not used" in said
    assert "0.0.1" in said
    for slots in (1024, 512):
        edit(mode_store(folder).pool_folder(slots) / "manifest.json", jax="0.0.1")
    with pytest.raises(MismatchError, match="kv2048"):
        chosen(folder)


def test_a_loaded_model_tells_its_pool_and_those_compiled(folder: Path) -> None:
    model = ElasticMistral.load(folder, "XL", dtype="float32", kv_slots=1024, workers=2, preload=False)
    info = json.loads(json.dumps(model.info()))
    assert info["kv_capacity_tokens"] == 1024
    assert info["kv_pools_compiled"] == [2048, 1024, 512]
    assert info["max_context"] == 256
    assert model.generate([5], max_new_tokens=2).token_ids
    assert list(info["loading"])[-1] == "total"
    assert {"device", "plan", "executables", "weights", "tokenizer", "state"} < set(info["loading"])
    assert info["loading"]["weights"]["bytes"] > 0


# -- compiling what is loaded ------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets nothing be compiled; holds the pools that would have been."""
    slots: list[int] = []
    monkeypatch.setattr(ModeStore, "compile", lambda _, step, **__: slots.append(step.kv_slots))
    return slots


def usable(folder: Path, **options: Any) -> Any:
    defaults: dict[str, Any] = {"kv_slots": None, "max_context": None, "workers": 1, "say": lambda _: None}
    return loading.usable_pool(mode_store(folder), "compile", **(defaults | options))


def test_a_pool_that_is_named_is_compiled(folder: Path, compiled: list[int]) -> None:
    with pytest.raises(ExecutableError, match="not compiled for a KV pool of 4000 tokens"):  # nothing was compiled
        usable(folder, kv_slots=4000)
    assert compiled == [4032]


def test_where_no_compiled_pool_fits_one_that_does_is_compiled(
    folder: Path, compiled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(pools, "available_memory", lambda _: needs(folder, 512) - 1)
    monkeypatch.setattr(loading, "default_pool", lambda *_, **__: 256)
    with pytest.raises(MemoryPlanError):
        usable(folder, say=said.append)
    assert compiled == [256]
    assert "because mode XL needs" in said[0]


def test_sizes_must_be_positive(folder: Path) -> None:
    for name in ("kv_slots", "max_context"):
        with pytest.raises(RequestError, match=f"{name} must be at least 1"):
            usable(folder, **{name: 0})


def test_pools_are_compiled_side_by_side_and_give_the_same(
    compiled_tiny: Callable[..., CompiledTiny], folder: Path
) -> None:
    shutil.rmtree(mode_store(folder).folder)
    store = mode_store(folder)
    source = ModeStore(compiled_tiny("XL", "float32").checkpoint, store.plan, "float32", store.device)
    shutil.copytree(source.pool_folder(1024), store.pool_folder(1024))
    step = dataclasses.replace(source.stored_step(1024), kv_slots=128, max_context=128, rows=1)
    store.compile(dataclasses.replace(step, buckets=(Bucket(1, 0), Bucket(0, 16))), workers=2, progress=lambda *_: None)
    assert sorted(path.name for path in store_folders(folder)) == ["kv1024", "kv128"]
    tokens = [
        ElasticMistral.load(folder, "XL", dtype="float32", kv_slots=slots, workers=2, preload=False)
        .generate([5, 6, 7], max_new_tokens=5, ignore_end=True)
        .token_ids
        for slots in (1024, 128)
    ]
    assert tokens[0] == tokens[1]
