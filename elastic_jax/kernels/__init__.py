"""Named implementations. Asking for one by name fails loudly where it does not exist; nothing falls back."""

from jaxtyping import Array

from elastic_jax.batch import TokenBatch
from elastic_jax.errors import ConfigError
from elastic_jax.kernels import attention_xla
from elastic_jax.model import Attention


def _pallas(query: Array, kv: Array, batch: TokenBatch) -> Array:
    # Importing Pallas takes half a second, which those who only run executables should not wait for.
    from elastic_jax.kernels import attention_pallas

    return attention_pallas.attention(query, kv, batch)


ATTENTION: dict[str, Attention] = {"xla": attention_xla.attention, "pallas": _pallas}
"""Attention over the paged cache by name: `xla` is the plain-XLA reference, for every platform; `pallas` is for NVIDIA
GPUs, and refuses to be traced for anything else."""


def attention(name: str) -> Attention:
    """The implementation of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in ATTENTION:
        raise ConfigError(f"no attention implementation is called {name!r}; there are {sorted(ATTENTION)}")
    return ATTENTION[name]
