"""KL of next-token distributions from the original model's, on windows of a text.

As in the search, everything is float32 but the integer products, so that bfloat16's own rounding, which is the same in
every mode, is not counted; the original is mode XL. Prompt and generated tokens are measured apart, all tokens of the
windows in one role's arithmetic. Tracing and compiling happen here: these are no units of a mode.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aot_cache.target import Device
from elastic_jax import kernels
from elastic_jax.batch import TokenBatch
from elastic_jax.config import ModelConfig
from elastic_jax.executables import default_compiler_options
from elastic_jax.groups import LM_HEAD
from elastic_jax.model import Dot, Mistral
from elastic_jax.norm import RMSNorm
from elastic_jax.search.forward import Role
from elastic_jax.weights import Weights

WINDOWS = 8
"""Windows that KL is measured on: the first of those whose perplexity is."""

_PAGE = 64
_CHUNK = 128
"""Positions whose logits exist at the same time."""


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Distances from the original.

    Attributes:
        kl: KL(original || mode), nats, over all positions.
        stderr: its standard error, windows being the units.
        flips: part of the positions whose most likely token differs.
    """

    kl: float
    stderr: float
    flips: float


class DivergenceMeter:
    """Measures models against one of them.

    Args:
        config: the model.
        original: float32 weights of mode XL.
        windows: token ids, all windows equally long.
        device: where everything runs, and where the weights are.
    """

    def __init__(
        self, config: ModelConfig, original: Weights, windows: Sequence[Sequence[int]], device: Device
    ) -> None:
        self._config, self._device = config, device
        self._windows = [np.asarray(window, np.int32) for window in windows]
        attention, dot, _ = kernels.default_names(config, device.platform, "float32")
        self._attention, self._dot = attention, kernels.dot(dot)
        self._head = _head_of(original)
        self._original = self._hidden(original, self._dot, "prompt")

    def measure(self, weights: Weights, role: Role, dot: Dot | None = None) -> Divergence:
        """The distances of a model.

        Args:
            weights: float32 but for what is quantized.
            role: whose arithmetic all tokens have.
            dot: multiplies by the weights; the device's default by default.
        """
        dot = dot or self._dot
        compare = jax.jit(functools.partial(_compare, self._config, self._dot, dot))
        means, flips = [], []
        for original, hidden in zip(self._original, self._hidden(weights, dot, role), strict=True):
            kl, flipped = compare(self._head, _head_of(weights), original, hidden)
            means.append(float(np.asarray(kl, np.float64).mean()))
            flips.append(float(np.asarray(flipped, np.float64).mean()))
        spread = float(np.std(means, ddof=1) / np.sqrt(len(means))) if len(means) > 1 else 0.0
        return Divergence(float(np.mean(means)), spread, float(np.mean(flips)))

    def _hidden(self, weights: Weights, dot: Dot, role: Role) -> list[Any]:
        """The residual stream after the last layer, [length, hidden] of each window."""
        length = len(self._windows[0])
        run = functools.partial(_run, self._config, self._attention, dot, role, length)
        tokens = jax.ShapeDtypeStruct((length,), jnp.int32)
        options: Any = dict(default_compiler_options(self._device.platform))
        compiled = jax.jit(run).lower(weights, tokens).compile(options)
        return [compiled(weights, jax.device_put(window, self._device)) for window in self._windows]


def _head_of(weights: Weights) -> Weights:
    """What logits are computed with."""
    return {name: weights[name] for name in ("embedding", "final_norm", LM_HEAD) if name in weights}


def _run(config: ModelConfig, attention: str, dot: Dot, role: Role, length: int, weights: Weights, tokens: Any) -> Any:
    slots = -(-length // _PAGE) * _PAGE
    cache = jnp.zeros((slots, 2, config.num_kv_heads, config.head_dim), jnp.float32)
    place = jnp.arange(length, dtype=jnp.int32)
    batch = TokenBatch(
        row=jnp.zeros(length, jnp.int32),
        position=place,
        slot=place,
        block_table=jnp.arange(slots // _PAGE, dtype=jnp.int32)[None, :],
        context_length=jnp.full(1, length, jnp.int32),
        generated=length if role == "generated" else 0,
        page_size=_PAGE,
    )

    def prompt_attention(query: Any, kv: Any, batch: TokenBatch) -> Any:
        # As of a prompt, whatever role the products have: every position is computed at once.
        return kernels.attention(attention)(query, kv, dataclasses.replace(batch, generated=0))

    model = Mistral(config, weights, attention=prompt_attention, dot=dot, decode=None, dtype=jnp.dtype("float32"))
    return model(tokens, (cache,) * config.num_layers, batch)[0]


def _compare(
    config: ModelConfig, dot: Dot, other_dot: Dot, head: Weights, other: Weights, x: Any, y: Any
) -> tuple[Any, Any]:
    """KL and flips at each position; logits of some positions at a time."""

    def log_probabilities(weights: Weights, dot: Dot, x: Any) -> Any:
        normed = RMSNorm(weights["final_norm"], config.rms_norm_eps)(x)
        logits = dot(normed, weights.get(LM_HEAD, weights["embedding"]), generated=x.shape[0])
        return jax.nn.log_softmax(logits, axis=-1)

    def each(part: tuple[Any, Any]) -> tuple[Any, Any]:
        p, q = log_probabilities(head, dot, part[0]), log_probabilities(other, other_dot, part[1])
        return jnp.sum(jnp.exp(p) * (p - q), axis=-1), jnp.argmax(p, axis=-1) != jnp.argmax(q, axis=-1)

    length = x.shape[0]
    size = next(n for n in range(min(_CHUNK, length), 0, -1) if length % n == 0)
    kl, flips = jax.lax.map(each, (x.reshape(-1, size, x.shape[1]), y.reshape(-1, size, y.shape[1])))
    return kl.reshape(-1), flips.reshape(-1)
