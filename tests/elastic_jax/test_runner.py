from collections.abc import Callable

import jax
import numpy as np
import pytest
from fake_runner import MODEL
from tiny import CompiledTiny, tiny_step_config

from elastic_jax.requests import SamplingParams
from elastic_jax.runner import BlockTables, Runner, SamplingTable
from elastic_jax.units import make_units

STEP = tiny_step_config()


@pytest.fixture
def table() -> SamplingTable:
    return SamplingTable(MODEL, STEP, jax.devices()[0])


def test_rows_begin_greedy_and_allow_everything(table: SamplingTable) -> None:
    inputs = table.on_device()
    assert np.asarray(inputs.temperature).tolist() == [0] * STEP.rows
    assert np.asarray(inputs.repetition_penalty).tolist() == [1] * STEP.rows
    assert np.asarray(inputs.top_p).tolist() == [1] * STEP.rows
    assert (np.asarray(inputs.allowed) == 0xFFFFFFFF).all()
    assert (np.asarray(inputs.bias_token) == MODEL.vocab_size).all()


def test_a_row_takes_over_every_parameter_and_no_other_row_does(table: SamplingTable) -> None:
    params = SamplingParams(
        temperature=0.5,
        top_k=10**12,
        top_p=0.25,
        min_p=0.125,
        repetition_penalty=2.0,
        presence_penalty=-1.0,
        frequency_penalty=1.5,
        logit_bias={7: 3.0, 9: -float("inf")},
    )
    table.set(2, params, choice=5)
    inputs = table.on_device()
    for name, value in (
        ("temperature", 0.5),
        ("top_k", MODEL.vocab_size),
        ("top_p", 0.25),
        ("min_p", 0.125),
        ("repetition_penalty", 2.0),
        ("presence_penalty", -1.0),
        ("frequency_penalty", 1.5),
        ("choice", 5),
    ):
        column = np.asarray(getattr(inputs, name))
        assert column[2] == value, name
        assert (np.delete(column, 2) == column[0]).all()
        assert column[0] != value
    assert np.asarray(inputs.bias_token)[2].tolist() == [7, 9] + [MODEL.vocab_size] * (STEP.max_bias - 2)
    assert np.asarray(inputs.bias)[2, :3].tolist() == [3.0, -float("inf"), 0.0]


def test_a_new_sequence_is_free_of_the_last_ones_grammar(table: SamplingTable) -> None:
    words = np.arange(32, dtype=np.uint32)
    table.allow(1, words)
    assert np.asarray(table.on_device().allowed)[1].tolist() == words.tolist()
    table.set(1, SamplingParams(), choice=0)
    assert (np.asarray(table.on_device().allowed) == 0xFFFFFFFF).all()


def test_only_what_changed_is_sent_again(table: SamplingTable) -> None:
    before = table.on_device()
    table.set(0, SamplingParams(temperature=0.5), choice=0)
    table.set(0, SamplingParams(temperature=0.5), choice=0)
    after = table.on_device()
    assert after.temperature is not before.temperature
    assert after.top_p is before.top_p
    assert after.allowed is before.allowed
    assert table.on_device().temperature is after.temperature


def test_what_was_sent_does_not_change_with_the_host(table: SamplingTable) -> None:
    before = table.on_device().temperature
    table.set(0, SamplingParams(temperature=0.5), choice=0)
    assert np.asarray(before)[0] == 0


def test_a_runner_knows_its_units(compiled_tiny: Callable[..., CompiledTiny]) -> None:
    compiled = compiled_tiny("XL", "float32")
    runner = compiled.runner()
    assert isinstance(runner, Runner)
    names = {unit.name for unit in make_units(compiled.config, compiled.plan, compiled.step)}
    assert set(runner.unit_names) == names


def test_the_state_given_to_a_step_is_taken_over(compiled_tiny: Callable[..., CompiledTiny]) -> None:
    """Donated: no second copy of the cache is ever made."""
    runner = compiled_tiny("XL", "float32").runner()
    caches = runner._kv
    runner.copy_page(0, 1)
    assert all(cache.is_deleted() for cache in caches)
    rows = runner._rows
    runner.admit(0, key=np.zeros(2, np.uint32), prompt_mask=np.zeros(10, np.uint32))
    assert all(row.is_deleted() for row in rows)


def test_block_tables_are_sent_only_when_they_change() -> None:
    tables, host = BlockTables(jax.devices()[0]), np.arange(6, dtype=np.int32).reshape(2, 3)
    first = tables.on_device(host)
    assert tables.on_device(host.copy()) is first
    host[1, 2] = 9
    assert np.asarray(first).tolist() == [[0, 1, 2], [3, 4, 5]], "what a step may still read stays as it was"
    second = tables.on_device(host)
    assert np.asarray(second).tolist() == [[0, 1, 2], [3, 4, 9]]
    assert tables.on_device(host) is second
