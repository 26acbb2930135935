"""Which products the kernels take, and how they are called; on a GPU, what they compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import MISTRAL_SMALL

from aot_cache.compiler import compile_units
from aot_cache.targets import absent_device, find
from aot_cache.unit import Unit
from elastic_jax import kernels
from elastic_jax.groups import model_groups
from elastic_jax.kernels import prompt_dot_cuda
from elastic_jax.kernels.pallas_device import multiprocessors
from elastic_jax.kernels.prompt_dot_cuda import choose_width
from elastic_jax.quantization import activation_blocks


@pytest.mark.parametrize("rows", [512, 1000, 4096])
def test_every_weight_of_mistral_small_is_taken(rows):
    for group in set(model_groups(MISTRAL_SMALL).values()):
        assert choose_width(90, 132, rows, group.out_size, group.in_size, 1) in (128, 256)
        assert choose_width(90, 132, rows, group.out_size, 2 * group.in_size, 1) in (128, 256)
        assert choose_width(90, 132, rows, group.out_size, group.in_size, activation_blocks(group.in_size)) == 128


def test_few_tiles_are_narrow_so_that_every_multiprocessor_has_one():
    assert choose_width(90, 132, 4096, 5120, 4096, 1) == 256
    assert choose_width(90, 132, 1024, 5120, 4096, 1) == 128


def test_widths_divide_the_outputs():
    assert choose_width(90, 132, 4096, 640, 4096, 1) == 128


@pytest.mark.parametrize(
    ("capability", "rows", "out", "row_bytes", "blocks"),
    [
        (80, 4096, 5120, 4096, 1),
        (100, 4096, 5120, 4096, 1),
        (90, 64, 5120, 4096, 1),
        (90, 4096, 192, 576, 1),
        (90, 4096, 5120, 4160, 1),
        (90, 4096, 5120, 640, 10),
    ],
)
def test_other_products_are_left_to_the_other_kernel(capability, rows, out, row_bytes, blocks):
    assert choose_width(capability, 132, rows, out, row_bytes, blocks) is None


def test_the_plugin_for_cuda_12_leaves_all_to_the_other_kernel(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    assert choose_width(90, 132, 4096, 5120, 4096, 1) is None


@pytest.mark.cuda_plugin
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("case", ["plain", "blocks", "added", "added to float32", "gated", "few rows"])
def test_it_is_compiled_without_a_gpu(case, tmp_path):
    rows, blocks = 64 if case == "few rows" else 1024, 10 if case == "blocks" else 1
    description = find("h100")
    device = absent_device(description)
    shapes = [
        jax.ShapeDtypeStruct((rows, 5120), jnp.int8),
        jax.ShapeDtypeStruct((rows, blocks), jnp.float32),
        jax.ShapeDtypeStruct((6144, 5120), jnp.int8),
        jax.ShapeDtypeStruct((6144, 1), jnp.float32),
    ]
    if "added" in case:
        shapes.append(jax.ShapeDtypeStruct((rows, 6144), jnp.float32 if "float32" in case else jnp.bfloat16))
    dot = kernels.DOT["pallas"]

    def product(x, row_scales, values, scales, residual=None):
        if case == "gated":
            return (dot.multiply_gated(x, row_scales, values, scales),)
        return (dot.multiply(x, row_scales, values, scales, residual),)

    with jax.default_device(device):
        assert multiprocessors() == 132
        text = jax.jit(product).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert ("@elastic_prompt_dot" in text) == (case not in ("few rows", "added to float32"))
    assert "mosaic" not in text  # whose programs are assembled when they are loaded
    unit = Unit("product", product, tuple(shapes), (), {})
    options = {"workers": 1, "progress": lambda *_: None, "compiler_options": description.compiler_options}
    compile_units([unit], tmp_path / "store", {}, device, **options)
    assert any(path.name.startswith("product") for path in (tmp_path / "store").iterdir())


@pytest.mark.cuda_plugin
@pytest.mark.parametrize("case", ["plain", "added", "gated", "few rows", "added to float32", "float32"])
def test_products_of_floats_are_lowered_for_it_where_it_takes_them(case):
    dtype = jnp.float32 if case == "float32" else jnp.bfloat16
    rows, dot = 64 if case == "few rows" else 1024, kernels.DOT["pallas"]
    shapes = [jax.ShapeDtypeStruct((rows, 5120), jnp.float32), jax.ShapeDtypeStruct((6144, 5120), dtype)]
    if "added" in case:
        shapes.append(jax.ShapeDtypeStruct((rows, 6144), jnp.float32 if "float32" in case else jnp.bfloat16))

    def product(x, weight, residual=None):
        return dot.multiply_float_gated(x, weight) if case == "gated" else dot.multiply_float(x, weight, residual)

    reference = kernels.DOT["xla"]
    with jax.default_device(absent_device(find("h100"))):
        traced = jax.jit(product).trace(*shapes)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ("@elastic_prompt_dot" in text) == (case in ("plain", "added", "gated"))
    if case == "gated":
        expected = jax.eval_shape(reference.multiply_float_gated, *shapes)
    else:
        expected = jax.eval_shape(reference.multiply_float, *shapes, *([] if "added" in case else [None]))
    assert (traced.out_info.shape, traced.out_info.dtype) == (expected.shape, expected.dtype)


# -- on the device -----------------------------------------------------------------------------------------------------


def drawn(rows, out, contraction, blocks):
    """Operands drawn on the device, whose product is about 1."""
    keys = jax.random.split(jax.random.key(rows + out + contraction), 4)
    x, values = (
        jax.lax.bitcast_convert_type(jax.random.bits(key, (n, contraction), jnp.uint8), jnp.int8)
        for key, n in zip(keys[:2], (rows, out), strict=True)
    )
    row_scales = jax.random.uniform(keys[2], (rows, blocks), minval=0.01, maxval=2) / (74 * 74 * contraction**0.5)
    return x, row_scales, values, jax.random.uniform(keys[3], (out, 1), minval=0.01, maxval=2)


WIDTHS = [(256, 1), (128, 1), (128, 2)]
"""(outputs of a tile, blocks of scales)"""


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("rows", [1, 100, 128, 1000, 4096])
@pytest.mark.parametrize(("out", "contraction"), [(256, 512), (768, 5120), (1024, 1280), (5120, 256)])
@pytest.mark.parametrize(("width", "blocks"), WIDTHS)
def test_equals_the_reference(rows, out, contraction, width, blocks):
    arrays = drawn(rows, out, contraction, blocks)
    found = prompt_dot_cuda.run(*arrays, None, width, gated=False)
    expected = jax.jit(kernels.DOT["xla"].multiply)(*arrays, None)
    assert found.dtype == jnp.float32
    if blocks == 1:
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=2.5e-7)
    else:  # sums of two numbers, of which one may be rounded less
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("rows", [100, 128, 1000, 4096])
@pytest.mark.parametrize(("width", "blocks"), WIDTHS)
def test_what_is_there_is_added_after_the_product_is_rounded(rows, width, blocks):
    arrays = drawn(rows, 768, 1280, blocks)
    residual = jax.random.normal(jax.random.key(0), (rows, 768), jnp.bfloat16)
    product = np.asarray(prompt_dot_cuda.run(*arrays, None, width, gated=False).astype(jnp.bfloat16))
    found = prompt_dot_cuda.run(*arrays, residual, width, gated=False)
    assert (np.asarray(found) == np.asarray(residual) + product).all()


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("rows", [100, 128, 1000, 4096])
@pytest.mark.parametrize(("width", "blocks"), WIDTHS)
def test_gated_is_swiglu_of_the_product(rows, width, blocks):
    arrays = drawn(rows, 1024, 1280, blocks)
    found = prompt_dot_cuda.run(*arrays, None, width, gated=True)
    expected = jax.jit(kernels.DOT["xla"].multiply_gated)(*arrays)
    assert (found.shape, found.dtype) == ((rows, 512), jnp.bfloat16)
    np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(expected, np.float32), rtol=2**-7, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
def test_repeated_calls_agree():
    """More tiles than multiprocessors, and rings that end in the middle of a turn: races would differ."""
    arrays = drawn(4096, 5120, 640, 1)
    calls = [prompt_dot_cuda.run(*arrays, None, width, gated=False) for width in (256, 128) for _ in range(10)]
    assert all(bool(jnp.all(call == calls[0])) for call in calls)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("width", [128, 256])
def test_sizes_that_tiles_do_not_divide_are_refused(width):
    arrays = drawn(128, 192, 256, 1)
    with pytest.raises(Exception, match="elastic prompt dot: sizes"):
        prompt_dot_cuda.run(*arrays, None, width, gated=False).block_until_ready()


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("rows", [1, 100, 128, 1000, 4096])
@pytest.mark.parametrize(("out", "contraction"), [(256, 64), (768, 5120), (5120, 256)])
@pytest.mark.parametrize("width", [256, 128])
def test_products_of_bfloat16_equal_the_reference(rows, out, contraction, width):
    x, weight, residual = drawn_bf16(rows, out, contraction)
    exact = jax.jit(lambda x, w: kernels.DOT["xla"].multiply_float(x.astype(jnp.float32), w.astype(jnp.float32), None))
    expected = np.asarray(exact(x, weight))
    plain = prompt_dot_cuda.run(x, None, weight, None, None, width, gated=False)
    assert plain.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(plain), expected, atol=1e-5 * np.abs(expected).max())
    added = prompt_dot_cuda.run(x, None, weight, None, residual, width, gated=False)
    assert (np.asarray(added) == np.asarray(residual) + np.asarray(plain.astype(jnp.bfloat16))).all()
    gated = prompt_dot_cuda.run(x, None, weight, None, None, width, gated=True)
    half = np.asarray(jax.nn.silu(plain[:, : out // 2]) * plain[:, out // 2 :])
    assert (gated.shape, gated.dtype) == (half.shape, jnp.bfloat16)
    np.testing.assert_allclose(np.asarray(gated, np.float32), half, rtol=2**-7, atol=1e-5)


def drawn_bf16(rows, out, contraction):
    """Operands whose product is about 1, and a residual stream."""
    shapes = (rows, contraction), (out, contraction), (rows, out)
    keys = jax.random.split(jax.random.key(rows + out + contraction), 3)
    x, weight, residual = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    return x.astype(jnp.bfloat16), (weight / contraction**0.5).astype(jnp.bfloat16), residual.astype(jnp.bfloat16)
