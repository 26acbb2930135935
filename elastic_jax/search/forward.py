"""The model one layer at a time, over windows of text: what calibration and search measure with.

Layers are all of one shape, so one compiled unit serves every half of a layer (attention, MLP) that has the same
choices, and a measurement runs only the layers from the one that it changes on. The residual stream and attention are
float32 and `bf16` products have activations of 16 bits or more (`products.exact`): bfloat16's own rounding, which every
mode has, would hide what a single group adds.
"""

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from aot_cache.target import Device
from elastic_jax import kernels
from elastic_jax.batch import TokenBatch
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.config import ModelConfig
from elastic_jax.groups import LM_HEAD
from elastic_jax.model import MLP, Dot, RMSNorm, SelfAttention, rotation
from elastic_jax.plan import Choice, provisional_plans, stored_precision
from elastic_jax.quantization import QArray
from elastic_jax.search.distances import Distances, Head, Reference
from elastic_jax.search.products import Rounded, product
from elastic_jax.weights import PROMPT_ACTIVATIONS, Weights, load_weights

Role = Literal["prompt", "generated"]
"""Whose arithmetic all tokens of a window are computed in."""

ROLES: tuple[Role, ...] = ("prompt", "generated")

KINDS = ("qkv", "o", "gate_up", "down")
"""The groups of a layer, in the order they are computed."""

HALVES = {"attention": ("attention_norm", KINDS[:2]), "mlp": ("mlp_norm", KINDS[2:])}
"""The halves of a layer -> the norm and the groups of each."""

_PAGE = 64
_HEAD_TOKENS = {"cpu": 128, "gpu": 1024}
"""Tokens whose logits exist at the same time: few fit a processor's cache, many are needed to fill a GPU."""


class Forward:
    """A model with all its precisions on a device, and windows of text to run through it.

    Args:
        config: the model's.
        floats: its weights for mode XL, of one float type.
        integers: its groups as `QArray`s by name; None rounds the floats wherever int8 is used, as `convert` would.
        windows: int32 [windows, length], token ids; each window is a text of its own.
        device: where everything is, and runs.
    """

    def __init__(
        self,
        config: ModelConfig,
        floats: Weights,
        integers: Mapping[str, QArray] | None,
        windows: Int32[np.ndarray, "windows length"],
        device: Device,
    ) -> None:
        self.config = config
        self.windows = windows
        self._float, self._integer, self._device = floats, integers, device
        self.dot_name = kernels.default_names(config, device.platform, "float32")[1]

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        windows: Int32[np.ndarray, "windows length"],
        device: Device,
        workers: int,
    ) -> "Forward":
        """All of a checkpoint's weights: floats as float32 on a CPU, which multiplies them faster, else as bfloat16.

        Args:
            checkpoint: must hold every group in bf16 and in int8.
            windows: int32 [windows, length].
            device: where everything runs.
            workers: threads that read weights.

        Raises:
            CheckpointError: a precision is not stored, or is damaged.
        """
        plans = provisional_plans(checkpoint.config)
        dtype = "float32" if device.platform == "cpu" else "bfloat16"
        floats = load_weights(checkpoint, plans["XL"], dtype, device, workers=workers, progress=None)
        integers = load_weights(checkpoint, plans["L"], dtype, device, workers=workers, progress=None)
        kept = {name: weight for name, weight in integers.items() if isinstance(weight, QArray)}
        return cls(checkpoint.config, floats, kept, windows, device)

    def over(self, windows: Int32[np.ndarray, "windows length"]) -> "Forward":
        """The same model and device over other text; weights are shared."""
        other = copy.copy(self)
        other.windows = windows
        return other

    def weight(self, group: str, choice: Choice) -> Any:
        """A group's weight as a choice reads it: a float matrix, a `QArray`, or a `Rounded`."""
        matrix = self._float.get(group, self._float["embedding"])  # a tied head
        if stored_precision(choice) == "bf16":
            return matrix
        if self._integer is None:
            return Rounded(matrix, PROMPT_ACTIVATIONS[choice])
        return dataclasses.replace(self._integer[group], prompt_activations=PROMPT_ACTIVATIONS[choice])

    def norm(self, name: str) -> Array:
        """A norm's weight by its name in `Weights`."""
        return self._float[name]

    def half_weights(self, half: str, layer: int, choices: Sequence[Choice]) -> dict[str, Any]:
        """The norm and the groups of half a layer, by name and kind."""
        norm, kinds = HALVES[half]
        weights = {kind: self.weight(f"layers.{layer}.{kind}", choices[KINDS.index(kind)]) for kind in kinds}
        return weights | {norm: self.norm(f"layers.{layer}.{norm}")}

    @property
    def shape(self) -> tuple[int, int]:
        """Windows, and tokens of each."""
        return self.windows.shape

    def embed(self) -> Float32[Array, "tokens hidden"]:
        """The residual stream before the first layer."""
        return _embed(self._float["embedding"], jax.device_put(self.windows.reshape(-1), self._device))

    def layer(
        self, x: Float32[Array, "tokens hidden"], layer: int, choices: Sequence[Choice], role: Role
    ) -> Float32[Array, "tokens hidden"]:
        """The residual stream after one layer, whose four groups are computed by `choices`."""
        return self._run(x, layer, choices, role, capture=False)[0]

    def inputs(
        self, x: Float32[Array, "tokens hidden"], layer: int
    ) -> tuple[Float32[Array, "tokens hidden"], dict[str, Float32[Array, "tokens in"]]]:
        """The residual stream after one layer of the original model, and the input of each of its groups by kind."""
        out, captured = self._run(x, layer, ("bf16",) * 4, "prompt", capture=True)
        return out, dict(zip(KINDS, captured, strict=True))

    def _run(
        self, x: Array, layer: int, choices: Sequence[Choice], role: Role, *, capture: bool
    ) -> tuple[Array, tuple[Array, ...]]:
        """The two halves of a layer, compiled apart: a plan has far fewer kinds of halves than of layers."""
        captured: tuple[Array, ...] = ()
        for half in HALVES:
            weights = self.half_weights(half, layer, choices)
            x, found = _half(x, weights, half, self.config, self.shape, role, self.dot_name, capture=capture)
            captured += found
        return x, captured

    def run(
        self, x: Float32[Array, "tokens hidden"], first: int, plan: Mapping[str, Choice], role: Role
    ) -> Float32[Array, "tokens hidden"]:
        """The residual stream after the last layer, from the one before layer `first` on."""
        for layer in range(first, self.config.num_layers):
            x = self.run_layer(x, layer, plan, role)
        return x

    def run_layer(
        self, x: Float32[Array, "tokens hidden"], layer: int, plan: Mapping[str, Choice], role: Role
    ) -> Float32[Array, "tokens hidden"]:
        """The residual stream after one layer of a plan."""
        return self.layer(x, layer, layer_choices(plan, layer), role)

    def reference(self, stream: Float32[Array, "tokens hidden"]) -> Reference:
        """The original model's distributions, from its residual stream after the last layer."""
        return Reference(stream, self.windows, self.head)

    @property
    def head(self) -> Head:
        """What makes logits of the original model."""
        tokens = _HEAD_TOKENS.get(self._device.platform, _HEAD_TOKENS["gpu"])
        return Head(
            self.norm("final_norm"), self.weight(LM_HEAD, "bf16"), self.config.rms_norm_eps, self.dot_name, tokens
        )

    def compare(self, reference: Reference, candidates: Sequence[Array], head: Choice) -> Any:
        """Begins to compare candidates' last residual streams with the reference; `gather` waits for the result.

        Args:
            reference: of the original model.
            candidates: float32 [tokens, hidden] each.
            head: the candidates' choice for the language-model head.
        """
        return reference.compare(candidates, self.weight(LM_HEAD, head))

    def gather(self, reference: Reference, found: Any) -> Distances:
        """What `compare` began."""
        return reference.gather(found)


