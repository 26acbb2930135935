"""The compiled step of a tiny model in float32: its results, and what it does to the state."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from machine import Machine
from tiny import FIXTURES, MISTRAL_SMALL, TINY_MODELS, Chunk, Generated, Place, step_inputs, tiny_step_config

from elastic_jax import step as steps
from elastic_jax.errors import ConfigError
from elastic_jax.step import Bucket
from elastic_jax.units import build_model, make_units
from elastic_jax.weights import flatten, load_weights

REFERENCE = dict(np.load(FIXTURES / "tiny_reference.npz"))
VOCAB = 320


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64, over the last axis."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def ids(name: str, length: int) -> list[int]:
    return REFERENCE[f"{name}/ids_{length}"].tolist()


def logits_of(length: int, name: str = "tiny_mistral") -> np.ndarray:
    return REFERENCE[f"{name}/logits_{length}"]


@pytest.fixture(scope="module")
def tiny(compiled_tiny):
    return compiled_tiny("XL", "float32")


@pytest.fixture
def machine(tiny) -> Machine:
    return Machine(tiny)


def run_prompt(machine: Machine, place: Place, tokens: list[int], **options: Any):
    bucket = Bucket(0, 64)
    return machine.step(bucket, step_inputs(bucket, machine.tiny.step, chunks=[Chunk(place, tokens, 0)]), **options)


def same(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# -- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows", "page_size", "kv_slots", "max_context", "top_n", "max_bias"])
def test_sizes_are_at_least_one(name):
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, found 0"):
        tiny_step_config(**{name: 0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"page_size": 48}, "page_size 48 must divide kv_slots 1024"),
        ({"max_context": 1025}, "max_context 1025 is more than the pool's kv_slots 1024"),
        ({"rows": 5}, "no bucket runs 5 generated tokens alone"),
        ({"buckets": (Bucket(4, 0), Bucket(4, 16))}, r"no bucket runs prompt tokens alone, \(0, P\)"),
        ({"buckets": (Bucket(4, 16), Bucket(0, 16))}, "no bucket runs 4 generated tokens alone"),
        ({"buckets": ()}, "no bucket runs"),
    ],
)
def test_sizes_that_contradict_each_other(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_step_config(**changes)


def test_a_block_table_covers_the_longest_context():
    assert tiny_step_config(max_context=256).pages == 16
    assert tiny_step_config(max_context=257).pages == 17
    assert tiny_step_config(max_context=1).pages == 1


def test_outputs_of_a_bucket():
    found = {
        (b.generated, b.prompt): b.outputs(64) for b in map(Bucket, (1, 64, 0, 0, 0, 64), (0, 0, 1, 64, 4096, 1024))
    }
    assert found == {(1, 0): 1, (64, 0): 64, (0, 1): 1, (0, 64): 4, (0, 4096): 64, (64, 1024): 128}


# -- what a step finds -----------------------------------------------------------------------------------------------


def test_a_prompts_next_token(machine):
    out = run_prompt(machine, Place(1, (4, 9)), ids("tiny_mistral", 24), top=True)
    expected = logits_of(24)[-1]
    np.testing.assert_allclose(out.logits[0], expected, atol=1e-3)
    assert out.token[0] == expected.argmax()
    exact = log_softmax(expected)
    np.testing.assert_allclose(out.log_probability[0], exact.max(), atol=1e-4)
    order = np.argsort(-expected)[: machine.tiny.step.top_n]
    assert out.top_token[0].tolist() == order.tolist()
    np.testing.assert_allclose(out.top_log_probability[0], exact[order], atol=1e-4)
    assert out.finite.all()


def test_top_tokens_are_left_out_unless_somebody_wants_them(machine):
    out = run_prompt(machine, Place(1, (4, 9)), ids("tiny_mistral", 24))
    assert out.top_token is None


@pytest.mark.parametrize("name", TINY_MODELS)
def test_generation_is_that_of_transformers(compiled_tiny, name):
    """Greedy tokens of four prompts, some generating while another's prompt comes in chunks."""
    machine = Machine(compiled_tiny("XL", "float32", name))
    step = machine.tiny.step
    places = {1: Place(2, tuple(range(8))), 7: Place(0, tuple(range(20, 28))), 24: Place(3, tuple(range(40, 48)))}
    long, long_place = ids(name, 60), Place(1, tuple(range(63, 55, -1)))
    chunks = [Chunk(place, ids(name, n), 0) for n, place in places.items()]
    found = {n: [] for n in (*places, 60)}
    out = machine.step(Bucket(0, 64), step_inputs(Bucket(0, 64), step, chunks=chunks))
    for i, n in enumerate(places):
        found[n].append(int(out.token[i]))
    for number in range(39):
        generated = [Generated(place, n + number) for n, place in places.items()]
        start = 16 * number
        if start < 60:
            last = start + 16 >= 60
            chunk = Chunk(long_place, long[start : start + 16], start, output=last)
            out = machine.step(Bucket(4, 16), step_inputs(Bucket(4, 16), step, generated=generated, chunks=[chunk]))
            if last:
                found[60].append(int(out.token[3]))
        else:
            generated.append(Generated(long_place, 60 + len(found[60]) - 1))
            out = machine.step(Bucket(4, 0), step_inputs(Bucket(4, 0), step, generated=generated))
            found[60].append(int(out.token[3]))
        for i, n in enumerate(places):
            found[n].append(int(out.token[i]))
    for n, tokens in found.items():
        assert tokens == REFERENCE[f"{name}/greedy_{n}"][: len(tokens)].tolist(), n
    assert len(found[60]) == 36


