"""Decoder layers and language-model head for up to 64 generated tokens, in CUDA C++ (`cuda/`), for NVIDIA GPUs.

Reading weights is the limit, and what surrounds the products would cost as much time again: every small kernel waits
for the one before, and the memory idles meanwhile. A layer is therefore one call of five to nine kernels that overlap:
each product fetches its first weights while its predecessor still runs (programmatic dependent launch), which kernels
of XLA and of Pallas's Triton backend do not. The mathematics is that of `model.Block` with `quantization.dot`; only the
order of float additions differs.

A layer's last product is handed to the next layer unadded, so that it may be split among blocks at no cost.

There are two kinds of products. *Packed* ones (`cuda/products.cuh`) keep the activations of their part of a contraction
in shared memory; they are for one token, and for GPUs before Hopper. *Streamed* ones (`cuda/streamed.cuh`) need
Hopper's instructions, and are for more tokens. A layer's are all of one kind.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float32

from elastic_jax.batch import TokenBatch
from elastic_jax.config import ModelConfig
from elastic_jax.errors import ConfigError
from elastic_jax.groups import model_groups
from elastic_jax.kernels import cuda_library
from elastic_jax.kernels.pallas_device import compute_capability
from elastic_jax.kv_cache import QuantizedCache
from elastic_jax.model import Block, rotation
from elastic_jax.norm import RMSNorm
from elastic_jax.quantization import QArray

_NAME = "the decode called 'cuda'"
_INSTEAD = "use the one called 'xla' instead"

MOST_TOKENS = 64
"""Generated tokens of a step at most, where products are streamed: beyond, there are no registers for their sums."""

MOST_PACKED = 16
"""Of packed products: beyond, activations no longer fit beside the weights in flight."""

_TARGETS = {"elastic_decode_layer": "ElasticDecodeLayer", "elastic_decode_head": "ElasticDecodeHead"}
_HEADS = {(64, 1), (64, 3), (64, 4), (128, 1), (128, 4)}
"""(head's size, query heads a key-value head) that the attention is built for."""

_CHUNK, _TILE_ROWS = 64, 8
_SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10}
"""Bytes that a block may have, by compute capability (CUDA programming guide, technical specifications). The library
has machine code for 8.0, 8.9 and 9.0, which later ones of the same generation run and others do not."""

_MULTIPROCESSORS = 256
"""No fewer than any supported GPU has; sizes a small buffer."""

_MOST_HIDDEN = 12288
"""What a block normalizes at once (cuda/activations.cuh)."""

_KEYS = 16
"""Keys that a warp of the attention takes at once, from one page (cuda/attention.cuh)."""

_ALIGNMENT = 256


class ProductTiles(NamedTuple):
    """Sizes of one product; the kernels are built for those of `_BUILT` (packed) and `_BUILT_STREAMED`.

    Attributes:
        row_tiles: times 8 outputs that a block computes at once.
        depth: chunks of weights in flight a warp; 1 of streamed products, which fill their shared memory.
        parts: blocks that share one contraction.
    """

    row_tiles: int
    depth: int
    parts: int


_BUILT = (
    ((2, 6), (4, 3), (2, 8), (4, 4), (2, 4), (2, 3)),
    ((2, 12), (4, 8), (2, 8), (2, 7), (4, 4), (2, 6), (4, 3), (2, 4)),
)
"""(row_tiles, depth) that packed products are built for (cuda/packed_layer.cuh), the usually fastest first: for 8
tokens at most (and for bf16), and for more."""

_BUILT_STREAMED = {32: 64, 24: 64, 40: 32, 64: 16}
"""row_tiles that streamed products are built for (cuda/streamed_layer.cuh), and for how many tokens at most; before
SwiGLU, those divisible by 32."""

_SCALED = 128
"""Activations of a token that share a scale in streamed products: of each row, what is multiplied at once."""

_HOPPER, _HOPPER_MULTIPROCESSORS = 90, 132
"""Compute capability, and multiprocessors of H100 SXM and H200: sizes follow from them where none were measured."""

