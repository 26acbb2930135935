"""The Pallas kernels against plain XLA and a dense float64 reference: in Pallas's interpreter, and on a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import PAGES, ROWS, Case, D, P, Packing, Shape, make_case, relative_error

from elastic_jax import kernels
from elastic_jax.errors import ConfigError
from elastic_jax.kernels import attention_pallas, attention_xla
from elastic_jax.kernels.attention_pallas_blocks import deal
from elastic_jax.kernels.attention_pallas_generated import GeneratedTiles
from elastic_jax.kernels.attention_pallas_prompt import PromptTiles
from elastic_jax.kv_cache import QuantizedCache

GENERATED = GeneratedTiles(block=16, programs=8, warps=4, stages=1)
PROMPT = PromptTiles(queries=32, block=16, warps=4, stages=1)


reference_attention = jax.jit(attention_xla.attention)


@pytest.fixture(
    params=[
        "interpreter",
        pytest.param(
            "gpu",
            marks=[
                pytest.mark.gpu,
                # JAX's notice that its Triton backend will be replaced.
                pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning"),
            ],
        ),
    ]
)
def interpret(request: pytest.FixtureRequest) -> bool:
    return request.param == "interpreter"


def run(case: Case, interpret: bool, generated: GeneratedTiles = GENERATED, prompt: PromptTiles = PROMPT) -> np.ndarray:
    return np.asarray(attention_pallas.run(case.query, case.kv, case.batch, generated, prompt, interpret=interpret))


PACKINGS = {
    "one generated token of one token of context": Packing(((2, 1), None, None)),
    "generated tokens, partial and full pages": Packing(((1, 33), (4, 16), (0, 15))),
    "generated tokens, full and short context": Packing(((3, PAGES * 16), (0, 1), None)),
    "padding before the last generated token": Packing(((1, 20), None, (0, 47))),
    "one prompt token": Packing(prompt=((3, 0, 1),)),
    "one prompt token at the end of a full context": Packing(prompt=((3, PAGES * 16 - 1, 1),)),
    "one chunk fills the bucket": Packing(prompt=((0, 0, P),)),
    "chunks not in the order of their rows": Packing(prompt=((4, 0, 9), (1, 0, 17), (2, 0, 11))),
    "chunks that continue": Packing(prompt=((2, 31, 13), (0, 16, 20), (1, 5, 1))),
    "mixed": Packing(((4, 50), (1, 17), None), ((0, 3, 19), (3, 0, 14))),
    "nothing but padding": Packing(),
}


@pytest.mark.parametrize("name", PACKINGS)
def test_float32_is_exact(name: str, interpret: bool) -> None:
    case = make_case(PACKINGS[name], Shape())
    out = run(case, interpret)
    np.testing.assert_allclose(out, case.exact, rtol=0, atol=2e-6)
    assert np.all(out[np.asarray(case.batch.row) == ROWS] == 0)
    reference = reference_attention(case.query, jnp.nan_to_num(case.kv), case.batch)
    np.testing.assert_allclose(out, reference, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("d", "p"), [(D, 0), (0, P), (1, 0), (0, 5)])
def test_one_kind_of_token_alone(d: int, p: int, interpret: bool) -> None:
    packing = Packing(((1, 37), (3, 64), (0, 2))[:d], ((2, 7, min(p, 33)),) if p else ())
    case = make_case(packing, Shape(), d, p)
    np.testing.assert_allclose(run(case, interpret), case.exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(heads=2, kv_heads=2, dim=64, dtype="bfloat16"),
        Shape(heads=20, kv_heads=1, dim=128, dtype="bfloat16"),
    ],
    ids=str,
)
def test_bfloat16_is_as_exact_as_rounded_weights_allow(shape: Shape, interpret: bool) -> None:
    case = make_case(PACKINGS["mixed"], shape)
    assert relative_error(run(case, interpret), case.exact) < 4e-3


@pytest.mark.parametrize("name", ["mixed", "chunks that continue", "padding before the last generated token"])
def test_int8_keys_and_values(name: str, interpret: bool) -> None:
    case = make_case(PACKINGS[name], Shape(int8=True))
    out = run(case, interpret)
    np.testing.assert_allclose(out, case.exact, rtol=0, atol=2e-6)
    assert isinstance(case.kv, QuantizedCache)
    # The plain implementation, with what lies in other slots: it reads them, and must not use them.
    np.testing.assert_allclose(reference_attention(case.query, case.kv, case.batch), case.exact, rtol=0, atol=2e-6)
    rounded = make_case(PACKINGS[name], Shape(dim=64, dtype="bfloat16", int8=True))
    assert relative_error(run(rounded, interpret), rounded.exact) < 4e-3


@pytest.mark.parametrize("page_size", [8, 24])
def test_blocks_and_pages_need_not_match(page_size: int, interpret: bool) -> None:
    packing = Packing(((4, 50), (1, 17), None), ((0, 3, 19), (3, 0, 14)))
    case = make_case(packing, Shape(page_size=page_size))
    out = run(case, interpret, dataclasses.replace(GENERATED, block=32), dataclasses.replace(PROMPT, block=32))
    np.testing.assert_allclose(out, case.exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("programs", [1, 64])
def test_any_split_of_contexts_gives_the_same(programs: int, interpret: bool) -> None:
    case = make_case(Packing(((3, 112), (0, 1), (1, 49))), Shape(), p=0)
    out = run(case, interpret, dataclasses.replace(GENERATED, programs=programs))
    np.testing.assert_allclose(out, case.exact, rtol=0, atol=2e-6)


def test_work_is_dealt_in_order() -> None:
    owner, number = deal(jnp.asarray([2, 0, 3], jnp.int32), 7)
    assert owner.tolist() == [0, 0, 2, 2, 2, 3, 3]
    assert number.tolist()[:5] == [0, 1, 0, 1, 2]


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (Shape(dim=24), "heads of .*found 24"),
        (Shape(heads=5, kv_heads=2), "found 5 for 2"),
        (Shape(heads=65, kv_heads=1), "found 65 for 1"),
        (Shape(dtype="float16"), "found float16"),
    ],
    ids=str,
)
def test_what_the_kernels_are_not_made_for_is_refused(shape: Shape, words: str) -> None:
    query = jnp.zeros((1, shape.heads, shape.dim), jnp.dtype(shape.dtype))
    kv = jnp.zeros((16, 2, shape.kv_heads, shape.dim), jnp.dtype(shape.dtype))
    with pytest.raises(ConfigError, match=f"{words}.*'xla'"):
        attention_pallas.check_supported(query, kv)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_without_a_gpu_the_name_is_refused_not_replaced() -> None:
    case = make_case(PACKINGS["mixed"], Shape())
    with pytest.raises(ConfigError, match=r"needs an NVIDIA GPU.*'xla'"):
        kernels.attention("pallas")(case.query, case.kv, case.batch)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("shape", [Shape(), Shape(8, 2, 128, 64, "bfloat16"), Shape(9, 3, 64, 64, "bfloat16")], ids=str)
def test_chosen_sizes_are_right(shape: Shape) -> None:
    case = make_case(PACKINGS["mixed"], shape)
    out = np.asarray(jax.jit(kernels.attention("pallas"))(case.query, case.kv, case.batch))
    assert relative_error(out, case.exact) < (1e-5 if shape.dtype == "float32" else 4e-3)
