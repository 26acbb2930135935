"""The Mistral architecture in Flax NNX, over flat tokens and a paged KV cache.

It is the model of Jiang et al. (arXiv:2310.06825) without sliding window: RMSNorm, rotary embedding, grouped-query
attention, SwiGLU. This file knows no quantization, plan, mesh or compilation: a weight is whatever the
caller's dot takes, and dot and attention are whichever implementations the caller names.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from elastic_jax.batch import TokenBatch
from elastic_jax.config import ModelConfig
from elastic_jax.groups import LM_HEAD
from elastic_jax.kv_cache import Cache, write
from elastic_jax.norm import RMSNorm

type Attention = Callable[[Array, Any, TokenBatch], Array]
"""(query [tokens, heads, dim], kv (a `kv_cache.Cache`), batch) -> float32 [tokens, heads, dim]."""

type Dot = Callable[..., Array]
"""(x [tokens, in], weight, *, generated, norm=None, gated=False, residual=None) -> [tokens, out], or if gated SwiGLU of
it (Shazeer, arXiv:2002.05202), [tokens, out / 2]; see `quantization.dot`."""


class Linear(nnx.Module):
    """A product with one group's weight, stored [out, in]."""

    def __init__(self, weight: Any, dot: Dot) -> None:
        self.weight = weight if isinstance(weight, nnx.Param) else nnx.Param(weight)
        self.dot = dot

    def __call__(
        self,
        x: Float[Array, "tokens in"],
        *,
        generated: int,
        norm: RMSNorm | None = None,
        gated: bool = False,
        residual: Float[Array, "tokens out"] | None = None,
    ) -> Float[Array, "tokens columns"]:
        """Multiplies.

        Args:
            x: activations, the generated tokens' rows first.
            generated: how many rows are those of generated tokens.
            norm: normalizes the activations first.
            gated: as in `Dot`.
            residual: what the product, rounded to its type, is added to.
        """
        weight = self.weight.get_value()
        return self.dot(x, weight, generated=generated, norm=norm, gated=gated, residual=residual)


def rotary_frequencies(head_dim: int, theta: float) -> Float32[Array, " half"]:
    """Radians a position of the rotary embedding: theta**(-2i / head_dim)."""
    # In float64 on the host: a float32 power would be off by whole radians at long contexts.
    return jnp.asarray(np.float32(theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)))


def rotation(
    position: Int32[Array, " tokens"], head_dim: int, theta: float
) -> tuple[Float32[Array, "tokens half"], Float32[Array, "tokens half"]]:
    """Cosine and sine of the rotary embedding's angles (Su et al., arXiv:2104.09864): position / theta**(2i/dim)."""
    angle = position.astype(jnp.float32)[:, None] * rotary_frequencies(head_dim, theta)[None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float32[Array, "tokens heads dim"], cos: Float32[Array, "tokens half"], sin: Float32[Array, "tokens half"]
) -> Float32[Array, "tokens heads dim"]:
    """Rotates pairs (i, i + dim/2), the order of Hugging Face's weights."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class SelfAttention(nnx.Module):
    """Grouped-query self-attention (Ainslie et al., arXiv:2305.13245) over the paged cache."""

    def __init__(self, config: ModelConfig, qkv: Any, o: Any, attention: Attention, dot: Dot) -> None:
        self.config = config
        self.qkv = Linear(qkv, dot)
        self.o = Linear(o, dot)
        self.attention = attention

    def __call__(
        self,
        x: Float[Array, "tokens hidden"],
        norm: RMSNorm,
        angles: tuple[Array, Array],
        kv: Cache,
        batch: TokenBatch,
    ) -> tuple[Float[Array, "tokens hidden"], Cache]:
        """Writes this step's keys and values into the cache, then attends over it.

        Returns:
            the residual stream with attention of its normalized copy added, and the cache.
        """
        c = self.config
        with jax.named_scope("qkv"):
            qkv = self.qkv(x, generated=batch.generated, norm=norm)
            q, k, v = jnp.split(qkv, (c.q_size, c.q_size + c.kv_size), axis=-1)
        with jax.named_scope("rotary"):
            q = rotate(q.reshape(-1, c.num_heads, c.head_dim), *angles)
            k = rotate(k.reshape(-1, c.num_kv_heads, c.head_dim), *angles)
            v = v.reshape(k.shape)
        with jax.named_scope("kv_write"):
            kv = write(kv, batch.slot, k, v)
        with jax.named_scope("attention"):
            out = self.attention(q.astype(kv.dtype), kv, batch)
        with jax.named_scope("o"):
            return self.o(out.reshape(-1, c.q_size), generated=batch.generated, residual=x), kv


class MLP(nnx.Module):
    """The gated MLP: down(silu(gate(x)) * up(x))."""

    def __init__(self, gate_up: Any, down: Any, dot: Dot) -> None:
        self.gate_up = Linear(gate_up, dot)
        self.down = Linear(down, dot)

    def __call__(
        self, x: Float[Array, "tokens hidden"], norm: RMSNorm, *, generated: int
    ) -> Float[Array, "tokens hidden"]:
        """The residual stream with the MLP of its normalized copy added."""
        with jax.named_scope("gate_up"):
            hidden = self.gate_up(x, generated=generated, norm=norm, gated=True)
        with jax.named_scope("down"):
            return self.down(hidden, generated=generated, residual=x)


class Block(nnx.Module):
    """One transformer layer: attention and MLP, each on a normalized copy of the residual stream."""

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Any], layer: int, attention: Attention, dot: Dot
    ) -> None:
        name = f"layers.{layer}"
        self.attention_norm = RMSNorm(weights[f"{name}.attention_norm"], config.rms_norm_eps)
        self.attention = SelfAttention(config, weights[f"{name}.qkv"], weights[f"{name}.o"], attention, dot)
        self.mlp_norm = RMSNorm(weights[f"{name}.mlp_norm"], config.rms_norm_eps)
        self.mlp = MLP(weights[f"{name}.gate_up"], weights[f"{name}.down"], dot)

    def __call__(
        self, x: Float[Array, "tokens hidden"], angles: tuple[Array, Array], kv: Cache, batch: TokenBatch
    ) -> tuple[Float[Array, "tokens hidden"], Cache]:
        """The residual stream after this layer, and the layer's cache."""
        x, kv = self.attention(x, self.attention_norm, angles, kv, batch)
        return self.mlp(x, self.mlp_norm, generated=batch.generated), kv


