"""In Pallas's interpreter, which runs the kernels' arithmetic; `gpu` tests run them compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax.kernels import quantize_pallas
from elastic_jax.kernels.quantize_pallas import QuantizeTiles, choose_tiles
from elastic_jax.norm import RMSNorm
from elastic_jax.quantization import quantize_8bit

EPS = 1e-5
INTERPRET = [True, pytest.param(False, marks=pytest.mark.gpu)]
WIDTHS = [(32, 1), (96, 1), (576, 1), (576, 9), (5120, 1), (5120, 10), pytest.param(32768, 8, marks=pytest.mark.gpu)]


def rows_of(width, dtype):
    rng = np.random.default_rng(width)
    x = jnp.asarray(rng.standard_normal((20, width)) * rng.uniform(1e-3, 1e3, (20, 1)), dtype)
    return x.at[3].set(0)


def norm_of(width):
    return RMSNorm(jnp.asarray(np.random.default_rng(1).uniform(0.1, 3, width), jnp.bfloat16), EPS)


def run(x, norm, blocks, interpret, tiles=None):
    tiles = tiles or choose_tiles(x.shape[1], blocks, normed=norm is not None)
    if norm is None:
        return quantize_pallas.run(x, blocks, tiles, interpret=interpret)
    return quantize_pallas.run_normed(x, norm.weight.get_value(), norm.eps, blocks, tiles, interpret=interpret)


def check(found, x, norm, blocks):
    """Equal to the reference: the scales but for their last bits, the integers but for quotients near a tie."""
    plane, scale = (np.asarray(array) for array in found)
    expected, expected_scale = (np.asarray(array) for array in quantize_8bit(x, norm, blocks))
    assert (plane.shape, plane.dtype, scale.shape) == (x.shape, np.int8, (x.shape[0], blocks))
    np.testing.assert_allclose(scale, expected_scale, rtol=1e-6)
    normed = np.asarray(x if norm is None else norm(x), np.float64)
    quotient = normed / np.repeat(expected_scale.astype(np.float64), x.shape[1] // blocks, axis=1)
    difference = np.abs(plane.astype(np.int32) - expected.astype(np.int32))
    assert difference.max() <= 1
    assert (np.abs(np.abs(quotient - np.floor(quotient)) - 0.5)[difference > 0] < 1e-4).all()
    assert (difference > 0).sum() <= max(1, difference.size // 1000)
    assert (scale[3] == 1).all()
    assert not plane[3].any()


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize(("width", "blocks"), WIDTHS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equals_the_reference(width, blocks, dtype, interpret):
    x = rows_of(width, dtype)
    check(run(x, None, blocks, interpret), x, None, blocks)


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize(("width", "blocks"), WIDTHS)
def test_after_a_norm_equals_norm_then_rounding(width, blocks, interpret):
    x, norm = rows_of(width, jnp.bfloat16), norm_of(width)
    check(run(x, norm, blocks, interpret), x, norm, blocks)


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize("width", [1024, 1100])
def test_a_row_that_is_read_twice_gives_the_same(width, interpret):
    x = rows_of(width, jnp.bfloat16)
    twice = run(x, None, 1, interpret, QuantizeTiles(256, 4, held=False))
    check(twice, x, None, 1)
    held = run(x, None, 1, interpret, QuantizeTiles(256, 4, held=True))
    for a, b in zip(twice, held, strict=True):
        assert (np.asarray(a) == np.asarray(b)).all()


def test_wide_rows_are_read_twice_unless_blocks_cut_them():
    assert not choose_tiles(32768, 1, normed=False).held
    assert choose_tiles(32768, 8, normed=False).held
    assert choose_tiles(5120, 1, normed=True).held


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize("held", [True, False])
def test_ties_go_to_even(held, interpret):
    x = jnp.asarray([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5] * 4])
    plane, _ = run(x, None, 1, interpret, QuantizeTiles(16, 4, held))
    assert np.asarray(plane)[0, :8].tolist() == [127, 0, 2, 2, 0, -2, -2, 126]


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible_and_in_its_row(bad, normed, interpret):
    x, norm = rows_of(64, jnp.bfloat16), norm_of(64) if normed else None
    clean = run(x, norm, 1, interpret)
    spoilt = run(x.at[5, 7].set(bad), norm, 1, interpret)
    assert not np.isfinite(np.asarray(spoilt[1])[5]).any()
    others = np.arange(20) != 5
    for a, b in zip(clean, spoilt, strict=True):
        assert (np.asarray(a)[others] == np.asarray(b)[others]).all()


def test_few_rows_are_left_to_xla():
    x, norm = rows_of(64, jnp.bfloat16)[:16], norm_of(64)
    text = jax.jit(lambda x: quantize_pallas.quantize_8bit(x, norm, 1)).lower(x).as_text()
    assert "custom_call" not in text