_FEWEST_STREAMED = 2
"""Tokens from which on streamed products are faster: on an H200 a whole step in mode S at a context of 256 takes 6.9 ms
of 2 packed tokens (decode.json at commit c3b4f1b) and 6.4 ms of 8 streamed ones (latency.json), as every block packs
all tokens."""


def library_path() -> Path:
    """The library of kernels, which `cuda/build.sh` builds."""
    return cuda_library.path_of("libelastic_decode.so")


@functools.cache
def register() -> None:
    """Makes the kernels known to XLA; needed before a program with them is compiled or loaded. Needs no GPU.

    Raises:
        ConfigError: the library cannot be loaded on this machine.
    """
    cuda_library.register(library_path(), _TARGETS, _NAME, _INSTEAD)


def check_model(config: ModelConfig) -> None:
    """Refuses models that the kernels are not made for, and CUDA 12.

    Raises:
        ConfigError: it is so.
    """
    cuda_library.refuse_cuda_12(_NAME, _INSTEAD)
    shape = config.head_dim, config.num_heads // config.num_kv_heads
    if shape not in _HEADS or config.num_heads % config.num_kv_heads:
        raise ConfigError(
            f"{_NAME} takes heads of (size, query heads a key-value head) {sorted(_HEADS)}, found {shape}; {_INSTEAD}"
        )
    if config.hidden_size > _MOST_HIDDEN:
        raise ConfigError(
            f"{_NAME} takes hidden sizes of {_MOST_HIDDEN} at most, found {config.hidden_size}; {_INSTEAD}"
        )
    for name, group in model_groups(config).items():
        if group.in_size % (2 * _CHUNK) or group.out_size % (2 * _TILE_ROWS):
            raise ConfigError(
                f"{_NAME} takes weights whose inputs divide by {2 * _CHUNK} and whose outputs divide by "
                f"{2 * _TILE_ROWS}; found [{group.out_size}, {group.in_size}] for {name}; {_INSTEAD}"
            )


def takes(layers: Sequence[Block], tokens: int) -> bool:
    """Whether a step of so many generated tokens runs here; the others are composed of dots and attention.

    It follows from shapes alone, so that `info` can tell.

    Raises:
        ConfigError: the program is not traced for an NVIDIA GPU that has what the kernels need.
    """
    if not 1 <= tokens <= MOST_TOKENS:
        return False
    capability = compute_capability(_NAME, _INSTEAD)
    try:
        for layer in layers:
            _layer_tiles(capability, layer, tokens)
    except ConfigError:
        return False
    return True


