"""Named implementations. Asking for one by name fails loudly where it does not exist; nothing falls back."""

import functools
from collections.abc import Mapping

from jaxtyping import Array

from elastic_jax.batch import TokenBatch
from elastic_jax.config import ModelConfig
from elastic_jax.errors import ConfigError
from elastic_jax.kernels import attention_xla, integer_dot_xla
from elastic_jax.model import Attention, Dot
from elastic_jax.quantization import IntegerDot
from elastic_jax.quantization import dot as quantized_dot


def _pallas_attention(query: Array, kv: Array, batch: TokenBatch) -> Array:
    # Importing Pallas takes half a second, which those who only run executables should not wait for.
    from elastic_jax.kernels import attention_pallas

    return attention_pallas.attention(query, kv, batch)


def _pallas_integer_dot(x: Array, row_scales: Array, values: Array, scales: Array) -> Array:
    from elastic_jax.kernels import integer_dot_pallas

    return integer_dot_pallas.integer_dot(x, row_scales, values, scales)


ATTENTION: dict[str, Attention] = {"xla": attention_xla.attention, "pallas": _pallas_attention}
"""Attention over the paged cache by name: `xla` is the plain-XLA reference, for every platform; `pallas` is for NVIDIA
GPUs, and refuses to be traced for anything else."""

INTEGER_DOT: dict[str, IntegerDot] = {"xla": integer_dot_xla.integer_dot, "pallas": _pallas_integer_dot}
"""Products of int8 by name, with the same two meanings."""


def attention(name: str) -> Attention:
    """The implementation of attention of that name.

    Raises:
        ConfigError: there is none.
    """
    return _named(ATTENTION, name, "attention")


@functools.cache  # so that equal models are equal
def dot(name: str) -> Dot:
    """`quantization.dot` over the implementation of integer dots of that name.

    Raises:
        ConfigError: there is none.
    """
    return functools.partial(quantized_dot, integer_dot=_named(INTEGER_DOT, name, "integer dot"))


def default_names(config: ModelConfig, platform: str) -> tuple[str, str]:
    """The attention and the integer dot used unless others are named: Pallas's on GPUs where the model's sizes allow.

    Args:
        config: the model.
        platform: `cpu` or `gpu`.
    """
    if platform != "gpu":
        return "xla", "xla"
    from elastic_jax.kernels import attention_pallas, integer_dot_pallas

    names = []
    for module in (attention_pallas, integer_dot_pallas):
        try:
            module.check_model(config)
            names.append("pallas")
        except ConfigError:
            names.append("xla")
    return names[0], names[1]


def _named[T](implementations: Mapping[str, T], name: str, what: str) -> T:
    if name not in implementations:
        raise ConfigError(f"no {what} implementation is called {name!r}; there are {sorted(implementations)}")
    return implementations[name]
