"""Sizes, the committed library, what is refused; results, on a GPU and on a CPU (`decode_emulation.cpp`).

`benches/decode.py` compares them at full size.
"""

import ctypes
import dataclasses
import hashlib
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import MISTRAL_SMALL, exclusive

from elastic_jax import kernels
from elastic_jax.batch import TokenBatch
from elastic_jax.errors import ConfigError
from elastic_jax.groups import model_groups
from elastic_jax.kernels import decode_cuda
from elastic_jax.kv_cache import QuantizedCache
from elastic_jax.model import Mistral
from elastic_jax.plan import provisional_plans
from elastic_jax.quantization import QArray
from elastic_jax.weights import abstract_weights

SHARED = {90: 232448, 80: 166912, 89: 101376}
"""Bytes of shared memory a block may have (CUDA programming guide)."""


def weight_of(mode, group):
    config = dataclasses.replace(MISTRAL_SMALL, num_layers=1)
    return abstract_weights(config, provisional_plans(config)[mode], "bfloat16")[group]


def needed(weight, tokens, tiles):
    """Shared memory by the layout in products.cuh: ring, sums, scales, packed activations."""
    warps = 8 if isinstance(weight, QArray) and tokens > 8 else 16
    ring = warps * tiles.depth * tiles.row_tiles * 8 * 64
    sums = (2 if tokens <= 8 else 1) * warps * tiles.row_tiles * 8 * tokens * 4
    octet = min(tokens, 8)
    padded = octet * -(-tokens // octet) if tokens > 8 else octet
    return ring + sums + 128 + 2 * padded * weight.shape[1] // tiles.parts


GROUPS = "layers.0.qkv", "layers.0.o", "layers.0.gate_up", "layers.0.down"


@pytest.mark.parametrize("mode", ["S", "XL"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 9, 16])
def test_packed_tiles_fit_and_divide_every_weight_of_mistral_small(mode, tokens):
    for name in GROUPS:
        weight = weight_of(mode, name)
        paired = name.endswith("gate_up")
        tiles = decode_cuda.choose_tiles(90, weight, tokens, streamed=False, paired=paired, whole=paired)
        assert needed(weight, tokens, tiles) <= SHARED[90]
        assert weight.shape[0] % (8 * tiles.row_tiles) == 0
        assert weight.shape[1] % (64 * tiles.parts) == 0
        assert not paired or (tiles.row_tiles % 2 == 0 and tiles.parts == 1)


@pytest.mark.parametrize("mode", ["S", "XL"])
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("tokens", [2, 3, 16, 24, 32, 33, 64])
def test_streamed_tiles_divide_every_weight_of_mistral_small(mode, name, tokens):
    weight = weight_of(mode, name)
    paired = name.endswith("gate_up")
    fitting = list(decode_cuda.fitting_streamed_tiles(weight, tokens, paired=paired, whole=paired))
    assert decode_cuda.choose_tiles(90, weight, tokens, streamed=True, paired=paired, whole=paired) in fitting
    for tiles in fitting:
        assert weight.shape[0] % (8 * tiles.row_tiles) == 0
        assert not paired or (tiles.row_tiles % 32 == 0 and tiles.parts == 1)
        # int32 sums of both planes, and totals, of all tokens: fewer than the registers of a thread.
        sums = -(-tiles.row_tiles // 16) * max(8, 1 << (tokens - 1).bit_length())
        assert sums * (3 if mode == "S" else 1) // 2 <= 200


def test_streamed_tiles_keep_nearly_all_multiprocessors_busy():
    for name in GROUPS:
        weight = weight_of("S", name)
        paired = name.endswith("gate_up")
        best = next(decode_cuda.fitting_streamed_tiles(weight, 16, paired=paired, whole=paired))
        groups, steps = weight.shape[0] // (8 * best.row_tiles), weight.shape[1] // 128
        turns = -(-groups // (132 // best.parts))
        busiest = turns * best.row_tiles * -(-steps // best.parts)
        assert busiest * 132 <= 1.1 * groups * best.row_tiles * steps


def test_products_are_streamed_on_hopper_for_more_than_one_token():
    assert [tokens for tokens in range(1, 65) if decode_cuda.streams(90, tokens)] == list(range(2, 65))
    assert not any(decode_cuda.streams(capability, 8) for capability in (80, 86, 89, 100, 120))


@pytest.mark.parametrize("capability", [80, 89])
def test_smaller_gpus_take_fewer_tokens(capability):
    weight = weight_of("S", "layers.0.gate_up")
    fitting = [
        n for n in range(1, 17) if list(decode_cuda.fitting_tiles(capability, weight, n, paired=True, whole=True))
    ]
    assert fitting == list(range(1, len(fitting) + 1))
    assert 1 <= len(fitting) < 16
    assert not list(decode_cuda.fitting_tiles(90, weight, 17, paired=True, whole=True))
    for tokens in fitting:
        for tiles in decode_cuda.fitting_tiles(capability, weight, tokens, paired=True, whole=True):
            assert needed(weight, tokens, tiles) <= SHARED[capability]
    with pytest.raises(ConfigError, match="no tiles"):
        decode_cuda.choose_tiles(capability, weight, 16, streamed=False, paired=True, whole=True)


def test_gpus_of_other_generations_are_left_to_the_composed_step():
    for capability in (70, 75, 100, 120):
        weight = weight_of("S", "layers.0.o")
        assert not list(decode_cuda.fitting_tiles(capability, weight, 1, paired=False, whole=False))


def test_cuda_12_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    with pytest.raises(ConfigError, match="CUDA 12"):
        decode_cuda.check_model(MISTRAL_SMALL)


def test_measured_tiles_are_for_weights_of_mistral_small():
    shapes = {(group.out_size, group.in_size) for group in model_groups(MISTRAL_SMALL).values()}
    table = decode_cuda.measured_tiles()
    assert table
    for _, precision, *shape in table:
        assert precision in ("int8", "bf16")
        assert tuple(shape) in shapes


def test_scratch_memory_follows_the_packed_kernels_order():
    tiles = (decode_cuda.ProductTiles(2, 6, 1),) * 4
    sizes = [2 * 5120, 16 * 32768, 4, 4 * 6144, 4 * 16 * 4096, 8 * 16 * 32, 4 * 4096, 32, 32, 4 * 5120, 4 * 32768, 1024]
    assert decode_cuda.scratch_bytes(MISTRAL_SMALL, 1, 16, tiles) == sum(map(aligned, sizes))


def test_scratch_memory_follows_the_streamed_kernels_order():
    tiles = (decode_cuda.ProductTiles(24, 1, 4), *(decode_cuda.ProductTiles(32, 1, 6),) * 3)
    sizes = [2 * 9 * 5120, 2 * 16 * 5120, 4 * 16 * 40, 2 * 16 * 32768, 4 * 16 * 256, 4 * 9 * 40]
    sizes += [4 * 4 * 9 * 6144, 4 * 9 * 2 * 4096, 8 * 9 * 2 * 32, 4 * 8 * 9, 4 * 6 * 9 * 5120]
    assert decode_cuda.scratch_bytes(MISTRAL_SMALL, 9, 2, tiles) == sum(map(aligned, sizes))
    sizes = [2 * 33 * 5120, 2 * 64 * 5120, 4 * 64 * 40, 2 * 64 * 32768, 4 * 64 * 256, 4 * 33 * 40]
    sizes += [4 * 4 * 33 * 6144, 4 * 33 * 4096, 8 * 33 * 32, 4 * 8 * 33, 4 * 6 * 33 * 5120]
    assert decode_cuda.scratch_bytes(MISTRAL_SMALL, 33, 1, tiles) == sum(map(aligned, sizes))


def aligned(size):
    return -(-size // 256) * 256


def test_the_committed_library_is_built_from_the_committed_sources():
    folder = decode_cuda.library_path().parent
    digest = hashlib.sha256()
    layers = "layer.cuh", "packed_layer.cuh", "streamed_layer.cuh", "launch.cuh"
    parts = "activations.cuh", "attention.cuh", "products.cuh", "streamed.cuh", "packing.cuh"
    parts += "instructions.cuh", "hopper.cuh"
    for name in ("decode.cu", *layers, *parts):
        digest.update((folder / name).read_bytes())
    stored = (ctypes.c_char * 64).in_dll(ctypes.CDLL(str(decode_cuda.library_path())), "ElasticDecodeSources")
    assert stored.value.decode() == digest.hexdigest(), "run elastic_jax/kernels/cuda/build.sh (or make kernels)"


def test_a_library_that_cannot_be_loaded_is_named(monkeypatch, tmp_path):
    broken = tmp_path / "libelastic_decode.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(decode_cuda, "library_path", lambda: broken)
    decode_cuda.register.cache_clear()
    try:
        with pytest.raises(ConfigError, match=str(broken)):
            decode_cuda.register()
    finally:
        decode_cuda.register.cache_clear()


@pytest.mark.parametrize("change", [{"head_dim": 96}, {"num_heads": 24}, {"intermediate_size": 1000}])
def test_models_that_the_kernels_are_not_made_for(change):
    config = dataclasses.replace(MISTRAL_SMALL, **change)
    with pytest.raises(ConfigError, match="the decode called 'cuda'"):
        decode_cuda.check_model(config)
    assert kernels.default_names(config, "gpu", "bfloat16")[2] == "xla"


def test_other_devices_are_refused():
    weight = weight_of("S", "lm_head")
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU"):
        jax.eval_shape(lambda: decode_cuda.takes_head(weight, 1) and jnp.zeros(1))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["S", "XL", "mixed"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 11, 16, 20, 64])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 2, 128), (6, 2, 64)])
@pytest.mark.parametrize("precision", ["full", "int8"])
def test_layers_and_head_equal_the_composed_ones(mode, tokens, heads, kv_heads, dim, precision):
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_layers": 2, "vocab_size": 4096}
    compare_with_composed(mode, tokens, heads, kv_heads, dim, precision, sizes, pages=20, more=1.2)


@pytest.fixture(scope="module")
def emulations(shared_folder, tmp_path_factory):
    """decode.cu compiled for the CPU (decode_emulation.cpp), once for each kind of GPU that it is to be."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed, which compiles the emulation")
    here, built, folder = Path(__file__).parent, shared_folder / "emulation.so", tmp_path_factory.mktemp("emulation")
    folders = [f"-I{here / 'cuda_on_cpu'}", f"-I{decode_cuda.library_path().parent}", "-isystem", jax.ffi.include_dir()]
    # What a block shares is thread_local there, and each copy of the library has what is static for itself.
    command = [
        "g++",
        "-O1",
        "-std=c++20",
        "-w",
        "-fno-extern-tls-init",
        "-fno-gnu-unique",
        "-shared",
        "-fPIC",
        *folders,
    ]
    with exclusive(shared_folder / "emulation.lock"):
        if not built.exists():
            subprocess.run([*command, here / "decode_emulation.cpp", "-o", built], check=True)
    loaded = {}
    for capability in (80, 90):
        library = shutil.copy(built, folder / f"{capability}.so")
        loaded[capability] = ctypes.CDLL(str(library))
        loaded[capability].set_generation(capability // 10)
        for target, symbol in {"elastic_decode_layer": "EmulatedLayer", "elastic_decode_head": "EmulatedHead"}.items():
            capsule = jax.ffi.pycapsule(getattr(loaded[capability], symbol))
            jax.ffi.register_ffi_target(f"{target}_{capability}", capsule, platform="cpu")
    return loaded


@pytest.fixture
def emulation(emulations, monkeypatch):
    """`emulation(capability, descending)`: from then on programs for the CPU call it as if it were such a GPU."""
    call, called = jax.ffi.ffi_call, set()

    def become(capability, descending):
        def on_cpu(name, *given, **more):
            called.add(name)
            return call(f"{name}_{capability}", *given, **more)

        emulations[capability].set_descending(descending)
        monkeypatch.setattr(decode_cuda, "compute_capability", lambda *_: capability)
        monkeypatch.setattr(jax.ffi, "ffi_call", on_cpu)

    yield become
    assert called == {"elastic_decode_layer", "elastic_decode_head"}, "the step was composed"


SMALL = {"hidden_size": 512, "intermediate_size": 512, "num_layers": 2, "vocab_size": 256}


@pytest.mark.parametrize(
    ("capability", "mode", "tokens", "heads", "kv_heads", "dim", "precision", "descending"),
    [
        (80, "S", 1, 4, 1, 64, "full", False),
        (80, "XL", 2, 6, 2, 64, "int8", True),
        (80, "mixed", 11, 2, 2, 128, "int8", False),
        (80, "S", 16, 4, 1, 64, "full", True),
        (90, "S", 2, 4, 1, 64, "full", False),
        (90, "XL", 9, 4, 1, 128, "int8", True),
        (90, "mixed", 20, 4, 1, 64, "int8", False),
        (90, "S", 40, 4, 1, 64, "full", True),
    ],
)
def test_layers_and_head_equal_the_composed_ones_on_a_cpu(
    emulation, capability, mode, tokens, heads, kv_heads, dim, precision, descending
):
    emulation(capability, descending)
    # XLA keeps more than bf16 between the composed ones' operations on a CPU, so they come nearer.
    compare_with_composed(mode, tokens, heads, kv_heads, dim, precision, SMALL, pages=12, more=1.5)


def compare_with_composed(mode, tokens, heads, kv_heads, dim, precision, sizes, pages, more):
    """Layers and head as kernels, at most so many times as far from float32 as composed of dots and attention."""
    config = dataclasses.replace(MISTRAL_SMALL, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, **sizes)
    weights = random_weights(config, mode)
    rng = np.random.default_rng(tokens)
    page, row = 16, np.arange(tokens, dtype=np.int32)
    context = rng.integers(1, page * pages, tokens).astype(np.int32)
    table = rng.permutation(tokens * pages).reshape(tokens, pages).astype(np.int32)
    slot = table[row, (context - 1) // page] * page + (context - 1) % page
    used = tokens - 2 if tokens in (11, 20) else tokens  # the others are padding
    row[used:], slot[used:] = tokens, len(table) * pages * page
    batch = TokenBatch(
        row=jnp.asarray(row),
        position=jnp.asarray(context - 1),
        slot=jnp.asarray(slot),
        block_table=jnp.asarray(table),
        context_length=jnp.asarray(context),
        generated=tokens,
        page_size=page,
    )
    shape = tokens * pages * page, 2, kv_heads, dim
    kv = tuple(random_cache(rng, shape, precision) for _ in range(config.num_layers))
    token = jnp.asarray(rng.integers(0, config.vocab_size, tokens), jnp.int32)

    def run(decode, dtype):
        model = Mistral(
            config,
            jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.dtype == jnp.bfloat16 else leaf, weights),
            attention=kernels.attention("xla"),
            dot=kernels.dot("xla"),
            decode=kernels.decode(decode),
            dtype=jnp.dtype(dtype),
        )

        def step(token, kv, batch):
            x, kv = model(token, kv, batch)
            return x[:used], model.logits(x)[:used], kv

        cache = tuple(
            dataclasses.replace(each, compute=dtype) if isinstance(each, QuantizedCache) else each.astype(dtype)
            for each in kv
        )
        return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(jax.jit(step)(token, cache, batch))]

    # bfloat16 rounds in both, at other places: what counts is the distance from float32.
    found, composed, exact = run("cuda", "bfloat16"), run("xla", "bfloat16"), run("xla", "float32")
    for mine, others, reference in zip(found, composed, exact, strict=True):
        distance, usual = np.linalg.norm(mine - reference), np.linalg.norm(others - reference)
        assert distance <= more * usual + 1e-4 * np.linalg.norm(reference)
        assert usual <= 0.05 * np.linalg.norm(reference)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 16, 64])
@pytest.mark.parametrize(
    ("group", "output"), [("qkv", 5), ("qkv", 8 * 128 + 5), ("qkv", -5), ("o", 5), ("gate_up", 5), ("down", 5)]
)
def test_what_is_no_number_reaches_the_logits(tokens, group, output):
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_layers": 2, "vocab_size": 4096}
    break_a_scale(tokens, group, output, sizes | {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128})


@pytest.mark.parametrize(("capability", "tokens"), [(80, 1), (90, 3)])
@pytest.mark.parametrize(
    ("group", "output"), [("qkv", 5), ("qkv", 4 * 64 + 5), ("qkv", -5), ("o", 5), ("gate_up", 5), ("down", 5)]
)
def test_what_is_no_number_reaches_the_logits_on_a_cpu(emulation, capability, tokens, group, output):
    emulation(capability, False)
    break_a_scale(tokens, group, output, SMALL | {"num_heads": 4, "num_kv_heads": 1, "head_dim": 64})


def break_a_scale(tokens, group, output, sizes):
    """A broken scale of one output must not be hidden by a maximum of magnitudes: the step reports it by its logits."""
    config = dataclasses.replace(MISTRAL_SMALL, **sizes)
    weights = random_weights(config, "S")
    broken = weights[f"layers.0.{group}"]
    scales = broken.scales.at[output].set(jnp.nan)  # of qkv: of a query, a key, a value
    weights[f"layers.0.{group}"] = dataclasses.replace(broken, scales=scales)
    page, row = 16, np.arange(tokens, dtype=np.int32)
    batch = TokenBatch(
        row=jnp.asarray(row),
        position=jnp.full(tokens, 4, jnp.int32),
        slot=jnp.asarray(row * page + 4),
        block_table=jnp.asarray(row[:, None]),
        context_length=jnp.full(tokens, 5, jnp.int32),
        generated=tokens,
        page_size=page,
    )
    rng = np.random.default_rng(0)
    kv = tuple(
        random_cache(rng, (tokens * page, 2, config.num_kv_heads, config.head_dim), "full")
        for _ in range(config.num_layers)
    )
    model = Mistral(
        config,
        weights,
        attention=kernels.attention("xla"),
        dot=kernels.dot("xla"),
        decode=kernels.decode("cuda"),
        dtype=jnp.dtype("bfloat16"),
    )

    def step(token, kv, batch):
        return model.logits(model(token, kv, batch)[0])

    logits = jax.jit(step)(jnp.arange(3, 3 + tokens, dtype=jnp.int32), kv, batch)
    assert not np.isfinite(np.asarray(logits)).all(axis=1).any()


def random_cache(rng, shape, precision):
    if precision == "full":
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    scales = rng.uniform(0.5, 2, shape[:-1]).astype(np.float32) / 50
    return QuantizedCache(jnp.asarray(rng.integers(-127, 128, shape), jnp.int8), jnp.asarray(scales), "bfloat16")


def random_weights(config, mode):
    plans = provisional_plans(config)
    if mode == "mixed":  # each product's input is made by one of the other precision
        choices = {
            group: plans["XL" if group.endswith(("qkv", "down")) else "S"].choices[group]
            for group in plans["S"].choices
        }
        plans[mode] = dataclasses.replace(plans["S"], choices=choices)
    leaves, tree = jax.tree.flatten(abstract_weights(config, plans[mode], "bfloat16"))
    rng = np.random.default_rng(0)

    def draw(leaf):
        if leaf.dtype == jnp.int8:
            return jnp.asarray(rng.integers(-127, 128, leaf.shape), jnp.int8)
        if leaf.shape[-1] == 1:
            return jnp.asarray(rng.uniform(1, 2, leaf.shape) / 73 / 25, jnp.float32)
        spread = 1.0 if len(leaf.shape) == 1 else 0.04
        return jnp.asarray(rng.standard_normal(leaf.shape) * spread, leaf.dtype)

    return jax.tree.unflatten(tree, [draw(leaf) for leaf in leaves])
