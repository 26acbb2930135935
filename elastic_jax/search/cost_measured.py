"""Costs measured on the device at hand: each product by itself, and attention.

A product is timed over several copies of its weight, one after another in one program, so that none is read from a
cache that a model's many weights would not fit into, and that the time of a launch counts once for all of them.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aot_cache.target import Device
from elastic_jax import kernels
from elastic_jax.batch import TokenBatch
from elastic_jax.config import ModelConfig
from elastic_jax.groups import LM_HEAD, Group, model_groups
from elastic_jax.plan import CHOICES, Choice, stored_precision
from elastic_jax.quantization import QArray
from elastic_jax.search.calibrate import Steps
from elastic_jax.search.forward import ROLES, Role
from elastic_jax.search.workload import Costs, Workload
from elastic_jax.step import Bucket, StepConfig
from elastic_jax.weights import PROMPT_ACTIVATIONS

_COPIES_BYTES = 192 << 20
"""Bytes of the copies of one weight together, more than the caches of current devices."""

_MOST_COPIES = 12
_FEW_ROWS = 64
"""Products of more rows are bound by arithmetic, which no cache helps: two copies do."""

_REPEATS = 25
_LEAST_SECONDS = 0.004


def measure_costs(
    config: ModelConfig,
    workload: Workload,
    step: StepConfig,
    device: Device,
    *,
    progress: Steps,
) -> Costs:
    """Seconds of each kind of group by choice and role, for the buckets that serve a workload; random weights.

    Args:
        config: the model.
        workload: decides which buckets, and how long contexts are.
        step: whose buckets, kernels and rows are used.
        device: is measured.
        progress: is told about products.
    """
    kinds = {group.kind: group for group in model_groups(config).values()}
    buckets = workload.buckets(step.buckets)
    groups: dict[Role, dict[str, dict[Choice, float]]] = {role: {} for role in ROLES}
    total = len(ROLES) * len(kinds) * len(CHOICES)
    done = 0
    for role in ROLES:
        bucket = buckets[role][0]
        for kind, group in kinds.items():
            rows = bucket.outputs(step.rows) if kind == LM_HEAD else bucket.tokens
            generated = rows if kind == LM_HEAD or role == "generated" else 0
            by_arithmetic: dict[str, float] = {}
            groups[role][kind] = {}
            for choice in CHOICES:
                progress(done, total, f"{kind} {choice}, {role} tokens")
                done += 1
                # Generated tokens, and the head, have one arithmetic for all int8 choices.
                same = "w8a16" if generated and choice != "bf16" else choice
                if same not in by_arithmetic:
                    by_arithmetic[same] = _time_product(group, choice, rows, generated, step, device)
                groups[role][kind][choice] = by_arithmetic[same]
    progress(total, total, "attention")
    rest: dict[Role, float] = {
        role: config.num_layers * _time_attention(config, workload, buckets[role][0], step, device) for role in ROLES
    }
    return Costs.for_workload(device.device_kind, workload, step.buckets, groups, rest, measured=True)


def _time_product(group: Group, choice: Choice, rows: int, generated: int, step: StepConfig, device: Any) -> float:
    precision = stored_precision(choice)
    width = 2 if precision == "bf16" else 1
    wanted = _COPIES_BYTES // (width * group.parameters) if rows <= _FEW_ROWS else 2
    copies = int(np.clip(wanted, 2, _MOST_COPIES))
    rng = np.random.default_rng(0)
    values = rng.integers(-127, 128, (group.out_size, group.in_size), np.int8)
    scales = np.full((group.out_size, 1), 1e-3, np.float32)

    def weight() -> Any:
        if precision == "bf16":
            return jax.device_put((values * np.float32(1e-3)).astype(jnp.dtype(step.dtype)), device)
        copy, its_scales = (jax.device_put(array.copy(), device) for array in (values, scales))
        return QArray(copy, its_scales, PROMPT_ACTIVATIONS[choice])

    dot = kernels.dot(step.dot)

    @jax.jit
    def products(x: Any, weights: tuple[Any, ...]) -> Any:
        for each in weights:
            # The next product waits for this one, whose result changes its operand by next to nothing.
            x = x + 1e-30 * dot(x, each, generated=generated)[:, :1]
        return x

    x = jax.device_put(rng.standard_normal((rows, group.in_size)).astype(np.float32), device)
    weights = tuple(weight() for _ in range(copies))
    return _seconds(lambda: products(x, weights)) / copies


def _time_attention(config: ModelConfig, workload: Workload, bucket: Bucket, step: StepConfig, device: Any) -> float:
    """Attention of one layer: generated tokens over whole contexts, or a step's prompt tokens, as one sequence's."""
    generated = bucket.generated
    rows = max(generated, 1)
    context = workload.context if generated else max(bucket.prompt, workload.prompt_tokens)
    pages = -(-context // step.page_size)
    row = np.arange(rows, dtype=np.int32) if generated else np.zeros(bucket.prompt, np.int32)
    position = np.full(rows, context - 1, np.int32) if generated else np.arange(bucket.prompt, dtype=np.int32)
    arrays = (
        row,
        position,
        (row * pages * step.page_size + position).astype(np.int32),
        np.arange(rows * pages, dtype=np.int32).reshape(rows, pages),
        np.full(rows, context if generated else bucket.prompt, np.int32),
    )
    batch = TokenBatch(*(jax.device_put(a, device) for a in arrays), generated=generated, page_size=step.page_size)
    rng = np.random.default_rng(0)
    dtype = jnp.dtype(step.dtype)
    kv_shape = (rows * pages * step.page_size, 2, config.num_kv_heads, config.head_dim)
    kv = jax.device_put(rng.standard_normal(kv_shape, np.float32).astype(dtype), device)
    query_shape = (bucket.tokens, config.num_heads, config.head_dim)
    query = jax.device_put(rng.standard_normal(query_shape, np.float32).astype(dtype), device)
    attention, copies = kernels.attention(step.attention), 4

    @jax.jit
    def layers(query: Any, kv: Any, batch: TokenBatch) -> Any:
        for _ in range(copies):
            query = (query.astype(jnp.float32) + 1e-30 * attention(query, kv, batch)).astype(query.dtype)
        return query

    return _seconds(lambda: layers(query, kv, batch)) / copies


def _seconds(run: Callable[[], Any]) -> float:
    """Least time of a run, each repeat long enough to be timed; the first, which compiles, is not counted.

    The least, because whatever else the machine does only adds.
    """
    jax.block_until_ready(run())
    start = time.perf_counter()
    jax.block_until_ready(run())
    times = max(1, round(_LEAST_SECONDS / max(time.perf_counter() - start, 1e-9)))
    found = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready([run() for _ in range(times)])
        found.append((time.perf_counter() - start) / times)
    return min(found)
