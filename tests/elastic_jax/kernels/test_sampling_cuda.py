"""The sampling kernel: its algorithm, compiled by g++ from the same header and run on the CPU, and (`gpu`) itself.

The emulation has 8 threads a block instead of 512.
"""

import ctypes
import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_step_config

from elastic_jax import kernels, sampling
from elastic_jax.errors import ConfigError
from elastic_jax.executables import default_step_config
from elastic_jax.kernels import sampling_cuda
from elastic_jax.sampling import SampledRows, SamplingInputs

ALL = np.uint32(0xFFFFFFFF)
INF = np.float32(np.inf)
reference = jax.jit(sampling.choose)

BY_ROW = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
          "choice", "bias_token", "bias", "allowed")  # fmt: skip


class Arguments(ctypes.Structure):
    """`ChoiceArguments` of sampling.cuh, with `SamplingRows` inside."""

    _fields_ = (
        [("logits", ctypes.c_void_p), ("vocab", ctypes.c_int), ("row", ctypes.c_void_p), ("position", ctypes.c_void_p)]
        + [(name, ctypes.c_void_p) for name in (*BY_ROW, "key", "counts", "prompt_mask")]
        + [(name, ctypes.c_int) for name in ("rows", "words", "bias_entries")]
        + [(name, ctypes.c_void_p) for name in ("token", "log_probability", "finite", "scaled", "scratch")]
    )


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed, which compiles the emulation")
    library = tmp_path_factory.mktemp("emulation") / "sampling.so"
    source = Path(__file__).parent / "sampling_emulation.cpp"
    folder = sampling_cuda.library_path().parent
    command = ["g++", "-O2", "-std=c++20", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-DELASTIC_THREADS=8"]
    subprocess.run([*command, f"-I{folder}", "-shared", "-fPIC", source, "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.choose_rows.restype = ctypes.c_bool
    return loaded


class Case:
    """Logits with everything that decides what is chosen of them."""

    def __init__(self, logits: np.ndarray, *, entries: int = 3, seen: float = 0.3, seed: int = 0, **changes: Any):
        outputs, vocab = logits.shape
        rng = np.random.default_rng(seed)
        words = -(-vocab // 32)
        values: dict[str, np.ndarray] = {
            "temperature": np.ones(outputs, np.float32),
            "top_k": np.zeros(outputs, np.int32),
            "top_p": np.ones(outputs, np.float32),
            "min_p": np.zeros(outputs, np.float32),
            "repetition_penalty": np.ones(outputs, np.float32),
            "presence_penalty": np.zeros(outputs, np.float32),
            "frequency_penalty": np.zeros(outputs, np.float32),
            "choice": np.zeros(outputs, np.int32),
            "bias_token": np.full((outputs, entries), vocab, np.int32),
            "bias": np.zeros((outputs, entries), np.float32),
            "allowed": np.full((outputs, words), ALL, np.uint32),
        }
        for name, value in changes.items():
            values[name] = np.ascontiguousarray(np.broadcast_to(value, values[name].shape).astype(values[name].dtype))
        self.logits = np.ascontiguousarray(logits, np.float32)
        self.sampling: SamplingInputs | None = SamplingInputs(**values)
        self.row = np.arange(outputs, dtype=np.int32)
        self.position = rng.integers(0, 10**5, outputs).astype(np.int32)
        counts = rng.integers(1, 4, (outputs, vocab)) * (rng.random((outputs, vocab)) < seen)
        bits = rng.integers(0, 2**32, (outputs, words), dtype=np.uint64).astype(np.uint32)
        key = rng.integers(0, 2**32, (outputs, 2), dtype=np.uint64).astype(np.uint32)
        self.rows = SampledRows(key, counts.astype(np.int32), bits)

    def expected(self) -> tuple[np.ndarray, ...]:
        found = reference(self.logits, self.sampling, self.row, self.position, self.rows)
        return tuple(np.asarray(a) for a in found)

    def emulated(self, library: Any, blocks: int, *, descending: bool = False) -> tuple[np.ndarray, ...]:
        outputs, vocab = self.logits.shape
        token, log_probability = np.full(outputs, -1, np.int32), np.full(outputs, 99, np.float32)
        finite, scaled = np.ones(outputs, np.bool_), np.empty_like(self.logits)
        a = Arguments()
        keep = {"logits": self.logits, "row": self.row, "position": self.position}
        keep |= {"token": token, "log_probability": log_probability, "finite": finite, "scaled": scaled}
        a.vocab = vocab
        if self.sampling is not None:
            keep |= {name: getattr(self.sampling, name) for name in BY_ROW}
            keep |= {name: getattr(self.rows, name) for name in ("key", "counts", "prompt_mask")}
            a.rows, a.words = self.rows.counts.shape[0], self.rows.prompt_mask.shape[1]
            a.bias_entries = self.sampling.bias.shape[1]
        for name, array in keep.items():
            assert array.flags.c_contiguous
            setattr(a, name, array.ctypes.data)
        assert library.choose_rows(ctypes.byref(a), outputs, blocks, descending), "threads wait for each other"
        return token, log_probability, finite

    def on_gpu(self) -> tuple[np.ndarray, ...]:
        call = jax.jit(kernels.sampling("cuda"))
        found = call(self.logits, self.sampling, self.row, self.position, self.rows)
        return tuple(np.asarray(a) for a in found)


def drawn_logits(seed: int, outputs: int, vocab: int, *, ties: bool) -> np.ndarray:
    logits = 3 * np.random.default_rng(seed).standard_normal((outputs, vocab))
    return (np.round(4 * logits) / 4 if ties else logits).astype(np.float32)


def agree(found: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...], *, most: int = 0) -> None:
    """At most so many tokens differ, which lie at the border of two tokens' intervals; log-probabilities are theirs."""
    differ = found[0] != expected[0]
    assert differ.sum() <= most
    np.testing.assert_allclose(found[1][~differ], expected[1][~differ], rtol=1e-5, atol=2e-6)
    assert (found[2] == expected[2]).all()


EVERYTHING = {
    "temperature": [0.7, 1.0, 0.0, 1.3, 0.2, 1.0],
    "top_k": [0, 5, 3, 40, 1, 0],
    "top_p": [0.9, 1.0, 0.5, 0.7, 1.0, 1e-6],
    "min_p": [0.0, 0.1, 0.0, 0.01, 1.0, 0.0],
    "repetition_penalty": [1.0, 1.3, 0.8, 1.0, 2.0, 1.0],
    "presence_penalty": [0.0, 0.5, -0.5, 0.0, 0.0, 2.0],
    "frequency_penalty": [0.0, 0.0, 0.3, 0.0, 1.0, -1.0],
    "choice": [0, 1, 2, 3, 4, 5],
}


def everything(seed: int, vocab: int, *, ties: bool) -> Case:
    """Six rows, each with settings of its own."""
    rng = np.random.default_rng(seed + 1)
    bias_token = np.stack([rng.choice(vocab + 1, 3, replace=False) for _ in range(6)])
    allowed = rng.integers(0, 2**32, (6, -(-vocab // 32)), dtype=np.uint64).astype(np.uint32)
    allowed[:3] = ALL
    logits = drawn_logits(seed, 6, vocab, ties=ties)
    bias = 4 * rng.standard_normal((6, 3))
    return Case(logits, seed=seed, bias_token=bias_token, bias=bias, allowed=allowed, **EVERYTHING)


# -- the algorithm, on the CPU -----------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([33, 300, 1000]), st.booleans(), st.sampled_from([1, 2, 3]))
def test_every_parameter_against_the_reference(emulation, seed, vocab, ties, blocks):
    case = everything(seed, vocab, ties=ties)
    agree(case.emulated(emulation, blocks), case.expected())


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0, 1, 2, 5, 299, 300, 5000]),
    st.sampled_from([1.0, 0.99, 0.5, 1e-6]),
    st.sampled_from([0.0, 0.1, 1.0]),
)
def test_filters_against_the_reference(emulation, seed, top_k, top_p, min_p):
    # The same logits in all rows; only the draws differ.
    logits = np.repeat(drawn_logits(seed, 1, 300, ties=True), 8, axis=0)
    case = Case(logits, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    agree(case.emulated(emulation, 2), case.expected())


@pytest.mark.parametrize("setting", [{}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 30, "top_p": 0.6, "min_p": 0.05}])
def test_nothing_depends_on_how_many_blocks_share_a_row(emulation, setting):
    case = Case(drawn_logits(1, 4, 777, ties=False), repetition_penalty=1.2, **setting)
    alone = case.emulated(emulation, 1)
    for blocks in (2, 3, 5):
        assert all((a == b).all() for a, b in zip(case.emulated(emulation, blocks), alone, strict=True))


def test_frequencies_of_draws(emulation):
    rng = np.random.default_rng(0)
    probabilities = np.array([0.5, 0.2, 0.15, 0.1, 0.05])
    logits = np.full((600, 40), -INF, np.float32)
    logits[:, [3, 17, 18, 30, 39]] = np.log(probabilities) + rng.standard_normal((600, 1))
    logits[:, :2] = -60  # possible, and never drawn
    case = Case(logits)
    found = case.emulated(emulation, 2)[0]
    frequency = np.bincount(found, minlength=40)[[3, 17, 18, 30, 39]] / 600
    assert frequency.sum() == 1
    assert np.abs(frequency - probabilities).max() < 0.07
    agree((found, *case.expected()[1:]), case.expected())
    # Of the two that make 70 %, 5 in 7 are the first.
    nucleus = Case(logits, top_p=0.7 - 1e-6).emulated(emulation, 2)[0]
    assert set(nucleus.tolist()) == {3, 17}
    assert abs((nucleus == 3).mean() - 5 / 7) < 0.07


def test_rows_without_temperature_take_the_first_of_the_most_likely(emulation):
    logits = drawn_logits(2, 3, 500, ties=False)
    logits[:, [100, 400]] = 50
    logits[2, [50, 60]] = [-0.0, 0.0]
    logits[2, [100, 400]] = -1
    logits[2, :50] = logits[2, 61:] = -2
    case = Case(np.minimum(logits, [[99], [99], [0]]), temperature=0.0)
    for blocks in (1, 3):
        found = case.emulated(emulation, blocks)
        assert found[0][:2].tolist() == [100, 100]
        agree(found, case.expected())


def test_the_greedy_variant(emulation):
    case = Case(drawn_logits(3, 5, 1000, ties=True))
    case.sampling = None
    for blocks in (1, 4):
        agree(case.emulated(emulation, blocks), case.expected())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("special", [np.nan, -np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers(emulation, special, temperature):
    logits = drawn_logits(4, 2, 300, ties=False)
    logits[0, 77] = special
    logits[1] = special
    case = Case(logits, temperature=temperature, top_k=5, top_p=0.9)
    token, _, finite = case.emulated(emulation, 2)
    assert finite.tolist() == [False, False]
    assert ((token >= 0) & (token < 300)).all()
    if special != -np.inf:
        assert token[0] == 77  # as argmax sees it
    greedy = Case(logits)
    greedy.sampling = None
    assert not greedy.emulated(emulation, 2)[2].any()


def test_masks_that_leave_one_token_or_none(emulation):
    allowed = np.zeros((3, 10), np.uint32)
    allowed[1, 5], allowed[2, [0, 9]] = 1 << 7, [1 << 31, 1]
    case = Case(drawn_logits(5, 3, 310, ties=False), allowed=allowed, top_p=0.9, top_k=4)
    token, log_probability, finite = case.emulated(emulation, 3)
    assert 0 <= token[0] < 310
    assert token[1] == 5 * 32 + 7
    assert token[2] in (31, 9 * 32)
    assert finite.all()
    # The log-probability is the model's own.
    expected = jax.nn.log_softmax(case.logits, axis=1)[np.arange(3), token]
    np.testing.assert_allclose(log_probability, expected, rtol=1e-5)


def test_huge_and_tiny_logits(emulation):
    logits = np.full((2, 300), -3e38, np.float32)
    logits[0, 17], logits[1, 250] = 3e38, -1e30
    for setting in ({}, {"top_p": 0.5}, {"top_k": 1}, {"temperature": 0.0}):
        assert Case(logits, **setting).emulated(emulation, 2)[0].tolist() == [17, 250]


def test_top_k_of_one_keeps_ties(emulation):
    logits = np.zeros((200, 70), np.float32)
    logits[:, [5, 6, 69]] = 2
    assert set(Case(logits, top_k=1).emulated(emulation, 2)[0].tolist()) == {5, 6, 69}


def test_padding_outputs_read_no_row_beyond_the_last(emulation):
    case = Case(drawn_logits(6, 4, 100, ties=False))
    case.row = np.array([2, 0, 4, 4], np.int32)  # 4 rows: the last two outputs are nobody's
    found, expected = case.emulated(emulation, 1), case.expected()
    assert found[0].tolist() == expected[0].tolist()


def test_uniforms_are_those_of_the_reference(emulation):
    rng = np.random.default_rng(7)
    key = rng.integers(0, 2**32, (50, 2), dtype=np.uint64).astype(np.uint32)
    position, choice = rng.integers(0, 2**17, 50).astype(np.int32), rng.integers(0, 9, 50).astype(np.int32)
    expected = np.asarray(jax.jit(sampling.uniforms)(key, position, choice))
    emulation.uniform_of.restype = ctypes.c_uint32
    found = [
        emulation.uniform_of(k.ctypes.data_as(ctypes.c_void_p), int(p), int(c))
        for k, p, c in zip(key, position, choice, strict=True)
    ]
    assert (np.array(found) / 2.0**23 == expected).all()


@pytest.mark.parametrize("seed", range(4))
def test_nothing_depends_on_the_order_of_the_threads(emulation, seed):
    case = everything(seed, 500, ties=seed % 2 == 0)
    ascending, descending = case.emulated(emulation, 3), case.emulated(emulation, 3, descending=True)
    assert all((a == b).all() for a, b in zip(ascending, descending, strict=True))


# -- the library, and where it is used ---------------------------------------------------------------------------------


def test_scratch_memory_is_what_the_kernels_take(emulation):
    emulation.scratch_bytes.restype = ctypes.c_int64
    assert emulation.scratch_bytes() == sampling_cuda.SCRATCH_BYTES
    library = ctypes.CDLL(str(sampling_cuda.library_path()))
    assert ctypes.c_int64.in_dll(library, "ElasticSamplingScratchBytes").value == sampling_cuda.SCRATCH_BYTES


def test_the_committed_library_is_built_from_the_committed_sources():
    folder = sampling_cuda.library_path().parent
    digest = hashlib.sha256()
    for name in ("sampling.cu", "sampling.cuh"):
        digest.update((folder / name).read_bytes())
    stored = (ctypes.c_char * 64).in_dll(ctypes.CDLL(str(sampling_cuda.library_path())), "ElasticSamplingSources")
    assert stored.value.decode() == digest.hexdigest(), "run elastic_jax/kernels/cuda/build.sh (or make kernels)"


def test_a_library_that_cannot_be_loaded_is_named(monkeypatch, tmp_path):
    broken = tmp_path / "libelastic_sampling.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(sampling_cuda, "library_path", lambda: broken)
    sampling_cuda.register.cache_clear()
    try:
        with pytest.raises(ConfigError, match=str(broken)):
            kernels.prepare_to_load("xla", "xla", "xla", "cuda")
    finally:
        sampling_cuda.register.cache_clear()


def test_other_devices_are_refused():
    case = Case(np.zeros((1, 32), np.float32))
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU"):
        jax.eval_shape(kernels.sampling("cuda"), case.logits, case.sampling, case.row, case.position, case.rows)


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="no sampling implementation is called 'fast'"):
        kernels.sampling("fast")


def test_defaults(monkeypatch):
    assert tiny_step_config().sampling == "xla"
    assert (kernels.default_sampling("cpu"), kernels.default_sampling("gpu")) == ("xla", "cuda")
    from tiny import MISTRAL_SMALL

    step = default_step_config(MISTRAL_SMALL, "gpu", "bfloat16", kv_slots=4096, max_context=None)
    assert step.sampling == "cuda"
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    assert kernels.default_sampling("gpu") == "xla"


# -- on the device -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [1000, 32768, 131072, 131071])
@pytest.mark.parametrize("ties", [False, True])
def test_the_kernel_against_the_reference(vocab, ties):
    for seed in range(4):
        case = everything(seed, vocab, ties=ties)
        # Among 131072 tokens the reference's float32 sums may move a border past a draw.
        agree(case.on_gpu(), case.expected(), most=0 if vocab == 1000 else 1)


@pytest.mark.gpu
@pytest.mark.parametrize("setting", [{}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 200, "top_p": 0.95, "min_p": 0.01}])
def test_a_row_is_drawn_alike_whatever_the_others(setting):
    case = Case(drawn_logits(8, 128, 131072, ties=False), frequency_penalty=0.1, **setting)
    together = case.on_gpu()
    assert (case.on_gpu()[0] == together[0]).all()
    for output in (0, 1, 77, 127):
        case.row = np.array([output], np.int32)
        one = Case(case.logits[output : output + 1])
        one.row, one.position = case.row, case.position[output : output + 1]
        one.sampling, one.rows = case.sampling, case.rows
        found = one.on_gpu()
        assert all((a[0] == b[output]).all() for a, b in zip(found, together, strict=True))
    case.row = np.arange(128, dtype=np.int32)
    agree(together, case.expected(), most=3)


@pytest.mark.gpu
@pytest.mark.parametrize("outputs", [1, 16, 64])
def test_the_kernels_greedy_variant(outputs):
    case = Case(drawn_logits(9, outputs, 131072, ties=True))
    case.sampling = None
    agree(case.on_gpu(), case.expected())


@pytest.mark.gpu
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_the_kernel_with_logits_that_are_no_numbers(special):
    logits = drawn_logits(4, 2, 32768, ties=False)
    logits[0, 777] = special
    logits[1] = special
    token, _, finite = Case(logits, top_k=5, top_p=0.9).on_gpu()
    assert finite.tolist() == [False, False]
    assert ((token >= 0) & (token < 32768)).all()


@pytest.mark.gpu
def test_frequencies_of_the_kernels_draws():
    probabilities = np.array([0.5, 0.2, 0.15, 0.1, 0.05])
    logits = np.full((100, 4096), -30, np.float32)
    places = [3, 17, 1800, 3000, 4095]
    logits[:, places] = np.log(probabilities)
    found = np.concatenate([Case(logits, seed=seed).on_gpu()[0] for seed in range(50)])
    counts = np.bincount(found, minlength=4096)[places]
    assert counts.sum() == 5000
    frequency = counts / 5000
    assert np.abs(frequency - probabilities).max() < 0.03


@pytest.mark.cuda_plugin
def test_sampling_is_one_call():
    from aot_cache.targets import absent_device, find

    case = Case(np.zeros((4, 1024), np.float32))
    operands = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype),
        (case.logits, case.sampling, case.row, case.position, case.rows),
    )
    with jax.default_device(absent_device(find("h100"))):
        lowered = jax.jit(kernels.sampling("cuda")).trace(*operands).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert text.count("stablehlo.custom_call @elastic_sample") == 1
    assert "stablehlo.while" not in text
    assert "stablehlo.case" not in text
    assert jnp.dtype("float32").name in str(lowered.out_info)
