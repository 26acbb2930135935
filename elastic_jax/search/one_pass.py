"""Scores of all groups from one pass forward and one backward: `search --fast`.

To second order, KL(original || changed) is half the quadratic form of Fisher's information with the change of a group's
output. Labels drawn from the model give gradients g of their log-probability with that form as their second moment
(Martens, arXiv:1412.1193). Taking errors at different tokens and channels for independent leaves the sum of (g x error)
squared, over two: the error of each output, weighed by its gradient. It costs about what ten forward passes cost,
instead of several hundred; what it leaves out is how errors of one group add up, and everything beyond second order.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from elastic_jax.config import ModelConfig
from elastic_jax.groups import LM_HEAD, layer_groups, model_groups
from elastic_jax.norm import RMSNorm
from elastic_jax.plan import Choice
from elastic_jax.quantization import swiglu
from elastic_jax.search.calibrate import Steps
from elastic_jax.search.distances import Head
from elastic_jax.search.forward import HALVES, Forward, run_half
from elastic_jax.search.parallel import Forwards, Shards
from elastic_jax.search.products import product
from elastic_jax.search.scores import Score, Scores
from elastic_jax.search.sensitivity import base_plan, mean_score
from elastic_jax.weights import PROMPT_ACTIVATIONS

METHOD = "one pass"
"""How the scores of this file were made, in what identifies them."""

_SCORED: tuple[Choice, ...] = ("w8a16", "w8a8b", "w8a8")


def measure_fast(forward: Forwards, scores: Scores, *, seed: int, progress: Steps) -> None:
    """Adds a score from the end `alone` for every group and choice; there are no flips in them.

    Args:
        forward: the model, over the text.
        scores: is added to; of an identity that says `METHOD`.
        seed: of the labels.
        progress: is told how many layers are done.
    """
    parts = forward.parts if isinstance(forward, Shards) else (forward,)
    config = forward.config
    total = 2 * config.num_layers * len(parts)
    sums: dict[str, list[Any]] = {name: [] for name in model_groups(config) if name != LM_HEAD}
    heads, tokens = [], 0
    for number, part in enumerate(parts):
        done = 2 * config.num_layers * number
        streams = [part.embed()]
        bf16 = base_plan(model_groups(config), "alone", "prompt")
        for layer in range(config.num_layers):
            progress(done + layer, total, f"layer {layer}, forward")
            streams.append(part.run_layer(streams[-1], layer, bf16, "prompt"))
        reference = part.reference(streams[-1])
        heads.append((part, reference, part.compare(reference, [streams[-1]], "w8a16")))
        gradient = _head_gradient(streams.pop(), *_settings(part.head), jnp.uint32(seed + number))
        for layer in reversed(range(config.num_layers)):
            progress(done + 2 * config.num_layers - layer - 1, total, f"layer {layer}, backward")
            gradient, found = layer_scores(part, streams.pop(), layer, gradient)
            part.used_by(gradient)
            part.expect(layer - 1, ("bf16", "w8a16"))
            for name, by_choice in found.items():
                sums[name].append(by_choice)
        tokens += part.windows.size
    for name, found in sums.items():
        added = np.sum([np.asarray(each, np.float64) for each in found], axis=0) / tokens
        for choice, kl in zip(_SCORED, added, strict=True):
            scores.add("alone", "prompt", name, choice, Score(float(kl), None))
    means = [(mean_score(part.gather(reference, found), 0).kl, part.windows.size) for part, reference, found in heads]
    kl = sum(mean * size for mean, size in means) / tokens
    scores.add("alone", "prompt", LM_HEAD, "w8a16", Score(kl, None))
    progress(total, total, "every group is scored")


def layer_scores(forward: Forward, x: Array, layer: int, gradient: Array) -> tuple[Array, dict[str, Array]]:
    """What one layer's groups add to the sum of KL over all tokens, by `_SCORED`, and the gradient before the layer.

    Args:
        forward: the model.
        x: the residual stream before the layer, float32 [tokens, hidden].
        layer: its number.
        gradient: of the labels' log-probability by the residual stream after it, float32 [tokens, hidden].

    Returns:
        the gradient by the residual stream before it, and group -> float32 [choices].
    """
    settings = (forward.config, forward.shape, forward.dot_name)
    floats = {half: forward.half_weights(half, layer) for half in HALVES}
    middle = _forward_half(x, floats["attention"], "attention", *settings)
    found: dict[str, Array] = {}
    for half, before in (("mlp", middle), ("attention", x)):
        rounded = {kind: forward.weight(f"layers.{layer}.{kind}", "w8a16") for kind in HALVES[half][1]}
        gradient, by_kind = _half_scores(before, floats[half], rounded, gradient, half, *settings)
        found |= {f"layers.{layer}.{kind}": scores for kind, scores in by_kind.items()}
    return gradient, found


def _settings(head: Head) -> tuple[Any, ...]:
    return head.norm, head.weight, head.eps, head.dot_name, head.tokens


@functools.partial(jax.jit, static_argnames=("half", "config", "shape", "dot_name"))
def _forward_half(
    x: Array, weights: dict[str, Any], half: str, config: ModelConfig, shape: tuple[int, int], dot_name: str
) -> Array:
    return run_half(x, weights, half, config, shape, product(dot_name))


@functools.partial(jax.jit, static_argnames=("half", "config", "shape", "dot_name"))
def _half_scores(
    x: Array,
    floats: dict[str, Any],
    rounded: dict[str, Any],
    gradient: Array,
    half: str,
    config: ModelConfig,
    shape: tuple[int, int],
    dot_name: str,
) -> tuple[Array, dict[str, Array]]:
    dot, kinds = product(dot_name), HALVES[half][1]
    sizes = {group.kind: group.out_size for group in layer_groups(config, 0)}

    def run(x: Array, probes: Mapping[str, Array]) -> tuple[Array, dict[str, tuple[Array, Array]]]:
        """With what is added to each group's output: the gradient by it is that by the output."""
        seen: dict[str, tuple[Array, Array]] = {}

        def probed(
            x: Array,
            weight: Any,
            *,
            generated: int,
            norm: RMSNorm | None = None,
            gated: bool = False,
            residual: Array | None = None,
        ) -> Array:
            kind = kinds[len(seen)]
            x = x if norm is None else norm(x)
            out = dot(x, weight, generated=generated)
            seen[kind] = (x, out)
            out = out + probes[kind]
            out = swiglu(out) if gated else out
            return out if residual is None else residual + out

        return run_half(x, floats, half, config, shape, probed), seen

    probes = {kind: jnp.zeros((x.shape[0], sizes[kind]), jnp.float32) for kind in kinds}
    _, pull, seen = jax.vjp(run, x, probes, has_aux=True)
    before, by_output = pull(gradient)
    scores = {}
    for kind in kinds:
        given, out = seen[kind]
        errors = [
            dot(given, dataclasses.replace(rounded[kind], prompt_activations=PROMPT_ACTIVATIONS[c]), generated=0) - out
            for c in _SCORED
        ]
        scores[kind] = jnp.stack([0.5 * jnp.sum(jnp.square(by_output[kind] * error)) for error in errors])
    return before, scores


@functools.partial(jax.jit, static_argnames=("eps", "dot_name", "size"))
def _head_gradient(x: Array, norm: Array, weight: Any, eps: float, dot_name: str, size: int, seed: Array) -> Array:
    """The gradient of the drawn labels' log-probability by the last residual stream."""
    tokens = x.shape[0]
    size = min(size, tokens)
    padded = jnp.pad(x, ((0, -tokens % size), (0, 0))).reshape(-1, size, x.shape[1])

    def each_chunk(parts: tuple[Array, Array]) -> Array:
        chunk, key = parts

        def logits(x: Array) -> Array:
            return product(dot_name)(RMSNorm(norm, eps)(x), weight, generated=x.shape[0])

        found, pull = jax.vjp(logits, chunk)
        label = jax.random.categorical(key, found, axis=-1)
        drawn = jnp.arange(found.shape[1], dtype=label.dtype)[None, :] == label[:, None]
        return pull(drawn.astype(jnp.float32) - jax.nn.softmax(found, axis=-1))[0]

    keys = jax.random.split(jax.random.key(seed), padded.shape[0])
    return jax.lax.map(each_chunk, (padded, keys)).reshape(-1, x.shape[1])[:tokens]