@pytest.mark.parametrize("sizes", [[60], [16, 16, 16, 12], [1, 16, 5, 16, 16, 6]])
def test_any_chunking_gives_the_same_logits(machine, sizes):
    tokens, place, start = ids("tiny_mistral", 60), Place(3, (5, 60, 2, 31)), 0
    for size in sizes:
        bucket = Bucket(0, 16) if size <= 16 else Bucket(0, 64)
        chunk = Chunk(place, tokens[start : start + size], start)
        out = machine.step(bucket, step_inputs(bucket, machine.tiny.step, chunks=[chunk]))
        np.testing.assert_allclose(out.logits[0], logits_of(60)[start + size - 1], atol=1e-3)
        start += size


def test_one_row_and_four_rows_agree(machine):
    place, tokens = Place(2, (1, 2)), ids("tiny_mistral", 24)
    run_prompt(machine, place, tokens)
    inputs = {
        b: step_inputs(b, machine.tiny.step, generated=[Generated(place, 24)]) for b in (Bucket(1, 0), Bucket(4, 0))
    }
    before = machine.state()
    four = machine.step(Bucket(4, 0), inputs[Bucket(4, 0)])
    machine.admit(2, token=int(before.last_token[2]), position=24)
    one = machine.step(Bucket(1, 0), inputs[Bucket(1, 0)])
    np.testing.assert_allclose(one.logits[0], four.logits[0], atol=1e-4)
    assert one.token[0] == four.token[0]


# -- what decides how a token is computed ----------------------------------------------------------------------------


def last_logits(tiny, sizes: list[int], *, mixed: bool) -> np.ndarray:
    """Logits after a prompt of 60 tokens in chunks, alone or in steps where another sequence generates."""
    machine, tokens, start = Machine(tiny), ids("tiny_mistral", 60), 0
    place, company = Place(3, (5, 60, 2, 31)), Place(0, (40, 41, 42))
    run_prompt(machine, company, tokens[:20])
    out = None
    for number, size in enumerate(sizes):
        bucket = Bucket(4, 16) if mixed else Bucket(0, 16 if size <= 16 else 64)
        generated = [Generated(company, 20 + number)] if mixed else []
        chunk = Chunk(place, tokens[start : start + size], start)
        out = machine.step(bucket, step_inputs(bucket, tiny.step, generated=generated, chunks=[chunk]))
        out = out.logits[len(generated)]
        start += size
    return out


