import jax
import ml_dtypes
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from converters.quantize import quantize_int8
from elastic_jax.quantization import quantize

matrices = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
).map(lambda weight: weight.astype(ml_dtypes.bfloat16))


@given(matrices)
def test_the_error_is_at_most_half_a_scale(weight):
    values, scales = quantize_int8(weight)
    exact = weight.astype(np.float64)
    error = np.abs(values * scales.astype(np.float64) - exact)
    assert np.all(error <= scales * 0.5 * (1 + 1e-5))
    assert np.all(scales > 0)
    assert np.all(np.isfinite(scales))
    assert values.min() >= -127
    assert np.all((np.abs(values).max(axis=1) == 127) | (np.abs(exact).max(axis=1) < 2e-36))


def test_a_zero_row_has_scale_one():
    values, scales = quantize_int8(np.zeros((2, 3), ml_dtypes.bfloat16))
    assert not values.any()
    np.testing.assert_array_equal(scales, [[1], [1]])


def test_ties_go_to_even():
    row = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5]], ml_dtypes.bfloat16)
    np.testing.assert_array_equal(quantize_int8(row)[0], [[127, 0, 2, 2, 0, -2]])


def test_a_row_too_small_for_a_normal_scale_counts_as_zero():
    weight = np.array([[1e-38, -1e-39], [1.4e-36, 0]], ml_dtypes.bfloat16)
    values, scales = quantize_int8(weight)
    np.testing.assert_array_equal(values, [[0, 0], [0, 0]])
    np.testing.assert_array_equal(scales, [[1], [1]])
    assert np.all(scales >= np.finfo(np.float32).tiny)


def test_blocks_of_rows_change_nothing():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((500, 4096), dtype=np.float32).astype(ml_dtypes.bfloat16)  # several blocks
    values, scales = quantize_int8(weight)
    for row in (0, 255, 256, 499):
        single = quantize_int8(weight[row : row + 1])
        np.testing.assert_array_equal(values[row : row + 1], single[0])
        np.testing.assert_array_equal(scales[row : row + 1], single[1])


def test_agrees_with_the_quantization_the_model_uses():
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((64, 96), dtype=np.float32).astype(ml_dtypes.bfloat16)
    values, scales = quantize_int8(weight)
    traced = quantize(jax.numpy.asarray(weight), prompt_activations="a8")
    np.testing.assert_allclose(scales, traced.scales, rtol=1e-6)
    # XLA divides by multiplying with a reciprocal, which moves ties: bfloat16 weights have many.
    moved = values != np.asarray(traced.values)
    quotient = (weight.astype(np.float64) / scales)[moved]
    np.testing.assert_allclose(np.abs(quotient) % 1, 0.5, atol=1e-4)
    assert moved.mean() < 0.01
