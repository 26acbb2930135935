"""A runner without a model: every sequence counts upwards, so that an engine's bookkeeping can be watched alone.

It knows a sequence only by what is written to the slots that the step names: a wrong page, position, row or order gives
a wrong token.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from elastic_jax.config import ModelConfig
from elastic_jax.pages import PageAllocator
from elastic_jax.requests import SamplingParams
from elastic_jax.runner import Runner
from elastic_jax.step import Bucket, ScoreOutputs, StepConfig, StepInputs, StepOutputs

MODEL = ModelConfig(
    vocab_size=1000,
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_ids=(),
    pad_token_id=None,
)


def next_token(context: list[int]) -> int:
    """What follows a context: it depends on every token and on their order."""
    value = 0
    for token in context:
        value = (value * 31 + token + 7) % 997
    return value


class _Table:
    """Stands for the sampling table; keeps what was set."""

    def __init__(self) -> None:
        self.masks: dict[int, np.ndarray] = {}

    def set(self, row: int, params: SamplingParams, *, choice: int) -> None:
        del params, choice
        self.masks.pop(row, None)

    def allow(self, row: int, words: np.ndarray) -> None:
        self.masks[row] = words


class FakeRunner(Runner):
    """Keeps in each KV slot the token and the position written there, and checks that a context is what it should be.

    Attributes:
        steps: the bucket of every step so far, and its kind.
        pages: the engine's, once it is known: a page that several sequences hold must not be written.
    """

    def __init__(self, step: StepConfig) -> None:
        # Nothing of the real runner's constructor: there are no units and no weights.
        self.config, self.step_config, self.device = MODEL, step, jax.devices()[0]
        self.sampling: Any = _Table()
        self.steps: list[tuple[Bucket, str]] = []
        self.pages: PageAllocator | None = None
        self._slots = np.full((step.kv_slots, 2), -1)
        self._last = np.zeros((step.rows, 2), np.int64)

    def admit(self, row: int, *, key: np.ndarray, prompt_mask: np.ndarray) -> None:
        del key, prompt_mask
        self._last[row] = -1

    def copy_page(self, source: int, destination: int) -> None:
        size = self.step_config.page_size
        self._slots[destination * size : (destination + 1) * size] = self._slots[source * size : (source + 1) * size]

    def step(self, bucket: Bucket, inputs: StepInputs, *, sampling: bool, top: bool) -> StepOutputs:
        self.steps.append((bucket, "top" if top else "plain"))
        token, position = self._tokens(bucket, inputs)
        self._write(bucket, inputs, token, position)
        n = len(inputs.out_index)
        out = np.zeros(n, np.int32)
        for i, at in enumerate(inputs.out_index):
            if at == bucket.tokens:
                continue
            row = inputs.row[at]
            assert sampling or row not in self.sampling.masks, "a mask is for the sampling step"
            out[i] = next_token(self._context(inputs, row, position[at] + 1))
            self._last[row] = out[i], position[at] + 1
        nothing = np.zeros((n, self.step_config.top_n))
        found = StepOutputs(out, -out.astype(np.float32), np.ones(n, bool), None)
        return dataclasses.replace(found, top_token=nothing.astype(np.int32), top_log_probability=nothing)

    def score(self, bucket: Bucket, inputs: StepInputs, target: np.ndarray, *, top: bool) -> ScoreOutputs:
        """The log-probability of a target is minus the target; the argmax is what the context predicts."""
        self.steps.append((bucket, "score"))
        del top
        self._write(bucket, inputs, inputs.token, inputs.position)
        argmax = np.zeros(bucket.prompt, np.int32)
        for i, row in enumerate(inputs.row):
            if row != self.step_config.rows:
                argmax[i] = next_token(self._context(inputs, row, inputs.position[i] + 1))
        nothing = np.zeros((bucket.prompt, self.step_config.top_n))
        log_probability = -np.asarray(target, np.float32)
        finite = np.ones(bucket.prompt, bool)
        return ScoreOutputs(log_probability, argmax, nothing.astype(np.int32), nothing, finite)

    def _tokens(self, bucket: Bucket, inputs: StepInputs) -> tuple[np.ndarray, np.ndarray]:
        last = self._last[np.minimum(inputs.row[: bucket.generated], self.step_config.rows - 1)]
        return np.concatenate([last[:, 0], inputs.token]), np.concatenate([last[:, 1], inputs.position])

    def _write(self, bucket: Bucket, inputs: StepInputs, token: np.ndarray, position: np.ndarray) -> None:
        step = self.step_config
        assert inputs.row.shape == inputs.slot.shape == (bucket.tokens,)
        live = inputs.row < step.rows
        assert (live == (inputs.slot < step.kv_slots)).all(), "padding writes nothing"
        prompt = live[bucket.generated :]
        assert not (np.diff(prompt.astype(int)) > 0).any(), "prompt tokens leave no gap"
        rows = inputs.row[bucket.generated :][prompt]
        assert len(set(rows)) == 1 + int((np.diff(rows) != 0).sum()) if len(rows) else True, "a row's are consecutive"
        slots = inputs.slot[live]
        assert len(set(slots)) == len(slots), "no slot is written twice"
        for at in np.flatnonzero(live):
            row, size = inputs.row[at], step.page_size
            page = inputs.block_table[row, position[at] // size]
            assert inputs.slot[at] == page * size + position[at] % size, "a token goes where its row's table says"
            assert position[at] < inputs.context_length[row]
            assert self.pages is None or self.pages._holders[page] == 1, "only its one holder writes a page"
            self._slots[inputs.slot[at]] = token[at], position[at]

    def _context(self, inputs: StepInputs, row: Any, length: int) -> list[int]:
        size, place = self.step_config.page_size, np.arange(length)
        token, position = self._slots[inputs.block_table[row, place // size] * size + place % size].T
        assert (position == place).all(), f"row {row} holds positions {position}: overwritten, or never written"
        return token.tolist()