def run_layers(
    layers: Sequence[Block], x: BFloat16[Array, "tokens hidden"], kv: tuple[Any, ...], batch: TokenBatch
) -> tuple[BFloat16[Array, "tokens hidden"], tuple[Any, ...]]:
    """All layers over generated tokens.

    Args:
        layers: the model's.
        x: the residual stream after the embedding.
        kv: every layer's cache, bf16 [slots, 2, kv_heads, dim] or `kv_cache.QuantizedCache`.
        batch: the tokens; all of them generated.

    Returns:
        the residual stream after the last layer, and every layer's cache with the tokens in it.

    Raises:
        ConfigError: the program is not traced for an NVIDIA GPU that has what the kernels need.
    """
    register()
    capability = compute_capability(_NAME, _INSTEAD)
    if batch.page_size % _KEYS:
        raise ConfigError(f"{_NAME} takes pages of a multiple of {_KEYS} tokens, found {batch.page_size}; {_INSTEAD}")
    tokens, hidden = x.shape
    config = layers[0].attention.config
    cosine, sine = rotation(batch.position, config.head_dim, config.rope_theta)
    added = jnp.zeros((0, tokens, hidden), jnp.float32)
    written = []
    for i, (layer, cache) in enumerate(zip(layers, kv, strict=True)):
        tiles = _layer_tiles(capability, layer, tokens)
        splits = _splits(tokens, config.num_kv_heads)
        numbers, scales = _cache_leaves(cache)
        with jax.named_scope(f"layer_{i}"):
            x, added, numbers, scales, _ = jax.ffi.ffi_call(
                "elastic_decode_layer",
                (
                    jax.ShapeDtypeStruct(x.shape, x.dtype),
                    jax.ShapeDtypeStruct((tiles[-1].parts, tokens, hidden), jnp.float32),
                    jax.ShapeDtypeStruct(numbers.shape, numbers.dtype),
                    jax.ShapeDtypeStruct(scales.shape, scales.dtype),
                    jax.ShapeDtypeStruct((scratch_bytes(config, tokens, splits, tiles),), jnp.uint8),
                ),
                input_output_aliases={10: 2, 11: 3} if scales.size else {10: 2},
            )(
                x,
                added,
                layer.attention_norm.weight.get_value(),
                layer.mlp_norm.weight.get_value(),
                cosine,
                sine,
                batch.slot,
                batch.row,
                batch.block_table,
                batch.context_length,
                numbers,
                scales,
                *(leaf for weight in _weights(layer) for leaf in _leaves(weight)),
                eps=np.float32(layer.mlp_norm.eps),
                page_size=np.int32(batch.page_size),
                splits=np.int32(splits),
                tiles=np.array(tiles, np.int32).ravel(),
            )
        quantized = isinstance(cache, QuantizedCache)
        written.append(dataclasses.replace(cache, values=numbers, scales=scales) if quantized else numbers)
    # As the norms inside do: the product becomes bf16, then the sum does.
    return x + jnp.sum(added, axis=0).astype(x.dtype), tuple(written)


def run_head(norm: RMSNorm, weight: Any, x: BFloat16[Array, "rows hidden"]) -> Float32[Array, "rows vocab"]:
    """Logits of some rows of the residual stream.

    Raises:
        ConfigError: the program is not traced for an NVIDIA GPU that has what the kernels need.
    """
    register()
    capability = compute_capability(_NAME, _INSTEAD)
    rows, hidden = x.shape
    tiles = _head_tiles(capability, weight, rows)
    streamed = tiles.row_tiles in _BUILT_STREAMED
    padded, blocks = _padded(rows, streamed), hidden // _SCALED
    sizes = [2 * rows * hidden, 2 * padded * hidden]
    sizes += [4 * padded * blocks, 4 * rows * blocks] if streamed else [4 * rows]
    scratch = sum(map(_aligned, sizes))
    logits, _ = jax.ffi.ffi_call(
        "elastic_decode_head",
        (
            jax.ShapeDtypeStruct((rows, weight.shape[0]), jnp.float32),
            jax.ShapeDtypeStruct((scratch,), jnp.uint8),
        ),
    )(x, norm.weight.get_value(), *_leaves(weight), eps=np.float32(norm.eps), tiles=np.array(tiles, np.int32))
    return logits


def takes_head(weight: Any, rows: int) -> bool:
    """Whether `run_head` takes so many rows.

    Raises:
        ConfigError: the program is not traced for an NVIDIA GPU that has what the kernels need.
    """
    if not 1 <= rows <= MOST_TOKENS:
        return False
    capability = compute_capability(_NAME, _INSTEAD)
    try:
        _head_tiles(capability, weight, rows)
    except ConfigError:
        return False
    return True


def _weights(layer: Block) -> tuple[Any, Any, Any, Any]:
    linears = layer.attention.qkv, layer.attention.o, layer.mlp.gate_up, layer.mlp.down
    qkv, o, gate_up, down = (linear.weight.get_value() for linear in linears)
    return qkv, o, gate_up, down


def _leaves(weight: Any) -> tuple[Array, Array]:
    if isinstance(weight, QArray):
        return weight.values, weight.scales
    return weight, jnp.zeros((0,), jnp.float32)


def _cache_leaves(cache: Any) -> tuple[Array, Array]:
    """Numbers, and their scales; none of a cache in bf16."""
    if isinstance(cache, QuantizedCache):
        return cache.values, cache.scales
    return cache, jnp.zeros((0,), jnp.float32)