def test_the_role_of_a_token_decides_its_arithmetic_and_nothing_else_does(compiled_tiny):
    tiny = compiled_tiny("S", "bfloat16")
    whole = last_logits(tiny, [60], mixed=False)
    # Were a narrow step to compute more precisely than a wide one, logits would move as far as they do below.
    for sizes, mixed in (([16, 16, 16, 12], False), ([1, 16, 5, 16, 16, 6], False), ([16, 9, 16, 16, 3], True)):
        assert np.abs(last_logits(tiny, sizes, mixed=mixed) - whole).max() < 1e-3
    machine, tokens, place, out = Machine(tiny), ids("tiny_mistral", 60), Place(3, (5, 60, 2, 31)), None
    run_prompt(machine, place, tokens[:1])
    for position in range(1, 60):
        machine.admit(3, token=tokens[position], position=position)
        inputs = step_inputs(Bucket(4, 0), tiny.step, generated=[Generated(place, position)])
        out = machine.step(Bucket(4, 0), inputs).logits[0]
    difference = np.abs(out - whole)
    assert difference.max() > 0.02
    # And 8 bits are close to 16.
    assert difference.max() < 0.5


# -- what a step does to the state -----------------------------------------------------------------------------------


def test_only_rows_with_an_output_advance(machine):
    before = machine.state()
    step, tokens = machine.tiny.step, ids("tiny_mistral", 24)
    chunks = [Chunk(Place(0, (0,)), tokens[:7], 0), Chunk(Place(2, (1,)), tokens[:9], 0, output=False)]
    out = machine.step(Bucket(0, 16), step_inputs(Bucket(0, 16), step, chunks=chunks))
    after = machine.state()
    assert after.last_token.tolist() == [int(out.token[0]), *before.last_token[1:]]
    assert after.position.tolist() == [7, *before.position[1:]]
    assert same((after.key, after.prompt_mask, after.counts), (before.key, before.prompt_mask, before.counts))


def test_generated_tokens_come_from_the_state(machine):
    place, tokens = Place(1, (6, 7)), ids("tiny_mistral", 7)
    run_prompt(machine, place, tokens)
    token = int(machine.state().last_token[1])
    generated = machine.step(
        Bucket(4, 0), step_inputs(Bucket(4, 0), machine.tiny.step, generated=[Generated(place, 7)])
    )
    assert machine.state().position.tolist() == [0, 8, 0, 0]
    other = run_prompt(Machine(machine.tiny), place, [*tokens, token])
    np.testing.assert_allclose(generated.logits[0], other.logits[0], atol=1e-4)


def test_padding_leaves_no_trace(machine):
    place = Place(1, (6, 7))
    run_prompt(machine, place, ids("tiny_mistral", 7))
    machine.admit(3, seed=99, prompt=[5], token=17, position=3)
    state, cache = machine.state(), machine.cache()
    nothing = step_inputs(Bucket(4, 16), machine.tiny.step)
    out = machine.step(Bucket(4, 16), nothing, machine.sampling(temperature=1.0))
    assert same(machine.state(), state)
    assert (machine.cache() == cache).all()
    # What nobody asked for is computed on some token, and has to be harmless.
    assert ((out.token >= 0) & (out.token < VOCAB)).all()


def test_a_step_writes_its_tokens_slots_alone(machine):
    step, first, second = machine.tiny.step, Place(0, (3, 4)), Place(2, (9,))
    run_prompt(machine, first, ids("tiny_mistral", 24))
    before = machine.cache()
    chunk = Chunk(second, ids("tiny_mistral", 7), 0)
    machine.step(Bucket(4, 16), step_inputs(Bucket(4, 16), step, generated=[Generated(first, 24)], chunks=[chunk]))
    changed = (machine.cache() != before).any(axis=(0, 2, 3, 4))
    assert np.flatnonzero(changed).tolist() == sorted(first.slots(24, 1, 16) + second.slots(0, 7, 16))


