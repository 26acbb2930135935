import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_jax import kernels
from elastic_jax.norm import RMSNorm
from elastic_jax.quantization import (
    QArray,
    activation_blocks,
    add_product,
    quantize,
    quantize_8bit,
    quantize_16bit,
    swiglu,
)

LARGEST = float(np.finfo(np.float32).max)
SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)

quantize_a8 = jax.jit(lambda w: quantize(w, prompt_activations="a8"))
jit_8bit = jax.jit(quantize_8bit)
jit_16bit = jax.jit(quantize_16bit)
dot = kernels.dot("xla")
jit_dot = jax.jit(dot, static_argnames="generated")

# One shape, so that hypothesis does not compile for each example.
SHAPE = (3, 16)
numbers = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-LARGEST, max_value=LARGEST)
# Mixing scales within a row: one huge value among small ones is the case that loses the small ones.
matrices = st.lists(
    st.one_of(
        st.lists(numbers, min_size=SHAPE[1], max_size=SHAPE[1]),
        st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 127.0, 1e30]), min_size=SHAPE[1], max_size=SHAPE[1]),
        st.just([0.0] * SHAPE[1]),
        st.floats(width=32, min_value=2.0**-100, max_value=2.0**100).flatmap(
            lambda a: st.lists(st.sampled_from([a, -a, a / 2, a / 3]), min_size=SHAPE[1], max_size=SHAPE[1])
        ),
    ),
    min_size=SHAPE[0],
    max_size=SHAPE[0],
).map(lambda rows: np.array(rows, np.float32))

EXTREMES = {
    "zeros": [0.0] * 16,
    "largest": [LARGEST] * 8 + [-LARGEST] * 8,
    "one largest": [LARGEST] + [1.0] * 15,
    "smallest normal": [SMALLEST_NORMAL, -SMALLEST_NORMAL] * 8,
    "denormal": [float(np.float32(1e-45)), -float(np.float32(1e-42))] * 8,
    "normals whose scale is denormal": [1e-36, -1e-36, 5e-37, 0.0] * 4,
    "negative largest alone": [-3.0] + [0.0] * 15,
}


def counts_as_zero(x: np.ndarray, largest: int) -> np.ndarray:
    """Rows whose scale would be denormal, which XLA's code flushes to zero."""
    return np.abs(x).max(axis=1) < largest * SMALLEST_NORMAL


def check_weight(weight: np.ndarray) -> None:
    q = quantize_a8(weight)
    values, scales = np.asarray(q.values), np.asarray(q.scales, np.float64)
    assert q.values.dtype == jnp.int8
    assert scales.shape == (weight.shape[0], 1)
    assert values.min() >= -127
    assert values.max() <= 127
    assert np.isfinite(scales).all()
    assert (scales > 0).all()
    zero = counts_as_zero(weight, 127)
    assert (scales[zero] == 1).all()
    assert (values[zero] == 0).all()
    # 1e-6 relative to the largest: the division and the scale are themselves rounded to float32.
    bound = scales / 2 + 1e-6 * np.abs(weight).max(axis=1, keepdims=True)
    assert (np.abs(values * scales - weight) <= bound)[~zero].all()
    # The largest entry uses the whole range, so no precision is given away.
    assert (np.abs(values[~zero]).max(axis=1, initial=0) == 127).all()


def check_planes(x: np.ndarray) -> None:
    high, low, scale = (np.asarray(a) for a in jit_16bit(x))
    assert (high.dtype, low.dtype) == (np.int8, np.int8)
    joined = 256 * high.astype(np.int64) + low
    assert np.abs(joined).max() <= 127 * 256
    assert np.abs(high.astype(np.int64)).max() <= 127
    scale = scale.astype(np.float64)
    zero = counts_as_zero(x, 127 * 256)
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    assert (scale[zero] == 1).all()
    assert (joined[zero] == 0).all()
    bound = scale / 2 + 3e-7 * np.abs(x).max(axis=1, keepdims=True)
    assert (np.abs(joined * scale - x) <= bound)[~zero].all()


@given(matrices)
def test_quantized_weights_keep_the_invariant_and_the_error_bound(weight):
    check_weight(weight)


@given(matrices)
def test_planes_fit_int8_and_keep_the_error_bound(x):
    check_planes(x)


@given(matrices)
def test_one_plane_keeps_the_error_bound(x):
    plane, scale = (np.asarray(a) for a in jit_8bit(x))
    assert plane.dtype == np.int8
    assert plane.min() >= -127
    assert (scale > 0).all()
    bound = scale.astype(np.float64) / 2 + 1e-6 * np.abs(x).max(axis=1, keepdims=True)
    assert (np.abs(plane * scale.astype(np.float64) - x) <= bound)[~counts_as_zero(x, 127)].all()