@dataclasses.dataclass(frozen=True)
class Decode:
    """An implementation of what steps of generated tokens alone run: all layers, and the language-model head, at once.

    What it computes is what `Block` and `Linear` compute.

    Attributes:
        takes: (layers, tokens) -> whether it runs so many tokens.
        run_layers: (layers, x, kv, batch) -> what `Mistral.__call__` returns.
        takes_head: (weight, rows) -> whether it runs so many rows.
        run_head: (norm, weight, x) -> what `Mistral.logits` returns.
    """

    takes: Callable[..., bool]
    run_layers: Callable[..., tuple[Array, tuple[Any, ...]]]
    takes_head: Callable[..., bool]
    run_head: Callable[..., Array]


class Mistral(nnx.Module):
    """The decoder.

    Args:
        config: the model's shape.
        weights: `embedding`, `final_norm`, `lm_head`, and per layer `attention_norm`, `mlp_norm` and its four groups,
            by name (`weights.py` lists them); arrays, `QArray`s, or `jax.ShapeDtypeStruct`s. Without `lm_head`, it is
            the embedding (tied).
        attention: the implementation of attention.
        dot: the implementation of products with weights.
        decode: runs the steps of generated tokens that it takes; None composes all steps of attention and dots.
        dtype: type of the residual stream.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Any],
        *,
        attention: Attention,
        dot: Dot,
        decode: Decode | None,
        dtype: jnp.dtype,
    ) -> None:
        self.config = config
        self.decode = decode
        self.dtype = dtype
        self.embedding = nnx.Param(weights["embedding"])
        self.layers = nnx.List([Block(config, weights, i, attention, dot) for i in range(config.num_layers)])
        self.final_norm = RMSNorm(weights["final_norm"], config.rms_norm_eps)
        self.lm_head = Linear(weights.get(LM_HEAD, self.embedding), dot)

    def __call__(
        self, token: Int32[Array, " tokens"], kv: tuple[Cache, ...], batch: TokenBatch
    ) -> tuple[Float[Array, "tokens hidden"], tuple[Cache, ...]]:
        """The residual stream after the last layer, and every layer's cache with this step's tokens in it."""
        with jax.named_scope("embed"):
            x = self.embedding.get_value().at[token].get(mode="clip").astype(self.dtype)
        generated_alone = batch.generated == token.shape[0]
        if self.decode is not None and generated_alone and self.decode.takes(self.layers, batch.generated):
            return self.decode.run_layers(self.layers, x, kv, batch)
        angles = rotation(batch.position, self.config.head_dim, self.config.rope_theta)
        written = []
        for i, (layer, cache) in enumerate(zip(self.layers, kv, strict=True)):
            with jax.named_scope(f"layer_{i}"):
                x, cache = layer(x, angles, cache, batch)
            written.append(cache)
        return x, tuple(written)

    def logits(self, x: Float[Array, "rows hidden"]) -> Float32[Array, "rows vocab"]:
        """Next-token logits of some rows of the residual stream."""
        with jax.named_scope("lm_head"):
            weight = self.lm_head.weight.get_value()
            if self.decode is not None and self.decode.takes_head(weight, x.shape[0]):
                return self.decode.run_head(self.final_norm, weight, x)
            return self.lm_head(x, generated=x.shape[0], norm=self.final_norm)