def test_admission_resets_a_row_and_no_other(machine):
    machine.admit(0, seed=1, prompt=[1])
    run_prompt(machine, Place(2, (0,)), [3, 4, 5], sampling=machine.sampling())
    before = machine.state()
    assert before.counts[2].sum() == 1
    machine.admit(2, seed=(7 << 32) + 8, prompt=[0, 31, 32, 319], token=5, position=2)
    after = machine.state()
    assert after.key[2].tolist() == [7, 8]
    assert after.counts[2].sum() == 0
    assert (after.last_token[2], after.position[2]) == (5, 2)
    assert np.flatnonzero(np.unpackbits(after.prompt_mask[2].view(np.uint8), bitorder="little")).tolist() == [
        0,
        31,
        32,
        319,
    ]
    others = [0, 1, 3]
    assert same(*(jax.tree.map(lambda a: a[others], state) for state in (before, after)))


def test_a_copied_page_is_the_same_context(machine):
    tokens = ids("tiny_mistral", 24)
    run_prompt(machine, Place(0, (10, 11)), tokens)
    before = machine.cache()
    machine.copy_page(11, 63)
    after = machine.cache()
    size = machine.tiny.step.page_size
    assert (after[:, 63 * size :] == before[:, 11 * size : 12 * size]).all()
    assert (after[:, : 63 * size] == before[:, : 63 * size]).all()
    # Another row that goes on from the copy finds what the first does.
    step, token = machine.tiny.step, int(machine.state().last_token[0])
    machine.admit(3, token=token, position=24)
    both = [Generated(Place(0, (10, 11)), 24), Generated(Place(3, (10, 63)), 24)]
    out = machine.step(Bucket(4, 0), step_inputs(Bucket(4, 0), step, generated=both))
    assert (out.logits[0] == out.logits[1]).all()


# -- sampling in the step --------------------------------------------------------------------------------------------


def test_counts_grow_with_each_output(machine):
    place, prompt = Place(1, (0, 1)), [7, 8, 9]
    machine.admit(1, seed=5, prompt=prompt)
    sampling, found = machine.sampling(temperature=1.5), []
    found.append(int(run_prompt(machine, place, prompt, sampling=sampling).token[0]))
    for position in range(3, 12):
        inputs = step_inputs(Bucket(4, 0), machine.tiny.step, generated=[Generated(place, position)])
        found.append(int(machine.step(Bucket(4, 0), inputs, sampling).token[0]))
    counts = machine.state().counts
    assert counts[1].tolist() == np.bincount(found, minlength=VOCAB).tolist()
    assert counts[[0, 2, 3]].sum() == 0


def greedy_order(length: int) -> list[int]:
    return np.argsort(-logits_of(length)[-1]).tolist()