@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_rows(name):
    x = np.array([EXTREMES[name], [1.0] * 16, [0.5, -2.0] * 8], np.float32)
    check_weight(x)
    check_planes(x)


def test_a_value_at_minus_absmax_is_representable():
    high, low, scale = jit_16bit(np.array([[-5.0, 5.0, 0.0, 1.0]], np.float32))
    joined = 256 * np.asarray(high, np.int64) + np.asarray(low)
    assert joined[0, :3].tolist() == [-127 * 256, 127 * 256, 0]
    assert np.isclose(float(scale[0, 0]), 5 / 32512)


def test_every_plane_pair_is_exact():
    # All 65025 integers that the planes can hold come back as themselves.
    integers = np.arange(-127 * 256, 127 * 256 + 1, dtype=np.float32)
    padded = np.zeros(65536, np.float32)
    padded[: len(integers)] = integers
    x = padded.reshape(256, 256)
    x[:, -1] = 127 * 256  # every row's scale is then 1
    high, low, scale = jit_16bit(x)
    assert np.asarray(scale).max() == np.asarray(scale).min() == 1
    assert (256 * np.asarray(high, np.int64) + np.asarray(low) == x).all()


def test_dequantize_multiplies_by_rows():
    q = QArray(np.array([[1, -2], [3, 4]], np.int8), np.array([[0.5], [2.0]], np.float32), "a8")
    assert np.asarray(jax.jit(QArray.dequantize)(q)).tolist() == [[0.5, -1.0], [6.0, 8.0]]
    assert q.shape == (2, 2)


def test_shapes_without_data_are_weights_too():
    q = QArray(jax.ShapeDtypeStruct((65536, 5120), jnp.int8), jax.ShapeDtypeStruct((65536, 1), jnp.float32), "a8")
    out = jax.eval_shape(lambda q, x: dot(x, q, generated=2), q, jax.ShapeDtypeStruct((7, 5120), jnp.float32))
    assert (out.shape, out.dtype) == ((7, 65536), jnp.float32)


# -- the dot -------------------------------------------------------------------------------------------------------

IN, OUT = 48, 24


def weight_of(seed: int, prompt_activations) -> QArray:
    weight = np.random.default_rng(seed).standard_normal((OUT, IN)).astype(np.float32)
    return quantize(jnp.asarray(weight), prompt_activations=prompt_activations)


def activations(seed: int, tokens: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, IN)) * 10.0 ** rng.integers(-4, 4, (tokens, 1))
    x[:, rng.integers(0, IN)] *= 50  # an outlier channel, as real activations have
    return x.astype(np.float32)


def exact(x: np.ndarray, q: QArray) -> np.ndarray:
    return x.astype(np.float64) @ (np.asarray(q.values, np.float64) * np.asarray(q.scales, np.float64)).T


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_two_planes_are_within_their_bound_of_float64(seed):
    x, q = activations(seed, 5), weight_of(seed % 7, "a16")
    absmax = np.abs(x).max(axis=1, keepdims=True)
    weights = np.abs(np.asarray(q.values, np.float64) * np.asarray(q.scales, np.float64)).sum(axis=1)[None]
    # Half a step of rounding for each activation, and float32 sums.
    bound = (absmax / 32512 / 2 + 1e-6 * absmax) * weights
    assert (np.abs(np.asarray(jit_dot(x, q, generated=5)) - exact(x, q)) <= bound).all()


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_one_plane_is_within_its_bound_of_float64(seed):
    x, q = activations(seed, 5), weight_of(seed % 7, "a8")
    absmax = np.abs(x).max(axis=1, keepdims=True)
    weights = np.abs(np.asarray(q.values, np.float64) * np.asarray(q.scales, np.float64)).sum(axis=1)[None]
    error = np.abs(np.asarray(jit_dot(x, q, generated=0)) - exact(x, q))
    assert (error <= (absmax / 127 / 2 + 1e-6 * absmax) * weights).all()
    # And it is 8 bits indeed: a bound that 16 bits meet is broken.
    assert (error > absmax / 32512 * weights).any()


def test_a_sum_of_the_largest_products_does_not_overflow():
    # Mistral-Small's `down` contracts 32768; 256 times such a sum would not fit int32.
    x = np.full((2, 32768), 3.0, np.float32)
    q = QArray(np.full((4, 32768), 127, np.int8), np.ones((4, 1), np.float32), "a8")
    expected = 3.0 * 127 * 32768
    np.testing.assert_allclose(np.asarray(jit_dot(x, q, generated=1)), expected, rtol=1e-6)


