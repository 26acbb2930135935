"""The library of kernels for prompts on Hopper (`cuda/prompt.cu`): products and attention of many rows."""

import functools
from pathlib import Path

from elastic_jax.kernels import cuda_library

CAPABILITY = 90
"""The one compute capability that has these instructions, ten times its number."""

DOT, ATTENTION = "elastic_prompt_dot", "elastic_prompt_attention"
"""Custom calls in programs."""

_TARGETS = {DOT: "ElasticPromptDot", ATTENTION: "ElasticPromptAttention"}


def library_path() -> Path:
    """The library, which `cuda/build.sh` builds."""
    return cuda_library.path_of("libelastic_prompt.so")


@functools.cache
def register() -> None:
    """Makes the kernels known to XLA; needed before a program with them is compiled or loaded. Needs no GPU.

    Raises:
        ConfigError: the library cannot be loaded on this machine.
    """
    instead = "use those called 'xla' instead"
    cuda_library.register(library_path(), _TARGETS, "the dot and the attention called 'pallas'", instead)
