"""From logits to tokens inside the compiled step: penalties, bias, grammar mask, filters, one draw a row.

The vocabulary is never sorted: thresholds for top-k and top-p are found bit by bit on the ordered integer form of a
float. A row draws one uniform number, keyed by its own seed, position and choice, and inverts the cumulative
distribution; so equal seeds give equal draws whatever else runs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt32

_CHUNK = 256
"""Vocabulary entries a chunk, for two-level maxima and cumulative sums."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingInputs:
    """How each row samples; every array has one entry (or one line) a row.

    Attributes:
        temperature: float32; 0 takes the most likely token.
        top_k: int32; keeps the k most likely tokens (and ties); 0 keeps all.
        top_p: float32 in (0, 1]; keeps the smallest set of most likely tokens with at least this mass.
        min_p: float32 in [0, 1]; keeps tokens at least this likely relative to the most likely one.
        repetition_penalty: float32 > 0; divides positive and multiplies negative logits of tokens seen in the prompt or
            the output (Keskar et al., arXiv:1909.05858); 1 does nothing.
        presence_penalty: float32; subtracted from the logits of tokens in the output.
        frequency_penalty: float32; subtracted once per occurrence in the output.
        choice: int32; the number of the answer among several to the same prompt.
        bias_token: int32 [rows, entries]; vocabulary size marks an unused entry.
        bias: float32 [rows, entries], added to those tokens' logits.
        allowed: uint32 [rows, ceil(vocab / 32)]; bit v % 32 of word v // 32 allows token v.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    presence_penalty: Any
    frequency_penalty: Any
    choice: Any
    bias_token: Any
    bias: Any
    allowed: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampledRows:
    """What sampling reads of the state of every row; see `step.RowState`.

    Attributes:
        key: uint32 [rows, 2].
        counts: int32 [rows, vocab].
        prompt_mask: uint32 [rows, ceil(vocab / 32)].
    """

    key: Any
    counts: Any
    prompt_mask: Any


type Choose = Callable[..., tuple[Array, Array, Array]]
"""(logits, sampling, row, position, rows) -> (token, log_probability, finite); see `choose`."""


def unpack_bits(words: UInt32[Array, "rows words"], vocab: int) -> Bool[Array, "rows vocab"]:
    """Bits of each row, least significant first, cut at the vocabulary's size."""
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None, :]) & 1
    return bits.reshape(words.shape[0], -1)[:, :vocab].astype(bool)


def adjust_logits(
    logits: Float32[Array, "rows vocab"],
    sampling: SamplingInputs,
    counts: Int32[Array, "rows vocab"],
    prompt_mask: UInt32[Array, "rows words"],
) -> Float32[Array, "rows vocab"]:
    """Applies repetition, presence and frequency penalties, then logit bias, then the grammar mask."""
    vocab = logits.shape[1]
    penalty = sampling.repetition_penalty[:, None]
    generated = counts > 0
    seen = generated | unpack_bits(prompt_mask, vocab)
    logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    logits -= sampling.frequency_penalty[:, None] * counts.astype(jnp.float32)
    logits -= sampling.presence_penalty[:, None] * generated.astype(jnp.float32)
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    logits = logits.at[rows, sampling.bias_token].add(sampling.bias, mode="drop")
    return jnp.where(unpack_bits(sampling.allowed, vocab), logits, -jnp.inf)


def _ordered(x: Float32[Array, "rows vocab"]) -> UInt32[Array, "rows vocab"]:
    """Unsigned integers in the order of the floats; zeros of both signs are equal."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, jnp.uint32(0) - bits, bits | jnp.uint32(1 << 31))


def _largest_threshold(keys: UInt32[Array, "rows vocab"], weight: Array, at_least: Array) -> UInt32[Array, " rows"]:
    """The largest t with `sum(weight where key >= t) >= at_least`, by bisection on t's bits."""

    def body(i: Array, threshold: Array) -> Array:
        candidate = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        total = jnp.sum(jnp.where(keys >= candidate[:, None], weight, jnp.zeros_like(weight)), axis=1)
        return jnp.where(total >= at_least, candidate, threshold)

    return jax.lax.fori_loop(0, 32, body, jnp.zeros(keys.shape[0], jnp.uint32))


def kept_tokens(logits: Float32[Array, "rows vocab"], sampling: SamplingInputs) -> Bool[Array, "rows vocab"]:
    """Tokens that top-k, then top-p on what top-k left, and min-p keep, of logits already divided by temperature.

    Tokens exactly as likely as the last one kept are kept too.
    """
    vocab = logits.shape[1]
    keys = _ordered(logits)
    largest = jnp.max(logits, axis=1)
    floor = _ordered((largest + jnp.log(jnp.maximum(sampling.min_p, 1e-30)))[:, None])[:, 0]
    floor = jnp.where(sampling.min_p > 0, floor, jnp.uint32(0))
    none = jnp.zeros_like(floor)

    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocab), vocab)
    by_count = jax.lax.cond(
        jnp.any(k < vocab),
        lambda: jnp.where(k < vocab, _largest_threshold(keys, jnp.ones(keys.shape, jnp.int32), k), none),
        lambda: none,
    )

    def nucleus() -> Array:
        kept = keys >= by_count[:, None]
        mass = jnp.where(kept, jnp.exp(logits - largest[:, None]), 0.0)
        needed = sampling.top_p * jnp.sum(mass, axis=1)
        return jnp.where(sampling.top_p < 1, _largest_threshold(keys, mass, needed), none)

    by_mass = jax.lax.cond(jnp.any(sampling.top_p < 1), nucleus, lambda: none)
    threshold = jnp.maximum(jnp.maximum(by_count, by_mass), floor)
    return (keys >= threshold[:, None]) & (logits > -jnp.inf)


