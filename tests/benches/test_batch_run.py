import dataclasses

import numpy as np
import pytest
from batch_run import dry_run, run_batch, slots_of
from fake_runner import FakeRunner
from latency_rows import SAMPLED, Cell
from tiny import MISTRAL_SMALL, tiny_step_config

from elastic_jax.engine import Engine
from elastic_jax.executables import default_step_config
from elastic_jax.requests import SamplingParams
from elastic_jax.step import Bucket


def test_a_batch_is_timed_while_all_of_it_generates():
    step = tiny_step_config(max_context=128)
    engine = Engine(FakeRunner(step), step.max_context)
    _, ahead = dry_run(MISTRAL_SMALL, step, Cell(4, 20))
    run, lead = run_batch(engine, np.random.default_rng(0), Cell(4, 20), new=10, ahead=ahead)
    assert len(run.first_s) == 4
    assert len(run.steps_s) == 9
    assert lead == ahead
    # Prompts of four sequences, then their leads and the mean of what the nine steps add.
    assert run.live_tokens >= 4 * (20 + 1 + 4)
    assert not engine.busy
    assert engine.pages.free == step.kv_slots // step.page_size


def test_rows_sample_as_they_are_told():
    step = tiny_step_config(max_context=128)
    runner = FakeRunner(step)
    told: list[SamplingParams] = []
    write = runner.sampling.set
    runner.sampling.set = lambda row, params, **more: (told.append(params), write(row, params, **more))
    sampled = SamplingParams(**SAMPLED)
    run_batch(Engine(runner, step.max_context), np.random.default_rng(0), Cell(2, 8), 3, 20, sampled)
    asked = [params for params in told if params.temperature]
    assert len(asked) >= 2
    assert {params.top_k for params in asked} == {50}


def test_a_sequence_that_ends_early_is_told():
    step = tiny_step_config(max_context=128)
    engine = Engine(FakeRunner(step), step.max_context)
    _, ahead = dry_run(MISTRAL_SMALL, step, Cell(4, 40))
    assert ahead > 0
    with pytest.raises(SystemExit, match="4x40"):
        run_batch(engine, np.random.default_rng(0), Cell(4, 40), new=2, ahead=-1)


def test_the_engine_itself_says_which_buckets_a_cell_takes():
    step = default_step_config(MISTRAL_SMALL, "gpu", "bfloat16", kv_slots=131072, max_context=131072)
    assert dry_run(MISTRAL_SMALL, step, Cell(1, 256)) == ({Bucket(0, 256), Bucket(1, 0)}, 0)
    buckets, ahead = dry_run(MISTRAL_SMALL, step, Cell(64, 1024))
    assert buckets == {Bucket(0, 4096), Bucket(64, 1024), Bucket(64, 0)}
    assert ahead == 60


@pytest.mark.parametrize("cell", [Cell(1, 256), Cell(8, 256), Cell(16, 1024), Cell(32, 256)])
def test_with_only_these_buckets_the_engine_takes_the_same_ones(cell: Cell):
    step = default_step_config(MISTRAL_SMALL, "gpu", "bfloat16", kv_slots=131072, max_context=131072)
    buckets, ahead = dry_run(MISTRAL_SMALL, step, cell)
    few = tuple(bucket for bucket in step.buckets if bucket in buckets | {Bucket(64, 0)})
    assert dry_run(MISTRAL_SMALL, dataclasses.replace(step, buckets=few), cell) == (buckets, ahead)


def test_slots_are_whole_pages_of_every_sequence():
    assert slots_of(Cell(2, 256), 100, 0, 64) == 2 * 384
