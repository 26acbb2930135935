"""In Pallas's interpreter, which runs the kernel's arithmetic; `gpu` tests run it compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import MISTRAL_SMALL

from elastic_jax import kernels
from elastic_jax.errors import ConfigError
from elastic_jax.groups import model_groups
from elastic_jax.kernels import integer_dot_pallas
from elastic_jax.kernels.integer_dot_pallas import DotTiles, check_tiles, choose_tiles, usual_tiles
from elastic_jax.quantization import activation_blocks


def operands(rows, out, contraction, seed=0):
    rng = np.random.default_rng(seed)
    x, values = (rng.integers(-128, 128, (n, contraction)).astype(np.int8) for n in (rows, out))
    row_scales, scales = (rng.uniform(0.01, 2, (n, 1)).astype(np.float32) for n in (rows, out))
    return tuple(jnp.asarray(array) for array in (x, row_scales, values, scales))


def exact(*arrays):
    x, row_scales, values, scales = (np.asarray(array) for array in arrays)
    return (x.astype(np.float64) @ values.astype(np.float64).T) * row_scales * scales.T


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 32, 64, 65, 130])
def test_equals_the_reference(rows):
    arrays = operands(rows, 192, 320)
    out = integer_dot_pallas.run(*arrays, None, choose_tiles(90, rows, 192, 320), gated=False, interpret=True)
    np.testing.assert_allclose(np.asarray(out), exact(*arrays), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(out), np.asarray(kernels.DOT["xla"].multiply(*arrays, None)), rtol=1e-6)


@pytest.mark.parametrize("weight_first", [True, False])
@pytest.mark.parametrize("splits", [1, 2, 4])
def test_parts_of_the_contraction_add_up(splits, weight_first):
    arrays = operands(5, 64, 256)
    tiles = DotTiles(16, 32, 64, splits, 4, 2, weight_first)
    np.testing.assert_allclose(
        np.asarray(integer_dot_pallas.run(*arrays, None, tiles, gated=False, interpret=True)),
        exact(*arrays),
        rtol=1e-5,
        atol=1e-2,
    )


@pytest.mark.parametrize("weight_first", [True, False])
@pytest.mark.parametrize(("blocks", "splits"), [(2, 1), (5, 1), (4, 2)])
def test_scales_of_blocks(blocks, splits, weight_first):
    x, _, values, scales = operands(37, 64, 320 if blocks == 5 else 512)
    rng = np.random.default_rng(1)
    row_scales = jnp.asarray(rng.uniform(0.01, 2, (37, blocks)).astype(np.float32))
    tiles = DotTiles(16, 32, 64, splits, 4, 2, weight_first)
    found = integer_dot_pallas.run(x, row_scales, values, scales, None, tiles, gated=False, interpret=True)
    scaled = np.asarray(x, np.float64) * np.repeat(np.asarray(row_scales), x.shape[1] // blocks, axis=1)
    expected = scaled @ (np.asarray(values, np.float64) * np.asarray(scales)).T
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-5, atol=1e-2)
    reference = kernels.DOT["xla"].multiply(x, row_scales, values, scales, None)
    np.testing.assert_allclose(np.asarray(found), np.asarray(reference), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("weight_first", [True, False])
@pytest.mark.parametrize("rows", [1, 16, 40])
def test_gated_is_swiglu_of_the_plain_one(rows, weight_first):
    x, row_scales, values, scales = operands(rows, 128, 128)
    arrays = x, row_scales * 1e-3, values, scales * 1e-2
    tiles = DotTiles(16, 32, 64, 1, 4, 2, weight_first)
    found = integer_dot_pallas.run(*arrays, None, tiles, gated=True, interpret=True)
    assert (found.shape, found.dtype) == ((rows, 64), jnp.bfloat16)
    gate, up = np.split(exact(*arrays), 2, axis=1)
    np.testing.assert_allclose(np.asarray(found, np.float64), gate / (1 + np.exp(-gate)) * up, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("weight_first", [True, False])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("rows", "splits"), [(16, 1), (40, 1), (40, 2)])
def test_what_is_there_is_added_after_the_product_is_rounded(rows, splits, dtype, weight_first):
    x, row_scales, values, scales = operands(rows, 64, 128)
    residual = jnp.asarray(np.random.default_rng(2).standard_normal((rows, 64)) * 30, dtype)
    arrays = x, row_scales * 1e-3, values, scales * 1e-2
    tiles = DotTiles(16, 32, 64, splits, 4, 2, weight_first)
    found = integer_dot_pallas.run(*arrays, residual, tiles, gated=False, interpret=True)
    product = integer_dot_pallas.run(*arrays, None, tiles, gated=False, interpret=True)
    assert found.dtype == dtype
    found, expected = np.asarray(found, np.float32), np.asarray(residual + product.astype(dtype), np.float32)
    # Where nothing is rounded in between, one instruction multiplies and adds.
    np.testing.assert_allclose(found, expected, rtol=0, atol=0 if dtype == jnp.bfloat16 else 1e-5)


@pytest.mark.parametrize("blocks", [2, 4, 8, 10])
def test_tiles_end_where_blocks_do(blocks):
    for rows in (1, 17, 64, 100, 1024, 4096):
        tiles = choose_tiles(90, rows, 6144, 5120, blocks)
        assert 5120 // blocks % tiles.contracted == 0
        assert blocks % tiles.splits == 0


def test_chosen_tiles_leave_out_no_part_of_a_block():
    # Tiles measured for one scale a row split this contraction by 4, which 10 blocks are not divided by.
    assert choose_tiles(90, 17, 6144, 5120).splits == 4
    x, _, values, scales = operands(17, 6144, 5120)
    row_scales = jnp.asarray(np.random.default_rng(1).uniform(0.01, 2, (17, 10)).astype(np.float32))
    tiles = choose_tiles(90, 17, 6144, 5120, 10)
    found = integer_dot_pallas.run(x, row_scales, values, scales, None, tiles, gated=False, interpret=True)
    reference = np.asarray(kernels.DOT["xla"].multiply(x, row_scales, values, scales, None))
    assert np.abs(np.asarray(found) - reference).max() <= 2e-6 * np.abs(reference).max()


def test_parts_that_end_inside_a_block_are_refused():
    with pytest.raises(ConfigError, match=r"end where blocks of scales do.*10 block\(s\)"):
        check_tiles(DotTiles(32, 64, 128, 4, 4, 4, True), 6144, 5120, 10)
    check_tiles(DotTiles(32, 64, 128, 5, 4, 4, True), 6144, 5120, 10)


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_any_size_that_divides(rows, out, contraction, seed):
    arrays = operands(rows, 16 * out, 32 * contraction, seed)
    found = integer_dot_pallas.run(
        *arrays, None, choose_tiles(90, rows, 16 * out, 32 * contraction), gated=False, interpret=True
    )
    np.testing.assert_allclose(np.asarray(found), exact(*arrays), rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 8, 32, 128, 1152, 4096, 8192])
def test_tiles_divide_every_weight_of_mistral_small(rows):
    for group in set(model_groups(MISTRAL_SMALL).values()):
        for tiles in (choose_tiles(90, rows, group.out_size, group.in_size), usual(rows, group)):
            assert group.out_size % tiles.out == 0
            assert group.in_size % (tiles.contracted * tiles.splits) == 0


@pytest.mark.parametrize("rows", [1, 2, 8, 32, 128])
def test_few_rows_are_dealt_to_many_programs(rows):
    # They are bound by reading the weight, and many programs must read it.
    for group in set(model_groups(MISTRAL_SMALL).values()):
        tiles = usual(rows, group)
        assert -(-rows // tiles.rows) * (group.out_size // tiles.out) * tiles.splits >= 264


def usual(rows, group):
    return usual_tiles(90, rows, group.out_size, group.in_size)


@pytest.mark.parametrize(("capability", "limit"), [(80, 163), (86, 99), (89, 99), (90, 227), (100, 227)])
@pytest.mark.parametrize("rows", [2, 32, 64, 128, 4096])
def test_tiles_fit_the_shared_memory_of_every_gpu(rows, capability, limit):
    for group in set(model_groups(MISTRAL_SMALL).values()):
        tiles = choose_tiles(capability, rows, group.out_size, group.in_size)
        assert tiles.stages >= 2
        assert tiles.stages * (tiles.rows + tiles.out) * tiles.contracted <= limit * 1024


@pytest.mark.parametrize(("out", "contraction"), [(24, 64), (64, 48)])
def test_sizes_that_do_not_divide_are_refused(out, contraction):
    with pytest.raises(
        ConfigError, match=r"outputs divide by 16 and whose inputs divide by 32.*use the one called 'xla'"
    ):
        choose_tiles(90, 2, out, contraction)


def test_it_refuses_to_be_traced_for_the_cpu():
    with pytest.raises(ConfigError, match=r"needs an NVIDIA GPU of compute capability 8\.0"):
        jax.eval_shape(kernels.DOT["pallas"].multiply, *operands(2, 64, 64), None)


def test_the_default_falls_back_where_sizes_do_not_divide():
    assert kernels.default_names(MISTRAL_SMALL, "gpu", "bfloat16") == ("pallas", "pallas", "cuda")
    assert kernels.default_names(MISTRAL_SMALL, "gpu", "float32") == ("pallas", "pallas", "xla")
    assert kernels.default_names(MISTRAL_SMALL, "cpu", "bfloat16") == ("xla", "xla", "xla")
    odd = dataclasses.replace(MISTRAL_SMALL, intermediate_size=1000, head_dim=80)
    assert kernels.default_names(odd, "gpu", "bfloat16") == ("xla", "xla", "xla")


def difference(found, expected):
    """The largest, over the largest expected."""
    found, expected = found.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.max(jnp.abs(found - expected)) / jnp.max(jnp.abs(expected)))


def drawn(rows, out, contraction, blocks):
    """Operands drawn on the device, whose product is about 1."""
    keys = jax.random.split(jax.random.key(rows + out), 4)
    x, values = (
        jax.lax.bitcast_convert_type(jax.random.bits(key, (n, contraction), jnp.uint8), jnp.int8)
        for key, n in zip(keys[:2], (rows, out), strict=True)
    )
    size = 74 * 74 * contraction**0.5
    row_scales = jax.random.uniform(keys[2], (rows, blocks), minval=0.01, maxval=2) / size
    return x, row_scales, values, jax.random.uniform(keys[3], (out, 1), minval=0.01, maxval=2)


SHAPES = [(6144, 5120), (5120, 4096), (5120, 32768), (8192, 512)]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 17, 32, 64, 100, 128, 1152, 4096])
@pytest.mark.parametrize(("out", "contraction"), SHAPES)
@pytest.mark.parametrize("blocked", [False, True])
def test_compiled_equals_the_reference(rows, out, contraction, blocked):
    arrays = drawn(rows, out, contraction, activation_blocks(contraction) if blocked else 1)
    found, expected = (jax.jit(kernels.DOT[name].multiply)(*arrays, None) for name in ("pallas", "xla"))
    assert difference(found, expected) <= 2e-6


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [17, 100, 1024, 4096])
@pytest.mark.parametrize("blocked", [False, True])
def test_compiled_sums_with_what_is_there_are_those_of_the_products(rows, blocked):
    arrays = drawn(rows, 5120, 4096, 8 if blocked else 1)
    residual = jax.random.normal(jax.random.key(0), (rows, 5120), jnp.bfloat16)
    multiply = jax.jit(kernels.DOT["pallas"].multiply)
    product = np.asarray(multiply(*arrays, None).astype(jnp.bfloat16))
    assert (np.asarray(multiply(*arrays, residual)) == np.asarray(residual) + product).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "out", "contraction"), [(17, 8192, 512), (100, 8192, 5120), (1024, 8192, 5120), (64, 65536, 5120)]
)
@pytest.mark.parametrize("blocked", [False, True])
def test_compiled_gated_is_swiglu_of_the_product(rows, out, contraction, blocked):
    arrays = drawn(rows, out, contraction, activation_blocks(contraction) if blocked else 1)
    found, expected = (jax.jit(kernels.DOT[name].multiply_gated)(*arrays) for name in ("pallas", "xla"))
    assert (found.shape, found.dtype) == ((rows, out // 2), jnp.bfloat16)
    # A unit of the last place: where a gate is next to nothing, so is the result, and its error that of the sums.
    error = jnp.abs(found.astype(jnp.float32) - expected.astype(jnp.float32))
    allowed = 2.0**-7 * jnp.abs(expected.astype(jnp.float32)) + 1e-5
    assert bool(jnp.all(error <= allowed))