def _chunked(x: Array, fill: float) -> Array:
    """[rows, vocab] -> [rows, chunks, _CHUNK]."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % _CHUNK)), constant_values=fill)
    return x.reshape(x.shape[0], -1, _CHUNK)


def draw(
    logits: Float32[Array, "rows vocab"], kept: Bool[Array, "rows vocab"], uniform: Float32[Array, " rows"]
) -> Int32[Array, " rows"]:
    """The token at which the cumulative probability of the kept tokens passes `uniform`, in two levels.

    Where no token is kept, or a logit is NaN, it is some token of the vocabulary.
    """
    largest = jnp.max(jnp.where(kept, logits, -jnp.inf), axis=1, keepdims=True)
    mass = _chunked(jnp.where(kept, jnp.exp(logits - largest), 0.0), 0.0)

    def invert(mass: Float32[Array, "rows n"], target: Float32[Array, " rows"]) -> tuple[Array, Array]:
        total = jnp.cumsum(mass, axis=1)
        index = jnp.sum(total <= target[:, None], axis=1, dtype=jnp.int32)
        # Rounding can put the target at or past the end: then the last entry that has any mass.
        last = mass.shape[1] - 1 - jnp.argmax(mass[:, ::-1] > 0, axis=1).astype(jnp.int32)
        index = jnp.minimum(index, last)
        before = jnp.take_along_axis(total - mass, index[:, None], axis=1)[:, 0]
        return index, target - before

    chunk_mass = jnp.sum(mass, axis=2)
    chunk, rest = invert(chunk_mass, uniform * jnp.sum(chunk_mass, axis=1))
    within, _ = invert(jnp.take_along_axis(mass, chunk[:, None, None], axis=1)[:, 0], rest)
    return jnp.minimum(chunk * _CHUNK + within, logits.shape[1] - 1)


def uniforms(
    key: UInt32[Array, "rows 2"], position: Int32[Array, " rows"], choice: Int32[Array, " rows"]
) -> Float32[Array, " rows"]:
    """One number in [0, 1) a row, by Threefry from the row's key, its new token's position and its choice."""

    def one(key: Array, position: Array, choice: Array) -> Array:
        wrapped = jax.random.wrap_key_data(key, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(wrapped, position), choice), (), jnp.float32)

    return jax.vmap(one)(key, position, choice)


def sample(
    logits: Float32[Array, "rows vocab"], sampling: SamplingInputs, uniform: Float32[Array, " rows"]
) -> Int32[Array, " rows"]:
    """The next token of each row, from adjusted logits."""
    greedy = jnp.argmax(logits, axis=1).astype(jnp.int32)

    def drawn() -> Array:
        scaled = logits / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
        return draw(scaled, kept_tokens(scaled, sampling), uniform)

    sampled = jax.lax.cond(jnp.any(sampling.temperature > 0), drawn, lambda: greedy)
    return jnp.where(sampling.temperature > 0, sampled, greedy)


def choose(
    logits: Float32[Array, "outputs vocab"],
    sampling: SamplingInputs | None,
    row: Int32[Array, " outputs"],
    position: Int32[Array, " outputs"],
    rows: SampledRows,
) -> tuple[Int32[Array, " outputs"], Float32[Array, " outputs"], Bool[Array, " outputs"]]:
    """The next token of each output: the plain-XLA implementation (`kernels.SAMPLING`).

    Args:
        logits: by the model itself.
        sampling: how each row samples; None takes the most likely token of each.
        row: whose output it is; the number of rows, where nobody's: its results mean nothing then.
        position: the new token's.
        rows: the state of every row.

    Returns:
        tokens; their log-probabilities by the model itself, before penalties, bias, mask and temperature; whether every
        logit is finite.
    """
    with jax.named_scope("sample"):
        if sampling is None:
            token = jnp.argmax(logits, axis=1).astype(jnp.int32)
        else:
            mine = jax.tree.map(lambda a: a.at[row].get(mode="clip"), sampling)
            counts, prompt_mask = (a.at[row].get(mode="clip") for a in (rows.counts, rows.prompt_mask))
            adjusted = adjust_logits(logits, mine, counts, prompt_mask)
            token = sample(adjusted, mine, uniforms(rows.key.at[row].get(mode="clip"), position, mine.choice))
    with jax.named_scope("log_probability"):
        total = jax.nn.logsumexp(logits, axis=1)
        log_probability = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - total
    return token, log_probability, jnp.all(jnp.isfinite(logits), axis=1)


def top_tokens(logits: Float32[Array, "rows vocab"], n: int) -> tuple[Int32[Array, "rows n"], Float32[Array, "rows n"]]:
    """Ids and logits of the n largest entries, largest first.

    The n largest lie in the n chunks with the largest maxima, so only those are sorted.
    """
    chunks = _chunked(logits, -jnp.inf)
    rows, count, width = chunks.shape
    _, best = jax.lax.top_k(jnp.max(chunks, axis=2), min(n, count))
    candidates = jnp.take_along_axis(chunks, best[:, :, None], axis=1)
    ids = (best[:, :, None] * width + jnp.arange(width, dtype=jnp.int32)[None, None, :]).reshape(rows, -1)
    values, index = jax.lax.top_k(candidates.reshape(rows, -1), n)
    return jnp.take_along_axis(ids, index, axis=1).astype(jnp.int32), values
