import dataclasses
import json
import re
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import kernels_bench as kernels
import numpy as np
import pytest
from kernel_case import LAST, Case, Place, Random, difference, fraction
from kernel_cases_quantize import rounding_error
from kernel_cases_sampling import choice_error
from random_model import MISTRAL_SMALL, SMALL

LIMITS = {"read": 4e12, "int8": 1e15, "bf16": 5e14}
GPU: Any = SimpleNamespace(platform="gpu", compute_capability="9.0", core_count=132)
CPU: Any = SimpleNamespace(platform="cpu")


def gpu_cases(**changes: Any) -> list[Case]:
    return kernels.cases_of(Place.of(GPU, MISTRAL_SMALL, **{"references": False} | changes), None)


def cpu_cases(only: str) -> list[Case]:
    return kernels.cases_of(Place.of(CPU, SMALL, references=False), [only])


def case(read: int, operations: int) -> Case:
    return dataclasses.replace(cpu_cases("sampling")[0], read_bytes=read, operations=operations, arithmetic="int8")


@pytest.mark.parametrize(
    ("read", "operations", "bound", "part"),
    [(4 * 10**9, 10**11, "reading", 0.5), (4 * 10**6, 10**12, "int8", 0.5)],
)
def test_the_longer_of_two_times_is_the_limit(read: int, operations: int, bound: str, part: float):
    assert fraction(case(read, operations), 2e-3, LIMITS) == (bound, pytest.approx(part))


# -- which cases there are ---------------------------------------------------------------------------------------------


def test_gpus_get_what_is_the_default_there_and_cpus_the_plain_ones():
    ships = gpu_cases()
    assert {c.kernel for c in ships} == set(kernels.TABLE)
    assert {(c.kernel, c.implementation) for c in ships} == {
        ("decode_layer", "cuda"),
        ("decode_head", "cuda"),
        ("integer_dot", "pallas"),
        ("integer_dot", "cuda"),
        ("bf16_dot", "xla"),
        ("bf16_dot", "cuda"),
        ("quantize", "pallas"),
        ("attention", "pallas"),
        ("sampling", "cuda"),
    }
    assert {c.implementation for name in kernels.TABLE for c in cpu_cases(name)} == {"xla"}
    assert {c.kernel for name in kernels.TABLE for c in cpu_cases(name)} == set(kernels.TABLE)


def test_many_rows_on_hopper_are_the_kernel_in_cuda_and_elsewhere_pallas():
    def by(device: Any) -> dict[str, str]:
        place = Place.of(device, MISTRAL_SMALL, references=False)
        return {c.work: c.implementation for c in kernels.cases_of(place, ["integer_dot"])}

    assert by(GPU)["down [5120 x 32768] added, 4096 rows"] == "cuda"
    assert by(GPU)["down [5120 x 32768] added w8a8b, 4096 rows"] == "cuda"
    assert by(GPU)["down [5120 x 32768], 128 rows"] == "pallas"
    ampere: Any = SimpleNamespace(platform="gpu", compute_capability="8.0", core_count=108)
    assert set(by(ampere).values()) == {"pallas"}


def test_references_come_only_when_asked_for_and_last():
    plain = {c.name for c in gpu_cases()}
    more = [c for c in gpu_cases(references=True) if c.name not in plain]
    assert {c.implementation for c in more} == {"xla"}
    assert {c.turn for c in more} == {LAST}
    # Steps that only generate have kernels of their own, and the reference of a prompt's attention takes seconds.
    assert {c.kernel for c in more} == set(kernels.TABLE) - {"attention"}


def test_names_are_distinct_and_every_kernel_is_among_the_first():
    cases = gpu_cases(references=True)
    assert len({c.name for c in cases}) == len(cases)
    turns = [c.turn for c in kernels.in_turn(cases)]
    assert turns == sorted(turns)
    assert {c.kernel for c in kernels.in_turn(cases)[:40]} == set(kernels.TABLE)


def test_bytes_and_operations():
    found = {(c.kernel, c.work): c for c in gpu_cases()}
    down = found["integer_dot", "down [5120 x 32768] added, 4096 rows"]
    assert (down.read_bytes, down.operations) == (5120 * 32768, 2 * 4096 * 5120 * 32768)
    weights = 6144 * 5120 + 5120 * 4096 + 65536 * 5120 + 5120 * 32768
    layer = found["decode_layer", "int8 at 256, 8 tokens"]
    assert layer.read_bytes == weights + 8 * 257 * 2 * 8 * 128 * 2
    assert layer.operations == 2 * 16 * weights
    assert found["decode_layer", "bf16 at 4096, 1 token"].read_bytes == 2 * weights + 4097 * 2 * 8 * 128 * 2
    assert found["decode_layer", "int8 at 4096 with int8 KV, 1 token"].read_bytes == weights + 4097 * 2 * 8 * 132
    assert found["sampling", "greedy of 131072, 16 rows"].read_bytes == 16 * 131072 * 4
    rounding = found["quantize", "[4096 x 5120] after a norm, w8a8b"]
    assert rounding.read_bytes == 4096 * 5120 * 3 + 4096 * 10 * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_numbers_are_no_zeros_and_differ_at_every_draw(dtype: str):
    random = Random(np.uint32(7))
    first, second = (np.asarray(random.normal((64, 1024), jnp.dtype(dtype)), np.float32) for _ in range(2))
    assert abs(first.mean()) < 0.02
    assert abs(first.std() - 1) < 0.02
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.02
    numbers = np.asarray(random.int8((64, 1024)), np.float32)
    assert (numbers.min(), numbers.max()) == (-64, 63)
    assert abs(numbers.std() - 37) < 0.2
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.02


