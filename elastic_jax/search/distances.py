"""How far distributions of the next token are from the original model's.

KL is computed from differences of logits, as log E[exp(z)] - E[z] over the original's probabilities: differences of
log-probabilities of almost equal models would leave little but rounding.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from elastic_jax.norm import RMSNorm
from elastic_jax.search.products import product

KEPT_BYTES = 1 << 30
"""Log-probabilities of the original are kept up to this size, and computed again for each comparison beyond it."""

_HEAD_TOKENS = {"cpu": 128, "gpu": 1024}
"""Tokens whose logits exist at the same time: few fit a processor's cache, many are needed to fill a GPU."""

_SERIES = 0.1
"""Below this, exp(z) - 1 - z is summed as a series, which does not cancel."""


def head_tokens(platform: str) -> int:
    """Tokens whose logits exist at the same time on a device of a platform."""
    return _HEAD_TOKENS.get(platform, _HEAD_TOKENS["gpu"])


@dataclasses.dataclass(frozen=True)
class Distances:
    """How far distributions of the next token are from the reference's; each float32 [candidates, windows, length].

    Attributes:
        kl: KL(reference || candidate) in nats.
        flips: 1 where the most likely token differs, else 0.
        loss: the candidate's negative log-likelihood of the text's next token, in nats; 0 at each window's end.
    """

    kl: np.ndarray
    flips: np.ndarray
    loss: np.ndarray


@dataclasses.dataclass(frozen=True)
class Head:
    """What makes logits of a residual stream, and how many at the same time.

    Attributes:
        norm: the final norm's weight.
        weight: the original's.
        eps: of the norm.
        dot_name: name of the implementation of matrix products.
        tokens: whose logits exist at once: those of a whole text may be larger than the model.
    """

    norm: Any
    weight: Any
    eps: float
    dot_name: str
    tokens: int


class Reference:
    """The original model's distributions over a text.

    Args:
        stream: its residual stream after the last layer, float32 [tokens, hidden].
        windows: the text, int32 [windows, length].
        head: the model's.
    """

    def __init__(self, stream: Array, windows: Int32[np.ndarray, "windows length"], head: Head) -> None:
        self._stream, self._windows, self._head = stream, windows, head
        device = next(iter(stream.devices()))
        target = np.full(windows.shape, -1, np.int32)
        target[:, :-1] = windows[:, 1:]
        self._target = jax.device_put(target.reshape(-1), device)
        kept = stream.shape[0] * head.weight.shape[0] * 4 <= KEPT_BYTES
        settings = (head.eps, head.dot_name, head.tokens)
        self._known = _log_probabilities(stream, head.norm, head.weight, *settings) if kept else None

    def compare(self, candidates: Sequence[Float32[Array, "tokens hidden"]], head: Any) -> "list[Array]":
        """KL, flips and losses on the device, float32 [candidates, tokens] each: `gather` makes `Distances` of them.

        Args:
            candidates: residual streams after the last layer.
            head: the candidates' weight of the language-model head.
        """
        own = self._head
        settings = (own.eps, own.dot_name, own.tokens)
        known = self._stream if self._known is None else self._known
        weights = (own.norm, own.weight, head)
        return list(_compare(known, tuple(candidates), *weights, self._target, *settings))

    def gather(self, found: Sequence[Array]) -> Distances:
        """Waits for what `compare` began."""
        shape = (found[0].shape[0], *self._windows.shape)
        return Distances(*(np.asarray(part).reshape(shape) for part in found))


def _chunks(x: Array, size: int) -> Array:
    padded = -x.shape[0] % size
    return jnp.pad(x, ((0, padded),) + ((0, 0),) * (x.ndim - 1)).reshape(-1, size, *x.shape[1:])


def _logits(x: Array, norm: Array, weight: Any, eps: float, dot_name: str) -> Array:
    return product(dot_name)(RMSNorm(norm, eps)(x), weight, generated=x.shape[0])


@functools.partial(jax.jit, static_argnames=("eps", "dot_name", "size"))
def _log_probabilities(x: Array, norm: Array, weight: Any, eps: float, dot_name: str, size: int) -> Array:
    """float32 [chunks, size, vocabulary]."""
    size = min(size, x.shape[0])
    return jax.lax.map(lambda part: jax.nn.log_softmax(_logits(part, norm, weight, eps, dot_name)), _chunks(x, size))


@functools.partial(jax.jit, static_argnames=("eps", "dot_name", "size"))
def _compare(
    known: Array,
    candidates: tuple[Array, ...],
    norm: Array,
    original: Any,
    head: Any,
    target: Array,
    eps: float,
    dot_name: str,
    size: int,
) -> tuple[Array, Array, Array]:
    """`known` is the original's residual stream [tokens, hidden], or its log-probabilities by chunks."""
    tokens = target.shape[0]
    size = min(size, tokens)

    def each_chunk(parts: tuple[Array, tuple[Array, ...], Array]) -> tuple[Array, Array, Array]:
        of_original, others, wanted = parts
        if known.ndim == 2:
            of_original = jax.nn.log_softmax(_logits(of_original, norm, original, eps, dot_name))
        best = jnp.argmax(of_original, axis=-1)
        found = [divergence(of_original, best, _logits(x, norm, head, eps, dot_name), wanted) for x in others]
        kl, flips, loss = (jnp.stack(each) for each in zip(*found, strict=True))
        return kl, flips, loss

    parts = (
        known if known.ndim == 3 else _chunks(known, size),
        tuple(_chunks(x, size) for x in candidates),
        _chunks(target, size),
    )
    found = jax.lax.map(each_chunk, parts)  # chunks candidates size
    kl, flips, loss = (jnp.swapaxes(x, 0, 1).reshape(len(candidates), -1)[:, :tokens] for x in found)
    return kl, flips, loss


def divergence(
    p: Float32[Array, "tokens vocabulary"],
    best: Int32[Array, " tokens"],
    logits: Float32[Array, "tokens vocabulary"],
    wanted: Int32[Array, " tokens"],
) -> tuple[Float32[Array, " tokens"], Float32[Array, " tokens"], Float32[Array, " tokens"]]:
    """KL(p || softmax(logits)), whether the most likely token differs, and -log softmax(logits)[wanted].

    Args:
        p: log-probabilities.
        best: the most likely token of each.
        logits: of the other model.
        wanted: tokens; -1 for none, whose loss is 0.
    """

    def at(x: Array, index: Array) -> Array:
        return jnp.take_along_axis(x, index[:, None], axis=1)

    theirs, ours = at(logits, best), at(p, best)
    z = (logits - theirs) - (p - ours)
    weight = jnp.exp(p)
    series = z * z * (0.5 + z * (1 / 6 + z * (1 / 24 + z / 120)))
    above = jnp.where(jnp.abs(z) < _SERIES, weight * series, jnp.exp(p + z) - weight * (1 + z))
    mean, rest = jnp.sum(weight * z, axis=-1), jnp.sum(above, axis=-1)
    log_sum = jnp.log1p(mean + rest)
    flips = (jnp.max(logits, axis=-1) > theirs[:, 0]).astype(jnp.float32)
    likely = (at(logits, jnp.maximum(wanted, 0)) - theirs + ours)[:, 0] - log_sum
    return log_sum - mean, flips, jnp.where(wanted < 0, 0.0, -likely)
