"""Whole steps of plans with random weights, compiled and timed as the engine runs them."""

import dataclasses
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aot_cache.target import Device
from elastic_jax import kernels
from elastic_jax import step as steps
from elastic_jax.config import ModelConfig
from elastic_jax.executables import default_compiler_options, whole_pages
from elastic_jax.groups import model_groups
from elastic_jax.plan import Plan, stored_precision
from elastic_jax.quantization import QArray
from elastic_jax.search.workload import Workload
from elastic_jax.step import Bucket, StepConfig, StepInputs
from elastic_jax.units import build_model, make_units, step_name
from elastic_jax.weights import PROMPT_ACTIVATIONS, Weights, abstract_weights, flatten

_WARM_UP_SECONDS = 0.3
"""Under load a GPU's clock falls until it takes no more power than it may; what runs before that is no measure."""

_REPEATS = 5
_LEAST_SECONDS = 0.1
"""Of a repeat: its first step begins late, and must count for little."""

_SCALE = 0.02 / 37
"""Of int8 weights: with values of a standard deviation of 37, weights have one of 0.02."""


class StepClock:
    """The step that serves one role of a workload, for any plan of a model.

    Args:
        config: the model.
        workload: how long contexts are.
        bucket: the step's size.
        step: its other settings; the pool and the longest context become what the workload needs.
        device: where it runs.
    """

    def __init__(
        self, config: ModelConfig, workload: Workload, bucket: Bucket, step: StepConfig, device: Device
    ) -> None:
        self.config, self.bucket, self._device = config, bucket, device
        start = max(0, (workload.prompt_tokens - bucket.prompt) // 2)
        context = workload.context if bucket.generated else start + bucket.prompt
        slots = whole_pages(context)
        rows = max(bucket.generated, 1)
        # A step for all rows, and one for prompt tokens, must be among them.
        sizes = tuple(sorted({bucket, Bucket(step.rows, 0), Bucket(0, bucket.prompt or step.page_size)}))
        self._step = dataclasses.replace(step, kv_slots=rows * slots, max_context=slots, buckets=sizes)
        self._context, self._first = context, start
        self._compiled: dict[str, Any] = {}

    def compile(self, plans: Iterable[Plan], workers: int) -> None:
        """Compiles the steps of plans, those of equal choices once.

        The first plan's is compiled before the others, which are several at once: on a GPU XLA tunes products of floats
        by timing them while it compiles, and those that the plans share are tuned while nothing else runs.
        """
        step = self._step
        kernels.prepare_to_load(step.attention, step.dot, step.decode, step.sampling)
        wanted = {plan.digest(): plan for plan in plans if plan.digest() not in self._compiled}

        def build(plan: Plan) -> Any:
            unit = next(
                unit
                for unit in make_units(self.config, plan, self._step)
                if unit.name == step_name(self.bucket, "greedy")
            )
            here = jax.sharding.SingleDeviceSharding(self._device)
            shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here) for a in unit.arguments]
            options = default_compiler_options(self._device.platform)
            with jax.default_device(self._device):  # kernels ask it what they are lowered for; it is thread-local
                lowered = jax.jit(unit.function, donate_argnums=unit.donate, keep_unused=True).lower(*shapes)
            return lowered.compile(compiler_options=dict(options))

        for digest, plan in list(wanted.items())[:1]:
            self._compiled[digest] = build(plan)
            del wanted[digest]
        with ThreadPoolExecutor(workers) as pool:
            self._compiled |= dict(zip(wanted, pool.map(build, wanted.values()), strict=True))

    def seconds(self, plan: Plan, weights: Weights) -> float:
        """Least time of a step, of several repeats each long enough to be timed: whatever else runs only adds.

        The clock is that of a device which has been busy for a while.

        Args:
            plan: a compiled one.
            weights: what it reads, on the device.
        """
        compiled = self._compiled[plan.digest()]
        given = flatten(build_model(self.config, weights, self._step))[0]
        inputs = jax.device_put(jax.tree.leaves(self._inputs()), self._device)
        state: tuple[Any, ...] = tuple(
            jax.device_put(np.zeros(leaf.shape, leaf.dtype), self._device)
            for leaf in jax.tree.leaves(steps.abstract_state(self.config, self._step))
        )
        count = len(state)

        def run(times: int) -> float:
            nonlocal state
            begun = time.perf_counter()
            for _ in range(times):
                state = compiled(*given, *state, *inputs)[:count]
            jax.block_until_ready(state)
            return (time.perf_counter() - begun) / times

        run(1)
        each = max(run(1), 1e-9)
        run(max(1, round(_WARM_UP_SECONDS / each)))
        return min(run(max(1, round(_LEAST_SECONDS / each))) for _ in range(_REPEATS))

    def _inputs(self) -> StepInputs:
        bucket, step = self.bucket, self._step
        rows, pages = max(bucket.generated, 1), step.kv_slots // step.page_size // max(bucket.generated, 1)
        table, length = np.zeros((step.rows, step.pages), np.int32), np.zeros(step.rows, np.int32)
        table[:rows, :pages] = np.arange(rows * pages, dtype=np.int32).reshape(rows, pages)
        length[:rows] = self._context
        position = self._first + np.arange(bucket.prompt, dtype=np.int32)
        row = np.concatenate([np.arange(bucket.generated), np.zeros(bucket.prompt)]).astype(np.int32)
        generated = row[: bucket.generated] * pages * step.page_size + self._context - 1
        out = np.full(bucket.outputs(step.rows), bucket.tokens, np.int32)
        wanted = np.arange(bucket.generated) if bucket.generated else np.array([bucket.tokens - 1])
        out[: len(wanted)] = wanted
        slot = np.concatenate([generated, position]).astype(np.int32)
        return StepInputs(np.zeros(bucket.prompt, np.int32), position, row, slot, table, length, out)


