"""Costs predicted from a description of a GPU that need not be here: the larger of reading and multiplying.

Predictions decide between choices where nothing was measured; everything made from them says so. The fractions of the
data sheet's numbers that are reached are those of whole steps of Mistral-Small's shape in modes XL and S on one H200
(README, "Latency").
"""

import re

from aot_cache.targets import find
from aot_cache.targets.description import Description
from elastic_jax.config import ModelConfig
from elastic_jax.errors import ConfigError
from elastic_jax.groups import LM_HEAD, Group, model_groups
from elastic_jax.plan import CHOICES, Choice
from elastic_jax.search.forward import ROLES, Role
from elastic_jax.search.workload import Costs, Workload
from elastic_jax.step import Bucket, StepConfig

_BF16_OPERATIONS = {80: 2048, 86: 1024, 89: 1024, 90: 4096}
"""Dense bf16 operations (a multiplication and an addition are two) per clock and multiprocessor, from a compute
capability on (NVIDIA's architecture whitepapers); int8 has twice as many."""

_READING = {"bf16": 0.86, "int8": 0.78}
"""Fraction of the memory's bandwidth, by stored precision."""

_MULTIPLYING = {"bf16": 0.58, "int8": 0.55}
"""Fraction of the dense operations."""

_EACH_TOKEN = 0.9e-6
"""Seconds of a layer for each generated token, beside what is read: attention and activations. Fitted to the same
table's rows of 8 to 64 sequences."""

_BLOCK_SCALES = 1.2
"""Time of a product with block scales over one without (`benches/decode.py` on an H100: of a whole step)."""


def predict_costs(config: ModelConfig, workload: Workload, target: str | Description, step: StepConfig) -> Costs:
    """Seconds of each kind of group by choice and role on a described GPU.

    Args:
        config: the model.
        workload: decides which buckets, and how long contexts are.
        target: a name of `elastic-jax targets`, a file of `dump-target`, or a description.
        step: whose buckets and rows are used.

    Raises:
        ExecutableError: there is no such target.
        ConfigError: its description lacks a number.
    """
    description = target if isinstance(target, Description) else find(target)
    bandwidth = _number(description, "memory_bandwidth")
    clock, cores = _number(description, "clock_rate_ghz") * 1e9, _number(description, "core_count")
    capability = round(10 * _number(description, "major") + _number(description, "minor"))
    known = [c for c in _BF16_OPERATIONS if c <= capability]
    if not known:
        raise ConfigError(
            f"{description.source}: costs are predicted from compute capability 8.0 on, found {capability}"
        )
    operations = clock * cores * _BF16_OPERATIONS[max(known)]
    buckets = workload.buckets(step.buckets)

    def product(group: Group, choice: Choice, rows: int, generated: int) -> float:
        precision = "bf16" if choice == "bf16" else "int8"
        wide = rows if choice == "w8a16" else generated
        multiplied = rows + (wide if precision == "int8" else 0)
        peak = operations * (1 if precision == "bf16" else 2) * _MULTIPLYING[precision]
        multiplying = 2 * multiplied * group.parameters / peak
        if choice == "w8a8b" and wide < rows:
            multiplying *= _BLOCK_SCALES
        reading = group.parameters * (2 if precision == "bf16" else 1) / (bandwidth * _READING[precision])
        return max(multiplying, reading)

    groups: dict[Role, dict[str, dict[Choice, float]]] = {role: {} for role in ROLES}
    rest: dict[Role, float] = {}
    for role in ROLES:
        bucket = buckets[role][0]
        for group in {g.kind: g for g in model_groups(config).values()}.values():
            rows = bucket.outputs(step.rows) if group.kind == LM_HEAD else bucket.tokens
            generated = rows if group.kind == LM_HEAD or role == "generated" else 0
            groups[role][group.kind] = {choice: product(group, choice, rows, generated) for choice in CHOICES}
        rest[role] = _attention(config, workload, bucket, bandwidth, operations)
    device = f"{description.target.device_kind} ({description.source})"
    return Costs.for_workload(device, workload, step.buckets, groups, rest, measured=False)


def _attention(config: ModelConfig, workload: Workload, bucket: Bucket, bandwidth: float, operations: float) -> float:
    """Seconds of all layers: generated tokens read their contexts, prompt tokens multiply with half of theirs."""
    if bucket.generated:
        read = bucket.generated * workload.context * kv_bytes(config)
        return read / (bandwidth * _READING["bf16"]) + bucket.generated * config.num_layers * _EACH_TOKEN
    context = max(bucket.prompt, workload.prompt_tokens) / 2
    multiplied = 4 * bucket.prompt * context * config.q_size * config.num_layers
    return multiplied / (operations * _MULTIPLYING["bf16"])


def kv_bytes(config: ModelConfig) -> int:
    """Bytes of the keys and values of one token, in bfloat16."""
    return 2 * 2 * config.kv_size * config.num_layers


def _number(description: Description, name: str) -> float:
    match = re.search(rf"\b{name}: ([0-9.eE+]+)", description.config)
    if match is None:
        raise ConfigError(f"{description.source} does not say {name}, from which costs are predicted")
    return float(match[1])
