"""In Pallas's interpreter, which runs the kernel's arithmetic; `gpu` tests run it compiled."""

import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax.kernels import quantize_pallas
from elastic_jax.quantization import quantize_8bit


@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("width", [32, 96, 576, 5120, pytest.param(32768, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equals_the_reference(width, dtype, interpret):
    rng = np.random.default_rng(width)
    x = jnp.asarray(rng.standard_normal((20, width)) * rng.uniform(1e-3, 1e3, (20, 1)), dtype)
    x = x.at[3].set(0)
    plane, scale = quantize_pallas.run(x, interpret=interpret)
    expected, expected_scale = quantize_8bit(x)
    np.testing.assert_allclose(np.asarray(scale), np.asarray(expected_scale), rtol=1e-6)
    # Only a quotient at a tie may fall on its other side: its last bit depends on how the division is compiled.
    quotient = np.asarray(x, np.float64) / np.asarray(expected_scale, np.float64)
    difference = np.abs(np.asarray(plane, np.int32) - np.asarray(expected, np.int32))
    assert difference.max() <= 1
    assert (np.abs(np.abs(quotient - np.floor(quotient)) - 0.5)[difference > 0] < 1e-4).all()
    assert (difference > 0).sum() <= max(1, difference.size // 1000)
    assert scale[3, 0] == 1
    assert not np.asarray(plane[3]).any()


@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=pytest.mark.gpu)])
def test_ties_go_to_even(interpret):
    x = jnp.asarray([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5] * 4])
    plane, _ = quantize_pallas.run(x, interpret=interpret)
    assert np.asarray(plane)[0, :8].tolist() == [127, 0, 2, 2, 0, -2, -2, 126]
