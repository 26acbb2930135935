"""What a device can do at most, measured: the rates that the other benches give fractions of.

Reading: the sum of one float32 array of 4.3 GB (64 MB on a CPU), bytes / seconds. Arithmetic: one product of
[4096, 5120] and [16384, 5120] transposed, int8 into int32 and bf16 into float32, 2 x rows x out x in / seconds, by
whatever XLA picks. Each is called until 50 ms are filled, waited for once, seven times after as long a warm-up; the
fastest counts, because a limit is meant.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

BURST_SECONDS = 0.05
REPEATS = 7


def seconds(call: Callable[[], Any], repeats: int = REPEATS) -> list[float]:
    """Seconds of one call, for each of some bursts after a warm-up; `call` returns what can be waited for."""

    def burst(n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            out = call()
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / n

    burst(1)
    calls = max(1, int(BURST_SECONDS / burst(2)))
    burst(calls)
    return [burst(calls) for _ in range(repeats)]


def read_limit(device: Any) -> float:
    """Bytes a second."""
    elements = 1 << 30 if device.platform == "gpu" else 1 << 24
    with jax.default_device(device):
        array = jax.random.normal(jax.random.key(0), (elements,), jnp.float32)  # constants may be read faster
        total = jax.jit(jnp.sum)
        return 4 * elements / min(seconds(lambda: total(array)))


def dot_limit(device: Any, kind: str) -> float:
    """Operations a second of one wide product; `kind` is `int8` or `bf16`."""
    rows, out, contraction = (4096, 16384, 5120) if device.platform == "gpu" else (256, 1024, 1024)
    dtype, result = {"int8": (jnp.int8, jnp.int32), "bf16": (jnp.bfloat16, jnp.float32)}[kind]
    with jax.default_device(device):
        bits = jax.random.bits(jax.random.key(0), (rows + out, contraction), jnp.uint8)
        values = (jax.lax.bitcast_convert_type(bits, jnp.int8) // jnp.int8(2)).astype(dtype)
        x, weight = values[:rows], values[rows:]

        @jax.jit
        def dot(x: Any, weight: Any) -> Any:
            return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=result)

        return 2 * rows * out * contraction / min(seconds(lambda: dot(x, weight)))
