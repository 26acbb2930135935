import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax.quantization import quantize
from elastic_jax.search.rounding import compensated, round_with_compensation


def correlated(tokens, size, rank, seed):
    """Inputs of a few directions and some noise, as activations are."""
    rng = np.random.default_rng(seed)
    directions = np.random.default_rng(99).standard_normal((rank, size))
    return (rng.standard_normal((tokens, rank)) @ directions + 0.1 * rng.standard_normal((tokens, size))).astype(
        np.float32
    )


def error(weight, values, scales, x):
    difference = (weight - np.asarray(values, np.float32) * np.asarray(scales)).astype(np.float64)
    return np.square(x.astype(np.float64) @ difference.T).sum()


@pytest.mark.parametrize("size", [96, 256])
def test_the_error_of_the_output_shrinks_where_inputs_are_correlated(size):
    weight = np.random.default_rng(1).standard_normal((40, size)).astype(np.float32)
    x, other = correlated(512, size, 8, 2), correlated(256, size, 8, 3)
    found = round_with_compensation(jnp.asarray(weight), jnp.asarray(x), jnp.asarray(other))
    assert found.chosen == "gptq"
    assert found.errors["gptq"] < 0.5 * found.errors["nearest"]
    nearest = quantize(jnp.asarray(weight), prompt_activations="a16")
    assert error(weight, found.values, found.scales, other) < 0.5 * error(weight, nearest.values, nearest.scales, other)
    assert np.asarray(found.scales).tobytes() == np.asarray(nearest.scales).tobytes()
    assert np.abs(np.asarray(found.values, int)).max() <= 127


def test_without_correlation_it_is_rounding_to_nearest():
    """Inputs of one channel at a time have a diagonal second moment: there is nothing to compensate with."""
    weight = np.random.default_rng(1).standard_normal((10, 64)).astype(np.float32)
    nearest = quantize(jnp.asarray(weight), prompt_activations="a16")
    values = compensated(jnp.asarray(weight), nearest.scales, jnp.asarray(np.eye(64, dtype=np.float32)))
    assert (np.asarray(values) == np.asarray(nearest.values)).all()


def test_the_worse_way_is_not_taken():
    """Correlations of other text than what is held out can make it worse."""
    weight = np.random.default_rng(1).standard_normal((10, 64)).astype(np.float32)
    rng = np.random.default_rng(5)
    x = correlated(64, 64, 2, 2)
    other = rng.standard_normal((256, 64)).astype(np.float32)
    found = round_with_compensation(jnp.asarray(weight), jnp.asarray(x), jnp.asarray(other))
    assert found.errors[found.chosen] == min(found.errors.values())


def test_channels_that_are_never_used_are_rounded_to_nearest():
    weight = np.random.default_rng(1).standard_normal((10, 64)).astype(np.float32)
    x = correlated(128, 64, 4, 2)
    x[:, 7] = 0
    nearest = quantize(jnp.asarray(weight), prompt_activations="a16")
    values = np.asarray(compensated(jnp.asarray(weight), nearest.scales, jnp.asarray(x)))
    assert (values[:, 7] == np.asarray(nearest.values)[:, 7]).all()
