"""Calls the units of a compiled tiny model directly, with the state in view."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tiny import CompiledTiny

from elastic_jax import step as steps
from elastic_jax.sampling import SamplingInputs
from elastic_jax.step import Bucket, RowState, ScoreOutputs, StepInputs, StepOutputs
from elastic_jax.units import build_model, step_name, top_name
from elastic_jax.weights import Weights, flatten

EVERY_BIT = 0xFFFFFFFF


class Machine:
    """Weights, caches and rows of one mode.

    Attributes:
        kv: every layer's cache.
        rows: the state of the rows.
    """

    def __init__(self, tiny: CompiledTiny, weights: Weights | None = None) -> None:
        self.tiny = tiny
        self._weights = flatten(build_model(tiny.config, weights or tiny.weights, tiny.step))[0]
        self._layers = tiny.config.num_layers
        self._take(tiny.units["start"]())

    def _take(self, state: tuple[Any, ...]) -> tuple[Any, ...]:
        """Takes over the state at the front of a unit's outputs; returns the rest."""
        end = self._layers + len(dataclasses.fields(RowState))
        self.kv, self.rows = state[: self._layers], RowState(*state[self._layers : end])
        return state[end:]

    def step(
        self, bucket: Bucket, inputs: StepInputs, sampling: SamplingInputs | None = None, *, top: bool = False
    ) -> StepOutputs:
        unit = self.tiny.units[step_name(bucket, "greedy" if sampling is None else "sampling")]
        rest = jax.tree.leaves((self.rows, inputs, sampling))
        out = StepOutputs(*self._take(unit(*self._weights, *self.kv, *rest)))
        if top:
            tokens, values = self.tiny.units[top_name(out.logits.shape[0])](out.logits)
            out = dataclasses.replace(out, top_token=tokens, top_log_probability=values)
        return jax.tree.map(np.asarray, out)

    def score(self, bucket: Bucket, inputs: StepInputs, target: np.ndarray, *, top: bool = False) -> ScoreOutputs:
        unit = self.tiny.units[step_name(bucket, "score")]
        out = unit(*self._weights, *self.kv, *jax.tree.leaves(inputs), target, np.int32(top))
        self.kv = out[: self._layers]
        return jax.tree.map(np.asarray, ScoreOutputs(*out[self._layers :]))

    def admit(self, row: int, *, seed: int = 0, prompt: Any = (), token: int = 0, position: int = 0) -> None:
        mask = np.zeros(self.rows.prompt_mask.shape[1], np.uint32)
        for one in prompt:
            mask[one // 32] |= np.uint32(1 << (one % 32))
        key = np.array([seed >> 32, seed & EVERY_BIT], np.uint32)
        unit = self.tiny.units["admit"]
        fields = unit(*jax.tree.leaves(self.rows), np.int32(row), key, mask, np.int32(token), np.int32(position))
        self.rows = RowState(*fields)

    def copy_page(self, source: int, destination: int) -> None:
        self.kv = self.tiny.units["copy_page"](*self.kv, np.int32(source), np.int32(destination))

    def sampling(self, **changes: Any) -> SamplingInputs:
        """Greedy parameters for every row; a change is one value for all rows, or one each."""
        shapes = steps.abstract_sampling(self.tiny.config, self.tiny.step)
        neutral = {
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "bias_token": self.tiny.config.vocab_size,
            "allowed": np.uint32(EVERY_BIT),
        }
        values = {}
        for field in dataclasses.fields(SamplingInputs):
            shape = getattr(shapes, field.name)
            value = changes.pop(field.name, neutral.get(field.name, 0))
            values[field.name] = np.broadcast_to(np.asarray(value, shape.dtype), shape.shape).copy()
        if changes:
            raise TypeError(f"no such sampling parameters: {sorted(changes)}")
        return SamplingInputs(**values)

    def cache(self) -> np.ndarray:
        """A copy of every layer's slots: [layers, slots, 2, kv_heads, head_dim]."""
        return np.stack([np.asarray(layer.astype(jnp.float32)) for layer in self.kv])

    def state(self) -> RowState:
        """A copy of the rows."""
        return jax.tree.map(np.array, self.rows)
