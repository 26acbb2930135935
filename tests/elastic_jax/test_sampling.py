import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FIXTURES

from elastic_jax import sampling
from elastic_jax.sampling import SamplingInputs

ALL = np.uint32(0xFFFFFFFF)

adjust = jax.jit(sampling.adjust_logits)
kept_tokens = jax.jit(sampling.kept_tokens)
draw = jax.jit(sampling.draw)
sample = jax.jit(sampling.sample)
uniforms = jax.jit(sampling.uniforms)
top_tokens = jax.jit(sampling.top_tokens, static_argnames="n")
unpack_bits = jax.jit(sampling.unpack_bits, static_argnames="vocab")


def inputs(rows: int, vocab: int, entries: int = 3, **changes: Any) -> SamplingInputs:
    """Parameters that do nothing, at temperature 1; a change is one value for all rows, or one each."""
    values: dict[str, np.ndarray] = {
        "temperature": np.ones(rows, np.float32),
        "top_k": np.zeros(rows, np.int32),
        "top_p": np.ones(rows, np.float32),
        "min_p": np.zeros(rows, np.float32),
        "repetition_penalty": np.ones(rows, np.float32),
        "presence_penalty": np.zeros(rows, np.float32),
        "frequency_penalty": np.zeros(rows, np.float32),
        "choice": np.zeros(rows, np.int32),
        "bias_token": np.full((rows, entries), vocab, np.int32),
        "bias": np.zeros((rows, entries), np.float32),
        "allowed": np.full((rows, -(-vocab // 32)), ALL, np.uint32),
    }
    for name, value in changes.items():
        values[name] = np.broadcast_to(value, values[name].shape).astype(values[name].dtype)
    return SamplingInputs(**values)


def pack(bits: np.ndarray) -> np.ndarray:
    """bool [rows, vocab] -> uint32 words, by another way than the code's."""
    rows, vocab = bits.shape
    words = np.zeros((rows, -(-vocab // 32)), np.uint32)
    for row, token in zip(*np.nonzero(bits), strict=True):
        words[row, token // 32] |= np.uint32(1 << int(token % 32))
    return words


# -- against transformers --------------------------------------------------------------------------------------------

SETTINGS: list[dict[str, float]] = json.loads((FIXTURES / "sampling_reference.json").read_text())["settings"]


@pytest.fixture(scope="module")
def reference():
    return dict(np.load(FIXTURES / "sampling_reference.npz"))


@pytest.mark.parametrize("number", range(len(SETTINGS)), ids=lambda i: "-".join(SETTINGS[i]) or "plain")
def test_distribution_is_that_of_transformers(reference, number):
    logits, expected = reference["logits"][None], reference["probabilities"][number]
    setting = {"repetition_penalty": 1.0, "temperature": 1.0} | SETTINGS[number]
    chosen = inputs(1, 512, **setting)
    seen = np.zeros((1, 512), bool)
    seen[0, reference["seen"]] = True
    nothing = np.zeros((1, 512), np.int32)
    adjusted = np.asarray(adjust(logits, chosen, nothing, pack(seen)))
    # What was seen in the output counts as what was seen in the prompt, however often.
    occurrences = np.bincount(reference["seen"], minlength=512)[None].astype(np.int32)
    assert (np.asarray(adjust(logits, chosen, occurrences, pack(seen & False))) == adjusted).all()

    scaled = adjusted / np.float32(setting["temperature"])
    kept = np.asarray(kept_tokens(scaled, chosen))[0]
    assert (kept == (expected > 0)).all()
    weights = np.where(kept, np.exp(scaled[0].astype(np.float64) - scaled.max()), 0)
    np.testing.assert_allclose(weights / weights.sum(), expected, rtol=1e-5, atol=1e-12)

    # The draw: a fine grid of uniforms meets every token that has any weight, in proportion.
    grid = ((np.arange(20000) + 0.5) / 20000).astype(np.float32)
    rows = np.broadcast_to(scaled, (20000, 512))
    drawn = np.asarray(draw(rows, np.broadcast_to(kept, rows.shape), grid))
    frequency = np.bincount(drawn, minlength=512) / 20000
    assert np.abs(frequency - expected).max() < 1.5 / 20000
    both = sample(np.repeat(adjusted, 500, 0), jax.tree.map(lambda a: np.repeat(a, 500, 0), chosen), grid[::40])
    assert (np.asarray(both) == drawn[::40]).all()


# -- the draw --------------------------------------------------------------------------------------------------------

LAST_UNIFORM = np.float32(1 - 2.0**-24)


def intervals(logits: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The cumulative distribution in float64."""
    weights = np.where(kept, np.exp(logits.astype(np.float64) - logits[kept].max()), 0)
    return np.cumsum(weights) / weights.sum()


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.floats(0, float(LAST_UNIFORM), width=32), st.floats(0.01, 30), st.floats(0, 1))
def test_a_uniform_falls_into_its_tokens_interval(seed, uniform, spread, density):
    rng = np.random.default_rng(seed)
    logits = (spread * rng.standard_normal(700)).astype(np.float32)
    kept = rng.random(700) < density
    kept[rng.integers(700)] = True
    token = int(draw(logits[None], kept[None], np.float32([uniform]))[0])
    assert kept[token]
    cumulative = intervals(logits, kept)
    below = cumulative[token - 1] if token else 0.0
    # float32 sums of 700 numbers.
    assert below - 2e-6 <= uniform <= cumulative[token] + 2e-6


@pytest.mark.parametrize("vocab", [1, 31, 255, 256, 257, 1000, 2048])
@pytest.mark.parametrize("uniform", [0.0, 1e-38, 0.5, float(LAST_UNIFORM)])
def test_edges_of_the_distribution(vocab, uniform):
    uniforms = np.full(3, uniform, np.float32)
    flat = np.zeros((3, vocab), np.float32)
    everything = np.ones((3, vocab), bool)
    expected = int(np.floor(np.float64(np.float32(uniform)) * vocab))
    assert np.abs(np.asarray(draw(flat, everything, uniforms)) - expected).max() <= (uniform == 0.5 and vocab > 1)

    # One token left, wherever it is: any uniform finds it.
    for token in {0, vocab // 2, vocab - 1}:
        alone = np.zeros((3, vocab), bool)
        alone[:, token] = True
        assert (np.asarray(draw(flat, alone, uniforms)) == token).all()
        masked = np.where(alone, flat, -np.inf).astype(np.float32)
        assert (np.asarray(draw(masked, alone, uniforms)) == token).all()


def test_the_last_uniform_never_leaves_the_kept_tokens():
    # Rounded sums may end below or above the total: neither a masked token nor one past the end may come out.
    rng = np.random.default_rng(0)
    for _ in range(50):
        logits = rng.standard_normal((4, 1000)).astype(np.float32) * 5
        kept = rng.random((4, 1000)) < 0.3
        kept[:, 700:] = False
        tokens = np.asarray(draw(logits, kept, np.full(4, LAST_UNIFORM)))
        assert kept[np.arange(4), tokens].all()
        tokens = np.asarray(draw(logits, kept, np.zeros(4, np.float32)))
        assert (tokens == kept.argmax(axis=1)).all()


def test_huge_and_tiny_logits_do_not_overflow():
    logits = np.full((2, 300), -3e38, np.float32)
    logits[0, 17], logits[1, 250] = 3e38, -1e30
    for uniform in (0.0, 0.3, LAST_UNIFORM):
        tokens = draw(logits, np.ones((2, 300), bool), np.full(2, uniform, np.float32))
        assert np.asarray(tokens).tolist() == [17, 250]


@pytest.mark.parametrize("vocab", [320, 256, 31])
def test_whatever_the_logits_the_token_is_in_the_vocabulary(vocab):
    nothing = np.full((1, vocab), -np.inf, np.float32)
    holes = np.zeros((1, vocab), np.float32)
    holes[0, vocab // 2] = np.nan
    infinite = np.where(np.isnan(holes), np.inf, 0).astype(np.float32)
    for logits in (nothing, holes, infinite, np.full_like(nothing, np.nan)):
        for temperature in (0.0, 1.0):
            for uniform in (0.0, 0.5, LAST_UNIFORM):
                chosen = inputs(1, vocab, temperature=temperature, top_p=0.9, top_k=5)
                token = int(sample(logits, chosen, np.full(1, uniform, np.float32))[0])
                assert 0 <= token < vocab


# -- filters ---------------------------------------------------------------------------------------------------------


def expected_kept(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """One row, by sorting, in float64; keeps ties with the last one kept."""
    values = logits.astype(np.float64)
    kept = np.isfinite(values)
    if top_k:
        kept &= values >= np.sort(values)[::-1][min(top_k, len(values)) - 1]
    if top_p < 1:
        weights = np.where(kept, np.exp(values - values.max()), 0)
        order = np.argsort(-values, kind="stable")
        cumulative = np.cumsum(weights[order])
        last = order[np.argmax(cumulative >= np.float32(top_p) * cumulative[-1])]
        kept &= values >= values[last]
    if min_p:
        kept &= values >= values.max() + np.log(np.float32(min_p))
    return kept


@settings(max_examples=60)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0, 1, 2, 5, 299, 300, 5000]),
    st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.1, 1e-6]),
    st.sampled_from([0.0, 0.001, 0.1, 1.0]),
    st.sampled_from([0.0, 0.5]),
)
def test_filters_against_sorting(seed, top_k, top_p, min_p, masked):
    rng = np.random.default_rng(seed)
    # Quarters: ties everywhere, and both signs.
    logits = (np.round(rng.standard_normal(300) * 12) / 4).astype(np.float32)
    logits[rng.random(300) < masked] = -np.inf
    logits[rng.integers(300)] = 1.0
    found = kept_tokens(logits[None], inputs(1, 300, top_k=top_k, top_p=top_p, min_p=min_p))
    assert (np.asarray(found)[0] == expected_kept(logits, top_k, top_p, min_p)).all()


def test_each_row_has_its_own_filters():
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((5, 300)).astype(np.float32)
    top_k, top_p, min_p = np.array([0, 3, 0, 0, 7]), np.array([1, 1, 0.4, 1, 0.7]), np.array([0, 0, 0, 0.2, 0.01])
    found = np.asarray(kept_tokens(logits, inputs(5, 300, top_k=top_k, top_p=top_p, min_p=min_p)))
    for row in range(5):
        assert (found[row] == expected_kept(logits[row], int(top_k[row]), top_p[row], min_p[row])).all()
    assert found[0].all()
    assert found[1].sum() == 3


def test_ties_with_the_last_kept_token_are_kept():
    logits = np.array([[3.0, 1.0, 1.0, 1.0, 0.0]], np.float32)
    assert np.asarray(kept_tokens(logits, inputs(1, 5, top_k=2)))[0].tolist() == [True, True, True, True, False]


def test_zeros_of_both_signs_tie():
    logits = np.array([[0.0, -0.0, -1.0]], np.float32)
    assert np.asarray(kept_tokens(logits, inputs(1, 3, min_p=1.0)))[0].tolist() == [True, True, False]


def test_min_p_of_one_keeps_the_most_likely():
    logits = np.array([[-5.0, 2.5, 2.4]], np.float32)
    assert np.asarray(kept_tokens(logits, inputs(1, 3, min_p=1.0)))[0].tolist() == [False, True, False]


def test_masked_tokens_are_never_kept():
    logits = np.full((1, 64), -np.inf, np.float32)
    logits[0, 9] = -80.0
    for filters in ({}, {"top_k": 40}, {"top_p": 0.5}, {"min_p": 0.001}):
        assert np.flatnonzero(np.asarray(kept_tokens(logits, inputs(1, 64, **filters)))[0]).tolist() == [9]


# -- adjusting logits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 64, 100])
def test_bits_are_read_least_significant_first(vocab):
    bits = np.random.default_rng(0).random((3, vocab)) < 0.5
    assert (np.asarray(unpack_bits(pack(bits), vocab=vocab)) == bits).all()
    # What lies past the vocabulary in the last word is ignored.
    assert (np.asarray(unpack_bits(np.full_like(pack(bits), ALL), vocab=vocab))).shape == (3, vocab)


def expected_adjusted(logits, counts, prompt, repetition, presence, frequency, bias, allowed):
    out = logits.astype(np.float64)
    seen = prompt | (counts > 0)
    out = np.where(seen, np.where(out > 0, out / repetition, out * repetition), out)
    out = out - frequency * counts - presence * (counts > 0)
    for token, value in bias.items():
        out[token] += value
    return np.where(allowed, out, -np.inf)


def test_penalties_bias_and_mask_in_their_order():
    rng = np.random.default_rng(2)
    vocab, rows = 100, 4
    logits = (4 * rng.standard_normal((rows, vocab))).astype(np.float32)
    counts = rng.integers(0, 4, (rows, vocab)).astype(np.int32) * (rng.random((rows, vocab)) < 0.3)
    prompt, allowed = rng.random((rows, vocab)) < 0.2, rng.random((rows, vocab)) < 0.8
    repetition, presence, frequency = [1.0, 1.5, 0.7, 1.2], [0.0, 0.5, -0.5, 2.0], [0.0, 0.25, 1.0, -2.0]
    biases: list[dict[int, float]] = [{}, {5: 10.0}, {99: -3.0, 0: 2.0}, {7: -np.inf, 8: 1.0, 9: 1.0}]
    bias_token, bias = np.full((rows, 3), vocab, np.int32), np.zeros((rows, 3), np.float32)
    for row, entries in enumerate(biases):
        bias_token[row, : len(entries)], bias[row, : len(entries)] = list(entries), list(entries.values())
    chosen = inputs(
        rows,
        vocab,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        bias_token=bias_token,
        bias=bias,
        allowed=pack(allowed),
    )
    found = np.asarray(adjust(logits, chosen, counts, pack(prompt)))
    for row in range(rows):
        expected = expected_adjusted(
            logits[row],
            counts[row],
            prompt[row],
            repetition[row],
            presence[row],
            frequency[row],
            biases[row],
            allowed[row],
        )
        np.testing.assert_allclose(found[row], expected, rtol=1e-6, atol=1e-6)


def test_doing_nothing_changes_no_bit():
    logits = np.random.default_rng(0).standard_normal((2, 77)).astype(np.float32)
    counts, prompt = np.ones((2, 77), np.int32), np.full((2, 3), ALL)
    assert (np.asarray(adjust(logits, inputs(2, 77), counts, prompt)) == logits).all()


def test_repetition_penalty_makes_negative_logits_more_negative():
    logits = np.array([[2.0, -2.0, 0.0, 5.0]], np.float32)
    prompt = pack(np.array([[True, True, True, False]]))
    chosen = inputs(1, 4, repetition_penalty=2.0)
    found = adjust(logits, chosen, np.zeros((1, 4), np.int32), prompt)
    assert np.asarray(found)[0].tolist() == [1.0, -4.0, 0.0, 5.0]


def test_a_grammar_outweighs_a_bias():
    allowed = np.zeros((1, 40), bool)
    allowed[0, [3, 33]] = True
    chosen = inputs(1, 40, temperature=0.0, bias_token=[[5, 33, 40]], bias=[[1e9, 1.0, 7.0]], allowed=pack(allowed))
    adjusted = adjust(np.zeros((1, 40), np.float32), chosen, np.zeros((1, 40), np.int32), np.zeros((1, 2), np.uint32))
    assert np.flatnonzero(np.isfinite(np.asarray(adjusted)[0])).tolist() == [3, 33]
    assert np.asarray(sample(adjusted, chosen, np.zeros(1, np.float32))).tolist() == [33]


# -- choosing --------------------------------------------------------------------------------------------------------


def test_greedy_and_sampling_rows_in_one_call():
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((4, 300)).astype(np.float32)
    uniform = rng.random(4).astype(np.float32)
    temperature = np.array([0.0, 1.0, 0.0, 0.5])
    found = np.asarray(sample(logits, inputs(4, 300, temperature=temperature), uniform))
    assert found[[0, 2]].tolist() == logits.argmax(axis=1)[[0, 2]].tolist()
    everything = np.ones((1, 300), bool)
    for row, t in ((1, 1.0), (3, 0.5)):
        scaled = (logits[row] / np.float32(t))[None]
        assert found[row] == int(draw(scaled, everything, uniform[row : row + 1])[0])


def test_a_rows_token_does_not_depend_on_the_others():
    rng = np.random.default_rng(4)
    logits, uniform = rng.standard_normal((4, 300)).astype(np.float32), rng.random(4).astype(np.float32)
    chosen = inputs(4, 300, temperature=[1.0, 0.0, 0.7, 2.0], top_p=[0.9, 1.0, 1.0, 0.5], top_k=[0, 0, 30, 0])
    together = np.asarray(sample(logits, chosen, uniform))
    for row in range(4):
        one = jax.tree.map(lambda a, row=row: a[row : row + 1], chosen)
        assert int(sample(logits[row : row + 1], one, uniform[row : row + 1])[0]) == together[row]


def test_low_temperature_approaches_greedy():
    logits = np.random.default_rng(5).standard_normal((8, 300)).astype(np.float32)
    uniform = np.linspace(0, LAST_UNIFORM, 8, dtype=np.float32)
    found = sample(logits, inputs(8, 300, temperature=1e-6), uniform)
    assert (np.asarray(found) == logits.argmax(axis=1)).all()


# -- uniforms --------------------------------------------------------------------------------------------------------


def keys(*seeds: int) -> np.ndarray:
    return np.array([[seed >> 32, seed & 0xFFFFFFFF] for seed in seeds], np.uint32)


def test_uniforms_depend_on_seed_position_and_choice_alone():
    rng = np.random.default_rng(6)
    key = rng.integers(0, 2**32, (16, 2), dtype=np.uint64).astype(np.uint32)
    position, choice = rng.integers(0, 1000, 16).astype(np.int32), rng.integers(0, 4, 16).astype(np.int32)
    together = np.asarray(uniforms(key, position, choice))
    order = rng.permutation(16)
    assert (np.asarray(uniforms(key[order], position[order], choice[order])) == together[order]).all()
    for row in range(3):
        one = slice(row, row + 1)
        assert (np.asarray(uniforms(key[one], position[one], choice[one])) == together[one]).all()


def test_uniforms_never_repeat():
    seed, position, choice = (a.reshape(-1) for a in np.meshgrid(np.arange(10), np.arange(100), np.arange(4)))
    drawn = np.asarray(uniforms(keys(*map(int, seed)), position.astype(np.int32), choice.astype(np.int32)))
    assert drawn.dtype == np.float32
    # 4000 of 2**23 numbers: about one coincidence by chance.
    assert len(set(drawn.tolist())) >= 3990
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 0.02
    assert np.abs(np.histogram(drawn, 10, (0, 1))[0] - 400).max() < 80


def test_uniforms_are_the_same_in_every_version():
    # A seed that a user noted down must draw the same tokens tomorrow.
    drawn = uniforms(keys(0, 1, 2**64 - 1, 0), np.int32([0, 7, 131071, 0]), np.int32([0, 0, 3, 1]))
    assert [float(f"{u:.6f}") for u in np.asarray(drawn)] == [0.28272, 0.408335, 0.413997, 0.10429]


# -- most likely tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab", "n"), [(320, 8), (256, 20), (257, 20), (1000, 1), (31, 31), (513, 300), (2048, 20)])
def test_top_tokens_against_sorting(vocab, n):
    logits = np.random.default_rng(7).permutation(4 * vocab).reshape(4, vocab).astype(np.float32) - vocab
    ids, values = (np.asarray(a) for a in top_tokens(logits, n=n))
    order = np.argsort(-logits, axis=1)[:, :n]
    assert (ids == order).all()
    assert ids.dtype == np.int32
    assert (values == np.take_along_axis(logits, order, axis=1)).all()


def test_top_tokens_with_ties_report_each_once():
    logits = np.zeros((1, 600), np.float32)
    logits[0, 599] = 1
    ids, values = (np.asarray(a)[0] for a in top_tokens(logits, n=20))
    assert ids[0] == 599
    assert len(set(ids.tolist())) == 20
    assert values.tolist() == [1.0] + [0.0] * 19
    assert ids.max() < 600


def test_top_tokens_of_masked_logits_stay_inside_the_vocabulary():
    logits = np.full((1, 300), -np.inf, np.float32)
    logits[0, 4] = 0
    ids, _ = top_tokens(logits, n=20)
    assert np.asarray(ids).max() < 300
    assert int(ids[0, 0]) == 4


# -- size ------------------------------------------------------------------------------------------------------------


def test_shapes_for_mistral_smalls_vocabulary():
    rows, vocab = 64, 131072

    def everything(logits, chosen, counts, prompt, key, position):
        adjusted = sampling.adjust_logits(logits, chosen, counts, prompt)
        token = sampling.sample(adjusted, chosen, sampling.uniforms(key, position, chosen.choice))
        return token, sampling.top_tokens(logits, 20)

    chosen = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), inputs(rows, vocab, 300))
    shape = jax.ShapeDtypeStruct
    token, (ids, values) = jax.eval_shape(
        everything,
        shape((rows, vocab), jnp.float32),
        chosen,
        shape((rows, vocab), jnp.int32),
        shape((rows, vocab // 32), jnp.uint32),
        shape((rows, 2), jnp.uint32),
        shape((rows,), jnp.int32),
    )
    assert (token.shape, token.dtype) == ((rows,), jnp.int32)
    assert (ids.shape, values.shape) == ((rows, 20), (rows, 20))


def test_no_sort_of_the_vocabulary():
    vocab = 131072

    def everything(logits, chosen, uniform):
        return sampling.sample(logits, chosen, uniform), sampling.top_tokens(logits, 20)

    shape = jax.ShapeDtypeStruct
    chosen = jax.tree.map(lambda a: shape(a.shape, a.dtype), inputs(2, vocab))
    lowered = jax.jit(everything).lower(shape((2, vocab), jnp.float32), chosen, shape((2,), jnp.float32)).as_text()
    sorts = [line for line in lowered.splitlines() if "sort" in line or "top_k" in line]
    assert sorts, "top_tokens sorts its candidates"
    assert not [line for line in sorts if f"2x{vocab}x" in line]


def test_every_field_of_the_sampling_inputs_is_tested_here():
    assert {field.name for field in dataclasses.fields(SamplingInputs)} == set(vars(inputs(1, 32)))
