"""The step: the compiled unit that runs the model over D generated tokens and P prompt tokens of any mix of sequences.

Its border is frozen early, because a later field invalidates every executable. On the device, and donated every step:
the KV cache and the state of every row. From the host: the arrays of `StepInputs`, and of `SamplingInputs` where a row
samples. To the host, and read a step late: token, log-probability, most likely tokens and a finite flag per output.
Left on the device for those who ask: the logits.

A generated token's id and position come from the row's state, since the host has not read them yet; a prompt token's
come from the host.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from elastic_jax import sampling as sampler
from elastic_jax.batch import TokenBatch
from elastic_jax.config import ModelConfig
from elastic_jax.errors import ConfigError
from elastic_jax.kv_cache import Cache, KvPrecision, abstract_cache
from elastic_jax.model import Mistral
from elastic_jax.quantization import QArray
from elastic_jax.sampling import Choose, SampledRows, SamplingInputs

type Variant = Literal["greedy", "sampling", "score"]
type ComputeDtype = Literal["bfloat16", "float32"]


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """A size that a step is compiled for.

    Attributes:
        generated: D, rows of generated tokens.
        prompt: P, prompt tokens.
    """

    generated: int
    prompt: int

    @property
    def tokens(self) -> int:
        """D + P."""
        return self.generated + self.prompt

    def outputs(self, rows: int) -> int:
        """Tokens whose logits one step can give: every generated one, and the last ones of some prompts.

        Logits for every prompt token would make the language-model head as large as the rest of a small model.
        """
        return self.generated + min(rows, (self.prompt + 15) // 16)


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What every unit of a store is compiled for, beside model, plan and device.

    Attributes:
        rows: sequences that can be in progress at once.
        page_size: KV slots a page.
        kv_slots: KV slots of the pool, shared by all rows; a multiple of `page_size`.
        max_context: longest context of a sequence, in tokens.
        top_n: most likely tokens that can be reported per output.
        max_bias: entries of a row's sparse logit bias.
        dtype: type of the residual stream, of unquantized products and, unless `kv` says otherwise, of the KV cache.
        buckets: sizes of step.
        attention: name of the attention implementation (`kernels.ATTENTION`).
        dot: name of the implementation of matrix products (`kernels.DOT`).
        decode: name of the implementation of steps that only generate (`kernels.DECODE`).
        sampling: name of the implementation of choosing tokens (`kernels.SAMPLING`).
        kv: precision of the KV cache.
    """

    rows: int
    page_size: int
    kv_slots: int
    max_context: int
    top_n: int
    max_bias: int
    dtype: ComputeDtype
    buckets: tuple[Bucket, ...]
    attention: str
    dot: str
    decode: str
    sampling: str
    kv: KvPrecision

    def __post_init__(self) -> None:
        """Refuses sizes that no engine could run on.

        Raises:
            ConfigError: sizes are not positive, do not divide, or leave generated or prompt tokens without a bucket.
        """
        for name in ("rows", "page_size", "kv_slots", "max_context", "top_n", "max_bias"):
            if getattr(self, name) < 1:
                raise ConfigError(f"step config: {name} must be at least 1, found {getattr(self, name)}")
        if self.kv_slots % self.page_size:
            raise ConfigError(f"step config: page_size {self.page_size} must divide kv_slots {self.kv_slots}")
        if self.max_context > self.kv_slots:
            raise ConfigError(
                f"step config: max_context {self.max_context} is more than the pool's kv_slots {self.kv_slots}"
            )
        if max((b.generated for b in self.buckets if not b.prompt), default=0) < self.rows:
            raise ConfigError(f"step config: no bucket runs {self.rows} generated tokens alone, one for each row")
        if not any(b.prompt and not b.generated for b in self.buckets):
            raise ConfigError("step config: no bucket runs prompt tokens alone, (0, P)")

    @property
    def pages(self) -> int:
        """Entries of a row's block table."""
        return -(-self.max_context // self.page_size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowState:
    """What the device keeps for each row between steps.

    Attributes:
        last_token: int32 [rows], the newest token, not yet in the KV cache.
        position: int32 [rows], its position.
        key: uint32 [rows, 2], the row's random key.
        counts: int32 [rows, vocab], occurrences of each token in the output.
        prompt_mask: uint32 [rows, ceil(vocab / 32)], bits of the tokens in the prompt.
    """

    last_token: Any
    position: Any
    key: Any
    counts: Any
    prompt_mask: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepState:
    """Everything donated every step: per layer a `kv_cache.Cache`, and the rows."""

    kv: tuple[Any, ...]
    rows: RowState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInputs:
    """What the host says of one step; all int32. `TokenBatch` explains rows, slots and padding.

    Attributes:
        token: [P], prompt tokens.
        position: [P], their positions.
        row: [D + P].
        slot: [D + P].
        block_table: [rows, pages].
        context_length: [rows].
        out_index: [outputs], the tokens whose logits are wanted; D + P where none is.
    """

    token: Any
    position: Any
    row: Any
    slot: Any
    block_table: Any
    context_length: Any
    out_index: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepOutputs:
    """What a step found for each output; see `StepInputs.out_index`.

    Attributes:
        token: int32 [outputs], the next token.
        log_probability: float32 [outputs], its log-probability by the model itself: before penalties, bias, mask and
            temperature.
        finite: bool [outputs], whether every logit is finite.
        logits: float32 [outputs, vocab], by the model itself.
        top_token: int32 [outputs, top_n], the most likely tokens; None unless a row asked for them (`top`).
        top_log_probability: float32 [outputs, top_n], or None.
    """

    token: Any
    log_probability: Any
    finite: Any
    logits: Any
    top_token: Any = None
    top_log_probability: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScoreOutputs:
    """What the `score` variant found for each prompt token.

    Attributes:
        log_probability: float32 [P], of the token's target.
        argmax: int32 [P], the most likely next token.
        top_token: int32 [P, top_n], if asked for.
        top_log_probability: float32 [P, top_n].
        finite: bool [P].
    """

    log_probability: Any
    argmax: Any
    top_token: Any
    top_log_probability: Any
    finite: Any


def _run_model(
    model: Mistral, kv: tuple[Cache, ...], rows: RowState | None, inputs: StepInputs, page_size: int
) -> tuple[Array, tuple[Cache, ...], TokenBatch]:
    generated = inputs.row.shape[0] - inputs.token.shape[0]
    token, position = inputs.token, inputs.position
    if rows is not None and generated:
        row = inputs.row[:generated]
        token = jnp.concatenate([rows.last_token.at[row].get(mode="clip"), token])
        position = jnp.concatenate([rows.position.at[row].get(mode="clip"), position])
    batch = TokenBatch(
        inputs.row, position, inputs.slot, inputs.block_table, inputs.context_length, generated, page_size
    )
    x, kv = model(token, kv, batch)
    return x, kv, batch


def top(
    logits: Float32[Array, "outputs vocab"], top_n: int
) -> tuple[Int32[Array, "outputs n"], Float32[Array, "outputs n"]]:
    """The most likely tokens and their log-probabilities, most likely first.

    A unit of its own, for steps in which a row asked: as a condition inside the step, a GPU's host would have to wait
    for its value in every step.
    """
    tokens, values = sampler.top_tokens(logits, min(top_n, logits.shape[1]))
    return tokens, values - jax.nn.logsumexp(logits, axis=1)[:, None]


def step(
    model: Mistral,
    state: StepState,
    inputs: StepInputs,
    sampling: SamplingInputs | None,
    config: StepConfig,
    choose: Choose,
) -> tuple[StepState, StepOutputs]:
    """Runs the model and chooses the next tokens.

    Args:
        model: the model.
        state: caches and rows; donate it.
        inputs: what the host says.
        sampling: how each row samples; None compiles the `greedy` variant, in which every row takes the most likely
            token and no row has penalties, bias or a grammar.
        config: sizes.
        choose: the implementation of choosing tokens.

    Returns:
        the new state, and what was found.
    """
    x, kv, batch = _run_model(model, state.kv, state.rows, inputs, config.page_size)
    tokens = batch.row.shape[0]
    logits = model.logits(x.at[inputs.out_index].get(mode="clip"))

    live = inputs.out_index < tokens
    row = jnp.where(live, batch.row.at[inputs.out_index].get(mode="clip"), batch.rows)
    position = batch.position.at[inputs.out_index].get(mode="clip") + 1
    rows = state.rows
    token, log_probability, finite = choose(
        logits, sampling, row, position, SampledRows(rows.key, rows.counts, rows.prompt_mask)
    )
    counts = rows.counts if sampling is None else rows.counts.at[row, token].add(1, mode="drop")
    rows = dataclasses.replace(
        rows,
        last_token=rows.last_token.at[row].set(token, mode="drop"),
        position=rows.position.at[row].set(position, mode="drop"),
        counts=counts,
    )
    outputs = StepOutputs(token, log_probability, finite, logits)
    return StepState(kv, rows), outputs


def _vocabulary_chunks(vocab: int) -> int:
    """The fewest equal chunks of at most 8192 entries; one chunk if no such division exists."""
    return next((n for n in range(1, 65) if vocab % n == 0 and vocab // n <= 8192), 1)


def score(
    model: Mistral,
    kv: tuple[Cache, ...],
    inputs: StepInputs,
    target: Int32[Array, " p"],
    top_wanted: Int32[Array, ""],
    config: StepConfig,
) -> tuple[tuple[Cache, ...], ScoreOutputs]:
    """The step with another head: what the model thought of a given next token, for every prompt token.

    The vocabulary is walked in chunks, so that logits [P, vocab] never exist at once.

    Args:
        model: the model.
        kv: every layer's cache; donate it.
        inputs: what the host says; prompt tokens only, `out_index` unused.
        target: the token whose log-probability is wanted after each prompt token.
        top_wanted: nonzero if the most likely tokens are wanted.
        config: sizes.
    """
    x, kv, _ = _run_model(model, kv, None, inputs, config.page_size)
    x = model.final_norm(x)
    weight = model.lm_head.weight.get_value()
    vocab, p = weight.shape[0], x.shape[0]
    chunks = _vocabulary_chunks(vocab)
    size = vocab // chunks
    n = min(config.top_n, size)

    def chunk(carry: tuple[Array, ...], i: Array) -> tuple[tuple[Array, ...], None]:
        largest, total, best, argmax, at_target, finite, top_token, top_logit = carry
        start = i * size

        def rows(leaf: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(leaf, start, size)

        part = dataclasses.replace(weight, values=rows(weight.values), scales=rows(weight.scales)) if isinstance(
            weight, QArray
        ) else rows(weight)  # fmt: skip
        logits = model.lm_head.dot(x, part, generated=p)
        new = jnp.maximum(largest, jnp.max(logits, axis=1))
        total = total * jnp.exp(largest - new) + jnp.sum(jnp.exp(logits - new[:, None]), axis=1)
        here, at = jnp.max(logits, axis=1), jnp.argmax(logits, axis=1).astype(jnp.int32) + start
        argmax, best = jnp.where(here > best, at, argmax), jnp.maximum(here, best)
        inside = (target >= start) & (target < start + size)
        index = jnp.clip(target - start, 0, size - 1)
        at_target = jnp.where(inside, jnp.take_along_axis(logits, index[:, None], axis=1)[:, 0], at_target)

        def merged() -> tuple[Array, Array]:
            tokens, values = sampler.top_tokens(logits, n)
            tokens = jnp.concatenate([top_token, tokens + start], axis=1)
            values, order = jax.lax.top_k(jnp.concatenate([top_logit, values], axis=1), n)
            return jnp.take_along_axis(tokens, order, axis=1), values

        top_token, top_logit = jax.lax.cond(top_wanted > 0, merged, lambda: (top_token, top_logit))
        finite &= jnp.all(jnp.isfinite(logits), axis=1)
        return (new, total, best, argmax, at_target, finite, top_token, top_logit), None

    lowest = jnp.full(p, jnp.finfo(jnp.float32).min)
    zeros = jnp.zeros(p, jnp.int32)
    start = (lowest, jnp.zeros(p), lowest, zeros, jnp.zeros(p), jnp.ones(p, bool))
    tops = (jnp.zeros((p, n), jnp.int32), jnp.full((p, n), -jnp.inf))
    with jax.named_scope("score"):
        done, _ = jax.lax.scan(chunk, (*start, *tops), jnp.arange(chunks, dtype=jnp.int32))
    largest, total, _, argmax, at_target, finite, top_token, top_logit = done
    normalizer = largest + jnp.log(total)
    return kv, ScoreOutputs(at_target - normalizer, argmax, top_token, top_logit - normalizer[:, None], finite)


def admit(
    rows: RowState, row: Int32[Array, ""], key: Array, prompt_mask: Array, token: Array, position: Array
) -> RowState:
    """Prepares a row for a new sequence: its key and prompt, no output yet.

    `token` and `position` start a row in the middle of a sequence; its first output replaces them otherwise.
    """
    return RowState(
        rows.last_token.at[row].set(token),
        rows.position.at[row].set(position),
        rows.key.at[row].set(key),
        rows.counts.at[row].set(jnp.zeros(rows.counts.shape[1], jnp.int32)),
        rows.prompt_mask.at[row].set(prompt_mask),
    )


def copy_page(
    kv: tuple[Cache, ...], source: Int32[Array, ""], destination: Int32[Array, ""], page_size: int
) -> tuple[Cache, ...]:
    """Copies one page of every layer's cache: two sequences that share a prompt part ways inside a page."""

    def copied(leaf: Array) -> Array:
        page = jax.lax.dynamic_slice_in_dim(leaf, source * page_size, page_size)
        return jax.lax.dynamic_update_slice_in_dim(leaf, page, destination * page_size, axis=0)

    return jax.tree.map(copied, kv)


def abstract_state(model: ModelConfig, config: StepConfig) -> StepState:
    """Shapes of the donated state."""
    shape = jax.ShapeDtypeStruct
    cache = abstract_cache((config.kv_slots, 2, model.num_kv_heads, model.head_dim), config.dtype, config.kv)
    rows, words = config.rows, -(-model.vocab_size // 32)
    return StepState(
        kv=(cache,) * model.num_layers,
        rows=RowState(
            last_token=shape((rows,), jnp.int32),
            position=shape((rows,), jnp.int32),
            key=shape((rows, 2), jnp.uint32),
            counts=shape((rows, model.vocab_size), jnp.int32),
            prompt_mask=shape((rows, words), jnp.uint32),
        ),
    )


def abstract_inputs(bucket: Bucket, config: StepConfig) -> StepInputs:
    """Shapes of the host's inputs for one bucket."""

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    return StepInputs(
        token=ints(bucket.prompt),
        position=ints(bucket.prompt),
        row=ints(bucket.tokens),
        slot=ints(bucket.tokens),
        block_table=ints(config.rows, config.pages),
        context_length=ints(config.rows),
        out_index=ints(bucket.outputs(config.rows)),
    )


def abstract_sampling(model: ModelConfig, config: StepConfig) -> SamplingInputs:
    """Shapes of the sampling parameters."""
    shape = jax.ShapeDtypeStruct
    rows = config.rows
    floats, ints = shape((rows,), jnp.float32), shape((rows,), jnp.int32)
    return SamplingInputs(
        temperature=floats,
        top_k=ints,
        top_p=floats,
        min_p=floats,
        repetition_penalty=floats,
        presence_penalty=floats,
        frequency_penalty=floats,
        choice=ints,
        bias_token=shape((rows, config.max_bias), jnp.int32),
        bias=shape((rows, config.max_bias), jnp.float32),
        allowed=shape((rows, -(-model.vocab_size // 32)), jnp.uint32),
    )
