from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_step_config

from elastic_jax.requests import GenerateRequest, SamplingParams, ScoreRequest
from elastic_jax.scheduler import Phase, Track, choose_bucket, pack
from elastic_jax.step import Bucket, StepConfig

DECODE = (Bucket(1, 0), Bucket(2, 0), Bucket(4, 0))
PROMPT = (Bucket(0, 16), Bucket(0, 64))


def choose(buckets: tuple[Bucket, ...], generating: int, prompt: int, *, prompt_turn: bool = True) -> Bucket | None:
    return choose_bucket(buckets, generating, prompt, prompt_turn=prompt_turn)


def test_nothing_to_do_needs_no_bucket() -> None:
    assert choose(DECODE + PROMPT, 0, 0) is None


@pytest.mark.parametrize(("generating", "expected"), [(1, 1), (2, 2), (3, 4), (4, 4)])
def test_generating_alone_takes_the_smallest_bucket_that_holds_all(generating: int, expected: int) -> None:
    assert choose(DECODE + PROMPT, generating, 0) == Bucket(expected, 0)


@pytest.mark.parametrize(("prompt", "expected"), [(1, 16), (16, 16), (17, 16), (32, 16), (33, 64), (64, 64), (500, 64)])
def test_prompts_take_the_bucket_that_wastes_least(prompt: int, expected: int) -> None:
    assert choose(DECODE + PROMPT, 0, prompt) == Bucket(0, expected)


def test_prompts_and_generation_take_turns_where_no_bucket_mixes_them() -> None:
    assert choose(DECODE + PROMPT, 2, 100, prompt_turn=True) == Bucket(0, 64)
    assert choose(DECODE + PROMPT, 2, 100, prompt_turn=False) == Bucket(2, 0)


def test_a_mixed_bucket_takes_both_if_it_holds_all_that_generate() -> None:
    buckets = (*DECODE, *PROMPT, Bucket(2, 16))
    for turn in (True, False):
        assert choose(buckets, 2, 5, prompt_turn=turn) == Bucket(2, 16)
    assert choose(buckets, 3, 5, prompt_turn=True) == Bucket(0, 16)
    assert choose(buckets, 3, 5, prompt_turn=False) == Bucket(4, 0)


def test_of_mixed_buckets_for_as_many_prompt_tokens_the_narrowest_is_taken() -> None:
    buckets = (*DECODE, *PROMPT, Bucket(2, 16), Bucket(4, 16), Bucket(4, 64))
    assert choose(buckets, 1, 5) == Bucket(2, 16)
    assert choose(buckets, 1, 20) == Bucket(2, 16)
    assert choose(buckets, 3, 20) == Bucket(4, 16)
    assert choose(buckets, 1, 40) == Bucket(4, 64)


def track(row: int, length: int, config: StepConfig, **changes: Any) -> Track:
    """A sequence in a row of its own; its pages run backwards from the row's share of the pool."""
    request = GenerateRequest(tuple(range(length)), 8, SamplingParams(), frozenset(), 1, None)
    share = config.kv_slots // config.page_size // config.rows
    pages = list(range(share * (row + 1) - 1, share * row - 1, -1))[: config.pages]
    values: dict[str, Any] = {"phase": Phase.PROMPT, "row": row, "pages": pages} | changes
    return Track(row, 0, values.pop("request", request), request.prompt, **values)


