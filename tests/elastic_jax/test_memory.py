import pathlib
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from fake_runner import MODEL
from tiny import MISTRAL_SMALL, tiny_step_config

from aot_cache.manifest import Memory
from elastic_jax import memory
from elastic_jax.errors import MemoryPlanError
from elastic_jax.executables import default_step_config
from elastic_jax.memory import MemoryPlan, available_memory, check_memory, gib, plan_memory
from elastic_jax.plan import provisional_plans
from elastic_jax.weights import abstract_weights

GIB = 1 << 30
PLAN = MemoryPlan(weights=10 * GIB, kv=4 * GIB, rows=GIB, workspace=GIB, kv_token=1 << 20)


def check(available: int | None, **others: int) -> None:
    check_memory(PLAN, available, mode="M", alternatives={"M": 10 * GIB, **others}, page_size=64)


def test_a_plan_adds_up_what_the_arrays_take() -> None:
    step = tiny_step_config(kv_slots=64, max_context=64, page_size=16, rows=4)
    weights = abstract_weights(MODEL, provisional_plans(MODEL)["XL"], "float32")
    units = [Memory(100, 50, 20, 7, 1000), Memory(100, 10, 0, 5, 500)]
    plan = plan_memory(MODEL, weights, step, units)
    # keys and values of 64 slots; last token, position, key, counts, prompt mask of 4 rows
    assert plan.kv == 64 * 2 * 8 * 4
    assert plan.kv_token == 2 * 8 * 4
    assert plan.rows == 4 * (4 + 4 + 8 + 1000 * 4 + 32 * 4)
    # one call at a time, but the code of every unit
    assert plan.workspace == (50 - 20 + 7) + 1500
    assert plan.weights == sum(leaf.size * 4 for leaf in jax.tree.leaves(weights))
    assert plan.total == plan.weights + plan.kv + plan.rows + plan.workspace


def test_the_24b_model_needs_what_its_shape_says() -> None:
    plans = provisional_plans(MISTRAL_SMALL)
    step = default_step_config(MISTRAL_SMALL, "gpu", "bfloat16", kv_slots=131072, max_context=None)
    xl, s = (
        plan_memory(MISTRAL_SMALL, abstract_weights(MISTRAL_SMALL, plans[m], "bfloat16"), step, []) for m in ("XL", "S")
    )
    assert xl.kv_token == s.kv_token == 160 << 10
    assert 46e9 < xl.weights < 48e9
    assert 24e9 < s.weights < 25e9


def test_what_fits_passes_and_an_unknown_limit_too() -> None:
    check(PLAN.total)
    check(None)


def test_what_does_not_fit_says_what_would() -> None:
    with pytest.raises(MemoryPlanError) as refused:
        check(PLAN.total - 1, S=5 * GIB, XL=20 * GIB)
    message = str(refused.value)
    assert (
        "mode M needs 16.00 GiB (10.00 GiB weights, 4.00 GiB KV cache, 1.00 GiB row state, 1.00 GiB workspace)"
        in message
    )
    assert "mode S fits as it is" in message
    assert "XL" not in message
    # 4 GiB less one byte is not 4096 whole tokens, and a pool has whole pages
    assert "compile it with --kv-slots 4032" in message


def test_a_device_too_small_for_any_mode_is_told_so() -> None:
    with pytest.raises(MemoryPlanError, match="No mode of this checkpoint fits on this device"):
        check(2 * GIB, S=5 * GIB)


def test_a_pool_of_less_than_a_page_is_no_advice() -> None:
    with pytest.raises(MemoryPlanError) as refused:
        check(12 * GIB + (63 << 20))
    assert "--kv-slots" not in str(refused.value)


def test_this_machine_says_what_it_has() -> None:
    available = available_memory(jax.devices("cpu")[0])
    assert available is not None
    assert 1 << 20 < available < 1 << 50


@pytest.mark.usefixtures("unchecked_types")
def test_a_gpu_is_asked_for_its_own() -> None:
    def gpu(statistics: Any) -> Any:
        return SimpleNamespace(platform="gpu", device_kind="x", id=0, client=None, memory_stats=lambda: statistics)

    assert available_memory(gpu({"bytes_limit": 100, "bytes_in_use": 30})) == 70
    assert available_memory(gpu(None)) is None


@pytest.mark.usefixtures("unchecked_types")
def test_a_gpu_that_is_not_here_has_what_jax_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> Any:
        raise jax.errors.JaxRuntimeError("MemoryStats is only supported for addressable PjRt devices.")

    monkeypatch.setattr(memory, "memory_bytes", lambda _: 80_000)
    gpu: Any = SimpleNamespace(platform="gpu", device_kind="x", id=0, client=None, memory_stats=absent)
    assert available_memory(gpu) == 60_000


@pytest.mark.parametrize(("limit", "expected"), [("1000", 1000 - (700 - 200 - 300)), ("max", None)])
def test_cached_files_of_a_container_count_as_free(tmp_path: pathlib.Path, limit: str, expected: int | None) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 200\ninactive_file 200\nactive_file 300\n")
    if expected is None:
        with pytest.raises(ValueError, match="max"):
            memory._available_in_group(tmp_path)
    else:
        assert memory._available_in_group(tmp_path) == expected


def test_gib_is_for_people() -> None:
    assert gib(3 * GIB // 2) == "1.50 GiB"
