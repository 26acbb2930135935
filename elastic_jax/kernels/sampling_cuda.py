"""Choosing tokens in one launch, in CUDA C++ (`cuda/sampling.cuh`), for NVIDIA GPUs.

The plain-XLA reference is dozens of launches, and conditions whose values the host waits for. Here several blocks share
a row and look at it a few times; what a row does not ask for (penalties, top-k, top-p) costs it nothing. The
mathematics is that of `sampling.choose`; only the rounding of its sums differs, which are exact here.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from elastic_jax import sampling as reference
from elastic_jax.kernels import cuda_library
from elastic_jax.kernels.pallas_device import compute_capability
from elastic_jax.sampling import SampledRows, SamplingInputs

_NAME = "the sampling called 'cuda'"
_INSTEAD = "use the one called 'xla' instead"

_TARGETS = {"elastic_sample": "ElasticSample", "elastic_most_likely": "ElasticMostLikely"}

_GENERATIONS = (8, 9, 10, 12)
"""Compute capabilities before the point that the library has machine code for."""

SCRATCH_BYTES = 8 * (2 + 32 + 2 * 3 * 2048) + 16
"""Of a row; sampling.cuh's `ChoiceScratch`."""

MOST_TOKENS = 1 << 20
"""Vocabulary at most, for which sums of probabilities fit into 64 bits."""


def library_path() -> Path:
    """The library of kernels, which `cuda/build.sh` builds."""
    return cuda_library.path_of("libelastic_sampling.so")


@functools.cache
def register() -> None:
    """Makes the kernels known to XLA; needed before a program with them is compiled or loaded. Needs no GPU.

    Raises:
        ConfigError: the library cannot be loaded on this machine.
    """
    cuda_library.register(library_path(), _TARGETS, _NAME, _INSTEAD)


def check_device() -> None:
    """Refuses CUDA 12, whose runtime the library does not have.

    Raises:
        ConfigError: JAX's plugin here is that of CUDA 12.
    """
    cuda_library.refuse_cuda_12(_NAME, _INSTEAD)


def choose(
    logits: Float32[Array, "outputs vocab"],
    sampling: SamplingInputs | None,
    row: Int32[Array, " outputs"],
    position: Int32[Array, " outputs"],
    rows: SampledRows,
) -> tuple[Int32[Array, " outputs"], Float32[Array, " outputs"], Bool[Array, " outputs"]]:
    """`sampling.choose`. GPUs of generations that the library is not for, and larger vocabularies, get the reference.

    Raises:
        ConfigError: the program is not traced for an NVIDIA GPU, or the library cannot be loaded.
    """
    outputs, vocab = logits.shape
    if compute_capability(_NAME, _INSTEAD) // 10 not in _GENERATIONS or vocab > MOST_TOKENS:
        return reference.choose(logits, sampling, row, position, rows)
    register()
    shape = jax.ShapeDtypeStruct
    found = shape((outputs,), jnp.int32), shape((outputs,), jnp.float32), shape((outputs,), jnp.bool_)
    scratch = shape((outputs * SCRATCH_BYTES,), jnp.uint8)
    if sampling is None:
        token, log_probability, finite, _ = jax.ffi.ffi_call("elastic_most_likely", (*found, scratch))(logits)
        return token, log_probability, finite
    scaled = shape((outputs, vocab), jnp.float32)
    token, log_probability, finite, _, _ = jax.ffi.ffi_call("elastic_sample", (*found, scaled, scratch))(
        logits,
        row,
        position,
        rows.key,
        rows.counts,
        rows.prompt_mask,
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
        sampling.repetition_penalty,
        sampling.presence_penalty,
        sampling.frequency_penalty,
        sampling.choice,
        sampling.bias_token,
        sampling.bias,
        sampling.allowed,
    )
    return token, log_probability, finite