def layer_choices(plan: Mapping[str, Choice], layer: int) -> tuple[Choice, ...]:
    """A plan's choices for one layer, in the order of `KINDS`."""
    return tuple(plan[f"layers.{layer}.{kind}"] for kind in KINDS)


@jax.jit
def _embed(embedding: Array, tokens: Array) -> Array:
    return embedding.at[tokens].get(mode="clip").astype(jnp.float32)


def _batch(shape: tuple[int, int], generated: int) -> TokenBatch:
    windows, length = shape
    pages = -(-length // _PAGE)
    row = jnp.repeat(jnp.arange(windows, dtype=jnp.int32), length)
    position = jnp.tile(jnp.arange(length, dtype=jnp.int32), windows)
    return TokenBatch(
        row=row,
        position=position,
        slot=row * (pages * _PAGE) + position,
        block_table=jnp.arange(windows * pages, dtype=jnp.int32).reshape(windows, pages),
        context_length=jnp.full(windows, length, jnp.int32),
        generated=generated,
        page_size=_PAGE,
    )


def _attention(query: Array, kv: Array, batch: TokenBatch) -> Array:
    """Causal attention within windows that are all of one length, from dense products, which can be differentiated."""
    windows, (tokens, heads, dim), kv_heads = batch.rows, query.shape, kv.shape[2]
    length = tokens // windows
    keys, values = jnp.moveaxis(kv.reshape(windows, -1, 2, kv_heads, dim)[:, :length], 2, 0)
    grouped = query.reshape(windows, length, kv_heads, heads // kv_heads, dim)
    highest = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("wlhgd,wmhd->whglm", grouped, keys, precision=highest) / np.float32(np.sqrt(dim))
    visible = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(visible[None, None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("whglm,wmhd->wlhgd", weights, values, precision=highest).reshape(tokens, heads, dim)


def run_half(
    x: Array,
    weights: Mapping[str, Any],
    half: str,
    config: ModelConfig,
    shape: tuple[int, int],
    role: Role,
    dot: Dot,
) -> Array:
    """The residual stream after attention or MLP: `model.Block` adds one after the other."""
    batch = _batch(shape, shape[0] * shape[1] if role == "generated" else 0)
    normed = RMSNorm(weights[HALVES[half][0]], config.rms_norm_eps)(x)
    if half == "attention":
        slots = batch.block_table.size * _PAGE
        cache = jnp.zeros((slots, 2, config.num_kv_heads, config.head_dim), jnp.float32)
        angles = rotation(batch.position, config.head_dim, config.rope_theta)
        added, _ = SelfAttention(config, weights["qkv"], weights["o"], _attention, dot)(normed, angles, cache, batch)
    else:
        added = MLP(weights["gate_up"], weights["down"], dot)(normed, generated=batch.generated)
    return x + added


@functools.partial(jax.jit, static_argnames=("half", "config", "shape", "role", "dot_name", "capture"))
def _half(
    x: Array,
    weights: dict[str, Any],
    half: str,
    config: ModelConfig,
    shape: tuple[int, int],
    role: Role,
    dot_name: str,
    *,
    capture: bool,
) -> tuple[Array, tuple[Array, ...]]:
    """`run_half`, and the inputs of its groups."""
    named_dot, captured = product(dot_name), []

    def dot(x: Array, weight: Any, *, generated: int, gated: bool = False) -> Array:
        captured.append(x.astype(jnp.float32))
        return named_dot(x, weight, generated=generated, gated=gated)

    out = run_half(x, weights, half, config, shape, role, dot)
    return out, tuple(captured) if capture else ()