@pytest.mark.parametrize(
    ("parameters", "rank"),
    [
        ({}, 0),
        ({"bias_token": [[0, VOCAB]] * 4, "bias": -100.0}, 1),
        ({"frequency_penalty": 100.0}, 1),
        ({"presence_penalty": 100.0}, 1),
        ({"repetition_penalty": 1e6}, None),
        ({"allowed": None}, 5),
    ],
)
def test_every_parameter_reaches_the_choice(machine, parameters, rank):
    """With the most likely token seen once in the output, penalties move the choice on to the next."""
    tokens, order = ids("tiny_mistral", 24), greedy_order(24)
    best = order[0]
    counts = np.zeros((4, VOCAB), np.int32)
    counts[:, best] = 1
    machine.rows = dataclasses.replace(machine.rows, counts=jax.device_put(counts))
    if "bias_token" in parameters:
        tokens_of = np.full((4, 8), VOCAB)
        tokens_of[:, 0] = best
        parameters = {"bias_token": tokens_of, "bias": -100.0}
    if "allowed" in parameters:
        words = np.zeros(10, np.uint32)
        words[order[5] // 32] = 1 << (order[5] % 32)
        parameters = {"allowed": words}
    out = run_prompt(machine, Place(2, (0, 1)), tokens, sampling=machine.sampling(**parameters), top=True)
    if rank is None:
        # A huge penalty drives positive logits to zero and negative ones far down: never the seen token.
        assert out.token[0] != best
    else:
        assert out.token[0] == order[rank]
    # What is reported is the model's own opinion, whatever was chosen.
    exact = log_softmax(logits_of(24)[-1])
    np.testing.assert_allclose(out.log_probability[0], exact[out.token[0]], atol=1e-4)
    np.testing.assert_allclose(out.logits[0], logits_of(24)[-1], atol=1e-3)
    assert out.top_token[0, 0] == best


def test_repetition_penalty_counts_the_prompt(machine):
    tokens, best = ids("tiny_mistral", 24), greedy_order(24)[0]
    machine.admit(2, prompt=[best])
    sampling = machine.sampling(repetition_penalty=1e6)
    assert run_prompt(machine, Place(2, (0, 1)), tokens, sampling=sampling).token[0] != best


def test_equal_seeds_draw_equal_tokens_wherever_they_run(machine):
    """The same sequence in two rows, alone or beside others, in one bucket or another, draws the same."""
    tokens = ids("tiny_mistral", 7)

    def draw(row: int, seed: int, choice: int, mixed: bool) -> list[int]:
        other = Machine(machine.tiny)
        place, company, step = Place(row, (8, 9, 10)), Place(3 - row, (30, 31)), other.tiny.step
        sampling = other.sampling(temperature=2.0, choice=choice)
        other.admit(row, seed=seed)
        other.admit(company.row, seed=1234)
        chunks = [Chunk(company, ids("tiny_mistral", 24), 0)] if mixed else []
        inputs = step_inputs(Bucket(0, 64), step, chunks=[*chunks, Chunk(place, tokens, 0)])
        found = [int(other.step(Bucket(0, 64), inputs, sampling).token[len(chunks)])]
        for position in range(7, 20):
            together = [Generated(company, position + 17)] if mixed and position + 17 < 32 else []
            bucket = Bucket(4, 0) if mixed else Bucket(1, 0)
            inputs = step_inputs(bucket, step, generated=[*together, Generated(place, position)])
            found.append(int(other.step(bucket, inputs, sampling).token[len(together)]))
        return found

    first = draw(0, 42, 0, mixed=False)
    assert draw(2, 42, 0, mixed=True) == first
    assert draw(0, 43, 0, mixed=False) != first
    assert draw(0, 42, 1, mixed=False) != first
    assert len(set(first)) > 3


def test_a_greedy_row_beside_sampling_ones_takes_the_greedy_steps_token(machine):
    greedy = run_prompt(Machine(machine.tiny), Place(1, (0, 1)), ids("tiny_mistral", 24))
    sampling = machine.sampling(temperature=[5.0, 0.0, 5.0, 5.0])
    chunks = [Chunk(Place(0, (5,)), [3], 0), Chunk(Place(1, (0, 1)), ids("tiny_mistral", 24), 0)]
    out = machine.step(Bucket(0, 64), step_inputs(Bucket(0, 64), machine.tiny.step, chunks=chunks), sampling)
    assert out.token[1] == greedy.token[0]


# -- not finite ------------------------------------------------------------------------------------------------------


def poisoned(tiny, name: str, row: int, value: float) -> Machine:
    array = np.array(tiny.weights[name])
    array[row] = value
    return Machine(tiny, tiny.weights | {name: jax.device_put(array)})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_sequence_is_reported_and_breaks_no_other(tiny, value):
    """Token 200's embedding is broken: only the sequence that holds it is, even when its pages are used again."""
    machine = poisoned(tiny, "embedding", 200, value)
    step, good, bad = machine.tiny.step, ids("tiny_mistral", 24), [3, 200, 4]
    assert 200 not in good
    chunks = [Chunk(Place(0, (0, 1)), good, 0), Chunk(Place(1, (2,)), bad, 0)]
    out = machine.step(Bucket(0, 64), step_inputs(Bucket(0, 64), step, chunks=chunks))
    assert out.finite[:2].tolist() == [True, False]
    np.testing.assert_allclose(out.logits[0], logits_of(24)[-1], atol=1e-3)
    assert 0 <= out.token[1] < VOCAB
    # The page that holds what is broken goes to another sequence, which fills only a part of it.
    after = run_prompt(machine, Place(2, (2,)), ids("tiny_mistral", 1))
    assert after.finite[0]
    np.testing.assert_allclose(after.logits[0], logits_of(1)[-1], atol=1e-3)
    # A row with a shorter context in the same step reads blocks of pages that are not its own.
    both = [Generated(Place(0, (0, 1)), 24), Generated(Place(1, (2,)), 3)]
    out = machine.step(Bucket(4, 0), step_inputs(Bucket(4, 0), step, generated=both))
    assert out.finite[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_broken_logit_is_reported(tiny, value):
    machine = poisoned(tiny, "lm_head", 319, value)
    for sampling in (None, machine.sampling(temperature=1.0, top_p=0.9)):
        out = run_prompt(machine, Place(0, (0, 1)), ids("tiny_mistral", 24), sampling=sampling)
        assert not out.finite[0]
        assert 0 <= out.token[0] < VOCAB


def test_score_reports_what_is_not_finite_by_sequence(tiny):
    machine = poisoned(tiny, "embedding", 200, np.nan)
    chunks = [Chunk(Place(0, (0,)), [3, 4, 200, 5], 0), Chunk(Place(1, (1,)), [3, 4, 5], 0, output=False)]
    inputs = step_inputs(Bucket(0, 16), machine.tiny.step, chunks=chunks)
    out = machine.score(Bucket(0, 16), inputs, np.zeros(16, np.int32))
    # Of the broken sequence's earlier tokens nothing is promised: a request is finite as a whole or not.
    assert out.finite[2:7].tolist() == [False, False, True, True, True]


# -- score -----------------------------------------------------------------------------------------------------------


def check_score(out, expected: np.ndarray, target: np.ndarray, top: bool) -> None:
    exact = log_softmax(expected)
    rows = np.arange(len(expected))
    np.testing.assert_allclose(out.log_probability[: len(rows)], exact[rows, target], atol=2e-4)
    assert (out.argmax[: len(rows)] == expected.argmax(axis=1)).all()
    assert out.finite.all()
    if top:
        order = np.argsort(-expected, axis=1)[:, : out.top_token.shape[1]]
        assert (out.top_token[: len(rows)] == order).mean() > 0.99  # float32 may swap near ties
        found = np.take_along_axis(exact, out.top_token[: len(rows)], axis=1)
        np.testing.assert_allclose(out.top_log_probability[: len(rows)], found, atol=2e-4)


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("top", [False, True])
def test_scores_are_log_softmax_at_every_position(compiled_tiny, name, top):
    machine = Machine(compiled_tiny("XL", "float32", name))
    tokens = ids(name, 60)
    target = np.full(64, -1, np.int32)
    target[:60] = np.random.default_rng(0).integers(0, VOCAB, 60)
    inputs = step_inputs(Bucket(0, 64), machine.tiny.step, chunks=[Chunk(Place(1, (3, 8, 2, 0)), tokens, 0)])
    out = machine.score(Bucket(0, 64), inputs, target, top=top)
    check_score(out, logits_of(60, name), target[:60], top)


def test_scores_in_chunks_and_side_by_side(machine):
    step, tokens = machine.tiny.step, ids("tiny_mistral", 60)
    place, other = Place(1, (3, 8, 2, 0)), Place(0, (10,))
    target, start = np.asarray([*tokens[1:], 0], np.int32), 0
    for size in (16, 9, 16, 16, 3):
        chunks = [Chunk(place, tokens[start : start + size], start)]
        wanted = np.full(16, -1, np.int32)
        wanted[:size] = target[start : start + size]
        if size == 9:
            chunks.append(Chunk(other, ids("tiny_mistral", 7), 0, output=False))
        out = machine.score(Bucket(0, 16), step_inputs(Bucket(0, 16), step, chunks=chunks), wanted)
        part = slice(start, start + size)
        check_score(out, logits_of(60)[part], target[part], top=False)
        start += size


def test_scoring_leaves_the_rows_alone(machine):
    machine.admit(1, seed=3, token=9, position=4)
    before = machine.state()
    inputs = step_inputs(Bucket(0, 16), machine.tiny.step, chunks=[Chunk(Place(1, (0,)), [1, 2, 3], 0)])
    machine.score(Bucket(0, 16), inputs, np.zeros(16, np.int32))
    assert same(machine.state(), before)


@pytest.mark.parametrize("mode", ["XL", "S"])
def test_a_vocabulary_in_chunks_scores_as_one_in_a_piece(checkpoint_of, monkeypatch, mode):
    checkpoint, step = checkpoint_of("tiny_mistral"), tiny_step_config(buckets=(Bucket(4, 0), Bucket(0, 8)))
    plan = checkpoint.plan(mode)
    weights = load_weights(checkpoint, plan, "float32", jax.devices()[0], workers=2, progress=None)
    found = []
    for chunks in (1, 5):
        monkeypatch.setattr(steps, "_vocabulary_chunks", lambda _, chunks=chunks: chunks)
        unit = next(u for u in make_units(checkpoint.config, plan, step) if u.name == "step.d0.p8.score")
        leaves = flatten(build_model(checkpoint.config, weights, step))[0]
        kv = [np.zeros(a.shape, a.dtype) for a in unit.arguments[len(leaves) : len(leaves) + 3]]
        inputs = step_inputs(Bucket(0, 8), step, chunks=[Chunk(Place(1, (3,)), ids("tiny_mistral", 7), 0)])
        target = np.array([0, 63, 64, 319, 255, 256, 100, -1], np.int32)
        out = jax.jit(unit.function)(*leaves, *kv, *jax.tree.leaves(inputs), target, np.int32(1))
        found.append(steps.ScoreOutputs(*(np.asarray(a) for a in out[3:])))
    one, five = found
    assert (one.argmax == five.argmax).all()
    assert (one.top_token == five.top_token).all()
    np.testing.assert_allclose(one.log_probability[:7], five.log_probability[:7], atol=1e-5)
    np.testing.assert_allclose(one.top_log_probability, five.top_log_probability, atol=1e-5)


@pytest.mark.parametrize(("vocab", "chunks"), [(131072, 16), (49152, 6), (32000, 4), (320, 1), (8192, 1), (100003, 1)])
def test_chunks_of_vocabularies(vocab, chunks):
    assert steps._vocabulary_chunks(vocab) == chunks


# -- shapes ----------------------------------------------------------------------------------------------------------


def test_shapes_of_the_state_follow_model_and_step():
    step = tiny_step_config(kv_slots=2048, rows=4, dtype="bfloat16")
    state = steps.abstract_state(MISTRAL_SMALL, step)
    assert {layer.shape for layer in state.kv} == {(2048, 2, 8, 128)}
    assert {layer.dtype.name for layer in state.kv} == {"bfloat16"}
    assert state.rows.counts.shape == (4, 131072)
    assert state.rows.prompt_mask.shape == (4, 4096)
    odd = dataclasses.replace(MISTRAL_SMALL, vocab_size=321)
    assert steps.abstract_state(odd, step).rows.prompt_mask.shape == (4, 11)
    assert steps.abstract_sampling(odd, step).allowed.shape == (4, 11)


def test_shapes_of_the_inputs_are_those_of_a_packed_step():
    step = tiny_step_config()
    for bucket in step.buckets:
        shapes = [(a.shape, a.dtype) for a in jax.tree.leaves(steps.abstract_inputs(bucket, step))]
        assert shapes == [(a.shape, a.dtype) for a in jax.tree.leaves(step_inputs(bucket, step))]