# -- running them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(kernels.TABLE))
def test_a_case_of_each_kernel_is_checked_and_timed(name: str):
    row = kernels.Compiled(cpu_cases(name)[-1], "cpu").measure(LIMITS)
    assert row["us"] > 0
    assert row["kernel"] == name
    assert 0 <= row["error"] <= 0.03


def run(cases: list[Case], end: float = float("inf")) -> tuple[Any, list[Any]]:
    saved: list[Any] = []
    found = kernels.run(cases, "cpu", LIMITS, 1, end, lambda *state: saved.append(state))
    return found, saved


def broken(case: Case) -> Case:
    def call(*_: Any) -> Any:
        raise ValueError("cannot be traced")

    return dataclasses.replace(case, work=f"broken {case.work}", call=call)


def test_what_fails_is_recorded_and_the_others_are_measured():
    good = cpu_cases("sampling")[:2]
    (rows, failed, left), saved = run([broken(good[0]), *good])
    assert [row["work"] for row in rows] == [c.work for c in good]
    assert [entry["error"] for entry in failed] == ["ValueError: cannot be traced"]
    assert left == []
    assert len(saved) == 3  # after each case
    assert saved[0][2] == [c.name for c in good]


def test_a_wrong_kernel_is_no_row_and_the_others_are_measured():
    wrong, good = cpu_cases("integer_dot")[:2]
    reference = wrong.reference
    wrong = dataclasses.replace(wrong, reference=lambda *both: 1.01 * reference(*both))
    (rows, failed, _), _ = run([wrong, good])
    assert [row["work"] for row in rows] == [good.work]
    assert [entry["case"] for entry in failed] == [wrong.name]
    assert re.search(r"qkv.*wrong by", failed[0]["error"])


def test_nothing_begins_after_the_end():
    cases = cpu_cases("sampling")[:1]
    (rows, _, left), _ = run(cases, end=0)
    assert rows == []
    assert left == [cases[0].name]


@pytest.mark.slow  # measures a kernel's every case
def test_the_command_writes_what_it_measured(monkeypatch, tmp_path, capsys):
    out = tmp_path / "results" / "kernels.json"
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--small", "--only", "sampling", "--out", str(out)])
    monkeypatch.setattr(kernels, "read_limit", lambda _: 4e12)
    monkeypatch.setattr(kernels, "dot_limit", lambda *_: 1e15)
    with jax.numpy_dtype_promotion("standard"), pytest.raises(SystemExit) as end:
        kernels.main()
    assert end.value.code == 0
    result = json.loads(out.read_text())
    assert {row["kernel"] for row in result["rows"]} == {"sampling"}
    assert (result["failed"], result["left_out"], result["bench"]) == ([], [], "kernels")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["measured"] == len(result["rows"])


# -- errors ------------------------------------------------------------------------------------------------------------


def test_the_worst_leaf_counts_and_nan_is_never_allowed():
    exact = {"a": jnp.asarray([1.0, 2.0]), "b": jnp.asarray([100.0])}
    found = {"a": jnp.asarray([1.0, 1.9]), "b": jnp.asarray([101.0])}
    assert float(difference(found, exact)) == pytest.approx(0.05)
    assert not float(difference({**found, "b": jnp.asarray([jnp.nan])}, exact)) <= 1


def test_roundings_may_differ_rarely_and_by_one():
    plane, scale = jnp.zeros((10, 100), jnp.int8), jnp.ones((10, 1))
    assert float(rounding_error((plane.at[0, 0].set(1), scale), (plane, scale))) == pytest.approx(1e-3)
    assert float(rounding_error((plane.at[0, 0].set(2), scale), (plane, scale))) == 1
    assert float(rounding_error((plane, 1.5 * scale), (plane, scale))) == pytest.approx(0.5)


def test_another_token_is_wrong_however_near():
    token, log_probability, finite = jnp.asarray([5, 9], jnp.int32), jnp.asarray([-1.0, -2.0]), jnp.asarray([True] * 2)
    exact = token, log_probability, finite
    assert float(choice_error(exact, exact)) == 0
    assert float(choice_error((token.at[1].set(10), log_probability, finite), exact)) == 1
    assert float(choice_error((token, log_probability + 0.1, finite), exact)) == pytest.approx(0.1)


# -- for a GPU that is not there ---------------------------------------------------------------------------------------


@pytest.mark.slow  # traces dozens of programs
@pytest.mark.cuda_plugin
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_every_case_can_be_lowered_for_an_h100():
    from aot_cache.targets import absent_device, find

    device = absent_device(find("h100"))
    cases = kernels.cases_of(Place.of(device, MISTRAL_SMALL, references=False), None)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        texts = {c.name: kernels.lowered(c, device) for c in cases}
    assert all("custom_call" in text for name, text in texts.items() if not name.startswith("bf16_dot, xla"))
    assert "@elastic_prompt_dot" in texts["bf16_dot, cuda: gate_up [65536 x 5120] SwiGLU, 4096 rows"]
    assert "@elastic_prompt_dot" in texts["integer_dot, cuda: qkv [6144 x 5120], 4096 rows"]
    assert texts["decode_layer, cuda: bf16 at 256, 8 tokens"].count("@elastic_decode_layer") == 4
