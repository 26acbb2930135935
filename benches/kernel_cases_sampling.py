"""Choosing tokens: the most likely ones, and draws with everything that a request may ask.

Logits lie in the L2 cache, where a step's language-model head has just left them, so the limit of reading is none that
they could not pass; launching and waiting for all blocks of a row takes longer than reading it.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from kernel_case import Case, Place, Random, each_layer, first_layer, first_result, largest
from random_model import SMALL

from elastic_jax import kernels
from elastic_jax.sampling import Choose, SampledRows, SamplingInputs

LAYERS = 16
BIAS = 300
"""Biased tokens of a row, as many as a step takes."""


def samplings(place: Place) -> Iterable[Case]:
    for everything in (False, True):
        for rows in (1, 3) if place.config == SMALL else (1, 16, 64):
            for implementation in place.implementations("sampling"):
                yield _sampling(place, implementation, rows, everything)


def _sampling(place: Place, implementation: str, rows: int, everything: bool) -> Case:
    vocab = place.config.vocab_size
    words = -(-vocab // 32)

    def parameters(random: Random) -> SamplingInputs:
        def floats(value: float) -> jax.Array:
            return jnp.full(rows, value, jnp.float32)

        every = vocab // BIAS
        biased = every * jnp.arange(BIAS, dtype=jnp.int32)[None, :]  # distinct, as a request's are
        return SamplingInputs(
            temperature=floats(0.8),
            top_k=jnp.full(rows, 50, jnp.int32),
            top_p=floats(0.95),
            min_p=floats(0.01),
            repetition_penalty=floats(1.1),
            presence_penalty=floats(0.1),
            frequency_penalty=floats(0.1),
            choice=jnp.arange(rows, dtype=jnp.int32),
            bias_token=biased + (random.bits((rows, 1)) % every).astype(jnp.int32),
            bias=random.uniform((rows, BIAS), -1, 1),
            allowed=random.bits((rows, words)) | random.bits((rows, words)),
        )

    def operands(random: Random) -> tuple[Any, Any]:
        layers = []
        for _ in range(LAYERS):
            state = SampledRows(
                key=random.bits((rows, 2)),
                counts=jnp.where(random.bits((rows, vocab)) < 1 << 22, jnp.int32(2), jnp.int32(0)),
                prompt_mask=random.bits((rows, words)) & random.bits((rows, words)),
            )
            layers.append((3 * random.normal((rows, vocab), jnp.float32), state))
        row = jnp.arange(rows, dtype=jnp.int32)
        return ((parameters(random) if everything else None, row, 100 + row), layers), ()

    def by(choose: Choose) -> Any:
        return lambda sampling, row, position, logits, state: choose(logits, sampling, row, position, state)

    # What is asked reads counts and two masks as well.
    read = 4 * rows * vocab + (rows * (4 * vocab + 8 * words) if everything else 0)
    return Case(
        kernel="sampling",
        implementation=implementation,
        work=f"{'everything' if everything else 'greedy'} of {vocab}, {rows} row{'s' * (rows > 1)}",
        turn=place.turn("sampling", implementation, telling=rows == 1),
        read_bytes=read,
        operations=0,
        arithmetic="bf16",
        layers=LAYERS,
        operands=operands,
        call=each_layer(by(kernels.sampling(implementation))),
        outcome=first_result,
        reference=first_layer(by(kernels.sampling("xla"))),
        error=choice_error,
        tolerance=1e-4,
    )


def choice_error(found: Any, expected: Any) -> jax.Array:
    """Of log-probabilities; 1 if any token is another, or was found to be finite where it is not."""
    (token, log_probability, finite), (exact, exact_log_probability, exact_finite) = found, expected
    apart = jnp.max(jnp.abs(log_probability - exact_log_probability))
    return largest([apart, jnp.any(token != exact), jnp.any(finite != exact_finite)])