def slots_of(track: Track, positions: range, config: StepConfig) -> list[int]:
    return [track.pages[p // config.page_size] * config.page_size + p % config.page_size for p in positions]


def test_a_generated_token_names_its_row_slot_and_context() -> None:
    config = tiny_step_config()
    sequence = track(2, 20, config, phase=Phase.GENERATING, computed=21, dispatched=1)
    packed = pack(Bucket(4, 0), config, [sequence], [])
    assert packed.inputs.row.tolist() == [2, 4, 4, 4]
    assert packed.inputs.slot.tolist() == [*slots_of(sequence, range(21, 22), config), *[config.kv_slots] * 3]
    assert packed.inputs.context_length.tolist() == [0, 0, 22, 0]
    assert packed.inputs.block_table[2, : len(sequence.pages)].tolist() == sequence.pages
    assert packed.inputs.out_index.tolist() == [0, 4, 4, 4]
    assert (packed.outputs, packed.out_at) == ((sequence,), (0,))
    assert (sequence.computed, sequence.dispatched) == (22, 2)


def test_prompts_follow_each_other_in_order_and_the_last_is_cut() -> None:
    config = tiny_step_config()
    first, second, third = (track(row, length, config) for row, length in enumerate((3, 30, 60)))
    packed = pack(Bucket(0, 64), config, [], [first, second, third])
    chunks = [(c.track.row, c.start, c.count, c.at, c.last) for c in packed.chunks]
    assert chunks == [(0, 0, 3, 0, True), (1, 0, 30, 3, True), (2, 0, 31, 33, False)]
    assert packed.inputs.token.tolist() == packed.inputs.position.tolist() == [*range(3), *range(30), *range(31)]
    assert packed.inputs.row.tolist() == [0] * 3 + [1] * 30 + [2] * 31
    assert third.computed == 31
    assert packed.outputs == (first, second)
    assert packed.inputs.out_index[list(packed.out_at)].tolist() == [2, 32]


def test_a_prompt_whose_end_finds_no_output_waits() -> None:
    config = tiny_step_config()
    short = [track(row, 4, config) for row in range(4)]
    bucket = Bucket(0, 16)
    room = bucket.outputs(config.rows)
    packed = pack(bucket, config, [], short)
    assert len(packed.outputs) == min(room, 4)
    assert all(t.computed == 4 and t.dispatched == 1 for t in short[:room])
    assert all(t.computed == 0 and t.dispatched == 0 for t in short[room:])


def test_scores_want_no_output() -> None:
    config = tiny_step_config()
    request = ScoreRequest(tuple(range(4)), 1, 0)
    scores = [track(row, 4, config, request=request) for row in range(4)]
    packed = pack(Bucket(0, 16), config, [], scores)
    assert len(packed.chunks) == 4
    assert packed.outputs == ()
    assert packed.inputs.out_index.tolist() == [16] * Bucket(0, 16).outputs(config.rows)


@given(st.data())
def test_every_prompt_token_is_packed_exactly_once_and_in_order(data: st.DataObject) -> None:
    buckets = data.draw(st.sets(st.sampled_from([(0, 5), (0, 16), (0, 48), (4, 3), (4, 16)])))
    config = tiny_step_config(buckets=(Bucket(4, 0), Bucket(0, 7), *(Bucket(*b) for b in sorted(buckets))))
    prompts = [track(row, data.draw(st.integers(1, 60)), config) for row in range(data.draw(st.integers(1, 4)))]
    seen: dict[int, list[int]] = {t.row: [] for t in prompts}
    ended: list[int] = []
    while waiting := [t for t in prompts if t.computed < len(t.tokens)]:
        bucket = choose_bucket(config.buckets, 0, sum(len(t.tokens) - t.computed for t in waiting), prompt_turn=True)
        assert bucket is not None
        packed = pack(bucket, config, [], waiting)
        assert packed.chunks, "every step makes progress"
        assert len(packed.inputs.out_index) == bucket.outputs(config.rows)
        for chunk in packed.chunks:
            at = slice(bucket.generated + chunk.at, bucket.generated + chunk.at + chunk.count)
            positions = range(chunk.start, chunk.start + chunk.count)
            assert packed.inputs.slot[at].tolist() == slots_of(chunk.track, positions, config)
            assert packed.inputs.context_length[chunk.track.row] == chunk.start + chunk.count
            seen[chunk.track.row] += packed.inputs.position[chunk.at : chunk.at + chunk.count].tolist()
        for ending, out in zip(packed.outputs, packed.out_at, strict=True):
            last = packed.inputs.out_index[out]
            assert packed.inputs.row[last] == ending.row
            assert packed.inputs.position[last - bucket.generated] == len(ending.tokens) - 1
            ended.append(ending.row)
        live = packed.inputs.row < config.rows
        assert live.sum() == sum(chunk.count for chunk in packed.chunks)
        assert np.all((packed.inputs.slot < config.kv_slots) == live)
    assert seen == {t.row: list(range(len(t.tokens))) for t in prompts}
    assert sorted(ended) == sorted(t.row for t in prompts)
