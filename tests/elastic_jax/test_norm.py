import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from elastic_jax.norm import RMSNorm


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norm_is_computed_in_float32(dtype):
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((3, 64)) * np.array([[1.0], [1e-4], [1e4]]), dtype)
    weight = jnp.asarray(rng.standard_normal(64), dtype)
    out = nnx.jit(RMSNorm(weight, 1e-5))(x)
    exact, scale = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    expected = exact / np.sqrt((exact**2).mean(axis=1, keepdims=True) + 1e-5) * scale
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(out), expected, rtol=2e-6, atol=1e-6)


def test_norm_of_zeros_is_zero():
    out = nnx.jit(RMSNorm(jnp.ones(8), 1e-5))(jnp.zeros((2, 8)))
    assert (np.asarray(out) == 0).all()
