"""One batch through the engine: its times, the buckets it takes, and how many tokens early sequences run ahead."""

import collections
import dataclasses
import time
from typing import Any

import numpy as np
from latency_rows import Cell, Run

from elastic_jax.config import ModelConfig
from elastic_jax.engine import Engine
from elastic_jax.requests import FailEvent, GenerateRequest, SamplingParams
from elastic_jax.runner import Runner
from elastic_jax.step import Bucket, StepConfig, StepInputs, StepOutputs

GREEDY = SamplingParams()


def run_batch(
    engine: Engine,
    rng: np.random.Generator,
    cell: Cell,
    new: int,
    ahead: int,
    sampling: SamplingParams = GREEDY,
) -> tuple[Run, int]:
    """Runs random prompts together until every sequence has `new` tokens more than the last one's first.

    Sequences whose prompts were read early generate while others' prompts are read, so they may take up to `ahead`
    tokens more; what is measured are the steps in which all generate. Then all are cancelled.

    Returns:
        the times, and by how many tokens the first sequence was ahead when the last one began.

    Raises:
        SystemExit: a sequence ended early: its logits were not finite, or `ahead` is too small.
    """
    vocab = engine.runner.config.vocab_size
    prompts = [tuple(rng.integers(3, vocab, cell.context).tolist()) for _ in range(cell.batch)]
    start = time.perf_counter()
    numbers = [
        engine.submit(GenerateRequest(prompt, new + ahead, sampling, frozenset(), 1, None)) for prompt in prompts
    ]
    count = dict.fromkeys(numbers, 0)
    first: dict[int, float] = {}
    times: list[float] = []
    leads: list[int] = []
    while len(times) < new:
        events = engine.step()
        now = time.perf_counter() - start
        for event in events:
            if isinstance(event, FailEvent):
                raise event.error
            count[event.request] += 1
            first.setdefault(event.request, now)
            if event.finish == "not_finite" or (event.finish and len(first) < cell.batch):
                raise SystemExit(f"{cell}: a sequence ended after {count[event.request]} tokens ({event.finish})")
        if len(first) == cell.batch and events:
            if times and len(events) != cell.batch:
                raise SystemExit(f"{cell}: a step gave {len(events)} tokens, expected {cell.batch}")
            leads = leads or list(count.values())
            times.append(now)
    for number in numbers:
        engine.cancel(number)
    while engine.busy:
        engine.step()
    steps = np.diff(times)
    live = sum(leads) + cell.batch * (cell.context + (new - 2) / 2)
    return Run(tuple(first.values()), tuple(steps.tolist()), live), max(leads) - 1


class RecordingRunner(Runner):
    """A runner that remembers its latest decode steps, so that one can be replayed without the host's work."""

    def remember(self, steps: int) -> None:
        """Keeps so many steps from now on."""
        self._kept: collections.deque[tuple[Bucket, StepInputs, bool]] = collections.deque(maxlen=steps)

    def step(self, bucket: Bucket, inputs: StepInputs, *, sampling: bool, top: bool) -> StepOutputs:
        if not bucket.prompt:
            self._kept.append((bucket, inputs, sampling))
        return super().step(bucket, inputs, sampling=sampling, top=top)

    def replay(self, times: int) -> float:
        """Seconds of the earliest step kept, dispatched some times in a row and waited for once: the device alone."""
        bucket, inputs, sampling = self._kept[0]
        np.asarray(super().step(bucket, inputs, sampling=sampling, top=False).token)
        start = time.perf_counter()
        for _ in range(times):
            out = super().step(bucket, inputs, sampling=sampling, top=False)
        np.asarray(out.token)
        return (time.perf_counter() - start) / times


class _DryRunner(Runner):
    """Runs nothing, and notes which buckets would have run."""

    def __init__(self, config: ModelConfig, step: StepConfig) -> None:
        # Nothing of the real constructor: there are neither units nor weights.
        self.config, self.step_config = config, step
        self.sampling: Any = _Nothing()
        self.buckets: set[Bucket] = set()

    def admit(self, row: int, *, key: Any, prompt_mask: Any) -> None:
        del row, key, prompt_mask

    def step(self, bucket: Bucket, inputs: StepInputs, *, sampling: bool, top: bool) -> StepOutputs:
        del sampling, top
        self.buckets.add(bucket)
        n = len(inputs.out_index)
        return StepOutputs(np.zeros(n, np.int32), np.zeros(n), np.ones(n, bool), None)


class _Nothing:
    def set(self, *_: Any, **__: Any) -> None:
        pass


def dry_run(config: ModelConfig, step: StepConfig, cell: Cell) -> tuple[set[Bucket], int]:
    """Which buckets a cell takes, and how far ahead its first sequence gets; found by the engine itself, in no time."""
    most = cell.batch * (1 + -(-cell.context // min(b.prompt for b in step.buckets if b.prompt)))
    context = cell.context + 2 + most
    slots = cell.batch * -(-context // step.page_size) * step.page_size
    narrow = dataclasses.replace(step, kv_slots=slots, max_context=context)
    config = dataclasses.replace(config, vocab_size=64, max_position_embeddings=context)
    runner = _DryRunner(config, narrow)
    _, ahead = run_batch(Engine(runner, context), np.random.default_rng(0), cell, 2, most)
    return runner.buckets, ahead


def slots_of(cell: Cell, new: int, ahead: int, page_size: int) -> int:
    """KV slots that a cell takes."""
    return cell.batch * -(-(cell.context + new + ahead) // page_size) * page_size