@pytest.mark.parametrize("generated", [1, 2, 4])
def test_generated_rows_do_not_depend_on_the_prompts_activations(generated):
    x = activations(1, 4)
    a8 = jit_dot(x, weight_of(0, "a8"), generated=generated)
    a16 = jit_dot(x, weight_of(0, "a16"), generated=generated)
    assert (np.asarray(a8)[:generated] == np.asarray(a16)[:generated]).all()
    if generated < 4:
        assert (np.asarray(a8)[generated:] != np.asarray(a16)[generated:]).any(axis=1).all()


@pytest.mark.parametrize(
    ("in_size", "blocks"),
    [(576, 9), (1536, 12), (5120, 10), (4096, 8), (32768, 8), (14336, 8), (64, 2), (48, 3), (50, 5), (7, 7), (1, 1)],
)
def test_blocks_are_about_ten_and_divide_the_contraction(in_size, blocks):
    found = activation_blocks(in_size)
    assert found == blocks
    assert in_size % found == 0
    assert in_size // found % math.gcd(in_size, 32) == 0


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_block_scales_are_within_their_bound_of_float64(seed):
    x, q = activations(seed, 5), weight_of(seed % 7, "a8b")
    blocked = np.abs(x).reshape(5, activation_blocks(IN), -1)
    weights = np.abs(np.asarray(q.values, np.float64) * np.asarray(q.scales, np.float64))
    # Half a step of each block's own scale: a block without the outlier keeps its small numbers.
    step = np.repeat(blocked.max(axis=-1), blocked.shape[-1], axis=1) / 127 / 2
    bound = step @ weights.T + 1e-6 * np.abs(x).max(axis=1, keepdims=True) * weights.sum(axis=1)[None]
    assert (np.abs(np.asarray(jit_dot(x, q, generated=0)) - exact(x, q)) <= bound).all()


def test_block_scales_lose_less_than_one_scale_beside_outliers():
    x = np.random.default_rng(0).standard_normal((64, IN)).astype(np.float32)
    x[:, 3] *= 50
    error = {}
    for width in ("a8", "a8b"):
        q = weight_of(0, width)
        error[width] = np.square(np.asarray(jit_dot(x, q, generated=0)) - exact(x, q)).mean()
    assert error["a8b"] < error["a8"] / 2


def test_generated_rows_beside_block_scales_keep_16_bits():
    x = activations(1, 4)
    together, alone = (np.asarray(jit_dot(x, weight_of(0, width), generated=2)) for width in ("a8b", "a16"))
    # The planes are equal; float32 adds the blocks' sums in another order.
    np.testing.assert_allclose(together[:2], alone[:2], rtol=1e-5, atol=1e-6 * np.abs(alone[:2]).max())
    assert (np.abs(together[2:] - alone[2:]).max(axis=1) > 1e-4 * np.abs(alone[2:]).max(axis=1)).all()


@pytest.mark.parametrize("prompt_activations", ["a8", "a16"])
@pytest.mark.parametrize(("generated", "prompt"), [(1, 0), (1, 1), (3, 5), (0, 1), (0, 7), (4, 0)])
def test_a_token_is_computed_the_same_alone_and_in_company(prompt_activations, generated, prompt):
    x, q = activations(2, generated + prompt), weight_of(3, prompt_activations)
    together = np.asarray(jit_dot(x, q, generated=generated))
    for i in range(generated + prompt):
        alone = np.asarray(jit_dot(x[i : i + 1], q, generated=int(i < generated)))
        assert (together[i] == alone[0]).all()


def test_a_prompt_token_of_an_a16_weight_is_computed_as_a_generated_one():
    x, q = activations(5, 3), weight_of(3, "a16")
    assert (np.asarray(jit_dot(x, q, generated=0)) == np.asarray(jit_dot(x, q, generated=3))).all()


