"""In Pallas's interpreter of Mosaic, which runs the kernel's threads, fetches and barriers; on a GPU, the tests of
`integer_dot_pallas` run it, which chooses it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# It has no public name yet.
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from tiny import MISTRAL_SMALL

from aot_cache.compiler import compile_units
from aot_cache.targets import absent_device, find
from aot_cache.unit import Unit
from elastic_jax import kernels
from elastic_jax.groups import model_groups
from elastic_jax.kernels import integer_dot_hopper
from elastic_jax.kernels.integer_dot_hopper import HopperTiles, choose_tiles
from elastic_jax.kernels.pallas_device import multiprocessors
from elastic_jax.quantization import activation_blocks

WHOLE, BLOCKED = HopperTiles(128, 256, 128, 2, 8, 2), HopperTiles(128, 128, 256, 2, 8, 2)


def operands(rows, out, contraction, blocks):
    rng = np.random.default_rng(0)
    x, values = (rng.integers(-128, 128, (n, contraction)).astype(np.int8) for n in (rows, out))
    row_scales, scales = (rng.uniform(0.01, 2, shape).astype(np.float32) for shape in ((rows, blocks), (out, 1)))
    return tuple(jnp.asarray(array) for array in (x, row_scales * 1e-3, values, scales * 1e-2))


def run(arrays, residual, tiles, *, gated=False):
    return integer_dot_hopper.run(*arrays, residual, tiles, gated=gated, interpret=InterpretGPUParams())


@pytest.mark.parametrize("rows", [256, 150])
def test_equals_the_reference(rows):
    arrays = operands(rows, 512, 384, 1)
    expected = kernels.INTEGER_DOT["xla"].multiply(*arrays, None)
    np.testing.assert_allclose(np.asarray(run(arrays, None, WHOLE)), np.asarray(expected), rtol=1e-6)


def test_scales_of_blocks():
    arrays = operands(128, 256, 1024, 2)
    expected = np.asarray(kernels.INTEGER_DOT["xla"].multiply(*arrays, None))
    error = np.abs(np.asarray(run(arrays, None, BLOCKED)) - expected)
    assert error.max() <= 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize("tiles", [WHOLE, BLOCKED])
def test_what_is_there_is_added_after_the_product_is_rounded(tiles):
    arrays = operands(150, 256, 512, 1 if tiles is WHOLE else 2)
    residual = jnp.asarray(np.random.default_rng(1).standard_normal((150, 256)) * 30, jnp.bfloat16)
    found, product = run(arrays, residual, tiles), run(arrays, None, tiles)
    assert found.dtype == jnp.bfloat16
    assert (np.asarray(found) == np.asarray(residual + product.astype(jnp.bfloat16))).all()


@pytest.mark.parametrize("tiles", [WHOLE, BLOCKED])
def test_gated_is_swiglu_of_the_product(tiles):
    arrays = operands(128, 512, 512, 1 if tiles is WHOLE else 2)
    found = run(arrays, None, tiles, gated=True)
    expected = kernels.INTEGER_DOT["xla"].multiply_gated(*arrays)
    assert (found.shape, found.dtype) == ((128, 256), jnp.bfloat16)
    np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(expected, np.float32), rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("rows", [512, 1024, 1152, 4096])
def test_tiles_divide_every_weight_of_mistral_small(rows):
    for group in set(model_groups(MISTRAL_SMALL).values()):
        for blocks in (1, activation_blocks(group.in_size)):
            tiles = choose_tiles(90, 132, rows, group.out_size, group.in_size, blocks)
            assert tiles is not None
            assert group.out_size % tiles.out == 0
            assert group.in_size // blocks % tiles.contracted == 0
            assert tiles.programs == 132
            # 227 KiB are a program's; 32 are for what it stores, and some for barriers.
            assert tiles.stages * (tiles.rows + tiles.out) * tiles.contracted <= (227 - 33) * 1024


def test_few_tiles_are_narrow_so_that_every_multiprocessor_has_one():
    assert choose_tiles(90, 132, 4096, 5120, 4096, 1).out == 256
    assert choose_tiles(90, 132, 1024, 5120, 4096, 1).out == 128


@pytest.mark.parametrize(
    ("capability", "rows", "out", "contraction"),
    [(80, 4096, 5120, 4096), (100, 4096, 5120, 4096), (90, 64, 5120, 4096), (90, 4096, 192, 576), (90, 4096, 5120, 96)],
)
def test_other_products_are_left_to_the_other_kernel(capability, rows, out, contraction):
    assert choose_tiles(capability, 132, rows, out, contraction, 1) is None


@pytest.mark.cuda_plugin
@pytest.mark.parametrize("blocks", [1, 10])
def test_it_is_compiled_without_a_gpu(blocks, tmp_path):
    description = find("h100")
    device = absent_device(description)
    with jax.default_device(device):
        assert multiprocessors() == 132
    x, row_scales, values, scales = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((1024, 5120), jnp.int8),
            ((1024, blocks), jnp.float32),
            ((6144, 5120), jnp.int8),
            ((6144, 1), jnp.float32),
        )
    )

    def product(*arrays):
        return (kernels.INTEGER_DOT["pallas"].multiply(*arrays, None),)

    unit = Unit("product", product, (x, row_scales, values, scales), (), {})
    options = {"workers": 1, "progress": lambda *_: None, "compiler_options": description.compiler_options}
    compile_units([unit], tmp_path / "store", {}, device, **options)
    (blob,) = [path for path in (tmp_path / "store").iterdir() if path.name.startswith("product")]
    stored = blob.read_bytes()
    assert b"mosaic_gpu_v2" in stored
    assert b"sm_90a" in stored  # machine code, not only a program
    assert str(integer_dot_hopper.__file__).encode() not in stored
