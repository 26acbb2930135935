"""How long a model will take, before it is downloaded: on a GPU from its description, on a CPU from its memory's speed.

Estimates, and shown as such: `elastic-jax bench latency` measures.
"""

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from aot_cache.targets import Description
from elastic_jax.config import ModelConfig
from elastic_jax.plan import Plan
from elastic_jax.search.cost_predicted import predict_costs
from elastic_jax.search.workload import Workload
from elastic_jax.step import StepConfig
from elastic_jax.workers import default_workers

_READ_BYTES = 128 << 20
"""For each thread: more than the processor's caches hold."""

_REPEATS = 3


@dataclasses.dataclass(frozen=True)
class TimeEstimate:
    """Of a workload, all its requests together.

    Attributes:
        first_token_seconds: until the prompts are read.
        tokens_per_second: of each sequence, after its first token.
        seconds: until all is answered.
    """

    first_token_seconds: float
    tokens_per_second: float
    seconds: float


def estimate_times(
    config: ModelConfig, plan: Plan, workload: Workload, description: Description, step: StepConfig
) -> TimeEstimate:
    """What a mode takes on a GPU, predicted as `elastic-jax search --target` does.

    Args:
        config: the model.
        plan: the mode's.
        workload: what is asked.
        description: of the GPU, which need not be here.
        step: whose buckets and rows are used.

    Raises:
        ConfigError: the description lacks a number, or is of a GPU that nothing is predicted for.
    """
    costs = predict_costs(config, workload, description, step)
    spent = {role: costs.steps[role] * costs.of_step(config, plan.choices, role) for role in costs.steps}
    return TimeEstimate(
        first_token_seconds=spent["prompt"],
        tokens_per_second=workload.new_tokens / spent["generated"],
        seconds=sum(spent.values()),
    )


def measured_reading() -> float:
    """Bytes a second that all processor cores together read from memory now; takes a fraction of a second."""
    threads = default_workers()
    parts = [np.ones(_READ_BYTES // 8, np.int64) for _ in range(threads)]
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_REPEATS):
            start = time.perf_counter()
            list(pool.map(np.sum, parts))  # NumPy lets other threads run meanwhile
            seconds.append(time.perf_counter() - start)
    return threads * _READ_BYTES / min(seconds)
