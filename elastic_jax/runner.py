"""Runs a mode's units on one device. It holds the weights and the donated state, and traces nothing."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32, UInt32

from elastic_jax import step as steps
from elastic_jax.config import ModelConfig
from elastic_jax.requests import SamplingParams
from elastic_jax.sampling import SamplingInputs
from elastic_jax.step import Bucket, ScoreOutputs, StepConfig, StepInputs, StepOutputs
from elastic_jax.units import START, build_model, step_name, top_name
from elastic_jax.weights import Weights, flatten

type Call = Callable[..., tuple[jax.Array, ...]]


class SamplingTable:
    """The sampling parameters of every row, kept on the device until one changes."""

    def __init__(self, config: ModelConfig, step: StepConfig, device: Any) -> None:
        self._vocab, self._max_bias, self._device = config.vocab_size, step.max_bias, device
        shapes = dataclasses.asdict(steps.abstract_sampling(config, step))
        self._host: dict[str, np.ndarray] = {name: np.zeros(s.shape, s.dtype) for name, s in shapes.items()}
        self._on_device: dict[str, jax.Array] = {}
        for row in range(step.rows):
            self.set(row, SamplingParams(), choice=0)

    def set(self, row: int, params: SamplingParams, *, choice: int) -> None:
        """Takes over a row's parameters; every token is allowed until `allow` says otherwise."""
        bias = list(params.logit_bias.items())
        bias += [(self._vocab, 0.0)] * (self._max_bias - len(bias))
        values = {
            "temperature": params.temperature,
            "top_k": min(params.top_k, self._vocab),
            "top_p": params.top_p,
            "min_p": params.min_p,
            "repetition_penalty": params.repetition_penalty,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "choice": choice,
            "bias_token": [token for token, _ in bias],
            "bias": [value for _, value in bias],
            "allowed": np.uint32(0xFFFFFFFF),
        }
        for name, value in values.items():
            self._write(name, row, value)

    def allow(self, row: int, words: UInt32[np.ndarray, " words"]) -> None:
        """Restricts a row's next token to those whose bits are set."""
        self._write("allowed", row, words)

    def _write(self, name: str, row: int, value: Any) -> None:
        if not np.array_equal(self._host[name][row], np.broadcast_to(value, self._host[name][row].shape)):
            self._host[name][row] = value
            self._on_device.pop(name, None)

    def on_device(self) -> SamplingInputs:
        """The parameters as device arrays; only what changed is sent."""
        for name, array in self._host.items():
            if name not in self._on_device:
                # A copy, because the CPU device may use the host's buffer in place.
                self._on_device[name] = jax.device_put(array.copy(), self._device)
        return SamplingInputs(**self._on_device)


class BlockTables:
    """The block tables, kept on the device while they are the same.

    They are the one input that grows with the longest context: 64 rows of 131072 tokens are 512 KiB. Generating changes
    them only when a sequence begins or ends, and comparing takes a fifth of the time of sending.
    """

    def __init__(self, device: Any) -> None:
        self._device = device
        self._sent: tuple[np.ndarray, jax.Array] | None = None

    def on_device(self, tables: Int32[np.ndarray, "rows pages"]) -> jax.Array:
        """The tables as a device array; sent only if they changed."""
        if self._sent is None or not np.array_equal(self._sent[0], tables):
            # A copy: the caller may use its array again, and the CPU device may use the host's buffer in place.
            host = tables.copy()
            self._sent = host, jax.device_put(host, self._device)
        return self._sent[1]


class Runner:
    """Calls units with weights and state in place.

    Args:
        config: the model.
        step: what the units were compiled for.
        units: loaded or compiled units by name.
        weights: the plan's weights on the device.
        device: where everything is.
    """

    def __init__(
        self, config: ModelConfig, step: StepConfig, units: Mapping[str, Call], weights: Weights, device: Any
    ) -> None:
        self.config, self.step_config, self.device = config, step, device
        self._units = units
        self._weights = flatten(build_model(config, weights, step))[0]
        self._caches = len(jax.tree.leaves(steps.abstract_state(config, step).kv))
        state = units[START]()
        self._kv, self._rows = state[: self._caches], state[self._caches :]
        self.sampling = SamplingTable(config, step, device)
        self._block_tables = BlockTables(device)

    @property
    def unit_names(self) -> tuple[str, ...]:
        """The units it can run."""
        return tuple(sorted(self._units))

    def step(self, bucket: Bucket, inputs: StepInputs, *, sampling: bool, top: bool) -> StepOutputs:
        """Dispatches one step and returns without waiting for it.

        Args:
            bucket: the bucket whose shapes `inputs` have.
            inputs: host arrays.
            sampling: run the sampling variant, with the parameters in `self.sampling`.
            top: whether to report the most likely tokens.
        """
        unit = self._units[step_name(bucket, "sampling" if sampling else "greedy")]
        sampled = jax.tree.leaves(self.sampling.on_device()) if sampling else []
        leaves = self._leaves(inputs)
        out = unit(*self._weights, *self._kv, *self._rows, *leaves, *sampled)
        split = self._caches + len(self._rows)
        self._kv, self._rows = out[: self._caches], out[self._caches : split]
        found = StepOutputs(*out[split:])
        if not top:
            return found
        tokens, values = self._units[top_name(found.logits.shape[0])](found.logits)
        return dataclasses.replace(found, top_token=tokens, top_log_probability=values)

    def score(self, bucket: Bucket, inputs: StepInputs, target: Int32[np.ndarray, " p"], *, top: bool) -> ScoreOutputs:
        """Dispatches one score step; `target` holds the token wanted after each prompt token, or -1."""
        unit = self._units[step_name(bucket, "score")]
        out = unit(*self._weights, *self._kv, *self._leaves(inputs), target, np.int32(top))
        self._kv = out[: self._caches]
        return ScoreOutputs(*out[self._caches :])

    def _leaves(self, inputs: StepInputs) -> list[Any]:
        tables = self._block_tables.on_device(inputs.block_table)
        return jax.tree.leaves(dataclasses.replace(inputs, block_table=tables))

    def admit(self, row: int, *, key: UInt32[np.ndarray, "2"], prompt_mask: UInt32[np.ndarray, " words"]) -> None:
        """Prepares a row's state for a new sequence."""
        zero = np.int32(0)
        self._rows = self._units["admit"](*self._rows, np.int32(row), key, prompt_mask, zero, zero)

    def copy_page(self, source: int, destination: int) -> None:
        """Copies one page of every layer's cache."""
        self._kv = self._units["copy_page"](*self._kv, np.int32(source), np.int32(destination))