class RandomWeights:
    """Every group of a model in both precisions, drawn on a device.

    Args:
        config: the model.
        dtype: of floats.
        device: where they are.
        floats: weights of mode XL to be used instead of drawing those; int8 is drawn either way.
    """

    def __init__(self, config: ModelConfig, dtype: Any, device: Device, floats: Weights | None = None) -> None:
        self._config, self._dtype = config, dtype
        here = jax.sharding.SingleDeviceSharding(device)

        def draw(key: Any, shape: tuple[int, ...], kind: Any) -> Any:
            bits = jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), jnp.int8) // jnp.int8(2)
            return bits if kind == jnp.int8 else (bits.astype(jnp.float32) * _SCALE).astype(kind)

        drawn = jax.jit(draw, static_argnums=(1, 2), out_shardings=here)
        seed = 0

        def array(shape: tuple[int, ...], kind: Any) -> Any:
            nonlocal seed
            seed += 1
            return drawn(jax.random.key(seed, impl="unsafe_rbg"), shape, jnp.dtype(kind))

        self._integers = {
            name: (
                array((group.out_size, group.in_size), jnp.int8),
                jax.device_put(np.full((group.out_size, 1), _SCALE, np.float32), device),
            )
            for name, group in model_groups(config).items()
        }
        if floats is None:
            xl = Plan("XL", dict.fromkeys(model_groups(config), "bf16"), "", True, {})
            floats = {
                name: array(leaf.shape, leaf.dtype)
                if len(leaf.shape) > 1
                else jax.device_put(np.ones(leaf.shape, leaf.dtype), device)
                for name, leaf in abstract_weights(config, xl, dtype).items()
            }
        self._floats = floats

    def of(self, plan: Plan) -> Weights:
        """What a plan reads."""
        weights: Weights = {}
        for name in abstract_weights(self._config, plan, self._dtype):
            choice = plan.choices.get(name, "bf16")
            if name in plan.choices and stored_precision(choice) == "int8":
                weights[name] = QArray(*self._integers[name], PROMPT_ACTIVATIONS[choice])
            else:
                weights[name] = self._floats[name]
        return weights
