"""Named implementations. Asking for one by name fails loudly where it does not exist; nothing falls back."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Array

from elastic_jax.batch import TokenBatch
from elastic_jax.config import ModelConfig
from elastic_jax.errors import ConfigError
from elastic_jax.kernels import attention_xla, dot_xla
from elastic_jax.kv_cache import Cache
from elastic_jax.model import Attention, Decode, Dot
from elastic_jax.norm import RMSNorm
from elastic_jax.quantization import DotKernels
from elastic_jax.quantization import dot as quantized_dot
from elastic_jax.sampling import Choose
from elastic_jax.sampling import choose as choose_xla
from elastic_jax.step import ComputeDtype


def _pallas_attention(query: Array, kv: Cache, batch: TokenBatch) -> Array:
    # Importing Pallas takes half a second, which those who only run executables should not wait for.
    from elastic_jax.kernels import attention_pallas

    return attention_pallas.attention(query, kv, batch)


def _pallas_multiply(x: Array, row_scales: Array, values: Array, scales: Array, residual: Array | None) -> Array:
    from elastic_jax.kernels import integer_dot_pallas

    return integer_dot_pallas.multiply(x, row_scales, values, scales, residual)


def _pallas_multiply_gated(*operands: Array) -> Array:
    from elastic_jax.kernels import integer_dot_pallas

    return integer_dot_pallas.multiply_gated(*operands)


def _pallas_quantize_8bit(x: Array, norm: RMSNorm | None, blocks: int) -> tuple[Array, Array]:
    from elastic_jax.kernels import quantize_pallas

    return quantize_pallas.quantize_8bit(x, norm, blocks)


def _cuda_multiply_float(x: Array, weight: Array, residual: Array | None) -> Array:
    from elastic_jax.kernels import prompt_dot_cuda

    return prompt_dot_cuda.multiply_float(x, weight, residual)


def _cuda_multiply_float_gated(x: Array, weight: Array) -> Array:
    from elastic_jax.kernels import prompt_dot_cuda

    return prompt_dot_cuda.multiply_float_gated(x, weight)


ATTENTION: dict[str, Attention] = {"xla": attention_xla.attention, "pallas": _pallas_attention}
"""Attention over the paged cache by name: `xla` is the plain-XLA reference, for every platform; `pallas` is for NVIDIA
GPUs, and refuses to be traced for anything else."""

DOT: dict[str, DotKernels] = {
    "xla": dot_xla.IMPLEMENTATION,
    "pallas": DotKernels(
        _pallas_multiply,
        _pallas_multiply_gated,
        _pallas_quantize_8bit,
        _cuda_multiply_float,
        _cuda_multiply_float_gated,
    ),
}
"""Matrix products by name, with the same two meanings; those of bfloat16 are XLA's, but for many rows on Hopper."""


def _cuda_decode() -> Decode:
    from elastic_jax.kernels import decode_cuda

    return Decode(decode_cuda.takes, decode_cuda.run_layers, decode_cuda.takes_head, decode_cuda.run_head)


DECODE: dict[str, Callable[[], Decode | None]] = {"xla": lambda: None, "cuda": functools.cache(_cuda_decode)}
"""Steps that only generate, by name: `xla` composes them of attention and dots; `cuda` has kernels for whole layers,
for NVIDIA GPUs, and leaves steps of more tokens than it takes to be composed."""


def _cuda_choose(*operands: Any) -> tuple[Array, Array, Array]:
    from elastic_jax.kernels import sampling_cuda

    return sampling_cuda.choose(*operands)


SAMPLING: dict[str, Choose] = {"xla": choose_xla, "cuda": _cuda_choose}
"""Choosing tokens by name: `xla` is the plain-XLA reference, `cuda` is one launch on NVIDIA GPUs."""


def attention(name: str) -> Attention:
    """The implementation of attention of that name.

    Raises:
        ConfigError: there is none.
    """
    return _named(ATTENTION, name, "attention")


@functools.cache  # so that equal models are equal
def dot(name: str) -> Dot:
    """`quantization.dot` over the implementation of matrix products of that name.

    Raises:
        ConfigError: there is none.
    """
    return functools.partial(quantized_dot, kernels=_named(DOT, name, "dot"))


def decode(name: str) -> Decode | None:
    """The implementation of steps that only generate of that name; None composes them.

    Raises:
        ConfigError: there is none.
    """
    return _named(DECODE, name, "decode")()


def sampling(name: str) -> Choose:
    """The implementation of choosing tokens of that name.

    Raises:
        ConfigError: there is none.
    """
    return _named(SAMPLING, name, "sampling")


def prepare_to_load(attention: str, dot: str, decode: str, sampling: str) -> None:
    """Makes known to XLA what executables call by name; needed before they are loaded.

    Raises:
        ConfigError: a library cannot be loaded here.
    """
    if "pallas" in (attention, dot):  # On Hopper, those of many rows are kernels of a library.
        from elastic_jax.kernels import prompt_library

        prompt_library.register()
    if decode == "cuda":
        from elastic_jax.kernels import decode_cuda

        decode_cuda.register()
    if sampling == "cuda":
        from elastic_jax.kernels import sampling_cuda

        sampling_cuda.register()


def default_names(config: ModelConfig, platform: str, dtype: ComputeDtype) -> tuple[str, str, str]:
    """The attention, dot and decode used unless others are named: on GPUs, the kernels that the model's sizes
    and type allow.

    Args:
        config: the model.
        platform: `cpu` or `gpu`.
        dtype: compute type.
    """
    if platform != "gpu":
        return "xla", "xla", "xla"
    from elastic_jax.kernels import attention_pallas, decode_cuda, integer_dot_pallas

    def allowed(module: Any, name: str) -> str:
        try:
            module.check_model(config)
        except ConfigError:
            return "xla"
        return name

    decode = allowed(decode_cuda, "cuda") if dtype == "bfloat16" else "xla"
    return allowed(attention_pallas, "pallas"), allowed(integer_dot_pallas, "pallas"), decode


def default_sampling(platform: str) -> str:
    """The sampling used unless another is named: on GPUs `cuda`, except with JAX's plugin for CUDA 12.

    Args:
        platform: `cpu` or `gpu`.
    """
    if platform != "gpu":
        return "xla"
    from elastic_jax.kernels import sampling_cuda

    try:
        sampling_cuda.check_device()
    except ConfigError:
        return "xla"
    return "cuda"


def _named[T](implementations: Mapping[str, T], name: str, what: str) -> T:
    if name not in implementations:
        raise ConfigError(f"no {what} implementation is called {name!r}; there are {sorted(implementations)}")
    return implementations[name]