def test_an_outlier_token_leaves_its_neighbours_alone():
    x, q = activations(6, 4), weight_of(4, "a8")
    changed = x.copy()
    changed[1] *= 1e6
    before, after = np.asarray(jit_dot(x, q, generated=2)), np.asarray(jit_dot(changed, q, generated=2))
    assert (before[[0, 2, 3]] == after[[0, 2, 3]]).all()
    assert (before[1] != after[1]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("prompt_activations", ["a8", "a8b", "a16"])
def test_what_is_not_finite_stays_visible_and_in_its_row(prompt_activations, bad):
    x, q = activations(7, 4), weight_of(5, prompt_activations)
    clean = np.asarray(jit_dot(x, q, generated=2))
    for row in range(4):
        spoilt = x.copy()
        spoilt[row, 3] = bad
        out = np.asarray(jit_dot(spoilt, q, generated=2))
        others = [i for i in range(4) if i != row]
        assert not np.isfinite(out[row]).any()
        assert (out[others] == clean[others]).all()


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_float_weight_is_a_plain_product(tokens, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((tokens, IN)), jnp.float32)
    weight = jnp.asarray(rng.standard_normal((OUT, IN)), dtype)
    out = jit_dot(x, weight, generated=1)
    assert (out.shape, out.dtype) == ((tokens, OUT), jnp.float32)
    expected = np.asarray(x.astype(dtype), np.float64) @ np.asarray(weight, np.float64).T
    # bf16 operands, float32 sums: exact products, so only the sums round.
    np.testing.assert_allclose(np.asarray(out), expected, atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_one_row_of_a_float_product_is_the_same_as_among_many(dtype):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((3, IN)), jnp.float32)
    weight = jnp.asarray(rng.standard_normal((OUT, IN)), dtype)
    together = np.asarray(jit_dot(x, weight, generated=0))
    for i in range(3):
        np.testing.assert_allclose(np.asarray(jit_dot(x[i : i + 1], weight, generated=0))[0], together[i], atol=1e-5)


def test_one_row_in_bf16_is_never_a_matrix_vector_product_on_cpu():
    # XLA:CPU would convert the whole weight to float32 first.
    weight = jax.ShapeDtypeStruct((OUT, IN), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((1, IN), jnp.float32)
    lowered = jax.jit(lambda x, w: dot(x, w, generated=1)).lower(x, weight).as_text()
    products = re.findall(r"dot_general.*: \((.*)\) ->", lowered)
    assert products == [f"tensor<2x{IN}xbf16>, tensor<{OUT}x{IN}xbf16>"]


# -- what stands before and after the dot ------------------------------------------------------------------------------


def weights_of_every_kind():
    plain = np.random.default_rng(8).standard_normal((OUT, IN))
    floats = [jnp.asarray(plain, dtype) for dtype in (jnp.float32, jnp.bfloat16)]
    return [*floats, *(weight_of(8, width) for width in ("a8", "a8b", "a16"))]


@pytest.mark.parametrize("weight", weights_of_every_kind(), ids=["float32", "bfloat16", "a8", "a8b", "a16"])
@pytest.mark.parametrize("generated", [0, 2, 5])
def test_norm_and_residual_are_as_if_computed_apart(weight, generated):
    rng = np.random.default_rng(9)
    x, residual = (jnp.asarray(rng.standard_normal((5, n)), jnp.bfloat16) for n in (IN, OUT))
    norm = RMSNorm(jnp.asarray(rng.uniform(0.5, 2, IN), jnp.bfloat16), 1e-5)
    product = dot(norm(x), weight, generated=generated)
    found = dot(x, weight, generated=generated, norm=norm, residual=residual)
    assert found.dtype == jnp.bfloat16
    assert (np.asarray(found) == np.asarray(residual + product.astype(jnp.bfloat16))).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("generated", [0, 2, 5])
def test_swiglu_of_a_float_product_has_the_weights_type(dtype, generated):
    """What `down` is given depends neither on a token's role nor on the kernel, whatever `down` rounds it to."""
    rng = np.random.default_rng(10)
    x = jnp.asarray(rng.standard_normal((5, IN)), jnp.float32)
    weight = jnp.asarray(rng.standard_normal((OUT, IN)), dtype)
    found = jax.jit(lambda x, w: dot(x, w, generated=generated, gated=True).astype(jnp.float32))(x, weight)
    expected = swiglu(dot(x, weight, generated=generated)).astype(dtype)
    assert dot(x, weight, generated=generated, gated=True).dtype == dtype
    if dtype == jnp.bfloat16:  # not left out where what follows is float32, as XLA may leave out conversions
        assert (np.asarray(found.astype(jnp.bfloat16), np.float32) == np.asarray(found)).all()
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected, np.float32), rtol=2**-7, atol=1e-5)


def test_a_product_is_rounded_before_it_is_added_even_where_both_are_fused():
    # 1 + 1/256 + 1/512 is rounded to 1 + 1/128 in bfloat16, and 1/256 to itself.
    residual, product = jnp.full((1, 1), 1 / 256, jnp.bfloat16), jnp.full((1, 1), 1 + 3 / 512, jnp.float32)
    assert float(jax.jit(add_product)(residual, product)[0, 0]) == float(residual[0, 0] + jnp.bfloat16(1 + 1 / 128))
    assert add_product(None, product) is product
