"""The paged attention against a dense one in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_jax import kernels
from elastic_jax.batch import TokenBatch
from elastic_jax.errors import ConfigError
from elastic_jax.kernels import attention_xla

# Two and a half blocks of context, one and a half tiles of prompt tokens, in one compiled shape.
PAGE, PAGES, POOL, ROWS = 16, 40, 160, 6
HEADS, KV_HEADS, DIM = 4, 2, 8
GENERATED, PROMPT = 4, 100

attend = jax.jit(attention_xla.attention)


@dataclasses.dataclass
class Sequence:
    """One row: its context, and how many tokens at the end of it are this step's prompt tokens (0: one generated)."""

    row: int
    context: int
    chunk: int


@dataclasses.dataclass
class Step:
    """Sequences laid out in pages: the kernel's arguments, and each token's place in its sequence."""

    query: np.ndarray
    kv: np.ndarray
    batch: TokenBatch
    keys: dict[int, np.ndarray]
    values: dict[int, np.ndarray]
    pages: dict[int, np.ndarray]


def lay_out(
    sequences: list[Sequence], *, generated: int, prompt: int, seed: int, poison: float, kv_heads: int = KV_HEADS
) -> Step:
    """Puts sequences into shuffled pages; slots that no sequence has written hold `poison`."""
    rng = np.random.default_rng(seed)
    kv = np.full((POOL * PAGE, 2, kv_heads, DIM), poison, np.float32)
    table, length = np.zeros((ROWS, PAGES), np.int32), np.zeros(ROWS, np.int32)
    free = list(rng.permutation(POOL))
    row = np.full(generated + prompt, ROWS, np.int32)
    position, slot = np.zeros(generated + prompt, np.int32), np.full(generated + prompt, POOL * PAGE, np.int32)
    step = Step(np.empty(0), kv, None, {}, {}, {})  # pyright: ignore[reportArgumentType]
    at_generated, at_prompt = 0, generated
    for sequence in sequences:
        pages = np.array([free.pop() for _ in range(-(-sequence.context // PAGE))], np.int32)
        slots = (pages[:, None] * PAGE + np.arange(PAGE)).reshape(-1)[: sequence.context]
        written = rng.standard_normal((sequence.context, 2, kv_heads, DIM)).astype(np.float32)
        kv[slots] = written
        table[sequence.row, : len(pages)], length[sequence.row] = pages, sequence.context
        step.keys[sequence.row], step.values[sequence.row] = written[:, 0], written[:, 1]
        step.pages[sequence.row] = pages
        if sequence.chunk:
            here = slice(at_prompt, at_prompt + sequence.chunk)
            at_prompt = here.stop
        else:
            here = slice(at_generated, at_generated + 1)
            at_generated = here.stop
        count = here.stop - here.start
        row[here], position[here] = sequence.row, np.arange(sequence.context - count, sequence.context)
        slot[here] = slots[-count:]
    step.query = rng.standard_normal((generated + prompt, HEADS, DIM)).astype(np.float32)
    step.batch = TokenBatch(row, position, slot, table, length, generated, PAGE)
    return step


def reference(step: Step, tokens: range | None = None) -> np.ndarray:
    """Dense causal grouped-query attention in float64; zeros for padding."""
    batch, out = step.batch, np.zeros(step.query.shape)
    for token in tokens or range(len(batch.row)):
        row, position = int(batch.row[token]), int(batch.position[token])
        if row == ROWS:
            continue
        keys, values = (a[row][: position + 1].astype(np.float64) for a in (step.keys, step.values))
        for head in range(HEADS):
            shared = head // (HEADS // keys.shape[1])
            scores = keys[:, shared] @ step.query[token, head] / np.sqrt(DIM)
            weights = np.exp(scores - scores.max())
            out[token, head] = weights @ values[:, shared] / weights.sum()
    return out


def check(step: Step) -> None:
    out = np.asarray(attend(step.query, step.kv, step.batch))
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, reference(step), atol=3e-6)


@st.composite
def mixtures(draw) -> list[Sequence]:
    """Any sequences that fit: some generating, some with a chunk of their prompt, of any lengths and in any rows."""
    rows = draw(st.permutations(range(ROWS)))
    lengths = st.one_of(st.integers(1, PAGES * PAGE), st.sampled_from([1, 15, 16, 17, 255, 256, 257, 512, 513, 640]))
    room, found = PROMPT, []
    kinds = draw(st.lists(st.booleans(), min_size=0, max_size=ROWS))
    for row, prompt in zip(rows, kinds, strict=False):
        context = draw(lengths)
        if prompt and room:
            chunk = draw(st.integers(1, min(context, room)))
            room -= chunk
            found.append(Sequence(row, context, chunk))
        elif not prompt and sum(not s.chunk for s in found) < GENERATED:
            found.append(Sequence(row, context, 0))
    while sum(-(-s.context // PAGE) for s in found) > POOL:
        found.pop()
    return found


@settings(max_examples=60)
@given(mixtures(), st.integers(0, 1000), st.sampled_from([0.0, 1e30, np.nan, np.inf, -np.inf]))
def test_any_mixture_agrees_with_dense_attention(sequences, seed, poison):
    check(lay_out(sequences, generated=GENERATED, prompt=PROMPT, seed=seed, poison=poison))


@pytest.mark.parametrize(
    ("generated", "prompt", "sequences"),
    [
        (1, 0, [Sequence(3, 1, 0)]),
        (1, 0, [Sequence(0, 640, 0)]),
        (3, 0, [Sequence(5, 17, 0), Sequence(2, 256, 0)]),
        (0, 1, [Sequence(4, 1, 1)]),
        (0, 1, [Sequence(4, 300, 1)]),
        (0, 7, [Sequence(0, 3, 3), Sequence(1, 4, 4)]),
        (0, 65, [Sequence(2, 65, 65)]),
        (0, 130, [Sequence(2, 640, 1), Sequence(0, 200, 129)]),
        (2, 5, [Sequence(1, 9, 0), Sequence(0, 33, 0), Sequence(2, 5, 5)]),
        (2, 16, []),
    ],
)
def test_odd_sizes(generated, prompt, sequences):
    check(lay_out(sequences, generated=generated, prompt=prompt, seed=0, poison=np.nan))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_every_grouping_of_heads(kv_heads):
    sequences = [Sequence(0, 40, 0), Sequence(3, 300, 9)]
    check(lay_out(sequences, generated=2, prompt=16, seed=0, poison=np.nan, kv_heads=kv_heads))


def test_chunks_of_a_prompt_together_are_the_whole_prompt():
    whole = lay_out([Sequence(1, 90, 90)], generated=GENERATED, prompt=PROMPT, seed=5, poison=np.nan)
    expected = np.asarray(attend(whole.query, whole.kv, whole.batch))[GENERATED:][:90]
    found, start = [], 0
    for count in (1, 40, 16, 33):
        part = lay_out([Sequence(1, 90, 90)], generated=GENERATED, prompt=PROMPT, seed=5, poison=np.nan)
        tokens = slice(GENERATED + start, GENERATED + start + count)
        query = np.zeros_like(part.query)
        query[GENERATED : GENERATED + count] = part.query[tokens]
        row, position = np.full(len(query), ROWS, np.int32), np.zeros(len(query), np.int32)
        row[GENERATED : GENERATED + count] = 1
        position[GENERATED : GENERATED + count] = np.arange(start, start + count)
        length = part.batch.context_length.copy()
        length[1] = start + count
        # Later chunks are not written yet.
        later = (part.pages[1][:, None] * PAGE + np.arange(PAGE)).reshape(-1)[start + count :]
        part.kv[later] = np.nan
        batch = dataclasses.replace(part.batch, row=row, position=position, context_length=length)
        found.append(np.asarray(attend(query, part.kv, batch))[GENERATED : GENERATED + count])
        start += count
    np.testing.assert_allclose(np.concatenate(found), expected, atol=2e-6)


def test_a_generated_token_attends_as_the_last_prompt_token_does():
    prompt = lay_out([Sequence(1, 77, 1)], generated=1, prompt=1, seed=5, poison=np.nan)
    generated = lay_out([Sequence(1, 77, 0)], generated=1, prompt=1, seed=5, poison=np.nan)
    generated.query[0] = prompt.query[1]
    np.testing.assert_allclose(
        np.asarray(attend(generated.query, generated.kv, generated.batch))[0],
        np.asarray(attend(prompt.query, prompt.kv, prompt.batch))[1],
        atol=2e-6,
    )


def test_a_broken_sequence_leaves_its_neighbours_alone():
    sequences = [Sequence(0, 300, 0), Sequence(4, 20, 0), Sequence(2, 290, 10), Sequence(5, 30, 12)]
    step = lay_out(sequences, generated=GENERATED, prompt=PROMPT, seed=1, poison=0.0)
    clean = np.asarray(attend(step.query, step.kv, step.batch))
    for row in (0, 5):
        kv = step.kv.copy()
        kv[step.pages[row][0] * PAGE] = np.nan
        out = np.asarray(attend(step.query, kv, step.batch))
        mine = step.batch.row == row
        assert np.isnan(out[mine]).all()
        assert (out[~mine] == clean[~mine]).all()


def test_large_scores_do_not_overflow():
    step = lay_out([Sequence(0, 300, 0), Sequence(1, 80, 20)], generated=2, prompt=32, seed=2, poison=0.0)
    step.query *= 1e4
    out, expected = np.asarray(attend(step.query, step.kv, step.batch)), reference(step)
    np.testing.assert_allclose(out, expected, atol=1e-3)


def test_padding_gives_zeros():
    step = lay_out([Sequence(0, 20, 0)], generated=GENERATED, prompt=PROMPT, seed=2, poison=np.nan)
    out = np.asarray(attend(step.query, step.kv, step.batch))
    assert (out[1:] == 0).all()
    assert (out[0] != 0).all()


def test_a_bf16_cache_is_summed_in_float32():
    step = lay_out([Sequence(0, 640, 0), Sequence(1, 500, 60)], generated=2, prompt=64, seed=3, poison=np.nan)
    rounded = {name: np.asarray(jnp.asarray(getattr(step, name), jnp.bfloat16)) for name in ("query", "kv")}
    out = attend(rounded["query"], rounded["kv"], step.batch)
    assert out.dtype == jnp.float32
    exact = {row: np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32) for row, a in step.keys.items()}
    step.keys = exact
    step.values = {row: np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32) for row, a in step.values.items()}
    step.query = rounded["query"].astype(np.float32)
    np.testing.assert_allclose(np.asarray(out), reference(step), atol=1e-5)


def test_short_contexts_cost_the_same_for_any_longest_context():
    # The loop's bound is data: no array of the program is as long as the longest context.
    long = 1 << 15
    batch = TokenBatch(
        *(jax.ShapeDtypeStruct(s, jnp.int32) for s in ((5,), (5,), (5,), (2, long // PAGE), (2,))), 1, PAGE
    )
    query = jax.ShapeDtypeStruct((5, HEADS, DIM), jnp.float32)
    kv = jax.ShapeDtypeStruct((2 * long, 2, KV_HEADS, DIM), jnp.float32)
    analysis = jax.jit(attention_xla.attention).lower(query, kv, batch).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < 2 * long * KV_HEADS * DIM * 4 / 4


def test_implementations_are_asked_for_by_name():
    assert kernels.attention("xla") is attention_xla.attention
    with pytest.raises(ConfigError, match=r"no attention implementation is called 'cudnn'; there are .*'xla'"):
        kernels.attention("cudnn")