def _splits(tokens: int, kv_heads: int) -> int:
    """Pieces of a context at most, a power of two: enough blocks for a large device, in clusters that it can hold."""
    return 1 << (max(1, min(16, 256 // (tokens * kv_heads))).bit_length() - 1)


def streams(capability: int, tokens: int) -> bool:
    """Whether so many tokens' products are streamed, where their shapes allow it."""
    return capability == _HOPPER and tokens >= _FEWEST_STREAMED


def _layer_tiles(capability: int, layer: Block, tokens: int) -> tuple[ProductTiles, ...]:
    products = [
        (weight, {"paired": paired, "whole": paired})
        for weight, paired in zip(_weights(layer), (False, False, True, False), strict=True)
    ]
    config = layer.attention.config
    streamed = (
        streams(capability, tokens)
        # A block of the attention rounds what it makes without knowing other blocks' (cuda/attention.cuh).
        and config.num_heads // config.num_kv_heads * config.head_dim % _SCALED == 0
        and all(list(fitting_streamed_tiles(weight, tokens, **kind)) for weight, kind in products)
    )
    return tuple(choose_tiles(capability, weight, tokens, streamed=streamed, **kind) for weight, kind in products)


def _head_tiles(capability: int, weight: Any, rows: int) -> ProductTiles:
    streamed = streams(capability, rows) and bool(list(fitting_streamed_tiles(weight, rows, paired=False, whole=True)))
    return choose_tiles(capability, weight, rows, streamed=streamed, paired=False, whole=True)


def choose_tiles(
    capability: int, weight: Any, tokens: int, *, streamed: bool, paired: bool, whole: bool
) -> ProductTiles:
    """Sizes of a product: measured ones (`decode_tiles.json`) where there are some.

    Args:
        capability: the GPU's compute capability, ten times its number.
        weight: `QArray` or bf16 [out, in].
        tokens: generated tokens.
        streamed: whether the product is a streamed one.
        paired: whether SwiGLU follows.
        whole: whether the contraction must not be split.

    Raises:
        ConfigError: nothing fits into the GPU's shared memory.
    """
    precision = "int8" if isinstance(weight, QArray) else "bf16"
    out, contraction = weight.shape
    if streamed:
        fitting = list(fitting_streamed_tiles(weight, tokens, paired=paired, whole=whole))
    else:
        fitting = list(fitting_tiles(capability, weight, tokens, paired=paired, whole=whole))
    if not fitting:
        raise ConfigError(f"{_NAME}: no tiles of {weight.shape} fit {tokens} tokens; {_INSTEAD}")
    measured = measured_tiles().get((capability, precision, out, contraction), {})
    # Those for as many tokens or a few more, then those for fewer.
    nearest = sorted(measured, key=lambda bound: (bound < tokens, abs(bound - tokens)))
    return next((measured[bound] for bound in nearest if measured[bound] in fitting), fitting[0])


def fitting_streamed_tiles(weight: Any, tokens: int, *, paired: bool, whole: bool) -> Iterator[ProductTiles]:
    """Every size of a streamed product that divides the weight, that whose busiest block reads least first."""
    out, contraction = weight.shape
    if contraction % _SCALED:
        return
    steps = contraction * (1 if isinstance(weight, QArray) else 2) // _SCALED
    found = []
    for row_tiles, most in _BUILT_STREAMED.items():
        if tokens > most or out % (_TILE_ROWS * row_tiles) or (paired and row_tiles % 32):
            continue
        groups = out // (_TILE_ROWS * row_tiles)
        for parts in range(1, 2 if whole else min(16, steps) + 1):
            turns = -(-groups // max(1, _HOPPER_MULTIPROCESSORS // parts))
            busiest = turns * row_tiles * -(-steps // parts)
            found.append((busiest, parts, row_tiles))
    for _, parts, row_tiles in sorted(found):
        yield ProductTiles(row_tiles, 1, parts)


def fitting_tiles(capability: int, weight: Any, tokens: int, *, paired: bool, whole: bool) -> Iterator[ProductTiles]:
    """Every size of a packed product that fits, the one that usually is fastest first."""
    running = [known for known in _SHARED_MEMORY if known <= capability and known // 10 == capability // 10]
    known = max(running, default=None)
    shared = 0 if known is None or tokens > MOST_PACKED else _SHARED_MEMORY[known]
    out, contraction = weight.shape
    quantized = isinstance(weight, QArray)
    chunks = contraction * (1 if quantized else 2) // _CHUNK
    planes = 2 if quantized else 1
    octets = planes * -(-tokens // 8) * min(tokens, 8)
    many = quantized and tokens > 8
    warps, built = (8 if many else 16), _BUILT[many]
    sizes = sorted(built, key=lambda size: -size[0]) if paired else built
    for parts in (1, 2, 4, 8, 16):
        if chunks % parts or (whole and parts > 1):
            continue
        for row_tiles, depth in sizes:
            ring = warps * depth * row_tiles * _TILE_ROWS * _CHUNK
            sums = (2 if tokens <= 8 else 1) * warps * row_tiles * _TILE_ROWS * tokens * 4
            fits = ring + sums + 8 * MOST_PACKED + chunks // parts * octets * _CHUNK <= shared
            if fits and out % (_TILE_ROWS * row_tiles) == 0:
                yield ProductTiles(row_tiles, depth, parts)


@functools.cache
def measured_tiles() -> dict[tuple[int, str, int, int], dict[int, ProductTiles]]:
    """(compute capability, precision, outputs, contraction) -> most tokens that tiles were chosen for -> tiles."""
    table: dict[tuple[int, str, int, int], dict[int, ProductTiles]] = {}
    for entry in json.loads(resources.files(__package__).joinpath("decode_tiles.json").read_text()):
        key = entry["capability"], entry["precision"], entry["out"], entry["contraction"]
        table.setdefault(key, {})[entry["tokens"]] = ProductTiles(**entry["tiles"])
    return table


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _padded(tokens: int, streamed: bool) -> int:
    """Tokens that activations have room for: those that fill an operand, or whole octets."""
    return max(8, 1 << (tokens - 1).bit_length()) if streamed else -(-tokens // 8) * 8


def scratch_bytes(config: ModelConfig, tokens: int, splits: int, tiles: Sequence[ProductTiles]) -> int:
    """What a layer takes of its scratch memory, in its order (cuda/packed_layer.cuh, cuda/streamed_layer.cuh)."""
    qkv, o, _, _ = tiles
    heads = config.num_heads * config.head_dim
    streamed = qkv.row_tiles in _BUILT_STREAMED
    padded = _padded(tokens, streamed)
    projected = 4 * qkv.parts * tokens * (config.q_size + 2 * config.kv_size)
    pieces = [4 * tokens * splits * heads, 8 * tokens * splits * config.num_heads]  # of attention
    ended = 4 * config.num_kv_heads * tokens  # pieces of attention that are done
    o_out = 4 * o.parts * tokens * config.hidden_size
    sizes = [2 * tokens * config.hidden_size]  # residual stream before the MLP, bf16
    if streamed:
        for most in (max(config.hidden_size, heads), config.intermediate_size):
            sizes += [2 * padded * most, 4 * padded * (most // _SCALED)]  # activations, and their scales
        sizes += [4 * tokens * (config.hidden_size // _SCALED)]  # sums of squares
        sizes += [projected, *pieces, ended, o_out]
    else:
        sizes += [2 * padded * max(config.hidden_size, heads, config.intermediate_size)]  # packed activations
        sizes += [4 * tokens]  # their scales
        sizes += [projected, *pieces]
        sizes += [4 * tokens * heads, 4 * config.num_kv_heads * tokens]  # attention, and its maxima
        sizes += [ended, o_out]
        sizes += [4 * tokens * config.intermediate_size, 4 * _MULTIPROCESSORS * tokens]
    return sum(map(_aligned, sizes))
