"""Layers and language-model head of steps that only generate.

Layers are timed as they run: a chain, in which each fetches its first weights while the one before still runs. The
time of one is that of the chain, with the sum that ends it, divided by their number.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kernel_case import Case, Place, Random, copies, difference, each_layer, first_layer, first_result
from random_model import SMALL

from elastic_jax import kernels
from elastic_jax.batch import TokenBatch
from elastic_jax.config import ModelConfig
from elastic_jax.groups import LM_HEAD, model_groups
from elastic_jax.kv_cache import KvPrecision, QuantizedCache, abstract_cache
from elastic_jax.model import Block, Linear, rotation
from elastic_jax.norm import RMSNorm
from elastic_jax.plan import Choice, Plan
from elastic_jax.weights import abstract_weights

LAYERS = 4
"""Of a chain: gigabytes of weights, of which nothing is left in the L2 cache when the chain begins again."""

TOKENS = (1, 8, 16, 64)

PAGE = 64
PRECISIONS: dict[str, Choice] = {"int8": "w8a8", "bf16": "bf16"}


def decode_layers(place: Place) -> Iterable[Case]:
    tokens, contexts = ((1, 3), (100,)) if place.config == SMALL else (TOKENS, (256, 4096))
    for implementation in place.implementations("decode"):
        for weights in PRECISIONS:
            for kv in ("full", "int8"):
                for context in contexts if kv == "full" else contexts[-1:]:
                    for count in tokens if kv == "full" else (tokens[0], tokens[-1]):
                        if weights == "int8" or kv == "full":
                            yield _layers(place, implementation, weights, kv, count, context)


def _layers(place: Place, implementation: str, precision: str, kv: KvPrecision, tokens: int, context: int) -> Case:
    config = dataclasses.replace(place.config, num_layers=LAYERS, vocab_size=64)
    abstract = _abstract(config, PRECISIONS[precision])
    leaves, tree = jax.tree.flatten({name: leaf for name, leaf in abstract.items() if name.startswith("layers")})
    pages = -(-(context + 1) // PAGE)
    table = np.random.default_rng(0).permutation(tokens * pages).reshape(tokens, pages).astype(np.int32)
    slot = (table[:, context // PAGE] * PAGE + context % PAGE).astype(np.int32)
    cache = abstract_cache((tokens * pages * PAGE, 2, config.num_kv_heads, config.head_dim), "bfloat16", kv)

    def operands(random: Random) -> tuple[Any, Any]:
        drawn = [random.weight(leaf.shape, leaf.dtype) for leaf in leaves]
        row = np.arange(tokens, dtype=np.int32)
        batch = TokenBatch(
            row=jnp.asarray(row),
            position=jnp.full(tokens, context, jnp.int32),
            slot=jnp.asarray(slot),
            block_table=jnp.asarray(table),
            context_length=jnp.full(tokens, context + 1, jnp.int32),
            generated=tokens,
            page_size=PAGE,
        )
        x = random.normal((tokens, config.hidden_size))
        caches = tuple(_random_cache(random, cache) for _ in range(LAYERS))
        return (jax.tree.unflatten(tree, drawn), x, batch), caches

    def run(implementation: str, attention: str, dot: str) -> Any:
        def chain(given: Any, caches: Any) -> tuple[Any, Any]:
            weights, x, batch = given
            attend, multiply = kernels.attention(attention), kernels.dot(dot)
            layers = [Block(config, weights, i, attend, multiply) for i in range(LAYERS)]
            decode = kernels.decode(implementation)
            if decode is not None:
                if not decode.takes(layers, tokens):
                    raise ValueError(f"decode's kernels do not take {tokens} tokens on this device")
                return decode.run_layers(layers, x, caches, batch)
            return _composed(config, layers, x, caches, batch)

        return chain

    def outcome(x: Any, caches: Sequence[Any]) -> Any:
        """The residual stream, and what was written for the tokens."""
        return x, [jax.tree.map(lambda leaf: leaf[slot], each) for each in caches]

    groups = model_groups(config)
    elements = sum(group.out_size * group.in_size for name, group in groups.items() if name.startswith("layers"))
    each = elements // LAYERS
    head_bytes = 2 * config.head_dim if kv == "full" else config.head_dim + 4
    live = tokens * (context + 1) * 2 * config.num_kv_heads * head_bytes
    cached = "" if kv == "full" else " with int8 KV"
    return Case(
        kernel="decode_layer",
        implementation=implementation,
        work=f"{precision} at {context}{cached}, {tokens} token{'s' * (tokens > 1)}",
        turn=place.turn("decode", implementation, telling=(tokens, context) in ((1, 256), (16, 4096))),
        read_bytes=each * (1 if precision == "int8" else 2) + live,
        # A generated token's int8 activation has two planes.
        operations=2 * tokens * each * (2 if precision == "int8" else 1),
        arithmetic="int8" if precision == "int8" else "bf16",
        layers=LAYERS,
        operands=operands,
        call=run(implementation, place.defaults["attention"], place.defaults["dot"]),
        outcome=outcome,
        reference=lambda given, caches: outcome(*run("xla", "xla", place.defaults["dot"])(given, caches)),
        error=difference,
        tolerance=3e-2,  # of the largest: the residual stream is bf16, and rounded at every layer
    )


def _abstract(config: ModelConfig, choice: Choice) -> dict[str, Any]:
    """Shapes of a model whose layers are all computed in one way."""
    choices = {name: "bf16" if name == LM_HEAD else choice for name in model_groups(config)}
    return dict(abstract_weights(config, Plan("bench", choices, "", True, {}), "bfloat16"))


def _composed(config: ModelConfig, layers: Sequence[Block], x: Any, caches: Any, batch: TokenBatch) -> tuple[Any, Any]:
    angles = rotation(batch.position, config.head_dim, config.rope_theta)
    written = []
    for layer, cache in zip(layers, caches, strict=True):
        x, cache = layer(x, angles, cache, batch)
        written.append(cache)
    return x, tuple(written)


def _random_cache(random: Random, cache: Any) -> Any:
    """Numbers of a deviation of about one."""
    if not isinstance(cache, QuantizedCache):
        return random.normal(cache.shape)
    scales = random.uniform(cache.scales.shape, 0.5, 1.5) / 37
    return dataclasses.replace(cache, values=random.int8(cache.shape), scales=scales)


def decode_heads(place: Place) -> Iterable[Case]:
    for implementation in place.implementations("decode"):
        for precision in PRECISIONS:
            for rows in (1, 3) if place.config == SMALL else (TOKENS[0], TOKENS[-1]):
                yield _head(place, implementation, precision, rows)


def _head(place: Place, implementation: str, precision: str, rows: int) -> Case:
    config = place.config
    choices: dict[str, Choice] = {name: "bf16" for name in model_groups(config)}
    choices[LM_HEAD] = "w8a16" if precision == "int8" else "bf16"
    weight = abstract_weights(config, Plan("bench", choices, "", True, {}), "bfloat16")[LM_HEAD]
    leaves, tree = jax.tree.flatten(weight)
    elements = config.vocab_size * config.hidden_size
    count = copies(elements)

    def operands(random: Random) -> tuple[Any, Any]:
        x, norm = random.normal((rows, config.hidden_size)), random.weight((config.hidden_size,), jnp.bfloat16)

        def drawn() -> Any:
            return jax.tree.unflatten(tree, [random.weight(leaf.shape, leaf.dtype) for leaf in leaves])

        return ((x, norm), [(drawn(),) for _ in range(count)]), ()

    def run(implementation: str, dot: str) -> Any:
        def logits(x: Any, norm_weight: Any, weight: Any) -> jax.Array:
            norm, decode = RMSNorm(norm_weight, config.rms_norm_eps), kernels.decode(implementation)
            if decode is not None:
                if not decode.takes_head(weight, rows):
                    raise ValueError(f"decode's kernels do not take {rows} rows on this device")
                return decode.run_head(norm, weight, x)
            return Linear(weight, kernels.dot(dot))(x, generated=rows, norm=norm)

        return logits

    return Case(
        kernel="decode_head",
        implementation=implementation,
        work=f"{precision} [{config.vocab_size} x {config.hidden_size}], {rows} token{'s' * (rows > 1)}",
        turn=place.turn("decode", implementation, telling=False),
        read_bytes=elements * (1 if precision == "int8" else 2),
        operations=2 * rows * elements * (2 if precision == "int8" else 1),
        arithmetic="int8" if precision == "int8" else "bf16",
        layers=count,
        operands=operands,
        call=each_layer(run(implementation, place.defaults["dot"])),
        outcome=first_result,
        reference=first_layer(run("xla", "xla")),
        error=difference,
        tolerance=1e-2,
    )
