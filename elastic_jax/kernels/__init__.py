"""Named implementations. Asking for one by name fails loudly where it does not exist; nothing falls back."""

from elastic_jax.errors import ConfigError
from elastic_jax.kernels import attention_xla
from elastic_jax.model import Attention

ATTENTION: dict[str, Attention] = {"xla": attention_xla.attention}
"""Attention over the paged cache by name: `xla` is the plain-XLA reference, for every platform."""


def attention(name: str) -> Attention:
    """The implementation of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in ATTENTION:
        raise ConfigError(f"no attention implementation is called {name!r}; there are {sorted(ATTENTION)}")
    return ATTENTION[name]
